"""The judges of the small world: a model that knows is right, one that ignores or is biased is told apart."""
import random

import numpy as np
import pytest

from nanomagvlt.config import preset
from nanomagvlt.data import shapes
from nanomagvlt.evaluation.small_world import (
    evaluate_bias, evaluate_editing, evaluate_pairs, evaluate_scenes, names_the_objects, share_over_scenes,
    unseen_scenes)
from nanomagvlt.tokenizers.bpe import BPE

TINY = shapes.get_level("tiny")


class Model:
    """Draws and describes change(scene) for each scene that is given in words or in pixels. Its tokens are pixels."""
    image_to_tokens = tokens_to_image = staticmethod(lambda images: images)
    caption_lengths = staticmethod(lambda captions: [8, 7] * (len(captions) // 2))

    def __init__(self, change=lambda scene: scene):
        self.change = change

    def draw(self, prompts, generator):
        scenes = (next(scene for scene in shapes.enumerate_scenes(TINY) if shapes.judge(claims, scene).exact)
                  for claims in map(shapes.parse, prompts))
        return np.stack([shapes.draw_scene(self.change(scene), TINY) for scene in scenes])

    def caption(self, images, generator):
        scenes = [self.change(reading.scene) for reading in shapes.read_images(images, TINY)]
        return [shapes.describe(scene, TINY, random.Random(0)) for scene in scenes], [7] * len(scenes)


def test_a_model_that_knows_is_right():
    results = evaluate_scenes(Model(), TINY, 20)
    assert results["length"].value == results["length_constant"] == 0.5
    assert results["t2i_exact_ignoring"].value < 0.1 and results["i2t_facts_ignoring"].value < 0.7


def test_a_model_that_ignores_its_condition_is_at_the_baseline():
    results = evaluate_scenes(Model(lambda scene: next(shapes.enumerate_scenes(TINY))), TINY, 40)
    for task in ("t2i", "i2t"):
        assert results[f"{task}_exact"].value < 0.1
        assert results[f"{task}_facts"].value == pytest.approx(results[f"{task}_facts_ignoring"].value, abs=0.02)


def test_a_biased_model_gives_the_usual_colours():
    def usual(scene):
        return shapes.Scene(scene.background, tuple(shapes.Thing(t.shape, shapes.USUAL[t.shape], t.size, t.cell)
                                                    for t in scene.things))
    for model, true in ((Model(), 1), (Model(usual), 0)):
        results = evaluate_bias(model, shapes.get_level("tiny-biased"), 10)
        assert results["scenes"] == 10 and results["i2t_seen"].value == results["t2i_asked"].value == true
        assert results["i2t_usual"].value == results["t2i_usual"].value == 1 - true


def test_unseen_scenes_are_of_the_test_split_each_once():
    scenes = unseen_scenes(TINY, 1000)
    assert set(scenes) == {scene for scene in shapes.enumerate_scenes(TINY) if shapes.split_of(scene) == "test"}
    assert len(scenes) == len(set(scenes)) and len(set(unseen_scenes(TINY, 7))) == 7


def test_the_interval_is_wilsons_over_scenes():
    """The ends are the shares p whose z statistic is 1.96; two values of one scene count once."""
    for right, n in ((15, 50), (9, 10), (500, 1000)):
        share = share_over_scenes([1, 1] * right + [0, 0] * (n - right), 2)
        assert share.value == right / n
        for p in (share.low, share.high):
            assert abs(share.value - p) / (p * (1 - p) / n) ** 0.5 == pytest.approx(1.96)
    assert share_over_scenes([0] * 100, 1).low == 0 and share_over_scenes([1] * 100, 1).high == pytest.approx(1)


def test_objects_are_named_wherever_they_are():
    scene = shapes.Scene("white", (shapes.Thing("circle", "red", "big", 0), shapes.Thing("square", "blue", "big", 3)))
    for caption, expected in (("a blue square below a red circle", True), ("a blue square above a red circle", True),
                              ("a blue circle and a red square", False), ("a red circle", False), ("circle", False)):
        assert names_the_objects(shapes.parse(caption), scene) == expected, caption


class Editor(Model):
    """Generates what was hidden if it knows; or else the next scene's image, and the caption's first token."""
    cfg, bpe, knows = preset("tiny", text_length=60), BPE([]), True

    def draw_tokens(self, prompts, generator, images, to_fill):
        assert (to_fill.sum(1) == 4).all()  # a cell, or the centre, of 4 x 4
        self.images = images if self.knows else np.roll(images, 2, 0)
        return self.images, []

    def write_tokens(self, images, generator, text, lengths, to_fill):
        self.text = text, lengths
        return text if self.knows else text.masked_fill(to_fill, text[0, 0]), lengths, []

    def make_pairs(self, count, generator, image=None, text=None):
        if image is None:
            return self.images, *self.text, {}
        return np.roll(image[0], 2, 0), text[0].masked_fill(text[2], 0), text[1], {}

    def read_texts(self, tokens, lengths, cut=True):
        return [self.bpe.decode(row[:n - 1]) for row, n in zip(tokens.tolist(), lengths.tolist())]


def test_editing_is_judged_whole():
    level, editor = shapes.get_level("micro"), Editor()
    for editor.knows in (True, False):
        results = evaluate_editing(editor, level, 10) | evaluate_pairs(editor, level, 20)
        for name in ("object_inpainted", "object_infilled", "centre_inpainted", "centre_infilled"):
            assert results[name].value == 1 if editor.knows else results[name].value < 0.3, name
            assert results[f"{name}_without"].value < 0.3, name
        assert results["pairs_agree"].value == 1 if editor.knows else results["pairs_agree"].value < 0.3
