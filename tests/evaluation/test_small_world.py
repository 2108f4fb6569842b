import random

import numpy as np
import pytest
import torch

from nanomagvlt.data import shapes
from nanomagvlt.tokenizers.bpe import BPE
from nanomagvlt.config import preset
from nanomagvlt.evaluation.small_world import (as_json, evaluate_bias, evaluate_editing, evaluate_pairs, evaluate_scenes,
                                names_the_objects, scene_table, share_over_scenes, unseen_scenes, wilson)

TINY = shapes.get_level("tiny")


class Knows:
    """Draws what is asked and tells what is there; a tokenizer without loss."""

    def draw(self, prompts, generator):
        return np.stack([shapes.draw_scene(next(iter(self.meant(prompt))), TINY) for prompt in prompts])

    def meant(self, prompt):
        claim = shapes.parse(prompt)
        return [scene for scene in shapes.enumerate_scenes(TINY) if shapes.judge(claim, scene).exact]

    def caption(self, images, generator):
        scenes = [reading.scene for reading in shapes.read_images(images, TINY)]
        return [shapes.describe(scene, TINY, random.Random(0)) for scene in scenes], [7] * len(scenes)

    def caption_lengths(self, captions):
        return [7 if i % 2 else 8 for i in range(len(captions))]

    def image_to_tokens(self, images):
        return images

    def tokens_to_image(self, tokens):
        return tokens


class Ignores(Knows):
    """Draws and captions well, always the same scene."""
    scene = next(shapes.enumerate_scenes(TINY))

    def draw(self, prompts, generator):
        return np.stack([shapes.draw_scene(self.scene, TINY)] * len(prompts))

    def caption(self, images, generator):
        return [shapes.describe(self.scene, TINY, random.Random(0))] * len(images), [7] * len(images)


def test_one_who_knows_is_all_right_and_beats_one_who_ignores():
    results = evaluate_scenes(Knows(), TINY, 20)
    assert all(results[name].value == 1
               for name in ("t2i_exact", "t2i_facts", "i2t_exact", "i2t_facts", "i2t_objects", "reconstruction"))
    assert results["length"].value == results["length_constant"] == 0.5
    assert results["t2i_exact_ignoring"].value < 0.1 and results["i2t_facts_ignoring"].value < 0.7
    assert scene_table(results).count("1.000 [") == 6
    assert as_json(results)["t2i_exact"]["value"] == 1


def test_one_who_ignores_gets_what_ignoring_gets():
    results = evaluate_scenes(Ignores(), TINY, 40)
    assert results["t2i_exact"].value < 0.1 and results["i2t_exact"].value < 0.1
    for task in ("t2i", "i2t"):
        assert results[f"{task}_facts"].value == pytest.approx(results[f"{task}_facts_ignoring"].value, abs=0.02)


def test_unseen_scenes_are_of_the_test_split_each_once():
    scenes = unseen_scenes(TINY, 1000)
    assert set(scenes) == {scene for scene in shapes.enumerate_scenes(TINY) if shapes.split_of(scene) == "test"}
    assert len(unseen_scenes(TINY, 7)) == 7 == len(set(unseen_scenes(TINY, 7))) and len(scenes) == len(set(scenes))


def test_wilson_interval_against_its_definition():
    """The ends are the shares p whose z statistic is 1.96."""
    for share, n in ((0.3, 50), (0.9, 10), (0.5, 1000)):
        for p in wilson(share, n):
            assert abs(share - p) / (p * (1 - p) / n) ** 0.5 == pytest.approx(1.96)
    assert wilson(0.0, 100)[0] == 0 and wilson(1.0, 100)[1] == pytest.approx(1) and 0.02 < wilson(0.0, 100)[1] < 0.05


def test_scenes_count_as_independent_not_phrasings():
    share = share_over_scenes([1, 1, 1, 0, 0, 0, 0, 0], 2)
    assert (share.value, (share.low, share.high)) == (0.375, wilson(0.375, 4))


class Edits:
    """Who knows all tokens, or puts another scene's where something is to be made. Image tokens are images' numbers."""
    cfg = preset("micro", text_length=60, task_weights=(1.0, 1.0, 1.0))
    bpe = BPE([])

    def __init__(self, knows: bool):
        self.knows = knows

    def image_to_tokens(self, images):
        self.images = images
        return torch.arange(len(images))[:, None].repeat(1, 16)

    def tokens_to_image(self, tokens):
        assert (tokens == tokens[:, :1]).all()
        return self.images[tokens[:, 0].numpy()]

    def draw_tokens(self, prompts, generator, tokens, holes):
        assert holes.shape == tokens.shape and (holes.sum(1) == 4).all()  # a cell, or the centre, of 4 x 4
        return tokens if self.knows else tokens.roll(2, 0), []

    def write_tokens(self, image_tokens, generator, text, lengths, gaps):
        self.text, self.lengths = text, lengths
        return text if self.knows else text.masked_fill(gaps, text[0, 0]), lengths, []

    def make_pairs(self, count, generator, image=None, text=None):
        if image is None:  # captions of the images that were asked for or, by who knows nothing, of the next ones
            tokens = torch.arange(count)[:, None].repeat(1, 16)
            return tokens if self.knows else tokens.roll(2, 0), self.text, self.lengths, []
        return image[0].roll(2, 0), text[0].masked_fill(text[2], 0), text[1], []

    def read_texts(self, text_tokens, lengths, cut=True):
        return [self.bpe.decode([i for i in row[:n] if i != self.bpe.end])
                for row, n in zip(text_tokens.tolist(), lengths.tolist())]


def test_objects_are_named_wherever_they_are():
    scene = shapes.Scene("white", (shapes.Thing("circle", "red", "big", 0), shapes.Thing("square", "blue", "big", 3)))
    for caption, expected in (("a blue square below a red circle", True), ("a blue square above a red circle", True),
                              ("a blue circle and a red square", False), ("a red circle", False), ("circle", False)):
        assert names_the_objects(shapes.parse(caption), scene) == expected, caption


def test_editing_is_judged_whole():
    level = shapes.get_level("micro")
    editors = Edits(True), Edits(False)
    right, wrong = (evaluate_editing(editor, level, 10) for editor in editors)
    for name in ("object_inpainted", "object_infilled", "centre_inpainted", "centre_infilled"):
        assert right[name].value == 1 and wrong[name].value < 0.3, name
        assert right[f"{name}_without"].value < 0.3
    agree = [evaluate_pairs(editor, level, 2 * right["scenes"])["pairs_agree"].value for editor in editors]
    assert agree[0] == 1 and agree[1] < 0.3


class Habit(Knows):
    """Sees and draws every shape where it is, in its usual colour."""

    def usual(self, scene):
        return shapes.Scene(scene.background, tuple(shapes.Thing(t.shape, shapes.USUAL[t.shape], t.size, t.cell)
                                                    for t in scene.things))

    def draw(self, prompts, generator):
        return np.stack([shapes.draw_scene(self.usual(self.meant(prompt)[0]), TINY) for prompt in prompts])

    def caption(self, images, generator):
        scenes = [self.usual(reading.scene) for reading in shapes.read_images(images, TINY)]
        return [shapes.describe(scene, TINY, random.Random(0)) for scene in scenes], [7] * len(scenes)


def test_who_knows_says_what_is_there_and_who_has_habits_what_is_usual():
    for pipeline, seen in ((Knows(), 1), (Habit(), 0)):
        results = evaluate_bias(pipeline, shapes.get_level("tiny-biased"), 10)
        assert results["scenes"] == 10
        assert [results[name].value for name in ("i2t_seen", "t2i_asked", "i2t_usual", "t2i_usual")] == [
            seen, seen, 1 - seen, 1 - seen]
