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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, permutations, product
from random import Random
from typing import NamedTuple

import numpy as np

# ---------------------------------------------------------------------------------------------- the world

IMAGE, CELL = 32, 16  # pixels: the side of an image, and the side of one of its 2x2 cells
SIDES = {"small": CELL // 2, "big": CELL}  # pixels: the side of an object
CELLS = ("top left", "top right", "bottom left", "bottom right")  # a cell is an index into this tuple

# Any two colours differ by more than 2 x THRESHOLD (root mean square over red, green and blue), and no equal blend of
# two is close to a third. For the second reason gray is lighter than the middle.
RGB = {
    "white": (255, 255, 255), "black": (0, 0, 0), "gray": (183, 183, 183), "red": (235, 31, 36), "green": (5, 199, 32),
    "blue": (10, 75, 250), "yellow": (255, 219, 13), "purple": (140, 13, 235), "cyan": (9, 222, 247),
}


class Level(NamedTuple):
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
LEVELS |= {f"{name}-biased": level._replace(name=f"{name}-biased", bias=0.9) for name, level in LEVELS.items()}


class Thing(NamedTuple):
    """One object of a scene, or what a caption states about one: there size and cell may be None."""
    shape: str
    colour: str
    size: str | None = None  # "big" at a level with one size
    cell: int | None = None  # 0..3, see CELLS


@dataclass(frozen=True)
class Scene:
    """A background and objects. The objects are sorted by cell, so that equal scenes compare and hash as equal."""
    background: str
    things: tuple[Thing, ...]

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.things, key=lambda thing: thing.cell))
        object.__setattr__(self, "things", ordered)  # a frozen dataclass permits no plain assignment


def get_level(name: str) -> Level:
    """The level of this name. Raises ValueError for an unknown name."""
    if name not in LEVELS:
        nearest = difflib.get_close_matches(name, LEVELS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown level {name!r}, did you mean {nearest!r}? Levels: {', '.join(LEVELS)}")
    return LEVELS[name]


def level_of(source: str) -> Level | None:
    """The level of a source of pairs "shapes:LEVEL"; None for any other source. Raises ValueError as get_level()."""
    return get_level(source.removeprefix("shapes:")) if source.startswith("shapes:") else None


def enumerate_scenes(level: Level) -> Iterator[Scene]:
    """Every scene of a level, once: 96 at micro, 1,824 at tiny. (At full there are millions.)"""
    looks = list(product(level.shapes, level.colours, level.sizes))
    for background, n in product(level.backgrounds, range(1, len(level.probabilities) + 1)):
        for cells, chosen in product(combinations(range(4), n), product(looks, repeat=n)):
            yield Scene(background, tuple(Thing(*look, cell) for look, cell in zip(chosen, cells)))


def split_of(scene: Scene) -> str:
    """ "train" (80%), "val" or "test" (10% each), by a hash of the scene: a test scene is unseen in every rendering."""
    parts = [scene.background, *(f"{t.size} {t.colour} {t.shape} {t.cell}" for t in scene.things)]
    bucket = int(hashlib.sha256("|".join(parts).encode()).hexdigest(), 16) % 10
    return "val" if bucket == 8 else "test" if bucket == 9 else "train"


def random_scene(level: Level, rng: Random, split: str | None = None) -> Scene:
    """A random scene, of the given split or of any. Raises ValueError for an unknown split."""
    if split not in ("train", "val", "test", None):  # no scene would ever be accepted
        raise ValueError(f"unknown split {split!r}: choose train, val or test")
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

def places(level: Level, size: str) -> list[tuple[int, int]]:
    """The places of an object in its cell: (y, x) of its corner in pixels, the central place first."""
    free = CELL - SIDES[size]
    corners = range(0, free + 1, IMAGE // level.grid)  # a step of one token: a shape has the same tokens in each place
    return sorted(product(corners, corners), key=lambda place: sum(abs(v - free / 2) for v in place))


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
        side = SIDES[thing.size]
        alpha = coverage(thing.shape, side)[..., None]   # (side, side, 1)
        window = canvas[place[0]:place[0] + side, place[1]:place[1] + side]
        window += alpha * (np.array(RGB[thing.colour]) - window)
    return np.rint(canvas).astype(np.uint8)


def draw_scene(scene: Scene, level: Level, rng: Random | None = None) -> np.ndarray:
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


class Reading(NamedTuple):
    """The nearest scene, and whether the image matches it. A bad image may read as 0 or 4 objects."""
    scene: Scene
    is_clean: bool


@lru_cache(maxsize=None)
def templates(level: Level) -> tuple[list[Thing | None], np.ndarray]:
    """The K possible contents of a cell (a thing, or None if it is empty) and their pixels, float32 (G, K, 768)."""
    things = [Thing(*look) for look in product(level.shapes, level.colours, level.sizes)]
    contents = [(None, (0, 0))] + [(thing, place) for thing in things for place in places(level, thing.size)]
    cells = np.array([[draw_cell(b, *content) for content in contents] for b in level.backgrounds], dtype=np.float32)
    return [thing for thing, _ in contents], cells.reshape(*cells.shape[:2], -1) / 255


def tile_errors(difference: np.ndarray, level: Level) -> np.ndarray:
    """The root mean square of each tile of cell differences: (..., 768) to (..., tiles in a cell)."""
    side = IMAGE // level.grid // 2
    n, lead = CELL // side, difference.shape[:-1]
    tiles = np.square(difference).reshape(*lead, n, side, n, side, 3)
    return np.sqrt(tiles.mean((-4, -2, -1))).reshape(*lead, n * n)


def read_images(images: np.ndarray, level: Level) -> list[Reading]:
    """The readings of images, uint8 (B, 32, 32, 3)."""
    contents, table = templates(level)                                                          # K, (G, K, 768)
    pixels = images.astype(np.float32) / 255                                                    # (B, 32, 32, 3)
    cells = pixels.reshape(-1, 2, CELL, 2, CELL, 3).swapaxes(2, 3).reshape(-1, 4, 3 * CELL**2)  # (B, 4, 768)
    # |cell - template|^2 = |cell|^2 - 2 cell . template + |template|^2; the first term is the same for all templates.
    dots = cells.reshape(-1, table.shape[2]) @ table.reshape(-1, table.shape[2]).T              # (4B, G * K)
    errors = np.square(table).sum(-1) - 2 * dots.reshape(len(images), 4, *table.shape[:2])      # (B, 4, G, K)
    background = errors.min(-1).sum(1).argmin(-1)                                               # (B,): of all cells
    best = errors[np.arange(len(images)), :, background].argmin(-1)                             # (B, 4)
    worst = tile_errors(cells - table[background[:, None], best], level).max((1, 2))            # (B,)
    found = ([contents[k]._replace(cell=cell) for cell, k in enumerate(row) if contents[k]] for row in best)
    return [Reading(Scene(level.backgrounds[b], tuple(things)), bool(error <= THRESHOLD))
            for b, things, error in zip(background, found, worst)]


# ---------------------------------------------------------------------------------------------- words

RELATIONS = {  # of cell a to cell b; of two diagonal cells one is, for example, above and left of the other
    "above": lambda a, b: a // 2 < b // 2, "below": lambda a, b: a // 2 > b // 2,
    "left of": lambda a, b: a % 2 < b % 2, "right of": lambda a, b: a % 2 > b % 2,
}
FRAMES = ("{body}", "there is {body}", "{body} on a {background} background")


def true_relations(things: Sequence[Thing]) -> list[str]:
    """The relations of the first thing to ALL others: "a above b and c" is true if a is above both."""
    first, *rest = things
    return [name for name, holds in RELATIONS.items() if rest and all(holds(first.cell, other.cell) for other in rest)]


def _phrase(things: Sequence[Thing], background: str, sized: Sequence[bool], celled: Sequence[bool],
            relation: str | None, frame: str) -> str:
    """The words for things in this order. `sized` and `celled` select the things named with size and with cell."""
    nouns = [f"a {thing.size + ' ' if with_size else ''}{thing.colour} {thing.shape}"
             f"{' in the ' + CELLS[thing.cell] if with_cell else ''}"
             for thing, with_size, with_cell in zip(things, sized, celled)]
    body = f"{nouns[0]} {relation} {' and '.join(nouns[1:])}" if relation else " and ".join(nouns)
    return frame.format(body=body, background=background)


def captions(scene: Scene, level: Level) -> Iterator[str]:
    """Every caption that describe() can give of a scene, each once: over a thousand at level full."""
    all_choices = list(product((False, True), repeat=len(scene.things)))
    no_thing = all_choices[:1]
    sizes = all_choices if len(level.sizes) > 1 else no_thing
    yield from dict.fromkeys(  # without duplicates: two equal objects give each caption twice
        _phrase(things, scene.background, sized, celled, relation, frame)
        for things, sized, frame in product(permutations(scene.things), sizes, FRAMES)
        for relation in (None, *true_relations(things))
        for celled in (no_thing if relation else all_choices))  # a caption names cells or a relation, never both


def describe(scene: Scene, level: Level, rng: Random) -> str:
    """A true caption in random words. It names every object; the scene must have at least one."""
    things = rng.sample(scene.things, len(scene.things))
    relations = true_relations(things)
    relation = rng.choice(relations) if relations and rng.random() < 0.4 else None
    sized = [len(level.sizes) > 1 and rng.random() < 0.5 for _ in things]
    celled = [relation is None and rng.random() < 0.5 for _ in things]
    return _phrase(things, scene.background, sized, celled, relation, rng.choice(FRAMES))


# ---------------------------------------------------------------------------------------------- judging

class Claims(NamedTuple):
    """All facts that a caption states. The relation is that of the first object to each of the others."""
    things: tuple[Thing, ...]
    relation: str | None = None
    background: str | None = None


class Verdict(NamedTuple):
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
    parts = [link[1], *link[3].split(" and ")] if link else body.split(" and ")
    items = [_ITEM.fullmatch(part) for part in parts]
    if None in items or len(items) > len(_ALL.probabilities) or link and any(item[4] for item in items):
        return None  # the last: a caption names cells or a relation, never both
    things = tuple(Thing(shape, colour, size, CELLS.index(cell) if cell else None)
                   for size, colour, shape, cell in (item.groups() for item in items))
    return Claims(things, link[2] if link else None, background)


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
    total += (n - 1) * (claims.relation is not None) + (claims.background is not None) + max(0, len(things) - n)
    best = 0
    for chosen in permutations((*things, *[None] * (n - len(things))), n):  # None: the claimed object does not exist
        right = int(claims.background == scene.background)
        for claim, thing in zip(claims.things, chosen):
            if thing is not None:
                right += 1 + (claim.colour == thing.colour) + (claim.shape == thing.shape)
                right += (claim.size == thing.size) + (claim.cell == thing.cell)  # an unclaimed None equals neither
        first, *others = chosen
        right += sum(RELATIONS[claims.relation](first.cell, other.cell) for other in others
                     if claims.relation and None not in (first, other))
        best = max(best, right)
    return Verdict(best == total, best, total)


if __name__ == "__main__":  # a caption of each level, and the verdict on it
    rng = Random(0)
    for level in LEVELS.values():
        scene = random_scene(level, rng)
        caption, [reading] = describe(scene, level, rng), read_images(draw_scene(scene, level, rng)[None], level)
        print(f"{level.name}: {caption}\n  {judge(parse(caption), reading.scene)}, clean: {reading.is_clean}")
