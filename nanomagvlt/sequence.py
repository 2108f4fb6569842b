"""Chapter 2 - The sequence: what the transformer reads, and in what order.

This is the one file that knows the layout (section 3.1, appendix A; the details are those of the authors' released
code). An image is N tokens, a caption T places of which the first `length` are real:

  t2i           BOC BOT text[T] BOG BOI image[N]       the caption is given, the image is drawn
  i2t, it2it    BOC BOI image[N] BOG BOT text[T]       the image is given, or both are partly hidden

BOI and BOT begin an image and a text, BOC the first half of the sequence, which is given, BOG the second, which is
generated. (LEFT, RIGHT, TOP, BOTTOM take BOG's place when two contexts are mixed, and say which of them is meant.)
MASK_IMG and MASK_TXT stand where a token is hidden.

Every place is a row of two tables, added up:
  token table      image ids first, then text ids, then the ten special tokens
  position table   N rows for image places, T for text places, N + T + 4 special rows: the k-th of the four special
                   tokens in the sequence has special row k, whichever token it is
and a masked place adds a third row to its MASK token and its own position: special row p for the p-th place of an
image and for the p-th place of a text alike. It looks arbitrary, and leaves most special rows unused; but the released
weights were trained so, and do not work without it.

Who may attend to whom: all to all, except that nobody sees padding text, and that where the text comes last the
row of BOT does not see the text after it: BOT is what the caption's length is read from. (That closes the direct path
only: see build_for_length().)

Shapes: B batch, N image places, T text places, L = N + T + 4, V_I and V_T vocabularies.
`python -m nanomagvlt.sequence` draws the layouts. Read on in model.py.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from nanomagvlt.config import Config

SPECIAL_TOKENS = ("BOI", "BOT", "BOC", "BOG", "MASK_IMG", "MASK_TXT", "LEFT", "RIGHT", "TOP", "BOTTOM")
BOI, BOT, BOC, BOG, MASK_IMG, MASK_TXT, LEFT, RIGHT, TOP, BOTTOM = range(10)

SEPARATOR = 91  # "|", with no word's end, in the text vocabularies of CLIP and of bpe.py: between two mixed captions

TEXT_FIRST = ("BOC", "BOT", "text", "BOG", "BOI", "image")
IMAGE_FIRST = ("BOC", "BOI", "image", "BOG", "BOT", "text")
ORDER = {"t2i": TEXT_FIRST, "i2t": IMAGE_FIRST, "it2it": IMAGE_FIRST}
TASKS = tuple(ORDER)


@dataclass(frozen=True)
class Layout:
    """Where things stand in the sequence of one task."""
    image: slice        # the N image places
    text: slice         # the T text places
    bog: int            # BOG's place: there begins the half that is generated
    bot: int            # BOT's place: the length is read there
    bot_sees_all: bool  # False where the text comes last: BOT then does not look beyond itself


def layout(task: str, num_image: int, num_text: int) -> Layout:
    """The layout of "t2i", "i2t" or "it2it" for N image and T text places. Raises ValueError for another task."""
    if task not in ORDER:
        raise ValueError(f"no task {task!r}; there are: {', '.join(TASKS)}")
    start, begins = 0, {}
    for name in ORDER[task]:
        begins[name] = start
        start += {"image": num_image, "text": num_text}.get(name, 1)
    return Layout(image=slice(begins["image"], begins["image"] + num_image),
                  text=slice(begins["text"], begins["text"] + num_text),
                  bog=begins["BOG"], bot=begins["BOT"], bot_sees_all=ORDER[task] == TEXT_FIRST)


@dataclass
class Sequence:
    """What the transformer reads: rows of its tables, and who is hidden or absent."""
    token_ids: Tensor   # (B, L) rows of the token table, MASK tokens put in
    place_ids: Tensor   # (L,)   rows of the position table
    masked_ids: Tensor  # (L,)   rows of the position table that a masked place adds
    is_masked: Tensor   # (B, L) True: hidden, to be predicted
    is_valid: Tensor    # (B, L) True: a real token, not padding
    layout: Layout


def valid_mask(lengths: Tensor, num_text: int) -> Tensor:
    """True at the places before each caption's length: (B,) long -> (B, T) bool."""
    return torch.arange(num_text, device=lengths.device) < lengths[:, None]


def build(task: str, cfg: Config, image_tokens: Tensor, image_is_masked: Tensor,
          text_tokens: Tensor, text_is_masked: Tensor, text_lengths: Tensor,
          selector: Tensor | None = None) -> Sequence:
    """Puts a batch of pairs in the order of the task.

    image_tokens (B, N) in [0, V_I), text_tokens (B, T) in [0, V_T), T up to cfg.text_length, the masks bool likewise,
    text_lengths (B,) in 1..T: the caption's tokens, its end token included. What stands in masked places, and in
    text places from `text_lengths` on, cannot be seen by any real token. selector (B,) is LEFT, RIGHT, TOP or BOTTOM
    where two pairs are mixed: it takes BOG's place.
    """
    (batch, n), t = image_tokens.shape, text_tokens.shape[1]
    device = image_tokens.device
    first_special_token = cfg.codebook_size + cfg.text_vocab
    first_special_place = n + cfg.text_length

    def rows(start: int, count: int) -> Tensor:
        return torch.arange(start, start + count, device=device)

    # Each piece, in the order of Sequence's fields: token ids, place rows, rows added where masked, masked?, real?
    pieces = {
        "image": (image_tokens.masked_fill(image_is_masked, first_special_token + MASK_IMG),
                  rows(0, n), rows(first_special_place, n), image_is_masked, torch.ones_like(image_is_masked)),
        "text": ((text_tokens + cfg.codebook_size).masked_fill(text_is_masked, first_special_token + MASK_TXT),
                 rows(n, t), rows(first_special_place, t), text_is_masked, valid_mask(text_lengths, t)),
    }
    specials = [name for name in ORDER[task] if name not in pieces]
    for k, name in enumerate(specials):  # one place each, the k-th on special row k; never masked, always real
        ids = torch.full((batch, 1), first_special_token + SPECIAL_TOKENS.index(name), device=device)
        if name == "BOG" and selector is not None:
            ids = first_special_token + selector[:, None]
        row = rows(first_special_place + k, 1)
        pieces[name] = (ids, row, row, torch.zeros_like(ids, dtype=torch.bool), torch.ones_like(ids, dtype=torch.bool))

    columns = zip(*(pieces[name] for name in ORDER[task]))
    return Sequence(*(torch.cat(column, dim=-1) for column in columns), layout(task, n, t))


def build_for_length(cfg: Config, image_tokens: Tensor, image_is_masked: Tensor) -> Sequence:
    """What the caption's length is guessed from: the image, and cfg.length_positions text places that are all masked.

    How many they are matters. BOT does not see them, but the image places that it looks at do: were they as many as
    the caption has tokens, BOT could read off at second hand what it is to guess. Padding would change nothing, so
    there is none: the sequence ends with them.
    """
    hidden = torch.zeros(len(image_tokens), cfg.length_positions, dtype=torch.long, device=image_tokens.device)
    lengths = torch.full_like(hidden[:, 0], cfg.length_positions)                                       # (B,)
    return build("i2t", cfg, image_tokens, image_is_masked, hidden, torch.ones_like(hidden, dtype=torch.bool), lengths)


def picture(task: str, cfg: Config, image_is_masked: Tensor, text_is_masked: Tensor, text_lengths: Tensor) -> str:
    """One sample's sequence as text, a line a place: token, position row, added row. For looking at."""
    n, t = cfg.image_tokens, cfg.text_length
    image_tokens, text_tokens = torch.arange(n)[None], torch.arange(t)[None]
    seq = build(task, cfg, image_tokens, image_is_masked, text_tokens, text_is_masked, text_lengths)

    def token(i: int) -> str:
        if i >= cfg.codebook_size + cfg.text_vocab:
            return SPECIAL_TOKENS[i - cfg.codebook_size - cfg.text_vocab]
        return f"x{i}" if i < cfg.codebook_size else f"y{i - cfg.codebook_size}"

    def place(i: int) -> str:
        return f"image {i}" if i < n else f"text {i - n}" if i < n + t else f"special {i - n - t}"

    lines = [f"{task}: BOT sees {'everything' if seq.layout.bot_sees_all else 'nothing after itself'}"]
    for j, i in enumerate(seq.token_ids[0].tolist()):
        added = "+ " + place(int(seq.masked_ids[j])) if seq.is_masked[0, j] else ""
        note = "" if seq.is_valid[0, j] else "padding: nobody attends to it"
        lines.append(f"  {j:2}  {token(i):9} {place(int(seq.place_ids[j])):10} {added:12} {note}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    small = Config(image_size=16, text_length=4, codebook_size=16, text_vocab=16)  # N = 4, T = 4
    nothing, image_some, text_some = (torch.tensor([bits], dtype=torch.bool)
                                      for bits in ([0, 0, 0, 0], [1, 0, 1, 1], [0, 1, 1, 0]))
    for task, image_mask, text_mask in (("t2i", image_some, nothing), ("i2t", nothing, text_some),
                                        ("it2it", image_some, text_some)):
        print(picture(task, small, image_mask, text_mask, torch.tensor([3])), "\n")
