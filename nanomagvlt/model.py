"""Chapter 3 - The transformer: hidden tokens in, a guess for every one of them out.

A plain pre-LayerNorm transformer that looks both ways (section 3.1; sizes in table 8). What is particular to MAGVLT:
one token table for both modalities, tied to the output layer; images scored over image ids only, texts over text ids
only; and a linear layer on BOT's last state that guesses how long the caption is (section 3.2).

The same transformer, causal, is ARGVLT (chapter 9): then a place sees what stands up to it, and can be fed place by
place, the keys and values of what has been read being kept.

Shapes: B batch, L sequence, D width, H heads, N image places, T text places, V vocabulary.
Read on in objectives.py, which trains it, and decode.py, which draws with it.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomagvlt.config import Config
from nanomagvlt.sequence import SPECIAL_TOKENS, Layout, Sequence


Cache = list[tuple[Tensor, Tensor]]  # keys and values (B, H, L, D/H) of each block


class Attention(nn.Module):
    """Multi-head attention over all that may be looked at, less in BOT's row: softmax(Q K^T / sqrt(head size)) V."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.heads, self.dropout, self.is_causal = cfg.heads, cfg.dropout, cfg.model == "argvlt"
        self.qkv = nn.Linear(cfg.width, 3 * cfg.width)
        self.proj = nn.Linear(cfg.width, cfg.width)

    def forward(self, x: Tensor, may_attend: Tensor, where: Layout, places: Tensor | None = None,
                cache: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x (B, L, D), may_attend (B, 1, 1 or L, keys) bool -> (B, L, D).

        With a cache, keys and values (B, H, L, D/H) of the whole sequence, x holds only some `places` (L',) of it:
        theirs are written into the cache, and x attends to all of it that it may.
        """
        b, l, d = x.shape
        q, k, v = self.qkv(x).view(b, l, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)  # (B, H, L, D/H) each
        dropout = self.dropout if self.training else 0.0
        if cache is not None:  # all of it is looked at, room for what comes later included: one shape for every step
            k, v = cache[0].index_copy_(2, places, k), cache[1].index_copy_(2, places, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=may_attend, dropout_p=dropout)
        if not (self.is_causal or where.bot_sees_all):
            # One row of L sees less than the others. A (B, L, L) mask for its sake would cost L times the memory,
            # so BOT's row is computed again over what stands up to BOT, where there is no padding, and put in place.
            seen = slice(0, where.bot + 1)
            bot = F.scaled_dot_product_attention(q[:, :, where.bot:where.bot + 1], k[:, :, seen], v[:, :, seen],
                                                 dropout_p=dropout)                              # (B, H, 1, D/H)
            y = torch.cat([y[:, :, :where.bot], bot, y[:, :, where.bot + 1:]], dim=2)
        return self.proj(y.transpose(1, 2).reshape(b, l, d))                                     # (B, L, D)


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.width)
        self.attention = Attention(cfg)
        self.norm2 = nn.LayerNorm(cfg.width)
        self.mlp = nn.Sequential(nn.Linear(cfg.width, 4 * cfg.width), nn.GELU(), nn.Linear(4 * cfg.width, cfg.width))
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: Tensor, may_attend: Tensor, where: Layout, places: Tensor | None = None,
                cache: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), may_attend, where, places, cache))
        return x + self.dropout(self.mlp(self.norm2(x)))


class MAGVLT(nn.Module):
    """The whole model. Call it on a Sequence for its last states, then ask for the logits of a modality."""

    def __init__(self, cfg: Config):
        """cfg.text_vocab must be the size of the text vocabulary. Weights start as N(0, init_std) and biases as 0
        (appendix A); positions as N(0, init_std) too or, ours, as waves."""
        super().__init__()
        n, t = cfg.image_tokens, cfg.text_length
        self.cfg = cfg
        self.tokens = nn.Embedding(cfg.codebook_size + cfg.text_vocab + len(SPECIAL_TOKENS), cfg.width)
        self.places = nn.Embedding(n + t + (n + t + 4), cfg.width)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.head = nn.Sequential(nn.Linear(cfg.width, cfg.width), nn.GELU(), nn.LayerNorm(cfg.width))
        self.output_bias = nn.Parameter(torch.zeros(cfg.codebook_size + cfg.text_vocab))
        self.length = nn.Linear(cfg.width, t, bias=False) if cfg.model == "magvlt" else None
        self.segments = nn.Embedding(2, cfg.width) if cfg.segments else None
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=cfg.init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if cfg.position_init == "sincos":
            row_or_column = sincos_init(cfg.grid, cfg.width // 2)                                        # (G, D/2)
            image = torch.cat([row_or_column.repeat_interleave(cfg.grid, 0), row_or_column.repeat(cfg.grid, 1)], dim=1)
            with torch.no_grad():  # a sine's mean square is 1/2
                self.places.weight[:n + t] = 2 ** 0.5 * cfg.init_std * torch.cat([image, sincos_init(t, cfg.width)])

    @property
    def device(self) -> torch.device:
        return self.output_bias.device

    def forward(self, seq: Sequence, places: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """The states after the last block: (B, L, D). There is no LayerNorm after it.

        If causal, the places `places` (L',) may be read alone, in order; what is before them must be in the cache.
        """
        part = slice(None) if places is None else places
        x = self.tokens(seq.token_ids[:, part]) + self.places(seq.place_ids[part])                 # (B, L, D)
        x = x + seq.is_masked[:, part, None] * self.places(seq.masked_ids[part])                   # (B, L, D)
        if self.segments is not None:  # L-Verse's [REF] and [GEN]: before BOG, and from there on
            half = torch.arange(seq.token_ids.shape[1], device=x.device) >= seq.layout.bog
            x = x + self.segments(half[part].long())
        may_attend = seq.is_valid[:, None, None, :]                                                # (B, 1, 1, L)
        if self.cfg.model == "argvlt":
            everywhere = torch.arange(seq.is_valid.shape[1], device=x.device)
            of_queries = everywhere if places is None else places
            of_keys = everywhere if cache else of_queries
            may_attend = may_attend[..., of_keys] & (of_keys <= of_queries[:, None])               # (B, 1, L, keys)
        for i, block in enumerate(self.blocks):
            x = block(x, may_attend, seq.layout, places, cache[i] if cache else None)
        return x

    def new_cache(self, batch: int, length: int) -> Cache:
        """Room for the keys and values of a whole sequence, a pair (B, H, L, D/H) for each block."""
        shape = batch, self.cfg.heads, length, self.cfg.width // self.cfg.heads
        return [tuple(self.output_bias.new_zeros(shape) for _ in "kv") for _ in self.blocks]

    def image_logits(self, states: Tensor, where: Layout) -> Tensor:
        """What may stand at each image place, by last states (B, L, D): (B, N, V_I)."""
        return self.score(states[:, where.image], "image")

    def text_logits(self, states: Tensor, where: Layout) -> Tensor:
        """What may stand at each text place, by last states (B, L, D): (B, T, V_T)."""
        return self.score(states[:, where.text], "text")

    def length_logits(self, states: Tensor, where: Layout) -> Tensor:
        """How long the caption is, by BOT's last state: (B, T); class i stands for length i + 1."""
        return self.length(states[:, where.bot])

    def score(self, states: Tensor, modality: str) -> Tensor:
        """What may stand at places of one modality, by their states (B, N, D): (B, N, V)."""
        split = self.cfg.codebook_size
        vocabulary = slice(0, split) if modality == "image" else slice(split, len(self.output_bias))
        # Each modality is scored at its own places over its own part of the tied table: a head over all L places and
        # the whole vocabulary would cost a fifth of the forward pass and be thrown away.
        return F.linear(self.head(states), self.tokens.weight[vocabulary], self.output_bias[vocabulary])


def sincos_init(num_places: int, width: int) -> Tensor:
    """Sines and cosines of the place, of wavelengths from 2 pi to about 25 times all places: (num_places, width).

    Only a start, learned on from there: looking "one place to the left" is then the same little rotation everywhere,
    while for random positions it has to be learnt anew at each of them.
    """
    slowness = (4 * num_places) ** (torch.arange(width // 2) / (width // 2))                       # (D/2,)
    angle = torch.arange(num_places)[:, None] / slowness                                           # (places, D/2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def num_parameters(model: nn.Module) -> int:
    """Trained numbers in a module, tied ones counted once."""
    return sum(p.numel() for p in model.parameters())


def operations(cfg: Config, places: int, keys: int, scored: int, vocabulary: int) -> int:
    """Multiplications and additions in the matrices of one sample's forward pass: `places` are read, each looks at
    `keys`, and `scored` of them are scored over `vocabulary` tokens. Backward costs twice that."""
    blocks = cfg.layers * places * (12 * cfg.width ** 2 + 2 * keys * cfg.width)  # qkv, proj, MLP; Q K^T and A V
    return 2 * (blocks + scored * cfg.width * (cfg.width + vocabulary))
