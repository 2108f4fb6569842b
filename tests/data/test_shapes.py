"""The small world must be exact: what is drawn reads back, and what is described parses back, and nothing else does."""
from collections import Counter
from dataclasses import replace
from itertools import product
from random import Random

import numpy as np
import pytest
from PIL import Image, ImageFilter

from nanomagvlt.data.shapes import (
    CELL, CELLS, LEVELS, RELATIONS, RGB, SIDES, THRESHOLD, USUAL, Claims, Scene, Thing, Verdict, captions, describe,
    draw_cell, draw_scene, enumerate_scenes, get_level, judge, parse, places, random_scene, read_images, split_of,
    templates, tile_errors)

MICRO, TINY, FULL = UNBIASED = [level for level in LEVELS.values() if not level.bias]
each_level = pytest.mark.parametrize("level", UNBIASED, ids=lambda level: level.name)


def sample(level, n, seed=0):
    rng = Random(seed)
    return [random_scene(level, rng) for _ in range(n)]


def neighbours(scene, level):
    """Every scene one change away: one attribute of one object, the background, an object more or fewer."""
    things = scene.things
    free = [cell for cell in range(4) if cell not in [thing.cell for thing in things]]
    for background in level.backgrounds:
        yield replace(scene, background=background)
    for i, thing in enumerate(things):
        rest = things[:i] + things[i + 1:]
        yield Scene(scene.background, rest)
        changes = {"shape": level.shapes, "colour": level.colours, "size": level.sizes, "cell": free}
        for change in ({name: value} for name, values in changes.items() for value in values):
            yield Scene(scene.background, (*rest, thing._replace(**change)))
    for cell in free:
        yield Scene(scene.background, (*things, things[0]._replace(cell=cell)))


def clean(images, level):
    return np.array([reading.is_clean for reading in read_images(np.stack(images), level)])


def test_levels_list_their_scenes():
    for level, count in ((MICRO, 96), (TINY, 1824)):
        scenes = list(enumerate_scenes(level))
        assert len(scenes) == len(set(scenes)) == count and set(sample(level, 500)) <= set(scenes)
    counts = Counter(len(scene.things) for scene in sample(FULL, 2000))
    assert [round(counts[n] / 2000, 1) for n in (1, 2, 3)] == [0.3, 0.5, 0.2]
    with pytest.raises(ValueError, match="'tinny'.* 'tiny'"):
        get_level("tinny")


def test_splits_depend_on_the_scene_alone():
    shares = Counter(map(split_of, enumerate_scenes(TINY)))
    assert shares == {"train": 1449, "val": 191, "test": 184}  # another split would leak test scenes
    assert all(split_of(Scene(s.background, s.things[::-1])) == split_of(s) for s in sample(FULL, 300))
    for level, split in product(LEVELS.values(), shares):
        assert {split_of(random_scene(level, Random(i), split)) for i in range(20)} == {split}
    with pytest.raises(ValueError, match="'dev'"):
        random_scene(TINY, Random(0), "dev")


def test_a_biased_level_prefers_the_usual_colour():
    things = [thing for scene in sample(LEVELS["tiny-biased"], 3000) for thing in scene.things]
    usual = sum(thing.colour == USUAL[thing.shape] for thing in things) / len(things)
    assert abs(usual - (0.9 + 0.1 / 4)) < 0.02


@each_level
def test_every_caption_is_exact_of_its_scene_and_of_no_other(level):
    scenes = {MICRO: enumerate_scenes(MICRO), TINY: sample(TINY, 60), FULL: sample(FULL, 8)}[level]
    for seed, scene in enumerate(scenes):
        stated = list(captions(scene, level))
        assert len(stated) == len(set(stated)) and all(judge(parse(caption), scene).exact for caption in stated)
        rng = Random(seed)
        some = {describe(scene, level, rng) for _ in range(10)}
        assert some <= set(stated) and len(some) > 2
        everything = [c for c in stated if c.endswith("background") and c.count(" in the ") == len(scene.things)
                      and (level != FULL or c.count("small") + c.count("big") == len(scene.things))]
        for other in neighbours(scene, level):  # the captions of another scene are listed independently
            true = set(captions(other, level)) if other.things else set()
            assert all(judge(parse(c), other).exact == (c in true) for c in some)
            assert other == scene or not judge(parse(everything[-1]), other).exact
        assert parse(f" \n{stated[-1].upper()}\t") == parse(stated[-1])
        assert parse(stated[-1].replace(" ", "  ", 1)) is None


def test_relations_are_strict():
    """The cells b of which 0 and 3, the top left and the bottom right, are above, below, left and right."""
    for a, true in ((0, {"above": [2, 3], "below": [], "left of": [1, 3], "right of": []}),
                    (3, {"above": [], "below": [0, 1], "left of": [], "right of": [0, 2]})):
        assert {name: [b for b in range(4) if holds(a, b)] for name, holds in RELATIONS.items()} == true


def test_facts_are_counted_one_by_one():
    scene = Scene("white", (Thing("circle", "red", "big", 0), Thing("square", "blue", "small", 3)))
    for caption, verdict in {
        "a blue square and a red circle": Verdict(True, 6, 6),
        "a red circle": Verdict(False, 3, 4),  # the square is left out
        "a red circle and a red square": Verdict(False, 5, 6),
        "a small red circle and a blue square in the top right": Verdict(False, 6, 8),
        "a red circle left of a blue square": Verdict(True, 7, 7),
        "a red circle below a blue square": Verdict(False, 6, 7),
        "a red circle and a blue square on a black background": Verdict(False, 6, 7),
        "a red circle above a blue square and a green cross": Verdict(False, 7, 11),
        "a red circle in the top left and a blue square in the top left": Verdict(False, 7, 8),
        "a red circle in the top": Verdict(False, 0, 6),
    }.items():
        assert judge(parse(caption), scene) == verdict, caption
    objects = Thing("circle", "red"), Thing("square", "blue")
    assert parse("a red circle above a blue square") == Claims(objects, "above")


def test_garbage_is_not_forgiven():
    classes = [{"top", "bottom"}, {"left", "right"}, {"above", "below", "and"},
               *map(set, (FULL.backgrounds, FULL.shapes, FULL.colours, FULL.sizes))]
    words = sorted({"a", "in", "the", "of", "and", "there", "is", "on", "background", *" ".join(CELLS).split(),
                    *set().union(*classes)})
    rng = Random(0)
    for scene in sample(FULL, 12):
        true, described = set(captions(scene, FULL)), describe(scene, FULL, rng).split()
        for i, word in enumerate(described):
            before, after = described[:i], described[i + 1:]
            dropped, doubled = " ".join(before + after), " ".join(before + [word, word] + after)
            assert parse(doubled) is None
            assert parse(dropped) is None if word not in FULL.sizes else dropped in true
            for other in words:
                swapped = " ".join(before + [other] + after)
                assert judge(parse(swapped), scene).exact == (swapped in true)
                if word != other and not any({word, other} <= kind for kind in classes):
                    assert parse(swapped) is None, swapped
        noise = " ".join(rng.choices(words, k=rng.randrange(12)))
        assert parse(noise) is None and not judge(parse(noise), scene).exact
    four = " and ".join(["a red circle"] * 4)
    for text in ("", " ", "a", "and", four, "a red circle.", "there is", " on a white background", "\0",
                 "été", "a red\ncircle", "there is a red circle on a white background", "a red circle and",
                 "a red circle above", "a red circle in the top left above a blue square"):
        assert parse(text) is None and judge(parse(text), scene).right == 0


@each_level
def test_every_image_reads_back_as_its_scene(level):
    scenes = sample(FULL, 1000) if level == FULL else list(enumerate_scenes(level))
    rng = Random(1)
    images = np.stack([draw_scene(scene, level, rng) for scene in scenes])
    assert images.shape[1:] == (32, 32, 3) and images.dtype == np.uint8
    assert [r.scene for r in read_images(images, level)] == scenes and clean(images, level).all()
    some = images[:300]
    noisy = np.clip(some + 13 * np.random.default_rng(0).normal(size=some.shape), 0, 255).astype(np.uint8)
    blurred = np.stack([np.array(Image.fromarray(i).filter(ImageFilter.GaussianBlur(0.5))) for i in some])
    for spoiled in (noisy, blurred):
        assert [r.scene for r in read_images(spoiled, level)] == scenes[:300] and clean(spoiled, level).all()
    for scene in scenes[:20]:
        others = list(neighbours(scene, level))
        read_back = read_images(np.stack([draw_scene(other, level, rng) for other in others]), level)
        assert [reading.scene for reading in read_back] == others


@each_level
def test_spoiled_images_are_not_clean(level):
    cut, halved = [], []  # every object at every place with a half or a quarter of it gone
    for background, *look in product(level.backgrounds, level.shapes, level.colours, level.sizes):
        thing, side = Thing(*look), SIDES[look[2]]
        first, second, both = slice(0, side // 2), slice(side // 2, side), slice(0, side)
        gone = list(product((first, second, both), repeat=2))[:-1]  # all but all of it
        for place, (rows, columns) in product(places(level, thing.size), gone):
            image = np.tile(draw_cell(background), (2, 2, 1))
            image[:CELL, :CELL] = draw_cell(background, thing, place)
            image[place[0]:, place[1]:][rows, columns] = RGB[background]
            cut.append(image)
            halved.append((level, thing.shape, side, rows, columns) == (FULL, "triangle", CELL, second, both))
    # The one exception is no mistake: the upper half of a big triangle is a small triangle.
    readings = read_images(np.stack(cut), level)
    assert [r.is_clean for r in readings] == halved
    assert all(r.scene.things[0].size == "small" for r in readings if r.is_clean)

    rng, scenes = Random(2), sample(level, 100, seed=3)
    pairs = [(s, o) for s in scenes for o in rng.sample([*neighbours(s, level), *scenes], 8) if s != o]
    blends = [(draw_scene(s, level) / 2 + draw_scene(o, level) / 2).astype(np.uint8) for s, o in pairs]
    patched = [draw_scene(scene, level) for scene in scenes]  # one cell, or every cell, on another background
    for image, scene in zip(patched[:50], scenes):
        image[:CELL, :CELL] = draw_cell(next(other for other in level.backgrounds if other != scene.background))
    for image, scene in zip(patched[50:], scenes[50:]):
        image[(image == RGB[scene.background]).all(-1)] = 90
    noise = np.random.default_rng(0).integers(256, size=(100, 32, 32, 3), dtype=np.uint8)
    assert not clean([*blends, *patched, *noise], level).any()


@each_level
def test_no_image_can_be_clean_in_two_ways(level):
    looks, table = templates(level)
    for g, k in product(range(len(table)), range(len(looks))):
        apart = tile_errors(table[g] - table[g, k], level).max(-1)
        assert np.delete(apart, k).min() > 2 * THRESHOLD
    for g, h in product(range(len(table)), repeat=2):  # a legal scene has an empty cell
        assert g == h or tile_errors(table[h] - table[g, 0], level).max(-1).min() > 2 * THRESHOLD
