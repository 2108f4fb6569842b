"""From strings and pictures to pictures and strings: the transformer with its two tokenizers, in batches.

A task is given tokens, and a mask of the positions to fill. draw() and caption() fill a whole image or text; with
tokens and `to_fill` a part is filled: inpainting, infilling (edit.py makes such masks).

Shapes: B batch, S image side, N image tokens on G x G, T text tokens.
"""
import dataclasses
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from nanomagvlt import argvlt, decoding
from nanomagvlt.config import Config
from nanomagvlt.data.cache import encode_captions, to_images, to_pixels
from nanomagvlt.decoding import SamplingConfig, Step, blank, sampling_config
from nanomagvlt.model import MAGVLT
from nanomagvlt.sequence import TASKS
from nanomagvlt.tokenizers.bpe import BPE
from nanomagvlt.tokenizers.vqgan import VQGAN
from nanomagvlt.training import checkpoint, pretrained

Traces = dict[str, list[Step]]


@dataclass
class Pipeline:
    """A trained transformer with its two tokenizers. Its results are a function of the torch.Generator it gets.

    draw_tokens() and write_tokens() also take an iterator of generators, one for each row: see rng.random_rows().
    """
    model: MAGVLT
    vqgan: VQGAN
    bpe: BPE
    cfg: Config          # the decoding settings are read from here, not from model.cfg

    def with_settings(self, **settings) -> "Pipeline":
        """The same weights with other decoding settings (fields of Config): image_steps=4, say. Raises ValueError."""
        of_steps = [name for name in settings if name.endswith(("steps", "order", "schedule", "noise"))]
        if of_steps and self.cfg.model == "argvlt":
            raise ValueError(f"an ARGVLT generates one token after the other, and has no {of_steps[0]}")
        return dataclasses.replace(self, cfg=dataclasses.replace(self.cfg, **settings).check())

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def batch_size(self) -> int:
        """Samples in one batch: at most 128, and at most 512 MiB of logits of one modality."""
        cfg = self.cfg
        logits = max(cfg.image_tokens * cfg.codebook_size * (1 if cfg.guidance == 1 else 2),
                     cfg.text_length * cfg.text_vocab)
        return max(1, min(128, 2 ** 27 // logits))

    @torch.inference_mode()
    def fill(self, task: str, batch: dict[str, Tensor], to_fill: dict[str, Tensor], sampling: dict[str, SamplingConfig],
             generator: torch.Generator, update_length: bool = False) -> tuple[dict[str, Tensor], Traces]:
        """decoding.generate() or argvlt.generate(), batch after batch: the batch with its new tokens, and the traces of
        the first batch. The texts to generate get their predicted length where the batch has none."""
        parts, traces, cfg = [], {}, self.cfg
        method, text = argvlt if cfg.model == "argvlt" else decoding, TASKS[task].length_of
        for i in range(0, len(next(iter(batch.values()))), self.batch_size):
            part, holes = ({name: x[i:i + self.batch_size].to(self.device) for name, x in of.items()}
                           for of in (batch, to_fill))
            if text and f"{text}_lengths" not in part:  # an unknown text; ARGVLT ends it by itself
                rows = len(next(iter(part.values())))
                lengths = (torch.full((rows,), cfg.text_length, device=self.device) if cfg.model == "argvlt" else
                           decoding.predict_length(self.model, task, part))
                part[f"{text}_tokens"], holes[text] = blank(cfg, "text", rows, lengths, self.device)
                part[f"{text}_lengths"] = lengths
            done, steps = method.generate(self.model, task, part, holes, sampling, generator, cfg.guidance,
                                          update_length)
            parts.append(done)
            traces = traces or steps
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, traces

    def draw_tokens(self, prompts: list[str], generator: torch.Generator, image_tokens: Tensor | None = None,
                    to_fill: Tensor | None = None) -> tuple[Tensor, list[Step]]:
        """Image tokens (B, N) for each prompt, and the decoding steps of the first batch.

        With image_tokens (B, N) and to_fill (B, N) bool only these positions are filled, in at most as many steps.
        """
        if image_tokens is None:
            image_tokens, to_fill = blank(self.cfg, "image", len(prompts))
        steps = max(1, min(self.cfg.image_steps, int(to_fill.sum(1).min())))
        text_tokens, lengths = encode_captions(self.bpe, prompts, self.cfg.text_length)
        batch = {"image_tokens": image_tokens, "text_tokens": text_tokens, "text_lengths": lengths}
        done, traces = self.fill("t2i", batch, {"image": to_fill},
                                 {"image": sampling_config(self.cfg, "image", steps=steps)}, generator)
        return done["image_tokens"], traces.get("image", [])

    def write_tokens(self, image_tokens: Tensor, generator: torch.Generator, text_tokens: Tensor | None = None,
                     lengths: Tensor | None = None, to_fill: Tensor | None = None) -> tuple[Tensor, Tensor, list[Step]]:
        """Text tokens (B, T) for image tokens (B, N), their lengths (B,), and the decoding steps of the first batch.

        With text_tokens (B, T), lengths (B,) and to_fill (B, T) bool only these positions are filled.
        """
        batch, holes = {"image_tokens": image_tokens}, {}
        if text_tokens is not None:
            batch, holes = {**batch, "text_tokens": text_tokens, "text_lengths": lengths}, {"text": to_fill}
        done, traces = self.fill("i2t", batch, holes, {"text": sampling_config(self.cfg, "text")}, generator)
        if text_tokens is None and self.cfg.model == "argvlt":  # its text is as long as it wrote
            lengths = (done["text_tokens"] != self.bpe.end).sum(1).add(1).clamp(max=self.cfg.text_length)
        return done["text_tokens"], done["text_lengths"] if lengths is None else lengths, traces.get("text", [])

    def make_pairs(self, count: int, generator: torch.Generator, image: tuple[Tensor, Tensor] | None = None,
                   text: tuple[Tensor, Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor, Traces]:
        """Images and captions generated together (appendix D): image tokens (B, N), text tokens (B, T), text lengths
        (B,), and the decoding steps of the first batch, by piece.

        A part of an image can be given: tokens (B, N) and to_fill (B, N); or of a text: tokens (B, T), lengths (B,) and
        to_fill (B, T). The length of an unknown text starts at random between 8 and 16, and is updated.
        Raises ValueError for a model that was not trained in it2it.
        """
        cfg, is_unknown = self.cfg, text is None
        if "it2it" not in cfg.tasks:
            raise ValueError("image and text together need a model trained in it2it, as tiny is: see --task-weights")
        if is_unknown:  # the lengths have a generator of their own: so row 0 does not depend on the number of rows
            start = torch.randint(8, 17, (count,), generator=torch.Generator().manual_seed(generator.initial_seed()))
            lengths = start.clamp(max=cfg.text_length)
            words, gaps = blank(cfg, "text", count, lengths)
            text = words, lengths, gaps
        image_tokens, holes = image or blank(cfg, "image", count)
        text_tokens, lengths, gaps = text
        steps = max(1, min(cfg.text_steps, int(holes.sum(1).min())))  # one K for both
        # The length changes between steps, so an order by position (halton) would keep the wrong positions for the end.
        sampling = {"image": sampling_config(cfg, "image", steps=steps),
                    "text": sampling_config(cfg, "text", steps=steps, order=cfg.pair_text_order)}
        batch = {"image_tokens": image_tokens, "text_tokens": text_tokens, "text_lengths": lengths}
        done, traces = self.fill("it2it", batch, {"image": holes, "text": gaps}, sampling, generator, is_unknown)
        return done["image_tokens"], done["text_tokens"], done["text_lengths"], traces

    # ------------------------------------------------------------------------------------------ strings and pictures

    def draw(self, prompts: list[str], generator: torch.Generator) -> np.ndarray:
        """A picture for each prompt: uint8 (B, S, S, 3)."""
        return self.tokens_to_image(self.draw_tokens(prompts, generator)[0])

    def caption(self, images: np.ndarray, generator: torch.Generator) -> tuple[list[str], list[int]]:
        """A caption for each image, uint8 (B, S, S, 3), and its length in tokens, end token included."""
        text_tokens, lengths, _ = self.write_tokens(self.image_to_tokens(images), generator)
        return self.read_texts(text_tokens, lengths), lengths.tolist()

    def read_texts(self, text_tokens: Tensor, lengths: Tensor, cut: bool = True) -> list[str]:
        """Text tokens (B, T) of lengths (B,) as strings, cut at their first end token. Without cut, for texts in which
        later words were given, end tokens are left out instead."""
        rows = [row[:n] for row, n in zip(text_tokens.tolist(), lengths.tolist())]
        if cut:
            rows = [ids[:ids.index(self.bpe.end)] if self.bpe.end in ids else ids for ids in rows]
        return [self.bpe.decode([i for i in ids if i != self.bpe.end]) for ids in rows]

    def caption_lengths(self, captions: list[str]) -> list[int]:
        """The number of text tokens of each caption, its end token included."""
        return encode_captions(self.bpe, captions, self.cfg.text_length)[1].tolist()

    @torch.inference_mode()
    def image_to_tokens(self, images: np.ndarray) -> Tensor:
        """uint8 (B, S, S, 3) -> image tokens (B, N)."""
        return torch.cat([self.vqgan.encode(to_pixels(images[i:i + self.batch_size]).to(self.device))
                          for i in range(0, len(images), self.batch_size)])

    @torch.inference_mode()
    def tokens_to_image(self, image_tokens: Tensor) -> np.ndarray:
        """Image tokens (B, N) -> uint8 (B, S, S, 3)."""
        return np.concatenate([to_images(self.vqgan.decode(tokens.to(self.device)))
                               for tokens in image_tokens.split(self.batch_size)])


def load_pipeline(path: str | Path, device: str = "auto", bpe_file: str | Path = pretrained.CLIP_BPE, heads: int = 0,
                  sha256: str = "") -> Pipeline:
    """A pipeline from a checkpoint, ours or the authors'. Raises ValueError, one line, if it cannot be used.

    sha256 is the digest that the file must have. bpe_file (CLIP's merges) and heads (0: width / 128) are for the
    authors' files, which do not contain them.
    """
    pretrained.check_digest(path, sha256)  # before anything in the file is read
    if pretrained.looks_published(path):
        model, vqgan = pretrained.load_magvlt(path, heads)
        bpe = pretrained.release_bpe(bpe_file, model.cfg)
    else:
        model, vqgan, bpe = checkpoint.load_magvlt(path)
    device = pick_device(device)
    # A model trained in bfloat16 samples in it, on a GPU. The VQ-GAN stays in float32: its nearest codes would change.
    dtype = torch.bfloat16 if model.cfg.precision == "bf16" and device.type == "cuda" else torch.float32
    return Pipeline(model.to(device, dtype), vqgan.to(device), bpe, model.cfg)


def pick_device(name: str) -> torch.device:
    """The device of that name; auto is CUDA if there is one, or else the CPU. Raises ValueError for one that is absent.

    Convolutions use full float32 on CUDA: in TF32, PyTorch's default, an image's nearest codes can differ. Attention
    does not use cuDNN: some versions of PyTorch prefer it on the newest GPUs, where with masks its gradients were wrong
    for some lengths, and so was its dropout. (Apple's MPS has no float64, which counting positions needs.)
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: give auto, cpu, cuda or cuda:1")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # a build of PyTorch without CUDA raises AssertionError
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None


def contact_sheet(images: np.ndarray, labels: list[str], columns: int = 4, side: int = 160) -> Image.Image:
    """A white sheet of pictures, uint8 (B, S, S, 3), each enlarged to at least `side` pixels, with its label below."""
    scale = max(1, round(side / images.shape[1]))
    side, margin, font = images.shape[1] * scale, 8, ImageFont.load_default(12)
    lines = [textwrap.wrap(label, max(8, side // 7)) for label in labels]
    label_height = 15 * max((len(text) for text in lines), default=0)
    rows = -(-len(images) // columns)
    width, height = columns * (side + margin) + margin, rows * (side + label_height + margin) + margin
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = margin + i % columns * (side + margin), margin + i // columns * (side + label_height + margin)
        sheet.paste(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST), (x, y))
        pen.rectangle((x - 1, y - 1, x + side, y + side), outline="lightgray")
        pen.multiline_text((x, y + side + 2), "\n".join(lines[i]), "black", font, spacing=2)
    return sheet
