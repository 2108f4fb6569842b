"""The paper's measurements on photographs: python eval.py coco --protocol t2i ...

  t2i      draws the captions of COCO's validation images: FID and IS (tables 1 and 9)
  inpaint  draws the centre of these images, given the rest and the caption: FID and IS (table 2)
  i2t      captions the images of Karpathy's test split: BLEU, ROUGE-L, CIDEr (tables 3 and 10)
  nocaps   captions NoCaps' validation images: the same, also by domain (tables 4 and 10)
  infill   writes the middle half of a caption, given the rest and the image: as i2t (table 5)

A protocol is a numbered list of items; an item is an image and one of its captions. The random numbers of an item
depend on the seed, its number and the candidate's number, and on nothing else. So the work, hours on a GPU, can be
killed, continued, and shared by processes that never communicate: the result is the same to the byte.

  Measurement --> claim() its folder --> work(): files of 64 items each --> score() --> report()

Training leaves out what it cannot read, and counts it. A measurement leaves nothing out: a missing image is an error.

Shapes: B items, C candidates of each, S image side, N image tokens, T text tokens, E CLIP's features.
"""
import hashlib
import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator
from tqdm import tqdm

import nanomagvlt
from nanomagvlt.config import DECODING, Config, as_json
from nanomagvlt.data.cache import encode_captions
from nanomagvlt.data.sources import BadSample, CaptionedImage, open_image, read_caption_file, square
from nanomagvlt.evaluation.captions import score_captions, tokenize
from nanomagvlt.evaluation.fid import (Inception, clip_score, frechet_distance, inception_features, inception_score,
                                       load_inception)
from nanomagvlt.io import one_line_error, read_arrays, write_arrays, write_json
from nanomagvlt.rng import keyed_generator
from nanomagvlt.sampling import edit
from nanomagvlt.sampling.clip import Judge, load_judge
from nanomagvlt.sampling.pipeline import Pipeline, load_pipeline
from nanomagvlt.tokenizers.bpe import clean_caption
from nanomagvlt.training import checkpoint, distributed, pretrained
from nanomagvlt.training.cli import Parser, given_settings, positive

Columns = dict[str, np.ndarray]  # arrays by name, with one row for each item


@dataclass(frozen=True)
class Protocol:
    """A measurement as the paper describes it, and the paper's results."""
    generates: str           # "image" or "text"
    partial: bool            # only the centre of the image, or the middle of the caption, is generated
    num_images: int          # in the paper's split
    split: str               # of Karpathy's file; "" for a file without splits
    num: int | None          # items, a random choice among all captions; None: each image with its first caption
    candidates: int          # generated for each item; CLIP chooses one
    steps: int               # K
    blurs: tuple[int, ...]   # k of FID-k; 0, 1, 2, 4, 8 are those of DALL-E and L-Verse
    unknown: str             # what the paper does not say
    paper: dict[str, tuple]  # measure -> the results of MODELS


CHUNK = 64  # items in a file
SIDE = 256  # of the paper's images
MODELS = ("ARGVLT", "ARGVLT large", "MAGVLT", "MAGVLT large")
PROTOCOLS = {
    "t2i": Protocol("image", False, 40_504, "", 30_000, 32, 10, (0, 1, 2, 4, 8),
                    "which captions it draws, and which images FID compares the drawings with (here: all)", {
                        "FID": (16.93, 13.01, 12.08, 10.14), "IS": (22.50, 23.75, 22.75, 25.15)}),
    "inpaint": Protocol("image", True, 40_504, "", 30_000, 1, 10, (0,),
                        "how many images it fills in, and the number of candidates", {
                            "FID": (5.62, None, 3.17, None), "IS": (29.21, None, 30.79, None)}),
    "i2t": Protocol("text", False, 5_000, "test", None, 64, 12, (), "its sampling temperature", {
        "Bleu_4": (10.9, None, 14.6, None), "CIDEr": (45.5, 43.6, 60.4, 68.1)}),
    "nocaps": Protocol("text", False, 4_500, "", None, 64, 12, (), "its sampling temperature", {
        "overall CIDEr": (33.4, 34.1, 46.3, 55.8)}),
    "infill": Protocol("text", True, 5_000, "test", None, 1, 12, (),
                       "which captions it masks, the number of candidates, and the references of the scores", {
                           "Bleu_4": (39.5, None, 42.7, None), "CIDEr": (119.8, None, 135.3, None)}),
}


# ---------------------------------------------------------------------------------------------- images and captions

def read_photos(captions: Path, folder: Path, need_words: bool) -> tuple[list[CaptionedImage], str]:
    """The images of a caption file, which lie in `folder`, and their split: "test" for Karpathy's file, else "".

    Raises ValueError if there is no image, or if an image has no file, no caption or, with need_words, no words.
    """
    photos, has_splits = read_caption_file(captions, split=None)
    if not photos:
        raise ValueError(f"{captions}: has no images{' of the test split' if has_splits else ''}")
    for photo in photos:
        if not photo.captions or need_words and not all(map(tokenize, photo.captions)):
            raise ValueError(f"{captions}: image {photo.id!r} has no caption, or one without words")
        if ".." in Path(photo.file).parts or Path(photo.file).is_absolute() or not (folder / photo.file).is_file():
            raise ValueError(f"{folder} has no file {photo.file}, image {photo.id!r} of {captions}")
    return photos, "test" if has_splits else ""


def choose_items(photos: list[CaptionedImage], num: int | None, all_captions: bool) -> list[tuple[CaptionedImage, str]]:
    """num items (None: all), chosen from all captions or from each image's first one, whatever the seed.

    A smaller choice is the beginning of a larger one. Raises ValueError if there are fewer than num.
    """
    items = [(photo, text) for photo in photos for text in (photo.captions if all_captions else photo.captions[:1])]
    if num and num > len(items):
        raise ValueError(f"{num:,} items, but there are only {len(items):,}: give --num {len(items)} or less")
    order = torch.randperm(len(items), generator=keyed_generator("which items")).tolist()
    return [items[i] for i in order[:num]]


# ---------------------------------------------------------------------------------------------- resumable work

def chunks(folder: Path, kind: str, count: int) -> dict[Path, range]:
    """The files FOLDER/KIND-00000.npz and so on, and the numbers of the items in each, at most CHUNK of them."""
    return {folder / f"{kind}-{i // CHUNK:05d}.npz": range(i, min(i + CHUNK, count)) for i in range(0, count, CHUNK)}


def fill(files: dict[Path, range], compute: Callable[[range], Columns], part: tuple[int, int]) -> None:
    """Writes the missing files of part (k, n), which is every n-th file from the k-th on, k from 0."""
    missing = [path for path in list(files)[part[0]::part[1]] if not path.exists()]
    for path in tqdm(missing, unit="file", disable=not missing):
        write_arrays(path, **compute(files[path]))


def column(files: dict[Path, range], name: str) -> np.ndarray:
    """The rows of all items under a name. All files must exist. Raises ValueError for a damaged one."""
    return np.concatenate([read_arrays(path, name)[0] for path in files])


def claim(folder: Path, settings: dict) -> None:
    """Begins a folder, or continues in it. Raises ValueError for one with other settings or other content."""
    path = folder / "settings.json"
    if not path.is_file():
        if folder.exists() and any(not file.name.startswith(path.name) for file in folder.iterdir()):
            raise ValueError(f"{folder} exists and has other content: give another --out")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
    with one_line_error(path, "damaged"):  # a setting newer than the folder had its default
        begun_with = as_json(Config()) | json.loads(path.read_text())
    for name, value in settings.items():
        if begun_with.get(name) != value:
            raise ValueError(f"{folder} was begun with {name} {begun_with.get(name)}, not {value}: give the same, or "
                             "another --out")


# ---------------------------------------------------------------------------------------------- the measurement

class Measurement:
    """A protocol with everything that it needs; `settings` has all that the results depend on."""

    def __init__(self, args: Namespace, pipeline: Pipeline, judge: Judge | None, inception: Inception | None):
        """The measurement that the flags describe. Writes nothing. Raises ValueError if something is missing."""
        self.args, self.pipeline, self.judge, self.inception = args, pipeline, judge, inception
        self.protocol = PROTOCOLS[args.protocol]
        self.clean = clean_caption if pipeline.cfg.clean_captions else str             # as in training
        self.blurs = self.protocol.blurs if inception else ()
        self.candidates = args.candidates or (self.protocol.candidates if judge else 1)
        if self.candidates > 1 and not judge:
            raise ValueError(f"--candidates {self.candidates}: CLIP chooses one, so give --clip ViT-B-32.pt, or 1")
        self.photos, self.split = read_photos(args.captions, args.images, need_words=self.protocol.generates == "text")
        self.items = choose_items(self.photos, args.num or self.protocol.num, self.protocol.num is not None)
        if inception and self.protocol.generates == "text":
            raise ValueError(f"--inception measures drawings, and {args.protocol} makes none: leave it out")
        if inception and min(len(self.items), len(self.photos)) <= inception.fc.in_features:
            raise ValueError(f"{len(self.items):,} drawings and {len(self.photos):,} images are too few for FID, which "
                             f"needs more than {inception.fc.in_features:,} of each: leave --inception out")
        files = [(photo.file, (args.images / photo.file).stat().st_size) for photo in self.photos]
        inputs = args.captions.read_bytes() + repr(files).encode() + pipeline.bpe.to_text().encode()
        self.settings = {
            "protocol": args.protocol, "num": len(self.items), "candidates": self.candidates, "seed": args.seed,
            "captions, images and merges": hashlib.sha256(inputs).hexdigest()[:16],
            "weights": checkpoint.weight_hash(torch.nn.ModuleList([pipeline.model, pipeline.vqgan])),
            "clip": judge and checkpoint.weight_hash(judge.model),
            "inception": inception and checkpoint.weight_hash(inception),
            "nanomagvlt": nanomagvlt.__version__,
            **{name: value for name, value in as_json(pipeline.cfg).items()
               if name in (*DECODING, "length_positions", "fit")}}
        self.real = chunks(args.out, "real", len(self.photos))
        self.generated = chunks(args.out, "generated", len(self.items))

    def work(self, part: tuple[int, int]) -> None:
        """Computes what is missing of a part: Inception's features of the images, and the generated items."""
        if self.blurs:
            fill(self.real, lambda numbers: self.features(self.read([self.photos[i] for i in numbers])), part)
        fill(self.generated, self.generate, part)

    def read(self, photos: list[CaptionedImage]) -> np.ndarray:
        """uint8 (B, S, S, 3), as the model was trained. Raises ValueError for a broken image."""
        squares, cfg = [], self.pipeline.cfg
        for path in (self.args.images / photo.file for photo in photos):
            try:
                squares.append(square(open_image(path.read_bytes()), cfg.image_size, cfg.fit))
            except BadSample as reason:
                raise ValueError(f"{path}: {reason}") from None
        return np.stack(squares)

    def features(self, images: np.ndarray) -> Columns:
        """Inception's features of images (B, S, S, 3), blurred by each k."""
        return {f"inception-{k}": inception_features(self.inception, images, k).numpy() for k in self.blurs}

    def generate(self, numbers: range) -> Columns:
        """Tokens or captions of these items, with Inception's and CLIP's features."""
        size, parts = max(1, self.pipeline.batch_size // self.candidates), []
        for batch in (numbers[i:i + size] for i in range(0, len(numbers), size)):
            photos, captions = map(list, zip(*(self.items[i] for i in batch)))
            generators = (keyed_generator(self.args.seed, self.args.protocol, i, c)
                          for i, c in product(batch, range(self.candidates)))
            draw_or_write = self.draw if self.protocol.generates == "image" else self.write
            parts.append(draw_or_write(photos, captions, generators))
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        features = self.features(columns.pop("images", None))                  # no images of captions, and no blurs
        return columns | features

    def draw(self, photos: list[CaptionedImage], captions: list[str], generators: Iterator[Generator]) -> Columns:
        """The best of C drawings of each caption: of the whole image, or of its centre."""
        pipeline, known = self.pipeline, ()
        if self.protocol.partial:
            originals = self.read(photos)                                                               # (B, S, S, 3)
            tokens = pipeline.image_to_tokens(originals).repeat_interleave(self.candidates, 0)          # (B C, N)
            known = tokens, edit.centre_positions(pipeline.cfg.grid).expand(len(tokens), -1)
        prompts = [self.clean(text) for text in captions for _ in range(self.candidates)]
        tokens, _ = pipeline.draw_tokens(prompts, generators, *known)                                   # (B C, N)
        images = pipeline.tokens_to_image(tokens)                                                       # (B C, S, S, 3)
        if known:
            images = edit.blend(originals.repeat(self.candidates, 0), images, known[1])
        return self.choose(images, captions, {"tokens": tokens.cpu().numpy(), "images": images})

    def write(self, photos: list[CaptionedImage], captions: list[str], generators: Iterator[Generator]) -> Columns:
        """The best of C captions of each image: the whole caption, or the middle of a given one."""
        pipeline, known = self.pipeline, ()
        images = self.read(photos)                                                                      # (B, S, S, 3)
        image_tokens = pipeline.image_to_tokens(images).repeat_interleave(self.candidates, 0)           # (B C, N)
        if self.protocol.partial:
            words = list(map(self.clean, captions))
            text_tokens, lengths = encode_captions(pipeline.bpe, words, pipeline.cfg.text_length)
            to_fill = edit.centre_words(lengths, pipeline.cfg.text_length)                              # (B, T)
            known = [x.repeat_interleave(self.candidates, 0) for x in (text_tokens, lengths, to_fill)]
        text_tokens, lengths, _ = pipeline.write_tokens(image_tokens, generators, *known)
        written = pipeline.read_texts(text_tokens, lengths, cut=not known)                              # B C strings
        return self.choose(images, written, {"captions": np.array(written)})

    def choose(self, images: np.ndarray, texts: list[str], columns: Columns) -> Columns:
        """The columns (B C, ...) with only each item's best candidate by CLIP, (B, ...), and CLIP's features (B, E).

        The candidates are images or texts, B C rows; the others are B rows. Without CLIP there is one candidate.
        """
        if not self.judge:
            return columns
        features = self.judge.image_features(images), self.judge.text_features(texts)
        rows = max(map(len, features))
        image, text = (x.repeat_interleave(rows // len(x), 0) for x in features)                        # (B C, E) each
        cosines = F.cosine_similarity(image, text).view(-1, self.candidates)                            # (B, C)
        best = cosines.numpy().argmax(1) + np.arange(0, rows, self.candidates)
        columns |= {"clip-image": image.numpy(), "clip-text": text.numpy()}
        return {name: column[best] for name, column in columns.items()}

    def score(self) -> tuple[dict[str, float], list[str]]:
        """All measures, those of captions times 100 as in papers, and remarks on them. All files must exist."""
        scores, notes = self.score_captions() if self.protocol.generates == "text" else ({}, [])
        for k in self.blurs:
            features = [torch.from_numpy(column(files, f"inception-{k}")) for files in (self.generated, self.real)]
            scores[f"FID-{k}" if k else "FID"] = frechet_distance(*features)
        if self.inception:
            features = torch.from_numpy(column(self.generated, "inception-0")).to(self.inception.fc.weight.device)
            scores["IS"], scores["IS deviation"] = inception_score(self.inception.logits(features).cpu())
        elif self.protocol.blurs:
            notes.append("FID and IS need --inception FILE: python data/download.py inception")
        if self.judge:
            scores["CLIP score"] = clip_score(*(torch.from_numpy(column(self.generated, f"clip-{kind}"))
                                                for kind in ("image", "text")))
        return scores, notes

    def score_captions(self) -> tuple[dict[str, float], list[str]]:
        """pycocoevalcap's measures, also by domain where there are domains. Writes captions.json, in COCO's format."""
        captions = dict(zip((photo.id for photo, _ in self.items), column(self.generated, "captions").tolist()))
        rows = [{"image_id": id, "caption": text} for id, text in captions.items()]
        write_json(self.args.out / "captions.json", rows)
        notes = ["METEOR and SPICE are Java programs: pycocoevalcap computes them from captions.json"]
        scores, domains = {}, sorted({photo.domain for photo, _ in self.items})
        for domain in domains if domains == [""] else [*domains, "overall"]:
            references = {photo.id: photo.captions for photo, _ in self.items if domain in (photo.domain, "overall")}
            results = {id: captions[id] for id in references}
            scores |= {f"{domain} {name}".strip(): 100 * value
                       for name, value in score_captions(results, references).items()}
            if len(references) == 1:
                notes.append(f"{domain} CIDEr of one image is always 0, because no word is rarer than another".strip())
        return scores, notes

    def report(self, scores: dict[str, float], notes: list[str]) -> None:
        """Prints the measures and writes result.json; with the paper's results if the protocol is exactly its own."""
        protocol, cfg, paper = self.protocol, self.pipeline.cfg, {}
        steps = cfg.image_steps if protocol.generates == "image" else cfg.text_steps
        if (len(self.photos) == protocol.num_images and self.split == protocol.split
                and len(self.items) == (protocol.num or protocol.num_images) and self.candidates == protocol.candidates
                and cfg.image_size == SIDE and cfg.fit == "crop" and cfg.guidance == 1
                and (cfg.model == "argvlt" or steps == protocol.steps)):
            paper = {name: dict(zip(MODELS, values)) for name, values in protocol.paper.items()}
            notes = [*notes, f"the paper does not say {protocol.unknown}"]
        line = (f"{self.args.protocol}: {len(self.items):,} items of {self.args.captions.name} ({len(self.photos):,} "
                f"images), fit {cfg.fit} to {cfg.image_size} pixels; the best of {self.candidates}; "
                f"{'token by token' if cfg.model == 'argvlt' else f'{steps} steps'}; seed {self.args.seed}")
        print(line)
        for name, value in scores.items():
            beside = ", ".join(f"{model} {number}" for model, number in paper.get(name, {}).items() if number)
            print(f"{name:24}{value:<10.2f}" + (f"paper, zero-shot: {beside}" if beside else ""))
        for note in notes:
            print(note)
        write_json(self.args.out / "result.json", {"protocol": line, "scores": scores, "notes": notes, "paper": paper,
                                                   "settings": self.settings})
        print(f"-> {self.args.out / 'result.json'}")


# ---------------------------------------------------------------------------------------------- the command

def add_flags(parser: Parser) -> None:
    """The flags of `eval.py coco`."""
    group = parser.add_argument_group("for coco (--out is a folder; after a kill the same command continues in it)")
    group.add_argument("--protocol", choices=PROTOCOLS, help="one of the paper's measurements")
    group.add_argument("--captions", type=Path, help="the JSON file of COCO, Karpathy or NoCaps")
    group.add_argument("--images", type=Path, help="the folder of its images")
    group.add_argument("--num", type=positive, help="captions or images (default: the paper's number)")
    group.add_argument("--candidates", type=positive, help="--clip chooses one (default: the paper's number, or 1)")
    group.add_argument("--clip", type=Path, help="OpenAI's ViT-B-32.pt")
    group.add_argument("--inception", type=Path, help="FID's network: python data/download.py inception")
    group.add_argument("--part", type=distributed.parse_part, metavar="K/N", help="do only the K-th of N shares")
    group.add_argument("--bpe", type=Path, default=pretrained.CLIP_BPE, help="CLIP's merges: data/download.py clip-bpe")


def run(args: Namespace) -> None:
    """One protocol, or one share of its work."""
    for flag in ("protocol", "captions", "images", "out"):
        if getattr(args, flag) is None:
            raise ValueError(f"coco needs --{flag}; see --help")
    part, device = distributed.share_of_work(args.part, args.device)
    pipeline = load_pipeline(args.checkpoint or checkpoint.newest(), device, args.bpe)
    pipeline = pipeline.with_settings(**given_settings(args, DECODING))
    judge = load_judge(args.clip, args.bpe, pipeline.device) if args.clip else None
    inception = load_inception(args.inception).to(pipeline.device) if args.inception else None
    measurement = Measurement(args, pipeline, judge, inception)
    claim(args.out, measurement.settings)
    measurement.work(part or (0, 1))
    if part:
        print(f"part {part[0] + 1}/{part[1]} is done; the same command without --part or torchrun scores all parts")
    else:
        measurement.report(*measurement.score())
