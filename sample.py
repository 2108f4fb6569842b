"""Draws, captions and fills in with a trained MAGVLT. The flags that are given decide which of these.

  python sample.py --prompt "a red circle above a blue square"           draws it, several times
  python sample.py --image photo.png                                     captions it, several times
  python sample.py --image photo.png --prompt "a blue square"            draws the centre again (inpainting), or
      --region 0,0,16,16 or --mask FILE.png or --keep 0.5                this box, the white part, half of the tokens
      --region 8,8,24,24 --outside                                       everything but this box (outpainting)
  python sample.py --image photo.png --text "a [MASK] circle [MASK:3]"   fills in the missing tokens (infilling)
  python sample.py --together                                            an image and its caption from nothing, or from
                                                                         --image with a region, or --text with [MASK]
  python sample.py --prompt "..." --candidates 32 --clip ViT-B-32.pt     keeps the 8 that CLIP scores highest; or --judge
  python sample.py --prompt "..." --guidance 3                           classifier-free guidance
  python sample.py --prompt "..." --image-steps 8 --image-order halton --image-schedule square
  python sample.py --prompt "a red circle" --trace --attention circle    shows every step, and the attention to a word
"""
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from nanomagvlt.config import DECODING
from nanomagvlt.data import shapes
from nanomagvlt.data.cache import encode_captions
from nanomagvlt.data.sources import BadSample, open_image, square
from nanomagvlt.decoding import Step
from nanomagvlt.rng import keyed_generator
from nanomagvlt.sampling import clip, edit, visualize
from nanomagvlt.sampling.pipeline import Pipeline, contact_sheet, load_pipeline
from nanomagvlt.tokenizers.bpe import clean_written
from nanomagvlt.training import checkpoint, pretrained
from nanomagvlt.training.cli import Parser, add_config_flags, given_settings, positive


# ---------------------------------------------------------------------------------------------- what is made

def make_pictures(args, pipeline: Pipeline, generator: torch.Generator, scorer) -> None:
    """Draws the prompt or, in a given image, a part of it."""
    cfg, count = pipeline.cfg, args.candidates or args.num_samples
    prompt_tokens, prompt_length = encode_captions(pipeline.bpe, [args.prompt], cfg.text_length)
    words = range(0) if args.attention is None else edit.word_positions(pipeline.bpe, args.prompt, args.attention)
    if words.stop > prompt_length:
        raise ValueError(f"--attention {args.attention}: only {cfg.text_length} tokens of the prompt are read")
    if len(pipeline.bpe.encode(args.prompt)) > cfg.text_length:
        print(f"the prompt is longer than {cfg.text_length} tokens: only the first {cfg.text_length} are read")
    known, to_fill, original = None, None, None
    if args.image:
        picture = read_image(args.image)
        to_fill = positions_to_fill(args, count, cfg.grid, picture)
        original = square(picture, cfg.image_size)
        known = pipeline.image_to_tokens(np.stack([original])).expand(count, -1)
        print(f"{int(to_fill[0].sum())} of {cfg.image_tokens} tokens are drawn again")

    started = time.monotonic()
    image_tokens, trace = pipeline.draw_tokens([args.prompt] * count, generator, known, to_fill)
    pictures = pipeline.tokens_to_image(image_tokens)
    seconds = (time.monotonic() - started) / count
    if args.blend:
        pictures = edit.blend(original, pictures, to_fill)
    labels = [""] * count
    if scorer:
        scores = scorer(pictures, [args.prompt])
        best = highest(scores, args.num_samples)
        pictures, labels = pictures[best], [f"{scores[i]:.3f}" for i in best]
        print(f"the best {len(best)} of {count}: {', '.join(labels)}")
    sheets = {args.out: contact_sheet(pictures, labels) if len(pictures) > 1 else Image.fromarray(pictures[0])}
    films = film_sheets(args, pipeline, trace) if args.trace else {}
    if words:
        steps = pipeline.tokens_to_image(torch.stack([step.tokens[0] for step in trace]))
        tokens, length = prompt_tokens.to(pipeline.device), prompt_length.to(pipeline.device)
        maps = visualize.attention_maps(pipeline.model, trace, tokens, length, words)
        sheets[beside(args.out, "attention.png")] = visualize.attention_sheet(steps, maps)
    save(sheets, films)
    print(f"{count} x {args.prompt!r} ({seconds:.2f} s a picture)")


def make_captions(args, pipeline: Pipeline, generator: torch.Generator, scorer) -> None:
    """Captions an image or, in a given text, fills in the missing tokens."""
    count, cfg = args.candidates or args.num_samples, pipeline.cfg
    picture = np.stack([square(read_image(args.image), cfg.image_size)])                             # (1, S, S, 3)
    known = known_text(args, pipeline, count) or ()
    started = time.monotonic()
    text_tokens, lengths, trace = pipeline.write_tokens(pipeline.image_to_tokens(picture).expand(count, -1), generator,
                                                        *known)
    captions = pipeline.read_texts(text_tokens, lengths, cut=args.text is None)
    seconds, chosen = (time.monotonic() - started) / count, ""
    if scorer:
        scores = scorer(picture, captions)
        best = highest(scores, args.num_samples)
        captions, chosen = [f"{captions[i]}  ({scores[i]:.3f})" for i in best], f", the best {len(best)}"
    print(f"{count} x {args.image} ({seconds:.2f} s a caption){chosen}:")
    for caption in map(clean_written, captions) if args.clean else captions:
        print(printable(caption))
    if args.trace:
        print_steps(pipeline, trace, lengths)


def make_pairs(args, pipeline: Pipeline, generator: torch.Generator) -> None:
    """Draws images and writes their captions together, from nothing or from a part of each."""
    cfg, count, known_image = pipeline.cfg, args.num_samples, None
    if args.image:
        picture = read_image(args.image)
        tokens = pipeline.image_to_tokens(np.stack([square(picture, cfg.image_size)]))
        known_image = tokens.expand(count, -1), positions_to_fill(args, count, cfg.grid, picture)
    image_tokens, text_tokens, lengths, traces = pipeline.make_pairs(count, generator, known_image,
                                                                     known_text(args, pipeline, count))
    captions = pipeline.read_texts(text_tokens, lengths, cut=args.text is None)
    save({args.out: contact_sheet(pipeline.tokens_to_image(image_tokens), list(map(printable, captions)))},
         film_sheets(args, pipeline, traces["image"]) if args.trace else {})
    print("\n".join(map(printable, captions)))
    if args.trace:
        print_steps(pipeline, traces["text"], lengths)


# ---------------------------------------------------------------------------------------------- what is given

def read_image(path: Path) -> Image.Image:
    try:
        return open_image(path.read_bytes())
    except BadSample as reason:
        raise ValueError(f"{path}: {reason}; give a JPEG, PNG, WebP, GIF or BMP file") from None


def positions_to_fill(args, count: int, grid: int, image: Image.Image) -> torch.Tensor:
    """The image positions to draw again, (count, N) bool. Raises ValueError."""
    if args.keep is not None:  # with a generator of its own, so that row 0 does not depend on the number of rows
        return edit.random_positions(grid ** 2, 1 - args.keep, count, keyed_generator("keep", args.seed))
    positions = edit.centre_positions(grid)
    if args.region:
        positions = edit.mask_to_positions(edit.region(image.size, args.region), grid)
    if args.mask:
        mask = read_image(args.mask)
        if Image.open(args.mask).has_transparency_data:
            raise ValueError(f"{args.mask} has transparent pixels: give a mask in black and white")
        if mask.size != image.size:
            raise ValueError(f"{args.mask} is {mask.size[0]} x {mask.size[1]} pixels, {args.image} "
                             f"{image.size[0]} x {image.size[1]}: they must have one size")
        positions = edit.mask_to_positions(mask, grid)
    positions = ~positions if args.outside else positions
    if not positions.any():
        raise ValueError("nothing is masked within the square that the model reads: give another region or mask")
    return positions.expand(count, -1)


def known_text(args, pipeline: Pipeline, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """The text of --text, `count` times: tokens (B, T), lengths (B,), to_fill (B, T). None without it."""
    if args.text is None:
        return None
    text_tokens, length, to_fill = edit.read_masked_text(args.text, pipeline.bpe, pipeline.cfg.text_length)
    return text_tokens.expand(count, -1), length.expand(count), to_fill.expand(count, -1)


def read_scorer(args, pipeline: Pipeline):
    """A function from pictures (B, S, S, 3) and one text, or one picture and several texts, to scores (B,): how well
    they match, higher is better. None without --judge and --clip."""
    level = shapes.level_of(pipeline.cfg.data)
    if args.judge and not level:
        raise ValueError("--judge judges shapes only: give --clip FILE")
    if args.judge and args.prompt is not None and shapes.parse(args.prompt) is None:
        raise ValueError(f"--judge does not understand {args.prompt!r}: use the words of the captions of shapes")
    if args.judge:
        def judge(pictures: np.ndarray, texts: list[str]) -> np.ndarray:
            pairs = [(reading, shapes.judge(shapes.parse(text), reading.scene))
                     for reading in shapes.read_images(pictures, level) for text in texts]
            return np.array([1.0 if v.exact and reading.is_clean else 0.99 * v.right / max(1, v.total)
                             for reading, v in pairs])
        return judge
    if args.clip:
        judge = clip.load_judge(args.clip, args.bpe, pipeline.device)
        return lambda pictures, texts: judge.model.similarity(judge.image_features(pictures),
                                                                  judge.text_features(texts)).flatten().numpy()


def highest(scores: np.ndarray, count: int) -> np.ndarray:
    """The indices of the `count` highest scores, the best first; of equal scores the first."""
    return np.argsort(-scores, kind="stable")[:count]


# ---------------------------------------------------------------------------------------------- what is shown

def beside(out: Path, name: str) -> Path:
    """samples.png, steps.gif -> samples-steps.gif."""
    return out.with_name(f"{out.stem}-{name}")


def film_sheets(args, pipeline: Pipeline, trace: list[Step]) -> dict[Path, list[Image.Image]]:
    """The decoding of the first picture as a strip and as an animation, by file."""
    painted = pipeline.tokens_to_image(torch.stack([step.tokens[0] for step in trace]))
    strip, frames = visualize.film(painted, trace)
    return {beside(args.out, "steps.png"): [strip], beside(args.out, "steps.gif"): frames}


def save(sheets: dict[Path, Image.Image], films: dict[Path, list[Image.Image]]) -> None:
    """Writes all pictures, after all are made."""
    for path, sheet in sheets.items():
        sheet.save(path, format="PNG")
    for path, frames in films.items():
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=400, loop=0)
    print("-> " + ", ".join(map(str, [*sheets, *films])))


def print_steps(pipeline: Pipeline, trace: list[Step], lengths: torch.Tensor) -> None:
    print("the first, step by step:\n" + printable(visualize.text_table(pipeline.bpe, trace, int(lengths[0]))))


def printable(text: str) -> str:
    """The text without control characters, which could change the terminal: a model may write any bytes."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


# ---------------------------------------------------------------------------------------------- from the command line

def contradictions(args) -> list[tuple[bool, str]]:
    """Flags that do not go together, and what to do instead."""
    draws, chosen_by = args.prompt is not None, [f"--{name}" for name in ("clip", "judge") if getattr(args, name)]
    part = [f"--{name}" for name in ("region", "mask", "keep") if getattr(args, name) is not None]
    shows = [f"--{name}" for name in ("trace", "attention") if getattr(args, name)]
    return [
        (not (draws or args.image or args.text is not None or args.together),
         'give --prompt "..." to draw, --image FILE to caption, or see --help for more'),
        (draws and args.text is not None, "--prompt is drawn, --text is filled in: give one of them"),
        (args.together and draws, "--together writes its own text: leave --prompt out, or give --text with [MASK]"),
        (args.text is not None and not (args.image or args.together),
         "--text needs the --image that it describes, or --together to draw one"),
        (len(part) > 1, f"{' and '.join(part)}: give one of them"),
        (bool(part) and not args.image, f"{''.join(part[:1])} is a part of an --image: give one"),
        (bool(part) and not (draws or args.together),
         f'{"".join(part[:1])} needs --prompt "...", a description of the new image, or --together'),
        (args.keep is not None and not 0 <= args.keep < 1, f"--keep {args.keep}: must lie in [0, 1)"),
        (args.outside and not (args.region or args.mask), "--outside needs a --region or --mask"),
        (args.blend and not (args.image and draws), "--blend needs an --image and a --prompt"),
        ("guidance" in args and not draws, "--guidance is for drawings: give --prompt"),
        (args.attention is not None and not draws, "--attention is for drawings: give --prompt"),
        (args.candidates is not None and args.candidates < args.num_samples,
         f"--candidates {args.candidates}: must be at least --num-samples {args.num_samples}"),
        (len(chosen_by) > 1, "--clip and --judge: give one of them"),
        (args.candidates is not None and not chosen_by, "--candidates needs --clip FILE or --judge, to choose by"),
        (args.candidates is None and bool(chosen_by), f"{''.join(chosen_by[:1])} chooses among --candidates: give them"),
        (args.candidates is not None and bool(shows), f"{''.join(shows[:1])} shows the first: leave --candidates out"),
        (args.candidates is not None and (args.together or args.text is not None),
         "--candidates is for drawings and captions"),
        (args.clean and (draws or args.together or args.text is not None), "--clean is for whole captions, of --image"),
    ]


def sample(args) -> None:
    """Does what the flags ask for. Raises ValueError or OSError, before anything is written."""
    path = args.checkpoint or checkpoint.newest()
    if not args.out.parent.is_dir():
        raise ValueError(f"--out {args.out}: there is no folder {args.out.parent}")
    pipeline = load_pipeline(path, args.device, args.bpe, args.heads, args.sha256)
    if pipeline.cfg.model == "argvlt" and (args.together or args.trace or args.attention):
        raise ValueError(f"{path} is an ARGVLT, which generates one token after the other: it has no --together, "
                         "--trace or --attention")
    pipeline = pipeline.with_settings(**given_settings(args, DECODING))
    scorer, generator = read_scorer(args, pipeline), keyed_generator("sample", args.seed)
    print(f"{path} on {pipeline.device}")
    if args.together:
        make_pairs(args, pipeline, generator)
    elif args.prompt is not None:
        make_pictures(args, pipeline, generator, scorer)
    else:
        make_captions(args, pipeline, generator, scorer)


def box(text: str) -> tuple[int, ...]:
    """"0,0,16,16" -> (0, 0, 16, 16)."""
    numbers = tuple(map(int, text.split(",")))
    if len(numbers) != 4:
        raise ValueError(text)
    return numbers


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="sample.py", description=__doc__)
    parser.add_argument("--prompt", help="what to draw")
    parser.add_argument("--image", type=Path, help="an image file to caption or to change")
    parser.add_argument("--text", help="a caption with [MASK] where a token is missing, [MASK:3] for three")
    parser.add_argument("--together", action="store_true", help="draw an image and write its caption together")
    parser.add_argument("--checkpoint", type=Path, help="a last.pt or best.pt (default: the newest runs/*/last.pt)")
    parser.add_argument("--num-samples", type=positive, default=8, help="how many pictures or captions (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same device, same result (default 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default auto)")
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="the PNG to write (default samples.png)")
    parser.add_argument("--clean", action="store_true",
                        help="captions end at the first full stop and repeat no word, as in the authors' release")
    group = parser.add_argument_group("the part of --image to draw again (default: the middle of its rows and columns)")
    group.add_argument("--region", type=box, help="a box x0,y0,x1,y1 in its pixels")
    group.add_argument("--mask", type=Path, help="an image file of its size, white in the part to draw again")
    group.add_argument("--keep", type=float, help="a random share of tokens to keep, in [0, 1)")
    group.add_argument("--outside", action="store_true", help="everything but the --region or --mask")
    group.add_argument("--blend", action="store_true", help="blend the edges of the old and the new")
    group = parser.add_argument_group("choosing and watching")
    group.add_argument("--candidates", type=int, help="make so many, and keep the best --num-samples of them")
    group.add_argument("--clip", type=Path, help="OpenAI's ViT-B-32.pt, to choose by")
    group.add_argument("--judge", action="store_true", help="in the world of shapes: choose by the exact judge")
    group.add_argument("--trace", action="store_true", help="write every step: OUT-steps.png and .gif, or a table")
    group.add_argument("--attention", metavar="WORD", help="write the attention to a word: OUT-attention.png")
    group = parser.add_argument_group("for the authors' published checkpoints, and for --clip")
    group.add_argument("--bpe", type=Path, default=pretrained.CLIP_BPE,
                       help="CLIP's merges (default: where data/download.py puts them)")
    group.add_argument("--heads", type=int, default=0, help="attention heads (default: width / 128)")
    group.add_argument("--sha256", default="", help="refuse a file that has another digest")
    add_config_flags(parser, DECODING)
    args = parser.parse(argv)
    for is_wrong, message in contradictions(args):
        if is_wrong:
            parser.error(message)
    parser.run(sample, args)


if __name__ == "__main__":
    main()
