"""Draws, captions and fills in with a trained MAGVLT. The flags that are given decide which of these.

  python sample.py --prompt "a red circle above a blue square"           draws it, several times
  python sample.py --image photo.png                                     captions it, several times
  python sample.py --image photo.png --prompt "a blue square"            draws the centre again (inpainting), or
      --region 0,0,16,16 or --mask FILE.png or --keep 0.5                this box, the white part, half of the tokens
      --region 8,8,24,24 --outside                                       everything but this box (outpainting)
  python sample.py --image photo.png --text "a [MASK] circle [MASK:3]"   fills in the missing tokens (infilling)
  python sample.py --together                                            an image and its caption from nothing, or from
                                                                         --image with a region, or --text with [MASK]
  python sample.py --prompt "..." --candidates 32 --clip ViT-B-32.pt     keeps the 8 that CLIP scores best; or --judge
  python sample.py --prompt "..." --guidance 3                           classifier-free guidance
  python sample.py --prompt "..." --image-steps 8 --image-order halton --image-schedule square
  python sample.py --prompt "a red circle" --trace --attention circle    shows every step, and the attention to a word
"""
import time
from pathlib import Path

import numpy as np
import regex
import torch
from PIL import Image

from nanomagvlt.config import DECODING
from nanomagvlt.data import shapes
from nanomagvlt.data.cache import encode_captions
from nanomagvlt.data.sources import BadSample, open_image, square
from nanomagvlt.decoding import Step
from nanomagvlt.io import write_image
from nanomagvlt.rng import keyed_generator
from nanomagvlt.sampling import clip, edit, visualize
from nanomagvlt.sampling.pipeline import Pipeline, contact_sheet, load_pipeline
from nanomagvlt.training import checkpoint, pretrained
from nanomagvlt.training.cli import Parser, add_config_flags, check_out, given_settings, positive, reader


def make_pictures(args, pipeline: Pipeline, generator: torch.Generator, scorer) -> None:
    """Draws the prompt or, in a given image, a part of it."""
    cfg, count = pipeline.cfg, args.candidates or args.num_samples
    if len(pipeline.bpe.encode(args.prompt)) > cfg.text_length:
        print(f"the prompt is longer than {cfg.text_length} tokens: only the first {cfg.text_length} are read")
    words = range(0) if args.attention is None else edit.word_positions(pipeline.bpe, args.prompt, args.attention)
    if words.stop > cfg.text_length:
        raise ValueError(f"--attention {args.attention}: only {cfg.text_length} tokens of the prompt are read")
    original, known, to_fill = known_image(args, pipeline, count) if args.image else (None, None, None)
    if args.image:
        print(f"{int(to_fill[0].sum())} of {cfg.image_tokens} tokens are drawn again")

    started = time.monotonic()
    image_tokens, trace = pipeline.draw_tokens([args.prompt] * count, generator, known, to_fill)
    pictures = pipeline.tokens_to_image(image_tokens)
    seconds = (time.monotonic() - started) / count
    if args.blend:
        pictures = edit.blend(original, pictures, to_fill)
    labels = [""] * count
    if scorer:
        best, labels = choose(scorer(pictures, [args.prompt]), args.num_samples)
        pictures = pictures[best]
        print(f"the best {len(best)} of {count}: {', '.join(labels)}")
    sheet = contact_sheet(pictures, labels) if len(pictures) > 1 else Image.fromarray(pictures[0])
    save(args.out, {"": [sheet], **step_sheets(args, pipeline, trace, words)})
    print(f"{count} x {args.prompt!r} ({seconds:.2f} s a picture)")


def make_captions(args, pipeline: Pipeline, generator: torch.Generator, scorer) -> None:
    """Captions an image or, in a given text, fills in the missing tokens."""
    count = args.candidates or args.num_samples
    picture, image_tokens, _ = known_image(args, pipeline, count)
    started = time.monotonic()
    text_tokens, lengths, trace = pipeline.write_tokens(image_tokens, generator, *known_text(args, pipeline, count))
    captions = pipeline.read_texts(text_tokens, lengths, cut=args.text is None)
    seconds = (time.monotonic() - started) / count
    lines = [printable(caption) for caption in captions]
    print(f"{count} x {args.image} ({seconds:.2f} s a caption):")
    if scorer:
        best, scores = choose(scorer(picture, captions), args.num_samples)
        lines = [f"the best {len(best)}:", *(f"{lines[i]}  ({score})" for i, score in zip(best, scores))]
    print("\n".join(lines))
    if args.trace:
        print_steps(pipeline, trace, lengths)


def make_pairs(args, pipeline: Pipeline, generator: torch.Generator) -> None:
    """Draws images and writes their captions together, from nothing or from a part of each."""
    count = args.num_samples
    known = known_image(args, pipeline, count)[1:] if args.image else ()
    image_tokens, text_tokens, lengths, traces = pipeline.make_pairs(count, generator, known,
                                                                     known_text(args, pipeline, count))
    captions = [printable(text) for text in pipeline.read_texts(text_tokens, lengths, cut=args.text is None)]
    save(args.out, {"": [contact_sheet(pipeline.tokens_to_image(image_tokens), captions)],
                    **step_sheets(args, pipeline, traces["image"])})
    print("\n".join(captions))
    if args.trace:
        print_steps(pipeline, traces["text"], lengths)


def read_image(path: Path) -> Image.Image:
    try:
        return open_image(path.read_bytes())
    except BadSample as reason:
        raise ValueError(f"{path}: {reason}; give a JPEG, PNG, WebP, GIF or BMP file") from None


def known_image(args, pipeline: Pipeline, count: int) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """The image of --image as the model sees it, uint8 (1, S, S, 3), `count` times its tokens (B, N), and `count` times
    the positions to draw again (B, N) bool. Raises ValueError if there are no such positions."""
    image, grid = read_image(args.image), pipeline.cfg.grid
    positions = edit.centre_positions(grid)                                                          # (N,)
    if args.region is not None:
        positions = edit.mask_to_positions(edit.region(image.size, args.region), grid, pipeline.cfg.fit)
    if args.mask:
        mask = read_image(args.mask)
        if Image.open(args.mask).has_transparency_data:
            raise ValueError(f"{args.mask} has transparent pixels: give a mask in black and white")
        if mask.size != image.size:
            raise ValueError(f"{args.mask} and {args.image} must have one size, not {mask.size} and {image.size}")
        positions = edit.mask_to_positions(mask, grid, pipeline.cfg.fit)
    if args.keep is not None:  # with a generator of its own, so that row 0 does not depend on the number of rows
        positions = edit.random_positions(grid ** 2, 1 - args.keep, count, keyed_generator("keep", args.seed))
    positions = ~positions if args.outside else positions
    if not positions.any():
        raise ValueError("nothing is masked within the square that the model reads: give another region or mask")
    picture = np.stack([square(image, pipeline.cfg.image_size, pipeline.cfg.fit)])                  # (1, S, S, 3)
    return picture, pipeline.image_to_tokens(picture).expand(count, -1), positions.expand(count, -1)


def known_text(args, pipeline: Pipeline, count: int) -> tuple[torch.Tensor, ...]:
    """The text of --text, `count` times: tokens (B, T), lengths (B,), to_fill (B, T). Empty without --text."""
    if args.text is None:
        return ()
    known = edit.read_masked_text(args.text, pipeline.bpe, pipeline.cfg.text_length)                 # (T,), (), (T,)
    return tuple(tensor.expand(count, *tensor.shape) for tensor in known)


def read_scorer(args, pipeline: Pipeline):
    """A function from pictures (B, S, S, 3) and one text, or one picture and several texts, to scores (B,): how well
    they match, higher is better. None without --judge and --clip."""
    if args.clip:
        judge = clip.load_judge(args.clip, args.bpe, pipeline.device)
        return lambda pictures, texts: judge.model.similarity(judge.image_features(pictures),
                                                              judge.text_features(texts)).flatten().numpy()
    if not args.judge:
        return None
    level = shapes.level_of(pipeline.cfg.data)
    if not level:
        raise ValueError("--judge judges shapes only: give --clip FILE")
    if args.prompt is not None and shapes.parse(args.prompt) is None:
        raise ValueError(f"--judge does not understand {args.prompt!r}: use the words of the captions of shapes")

    def score(pictures: np.ndarray, texts: list[str]) -> np.ndarray:
        pairs = [(reading, shapes.judge(shapes.parse(text), reading.scene))
                 for reading in shapes.read_images(pictures, level) for text in texts]
        return np.array([1.0 if v.exact and reading.is_clean else 0.99 * v.right / max(1, v.total)
                         for reading, v in pairs])
    return score


def choose(scores: np.ndarray, count: int) -> tuple[np.ndarray, list[str]]:
    """The indices of the `count` highest scores, the best first (of equal scores the first), and these scores."""
    best = np.argsort(-scores, kind="stable")[:count]
    return best, [f"{scores[i]:.3f}" for i in best]


def step_sheets(args, pipeline: Pipeline, trace: list[Step], words: range = range(0)) -> dict[str, list[Image.Image]]:
    """The pictures that --trace and --attention ask for, by name: the steps of the first drawing, and its attention to
    the prompt's tokens at `words`."""
    sheets = {}
    if args.trace or words:
        pictures = pipeline.tokens_to_image(torch.stack([step.tokens[0] for step in trace]))         # (K, S, S, 3)
    if args.trace:
        strip, frames = visualize.film(pictures, trace)
        sheets = {"steps.png": [strip], "steps.gif": frames}
    if words:
        prompt = encode_captions(pipeline.bpe, [args.prompt], pipeline.cfg.text_length)              # (1, T), (1,)
        maps = visualize.attention_maps(pipeline.model, trace, *prompt, words)                       # (K, N)
        sheets["attention.png"] = [visualize.attention_sheet(pictures, maps)]
    return sheets


def save(out: Path, sheets: dict[str, list[Image.Image]]) -> None:
    """Writes the picture "" to OUT, and the others beside it: "steps.gif" to OUT-steps.gif."""
    paths = [out.with_name(f"{out.stem}-{name}") if name else out for name in sheets]
    for path, frames in zip(paths, sheets.values()):
        write_image(path, frames)
    print("-> " + ", ".join(map(str, paths)))


def print_steps(pipeline: Pipeline, trace: list[Step], lengths: torch.Tensor) -> None:
    print("the first, step by step:\n" + printable(visualize.text_table(pipeline.bpe, trace, int(lengths[0]))))


def printable(text: str) -> str:
    """The text without characters that steer the terminal: a model may write any bytes. Joiners of emoji stay."""
    return regex.sub(r"[^\P{C}\n\p{Cf}\p{Cn}\p{Co}]|\p{Bidi_Control}|[\u2028\u2029]", "\N{REPLACEMENT CHARACTER}", text)


# Each flag on the left needs one of those on the right.
NEEDS = (("text", "image together"), ("region mask keep", "image"), ("region mask keep", "prompt together"),
         ("outside", "region mask"), ("fit", "image"), ("blend", "image"), ("blend guidance attention", "prompt"),
         ("candidates", "clip judge"), ("clip judge", "candidates"))
# Each flag on the left goes with none of those on the right.
EXCLUDES = (("prompt", "text together"), ("region", "mask keep"), ("mask", "keep"), ("clip", "judge"),
            ("candidates", "text together trace attention"))


def check_flags(args) -> None:
    """Raises ValueError for flags that do not go together."""
    given = [name for name, value in vars(args).items() if value is not None and value is not False]
    if not {"prompt", "image", "text", "together"} & set(given):
        raise ValueError('give --prompt "..." to draw, --image FILE to caption, or see --help for more')
    for names, others in NEEDS:
        for name in names.split():
            if name in given and not any(other in given for other in others.split()):
                raise ValueError(f"--{name} needs --{' or --'.join(others.split())}")
    for name, others in EXCLUDES:
        for other in others.split():
            if name in given and other in given:
                raise ValueError(f"--{name} does not go with --{other}: leave one of them out")
    if args.candidates is not None and args.candidates < args.num_samples:
        raise ValueError(f"--candidates {args.candidates}: must be at least --num-samples {args.num_samples}")
    if args.keep is not None and not 0 <= args.keep < 1:
        raise ValueError(f"--keep {args.keep}: must lie in [0, 1)")
    check_out(args.out)
    if args.out.suffix not in (".png", ".gif"):
        raise ValueError(f"--out {args.out}: must end in .png")


def sample(args) -> None:
    """Does what the flags ask for. Raises ValueError or OSError, before anything is written."""
    check_flags(args)
    path = args.checkpoint or checkpoint.newest()
    pipeline = load_pipeline(path, args.device, args.bpe)
    if pipeline.cfg.model == "argvlt" and (args.together or args.trace or args.attention):
        raise ValueError(f"{path} is an ARGVLT, without decoding steps: it has no --together, --trace or --attention")
    pipeline = pipeline.with_settings(**given_settings(args, [*DECODING, "fit"]))
    scorer, generator = read_scorer(args, pipeline), keyed_generator("sample", args.seed)
    print(f"{path} on {pipeline.device}")
    if args.together:
        make_pairs(args, pipeline, generator)
    elif args.prompt is not None:
        make_pictures(args, pipeline, generator, scorer)
    else:
        make_captions(args, pipeline, generator, scorer)


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
    group = parser.add_argument_group("the part of --image to draw again (default: the middle of its rows and columns)")
    group.add_argument("--region", type=reader(tuple[int, ...]), metavar="X0,Y0,X1,Y1", help="a box in its pixels")
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
    group.add_argument("--bpe", type=Path, default=pretrained.CLIP_BPE, help="CLIP's merges (default: as downloaded)")
    add_config_flags(parser, [*DECODING, "fit"])
    parser.run(sample, parser.parse(argv))


if __name__ == "__main__":
    main()
