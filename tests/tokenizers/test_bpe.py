"""Text <-> tokens, against CLIP's own ids, the release's ids, a case worked by hand, and slower oracles."""
import gzip
import json
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from nanomagvlt.sequence import SEPARATOR
from nanomagvlt.tokenizers.bpe import (BPE, CLIP_MERGES, END, START, clean, clean_caption, merge,
                                       to_symbols)

CAPTIONS = ["A red circle above a blue circle.", "A big red square.", "The redder the circle, the better!"]


@pytest.fixture(scope="module")
def small() -> BPE:
    return BPE.train(CAPTIONS, 40)


def test_training_and_encoding_equal_a_case_worked_by_hand():
    # Wikipedia's aaabdaaabac as one word, so its last symbol is "c</w>". First (a, a), 4 times with overlaps.
    #   (a, a)       [aa] a b d [aa] a b a c</w>    (a, b) and (aa, a) twice; "a" sorts before "aa"
    #   (a, b)       [aa] [ab] d [aa] [ab] a c</w>  (aa, ab) twice
    #   (aa, ab)     [aaab] d [aaab] a c</w>        all pairs once; the first in order is (a, c</w>)
    #   (a, c</w>)   [aaab] d [aaab] [ac</w>]       all pairs once; (aaab, ac</w>) sorts before (aaab, d)
    bpe = BPE.train(["aaabdaaabac"], 5)
    assert bpe.merges == [("a", "a"), ("a", "b"), ("aa", "ab"), ("a", "c</w>"), ("aaab", "ac</w>")]
    a, b, c, d = range(ord("a") - 33, ord("e") - 33)                     # byte symbols are numbered from "!"
    assert bpe.encode(" AAABdaaabac\n") == [514, d, 516]
    assert bpe.encode("aaab aaaac") == [512, a, 256 + b, 512, 512, 256 + c]
    assert (bpe.vocab_size, bpe.end, bpe.decode([514, d, 516, 518, 518])) == (519, 518, "aaabdaaabac")


def slow_merge(symbols: list[str], ranks: dict) -> list[str]:
    """The best merge again and again, each time sought among all pairs."""
    while found := [(ranks[pair], i) for i, pair in enumerate(zip(symbols, symbols[1:])) if pair in ranks]:
        _, i = min(found)
        symbols = [*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2:]]
    return symbols


def test_training_and_merging_equal_slow_versions():
    assert BPE.train(CAPTIONS, 30).merges == BPE.train(reversed(CAPTIONS), 30).merges
    assert BPE.train(["ab ab", END], 100).merges == [("a", "b</w>")] and BPE.train([], 9).vocab_size == 514
    rng = random.Random(0)
    for _ in range(100):
        text = " ".join("".join(rng.choices("ab", k=rng.randint(1, 12))) for _ in range(6))
        words, ranks = [to_symbols(word) for word in text.split()], {}
        while counts := Counter(pair for word in words for pair in zip(word, word[1:])):
            best = min(counts, key=lambda pair: (-counts[pair], pair))
            words, ranks[best] = [slow_merge(word, {best: 0}) for word in words], len(ranks)
        assert BPE.train([text], 1000).merges == list(ranks)
        word = to_symbols("".join(rng.choices("ab", k=40)))
        assert merge(word, ranks) == slow_merge(word, ranks)


def exact(symbols: tuple, ranks: dict, p: float) -> Counter:
    """The probability of each result of algorithm 1 of Provilkov et al., by trying all ways to drop merges."""
    found = sorted((ranks[pair], i) for i, pair in enumerate(zip(symbols, symbols[1:])) if pair in ranks)
    results = Counter({symbols: p ** len(found)})
    for better, (_, i) in enumerate(found):                          # applied if it is kept and all better ones dropped
        merged = (*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2:])
        for result, probability in exact(merged, ranks, p).items():
            results[result] += p ** better * (1 - p) * probability
    return results


def test_dropout_is_distributed_as_in_its_paper():
    ranks, rng, n, p = {("a", "a"): 0, ("aa", "aa"): 1, ("a", "b</w>"): 2}, random.Random(3), 20_000, 0.3
    expected = exact(tuple(to_symbols("aaaaab")), ranks, p)
    drawn = Counter(tuple(merge(to_symbols("aaaaab"), ranks, p, rng)) for _ in range(n))
    for result in drawn | expected:
        q = expected[result]
        assert abs(drawn[result] / n - q) < 5 * (q * (1 - q) / n) ** 0.5 + 1e-9


def test_dropout_draws_from_its_generator_alone_and_keeps_the_text(small):
    text = "The reddest circle above, <|endoftext|> better than 8 squares: café"
    plain, characters = small.encode(text), small.encode(text, 1.0, random.Random(2))
    assert all(i < 512 or i == small.end for i in characters)                        # a special token is not split
    draws, again = ([small.encode(text, 0.3, random.Random(seed)) for seed in range(50)] for _ in range(2))
    assert draws == again and len({tuple(ids) for ids in draws}) > 25
    assert {small.decode(ids) for ids in draws} == {small.decode(plain)}
    assert small.encode(text) == plain                                               # no draw is in the cache


def test_any_text_is_encoded_and_decoded(small):
    rng, release = random.Random(4), BPE(small.merges, "release")
    ranges = [(0, 0x80), (0, 0x250), (0x2000, 0x2100), (0xd7f0, 0xe010), (0, 0x110000)]      # with lone surrogates
    texts = ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randint(0, 12))) for _ in range(2000)]
    for text in [*texts, "\ud800", "&#xD800;", "\x00", "</w>", "a</w>b", "Ġ"]:
        expected = clean(text).replace(START, "").replace(END, "").encode("utf-8", "replace").decode()
        assert small.decode(small.encode(text)).replace(" ", "") == expected.replace(" ", "")
        release.decode(release.encode(text))
    assert small.decode([SEPARATOR]) == "|"                              # between the captions of MixSel


def test_padding_adds_end_tokens_if_there_is_space(small):
    assert small.pad([], 4) == ([small.end] * 4, 1)
    assert small.pad([7, 8, 9], 4) == ([7, 8, 9, small.end], 4)           # the end token just fits
    assert small.pad([5, 6, 7, 8], 4) == ([5, 6, 7, 8], 4)               # it does not fit
    assert small.pad([5, 6, 7, 8, 9], 4) == ([5, 6, 7, 8], 4)


@pytest.mark.parametrize("words", ["clip", "release"])
def test_a_saved_file_gives_the_same_tokenizer(small, tmp_path, words):
    bpe = BPE(small.merges, words)
    bpe.save(tmp_path / "bpe.txt")
    same = BPE.load(tmp_path / "bpe.txt")
    assert (same.merges, same.words, same.ids) == (bpe.merges, words, bpe.ids)


def test_broken_files_are_refused(small, tmp_path):
    text = small.to_text()
    packed = gzip.compress(text.encode())
    for data in (b"", b"\xff\xfe", packed[:-9], packed[:20] + b"\0\0\0\0" + packed[24:], text.encode()[:-10], b"a b\n",
                 b"#version\na b c\n", b"#version\n\na b\n", b"#version\nab c\n", b"#version\na b\na b\n",
                 b"#version words=latin\na b\n", b"bpe_simple_vocab_16e6.txt#version: 0.2\na b\n"):
        (tmp_path / "broken.txt").write_bytes(data)
        with pytest.raises(ValueError, match=r"broken\.txt") as error:
            BPE.load(tmp_path / "broken.txt")
        assert "\n" not in str(error.value)


def test_a_very_long_word_is_encoded_in_a_second():
    bpe = BPE.train(["a" * 64 + " " + "ab" * 64], 20)
    began = time.perf_counter()
    assert bpe.decode(bpe.encode("a" * 10_000)) == "a" * 10_000
    bpe.encode("ab" * 5_000, 0.1, random.Random(5))
    assert time.perf_counter() - began < 1


def golden(shared: Path, name: str, words: str | None) -> tuple[BPE, list[dict]]:
    folder = shared / "data" / "clip"
    rows = [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").split("\n") if line]
    assert len(rows) == 1960
    return BPE.load(folder / "bpe_simple_vocab_16e6.txt.gz", words), rows


def test_ids_equal_those_of_clip(shared):
    bpe, rows = golden(shared, "clip_tokens_golden.jsonl", None)
    assert (len(bpe.merges), bpe.vocab_size, bpe.end) == (CLIP_MERGES, 49_408, 49_407)
    for row in rows:
        assert (clean(row["text"]), bpe.encode(row["text"])) == (row["clean"], row["ids"]), row
        assert bpe.decode(row["ids"]) == row["decoded"].replace(START, "").replace(END, "").strip(), row


def test_ids_equal_those_of_the_release(shared):
    bpe, rows = golden(shared, "release_tokens_golden.jsonl", "release")
    assert bpe.encode("2016's") == [17, 15, 16, 277, 262, 338]
    for row in rows:
        ids, n = bpe.pad(bpe.encode(row["text"]), 64)
        assert (ids[:n], n, clean_caption(row["text"])) == (row["ids"], min(row["n"], 64), row["caption_clean"]), row


def test_captions_are_cleaned_as_in_the_release():
    assert clean_caption("?!A <person>  on-site and/or < PERSON > \n\n") == "a person on site and or person "
