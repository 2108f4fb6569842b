import numpy as np
import pytest
import torch
from PIL import Image

from nanomagvlt.sampling import edit
from nanomagvlt.tokenizers.bpe import BPE


def test_a_token_is_made_anew_if_any_of_its_pixels_is():
    mask = edit.region((32, 32), (7, 8, 9, 9))
    assert edit.mask_to_positions(mask, 4).view(4, 4).nonzero().tolist() == [[1, 0], [1, 1]]
    assert edit.mask_to_positions(edit.region((1024, 1024), (1023, 0, 1024, 1)), 4).nonzero().tolist() == [[3]]
    whole = edit.region((64, 32), (0, 0, 64, 32))
    assert edit.mask_to_positions(whole, 4).all()
    assert not edit.mask_to_positions(edit.region((64, 32), (0, 0, 16, 32)), 4).any()  # cut off with the picture's sides
    assert not edit.mask_to_positions(Image.new("RGB", (8, 8), "red"), 4).any()        # red is not white
    for box in ((0, 0, 0, 5), (5, 5, 2, 9), (0, 0, 33, 2), (-1, 0, 2, 2)):
        with pytest.raises(ValueError, match="region"):
            edit.region((32, 32), box)


def test_the_centre_is_the_papers():
    rows = edit.centre_positions(16).view(16, 16).nonzero()
    assert rows.min() == 4 and rows.max() == 11 and len(rows) == 64
    assert edit.centre_positions(4).sum() == 4


def test_a_share_is_another_choice_in_every_row():
    places = edit.random_positions(16, 0.5, 50, torch.Generator().manual_seed(0))
    assert (places.sum(1) == 8).all() and len(set(map(tuple, places.tolist()))) > 40
    assert (edit.random_positions(16, 0.01, 3, torch.Generator()).sum(1) == 1).all()


def test_blending_changes_nothing_far_from_what_is_new_and_all_within():
    original, painted = np.full((1, 256, 256, 3), 200, np.uint8), np.zeros((1, 256, 256, 3), np.uint8)
    mixed = edit.blend(original[0], painted, edit.centre_positions(16)[None])
    assert (mixed[0, :5] == 200).all() and (mixed[0, 126:130, 126:130] < 2).all()
    assert 80 < mixed[0, 64, 128, 0] < 120 and (np.diff(mixed[0, :128, 128, 0].astype(int)) <= 0).all()
    nothing = torch.zeros(1, 256, dtype=torch.bool)
    assert np.array_equal(edit.blend(original[0], painted, nothing), original)
    assert np.array_equal(edit.blend(original[0], painted, ~nothing), painted)


def test_masked_texts():
    bpe = BPE.train(["a red circle"] * 3, 40)
    words = [len(bpe.encode(word)) for word in ("a", "circle on")]
    tokens, length, to_fill = edit.read_masked_text("a [MASK] circle on [MASK:3]", bpe, 30)
    assert length == sum(words) + 1 + 3 + 1 and len(tokens) == 30
    assert to_fill.nonzero().flatten().tolist() == [words[0], *range(sum(words) + 1, sum(words) + 4)]
    assert tokens[length - 1] == bpe.end
    assert bpe.decode(tokens[:length][~to_fill[:length]].tolist()[:-1]) == "a circle on"
    for text, match in (("a circle", "no .MASK."), ("[MASK:0]", "write .MASK."), ("[MASK:30]", "31 tokens")):
        with pytest.raises(ValueError, match=match):
            edit.read_masked_text(text, bpe, 30)


def test_the_middle_words_are_the_papers():
    """n // 2 places from n // 2 - (n // 2) // 2 on, the end token not counted."""
    hidden = edit.centre_words(torch.tensor([1, 2, 3, 9, 16]), 20)
    assert [row.nonzero().flatten().tolist() for row in hidden] == [[], [], [1], [2, 3, 4, 5], [4, 5, 6, 7, 8, 9, 10]]


def test_where_a_word_stands():
    bpe = BPE.train(["a red circle above a blue square"] * 3, 40)
    prompt = "a red circle above a blue square"
    places = edit.word_positions(bpe, prompt, "blue")
    assert bpe.decode([bpe.encode(prompt)[i] for i in places]).strip() == "blue"
    assert edit.word_positions(bpe, "a busy Bus", "bus").start == len(bpe.encode("a busy"))
    for word in ("green", "cle", "", " "):
        with pytest.raises(ValueError, match="is no word of"):
            edit.word_positions(bpe, prompt, word)
