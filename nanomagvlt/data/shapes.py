"""Chapter 10 - The small world: images and captions that can be judged exactly.

On photographs, the judge of a generated image is another learned model, with errors of its own. In the small world
the judge is arithmetic. A scene is a background and one to three coloured shapes on a 2x2 grid. This file draws a
scene, describes it in words, and reads it back from pixels and from words. So every fact can be checked.

    scene --draw_scene--> image   --read_images--> Reading (the nearest scene, and whether the image is clean)
    scene --describe----> caption --parse--------> Claims  (the facts that the caption states)
                         judge(claims, scene) -> Verdict   (is every claim true, and is every object named?)

A generated image is exact if `judge(parse(prompt), reading.scene).exact and reading.is_clean`. A generated caption is
exact if `judge(parse(caption), true_scene).exact`. `python -m nanomagvlt.data.shapes sheet.png` shows examples.
Shapes: B batch, G backgrounds, K possible contents of a cell. Read on in sources.py.
"""
import difflib
import hashlib
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations, permutations, product
from random import Random

import numpy as np
from PIL import Image

# ---------------------------------------------------------------------------------------------- the world

IMAGE, CELL = 32, 16  # pixels: the side of an image, and the side of one of its 2x2 cells
CELLS = ("top left", "top right", "bottom left", "bottom right")  # a cell is an index into this tuple
SPLITS = ("train", "val", "test")

# Any two colours differ by more than 2 x THRESHOLD (root mean square over red, green and blue), and no equal blend of
# two is close to a third. For the second reason gray is lighter than the middle.
RGB = {
    "white": (255, 255, 255), "black": (0, 0, 0), "gray": (183, 183, 183), "red": (235, 31, 36), "green": (5, 199, 32),
    "blue": (10, 75, 250), "yellow": (255, 219, 13), "purple": (140, 13, 235), "cyan": (9, 222, 247),
}


@dataclass(frozen=True)
class Level:
    """The variety of scenes. probabilities[i] is the probability of a scene with i + 1 objects."""
    name: str
    grid: int  # image tokens per side: 4 means 4x4 tokens
    backgrounds: tuple[str, ...]
    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    sizes: tuple[str, ...]
    probabilities: tuple[float, ...]
    bias: float = 0.0  # with this probability a shape gets its USUAL colour; else it gets any colour


_BASIC = (("white", "black"), ("circle", "square", "triangle"), ("red", "green", "blue", "yellow"), ("big",))
LEVELS = {
    "micro": Level("micro", 4, *_BASIC, (1.0,)),
    "tiny": Level("tiny", 4, *_BASIC, (0.4, 0.6)),
    "full": Level("full", 8, ("white", "black", "gray"), ("circle", "square", "triangle", "cross"),
                  ("red", "green", "blue", "yellow", "purple", "cyan"), ("small", "big"), (0.3, 0.5, 0.2)),
}
# The biased levels test the bias of the paper's figure 4: a model may state the usual colour instead of the true one.
USUAL = {"circle": "red", "square": "blue", "triangle": "green", "cross": "yellow"}


@dataclass(frozen=True)
class Thing:
    """One object. `cell` is 0..3 (see CELLS); `size` is "big" at a level with one size."""
    shape: str
    colour: str
    size: str
    cell: int


@dataclass(frozen=True)
class Scene:
    """A background and objects. The objects are sorted by cell, so that equal scenes compare and hash as equal."""
    background: str
    things: tuple[Thing, ...]

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.things, key=lambda thing: thing.cell))
        if len({thing.cell for thing in ordered}) < len(ordered):
            raise ValueError(f"two objects share a cell: {ordered}")
        object.__setattr__(self, "things", ordered)  # a frozen dataclass permits no plain assignment


def get_level(level: str | Level) -> Level:
    """The level of this name, or its biased variant ("tiny-biased"). Raises ValueError for an unknown name."""
    if isinstance(level, Level):
        return level
    plain = level.removesuffix("-biased")
    if plain not in LEVELS:
        nearest = difflib.get_close_matches(level, LEVELS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown level {level!r}, did you mean {nearest!r}? Levels: {', '.join(LEVELS)}")
    return LEVELS[plain] if plain == level else replace(LEVELS[plain], name=level, bias=0.9)


def level_of(source: str) -> Level | None:
    """The level of a source of pairs "shapes:LEVEL"; None for any other source. Raises ValueError as get_level()."""
    return get_level(source.removeprefix("shapes:")) if source.startswith("shapes:") else None


def enumerate_scenes(level: str | Level) -> Iterator[Scene]:
    """Every scene of a level, once: 96 at micro, 1,824 at tiny. (At full there are millions.)"""
    level = get_level(level)
    looks = list(product(level.shapes, level.colours, level.sizes))
    for background, n in product(level.backgrounds, range(1, len(level.probabilities) + 1)):
        for cells, chosen in product(combinations(range(4), n), product(looks, repeat=n)):
            yield Scene(background, tuple(Thing(*look, cell) for look, cell in zip(chosen, cells)))


def split_of(scene: Scene) -> str:
    """ "train" (80%), "val" or "test" (10% each), by a hash of the scene: a test scene is unseen in every rendering."""
    parts = [scene.background, *(f"{t.size} {t.colour} {t.shape} {t.cell}" for t in scene.things)]
    bucket = int(hashlib.sha256("|".join(parts).encode()).hexdigest(), 16) % 10
    return "val" if bucket == 8 else "test" if bucket == 9 else "train"


def random_scene(level: str | Level, rng: Random, split: str | None = None) -> Scene:
    """A random scene, of the given split or of any. Raises ValueError for an unknown level or split."""
    level = get_level(level)
    if split not in (None, *SPLITS):
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}, or None")
    while True:  # rejection sampling: about one scene in ten belongs to "val", as many to "test"
        n = rng.choices(range(1, len(level.probabilities) + 1), level.probabilities)[0]
        looks = [list(map(rng.choice, (level.shapes, level.colours, level.sizes))) for _ in range(n)]
        if level.bias:
            looks = [(a, USUAL[a] if rng.random() < level.bias else colour, size) for a, colour, size in looks]
        things = tuple(Thing(*look, cell) for look, cell in zip(looks, rng.sample(range(4), n)))
        scene = Scene(rng.choice(level.backgrounds), things)
        if split in (None, split_of(scene)):
            return scene


# ---------------------------------------------------------------------------------------------- drawing

def places(level: str | Level, size: str) -> list[tuple[int, int]]:
    """The places of an object in its cell: (y, x) of its corner in pixels, the central place first."""
    side = CELL if size == "big" else CELL // 2
    step = IMAGE // get_level(level).grid  # one token: then the tokens of a shape do not depend on its place
    corners = range(0, CELL - side + 1, step)
    return sorted(product(corners, corners), key=lambda place: sum(abs(v - (CELL - side) / 2) for v in place))


@lru_cache(maxsize=None)
def coverage(shape: str, side: int) -> np.ndarray:
    """The share of each pixel that a shape covers, (side, side) in [0, 1]: a mask on a 4x finer grid, averaged."""
    fine = (np.arange(4 * side) + 0.5) / (2 * side) - 1  # the box is [-1, 1] x [-1, 1]
    y, x = fine[:, None], fine[None, :]
    box = np.maximum(abs(x), abs(y)) <= 0.95
    mask = {
        "circle": x**2 + y**2 <= 0.82**2,  # small: it leaves the corners of a square visibly empty
        "square": box,
        "triangle": (abs(y) <= 0.98) & (abs(x) <= (y + 0.98) / 2),
        "cross": box & (abs(abs(x) - abs(y)) <= 0.34),
    }[shape]                                             # (4 side, 4 side)
    return mask.reshape(side, 4, side, 4).mean((1, 3))   # (side, side)


def draw_cell(background: str, thing: Thing | None = None, place: tuple[int, int] = (0, 0)) -> np.ndarray:
    """One cell of an image, uint8 (16, 16, 3): empty, or with an object that has its corner at `place`."""
    canvas = np.full((CELL, CELL, 3), RGB[background], dtype=np.float64)
    if thing is not None:
        side = CELL if thing.size == "big" else CELL // 2
        alpha = coverage(thing.shape, side)[..., None]   # (side, side, 1)
        window = canvas[place[0]:place[0] + side, place[1]:place[1] + side]
        window += alpha * (np.array(RGB[thing.colour]) - window)
    return np.rint(canvas).astype(np.uint8)


def draw_scene(scene: Scene, level: str | Level, rng: Random | None = None) -> np.ndarray:
    """An image of a scene, uint8 (32, 32, 3). The rng chooses the places of small objects; without it, the centre."""
    image = np.tile(draw_cell(scene.background), (2, 2, 1))  # (32, 32, 3)
    for thing in scene.things:
        spots = places(level, thing.size)
        top, left = CELL * (thing.cell // 2), CELL * (thing.cell % 2)
        cell = draw_cell(scene.background, thing, rng.choice(spots) if rng else spots[0])
        image[top:top + CELL, left:left + CELL] = cell
    return image


# ---------------------------------------------------------------------------------------------- reading images

# An image is compared with the nearest templates tile by tile. A tile is half a token wide: 4 pixels at micro and
# tiny, 2 at full. The mean error over a cell would hide a small object that is half missing; the error of a tile shows
# it. The worst tile must be within THRESHOLD: the root mean square over its pixels and colours, which lie in [0, 1].
# Any two templates differ by more than twice that in some tile, so no image is clean in two ways.
THRESHOLD = 0.14


@dataclass(frozen=True)
class Reading:
    """The nearest scene, and whether the image matches it. A bad image may read as 0 or 4 objects."""
    scene: Scene
    is_clean: bool


@lru_cache(maxsize=None)
def templates(level: Level) -> tuple[list[tuple[str, str, str] | None], np.ndarray]:
    """All contents of a cell: K looks (shape, colour, size; None if empty), and their pixels, float32 (G, K, 768)."""
    drawn = [(Thing(*look, 0), place) for look in product(level.shapes, level.colours, level.sizes)
             for place in places(level, look[2])]
    looks = [None] + [(thing.shape, thing.colour, thing.size) for thing, _ in drawn]
    cells = [[draw_cell(b), *(draw_cell(b, *each) for each in drawn)] for b in level.backgrounds]
    return looks, np.array(cells, dtype=np.float32).reshape(len(level.backgrounds), len(looks), -1) / 255


def tile_errors(difference: np.ndarray, level: str | Level) -> np.ndarray:
    """The root mean square of each tile of cell differences: (..., 768) to (..., tiles in a cell)."""
    side = IMAGE // get_level(level).grid // 2
    n, lead = CELL // side, difference.shape[:-1]
    tiles = np.square(difference).reshape(*lead, n, side, n, side, 3)
    return np.sqrt(tiles.mean((-4, -2, -1))).reshape(*lead, n * n)


def read_images(images: np.ndarray, level: str | Level) -> list[Reading]:
    """The readings of images (B, 32, 32, 3), uint8 or float in [0, 1]. Raises ValueError for another shape or type."""
    level = get_level(level)
    if images.shape[1:] != (IMAGE, IMAGE, 3) or images.dtype != np.uint8 and images.dtype.kind != "f":
        raise ValueError(f"images must be (B, 32, 32, 3), uint8 or float in [0, 1], not {images.shape}, {images.dtype}")
    looks, table = templates(level)                                                             # K, (G, K, 768)
    pixels = images.astype(np.float32) / (255 if images.dtype == np.uint8 else 1)
    cells = pixels.reshape(-1, 2, CELL, 2, CELL, 3).swapaxes(2, 3).reshape(-1, 4, 3 * CELL**2)  # (B, 4, 768)
    # |cell - template|^2 = |cell|^2 - 2 cell . template + |template|^2; the first term is the same for all templates.
    dots = cells.reshape(-1, table.shape[2]) @ table.reshape(-1, table.shape[2]).T              # (4B, G * K)
    errors = np.square(table).sum(-1) - 2 * dots.reshape(len(images), 4, *table.shape[:2])      # (B, 4, G, K)
    background = errors.min(-1).sum(1).argmin(-1)                                               # (B,): of all cells
    best = errors[np.arange(len(images)), :, background].argmin(-1)                             # (B, 4)
    worst = tile_errors(cells - table[background[:, None], best], level).max((1, 2))            # (B,)

    readings = []
    for b, chosen, error in zip(background, best, worst):
        things = tuple(Thing(*looks[k], cell) for cell, k in enumerate(chosen) if looks[k] is not None)
        readings.append(Reading(Scene(level.backgrounds[b], things), bool(error <= THRESHOLD)))
    return readings


# ---------------------------------------------------------------------------------------------- words

RELATIONS = ("above", "below", "left of", "right of")
FRAMES = ("{body}", "there is {body}", "{body} on a {background} background")


def holds(relation: str, a: int, b: int) -> bool:
    """Whether cell a is above (below, ...) cell b. Of two diagonal cells one is, for example, above and left of b."""
    (row_a, column_a), (row_b, column_b) = divmod(a, 2), divmod(b, 2)
    return {"above": row_a < row_b, "below": row_a > row_b,
            "left of": column_a < column_b, "right of": column_a > column_b}[relation]


def true_relations(things: Sequence[Thing]) -> list[str]:
    """The relations of the first thing to ALL others: "a above b and c" is true if a is above both."""
    first, *rest = things
    return [r for r in RELATIONS if rest and all(holds(r, first.cell, other.cell) for other in rest)]


def _phrase(things: Sequence[Thing], background: str, sized: Sequence[bool], celled: Sequence[bool],
            relation: str | None, frame: str) -> str:
    """The words for things in this order. `sized` and `celled` select the things named with size and with cell."""
    nouns = [f"a {thing.size + ' ' if with_size else ''}{thing.colour} {thing.shape}"
             f"{' in the ' + CELLS[thing.cell] if with_cell else ''}"
             for thing, with_size, with_cell in zip(things, sized, celled)]
    body = f"{nouns[0]} {relation} {' and '.join(nouns[1:])}" if relation else " and ".join(nouns)
    return frame.format(body=body, background=background)


def captions(scene: Scene, level: str | Level) -> Iterator[str]:
    """Every caption that describe() can give of a scene, each once: over a thousand at level full."""
    all_choices = list(product((False, True), repeat=len(scene.things)))
    no_thing = all_choices[:1]
    sizes = all_choices if len(get_level(level).sizes) > 1 else no_thing
    yield from dict.fromkeys(  # without duplicates: two equal objects give each caption twice
        _phrase(things, scene.background, sized, celled, relation, frame)
        for things, sized, frame in product(permutations(scene.things), sizes, FRAMES)
        for relation in (None, *true_relations(things))
        for celled in (no_thing if relation else all_choices))  # a caption names cells or a relation, never both


def describe(scene: Scene, level: str | Level, rng: Random) -> str:
    """A true caption in random words, which names every object. Raises ValueError for a scene without objects."""
    if not scene.things:
        raise ValueError("cannot describe a scene without objects")
    things = rng.sample(scene.things, len(scene.things))
    relations = true_relations(things)
    relation = rng.choice(relations) if relations and rng.random() < 0.4 else None
    sized = [len(get_level(level).sizes) > 1 and rng.random() < 0.5 for _ in things]
    celled = [relation is None and rng.random() < 0.5 for _ in things]
    return _phrase(things, scene.background, sized, celled, relation, rng.choice(FRAMES))


# ---------------------------------------------------------------------------------------------- judging

@dataclass(frozen=True)
class Claim:
    """The facts that a caption states about one object; None where it states nothing."""
    shape: str
    colour: str
    size: str | None = None
    cell: int | None = None


@dataclass(frozen=True)
class Claims:
    """All facts that a caption states. A relation (i, "above", j) is between the i-th and the j-th thing named."""
    things: tuple[Claim, ...]
    relations: tuple[tuple[int, str, int], ...] = ()
    background: str | None = None


@dataclass(frozen=True)
class Verdict:
    """`right` of `total` facts are true; `exact` if all are, and every object of the scene is named."""
    exact: bool
    right: int
    total: int


_ALL = LEVELS["full"]  # its grammar covers the other levels
_ITEM = re.compile(rf"a (?:({'|'.join(_ALL.sizes)}) )?({'|'.join(_ALL.colours)}) ({'|'.join(_ALL.shapes)})"
                   rf"(?: in the ({'|'.join(CELLS)}))?")
_LINK = re.compile(rf"(.+?) ({'|'.join(RELATIONS)}) (.+)")
_GROUND = re.compile(rf"(.+) on a ({'|'.join(_ALL.backgrounds)}) background")


def parse(caption: str) -> Claims | None:
    """The claims of a caption; None if the caption is not one that the grammar can give, word for word.

    Case and outer white space do not matter. An impossible caption (two objects in one cell) parses, but is never true.
    """
    text = caption.strip().lower()
    ground = _GROUND.fullmatch(text)
    body, background = ground.groups() if ground else (text.removeprefix("there is "), None)
    link = _LINK.fullmatch(body)
    first, relation, rest = link.groups() if link else ("", None, body)
    parts = [first] * bool(link) + rest.split(" and ")
    items = [_ITEM.fullmatch(part) for part in parts]
    if None in items or len(items) > len(_ALL.probabilities) or relation and any(item[4] for item in items):
        return None  # the last: a caption names cells or a relation, never both
    things = tuple(Claim(shape, colour, size, CELLS.index(cell) if cell else None)
                   for size, colour, shape, cell in (item.groups() for item in items))
    relations = tuple((0, relation, j) for j in range(1, len(items))) if relation else ()
    return Claims(things, relations, background)


def judge(claims: Claims | None, scene: Scene) -> Verdict:
    """The number of true facts, under the best one-to-one assignment of the claimed objects to those of the scene.

    Facts: each claimed object exists, has its colour, its shape, and its size and cell if claimed; each relation; the
    background if claimed. Each object that the caption omits is one more fact, and wrong. None (a caption that does
    not parse) has 0 right of 3 facts per object.
    """
    if claims is None:
        return Verdict(False, 0, 3 * len(scene.things))
    n, things = len(claims.things), scene.things
    total = sum(3 + (c.size is not None) + (c.cell is not None) for c in claims.things)
    total += len(claims.relations) + (claims.background is not None) + max(0, len(things) - n)
    best = 0
    for chosen in permutations((*things, *[None] * (n - len(things))), n):  # None: the claimed object does not exist
        right = int(claims.background == scene.background)
        for claim, thing in zip(claims.things, chosen):
            if thing is not None:
                right += 1 + (claim.colour == thing.colour) + (claim.shape == thing.shape)
                right += (claim.size == thing.size) + (claim.cell == thing.cell)  # an unclaimed None equals neither
        for i, relation, j in claims.relations:
            a, b = chosen[i], chosen[j]
            right += a is not None and b is not None and holds(relation, a.cell, b.cell)
        best = max(best, right)
    return Verdict(best == total, best, total)


# ---------------------------------------------------------------------------------------------- an example

def main(paths: list[str]) -> None:
    """Prints a caption of each level and its verdicts; draws eight scenes of each level into the given file, if any."""
    rng, rows = Random(0), []
    for level in LEVELS:
        scenes = [random_scene(level, rng) for _ in range(8)]
        images = np.stack([draw_scene(scene, level, rng) for scene in scenes])  # (8, 32, 32, 3)
        rows.append(np.hstack(images))                                          # (32, 256, 3)
        caption, reading = describe(scenes[0], level, rng), read_images(images, level)[0]
        print(f"{level}: {caption}  [{split_of(scenes[0])}]")
        print(f"  of its own image: {judge(parse(caption), reading.scene)}, clean: {reading.is_clean}")
        print(f"  of another scene: {judge(parse(caption), scenes[1])}")
    for path in paths:
        Image.fromarray(np.vstack(rows)).resize((1024, 384), Image.Resampling.NEAREST).save(path)


if __name__ == "__main__":
    main(sys.argv[1:])
