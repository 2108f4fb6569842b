"""Appendix - Strings and pictures in, pictures and strings out: bpe + decode + vqgan, in batches.

A task is a canvas: what is known of an image or of a text, and what is to be filled. draw() and caption() fill all of
it; with tokens and to_fill they fill a part: inpainting, infilling.

Also the contact sheets on which pictures and captions are looked at.
Shapes: B batch, S image side, N image tokens on G x G, T text tokens.
"""
import dataclasses
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from nanomagvlt import argvlt, decoding
from nanomagvlt.training import checkpoint, pretrained
from nanomagvlt.tokenizers.bpe import BPE
from nanomagvlt.config import Config
from nanomagvlt.data.cache import encode_captions, to_images, to_pixels
from nanomagvlt.decoding import DecodeState, Step
from nanomagvlt.model import MAGVLT
from nanomagvlt.tokenizers.vqgan import VQGAN


@dataclass
class Pipeline:
    """A trained MAGVLT with its two tokenizers. Everything it makes follows from the torch.Generator it is given.

    draw_tokens() and write_tokens() take an iterator of generators as well, one for each row: chance.random_rows().
    """
    model: MAGVLT
    vqgan: VQGAN
    bpe: BPE
    cfg: Config          # its decoding settings are what counts here

    def with_settings(self, **settings) -> "Pipeline":
        """The same weights with other decoding settings, fields of Config: image_steps=4, say. Raises ValueError."""
        return dataclasses.replace(self, cfg=dataclasses.replace(self.cfg, **settings).check())

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def batch_size(self) -> int:
        """How many are made at once: at most 128, and no more than keeps a modality's logits below 512 MiB."""
        logits = max(self.cfg.image_tokens * self.cfg.codebook_size * (1 if self.cfg.guidance == 1 else 2),
                     self.cfg.text_length * self.cfg.text_vocab)
        return max(1, min(128, 2 ** 27 // logits))

    def draw(self, prompts: list[str], generator: torch.Generator) -> np.ndarray:
        """One picture for each prompt: uint8 (B, S, S, 3)."""
        return self.tokens_to_image(self.draw_tokens(prompts, generator)[0])

    @torch.inference_mode()
    def draw_tokens(self, prompts: list[str], generator: torch.Generator, image_tokens: torch.Tensor | None = None,
                    to_fill: torch.Tensor | None = None) -> tuple[torch.Tensor, list[Step]]:
        """Image tokens (B, N) for each prompt, and the steps of the first batch.

        With image_tokens (B, N) and to_fill (B, N) bool only the places to fill are made anew, in no more steps than
        there are such places.
        """
        drawn, trace, cfg = [], [], self.cfg
        if image_tokens is None:
            image_tokens, to_fill = decoding.blank_image(cfg, len(prompts))
        recipe = decoding.image_recipe(cfg)
        recipe = dataclasses.replace(recipe, steps=max(1, min(recipe.steps, int(to_fill.sum(1).min()))))
        for i in range(0, len(prompts), self.batch_size):
            rows = slice(i, i + self.batch_size)
            text_tokens, lengths = (x.to(self.device)
                                    for x in encode_captions(self.bpe, prompts[rows], cfg.text_length))
            known, fill = image_tokens[rows].to(self.device), to_fill[rows].to(self.device)
            if cfg.model == "argvlt":
                done, steps = argvlt.generate(self.model, "t2i", known, text_tokens, lengths, fill, generator,
                                              cfg.argvlt_temperature, cfg.image_top_k), []
            else:
                done, steps = decoding.draw_image(self.model, text_tokens, lengths, generator,
                                                DecodeState(known, fill, recipe), cfg.guidance)
            drawn.append(done)
            trace = trace or steps
        return torch.cat(drawn), trace

    def caption(self, images: np.ndarray, generator: torch.Generator) -> tuple[list[str], list[int]]:
        """A caption for each image, uint8 (B, S, S, 3), and its length in tokens, end token included."""
        text_tokens, lengths, _ = self.write_tokens(self.image_to_tokens(images), generator)
        return self.read_texts(text_tokens, lengths), lengths.tolist()

    @torch.inference_mode()
    def write_tokens(self, image_tokens: torch.Tensor, generator: torch.Generator,
                     text_tokens: torch.Tensor | None = None, lengths: torch.Tensor | None = None,
                     to_fill: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, list[Step]]:
        """Text tokens (B, T) for image tokens (B, N), their lengths (B,), and the steps of the first batch.

        With text_tokens (B, T), lengths (B,) and to_fill (B, T) bool only the places to fill are written.
        """
        written, all_lengths, trace, cfg = [], [], [], self.cfg
        for i in range(0, len(image_tokens), self.batch_size):
            rows = slice(i, i + self.batch_size)
            image = image_tokens[rows].to(self.device)
            if text_tokens is not None:
                n, known, fill = (x[rows].to(self.device) for x in (lengths, text_tokens, to_fill))
            else:  # of which nothing is known: an ARGVLT says itself where it ends, a MAGVLT has guessed it before
                n = (torch.full_like(image[:, 0], cfg.text_length) if cfg.model == "argvlt" else
                     decoding.predict_length(self.model, image, torch.zeros_like(image, dtype=torch.bool)))
                known, fill = decoding.blank_text(cfg, n)
            if cfg.model == "argvlt":
                done, steps = argvlt.generate(self.model, "i2t", image, known, n, fill, generator,
                                              cfg.argvlt_temperature, cfg.text_top_k), []
                if text_tokens is None:  # its length is where it ended
                    n = (done != self.bpe.end).sum(1).add(1).clamp(max=cfg.text_length)
            else:
                canvas = DecodeState(known, fill, decoding.text_recipe(cfg))
                done, _, steps = decoding.write_text(self.model, image, generator, n, canvas)
            written.append(done)
            all_lengths.append(n)
            trace = trace or steps
        return torch.cat(written), torch.cat(all_lengths), trace

    @torch.inference_mode()
    def make_pairs(self, count: int, generator: torch.Generator, image: tuple[torch.Tensor, torch.Tensor] | None = None,
                   text: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
                   ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[DecodeState]]:
        """Images and their captions at once (appendix D): image tokens (B, N), text tokens (B, T), text lengths (B,),
        and the two canvases of the first batch.

        Of an image may be known: tokens (B, N), and where to fill (B, N); of a text: tokens (B, T), lengths (B,), where
        to fill (B, T). The length of a text of which nothing is known starts between 8 and 16 at random.
        Raises ValueError for a model that was not trained in it2it.
        """
        cfg, made, first = self.cfg, [], []
        if not cfg.task_weights[2]:
            raise ValueError("image and text together want a model that was trained in it2it, as tiny is: the last of "
                             "--task-weights must not be 0")
        image = image or decoding.blank_image(cfg, count)
        is_known = text is not None
        if not is_known:
            # With a generator of their own: else row 0 would depend on how many rows there are.
            for_lengths = torch.Generator().manual_seed(generator.initial_seed())
            lengths = torch.randint(8, 17, (count,), generator=for_lengths).clamp(max=cfg.text_length)
            words, to_fill = decoding.blank_text(cfg, lengths)
            text = words, lengths, to_fill
        steps = max(1, min(cfg.text_steps, int(image[1].sum(1).min())))  # one K for both
        # A text whose length changes on the way wants an order of its own: one by place ends with the wrong places.
        recipes = [dataclasses.replace(decoding.image_recipe(cfg), steps=steps),
                   dataclasses.replace(decoding.text_recipe(cfg), steps=steps, order=cfg.pair_text_order)]
        for i in range(0, count, self.batch_size):
            image_tokens, holes, words, lengths, gaps = (x[i:i + self.batch_size].to(self.device)
                                                         for x in (*image, *text))
            canvases = [DecodeState(image_tokens, holes, recipes[0]), DecodeState(words, gaps, recipes[1])]
            made.append(decoding.draw_pair(self.model, *canvases, lengths, generator, keep_length=is_known))
            first = first or canvases
        return *map(torch.cat, zip(*made)), first

    def read_texts(self, text_tokens: torch.Tensor, lengths: torch.Tensor, cut: bool = True) -> list[str]:
        """Text tokens (B, T) of lengths (B,) as strings, cut at their first end token; or else, where words behind it
        were given, without any end token."""
        rows = [row[:n] for row, n in zip(text_tokens.tolist(), lengths.tolist())]
        if cut:
            rows = [ids[:ids.index(self.bpe.end)] if self.bpe.end in ids else ids for ids in rows]
        return [self.bpe.decode([i for i in ids if i != self.bpe.end]) for ids in rows]

    def caption_lengths(self, captions: list[str]) -> list[int]:
        """How many text tokens each caption has, its end token included."""
        return encode_captions(self.bpe, captions, self.cfg.text_length)[1].tolist()

    @torch.inference_mode()
    def image_to_tokens(self, images: np.ndarray) -> torch.Tensor:
        """uint8 (B, S, S, 3) -> image tokens (B, N)."""
        return torch.cat([self.vqgan.encode(to_pixels(images[i:i + self.batch_size]).to(self.device))
                          for i in range(0, len(images), self.batch_size)])

    @torch.inference_mode()
    def tokens_to_image(self, image_tokens: torch.Tensor) -> np.ndarray:
        """Image tokens (B, N) -> uint8 (B, S, S, 3)."""
        return np.concatenate([to_images(self.vqgan.decode(tokens.to(self.device)))
                               for tokens in image_tokens.split(self.batch_size)])


def load_pipeline(path: str | Path, device: str = "auto", bpe_file: str | Path = pretrained.CLIP_BPE, heads: int = 0,
                   sha256: str = "") -> Pipeline:
    """A trained checkpoint, ours or the authors', ready to draw and caption.

    sha256 is the digest to insist on. bpe_file and heads matter to the authors' files alone, which do not say them:
    CLIP's merges, the number of heads (0: width / 128). Raises ValueError with one line where it cannot be used.
    """
    pretrained.check_digest(path, sha256)  # before anything in the file is looked at
    if pretrained.looks_published(path):
        model, vqgan = pretrained.load_magvlt(path, heads)
        bpe = pretrained.release_bpe(bpe_file, model.cfg)
    else:
        model, vqgan, bpe = checkpoint.load_magvlt(path)
    device = pick_device(device)
    # What was trained in bfloat16 draws in it, on a GPU; the VQ-GAN stays as it is, since a code is soon another.
    dtype = torch.bfloat16 if model.cfg.precision == "bf16" and device.type == "cuda" else torch.float32
    return Pipeline(model.to(device, dtype), vqgan.to(device), bpe, model.cfg)


def pick_device(name: str) -> torch.device:
    """auto: CUDA, or else the CPU. Raises ValueError for a device that is not there.

    On CUDA convolutions are set to full float32: in TF32, PyTorch's default, an image's nearest codes may be others.
    And attention is kept from cuDNN, which some versions of PyTorch prefer on the newest GPUs: with masks its gradients
    have been wrong for some lengths, and so has its dropout. (Apple's MPS has no float64, which counting places wants.)
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: give auto, cpu, cuda or cuda:1")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # the latter is how PyTorch says that it was built without CUDA
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None


def contact_sheet(images: np.ndarray, labels: list[str], columns: int = 4, side: int = 160) -> Image.Image:
    """A white sheet of pictures, uint8 (B, S, S, 3), each enlarged to at least `side` pixels, its label beneath."""
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
