import pytest
import torch

from nanomagvlt import sequence
from nanomagvlt.config import Config

SMALL = Config(image_size=16, text_length=4, codebook_size=16, text_vocab=16)  # N = 4, T = 4
NOTHING = torch.zeros(1, 4, dtype=torch.bool)
IMAGE_SOME = torch.tensor([[True, False, True, True]])
TEXT_SOME = torch.tensor([[False, True, True, False]])


def test_layouts_as_drawn():
    """Token, position row, and the special row that a masked place adds; the caption has 3 tokens of 4 places."""
    assert sequence.picture("t2i", SMALL, IMAGE_SOME, NOTHING, torch.tensor([3])) == """\
t2i: BOT sees everything
   0  BOC       special 0
   1  BOT       special 1
   2  y0        text 0
   3  y1        text 1
   4  y2        text 2
   5  y3        text 3                  padding: nobody attends to it
   6  BOG       special 2
   7  BOI       special 3
   8  MASK_IMG  image 0    + special 0
   9  x1        image 1
  10  MASK_IMG  image 2    + special 2
  11  MASK_IMG  image 3    + special 3"""
    i2t = """\
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
  11  y3        text 3                  padding: nobody attends to it"""
    assert sequence.picture("i2t", SMALL, NOTHING, TEXT_SOME, torch.tensor([3])) == \
        "i2t: BOT sees nothing after itself\n" + i2t
    assert sequence.picture("it2it", SMALL, IMAGE_SOME, TEXT_SOME, torch.tensor([3])).splitlines()[3:7] == [
        "   2  MASK_IMG  image 0    + special 0", "   3  x1        image 1",
        "   4  MASK_IMG  image 2    + special 2", "   5  MASK_IMG  image 3    + special 3"]


@pytest.mark.parametrize("task", sequence.TASKS)
def test_layout_finds_every_place_once(task, cfg, batch):
    where = sequence.layout(task, 4, 6)
    seq = sequence.build(task, cfg, batch["image_tokens"], torch.zeros(5, 4, dtype=torch.bool),
                         batch["text_tokens"], torch.zeros(5, 6, dtype=torch.bool), batch["text_lengths"])
    assert torch.equal(seq.token_ids[:, where.image], batch["image_tokens"])
    assert torch.equal(seq.token_ids[:, where.text] - cfg.codebook_size, batch["text_tokens"])
    assert (seq.token_ids[:, where.bot] == cfg.codebook_size + cfg.text_vocab + sequence.BOT).all()
    assert torch.equal(seq.is_valid.sum(1), 4 + 4 + batch["text_lengths"])
    assert seq.place_ids.unique().numel() == seq.token_ids.shape[1] == 4 + 6 + 4
    with pytest.raises(ValueError, match="t2t"):
        sequence.layout("t2t", 4, 6)
