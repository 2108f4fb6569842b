"""CLIP: how well an image and a text agree (Radford et al., ICML 2021).

CLIP is two transformers, one over the patches of an image and one over the words of a text. They were trained on 400M
pairs to give an image and its caption features with a large cosine. We use the cosine to choose the best of several
images for a prompt or the best of several captions for an image, and for the CLIP score.

OpenAI publishes CLIP as TorchScript archives (ViT-B-32.pt and others), which contain code beside the tensors. The code
is not run: modules become inert objects, and their attributes give the tensors' names (see io.py).

Shapes: B batch, R image side, P patch side, L tokens, D width, E features. preprocess() gives the normalised pixels.
"""
import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomagvlt.io import Inert, load_strict, one_line_error, read_tensors
from nanomagvlt.tokenizers.bpe import BPE
from nanomagvlt.training.pretrained import count_children, load_merges

HEAD = 64                                                       # the width of a head, in both towers of all models
BATCH = 64                                                      # images or texts at a time
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")  # sizes that OpenAI's files store as tensors


class QuickGELU(nn.Module):
    """An approximation of GELU. The weights were trained with it; the exact GELU gives other features."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width: int, causal: bool):
        super().__init__()
        self.causal = causal
        self.ln_1, self.attn = nn.LayerNorm(width), nn.MultiheadAttention(width, width // HEAD, batch_first=True)
        self.ln_2, self.mlp = nn.LayerNorm(width), nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, 4 * width), gelu=QuickGELU(), c_proj=nn.Linear(4 * width, width)))

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device) if self.causal else None
        h = self.ln_1(x)                                                       # (B, L, D)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask, is_causal=self.causal)[0]
        return x + self.mlp(self.ln_2(x))


def transformer(width: int, layers: int, causal: bool) -> nn.Sequential:
    return nn.Sequential(OrderedDict(resblocks=nn.Sequential(*(Block(width, causal) for _ in range(layers)))))


class ImageTower(nn.Module):
    """A vision transformer. The final state of a class token before the patches gives the image's features."""

    def __init__(self, resolution: int, patch: int, width: int, layers: int, features: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty((resolution // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = transformer(width, layers, causal=False)
        self.proj = nn.Parameter(torch.empty(width, features))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)                # (B, (R/P)^2, D)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        x = torch.cat([first, patches], 1) + self.positional_embedding         # (B, L, D)
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj                               # (B, E)


class CLIP(nn.Module):
    """Both towers without weights; load_clip() gives them with weights."""

    def __init__(self, resolution: int, patch: int, image_width: int, image_layers: int, text_width: int,
                 text_layers: int, context_length: int, vocab_size: int, features: int):
        super().__init__()
        self.resolution, self.context_length, self.vocab_size = resolution, context_length, vocab_size
        self.visual = ImageTower(resolution, patch, image_width, image_layers, features)
        self.token_embedding = nn.Embedding(vocab_size, text_width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, text_width))
        self.transformer = transformer(text_width, text_layers, causal=True)
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.empty(text_width, features))
        self.logit_scale = nn.Parameter(torch.empty(()))

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (B, 3, R, R) -> features (B, E), of any norm."""
        return self.visual(pixels)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Tokens (B, context_length) -> features (B, E), of any norm, from the state at the end token.

        The end token has the highest id. Attention is causal, so the tokens after it have no effect.
        """
        x = self.token_embedding(tokens) + self.positional_embedding           # (B, L, D)
        x = self.ln_final(self.transformer(x))
        ends = tokens.argmax(-1)                                               # (B,)
        return x[torch.arange(len(x), device=x.device), ends] @ self.text_projection               # (B, E)

    def similarity(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Features (A, E) and (B, E) -> cosines (A, B). CLIP's logits are logit_scale.exp() times these."""
        return F.normalize(image_features, dim=-1) @ F.normalize(text_features, dim=-1).T


def preprocess(images: np.ndarray, resolution: int) -> Tensor:
    """Images (B, S, S, 3), uint8 -> normalised pixels (B, 3, R, R), resized as by Pillow in CLIP's own code."""
    pixels = torch.tensor(images).permute(0, 3, 1, 2).float()                  # (B, 3, S, S), 0 to 255
    for size in ((pixels.shape[2], resolution), (resolution, resolution)):     # Pillow rounds after each direction
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).round().clamp(0, 255)
    return (pixels / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def tokenize(bpe: BPE, texts: list[str], context_length: int) -> Tensor:
    """Tokens (B, context_length), int64: the start token, the text, the end token, zeros. Long texts are truncated."""
    tokens = torch.zeros(len(texts), context_length, dtype=torch.long)
    for row, text in zip(tokens, texts):
        ids = [bpe.vocab_size - 2, *bpe.encode(text)[:context_length - 2], bpe.vocab_size - 1]
        row[:len(ids)] = torch.tensor(ids)
    return tokens


def named_tensors(module: Inert, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of an archive's module and of the modules in it, with dotted names.

    Each module gives its attributes only once. So the function ends even if a damaged file has a module in itself.
    """
    attributes, module.state = module.state, {}
    for name, value in attributes.items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, Inert):
            yield from named_tensors(value, f"{prefix}{name}.")


def read_sizes(state: dict[str, Tensor]) -> dict[str, int]:
    """The arguments of CLIP(), from the shapes of its tensors."""
    image_width, _, patch, _ = state["visual.conv1.weight"].shape
    vocab_size, text_width = state["token_embedding.weight"].shape
    return dict(resolution=math.isqrt(len(state["visual.positional_embedding"]) - 1) * patch, patch=patch,
                image_width=image_width, image_layers=count_children(state, "visual.transformer.resblocks."),
                text_width=text_width, text_layers=count_children(state, "transformer.resblocks."),
                context_length=len(state["positional_embedding"]), vocab_size=vocab_size,
                features=state["text_projection"].shape[1])


def load_clip(path: str | Path) -> CLIP:
    """CLIP from one of OpenAI's archives or from a saved state dict: float32, on the CPU, without gradients.

    Raises ValueError, one line, for any other file.
    """
    content = read_tensors(path, "weights of CLIP", inert=("__torch__.",))
    with one_line_error(path, "not weights of CLIP"):
        state = dict(named_tensors(content)) if isinstance(content, Inert) else content
        state = {name: tensor for name, tensor in state.items() if name not in NOT_WEIGHTS}
        with torch.device("meta"):
            model = CLIP(**read_sizes(state))
    return load_strict(model, state, path).requires_grad_(False)


@dataclass
class Judge:
    """CLIP with its tokenizer: images or texts in, features out, on the CPU."""
    model: CLIP
    bpe: BPE

    @torch.inference_mode()
    def image_features(self, images: np.ndarray) -> Tensor:
        """Images (B, S, S, 3), uint8 -> features (B, E)."""
        parts = (preprocess(images[i:i + BATCH], self.model.resolution) for i in range(0, len(images), BATCH))
        return torch.cat([self.model.encode_image(part.to(self.model.logit_scale.device)) for part in parts]).cpu()

    @torch.inference_mode()
    def text_features(self, texts: list[str]) -> Tensor:
        """Texts -> features (B, E)."""
        tokens = tokenize(self.bpe, texts, self.model.context_length).to(self.model.logit_scale.device)
        return torch.cat([self.model.encode_text(part) for part in tokens.split(BATCH)]).cpu()


def load_judge(path: str | Path, merges: str | Path, device: str | torch.device = "cpu") -> Judge:
    """CLIP and its tokenizer. Raises ValueError, one line, if a file is unusable or the two do not fit together."""
    model = load_clip(path).to(device)
    return Judge(model, load_merges(merges, "clip", model.vocab_size))
