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
from nanomagvlt.objectives import DTYPE
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
        image_logits = cfg.image_tokens * cfg.codebook_size * (1 if cfg.guidance == 1 else 2)
        return max(1, min(128, 2 ** 27 // max(image_logits, cfg.text_length * cfg.text_vocab)))

    @torch.inference_mode()
    def fill(self, task: str, batch: dict[str, Tensor], to_fill: dict[str, Tensor], sampling: dict[str, SamplingConfig],
             generator: torch.Generator, update_length: bool = False) -> tuple[dict[str, Tensor], Traces]:
        """decoding.generate() or argvlt.generate(), part after part: the batch with its new tokens, and the traces of
        the first part."""
        parts, traces, method = [], {}, argvlt if self.cfg.model == "argvlt" else decoding
        for i in range(0, len(batch["image_tokens"]), self.batch_size):
            part, holes = ({name: x[i:i + self.batch_size].to(self.device) for name, x in of.items()}
                           for of in (batch, to_fill))
            done, steps = method.generate(self.model, task, part, holes, sampling, generator, self.cfg.guidance,
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
            image_tokens, to_fill = blank(self.cfg, len(prompts))
        steps = max(1, min(self.cfg.image_steps, int(to_fill.sum(1).min())))
        text_tokens, lengths = encode_captions(self.bpe, prompts, self.cfg.text_length)
        batch = {"image_tokens": image_tokens, "text_tokens": text_tokens, "text_lengths": lengths}
        done, traces = self.fill("t2i", batch, {"image": to_fill},
                                 {"image": sampling_config(self.cfg, "image", steps=steps)}, generator)
        return done["image_tokens"], traces.get("image", [])

    def write_tokens(self, image_tokens: Tensor, generator: torch.Generator, text_tokens: Tensor | None = None,
                     lengths: Tensor | None = None, to_fill: Tensor | None = None) -> tuple[Tensor, Tensor, list[Step]]:
        """Text tokens (B, T) for image tokens (B, N), their lengths (B,), and the decoding steps of the first batch.

        With text_tokens (B, T), lengths (B,) and to_fill (B, T) bool only these positions are filled. The length of an
        unknown text is predicted; an ARGVLT ends it by itself.
        """
        cfg, is_unknown, is_causal = self.cfg, text_tokens is None, self.cfg.model == "argvlt"
        if is_unknown:
            lengths = torch.cat([torch.full((len(part),), cfg.text_length) if is_causal else
                                 decoding.predict_length(self.model, "i2t", {"image_tokens": part.to(self.device)})
                                 for part in image_tokens.split(self.batch_size)])
            text_tokens, to_fill = blank(cfg, len(image_tokens), lengths)
        batch = {"image_tokens": image_tokens, "text_tokens": text_tokens, "text_lengths": lengths}
        done, traces = self.fill("i2t", batch, {"text": to_fill}, {"text": sampling_config(cfg, "text")}, generator)
        if is_unknown and is_causal:
            lengths = (done["text_tokens"] != self.bpe.end).sum(1).add(1).clamp(max=cfg.text_length)
        return done["text_tokens"], lengths, traces.get("text", [])

    def make_pairs(self, count: int, generator: torch.Generator, image: tuple[Tensor, Tensor] | None = None,
                   text: tuple[Tensor, Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor, Traces]:
        """Images and captions generated together (appendix D): image tokens (B, N), text tokens (B, T), text lengths
        (B,), and the decoding steps of the first batch, by piece.

        A part of an image can be given: tokens (B, N) and to_fill (B, N); or of a text: tokens (B, T), lengths (B,) and
        to_fill (B, T). The length of an unknown text starts at random between 8 and 16, and is updated.
        Raises ValueError for a model that was not trained in it2it.
        """
        cfg = self.cfg
        if "it2it" not in cfg.task_shares:
            raise ValueError("image and text together need a model trained in it2it, as tiny is: see --task-weights")
        image_tokens, holes = image or blank(cfg, count)
        if text:
            text_tokens, lengths, gaps = text
        else:  # the lengths have a generator of their own, so that row 0 does not depend on the number of rows
            start = torch.randint(8, 17, (count,), generator=torch.Generator().manual_seed(generator.initial_seed()))
            lengths = start.clamp(max=cfg.text_length)
            text_tokens, gaps = blank(cfg, count, lengths)
        steps = max(1, min(cfg.text_steps, int(holes.sum(1).min())))  # one K for both
        # The length changes between steps, so an order by position (halton) would keep the wrong positions for the end.
        sampling = {"image": sampling_config(cfg, "image", steps=steps),
                    "text": sampling_config(cfg, "text", steps=steps, order=cfg.pair_text_order)}
        batch = {"image_tokens": image_tokens, "text_tokens": text_tokens, "text_lengths": lengths}
        done, traces = self.fill("it2it", batch, {"image": holes, "text": gaps}, sampling, generator, not text)
        return done["image_tokens"], done["text_tokens"], done["text_lengths"], traces

    def draw(self, prompts: list[str], generator: torch.Generator) -> np.ndarray:
        """A picture for each prompt: uint8 (B, S, S, 3)."""
        return self.tokens_to_image(self.draw_tokens(prompts, generator)[0])

    def caption(self, images: np.ndarray, generator: torch.Generator) -> tuple[list[str], list[int]]:
        """A caption for each image, uint8 (B, S, S, 3), and its length in tokens, end token included."""
        text_tokens, lengths, _ = self.write_tokens(self.image_to_tokens(images), generator)
        return self.read_texts(text_tokens, lengths), lengths.tolist()

    def read_texts(self, text_tokens: Tensor, lengths: Tensor, cut: bool = True) -> list[str]:
        """Text tokens (B, T) of lengths (B,) as strings, cut at their first end token. Without cut, end tokens are only
        left out: later words of the text may have been given."""
        rows = [ids[:length] for ids, length in zip(text_tokens.tolist(), lengths.tolist())]
        if cut:
            rows = [ids[:[*ids, self.bpe.end].index(self.bpe.end)] for ids in rows]
        return [self.bpe.decode(ids) for ids in rows]

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


def load_pipeline(path: str | Path, device: str = "auto", bpe_file: str | Path = pretrained.CLIP_BPE) -> Pipeline:
    """A pipeline from a checkpoint, ours or the authors'. Raises ValueError, one line, if it cannot be used.

    bpe_file holds CLIP's merges, for the authors' files, which do not contain them.
    """
    if pretrained.looks_published(path):
        model, vqgan = pretrained.load_magvlt(path)
        bpe = pretrained.load_merges(bpe_file, "release", model.cfg.text_vocab)
    else:
        model, vqgan, bpe = checkpoint.load_magvlt(path)
    device = pick_device(device)
    # A model trained in half precision samples in it, on a GPU that has it. The VQ-GAN stays in float32: its nearest
    # codes would change.
    dtype = DTYPE[model.cfg.precision] if device.type == "cuda" and not lacks_bf16(model.cfg, device) else torch.float32
    return Pipeline(model.to(device, dtype), vqgan.to(device), bpe, model.cfg)


def lacks_bf16(cfg: Config, device: torch.device) -> bool:
    """Whether cfg.precision is bf16 and the device is a GPU without it (V100, T4), which would emulate it slowly."""
    return (cfg.precision == "bf16" and device.type == "cuda"
            and not torch.cuda.is_bf16_supported(including_emulation=False))


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


def contact_sheet(images: np.ndarray, labels: list[str], columns: int = 4) -> Image.Image:
    """A white sheet of pictures, uint8 (B, S, S, 3), each enlarged to about 160 pixels, with its label below: at most
    12 lines, in which letters beyond ASCII are escaped, because Pillow's font lacks them."""
    scale = max(1, round(160 / images.shape[1]))
    side, margin, font = images.shape[1] * scale, 8, ImageFont.load_default(12)
    lines = [textwrap.wrap(label.encode("ascii", "backslashreplace").decode(), max(8, side // 7), max_lines=12,
                           placeholder=" ...") for label in labels]
    width, height = side + margin, side + 15 * max(map(len, lines)) + margin  # of a picture with its label
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width + margin, rows * height + margin), "white")
    pen = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = margin + i % columns * width, margin + i // columns * height
        sheet.paste(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST), (x, y))
        pen.rectangle((x - 1, y - 1, x + side, y + side), outline="lightgray")
        pen.multiline_text((x, y + side + 2), "\n".join(lines[i]), "black", font, spacing=2)
    return sheet
