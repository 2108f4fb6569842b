import dataclasses

import pytest
import torch

from nanomagvlt import objectives, sequence
from nanomagvlt.config import Config
from nanomagvlt.model import MAGVLT
from nanomagvlt.sequence import KIND, TASKS, Task, Vocabulary, build

SMALL = Config(image_size=16, text_length=4, codebook_size=16, text_vocab=16)  # N = 4, T = 4
IMAGE, TEXT = torch.tensor([[True, False, True, True]]), torch.tensor([[False, True, True, False]])


def test_layouts_as_drawn():
    """Token, position row, and the special row that a masked position adds; 3 of 4 text positions are real."""
    assert sequence.picture("t2i", SMALL, {"image": IMAGE}, torch.tensor([3])) == """\
t2i: BOT attends to everything
   0  BOC       special 0
   1  BOT       special 1
   2  y0        text 0
   3  y1        text 1
   4  y2        text 2
   5  y3        text 3                  padding: no position attends to it
   6  BOG       special 2
   7  BOI       special 3
   8  MASK_IMG  image 0    + special 0
   9  x1        image 1
  10  MASK_IMG  image 2    + special 2
  11  MASK_IMG  image 3    + special 3"""
    assert sequence.picture("i2t", SMALL, {"text": TEXT}, torch.tensor([3])) == """\
i2t: BOT attends to nothing after it
   0  BOC       special 0
   1  BOI       special 1
   2  x0        image 0
   3  x1        image 1
   4  x2        image 2
   5  x3        image 3
   6  BOG       special 2
   7  BOT       special 3
   8  y0        text 0
   9  MASK_TXT  text 1     + special 1
  10  MASK_TXT  text 2     + special 2
  11  y3        text 3                  padding: no position attends to it"""
    assert sequence.picture("it2it", SMALL, {"image": IMAGE, "text": TEXT}, torch.tensor([3])).splitlines()[3:7] == [
        "   2  MASK_IMG  image 0    + special 0", "   3  x1        image 1",
        "   4  MASK_IMG  image 2    + special 2", "   5  MASK_IMG  image 3    + special 3"]


@pytest.mark.parametrize("task", ["t2i", "i2t", "it2it"])
def test_every_position_is_laid_out_once(task, cfg, batch):
    seq, vocab = build(task, cfg, batch), Vocabulary(cfg)
    for piece in ("image", "text"):
        assert torch.equal(seq.token_ids[:, seq.slices[piece]] - vocab.tokens[piece].start, batch[f"{piece}_tokens"])
    assert (seq.token_ids[:, seq.bog] == vocab.special("BOG")).all()
    assert seq.length_row is None if task == "t2i" else (seq.token_ids[:, seq.length_row] == vocab.special("BOT")).all()
    assert torch.equal(seq.is_valid.sum(1), 4 + 4 + batch["text_lengths"])
    assert seq.position_ids.unique().numel() == seq.token_ids.shape[1] == 4 + 6 + 4
    assert vocab.num_tokens == cfg.codebook_size + cfg.text_vocab + 10 and vocab.num_positions == 2 * (4 + 6) + 4


def test_a_second_text_has_positions_of_its_own_and_trains_like_the_first(cfg, batch, rng, monkeypatch):
    """A new task is a record: a question is given, a text is generated."""
    monkeypatch.setitem(KIND, "question", "text")
    monkeypatch.setitem(TASKS, "q2t", Task(("BOC", "BOT", "question", "BOG", "BOT", "text"), ("text",), True, "text"))
    cfg = dataclasses.replace(cfg, task_weights={"q2t": 1.0}, unroll_mask=True, mixsel="select", text_vocab=100)
    batch |= {f"{name}question_{what}": batch[f"{name}text_{what}"].flip(0)
              for name in ("", "other_") for what in ("tokens", "lengths")}
    seq = build("q2t", cfg, batch)
    assert seq.position_ids.unique().numel() == seq.token_ids.shape[1] == 6 + 6 + 4
    assert seq.position_ids.max() < Vocabulary(cfg).num_positions == 2 * (4 + 6) + 4 + (4 + 6)
    assert seq.length_row == seq.slices["text"].start - 1
    loss, terms = objectives.losses(MAGVLT(cfg), "q2t", batch, rng)
    assert set(terms) == {"mask", "length", "unroll", "mixsel"} and loss.isfinite()
