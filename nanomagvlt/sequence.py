"""Chapter 2 - The sequence: what the transformer reads, in which order, and which position attends to which.

A task is data: a record in TASKS. It lists the pieces of the sequence in order, the pieces whose tokens are masked and
generated, and the passes of training that it has. The other files read these records (section 3.1, appendix A):

  t2i           BOC BOT text[T] BOG BOI image[N]       the caption is given, the image is generated
  i2t           BOC BOI image[N] BOG BOT text[T]       the image is given, the caption is generated
  it2it         BOC BOI image[N] BOG BOT text[T]       both are partly masked, and generated together

BOI and BOT begin an image and a text, BOC begins the first half of the sequence, BOG the second, generated half. (LEFT,
RIGHT, TOP, BOTTOM replace BOG when two contexts are mixed, and select one of them: see MixSel in objectives.py.)
MASK_IMG and MASK_TXT stand where a token is masked. A text has T positions; those from its length on are padding.

The input at a position is the sum of two rows (the details are those of the authors' released code):
  token table      image tokens first, then text tokens, then the ten special tokens
  position table   rows for an image, rows for a text, and special rows: the k-th special token of the sequence has
                   special row k, whichever token it is
A masked position adds a third row: special row p at the p-th position of its piece, for images and texts alike. The
released weights need this.

Attention: every position attends to every other, with two exceptions. No position attends to padding. In a task that
predicts the length of a text, the BOT before this text attends only to itself and to what stands before it; the length
is predicted there. (In ARGVLT, chapter 6, this is the rule for every position.)

Shapes: B batch, L sequence, V vocabulary, N positions of a piece: G x G for an image, T for a text. T is the padded
length of a batch, at most N_T = cfg.text_length. `python -m nanomagvlt.sequence` prints the layouts. Read on in
model.py.
"""
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

SPECIAL_TOKENS = ("BOI", "BOT", "BOC", "BOG", "MASK_IMG", "MASK_TXT", "LEFT", "RIGHT", "TOP", "BOTTOM")
MASK_TOKEN = {"image": "MASK_IMG", "text": "MASK_TXT"}
SEPARATOR = 91  # "|", in the text vocabularies of CLIP and of bpe.py: between two mixed captions

# piece -> the kind of its tokens. A second text in a task needs a name of its own, and an entry here. In a batch a
# piece has PIECE_tokens (B, N) and, if it is a text, PIECE_lengths (B,).
KIND = {"image": "image", "text": "text"}


@dataclass(frozen=True)
class Task:
    """One task, as data."""
    pieces: tuple[str, ...]     # the sequence in order: special tokens, and pieces of KIND
    generates: tuple[str, ...]  # the pieces whose tokens may be masked: they are predicted and scored
    unroll: bool                # whether UnrollMask adds a pass in training
    length_of: str | None       # the text whose length is predicted, at the BOT before it

    @property
    def given(self) -> tuple[str, ...]:
        """The pieces that are only shown."""
        return tuple(piece for piece in self.pieces if piece in KIND and piece not in self.generates)


TEXT_FIRST, IMAGE_FIRST = ("BOC", "BOT", "text", "BOG", "BOI", "image"), ("BOC", "BOI", "image", "BOG", "BOT", "text")
TASKS = {"t2i": Task(TEXT_FIRST, generates=("image",), unroll=True, length_of=None),
         "i2t": Task(IMAGE_FIRST, generates=("text",), unroll=True, length_of="text"),
         "it2it": Task(IMAGE_FIRST, generates=("image", "text"), unroll=False, length_of="text")}


class Vocabulary:
    """The rows of the token table and of the position table: the one owner of offsets and sizes."""

    def __init__(self, cfg):
        image_end, text_end = cfg.codebook_size, cfg.codebook_size + cfg.text_vocab
        self.tokens = {"image": slice(0, image_end), "text": slice(image_end, text_end)}
        self.num_tokens = text_end + len(SPECIAL_TOKENS)
        n, t = cfg.image_tokens, cfg.text_length  # there are n + t + 4 special rows, as in the release
        self.positions = {"image": slice(0, n), "text": slice(n, n + t), "special": slice(n + t, 2 * (n + t) + 4)}
        # If a task has two pieces of one kind, the first has these rows; the second has its own, which start
        # random, in a block of n + t rows after the special rows.
        self.block = n + t
        counts = [Counter(KIND[piece] for piece in TASKS[task].pieces if piece in KIND) for task in cfg.task_shares]
        further = max(max(count.values()) for count in counts) - 1
        self.num_positions = self.positions["special"].stop + further * self.block

    def special(self, name: str) -> int:
        """The token row of a special token."""
        return self.tokens["text"].stop + SPECIAL_TOKENS.index(name)

    def position_rows(self, kind: str, count: int, device: torch.device, further: int = 0) -> Tensor:
        """The first `count` rows of a kind in the position table. further = 1: of a second piece of this kind."""
        start = self.positions[kind].start
        if further:
            start += self.positions["special"].stop + (further - 1) * self.block
        return torch.arange(start, start + count, device=device)


@dataclass
class Sequence:
    """What the transformer reads."""
    task: Task
    token_ids: Tensor          # (B, L) rows of the token table, MASK tokens where masked
    position_ids: Tensor       # (L,)   rows of the position table; (B, L) in ARGVLT's sampling
    mask_position_ids: Tensor  # (L,)   rows of the position table that a masked position adds
    is_masked: Tensor          # (B, L) True: the token is hidden, and predicted
    is_valid: Tensor           # (B, L) False: padding
    attn_mask: Tensor          # (B, 1, 1, L), or (B, 1, L, L) if causal. True: the query (row) attends to the key
    slices: dict[str, slice]   # the positions of each piece, and of each special token (the last of its name)
    bog: int                   # the position of BOG: the generated half begins here
    length_row: int | None     # the BOT that predicts the length: this query attends to no key after it


def valid_mask(lengths: Tensor, num_text: int) -> Tensor:
    """True at the positions before each text's length (B,), which are not padding: (B, T) bool."""
    return torch.arange(num_text, device=lengths.device) < lengths[:, None]


def not_padding(batch: dict[str, Tensor], piece: str) -> Tensor:
    """True at the positions of a piece that are not padding: (B, N) bool."""
    tokens = batch[f"{piece}_tokens"]
    if KIND[piece] == "text":
        return valid_mask(batch[f"{piece}_lengths"], tokens.shape[1])
    return torch.ones_like(tokens, dtype=torch.bool)


def empty_texts(task: str, batch: dict[str, Tensor], rows: Tensor, end_token: int) -> dict[str, Tensor]:
    """The batch; where rows (B,) is True, the given texts are empty: only an end token."""
    shown = dict(batch)
    for piece in TASKS[task].given:
        if KIND[piece] == "text":
            shown[f"{piece}_tokens"] = batch[f"{piece}_tokens"].masked_fill(rows[:, None], end_token)
            shown[f"{piece}_lengths"] = batch[f"{piece}_lengths"].masked_fill(rows, 1)
    return shown


def attention_rule(is_valid: Tensor, is_causal: bool) -> Tensor:
    """Which key (column) each query (row) attends to, from is_valid (B, L): (B, 1, 1, L), or (B, 1, L, L) if causal.

    The rule of length_row is not in it: for one row the mask would need (B, 1, L, L). The model computes this row
    separately.
    """
    attn_mask = is_valid[:, None, None, :]                                      # no query attends to padding
    if is_causal:
        position = torch.arange(is_valid.shape[1], device=is_valid.device)
        attn_mask = attn_mask & (position <= position[:, None])                 # nor to any key after it
    return attn_mask


def build(task: str, cfg, batch: dict[str, Tensor], masks: dict[str, Tensor] | None = None,
          selector: Tensor | None = None) -> Sequence:
    """Lays out a batch in the order of the task.

    batch: for each piece its tokens (B, N) in [0, V), and for each text its lengths (B,) in 1..T, end token included.
    masks: for some pieces, True (B, N) where a token is hidden. The tokens at masked and padded positions have no
    influence. selector (B,): special tokens (rows of the token table) in BOG's place, when two contexts are mixed.
    """
    record, vocab, masks = TASKS[task], Vocabulary(cfg), masks or {}
    rows, device = next((len(tensor), tensor.device) for tensor in batch.values())
    parts, slices, kinds, start = [], {}, [], 0
    for piece in record.pieces:
        if piece in KIND:
            kind, tokens = KIND[piece], batch[f"{piece}_tokens"]                                     # (B, N)
            is_valid = not_padding(batch, piece)                                                     # (B, N)
            is_masked = masks.get(piece, torch.zeros_like(is_valid))                                 # (B, N)
            ids = (tokens + vocab.tokens[kind].start).masked_fill(is_masked, vocab.special(MASK_TOKEN[kind]))
            positions = vocab.position_rows(kind, tokens.shape[1], device, kinds.count(kind))        # (N,)
            mask_positions = vocab.position_rows("special", tokens.shape[1], device)                 # (N,)
            kinds.append(kind)
        else:  # the k-th special token, which is never masked, has special row k
            k = len(parts) - len(kinds)
            ids = torch.full((rows, 1), vocab.special(piece), device=device)                         # (B, 1)
            if piece == "BOG" and selector is not None:
                ids = selector[:, None]
            is_valid, is_masked = torch.ones_like(ids).bool(), torch.zeros_like(ids).bool()          # (B, 1) each
            positions = mask_positions = vocab.position_rows("special", k + 1, device)[k:]           # (1,)
        parts.append((ids, positions, mask_positions, is_masked, is_valid))
        slices[piece] = slice(start, start + ids.shape[1])
        start += ids.shape[1]
    ids, positions, mask_positions, is_masked, is_valid = (torch.cat(columns, dim=-1) for columns in zip(*parts))
    is_causal = cfg.model == "argvlt"
    length_row = slices[record.length_of].start - 1 if record.length_of and not is_causal else None
    return Sequence(record, ids, positions, mask_positions, is_masked, is_valid, attention_rule(is_valid, is_causal),
                    slices, slices["BOG"].start, length_row)


def build_for_length(task: str, cfg, batch: dict[str, Tensor], masks: dict[str, Tensor]) -> Sequence:
    """The sequence that predicts a text's length: the text is replaced by cfg.length_positions masked positions.

    Their number matters. BOT does not attend to them, but the image positions do, and BOT attends to those. With one
    masked position per token, BOT could read the length that it must predict.
    """
    text, other = TASKS[task].length_of, next(iter(batch.values()))
    lengths = torch.full((len(other),), cfg.length_positions, device=other.device)                   # (B,)
    blank = lengths.new_zeros(len(lengths), cfg.length_positions)                                    # (B, positions)
    return build(task, cfg, {**batch, f"{text}_tokens": blank, f"{text}_lengths": lengths},
                 {**masks, text: torch.ones_like(blank, dtype=torch.bool)})


def picture(task: str, cfg, masks: dict[str, Tensor], text_lengths: Tensor) -> str:
    """One sample's sequence as text, a line per position: token, position row, the row that a masked position adds."""
    vocab = Vocabulary(cfg)
    batch = {f"{piece}_lengths": text_lengths for piece in KIND}
    batch |= {f"{piece}_tokens": torch.arange(cfg.image_tokens if kind == "image" else cfg.text_length)[None]
              for piece, kind in KIND.items()}
    seq = build(task, cfg, batch, masks)

    def token(i: int) -> str:
        for kind, letter in (("image", "x"), ("text", "y")):  # the paper's letters
            if i < vocab.tokens[kind].stop:
                return f"{letter}{i - vocab.tokens[kind].start}"
        return SPECIAL_TOKENS[i - vocab.tokens["text"].stop]

    def position(i: int) -> str:
        further = f"further {i - vocab.positions['special'].stop}"
        return next((f"{kind} {i - rows.start}" for kind, rows in vocab.positions.items() if i < rows.stop), further)
    lines = [f"{task}: BOT attends to {'everything' if seq.length_row is None else 'nothing after it'}"]
    for j, i in enumerate(seq.token_ids[0].tolist()):
        added = "+ " + position(int(seq.mask_position_ids[j])) if seq.is_masked[0, j] else ""
        note = "" if seq.is_valid[0, j] else "padding: no position attends to it"
        lines.append(f"  {j:2}  {token(i):9} {position(int(seq.position_ids[j])):10} {added:12} {note}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    from nanomagvlt.config import Config
    small = Config(image_size=16, text_length=4, codebook_size=16, text_vocab=16)  # N = 4, T = 4
    image, text = torch.tensor([[True, False, True, True]]), torch.tensor([[False, True, True, False]])
    for task, masks in (("t2i", {"image": image}), ("i2t", {"text": text}), ("it2it", {"image": image, "text": text})):
        print(picture(task, small, masks, torch.tensor([3])), "\n")
