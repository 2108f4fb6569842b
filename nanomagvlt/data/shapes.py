"""Chapter 10 - The small world: pictures and captions that can be judged exactly.

A model that turns text into images and images into text needs a judge. On photographs the judge is
another learned model with opinions of its own; here it is arithmetic. A scene is a background and one to
three coloured shapes on a 2x2 grid. We can draw it, say it in words, read it back from pixels and from
words, and so check every fact of a picture or a caption, with nothing learned in between.

    scene --draw_scene--> image   --read_images--> Reading (the nearest scene, and whether it is clean)
    scene --describe----> caption --parse--------> Claims  (what the words commit to)
                         judge(claims, scene) -> Verdict   (is every claim true, is every object named?)

Text to image is exact if `judge(parse(prompt), reading.scene).exact and reading.is_clean`; image to text
if `judge(parse(caption), true_scene).exact`. Read on from the top: world, drawing, words, judging.
`python -m nanomagvlt.shapes` shows the work; `python -m nanomagvlt.shapes sheet.png` also draws it. Then read on in
readers.py.
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

# ---------------------------------------------------------------- the world

IMAGE, CELL = 32, 16  # pixels: the side of a picture, and of one of its 2x2 cells
CELLS = ("top left", "top right", "bottom left", "bottom right")  # a cell is the index into this
SPLITS = ("train", "val", "test")

# Chosen so that any two differ by more than 2 x THRESHOLD (root mean square over red, green and blue), and
# so that no half-and-half blend of two is mistaken for a third; hence gray is lighter than the middle.
RGB = {
    "white": (255, 255, 255), "black": (0, 0, 0), "gray": (183, 183, 183),
    "red": (235, 31, 36), "green": (5, 199, 32), "blue": (10, 75, 250), "yellow": (255, 219, 13),
    "purple": (140, 13, 235), "cyan": (9, 222, 247),
}


@dataclass(frozen=True)
class Level:
    """How rich the world is. `odds[i]` is the probability of a scene with i + 1 objects."""
    name: str
    grid: int  # image tokens per side: 4 means 4x4 tokens
    backgrounds: tuple[str, ...]
    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    sizes: tuple[str, ...]
    odds: tuple[float, ...]
    bias: float = 0.0  # how often a shape has its USUAL colour for sure; else, as everywhere, any colour


_BASIC = (("white", "black"), ("circle", "square", "triangle"), ("red", "green", "blue", "yellow"), ("big",))
LEVELS = {
    "micro": Level("micro", 4, *_BASIC, odds=(1.0,)),
    "tiny": Level("tiny", 4, *_BASIC, odds=(0.4, 0.6)),
    "full": Level("full", 8, ("white", "black", "gray"), ("circle", "square", "triangle", "cross"),
                  ("red", "green", "blue", "yellow", "purple", "cyan"), ("small", "big"), (0.3, 0.5, 0.2)),
}
# A world with habits, for the paper's figure 4: who has learnt them may say what is usual instead of what is there.
USUAL = {"circle": "red", "square": "blue", "triangle": "green", "cross": "yellow"}


@dataclass(frozen=True)
class Thing:
    """One object. `cell` is 0..3 (see CELLS); `size` is "big" where the level has one size."""
    shape: str
    colour: str
    size: str
    cell: int


@dataclass(frozen=True)
class Scene:
    """What is where. Things are kept in order of their cell, so equal worlds are equal (and hashable)."""
    background: str
    things: tuple[Thing, ...]

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.things, key=lambda thing: thing.cell))
        if len({thing.cell for thing in ordered}) < len(ordered):
            raise ValueError(f"two objects share a cell: {ordered}")
        object.__setattr__(self, "things", ordered)  # the one write a frozen dataclass allows itself


def get_level(level: str | Level) -> Level:
    """The level of that name (a Level passes through), or its biased variant: "tiny-biased".

    ValueError names the nearest level if unknown.
    """
    if isinstance(level, Level):
        return level
    if level.removesuffix("-biased") in LEVELS and level.endswith("-biased"):
        return replace(LEVELS[level.removesuffix("-biased")], name=level, bias=0.9)
    if level not in LEVELS:
        nearest = difflib.get_close_matches(str(level), LEVELS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown level {level!r}, did you mean {nearest!r}? Levels: {', '.join(LEVELS)}")
    return LEVELS[level]


def level_of(source: str) -> Level | None:
    """The level of a source of pairs that is "shapes:LEVEL"; None of any other. Raises ValueError as get_level()."""
    return get_level(source.removeprefix("shapes:")) if source.startswith("shapes:") else None


def enumerate_scenes(level: str | Level) -> Iterator[Scene]:
    """Every scene of a level, once: micro has 96, tiny 1,824 (full has millions: do not list it)."""
    level = get_level(level)
    looks = list(product(level.shapes, level.colours, level.sizes))
    for background, n in product(level.backgrounds, range(1, len(level.odds) + 1)):
        for cells in combinations(range(4), n):
            for chosen in product(looks, repeat=n):
                yield Scene(background, tuple(Thing(*look, cell) for look, cell in zip(chosen, cells)))


def split_of(scene: Scene) -> str:
    """ "train", "val" or "test" (80/10/10), fixed by what is where: never by rendering or phrasing."""
    parts = [scene.background, *(f"{t.size} {t.colour} {t.shape} {t.cell}" for t in scene.things)]
    bucket = int(hashlib.sha256("|".join(parts).encode()).hexdigest(), 16) % 10
    return "val" if bucket == 8 else "test" if bucket == 9 else "train"


def random_scene(level: str | Level, rng: Random, split: str | None = None) -> Scene:
    """A random scene, of one split if asked. ValueError for an unknown level or split."""
    level = get_level(level)
    if split not in (None, *SPLITS):
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}, or None")
    while True:  # rejection: at worst one scene in ten is of the split asked for
        n = rng.choices(range(1, len(level.odds) + 1), level.odds)[0]
        looks = [list(map(rng.choice, (level.shapes, level.colours, level.sizes))) for _ in range(n)]
        if level.bias:
            looks = [(a, USUAL[a] if rng.random() < level.bias else colour, size) for a, colour, size in looks]
        things = tuple(Thing(*look, cell) for look, cell in zip(looks, rng.sample(range(4), n)))
        scene = Scene(rng.choice(level.backgrounds), things)
        if split in (None, split_of(scene)):
            return scene


# ---------------------------------------------------------------- drawing

def places(level: str | Level, size: str) -> list[tuple[int, int]]:
    """Where an object may lie in its cell, (y, x) of its corner in pixels, the central place first.

    Places are whole tokens apart: a shape then looks the same to the tokens wherever it lies.
    """
    side = CELL if size == "big" else CELL // 2
    steps = range(0, CELL - side + 1, IMAGE // get_level(level).grid)
    middle = (CELL - side) / 2
    return sorted(product(steps, steps), key=lambda p: abs(p[0] - middle) + abs(p[1] - middle))


@lru_cache(maxsize=None)
def coverage(shape: str, side: int) -> np.ndarray:
    """How much of each pixel a shape covers, (side, side) in [0, 1]: a mask on a 4x finer grid, averaged."""
    fine = (np.arange(4 * side) + 0.5) / (2 * side) - 1  # the box is [-1, 1] x [-1, 1]
    y, x = fine[:, None], fine[None, :]
    box = np.maximum(abs(x), abs(y)) <= 0.95
    mask = {
        "circle": x**2 + y**2 <= 0.82**2,  # small enough to leave a square's corners visibly empty
        "square": box,
        "triangle": (abs(y) <= 0.98) & (abs(x) <= (y + 0.98) / 2),
        "cross": box & (abs(abs(x) - abs(y)) <= 0.34),
    }[shape]
    return mask.reshape(side, 4, side, 4).mean((1, 3))  # (side, side)


def draw_cell(background: str, thing: Thing | None = None, place: tuple[int, int] = (0, 0)) -> np.ndarray:
    """One cell of a picture, uint8 (16, 16, 3), empty or with a thing whose corner lies at `place`."""
    canvas = np.full((CELL, CELL, 3), RGB[background], dtype=np.float64)
    if thing is not None:
        side = CELL if thing.size == "big" else CELL // 2
        alpha = coverage(thing.shape, side)[..., None]  # (side, side, 1)
        window = canvas[place[0]:place[0] + side, place[1]:place[1] + side]
        window += alpha * (np.array(RGB[thing.colour]) - window)
    return np.rint(canvas).astype(np.uint8)


def draw_scene(scene: Scene, level: str | Level, rng: Random | None = None) -> np.ndarray:
    """A picture, uint8 (32, 32, 3). The rng places small objects in their cells; None centres them."""
    image = np.tile(draw_cell(scene.background), (2, 2, 1))  # (32, 32, 3)
    for thing in scene.things:
        spots = places(level, thing.size)
        top, left = CELL * (thing.cell // 2), CELL * (thing.cell % 2)
        cell = draw_cell(scene.background, thing, rng.choice(spots) if rng else spots[0])
        image[top:top + CELL, left:left + CELL] = cell
    return image


# ---------------------------------------------------------------- reading pictures

# A picture is compared with its nearest templates tile by tile, a tile being half a token wide (4 pixels
# at micro and tiny, 2 at full). Over the picture or a cell, the error of a small object that is half missing
# would be averaged away by the background around it; over a tile it is as plain as that of a big one. The
# worst tile must be within THRESHOLD: root mean square over its pixels and colours, which lie in [0, 1].
# Any two templates differ by more than twice that in some tile, so no picture is clean in two ways.
THRESHOLD = 0.14


@dataclass(frozen=True)
class Reading:
    """The nearest scene (0 to 4 things: a bad picture need not be a legal scene), and if it truly matches."""
    scene: Scene
    is_clean: bool


@lru_cache(maxsize=None)
def templates(level: Level) -> tuple[list[tuple[str, str, str] | None], np.ndarray]:
    """All a cell can hold: K looks (shape, colour, size; None: empty), and float32 (backgrounds, K, 768)."""
    drawn = [(Thing(*look, 0), place) for look in product(level.shapes, level.colours, level.sizes)
             for place in places(level, look[2])]
    looks = [None] + [(thing.shape, thing.colour, thing.size) for thing, _ in drawn]
    cells = [[draw_cell(b), *(draw_cell(b, *each) for each in drawn)] for b in level.backgrounds]
    stack = np.array(cells, dtype=np.float32) / 255  # (G, K, 16, 16, 3)
    return looks, stack.reshape(len(level.backgrounds), len(looks), -1)  # (G, K, 768)


def tile_errors(difference: np.ndarray, level: str | Level) -> np.ndarray:
    """Root mean square over each tile of cell differences: (..., 768) to (..., tiles in a cell)."""
    side = IMAGE // get_level(level).grid // 2
    n, lead = CELL // side, difference.shape[:-1]
    tiles = np.square(difference).reshape(*lead, n, side, n, side, 3)
    return np.sqrt(tiles.mean((-4, -2, -1))).reshape(*lead, n * n)


def read_images(images: np.ndarray, level: str | Level) -> list[Reading]:
    """Read pictures, (B, 32, 32, 3), uint8 or float in [0, 1], without being told what they show.

    ValueError if the shape or the type is another.
    """
    level, images = get_level(level), np.asarray(images)
    if images.ndim != 4 or images.shape[1:] != (IMAGE, IMAGE, 3):
        raise ValueError(f"images must be (B, {IMAGE}, {IMAGE}, 3), not {images.shape}")
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"images must be uint8, or float in [0, 1], not {images.dtype}")
    looks, table = templates(level)  # K, (G, K, 768)
    pixels = images.astype(np.float32) / (255 if images.dtype == np.uint8 else 1)
    cells = pixels.reshape(len(images), 2, CELL, 2, CELL, 3).swapaxes(2, 3)
    cells = cells.reshape(len(images), 4, table.shape[2])  # (B, 4, 768)
    # |cell - template|^2 = |cell|^2 - 2 cell . template + |template|^2, and the first is the same for all.
    dots = cells.reshape(-1, table.shape[2]) @ table.reshape(-1, table.shape[2]).T  # (B * 4, G * K)
    errors = np.square(table).sum(-1) - 2 * dots.reshape(len(images), 4, *table.shape[:2])  # (B, 4, G, K)
    ground = errors.min(-1).sum(1).argmin(-1)  # (B,): one background for all four cells
    rows = np.arange(len(images))
    best = errors[rows, :, ground].argmin(-1)  # (B, 4)
    worst = tile_errors(cells - table[ground[:, None], best], level).max((1, 2))  # (B,)

    readings = []
    for background, chosen, error in zip(ground, best, worst):
        things = tuple(Thing(*looks[k], cell) for cell, k in enumerate(chosen) if looks[k] is not None)
        readings.append(Reading(Scene(level.backgrounds[background], things), bool(error <= THRESHOLD)))
    return readings


def read(image: np.ndarray, level: str | Level) -> Reading:
    """Read one picture, (32, 32, 3): see read_images."""
    return read_images(np.asarray(image)[None], level)[0]


# ---------------------------------------------------------------- words

RELATIONS = ("above", "below", "left of", "right of")
FRAMES = ("{body}", "there is {body}", "{body} on a {background} background")


def holds(relation: str, a: int, b: int) -> bool:
    """Is cell a above (below, ...) cell b? Strictly: diagonal cells are both, say, above and left of."""
    (row_a, column_a), (row_b, column_b) = divmod(a, 2), divmod(b, 2)
    return {"above": row_a < row_b, "below": row_a > row_b,
            "left of": column_a < column_b, "right of": column_a > column_b}[relation]


def true_relations(things: Sequence[Thing]) -> list[str]:
    """What the first thing is to ALL the others: "a above b and c" is only said if a is above both."""
    first, *rest = things
    return [r for r in RELATIONS if rest and all(holds(r, first.cell, other.cell) for other in rest)]


def _phrase(things: Sequence[Thing], background: str, sized: Sequence[bool], celled: Sequence[bool],
            relation: str | None, frame: str) -> str:
    """The one place where words are put together: things in the order given, choices already made."""
    nouns = [f"a {thing.size + ' ' if say_size else ''}{thing.colour} {thing.shape}"
             f"{' in the ' + CELLS[thing.cell] if say_cell else ''}"
             for thing, say_size, say_cell in zip(things, sized, celled)]
    body = f"{nouns[0]} {relation} {' and '.join(nouns[1:])}" if relation else " and ".join(nouns)
    return frame.format(body=body, background=background)


def captions(scene: Scene, level: str | Level) -> Iterator[str]:
    """Every caption that `describe` can give of a scene (over a thousand at level full), each once."""
    n, sizes = len(scene.things), len(get_level(level).sizes)
    yes_no = list(product((False, True), repeat=n))
    silent = yes_no[:1]
    said = {}  # a dictionary keeps order; two equal objects give the same caption twice
    for things, sized, frame in product(permutations(scene.things), yes_no if sizes > 1 else silent, FRAMES):
        for relation in (None, *true_relations(things)):  # with a relation, cells are not said
            for celled in silent if relation else yes_no:
                said[_phrase(things, scene.background, sized, celled, relation, frame)] = None
    yield from said


def describe(scene: Scene, level: str | Level, rng: Random) -> str:
    """A true caption in random words: lower case, one blank between words, every object named.

    ValueError if the scene is empty: the grammar has no words for nothing.
    """
    if not scene.things:
        raise ValueError("cannot describe a scene without objects")
    things = rng.sample(scene.things, len(scene.things))
    relations = true_relations(things)
    relation = rng.choice(relations) if relations and rng.random() < 0.4 else None
    sized = [len(get_level(level).sizes) > 1 and rng.random() < 0.5 for _ in things]
    celled = [relation is None and rng.random() < 0.5 for _ in things]
    return _phrase(things, scene.background, sized, celled, relation, rng.choice(FRAMES))


def vocabulary(level: str | Level) -> list[str]:
    """All the words that captions of a level are made of, sorted; "a b".split() is the tokenizer."""
    level = get_level(level)
    words = {"a", "in", "the", "top", "bottom", "left", "right", "there", "is", "on", "background",
             *level.backgrounds, *level.shapes, *level.colours}
    words |= {"and", "above", "below", "of"} if len(level.odds) > 1 else set()
    return sorted(words | (set(level.sizes) if len(level.sizes) > 1 else set()))


# ---------------------------------------------------------------- judging

@dataclass(frozen=True)
class Claim:
    """What a caption says of one object; None is what it leaves open."""
    shape: str
    colour: str
    size: str | None = None
    cell: int | None = None


@dataclass(frozen=True)
class Claims:
    """What a caption says. A relation (i, "above", j) is between the i-th and the j-th thing named."""
    things: tuple[Claim, ...]
    relations: tuple[tuple[int, str, int], ...] = ()
    background: str | None = None


@dataclass(frozen=True)
class Verdict:
    """`exact`: all is true and nothing is left over; `right` of `total` single facts hold."""
    exact: bool
    right: int
    total: int


_ALL = LEVELS["full"]  # the grammar of the richest level covers the others
_ITEM = re.compile(rf"a (?:({'|'.join(_ALL.sizes)}) )?({'|'.join(_ALL.colours)}) ({'|'.join(_ALL.shapes)})"
                   rf"(?: in the ({'|'.join(CELLS)}))?")
_LINK = re.compile(rf"(.+?) ({'|'.join(RELATIONS)}) (.+)")
_GROUND = re.compile(rf"(.+) on a ({'|'.join(_ALL.backgrounds)}) background")


def parse(caption: str) -> Claims | None:
    """The claims of a caption, or None if it is not, word for word, one the grammar could give.

    Only case and outer white space are forgiven. What is grammatical may still be impossible (two objects
    in one cell): it parses, and no scene fulfils it.
    """
    text = caption.strip().lower()
    ground = _GROUND.fullmatch(text)
    body, background = ground.groups() if ground else (text.removeprefix("there is "), None)
    link = _LINK.fullmatch(body)
    first, relation, rest = link.groups() if link else ("", None, body)
    parts = [first] * bool(link) + rest.split(" and ")
    items = [_ITEM.fullmatch(part) for part in parts]
    if None in items or len(items) > len(_ALL.odds):
        return None
    if relation and any(item[4] for item in items):
        return None  # the grammar says where things are by cell or by relation, not both
    things = tuple(Claim(shape, colour, size, CELLS.index(cell) if cell else None)
                   for size, colour, shape, cell in (item.groups() for item in items))
    relations = tuple((0, relation, j) for j in range(1, len(items))) if relation else ()
    return Claims(things, relations, background)


def judge(claims: Claims | None, scene: Scene) -> Verdict:
    """Is there a one-to-one assignment of the claimed objects to the scene's that makes all claims true?

    Facts, counted under the best assignment: each claimed object is there, has its colour, its shape, and
    its size and cell if claimed; each relation; the background if claimed. An object the caption leaves
    out is one fact more, and wrong. What a caption leaves open is free. No claims (a caption that does
    not parse): nothing right, of 3 facts per object (so `total` is 0 only against an empty picture).
    """
    if claims is None:
        return Verdict(False, 0, 3 * len(scene.things))
    n, things = len(claims.things), scene.things
    total = sum(3 + (c.size is not None) + (c.cell is not None) for c in claims.things)
    total += len(claims.relations) + (claims.background is not None) + max(0, len(things) - n)
    best = 0
    for chosen in permutations((*things, *[None] * (n - len(things))), n):  # None: nothing left to be it
        right = int(claims.background == scene.background)
        for claim, thing in zip(claims.things, chosen):
            if thing is not None:
                right += 1 + (claim.colour == thing.colour) + (claim.shape == thing.shape)
                right += (claim.size == thing.size) + (claim.cell == thing.cell)  # None equals neither
        for i, relation, j in claims.relations:
            a, b = chosen[i], chosen[j]
            right += a is not None and b is not None and holds(relation, a.cell, b.cell)
        best = max(best, right)
    return Verdict(best == total, best, total)


# ---------------------------------------------------------------- a look at it

def main(arguments: list[str]) -> None:
    """Print a few scenes of each level and what the judges say; draw a sheet if given a path."""
    rng, rows = Random(0), []
    for level in LEVELS:
        print(f"\n{level}: {len(vocabulary(level))} words")
        scenes = [random_scene(level, rng) for _ in range(8)]
        images = np.stack([draw_scene(scene, level, rng) for scene in scenes])  # (8, 32, 32, 3)
        framed = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=128)  # (8, 36, 36, 3)
        rows.append(np.concatenate(list(framed), axis=1))  # (36, 288, 3)
        blends = (images / 2 + np.roll(images, 1, axis=0) / 2) / 255  # each with the one before it
        readings, blended = read_images(images, level), read_images(blends, level)
        for i in (1, 2, 3):
            caption = describe(scenes[i], level, rng)
            claims = parse(caption)
            print(f"  {caption}  [{split_of(scenes[i])}]")
            print(f"    its picture reads {judge(claims, readings[i].scene)}, clean: {readings[i].is_clean}")
            print(f"    half blended with another, clean: {blended[i].is_clean}")
            print(f"    said of another scene: {judge(claims, scenes[i - 1])}")
    if arguments:
        sheet = Image.fromarray(np.concatenate(rows))
        sheet.resize((sheet.width * 4, sheet.height * 4), Image.Resampling.NEAREST).save(arguments[0])
        print(f"\nwrote {arguments[0]}")


if __name__ == "__main__":
    main(sys.argv[1:])
