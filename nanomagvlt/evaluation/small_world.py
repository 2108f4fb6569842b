"""Appendix - Accuracy in the small world, where every image and every caption is exactly right or wrong.

An evaluation takes a Pipeline and a level, and returns {name: Share}. shapes.py judges: it reads pixels and words.
Shapes: M prompts (scenes x phrasings), S image side, N image tokens on G x G, T text tokens.
"""
import math
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache, partial

import numpy as np
import torch

from nanomagvlt.data import shapes
from nanomagvlt.data.cache import encode_captions
from nanomagvlt.rng import keyed_generator, keyed_seed
from nanomagvlt.sampling import edit
from nanomagvlt.sequence import valid_mask


@dataclass
class Share:
    """A share in [0, 1] with its 95% interval over scenes."""
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def share_over_scenes(values: Iterable[float], per_scene: int) -> Share:
    """The mean of values in [0, 1], `per_scene` in a row for each scene, with Wilson's 95% interval (1927).

    The interval counts scenes, not values: those of one scene are not independent. It is never empty, not even at 0.
    """
    by_scene = np.asarray(list(values), dtype=float).reshape(-1, per_scene).mean(1)
    share, n, z2 = float(by_scene.mean()), len(by_scene), 1.96 ** 2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = 1.96 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Share(share, max(0.0, centre - half), min(1.0, centre + half))


@lru_cache
def unseen_scenes(level: shapes.Level, most: int) -> tuple[shapes.Scene, ...]:
    """Scenes of the test split, each once: all of them, or a random `most` where there are more."""
    rng, scenes, since_last = random.Random(keyed_seed(0, "unseen scenes")), {}, 0
    while len(scenes) < most and since_last < 5000:  # 5,000 draws without a new scene: there are no others
        scene = shapes.random_scene(level, rng, "test")
        since_last = since_last + 1 if scene in scenes else 0
        scenes[scene] = True
    return tuple(scenes)


def names_the_objects(claims: shapes.Claims | None, scene: shapes.Scene) -> bool:
    """Whether a caption gives colour and shape of exactly the scene's objects; relations and cells do not count."""
    named, true = (sorted((thing.colour, thing.shape) for thing in x.things) if x else None for x in (claims, scene))
    return named == true


def evaluate_scenes(pipeline, level: shapes.Level, num_scenes: int, phrasings: int = 2, seed: int = 0,
                    captions_too: bool = True) -> dict:
    """Accuracy of T2I and I2T on unseen scenes, and of image -> tokens -> image ("reconstruction", the ceiling of T2I).

    Each scene has `phrasings` prompts and as many true images. "exact": all of an output is right; "facts": the share
    of its facts that are. "ignoring": the same outputs, judged against the next scene, as if the input were ignored.
    """
    scenes, share = unseen_scenes(level, num_scenes), partial(share_over_scenes, per_scene=phrasings)
    rng, generator = random.Random(keyed_seed(seed, "phrasings")), keyed_generator(seed, "decoding")
    asked = [scene for scene in scenes for _ in range(phrasings)]
    prompts = [shapes.describe(scene, level, rng) for scene in asked]
    truth = np.stack([shapes.draw_scene(scene, level, rng) for scene in asked])                      # (M, S, S, 3)

    def accuracy(task: str, suffix: str, claims: list[shapes.Claims | None], seen: list[shapes.Reading]) -> dict:
        verdicts = [shapes.judge(claim, reading.scene) for claim, reading in zip(claims, seen)]
        return {f"{task}_exact{suffix}": share(v.exact and reading.is_clean for v, reading in zip(verdicts, seen)),
                f"{task}_facts{suffix}": share(v.right / v.total for v in verdicts)}

    claims, shown = [shapes.parse(prompt) for prompt in prompts], [shapes.Reading(scene, True) for scene in asked]
    next_claims, next_shown = (items[phrasings:] + items[:phrasings] for items in (claims, shown))   # the next scene's
    drawn = shapes.read_images(pipeline.draw(prompts, generator), level)
    rebuilt = shapes.read_images(pipeline.tokens_to_image(pipeline.image_to_tokens(truth)), level)
    results = {"scenes": len(scenes), "phrasings": phrasings, **accuracy("t2i", "", claims, drawn),
               **accuracy("t2i", "_ignoring", next_claims, drawn),
               "reconstruction": share(r.is_clean and r.scene == scene for r, scene in zip(rebuilt, asked))}
    if not captions_too:
        return results
    captions, lengths = pipeline.caption(truth, generator)
    told, true_lengths = [shapes.parse(caption) for caption in captions], pipeline.caption_lengths(prompts)
    return results | {**accuracy("i2t", "", told, shown), **accuracy("i2t", "_ignoring", told, next_shown),
                      "i2t_objects": share(map(names_the_objects, told, asked)),
                      "length": share(a == b for a, b in zip(lengths, true_lengths)),
                      "length_constant": max(map(true_lengths.count, set(true_lengths))) / len(asked)}


def evaluate_editing(pipeline, level: shapes.Level, num_scenes: int, phrasings: int = 2, seed: int = 0) -> dict:
    """Accuracy of inpainting and infilling: part of an image or caption is generated again, and all of it is judged.

    "object" hides the cell of one object, or its colour and shape in the caption; "centre", the paper's protocol, the
    middle half of rows and columns, or of the words. "without" hides the other modality, too (models with it2it only):
    what the context alone gives. "i2t_true_length" hides all words, not their number. ValueError: captions too long.
    """
    scenes, share = unseen_scenes(level, num_scenes), partial(share_over_scenes, per_scene=phrasings)
    rng, bpe, cfg = random.Random(keyed_seed(seed, "phrasings")), pipeline.bpe, pipeline.cfg
    asked = [scene for scene in scenes for _ in range(phrasings)]
    prompts = [shapes.describe(scene, level, rng) for scene in asked]
    things = [rng.choice(scene.things) for scene in asked]
    image_tokens = pipeline.image_to_tokens(np.stack([shapes.draw_scene(scene, level, rng) for scene in asked]))
    text_tokens, lengths = encode_captions(bpe, prompts, cfg.text_length)                            # (M, T), (M,)
    if (text_tokens.gather(1, lengths[:, None] - 1) != bpe.end).any():
        raise ValueError(f"captions of shapes:{level.name} have more than text_length {cfg.text_length} tokens here")
    all_words = valid_mask(lengths, cfg.text_length)                                                 # (M, T)

    def images_right(tokens: torch.Tensor) -> Share:
        readings = shapes.read_images(pipeline.tokens_to_image(tokens), level)
        return share(shapes.judge(shapes.parse(prompt), r.scene).exact and r.is_clean
                     for prompt, r in zip(prompts, readings))

    def captions_right(tokens: torch.Tensor, cut: bool = False) -> Share:
        captions = pipeline.read_texts(tokens, lengths, cut=cut)
        return share(shapes.judge(shapes.parse(caption), scene).exact for caption, scene in zip(captions, asked))

    def edited(name: str, cells: torch.Tensor, words: torch.Tensor) -> dict[str, Share]:
        """cells (M, N), words (M, T): True where image and text are generated again."""
        generator, count, all_cells = keyed_generator(seed, name), len(asked), torch.ones_like(cells)
        drawn = pipeline.draw_tokens(prompts, generator, image_tokens, cells)[0]                     # (M, N)
        written = pipeline.write_tokens(image_tokens, generator, text_tokens, lengths, words)[0]     # (M, T)
        found = {f"{name}_inpainted": images_right(drawn), f"{name}_infilled": captions_right(written)}
        if "it2it" in cfg.task_shares:
            image = pipeline.make_pairs(count, generator, (image_tokens, cells), (text_tokens, lengths, all_words))[0]
            text = pipeline.make_pairs(count, generator, (image_tokens, all_cells), (text_tokens, lengths, words))[1]
            found |= {f"{name}_inpainted_without": images_right(image),
                      f"{name}_infilled_without": captions_right(text)}
        return found

    half = torch.arange(cfg.grid) * 2 // cfg.grid                                                    # (G,)
    cells = (2 * half[:, None] + half).flatten() == torch.tensor([thing.cell for thing in things])[:, None]   # (M, N)
    phrases = torch.zeros_like(text_tokens, dtype=torch.bool)                                        # (M, T)
    for row, prompt, thing in zip(phrases, prompts, things):
        row[list(edit.word_positions(bpe, prompt, f"{thing.colour} {thing.shape}"))] = True
    centre = edit.centre_positions(cfg.grid).expand(len(asked), -1)                                  # (M, N)
    rewritten = pipeline.write_tokens(image_tokens, keyed_generator(seed, "length"), text_tokens, lengths, all_words)[0]
    return {"scenes": len(scenes), "phrasings": phrasings, **edited("object", cells, phrases),
            "i2t_true_length": captions_right(rewritten, cut=True),
            **edited("centre", centre, edit.centre_words(lengths, cfg.text_length))}


def evaluate_pairs(pipeline, level: shapes.Level, count: int, seed: int = 0) -> dict:
    """Agreement of `count` images and captions that are generated together, from nothing.

    "pairs_agree": the caption is right about the image, and the image is clean. "pairs_crowded": the image has several
    objects; a model that repeats one simple pair agrees always, but has few of these. ValueError without it2it.
    """
    image_tokens, text_tokens, lengths, _ = pipeline.make_pairs(count, keyed_generator(seed, "pairs"))
    readings = shapes.read_images(pipeline.tokens_to_image(image_tokens), level)
    texts = pipeline.read_texts(text_tokens, lengths)
    agree = (shapes.judge(shapes.parse(text), r.scene).exact and r.is_clean for text, r in zip(texts, readings))
    crowded = (len(r.scene.things) > 1 for r in readings)
    return {"pairs": count, "pairs_agree": share_over_scenes(agree, 1), "pairs_crowded": share_over_scenes(crowded, 1)}


def evaluate_bias(pipeline, level: shapes.Level, num_scenes: int, phrasings: int = 2, seed: int = 0) -> dict:
    """Bias towards the usual colours of a biased level: the paper's figure 4, with exact counts.

    In these unseen scenes no object has the usual colour of its shape, and no two have one shape. Shares of the objects
    in their true colour: "i2t_seen" (captions), "t2i_asked" (drawings); in the usual one: "i2t_usual", "t2i_usual".
    """
    plain = shapes.get_level(level.name.removesuffix("-biased"))
    scenes = [scene for scene in unseen_scenes(plain, 10 * num_scenes)
              if all(thing.colour != shapes.USUAL[thing.shape] for thing in scene.things)
              and len({thing.shape for thing in scene.things}) == len(scene.things)][:num_scenes]
    asked = [scene for scene in scenes for _ in range(phrasings)]
    rng, generator = random.Random(keyed_seed(seed, "phrasings")), keyed_generator(seed, "decoding")
    prompts = [shapes.describe(scene, plain, rng) for scene in asked]
    drawn = [r.scene.things for r in shapes.read_images(pipeline.draw(prompts, generator), plain)]
    truth = np.stack([shapes.draw_scene(scene, plain, rng) for scene in asked])                      # (M, S, S, 3)
    told = [c.things if c else () for c in map(shapes.parse, pipeline.caption(truth, generator)[0])]

    def share(found: list, usual: bool) -> Share:
        """Objects whose shape is found exactly once, in the usual colour of the shape or else in the object's own."""
        right = [[[one.colour for one in things if one.shape == thing.shape]
                  == [shapes.USUAL[thing.shape] if usual else thing.colour] for thing in scene.things]
                 for scene, things in zip(asked, found)]
        return share_over_scenes(map(np.mean, right), phrasings)
    return {"scenes": len(scenes), "phrasings": phrasings, "i2t_seen": share(told, False),
            "i2t_usual": share(told, True), "t2i_asked": share(drawn, False), "t2i_usual": share(drawn, True)}


def show(results: dict) -> dict:
    """Prints each share with its interval, under its name in the evaluation. Returns the results as plain values."""
    print(f"{results.get('scenes', results.get('pairs'))} unseen scenes; 95% intervals over scenes")
    for name, value in results.items():
        if isinstance(value, Share):
            print(f"{name:28}{value}")
    return as_json(results)


def as_json(results: dict) -> dict:
    """The results as plain values."""
    return {name: asdict(value) if isinstance(value, Share) else value for name, value in results.items()}
