"""Appendix - What the paper measures on photographs, a command each: python eval.py coco --protocol t2i ...

  t2i      captions of COCO's validation photographs are drawn: FID and IS (tables 1 and 9)
  inpaint  the centre of these photographs is drawn anew, in view of the caption: FID and IS (table 2)
  i2t      Karpathy's test photographs are captioned: BLEU, CIDEr and the like (tables 3 and 10)
  nocaps   and so are NoCaps' validation photographs, scored by domain (tables 4 and 10)
  infill   the middle half of a caption is hidden, and written anew in view of the photograph (table 5)

A protocol is a numbered list of items, a photograph and a caption each, which chunks.py works off. All chance of an
item follows from the seed, its number, and the number of the candidate.

  begin() --> Run.work(): pictures or captions, and what networks see in them --> Run.score() --> report()

Shapes: B items, C candidates of each, S image side, N image tokens, E CLIP's features.
"""
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanomagvlt.sampling import edit
from nanomagvlt.training import checkpoint
from nanomagvlt.tokenizers.bpe import clean_caption
from nanomagvlt.evaluation.captions import java_metrics, score_captions, tokenize, write_results_json
from nanomagvlt.rng import keyed_generator
from nanomagvlt.evaluation.chunks import Chunks, claim, read, write
from nanomagvlt.sampling.clip import Judge
from nanomagvlt.data.cache import encode_captions
from nanomagvlt.evaluation.fid import Moments, clip_score, frechet_distance, inception_score
from nanomagvlt.io import write_json
from nanomagvlt.sampling.pipeline import Pipeline
from nanomagvlt.evaluation.inception import Inception, inception_features
from nanomagvlt.evaluation.photos import Item, Photo, choose_items, digest, read_photos, read_squares


@dataclass(frozen=True)
class Protocol:
    """A measurement as the paper describes it, and what it found."""
    draws: bool              # pictures are made; else captions
    only_a_part: bool        # the rest of the picture or of the caption is given
    num_photos: int          # in the paper's split
    split: str               # one of Karpathy's; "" where the file is the split
    num: int | None          # items drawn from all captions; None: each photograph with its first caption
    candidates: int          # of which CLIP chooses
    steps: int               # K
    blurs: tuple[int, ...]   # the k of FID-k: 0, 1, 2, 4, 8 have DALL-E and L-Verse
    not_said: str            # what the paper leaves open, and is our choice
    paper: dict[str, tuple]  # of MODELS, by measure


SIDE = 256                                                     # of the paper's images
DOMAINS = ("in-domain", "near-domain", "out-domain")           # NoCaps': how far from what COCO shows
MODELS = ("ARGVLT", "ARGVLT large", "MAGVLT", "MAGVLT large")
PROTOCOLS = {
    "t2i": Protocol(True, False, 40_504, "", 30_000, 32, 10, (0, 1, 2, 4, 8),
                    "which captions it drew, nor which photographs it compared them with: here all of the split's", {
                        "FID": (16.93, 13.01, 12.08, 10.14), "IS": (22.50, 23.75, 22.75, 25.15)}),
    "inpaint": Protocol(True, True, 40_504, "", 30_000, 1, 10, (0,), "how many it painted, of how many candidates", {
        "FID": (5.62, None, 3.17, None), "IS": (29.21, None, 30.79, None)}),
    "i2t": Protocol(False, False, 5_000, "test", None, 64, 12, (), "at what temperature it wrote", {
        "Bleu_4": (10.9, None, 14.6, None), "METEOR": (14.9, None, 19.0, None), "CIDEr": (45.5, 43.6, 60.4, 68.1),
        "SPICE": (11.2, 11.2, 14.3, 15.5)}),
    "nocaps": Protocol(False, False, 4_500, "", None, 64, 12, (), "at what temperature it wrote", {
        "overall CIDEr": (33.4, 34.1, 46.3, 55.8), "overall SPICE": (6.4, 6.1, 8.7, 9.8)}),
    "infill": Protocol(False, True, 5_000, "test", None, 1, 12, (),
                       "which captions it hid, of how many candidates it chose, nor against which it scored", {
                           "Bleu_4": (39.5, None, 42.7, None), "METEOR": (32.2, None, 35.2, None),
                           "CIDEr": (119.8, None, 135.3, None), "SPICE": (23.8, None, 26.3, None)}),
}
# The settings of a checkpoint on which what it makes depends.
DECODING = ("image_", "text_", "argvlt_", "guidance", "clean_captions", "length_positions")


# ---------------------------------------------------------------------------------------------- beginning

def begin(name: str, captions: Path, images: Path, out: Path, pipeline: Pipeline, judge: Judge | None = None,
          inception: Inception | None = None, num: int | None = None, candidates: int | None = None, seed: int = 0,
          split: str | None = None) -> "Run":
    """A run that begins or goes on in the folder `out`; num, candidates and split None are the paper's.

    Raises ValueError, one line, before anything is written, where something is missing, or the folder was begun with
    other settings.
    """
    protocol = PROTOCOLS[name]
    candidates = candidates or (protocol.candidates if judge else 1)
    if candidates > 1 and not judge:
        raise ValueError(f"--candidates {candidates}: CLIP chooses among them, so give --clip ViT-B-32.pt, or 1")
    photos, split = read_photos(captions, images, split)
    items, among = choose_items(photos, num or protocol.num, protocol.num is not None)
    for photo in photos:
        if name == "nocaps" and photo.domain not in DOMAINS:
            raise ValueError(f"{captions}: image {photo.id!r} is of domain {photo.domain!r}; NoCaps' file has "
                             f"{', '.join(DOMAINS)}")
        if not protocol.draws and not all(map(tokenize, photo.captions)):
            raise ValueError(f"{captions}: image {photo.id!r} has a caption without words")
    if inception and not protocol.blurs:
        raise ValueError(f"--inception looks at drawings, and {name} makes none: leave it out")
    if inception and min(len(items), len(photos)) <= inception.fc.in_features:
        raise ValueError(f"{len(items):,} drawings and {len(photos):,} photographs are too few for FID, which wants "
                         f"more than {inception.fc.in_features:,} of each: leave --inception out")
    settings = {
        "protocol": name, "captions": hashlib.sha256(captions.read_bytes()).hexdigest()[:16], "images": digest(photos),
        "split": split, "num": len(items), "candidates": candidates, "seed": seed,
        "weights": checkpoint.weight_hash(torch.nn.ModuleList([pipeline.model, pipeline.vqgan])),
        "bpe": hashlib.sha256(pipeline.bpe.to_text().encode()).hexdigest()[:16],
        "clip": judge and checkpoint.weight_hash(judge.model), "inception": inception and checkpoint.weight_hash(inception),
        **{key: value for key, value in asdict(pipeline.cfg).items() if key.startswith(DECODING)}}
    claim(out, settings)
    what = (f"{len(items):,} of {among:,} {'captions' if protocol.num else 'images'} of {captions.name}"
            f"{split and f', {split}'} ({len(photos):,} images)")
    return Run(name, what, photos, items, pipeline, judge, inception, candidates, seed, out, settings)


@dataclass
class Run:
    """A protocol with all that it takes."""
    name: str
    what: str                # is measured, in words
    photos: list[Photo]
    items: list[Item]
    pipeline: Pipeline
    judge: Judge | None
    inception: Inception | None
    candidates: int
    seed: int
    out: Path
    settings: dict

    def __post_init__(self):
        self.protocol = PROTOCOLS[self.name]
        self.made, self.real = Chunks(self.out, "made", len(self.items)), Chunks(self.out, "real", len(self.photos))
        blurs = self.protocol.blurs if self.inception else ()
        self.references = {k: self.out / f"reference-{k}.pt" for k in blurs}   # the Moments of all photographs

    # ------------------------------------------------------------------------------------------ the work

    def work(self, part: tuple[int, int] | None) -> None:
        """Makes what is missing, of the K-th of N shares or of all: photographs are looked at, items are made."""
        if not all(path.exists() for path in self.references.values()):
            self.real.work(self.see, part)
        self.made.work(self.make, part)

    def see(self, numbers: range, progress: Callable[[int], None]) -> dict[str, Tensor]:
        found = self.features(read_squares([self.photos[i] for i in numbers], self.pipeline.cfg.image_size))
        progress(len(numbers))
        return found

    def features(self, pictures: np.ndarray) -> dict[str, Tensor]:
        """What Inception sees in pictures, blurred by each k."""
        return {f"inception-{k}": inception_features(self.inception, pictures, k) for k in self.references}

    def make(self, numbers: range, progress: Callable[[int], None]) -> dict:
        """The chosen pictures, as tokens, or captions of items, and what CLIP and Inception see in them."""
        size, made = max(1, self.pipeline.batch_size // self.candidates), []
        for start in range(numbers.start, numbers.stop, size):
            group = range(start, min(start + size, numbers.stop))
            made.append((self.draw if self.protocol.draws else self.write)(group))
            progress(len(group))
        columns = {name: [row for part in made for row in part[name]] for name in made[0]}
        pictures = columns.pop("pictures", None)
        found = {} if pictures is None else self.features(np.stack(pictures))
        return found | {name: rows if name == "captions" else torch.stack(rows) for name, rows in columns.items()}

    def draw(self, numbers: range) -> dict:
        """C pictures of each caption, all of it or the centre of the photograph; of them the best."""
        cfg, items, known = self.pipeline.cfg, [self.items[i] for i in numbers], ()
        if self.protocol.only_a_part:
            photos = read_squares([item.photo for item in items], cfg.image_size)
            tokens = self.pipeline.image_to_tokens(photos).repeat_interleave(self.candidates, 0)    # (B C, N)
            known = tokens, edit.centre_positions(cfg.grid).expand(len(tokens), -1)
        prompts = [text for text in self.texts(items) for _ in range(self.candidates)]
        tokens, _ = self.pipeline.draw_tokens(prompts, self.generators(numbers), *known)
        pictures = self.pipeline.tokens_to_image(tokens)                                            # (B C, S, S, 3)
        if known:
            pictures = np.concatenate([edit.blend(*row) for row in zip(
                photos, np.split(pictures, len(items)), known[1].split(self.candidates))])
        best, seen = self.choose(pictures, [item.caption for item in items])
        return {"tokens": tokens.cpu()[best], "pictures": pictures[best], **seen}

    def write(self, numbers: range) -> dict:
        """C captions of each photograph, all of it or the middle of a given one; of them the best."""
        cfg, items, known = self.pipeline.cfg, [self.items[i] for i in numbers], ()
        photos = read_squares([item.photo for item in items], cfg.image_size)
        image_tokens = self.pipeline.image_to_tokens(photos).repeat_interleave(self.candidates, 0)  # (B C, N)
        if self.protocol.only_a_part:
            text_tokens, lengths = encode_captions(self.pipeline.bpe, self.texts(items), cfg.text_length)
            known = [x.repeat_interleave(self.candidates, 0)
                     for x in (text_tokens, lengths, edit.centre_words(lengths, cfg.text_length))]
        text_tokens, lengths, _ = self.pipeline.write_tokens(image_tokens, self.generators(numbers), *known)
        captions = self.pipeline.read_texts(text_tokens, lengths, cut=not known)
        best, seen = self.choose(photos, captions)
        return {"captions": [captions[i] for i in best], **seen}

    def texts(self, items: list[Item]) -> list[str]:
        """The captions as the model has learnt to read them."""
        return [clean_caption(item.caption) if self.pipeline.cfg.clean_captions else item.caption for item in items]

    def generators(self, numbers: range) -> Iterator[torch.Generator]:
        """A torch.Generator for each candidate of each item."""
        return (keyed_generator(self.seed, self.name, i, c) for i, c in product(numbers, range(self.candidates)))

    def choose(self, pictures: np.ndarray, texts: list[str]) -> tuple[list[int], dict[str, Tensor]]:
        """Which candidate of each item CLIP finds best, and its features (B, E). Of pictures and texts the candidates
        are B C, the others B; without CLIP there is one candidate."""
        if not self.judge:
            return list(range(len(pictures))), {}
        seen, read = self.judge.look(pictures), self.judge.read(texts)
        rows = max(len(seen), len(read))
        seen, read = (x.repeat_interleave(rows // len(x), 0) for x in (seen, read))                  # (B C, E)
        cosines = F.cosine_similarity(seen, read).view(-1, self.candidates).numpy()                  # (B, C)
        best = (cosines.argmax(1) + np.arange(0, rows, self.candidates)).tolist()
        return best, {"seen": seen[best], "read": read[best]}

    # ------------------------------------------------------------------------------------------ the result

    def score(self) -> dict[str, float]:
        """All measures, those of captions times 100, as papers give them. All must be made."""
        scores = {}
        for k, path in self.references.items():
            if not path.exists():
                write(path, moments(self.real.column(f"inception-{k}")).to_dict())
            drawn, real = moments(self.made.column(f"inception-{k}")), Moments.from_dict(read(path))
            scores[f"FID-{k}" if k else "FID"] = frechet_distance(drawn, real)
        for path in self.real.paths():                                         # all that is needed of them is kept now
            path.unlink(missing_ok=True)
        if self.inception:
            features = torch.stack(self.made.column("inception-0")).to(self.inception.fc.weight.device)
            scores["IS"], scores["IS deviation"] = inception_score(self.inception.logits(features).cpu())
        if self.judge:
            scores["CLIP score"] = clip_score(*(torch.stack(self.made.column(name)) for name in ("seen", "read")))
        return scores if self.protocol.draws else scores | self.score_captions()

    def score_captions(self) -> dict[str, float]:
        """By pycocoevalcap's measures and names, each domain by itself; the captions also go into captions.json."""
        written = {item.photo.id: text for item, text in zip(self.items, self.made.column("captions"))}
        write_results_json(self.out / "captions.json", written)
        scores, notes = {}, {}
        for domain in (*DOMAINS, "overall") if self.name == "nocaps" else ("",):
            references = {item.photo.id: item.photo.captions for item in self.items
                          if domain not in DOMAINS or item.photo.domain == domain}
            if references:
                results = {photo: written[photo] for photo in references}
                java, notes[domain] = java_metrics(results, references)
                scores |= {f"{domain} {name}".strip(): 100 * value
                           for name, value in (score_captions(results, references) | java).items()}
        for note in filter(None, dict.fromkeys(notes.values())):
            print(note)
        return scores


def moments(features: list[Tensor]) -> Moments:
    seen = Moments()
    seen.update(torch.stack(features))
    return seen


def report(run: Run, scores: dict[str, float]) -> None:
    """Prints the protocol and its measures, and writes them to result.json. The paper's stand beside them only where
    all that the paper says of its own holds."""
    protocol, cfg = run.protocol, run.pipeline.cfg
    steps = cfg.image_steps if protocol.draws else cfg.text_steps
    is_the_papers = (
        len(run.photos) == protocol.num_photos and run.settings["split"] == protocol.split
        and len(run.items) == (protocol.num or protocol.num_photos) and run.candidates == protocol.candidates
        and cfg.image_size == SIDE and cfg.guidance == 1 and (cfg.model == "argvlt" or steps == protocol.steps))
    paper = {name: dict(zip(MODELS, values)) for name, values in protocol.paper.items()} if is_the_papers else {}
    line = (f"{run.name}: {run.what}, shorter side resized to {cfg.image_size}, centre cropped; {run.candidates} "
            f"candidate{'s, CLIP chooses' if run.candidates > 1 else ''}; "
            f"{'token by token' if cfg.model == 'argvlt' else f'{steps} steps'}; seed {run.seed}; "
            f"weights {run.settings['weights']}; code {', '.join(run.made.code())}")
    print(line)
    for name, value in scores.items():
        beside = ", ".join(f"{model} {number}" for model, number in paper.get(name, {}).items() if number)
        print(f"{name:24}{value:<10.2f}" + (f"the paper's, zero-shot: {beside}" if beside else ""))
    if paper and protocol.not_said:
        print(f"The paper does not say {protocol.not_said}.")
    if protocol.blurs and not run.inception:
        print("No FID and no IS: they want --inception FILE, which `python data/download.py inception` fetches")
    if not run.judge:
        print("No CLIP score, and no choice among candidates: they want --clip ViT-B-32.pt, which OpenAI publishes")
    write_json(run.out / "result.json", {"protocol": line, "scores": scores, "paper": paper, "settings": run.settings})
    print(f"-> {run.out / 'result.json'}")
