import numpy as np
import pytest
import torch
from PIL import Image

from nanomagvlt.data.sources import square
from nanomagvlt.sampling import edit
from nanomagvlt.tokenizers.bpe import BPE


def test_a_token_is_generated_if_any_of_its_pixels_is_white():
    for size, box, expected in (((32, 32), (7, 8, 9, 9), [4, 5]), ((1024, 1024), (1023, 0, 1024, 1), [3]),
                                ((64, 32), (0, 0, 64, 32), list(range(16))), ((64, 32), (0, 0, 16, 32), [])):
        assert edit.mask_to_positions(edit.region(size, box), 4, "crop").nonzero().flatten().tolist() == expected
    assert not edit.mask_to_positions(Image.new("RGB", (8, 8), "red"), 4, "crop").any()
    for box in ((0, 0, 0, 5), (5, 5, 2, 9), (0, 0, 33, 2), (-1, 0, 2, 2)):
        with pytest.raises(ValueError, match="region"):
            edit.region((32, 32), box)


@pytest.mark.parametrize("fit, box, position, top_left", [
    ("crop", (150, 0, 175, 25), 0, 0), ("squeeze", (100, 25, 200, 50), 5, 0), ("pad", (0, 0, 100, 50), 4, 255)])
def test_masks_fit_as_their_image_does(fit, box, position, top_left):
    """400 x 100 pixels on 4 x 4 tokens: the middle quarter, all of it squeezed, or all of it between white bars."""
    assert edit.mask_to_positions(edit.region((400, 100), box), 4, fit).nonzero().tolist() == [[position]]
    wide = Image.new("RGB", (400, 100))
    wide.paste((255, 0, 0), box)
    seen = square(wide, 32, fit).astype(int)
    red = (seen[..., 0] - seen[..., 1]).reshape(4, 8, 4, 8).mean((1, 3)).flatten()
    assert (red > 64).nonzero()[0].tolist() == [position] and seen[0, 31, 1] == top_left


def test_the_centre_and_the_middle_words_are_the_papers():
    rows = edit.centre_positions(16).view(16, 16).nonzero()
    assert rows.min() == 4 and rows.max() == 11 and len(rows) == 64
    masked = edit.centre_words(torch.tensor([1, 2, 3, 9, 16]), 20)             # lengths with the end token
    assert [row.nonzero().flatten().tolist() for row in masked] == [[], [], [1], [2, 3, 4, 5], [4, 5, 6, 7, 8, 9, 10]]


def test_a_random_share_is_another_choice_in_every_row():
    chosen = edit.random_positions(16, 0.5, 50, torch.Generator().manual_seed(0))
    assert (chosen.sum(1) == 8).all() and len(set(map(tuple, chosen.tolist()))) > 40
    assert (edit.random_positions(16, 0.01, 3, torch.Generator()).sum(1) == 1).all()


def test_blending_has_a_soft_edge_and_changes_nothing_far_from_it():
    original, new = np.full((256, 256, 3), 200, np.uint8), np.zeros((1, 256, 256, 3), np.uint8)
    mixed = edit.blend(original, new, edit.centre_positions(16)[None])[0]
    assert (mixed[:5] == 200).all() and (mixed[126:130, 126:130] < 2).all()
    assert 80 < mixed[64, 128, 0] < 120 and (np.diff(mixed[:128, 128, 0].astype(int)) <= 0).all()


def test_mask_words_stand_for_tokens():
    bpe = BPE.train(["a red circle"] * 3, 40)
    a, ids = bpe.encode("a"), bpe.encode("a") + bpe.encode("circle on")
    tokens, length, to_fill = edit.read_masked_text("a [MASK] circle on [MASK:3]", bpe, 30)
    assert tokens[~to_fill].tolist() == ids + [bpe.end] * (26 - len(ids)) and length == len(ids) + 5
    assert to_fill.nonzero().flatten().tolist() == [len(a), *range(len(ids) + 1, len(ids) + 4)]
    for text, match in (("a circle", "write .MASK"), ("[MASK] [MASK:0]", "write .MASK"), ("[MASK:30]", "31 tokens")):
        with pytest.raises(ValueError, match=match):
            edit.read_masked_text(text, bpe, 30)


def test_the_positions_of_a_word_are_those_of_its_tokens():
    bpe, prompt = BPE.train(["a red circle above a blue square"] * 3, 40), "a red circle above a blue square"
    assert bpe.decode([bpe.encode(prompt)[i] for i in edit.word_positions(bpe, prompt, "blue")]).strip() == "blue"
    assert edit.word_positions(bpe, "a busy Bus", "bus").start == len(bpe.encode("a busy"))
    for word in ("green", "cle", "", " "):
        with pytest.raises(ValueError, match="no word"):
            edit.word_positions(bpe, prompt, word)
