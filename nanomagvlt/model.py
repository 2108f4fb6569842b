"""Chapter 3 - The transformer: masked tokens in, logits for each of them out.

A pre-LayerNorm transformer that attends in both directions (section 3.1; sizes in table 8). MAGVLT's own parts: one
token table for both modalities, tied to the output layer; image positions scored over the image vocabulary only, text
positions over the text vocabulary only; and a linear layer that predicts the length of the text from the last state of
BOT (section 3.2). The rule which position attends to which comes with the sequence (sequence.py).

With cfg.model "argvlt" the same class is ARGVLT (chapter 6): it is causal, and can read a sequence in parts, with the
keys and values of earlier parts in a cache.

Shapes: B batch, L sequence, D width, H heads, N positions of a piece, V its vocabulary, G image tokens per side,
N_T = cfg.text_length. Read on in objectives.py, which trains it, and decoding.py, which generates with it.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomagvlt.config import Config
from nanomagvlt.sequence import Sequence, Vocabulary

KVCache = list[tuple[Tensor, Tensor]]  # keys and values (B, H, L, D/H) of each block


class Attention(nn.Module):
    """Multi-head attention: softmax(Q K^T / sqrt(D/H)) V."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.heads, self.dropout = cfg.heads, cfg.dropout
        self.qkv = nn.Linear(cfg.width, 3 * cfg.width)
        self.proj = nn.Linear(cfg.width, cfg.width)

    def forward(self, x: Tensor, attn_mask: Tensor, length_row: int | None = None, columns: Tensor | None = None,
                cache: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x (B, L, D), attn_mask (B, 1, 1 or L, L) bool -> (B, L, D). Query length_row attends to no key after it.

        With a cache, x (B, L', D) is only some columns (L',), which are positions of the sequence: their keys and
        values enter the cache (B, H, L, D/H), and x attends to the cache.
        """
        b, l, d = x.shape
        q, k, v = self.qkv(x).view(b, l, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)  # (B, H, L, D/H) each
        dropout = self.dropout if self.training else 0.0
        if cache is not None:  # attn_mask hides the empty part of the cache, so all steps have equal shapes
            k, v = cache[0].index_copy_(2, columns, k), cache[1].index_copy_(2, columns, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout)
        if length_row is not None:  # the one query with a rule of its own is computed again
            row, keys = slice(length_row, length_row + 1), slice(length_row + 1)
            one = F.scaled_dot_product_attention(q[:, :, row], k[:, :, keys], v[:, :, keys], dropout_p=dropout,
                                                 attn_mask=attn_mask[..., keys])                 # (B, H, 1, D/H)
            y = torch.cat([y[:, :, :length_row], one, y[:, :, length_row + 1:]], dim=2)
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

    def forward(self, x: Tensor, attn_mask: Tensor, length_row: int | None, columns: Tensor | None,
                cache: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), attn_mask, length_row, columns, cache))   # (B, L, D)
        return x + self.dropout(self.mlp(self.norm2(x)))                                             # (B, L, D)


class MAGVLT(nn.Module):
    """The whole model, MAGVLT or ARGVLT: from a Sequence to its last states; logits() maps states to tokens."""

    def __init__(self, cfg: Config):
        """cfg.text_vocab must be the size of the text tokenizer's vocabulary. Weights and positions start as N(0,
        init_std) and biases as 0, as in the authors' code. Ours: blocks that change nothing at first, and sines."""
        super().__init__()
        self.cfg, self.vocab = cfg, Vocabulary(cfg)
        self.token_table = nn.Embedding(self.vocab.num_tokens, cfg.width)
        self.position_table = nn.Embedding(self.vocab.num_positions, cfg.width)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.head = nn.Sequential(nn.Linear(cfg.width, cfg.width), nn.GELU(), nn.LayerNorm(cfg.width))
        self.output_bias = nn.Parameter(torch.zeros(self.vocab.tokens["text"].stop))
        self.length = nn.Linear(cfg.width, cfg.text_length, bias=False) if cfg.model == "magvlt" else None
        self.segments = nn.Embedding(2, cfg.width) if cfg.segments else None
        # An option of ours: each word also reads those beside it, to know whose colour is whose. Attention learns this
        # late, because it brings nothing until a later layer uses it (data/results/README.md).
        self.text_window = nn.Conv1d(cfg.width, cfg.width, cfg.text_window, padding="same", bias=False
                                     ) if cfg.text_window else None
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=cfg.init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Conv1d):  # a neighbour counts a bit less than the word
                nn.init.normal_(module.weight, std=0.7 / cfg.width ** 0.5)
        for block in self.blocks if cfg.zero_outputs else []:
            nn.init.zeros_(block.attention.proj.weight)
            nn.init.zeros_(block.mlp[2].weight)
        if cfg.position_init == "sincos":
            axis = sincos_init(cfg.grid, cfg.width // 2)                                           # (G, D/2)
            image = torch.cat([axis.repeat_interleave(cfg.grid, 0), axis.repeat(cfg.grid, 1)], 1)  # (G G, D)
            text = sincos_init(cfg.text_length, cfg.width)                                         # (N_T, D)
            for rows, kind in ((image, "image"), (text, "text")):
                rows = rows - rows.mean(0)  # what all positions share is most of them on a small grid
                self.position_table.weight.data[self.vocab.positions[kind]] = 2 * cfg.init_std * rows / rows.std()

    @property
    def device(self) -> torch.device:
        return self.output_bias.device

    def forward(self, seq: Sequence, columns: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """The states after the last block (no LayerNorm follows): (B, L, D).

        A causal model can read only some columns (L',), which are positions of the sequence: with a cache those after
        the cached ones, without it the first ones. The result is then (B, L', D).
        """
        part = slice(None) if columns is None else columns
        x = self.token_table(seq.token_ids[:, part]) + self.embed_positions(seq.position_ids[..., part])  # (B, L, D)
        x = x + seq.is_masked[:, part, None] * self.embed_positions(seq.mask_position_ids[part])       # (B, L, D)
        if self.text_window is not None:
            words = self.token_table(seq.token_ids) * seq.is_valid[..., None]                          # (B, L, D)
            x[:, seq.slices["text"]] += self.text_window(words[:, seq.slices["text"]].mT).mT           # (B, T, D)
        if self.segments is not None:  # L-Verse: [REF] in the given half, [GEN] in the generated half
            is_generated = torch.arange(seq.token_ids.shape[1], device=x.device) >= seq.bog            # (L,)
            x = x + self.segments(is_generated[part].long())
        attn_mask = seq.attn_mask                                                                  # (B, 1, 1 or L, L)
        if columns is not None:
            attn_mask = attn_mask[:, :, columns]                                                   # (B, 1, L', L)
            attn_mask = attn_mask[..., columns] if cache is None else attn_mask
        for i, block in enumerate(self.blocks):
            x = block(x, attn_mask, seq.length_row, columns, None if cache is None else cache[i])  # (B, L, D)
        return x

    def embed_positions(self, rows: Tensor) -> Tensor:
        """Embeddings (..., L, D) of rows (..., L) of the position table. Another positional scheme replaces it."""
        return self.position_table(rows)

    def new_cache(self, batch_size: int, length: int) -> KVCache:
        """An empty cache for the keys and values of a whole sequence: a pair (B, H, L, D/H) for each block."""
        shape = batch_size, self.cfg.heads, length, self.cfg.width // self.cfg.heads
        return [(self.output_bias.new_zeros(shape), self.output_bias.new_zeros(shape)) for _ in self.blocks]

    def logits(self, states: Tensor, kind: str) -> Tensor:
        """Logits of the tokens at positions of one kind, "image" or "text", from their states (B, N, D): (B, N, V).

        Also a model in bfloat16 has them in float32: sampling divides them by temperatures as low as 0.1.
        """
        rows = self.vocab.tokens[kind]
        weight, bias = self.token_table.weight[rows].float(), self.output_bias[rows].float()  # float32 is not copied
        return F.linear(self.head(states).float(), weight, bias)                               # autocast still applies

    def length_logits(self, states: Tensor, seq: Sequence) -> Tensor:
        """Logits of the text's length from BOT's last state: (B, N_T). Class i is the length i + 1 (section 3.2)."""
        return self.length(states[:, seq.length_row])


def sincos_init(num_positions: int, width: int) -> Tensor:
    """Sines and cosines with wavelengths from 2 pi to about 25 x num_positions: (positions, width). A step of one
    position is the same rotation everywhere; with random positions, the model learns it at each."""
    slowness = (4 * num_positions) ** (torch.arange(width // 2) / (width // 2))                    # (width/2,)
    angle = torch.arange(num_positions)[:, None] / slowness                                        # (., width/2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def num_parameters(model: nn.Module) -> int:
    """The number of parameters of a module; tied ones count once."""
    return sum(p.numel() for p in model.parameters())
