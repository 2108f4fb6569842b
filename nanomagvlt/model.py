"""Chapter 3 - The transformer: masked tokens in, logits for each of them out.

A pre-LayerNorm transformer that attends in both directions (section 3.1; sizes in table 8). MAGVLT's own parts: one
token table for both modalities, tied to the output layer; image positions scored over the image vocabulary only, text
positions over the text vocabulary only; and a linear layer that predicts the length of the text from the last state of
BOT (section 3.2). Which position attends to which is decided in sequence.py: the model applies it.

With cfg.model "argvlt" the same transformer is ARGVLT (chapter 6): it is causal, and can read a sequence in parts, with
the keys and values of earlier parts kept in a cache.

Shapes: B batch, L sequence, D width, H heads, N image positions, T text positions, V vocabulary.
Read on in objectives.py, which trains it, and decoding.py, which generates with it.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomagvlt.config import Config
from nanomagvlt.sequence import Sequence, Vocabulary

Cache = list[tuple[Tensor, Tensor]]  # keys and values (B, H, L, D/H) of each block


class Attention(nn.Module):
    """Multi-head attention: softmax(Q K^T / sqrt(D/H)) V."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.heads, self.dropout = cfg.heads, cfg.dropout
        self.qkv = nn.Linear(cfg.width, 3 * cfg.width)
        self.proj = nn.Linear(cfg.width, cfg.width)

    def forward(self, x: Tensor, attn_mask: Tensor, bot: int | None = None, positions: Tensor | None = None,
                cache: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x (B, L, D), attn_mask (B, 1, 1 or L, keys) bool -> (B, L, D). Row `bot` attends only up to itself.

        With a cache, keys and values (B, H, L, D/H) of the whole sequence, x holds only the positions (L',) of it:
        their keys and values are written into the cache, and x attends to the cache.
        """
        b, l, d = x.shape
        q, k, v = self.qkv(x).view(b, l, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)  # (B, H, L, D/H) each
        dropout = self.dropout if self.training else 0.0
        if cache is not None:  # attn_mask hides the part that is still empty: every step has the same shapes
            k, v = cache[0].index_copy_(2, positions, k), cache[1].index_copy_(2, positions, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout)
        if bot is not None:
            # The one row with a rule of its own is computed again, over the keys up to BOT (none of them is padding).
            row = F.scaled_dot_product_attention(q[:, :, bot:bot + 1], k[:, :, :bot + 1], v[:, :, :bot + 1],
                                                 dropout_p=dropout)                              # (B, H, 1, D/H)
            y = torch.cat([y[:, :, :bot], row, y[:, :, bot + 1:]], dim=2)
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

    def forward(self, x: Tensor, *attention) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), *attention))
        return x + self.dropout(self.mlp(self.norm2(x)))


class MAGVLT(nn.Module):
    """The whole model. It maps a Sequence to its last states; logits() maps states to the tokens of a modality."""

    def __init__(self, cfg: Config):
        """cfg.text_vocab must be the size of the text tokenizer's vocabulary.

        Weights start as N(0, init_std) and biases as 0 (appendix A); positions as N(0, init_std) or, not the paper's,
        as sines and cosines.
        """
        super().__init__()
        self.cfg, self.vocab = cfg, Vocabulary(cfg)
        self.tokens = nn.Embedding(self.vocab.num_tokens, cfg.width)
        self.positions = nn.Embedding(self.vocab.num_positions, cfg.width)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.head = nn.Sequential(nn.Linear(cfg.width, cfg.width), nn.GELU(), nn.LayerNorm(cfg.width))
        self.output_bias = nn.Parameter(torch.zeros(self.vocab.first_special))
        self.length = nn.Linear(cfg.width, cfg.text_length, bias=False) if cfg.model == "magvlt" else None
        self.segments = nn.Embedding(2, cfg.width) if cfg.segments else None
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=cfg.init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if cfg.position_init == "sincos":
            axis = sincos_init(cfg.grid, cfg.width // 2)                                           # (G, D/2)
            image = torch.cat([axis.repeat_interleave(cfg.grid, 0), axis.repeat(cfg.grid, 1)], 1)  # (N, D): row, column
            text = sincos_init(cfg.text_length, cfg.width)                                         # (T, D)
            with torch.no_grad():  # the mean square of a sine is 1/2
                self.positions.weight[:len(image) + len(text)] = 2 ** 0.5 * cfg.init_std * torch.cat([image, text])

    @property
    def device(self) -> torch.device:
        return self.output_bias.device

    def forward(self, seq: Sequence, positions: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """The states after the last block (no LayerNorm follows): (B, L, D).

        With a cache (causal models only) it reads the positions (L',) alone; the cache must hold those before them.
        """
        part = slice(None) if positions is None else positions
        x = self.tokens(seq.token_ids[:, part]) + self.positions(seq.position_ids[part])           # (B, L, D)
        x = x + seq.is_masked[:, part, None] * self.positions(seq.masked_ids[part])                # (B, L, D)
        if self.segments is not None:  # L-Verse: [REF] before BOG, [GEN] from there on
            generated = torch.arange(seq.token_ids.shape[1], device=x.device) >= seq.bog
            x = x + self.segments(generated[part].long())
        attn_mask = seq.attn_mask
        if positions is not None:
            attn_mask = attn_mask[:, :, positions]                                                 # (B, 1, L', L)
            attn_mask = attn_mask if cache else attn_mask[..., positions]                          # (B, 1, L', L')
        for i, block in enumerate(self.blocks):
            x = block(x, attn_mask, seq.bot, positions, cache[i] if cache else None)
        return x

    def new_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for the keys and values of a whole sequence: a pair (B, H, L, D/H) for each block."""
        shape = batch, self.cfg.heads, length, self.cfg.width // self.cfg.heads
        return [tuple(self.output_bias.new_zeros(shape) for _ in "kv") for _ in self.blocks]

    def logits(self, states: Tensor, kind: str) -> Tensor:
        """Logits of the tokens at positions of one kind, "image" or "text", from their states (B, N, D): (B, N, V).

        A head over all L positions and the whole vocabulary would cost a fifth of the forward pass, for nothing.
        """
        rows = self.vocab.tokens[kind]
        return F.linear(self.head(states), self.tokens.weight[rows], self.output_bias[rows])

    def length_logits(self, states: Tensor, seq: Sequence) -> Tensor:
        """Logits of the text's length from BOT's last state: (B, T). Class i is the length i + 1 (section 3.2)."""
        return self.length(states[:, seq.bot])


def sincos_init(num_positions: int, width: int) -> Tensor:
    """Sines and cosines of the position, with wavelengths from 2 pi to about 25 x num_positions: (positions, width).

    The model learns on from there. A step of one position is then the same small rotation everywhere; from random
    positions the model must learn it at each position anew.
    """
    slowness = (4 * num_positions) ** (torch.arange(width // 2) / (width // 2))                    # (D/2,)
    angle = torch.arange(num_positions)[:, None] / slowness                                        # (positions, D/2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def num_parameters(model: nn.Module) -> int:
    """The number of trainable numbers in a module; tied ones count once."""
    return sum(p.numel() for p in model.parameters())
