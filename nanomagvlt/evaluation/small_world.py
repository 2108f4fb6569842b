"""Appendix - Measuring in the small world, where every answer is exactly right or wrong.

No network is touched here, only what it makes: each evaluation is handed something that draws and captions, such as
the Pipeline of generate.py. (The field's own measures are in field.py and captions.py.)
"""
import math
import random
from collections import Counter
from dataclasses import asdict, dataclass

import numpy as np
import torch

from nanomagvlt.data import shapes
from nanomagvlt.sampling import edit
from nanomagvlt.rng import keyed_generator, keyed_seed
from nanomagvlt.data.cache import encode_captions
from nanomagvlt.sequence import valid_mask


@dataclass
class Share:
    """A share with its 95% interval over scenes."""
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95% interval of a share seen in n independent trials (Wilson 1927); it is never empty, not even at 0 or 1."""
    z2 = 1.96 ** 2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = 1.96 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def share_over_scenes(values: list[float], per_scene: int) -> Share:
    """The mean of values in [0, 1], `per_scene` of each scene in a row. Scenes, not values, count as independent."""
    by_scene = np.asarray(values, dtype=float).reshape(-1, per_scene).mean(1)
    return Share(float(by_scene.mean()), *wilson(float(by_scene.mean()), len(by_scene)))


def unseen_scenes(level: shapes.Level, most: int) -> list[shapes.Scene]:
    """Scenes of the test split, each once: all of them, or `most` drawn at random where there are more."""
    rng, scenes, since_last = random.Random(keyed_seed(0, "unseen scenes")), {}, 0
    while len(scenes) < most and since_last < 5000:  # a small world is then found whole
        scene = shapes.random_scene(level, rng, "test")
        since_last = since_last + 1 if scene in scenes else 0
        scenes[scene] = True
    return list(scenes)


def names_the_objects(claims: shapes.Claims | None, scene: shapes.Scene) -> bool:
    """Does a caption name the scene's objects by colour and shape, whatever it says of where they are?"""
    def looks(things):
        return sorted((thing.colour, thing.shape) for thing in things)
    return claims is not None and looks(claims.things) == looks(scene.things)


def evaluate_scenes(pipeline, level: shapes.Level, num_scenes: int, phrasings: int = 2, seed: int = 0,
                    captions_too: bool = True) -> dict:
    """Draws and captions unseen scenes and judges the results; {name: Share} and, beside them, plain numbers.

    pipeline offers draw(prompts, torch.Generator), caption(images, torch.Generator), image_to_tokens and
    tokens_to_image. Each scene is asked for in `phrasings` ways, and as many times drawn by shapes.py and captioned.
    "ignoring" judges the same results against the next scene's prompt or picture: what a pipeline would reach that
    draws and writes as well, but ignores what it was given.
    """
    scenes = unseen_scenes(level, num_scenes)
    rng, generator = random.Random(keyed_seed(seed, "phrasings")), keyed_generator(seed, "decoding")
    asked = [scene for scene in scenes for _ in range(phrasings)]
    prompts = [shapes.describe(scene, level, rng) for scene in asked]
    truth = np.stack([shapes.draw_scene(scene, level, rng) for scene in asked])                   # (M, S, S, 3)

    def share(values) -> Share:
        return share_over_scenes(list(values), phrasings)

    claims = [shapes.parse(prompt) for prompt in prompts]
    seen = shapes.read_images(pipeline.draw(prompts, generator), level)
    clean = [reading.is_clean for reading in seen]
    drawn = [shapes.judge(c, reading.scene) for c, reading in zip(claims, seen)]
    drawn_blind = [shapes.judge(c, reading.scene) for c, reading in zip(claims[phrasings:] + claims[:phrasings], seen)]
    repainted = shapes.read_images(pipeline.tokens_to_image(pipeline.image_to_tokens(truth)), level)
    results = {
        "scenes": len(scenes), "phrasings": phrasings,
        "t2i_exact": share(v.exact and ok for v, ok in zip(drawn, clean)),
        "t2i_facts": share(v.right / v.total for v in drawn),
        "t2i_exact_ignoring": share(v.exact and ok for v, ok in zip(drawn_blind, clean)),
        "t2i_facts_ignoring": share(v.right / v.total for v in drawn_blind),
        "reconstruction": share(r.is_clean and r.scene == scene for r, scene in zip(repainted, asked)),
    }
    if not captions_too:
        return results

    others = asked[phrasings:] + asked[:phrasings]                                                # the next scene's
    captions, lengths = pipeline.caption(truth, generator)
    true_lengths = pipeline.caption_lengths(prompts)
    written = [shapes.parse(caption) for caption in captions]
    told = [shapes.judge(c, scene) for c, scene in zip(written, asked)]
    told_blind = [shapes.judge(c, scene) for c, scene in zip(written, others)]
    return results | {
        "i2t_exact": share(v.exact for v in told),
        "i2t_facts": share(v.right / v.total for v in told),
        "i2t_objects": share(names_the_objects(c, scene) for c, scene in zip(written, asked)),
        "i2t_exact_ignoring": share(v.exact for v in told_blind),
        "i2t_facts_ignoring": share(v.right / v.total for v in told_blind),
        "length": share(a == b for a, b in zip(lengths, true_lengths)),
        "length_constant": Counter(true_lengths).most_common(1)[0][1] / len(true_lengths),
    }


def evaluate_editing(pipeline, level: shapes.Level, num_scenes: int, phrasings: int = 2, seed: int = 0) -> dict:
    """Hides a part of an image or of a caption, has it made anew and judges all of the result. {name: Share}

    What is hidden: "object", one object's cell, or its colour and shape in the caption; "centre", the paper's protocol,
    the middle half of the image's rows and columns, and of the caption's words. inpainted sees the prompt and the rest
    of the image, infilled the image and the rest of the caption. "without" withholds the other modality, which is then
    made together with what is missing, as it2it does: what the context alone gives. A model that was not trained in
    it2it has no such figures. "i2t_true_length": all words are hidden, their number is not. pipeline offers
    draw_tokens, write_tokens, make_pairs and what evaluate_scenes() wants. ValueError if a caption exceeds its text.
    """
    scenes = unseen_scenes(level, num_scenes)
    rng = random.Random(keyed_seed(seed, "phrasings"))
    asked = [scene for scene in scenes for _ in range(phrasings)]
    prompts = [shapes.describe(scene, level, rng) for scene in asked]
    things = [rng.choice(scene.things) for scene in asked]
    image_tokens = pipeline.image_to_tokens(np.stack([shapes.draw_scene(scene, level, rng) for scene in asked]))
    bpe, cfg = pipeline.bpe, pipeline.cfg
    text_tokens, lengths = encode_captions(bpe, prompts, cfg.text_length)
    if (text_tokens.gather(1, lengths[:, None] - 1) != bpe.end).any():
        raise ValueError(f"captions of shapes:{level.name} have more than text_length {cfg.text_length} tokens here")
    all_words = valid_mask(lengths, cfg.text_length)                                                # (M, T)

    def drawn_right(pictures: np.ndarray) -> Share:
        readings = zip(prompts, shapes.read_images(pictures, level))
        return share_over_scenes([shapes.judge(shapes.parse(prompt), reading.scene).exact and reading.is_clean
                                  for prompt, reading in readings], phrasings)

    def told_right(captions: list[str]) -> Share:
        return share_over_scenes([shapes.judge(shapes.parse(caption), scene).exact
                                  for caption, scene in zip(captions, asked)], phrasings)

    def edited(name: str, holes: torch.Tensor, gaps: torch.Tensor) -> dict[str, Share]:
        """holes (M, N), gaps (M, T): where image and text are hidden."""
        generator, count, everything = keyed_generator(seed, name), len(asked), torch.ones_like(holes)
        painted = pipeline.tokens_to_image(pipeline.draw_tokens(prompts, generator, image_tokens, holes)[0])
        written = pipeline.write_tokens(image_tokens, generator, text_tokens, lengths, gaps)[0]
        found = {f"{name}_inpainted": drawn_right(painted),
                 f"{name}_infilled": told_right(pipeline.read_texts(written, lengths, cut=False))}
        if cfg.task_weights[2]:
            alone = pipeline.make_pairs(count, generator, (image_tokens, holes), (text_tokens, lengths, all_words))[0]
            blind = pipeline.make_pairs(count, generator, (image_tokens, everything), (text_tokens, lengths, gaps))[1]
            found |= {f"{name}_inpainted_without": drawn_right(pipeline.tokens_to_image(alone)),
                      f"{name}_infilled_without": told_right(pipeline.read_texts(blind, lengths, cut=False))}
        return found

    quarter = torch.arange(cfg.grid) * 2 // cfg.grid                                                 # (G,)
    cell_of = (2 * quarter[:, None] + quarter).flatten()                                             # (N,)
    cells = cell_of == torch.tensor([thing.cell for thing in things])[:, None]                       # (M, N)
    phrases = torch.zeros_like(text_tokens, dtype=torch.bool)                                        # (M, T)
    for row, prompt, thing in zip(phrases, prompts, things):
        row[list(edit.word_positions(bpe, prompt, f"{thing.colour} {thing.shape}"))] = True
    rewritten = pipeline.write_tokens(image_tokens, keyed_generator(seed, "length"), text_tokens, lengths, all_words)[0]
    return {"scenes": len(scenes), "phrasings": phrasings, **edited("object", cells, phrases),
            "i2t_true_length": told_right(pipeline.read_texts(rewritten, lengths)),
            **edited("centre", edit.centre_positions(cfg.grid).expand(len(asked), -1),
                     edit.centre_words(lengths, cfg.text_length))}


def evaluate_pairs(pipeline, level: shapes.Level, count: int, seed: int = 0) -> dict:
    """Images and captions made together from nothing. {name: Share}, and how many there are

    "pairs_agree": the caption is right about the image, and the image clean; "pairs_crowded": the image has more than
    one object, as most scenes have: who always makes the same simple pair agrees with himself.
    Raises ValueError for a model that was not trained in it2it.
    """
    image_tokens, text_tokens, lengths, _ = pipeline.make_pairs(count, keyed_generator(seed, "pairs"))
    readings = shapes.read_images(pipeline.tokens_to_image(image_tokens), level)
    texts = pipeline.read_texts(text_tokens, lengths)
    agree = [shapes.judge(shapes.parse(text), r.scene).exact and r.is_clean for text, r in zip(texts, readings)]
    return {"pairs": count, "pairs_agree": share_over_scenes(agree, 1),
            "pairs_crowded": share_over_scenes([len(r.scene.things) > 1 for r in readings], 1)}


def evaluate_bias(pipeline, level: shapes.Level, num_scenes: int, phrasings: int = 2, seed: int = 0) -> dict:
    """The paper's figure 4 with exact counts: where nothing is as usual, is it said what is there, or what is usual?

    level is a biased one. Unseen scenes are asked for and shown in which no object has its shape's usual colour, and no
    two have the same shape. {name: Share} of the objects: "i2t_seen", the caption gives the shape its true colour;
    "i2t_usual", its usual colour; "t2i_asked" and "t2i_usual", the same of the shapes in the drawings.
    """
    plain = shapes.get_level(level.name.removesuffix("-biased"))
    scenes = [scene for scene in unseen_scenes(plain, 10 * num_scenes)
              if all(thing.colour != shapes.USUAL[thing.shape] for thing in scene.things)
              and len({thing.shape for thing in scene.things}) == len(scene.things)][:num_scenes]
    rng, generator = random.Random(keyed_seed(seed, "phrasings")), keyed_generator(seed, "decoding")
    asked = [scene for scene in scenes for _ in range(phrasings)]
    drawn = shapes.read_images(pipeline.draw([shapes.describe(s, plain, rng) for s in asked], generator), plain)
    captions, _ = pipeline.caption(np.stack([shapes.draw_scene(s, plain, rng) for s in asked]), generator)
    claims = [shapes.parse(caption) for caption in captions]

    def share(found: list, colour_of) -> Share:
        """Of each asked scene's things, those whose shape is found once, in the colour that colour_of(thing) gives."""
        values = []
        for scene, things in zip(asked, found):
            right = [[one.colour for one in things if one.shape == thing.shape] == [colour_of(thing)]
                     for thing in scene.things]
            values.append(sum(right) / len(right))
        return share_over_scenes(values, phrasings)

    told, painted = [claim.things if claim else () for claim in claims], [reading.scene.things for reading in drawn]
    true, usual = (lambda thing: thing.colour), (lambda thing: shapes.USUAL[thing.shape])
    return {"scenes": len(scenes), "phrasings": phrasings,
            "i2t_seen": share(told, true), "i2t_usual": share(told, usual),
            "t2i_asked": share(painted, true), "t2i_usual": share(painted, usual)}


def scene_table(results: dict) -> str:
    """The results of evaluate_scenes as a text table."""
    r = results
    return "\n".join([
        f"{r['scenes']} unseen scenes, {r['phrasings']} phrasings each; 95% intervals over scenes",
        f"{'':26}{'exact':24}{'single facts':24}",
        f"{'draw a prompt (T2I)':26}{str(r['t2i_exact']):24}{r['t2i_facts']}",
        f"{'  ignoring the prompt':26}{str(r['t2i_exact_ignoring']):24}{r['t2i_facts_ignoring']}",
        f"{'caption an image (I2T)':26}{str(r['i2t_exact']):24}{r['i2t_facts']}",
        f"{'  the objects alone':26}{r['i2t_objects']}",
        f"{'  ignoring the image':26}{str(r['i2t_exact_ignoring']):24}{r['i2t_facts_ignoring']}",
        f"{'image -> tokens -> image':26}{str(r['reconstruction']):24}(the ceiling of T2I)",
        f"{'caption length':26}{str(r['length']):24}(the commonest length, always: {r['length_constant']:.3f})",
    ])


def as_json(results: dict) -> dict:
    """The same in plain values."""
    return {name: asdict(value) if isinstance(value, Share) else value for name, value in results.items()}
