"""Chapter 2 - The sequence: what the transformer reads, in which order, and which position attends to which.

A task is data: a record in TASKS. It lists the pieces of the sequence in order, the pieces whose tokens are masked and
generated, and the passes of training that it has. All other files read these records (section 3.1, appendix A):

  t2i           BOC BOT text[T] BOG BOI image[N]       the caption is given, the image is generated
  i2t           BOC BOI image[N] BOG BOT text[T]       the image is given, the caption is generated
  it2it         BOC BOI image[N] BOG BOT text[T]       both are partly masked, and generated together

BOI and BOT begin an image and a text, BOC begins the given half of the sequence, BOG the generated half. (LEFT, RIGHT,
TOP, BOTTOM replace BOG when two contexts are mixed, and select one of them: see MixSel in objectives.py.) MASK_IMG and
MASK_TXT stand where a token is masked. A text has T positions; those from its length on are padding.

The input at a position is the sum of two rows (the details are those of the authors' released code):
  token table      image tokens first, then text tokens, then the ten special tokens
  position table   N rows for an image, T for a text, N + T + 4 special rows: the k-th special token of the sequence has
                   special row k, whichever token it is
and a masked position adds a third row to its MASK token and its own position: special row p for the p-th position of an
image, and for the p-th of a text. This looks arbitrary, but the released weights do not work without it.

Attention: every position attends to every other, except that (1) no position attends to padding, and (2) BOT does not
attend to the text behind it where the text's length is predicted, which is done at BOT. (In ARGVLT, chapter 6, each
position attends only to itself and to the positions before it.)

Shapes: B batch, N image positions, T text positions, L = N + T + 4, V_I and V_T vocabularies.
`python -m nanomagvlt.sequence` prints the layouts. Read on in model.py.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

SPECIAL_TOKENS = ("BOI", "BOT", "BOC", "BOG", "MASK_IMG", "MASK_TXT", "LEFT", "RIGHT", "TOP", "BOTTOM")
MASK_TOKEN = {"image": "MASK_IMG", "text": "MASK_TXT"}
SEPARATOR = 91  # "|", in the text vocabularies of CLIP and of bpe.py: between two mixed captions

# The kind of each piece: its vocabulary. Its tokens are batch["PIECE_tokens"], and a text's lengths "PIECE_lengths".
KIND = {"image": "image", "text": "text"}


@dataclass(frozen=True)
class Task:
    """One task, as data."""
    pieces: tuple[str, ...]     # the sequence in order: special tokens, and pieces of KIND
    generates: tuple[str, ...]  # the pieces whose tokens may be masked: they are predicted and scored
    unroll: bool                # whether UnrollMask adds a pass in training
    length_of: str | None       # the text whose length is predicted, at the BOT in front of it

    @property
    def given(self) -> tuple[str, ...]:
        """The pieces that are only shown."""
        return tuple(piece for piece in self.pieces if piece in KIND and piece not in self.generates)


TEXT_FIRST, IMAGE_FIRST = ("BOC", "BOT", "text", "BOG", "BOI", "image"), ("BOC", "BOI", "image", "BOG", "BOT", "text")
TASKS = {"t2i": Task(TEXT_FIRST, generates=("image",), unroll=True, length_of=None),
         "i2t": Task(IMAGE_FIRST, generates=("text",), unroll=True, length_of="text"),
         "it2it": Task(IMAGE_FIRST, generates=("image", "text"), unroll=False, length_of="text")}


class Vocabulary:
    """The rows of the token table and of the position table. Everything that needs an offset or a size asks here."""

    def __init__(self, cfg):
        split, n, t = cfg.codebook_size, cfg.image_tokens, cfg.text_length
        self.tokens = {"image": slice(0, split), "text": slice(split, split + cfg.text_vocab)}
        self.first_special = split + cfg.text_vocab
        self.num_tokens = self.first_special + len(SPECIAL_TOKENS)
        self.positions = {"image": slice(0, n), "text": slice(n, n + t)}
        self.special_positions = slice(n + t, 2 * (n + t) + 4)
        # A second piece of a kind in one task, a second text for example, has rows of its own behind the special rows.
        kinds = [[KIND[piece] for piece in TASKS[task].pieces if piece in KIND] for task in cfg.tasks]
        most = max(of_task.count(kind) for of_task in kinds for kind in of_task)
        self.num_positions = self.special_positions.stop + (most - 1) * (n + t)

    def special(self, name: str) -> int:
        """The token row of a special token."""
        return self.first_special + SPECIAL_TOKENS.index(name)

    def position_rows(self, kind: str, repeat: int, count: int, device=None) -> Tensor:
        """The position rows (count,) of a task's first piece of a kind (repeat 0), or of a further one."""
        start = self.positions[kind].start
        if repeat:
            start += self.special_positions.stop + (repeat - 1) * self.special_positions.start
        return torch.arange(start, start + count, device=device)


@dataclass
class Sequence:
    """What the transformer reads."""
    task: Task
    token_ids: Tensor           # (B, L) rows of the token table, MASK tokens where masked
    position_ids: Tensor        # (L,)   rows of the position table
    masked_ids: Tensor          # (L,)   rows of the position table that a masked position adds
    is_masked: Tensor           # (B, L) True: hidden, and predicted
    is_valid: Tensor            # (B, L) True: a real token; False: padding
    attn_mask: Tensor           # (B, 1, 1, L), or (B, 1, L, L) if causal. True: the query (row) attends to the key
    slices: dict[str, slice]    # the positions of each piece
    bog: int                    # the position of BOG: the generated half begins here
    bot: int | None             # the position that predicts the length and attends only up to itself; None: no such


def valid_mask(lengths: Tensor, num_text: int) -> Tensor:
    """True at the positions before each text's length (B,), which are not padding: (B, T) bool."""
    return torch.arange(num_text, device=lengths.device) < lengths[:, None]


def attention_rule(is_valid: Tensor, causal: bool) -> Tensor:
    """Which key (column) each query (row) attends to, by is_valid (B, L): (B, 1, 1, L), or (B, 1, L, L) if causal.

    BOT's row is not in it: a (B, L, L) mask for the sake of one row would cost L times the memory. The model computes
    that row apart (Sequence.bot).
    """
    attn_mask = is_valid[:, None, None, :]                                       # no query attends to padding
    if causal:
        position = torch.arange(is_valid.shape[1], device=is_valid.device)
        attn_mask = attn_mask & (position <= position[:, None])                  # nor to what stands behind it
    return attn_mask


def build(task: str, cfg, batch: dict[str, Tensor], masks: dict[str, Tensor] | None = None,
          selector: Tensor | None = None) -> Sequence:
    """Lays a batch out in the order of the task.

    batch: for each piece its tokens (B, N) in [0, V), and for each text its lengths (B,) in 1..T, the end token
    included; T is at most cfg.text_length. masks: for some pieces, True (B, N) where a token is hidden. Tokens that are
    masked or padding do not influence any state of a real token. selector (B,): special tokens (rows of the token
    table) in BOG's place, when two contexts are mixed.
    """
    record, vocab, masks = TASKS[task], Vocabulary(cfg), masks or {}
    first = batch[f"{next(piece for piece in record.pieces if piece in KIND)}_tokens"]
    device, columns, slices, start, seen = first.device, [], {}, 0, []
    for name in record.pieces:
        if name in KIND:
            kind, tokens = KIND[name], batch[f"{name}_tokens"]                                       # (B, N)
            is_masked = masks.get(name, torch.zeros_like(tokens, dtype=torch.bool))
            ids = (tokens + vocab.tokens[kind].start).masked_fill(is_masked, vocab.special(MASK_TOKEN[kind]))
            rows = vocab.position_rows(kind, seen.count(kind), tokens.shape[1], device)              # (N,)
            is_valid = torch.ones_like(is_masked) if kind == "image" else valid_mask(batch[f"{name}_lengths"],
                                                                                     tokens.shape[1])
            added = vocab.special_positions.start + torch.arange(tokens.shape[1], device=device)     # (N,)
            seen.append(kind)
        else:  # a special token: the k-th has special row k; it is never masked
            ids = torch.full_like(first[:, :1], vocab.special(name))                                 # (B, 1)
            if name == "BOG" and selector is not None:
                ids = selector[:, None]
            k = len(columns) - len(seen)
            rows = added = torch.arange(1, device=device) + vocab.special_positions.start + k        # (1,)
            is_masked, is_valid = (torch.full_like(ids, value, dtype=torch.bool) for value in (False, True))
        columns.append((ids, rows, added, is_masked, is_valid))
        slices[name] = slice(start, start + ids.shape[1])
        start = slices[name].stop
    ids, rows, added, is_masked, is_valid = (torch.cat(column, dim=-1) for column in zip(*columns))
    causal = cfg.model == "argvlt"
    bot = slices[record.length_of].start - 1 if record.length_of and not causal else None
    return Sequence(record, ids, rows, added, is_masked, is_valid, attention_rule(is_valid, causal), slices,
                    slices["BOG"].start, bot)


def build_for_length(task: str, cfg, batch: dict[str, Tensor], masks: dict[str, Tensor]) -> Sequence:
    """The sequence from which the text's length is predicted: it shows cfg.length_positions masked text positions.

    Their number matters. BOT does not attend to them, but the image positions that BOT attends to do: if there were as
    many as the text has tokens, BOT could read from these the length that it must predict.
    """
    record, name = TASKS[task], TASKS[task].length_of
    shown = batch[f"{(record.given or record.generates)[0]}_tokens"]                                 # (B, N)
    lengths = torch.full_like(shown[:, 0], cfg.length_positions)                                     # (B,)
    hidden = lengths.new_zeros(len(lengths), cfg.length_positions)                                   # (B, P)
    return build(task, cfg, {**batch, f"{name}_tokens": hidden, f"{name}_lengths": lengths},
                 {**masks, name: torch.ones_like(hidden, dtype=torch.bool)})


def picture(task: str, cfg, masks: dict[str, Tensor], text_lengths: Tensor) -> str:
    """One sample's sequence as text, a line a position: token, position row, added row."""
    vocab = Vocabulary(cfg)
    batch = {"image_tokens": torch.arange(cfg.image_tokens)[None], "text_tokens": torch.arange(cfg.text_length)[None],
             "text_lengths": text_lengths}
    seq = build(task, cfg, batch, masks)

    def token(i: int) -> str:
        for kind, letter in (("image", "x"), ("text", "y")):  # the paper's letters
            if i < vocab.tokens[kind].stop:
                return f"{letter}{i - vocab.tokens[kind].start}"
        return SPECIAL_TOKENS[i - vocab.first_special]

    def position(i: int) -> str:
        for kind, rows in (*vocab.positions.items(), ("special", vocab.special_positions)):
            if i < rows.stop:
                return f"{kind} {i - rows.start}"
    lines = [f"{task}: BOT attends to {'everything' if seq.bot is None else 'nothing behind it'}"]
    for j, i in enumerate(seq.token_ids[0].tolist()):
        added = "+ " + position(int(seq.masked_ids[j])) if seq.is_masked[0, j] else ""
        note = "" if seq.is_valid[0, j] else "padding: no position attends to it"
        lines.append(f"  {j:2}  {token(i):9} {position(int(seq.position_ids[j])):10} {added:12} {note}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    from nanomagvlt.config import Config
    small = Config(image_size=16, text_length=4, codebook_size=16, text_vocab=16)  # N = 4, T = 4
    image, text = torch.tensor([[True, False, True, True]]), torch.tensor([[False, True, True, False]])
    for task, masks in (("t2i", {"image": image}), ("i2t", {"text": text}), ("it2it", {"image": image, "text": text})):
        print(picture(task, small, masks, torch.tensor([3])), "\n")
