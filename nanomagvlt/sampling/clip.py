"""Appendix - CLIP: how well an image and a text go together (Radford et al., ICML 2021).

Two transformers, one over patches and one over words, were taught on 400M pairs to give an image and its own caption
directions that agree, so that the cosine of the two says how well one describes the other. By it we choose the best
of many drawings for a prompt and the best of many captions for an image, and measure CLIP score.

OpenAI publishes CLIP as TorchScript archives, ViT-B-32.pt and others: zip files that carry code beside their
tensors. The code is never run. PyTorch's restricted unpickler reads the tensors; the modules around them become
inert objects, whose attributes give each tensor its name.

Shapes: B batch, R image side, P patch side, L tokens, D width, E features. Pixels are normalised by preprocess().
"""
import io
import math
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomagvlt.tokenizers.bpe import BPE

HEAD = 64                                                 # the width of a head, in both towers of every published size
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
ENTRIES = r"[^/]+/(data\.pkl|data/\d+|version|byteorder)"                       # of an archive; the rest is code
KNOWN_CLASSES = r"__torch__\..*|torch\._utils\._rebuild_tensor_v2|collections\.OrderedDict|torch\.\w+Storage"
JUDGED = 64                                               # images or texts at a time
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")             # numbers that OpenAI keeps as tensors


# ---- the network, its parts named as in OpenAI's files ------------------------------------------------------

class QuickGELU(nn.Module):
    """A cheap GELU. The weights were trained with this one: GELU itself gives other features."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Self-attention with the parameters of nn.MultiheadAttention: query, key and value in one matrix."""

    def __init__(self, width: int, causal: bool):
        super().__init__()
        self.causal = causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)              # (B, L, 3D)
        q, k, v = qkv.unflatten(-1, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)      # (B, heads, L, 64) each
        h = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(h.transpose(1, 2).flatten(2))                     # (B, L, D)


class Block(nn.Module):
    def __init__(self, width: int, causal: bool):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), Attention(width, causal)
        self.ln_2, self.mlp = nn.LayerNorm(width), nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, 4 * width), gelu=QuickGELU(), c_proj=nn.Linear(4 * width, width)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, causal: bool):
        super().__init__()
        self.resblocks = nn.Sequential(*(Block(width, causal) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)


class ImageTower(nn.Module):
    """A vision transformer: a class token before the patches, and its state at the end is the image's feature."""

    def __init__(self, resolution: int, patch: int, width: int, layers: int, features: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty((resolution // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, causal=False)
        self.proj = nn.Parameter(torch.empty(width, features))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)                # (B, (R/P)^2, D)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        x = torch.cat([first, patches], 1) + self.positional_embedding         # (B, L, D)
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj                               # (B, E)


class CLIP(nn.Module):
    """Both towers, without weights: load_clip() gives one with them. Sizes as sizes() reads them off a file."""

    def __init__(self, resolution: int, patch: int, image_width: int, image_layers: int, text_width: int,
                 text_layers: int, context_length: int, vocab_size: int, features: int):
        super().__init__()
        self.resolution, self.context_length, self.vocab_size = resolution, context_length, vocab_size
        self.visual = ImageTower(resolution, patch, image_width, image_layers, features)
        self.token_embedding = nn.Embedding(vocab_size, text_width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, text_width))
        self.transformer = Transformer(text_width, text_layers, causal=True)
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.empty(text_width, features))
        self.logit_scale = nn.Parameter(torch.empty(()))

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (B, 3, R, R) -> features (B, E), of any length."""
        return self.visual(pixels)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Ids (B, context_length) -> features (B, E), of any length: the state at the end token, the highest id.

        No place sees a later one, so what is behind the end token does not matter.
        """
        x = self.token_embedding(tokens) + self.positional_embedding           # (B, L, D)
        x = self.ln_final(self.transformer(x))
        ends = tokens.argmax(-1)                                               # (B)
        return x[torch.arange(len(x), device=x.device), ends] @ self.text_projection

    def similarity(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Features (A, E) and (B, E) -> cosines (A, B), in [-1, 1]. Times logit_scale.exp() they are CLIP's logits."""
        return F.normalize(image_features, dim=-1) @ F.normalize(text_features, dim=-1).T


# ---- what goes in -------------------------------------------------------------------------------------------

def preprocess(images: np.ndarray, resolution: int) -> Tensor:
    """Images (B, S, S, 3), uint8 -> normalised pixels (B, 3, R, R), resized as CLIP's own code lets Pillow resize."""
    pixels = torch.tensor(images).permute(0, 3, 1, 2).float()                  # (B, 3, S, S), 0 to 255
    for size in ((pixels.shape[2], resolution), (resolution, resolution)):     # Pillow rounds after each direction
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).round().clamp(0, 255)
    return (pixels / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def tokenize(bpe: BPE, texts: list[str], context_length: int = 77) -> Tensor:
    """Ids (B, context_length), int64: the start token, the text, the end token, zeros. Long texts are cut before it.

    bpe is CLIP's own, as BPE.load() reads it from CLIP's merges. Raises ValueError for one that cuts words as the
    MAGVLT release does: CLIP would read other words.
    """
    if bpe.words != "clip":
        raise ValueError(f"CLIP reads words cut in its own way, not those of words={bpe.words!r}")
    tokens = torch.zeros(len(texts), context_length, dtype=torch.long)
    for row, text in zip(tokens, texts):
        ids = [bpe.vocab_size - 2, *bpe.encode(text)[:context_length - 2], bpe.vocab_size - 1]
        row[:len(ids)] = torch.tensor(ids)
    return tokens


# ---- loading ------------------------------------------------------------------------------------------------

class Held:
    """Stands for any module of an archive: holds its attributes and does nothing with them."""
    attributes: dict = {}

    def __setstate__(self, state: dict):
        self.attributes = state


def named_tensors(module: Held, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a module and of those in it, by dotted names.

    Each module gives what it holds only once, so that one which holds itself ends like any other.
    """
    attributes, module.attributes = module.attributes, {}
    for name, value in attributes.items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, Held):
            yield from named_tensors(value, f"{prefix}{name}.")


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a TorchScript archive or of a saved state dict. Raises ValueError, one line.

    torch.load() takes a zip that has a constants.pkl, which belongs to the code, for torch.jit's and refuses it. So it
    is given a copy without the code, and only if data.pkl names no class but those that tensors and modules need.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file")
    tensors = io.BytesIO()
    try:
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tensors, "w") as copy:
            entries = {name: archive.getinfo(name) for name in archive.namelist() if re.fullmatch(ENTRIES, name)}
            if sum(entry.file_size for entry in entries.values()) > 2 * Path(path).stat().st_size:
                raise ValueError("it would unpack to far more than itself")
            for name in entries:
                copy.writestr(name, archive.read(name))
            (pickled,) = (archive.read(name) for name in entries if name.endswith("/data.pkl"))
        classes = {name.replace(" ", ".") for code, name, _ in pickletools.genops(pickled) if code.name == "GLOBAL"}
        if foreign := [name for name in sorted(classes) if not re.fullmatch(KNOWN_CLASSES, name)]:
            raise ValueError(f"refused, for it names {foreign[0]}")
        tensors.seek(0)
        with torch.serialization.safe_globals([(Held, name) for name in classes if name.startswith("__torch__.")]):
            content = torch.load(tensors, map_location="cpu", weights_only=True)
        state = dict(named_tensors(content)) if isinstance(content, Held) else content
        if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()):
            raise ValueError("not all of it is tensors with names")
        return state
    except Exception as error:  # a damaged or foreign file fails in any of a dozen ways: in the zip, in the unpickler
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise ValueError(f"{path}: no archive and no state dict, or a damaged one ({reason})") from None


def sizes(state: dict[str, Tensor]) -> dict[str, int]:
    """The arguments of CLIP(), from its tensors. Raises KeyError or ValueError where they are not CLIP's."""
    def layers(tower: str) -> int:
        return len({name.removeprefix(tower).split(".")[0] for name in state if name.startswith(tower)})
    image_width, _, patch, _ = state["visual.conv1.weight"].shape
    vocab_size, text_width = state["token_embedding.weight"].shape
    if not image_width or image_width % HEAD or not text_width or text_width % HEAD or not patch:
        raise ValueError(f"towers {image_width} and {text_width} wide, no multiples of {HEAD}, or patches of {patch}")
    return dict(resolution=math.isqrt(len(state["visual.positional_embedding"]) - 1) * patch, patch=patch,
                image_width=image_width, image_layers=layers("visual.transformer.resblocks."),
                text_width=text_width, text_layers=layers("transformer.resblocks."), vocab_size=vocab_size,
                context_length=len(state["positional_embedding"]), features=state["text_projection"].shape[1])


def load_clip(path: str | Path) -> CLIP:
    """CLIP from one of OpenAI's archives or a saved state dict: float32, on the CPU, in evaluation mode, frozen.

    Every tensor of the file must have its place, and every place its tensor. Raises ValueError, one line that names
    the file, where it is not there, damaged or something else.
    """
    state = {name: tensor for name, tensor in read_state(path).items() if name not in NOT_WEIGHTS}
    try:
        with torch.device("meta"):                                             # nothing is initialised in vain
            model = CLIP(**sizes(state))
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    except KeyError as error:
        raise ValueError(f"{path}: no weights of CLIP: {error.args[0]} is missing") from None
    except (ValueError, IndexError, TypeError, RuntimeError) as error:  # too few dimensions, an odd size, another name
        raise ValueError(f"{path}: no weights of CLIP: {' '.join(str(error).split())[:200]}") from None
    return model.requires_grad_(False).eval()


@dataclass
class Judge:
    """CLIP with the words it knows: pictures and strings in, features out, on the CPU."""
    model: CLIP
    bpe: BPE

    @torch.inference_mode()
    def look(self, images: np.ndarray) -> Tensor:
        """Images (B, S, S, 3), uint8 -> features (B, E)."""
        parts = (preprocess(images[i:i + JUDGED], self.model.resolution) for i in range(0, len(images), JUDGED))
        return torch.cat([self.model.encode_image(part.to(self.model.logit_scale.device)) for part in parts]).cpu()

    @torch.inference_mode()
    def read(self, texts: list[str]) -> Tensor:
        """Texts -> features (B, E)."""
        tokens = tokenize(self.bpe, texts, self.model.context_length).to(self.model.logit_scale.device)
        return torch.cat([self.model.encode_text(part) for part in tokens.split(JUDGED)]).cpu()


def load_judge(path: str | Path, merges: str | Path, device: str | torch.device = "cpu") -> Judge:
    """CLIP and its tokenizer. Raises ValueError, one line, where either cannot be used or they do not go together."""
    if not Path(merges).is_file():
        raise ValueError(f"{merges}: there is no such file; python data/download.py clip-bpe fetches it")
    model, bpe = load_clip(path).to(device), BPE.load(merges)
    if bpe.vocab_size != model.vocab_size:
        raise ValueError(f"{merges} has {bpe.vocab_size} tokens, {path} {model.vocab_size}: give its merges")
    return Judge(model, bpe)
