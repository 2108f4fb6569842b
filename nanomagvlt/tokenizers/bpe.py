"""Chapter 9 - Byte-pair encoding: text <-> tokens (section 4.1).

Encoding starts from single bytes and merges neighbours: the pairs that were most frequent in training first. So a
frequent word becomes one token, a rare word several, and no word is unknown. MAGVLT uses CLIP's vocabulary of 49,408
ids, and at most 64 tokens per caption. During training a tenth of the possible merges is dropped at random (appendix A:
BPE dropout 0.1), so the model sees several splits of the same word.

`split_clip` cuts a text into words, `merge` is the algorithm, `BPE.train` finds the merges; all three are shown by
`python -m nanomagvlt.tokenizers.bpe`. Read on in data/shapes.py.
"""
import gzip
import heapq
import html
import random
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import lru_cache, partial
from pathlib import Path

import ftfy
import regex

from nanomagvlt.io import whole

START, END, END_OF_WORD = "<|startoftext|>", "<|endoftext|>", "</w>"
CLIP_MERGES = 49_408 - 512 - 2     # CLIP's own file lists 262,144 merges; CLIP uses the first 48,894

# GPT-2's table: a printable character for each of the 256 bytes, so that merges can be stored as text.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [b for b in range(256) if b not in VISIBLE]             # blanks and controls become characters 256, 257, ...
BYTE_TO_SYMBOL = {b: chr(b) for b in VISIBLE} | {b: chr(256 + i) for i, b in enumerate(HIDDEN)}
SYMBOL_TO_BYTE = {s: b for b, s in BYTE_TO_SYMBOL.items()} | {" ": 32}   # " ": the end of a word, decoded

SPECIAL = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
CLIP_WORDS = regex.compile(SPECIAL + r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
# CLIP cuts Hindi, Thai and Tamil words at their vowel signs. Merges trained here keep signs and joiners with letters.
WORDS = regex.compile(SPECIAL + r"|\p{L}[\p{L}\p{M}\u200c\u200d]*|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


def clean(text: str) -> str:
    """CLIP's cleaning: repairs broken encodings, resolves HTML entities, collapses blanks, converts to lower case."""
    if not (text.isascii() and text.isprintable() and "&" not in text):    # a shortcut: ftfy is slow
        text = html.unescape(html.unescape(ftfy.fix_text(text)))           # twice: "&amp;amp;" is common on the web
    return regex.sub(r"\s+", " ", text).strip().lower()


def split_clip(text: str, words: regex.Pattern = CLIP_WORDS) -> list[str]:
    """CLIP's words: letters together, each digit alone, other characters together. One symbol per byte."""
    return ["".join(BYTE_TO_SYMBOL[b] for b in word.encode("utf-8", errors="replace"))  # a lone surrogate becomes "?"
            for word in words.findall(clean(text))]


RELEASE_REMOVED = regex.compile(r"[^\P{C}\t\n\r]|\ufffd")       # control characters, but not tab and line ends
RELEASE_WORDS = regex.compile(r"[\p{P}$+<=>^`|~]|[^\s\p{P}$+<=>^`|~]+")


def split_release(text: str) -> list[str]:
    """The words of the authors' release, which the published weights need. They are not CLIP's.

    The release has CLIP's merges, but splits as BERT does (each punctuation mark alone, digits together, no repairs),
    and looks up characters where CLIP looks up bytes: "é" is known, because it is the symbol of byte 233, "€" is not.
    One unknown character causes the removal of all characters that are not ASCII.
    """
    words = RELEASE_WORDS.findall(RELEASE_REMOVED.sub("", text).lower())
    if all(character in SYMBOL_TO_BYTE for word in words for character in word):
        return words
    return split_release(text.encode("ascii", errors="ignore").decode())


SPLITS = {"clip": split_clip, "own": partial(split_clip, words=WORDS), "release": split_release}


def clean_caption(text: str) -> str:
    """The clean-up of a caption in the authors' data sets, before BPE. Their sampling does not clean prompts."""
    text = text.lower().lstrip(",.!?*#:;~").replace("-", " ").replace("/", " ")
    text = text.replace("<person>", "person").replace("< person >", "person")
    return re.sub(r"\s{2,}", " ", text).rstrip("\n")                   # a blank may remain at either end


def to_symbols(word: str) -> list[str]:
    """The symbols of a word. The last one is marked: "cat" and the "cat" of "catalogue" are different tokens."""
    return [*word[:-1], word[-1] + END_OF_WORD]


def merge(symbols: list[str], ranks: dict[tuple[str, str], int], dropout: float = 0.0,
          rng: random.Random | None = None) -> list[str]:
    """Applies the merge of lowest rank, the leftmost first, until no merge is possible.

    BPE dropout (Provilkov et al. 2020, algorithm 1): at each step each possible merge is dropped with probability p,
    and the best of the others is applied; the word is finished if all are dropped. Only the drops of merges better than
    the applied one matter, so merges are tried best first until one is kept. The dropped ones return at the next step.
    """
    n, symbols = len(symbols), [*symbols, ""]                       # "", at n and -1, ends the list: no merge has it
    left, right, heap = [*range(-1, n)], [*range(1, n + 1), n], []  # a linked list and a heap: O(n log n) in total

    def push(i: int) -> None:
        if (rank := ranks.get((symbols[i], symbols[right[i]]))) is not None:
            heapq.heappush(heap, (rank, i))

    for i in range(n):
        push(i)
    dropped = []
    while heap:
        rank, i = entry = heapq.heappop(heap)
        j = right[i]
        if ranks.get((symbols[i], symbols[j])) != rank:             # out of date: a neighbour has changed
            continue
        if dropout > 0 and rng.random() < dropout:
            dropped.append(entry)
            continue
        symbols[i], symbols[j] = symbols[i] + symbols[j], ""
        right[i], left[right[j]] = right[j], i
        while dropped:
            heapq.heappush(heap, dropped.pop())
        push(left[i])
        push(i)
    return [symbol for symbol in symbols if symbol]


class BPE:
    """Ids in order: 256 bytes, the same 256 at the end of a word, one per merge, <|startoftext|>, <|endoftext|>."""

    def __init__(self, merges: list[tuple[str, str]], words: str = "clip"):
        """`words`: how texts are split, a key of SPLITS. Raises ValueError for merges that do not fit together."""
        if words not in SPLITS:
            raise ValueError(f"words={words!r} is none of {', '.join(SPLITS)}")
        self.merges, self.words, self.split = merges, words, SPLITS[words]
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        pieces = {s: s for s in BYTE_TO_SYMBOL.values()}         # symbol -> the text that it decodes to
        pieces |= {s + END_OF_WORD: s + " " for s in pieces}
        for number, pair in enumerate(merges, 1):
            if len(pair) != 2 or not pieces.keys() >= set(pair) or "".join(pair) in pieces:
                raise ValueError(f"merge {number}, {' '.join(pair)!r}, must join two earlier symbols into a new one")
            pieces["".join(pair)] = "".join(pieces[symbol] for symbol in pair)
        pieces |= {START: "", END: ""}
        self.ids = {symbol: i for i, symbol in enumerate(pieces)}
        self.pieces = list(pieces.values())
        self.vocab_size, self.end = len(pieces), self.ids[END]
        self.cached_word = lru_cache(maxsize=65_536)(self.encode_word)  # a few thousand words make up most captions

    @classmethod
    def train(cls, texts: Iterable[str], num_merges: int) -> "BPE":
        """Merges the most frequent pair, of equal ones the first in order, up to num_merges times."""
        words = Counter(word for text in texts for word in SPLITS["own"](text) if word not in (START, END))
        splits, sizes = [to_symbols(word) for word in words], list(words.values())
        merges, counts, found_in = [], Counter(), defaultdict(set)  # a pair's frequency, and the words that have it

        def count(k: int, size: int):
            for pair in zip(splits[k], splits[k][1:]):
                counts[pair] += size
                found_in[pair].add(k)
                if counts[pair] == 0:
                    del counts[pair], found_in[pair]

        for k, size in enumerate(sizes):
            count(k, size)
        while len(merges) < num_merges and counts:
            most = max(counts.values())
            best = min(pair for pair, times in counts.items() if times == most)
            merges.append(best)
            for k in list(found_in[best]):                   # only the words with this pair are counted again
                count(k, -sizes[k])
                splits[k] = merge(splits[k], {best: 0})
                count(k, sizes[k])
        return cls(merges, "own")

    def encode(self, text: str, dropout: float = 0.0, rng: random.Random | None = None) -> list[int]:
        """The ids of any text, without start and end token. Dropout, for training, draws from `rng` alone. Except for
        the release's words, "<|endoftext|>" in the text becomes the end token, as in CLIP."""
        encode_word = self.cached_word if dropout == 0 else lambda word: self.encode_word(word, dropout, rng)
        return [i for word in self.split(text) for i in encode_word(word)]

    def encode_word(self, word: str, dropout: float = 0.0, rng: random.Random | None = None) -> list[int]:
        """The ids of one word, as self.split() gives them."""
        symbols = [word] if word in (START, END) else merge(to_symbols(word), self.ranks, dropout, rng)
        return [self.ids[symbol] for symbol in symbols]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, U+FFFD for invalid UTF-8, nothing for special tokens: cut at the end token first."""
        text = "".join(self.pieces[i] for i in ids)
        if self.words != "release":
            text = bytes(SYMBOL_TO_BYTE[s] for s in text).decode("utf-8", errors="replace")
        return text.strip()

    def pad(self, ids: list[int], length: int) -> tuple[list[int], int]:
        """Exactly `length` ids, padded with end tokens, and the length of the caption, which includes one end token.
        A caption of `length` ids or more is cut and has no end token, as in the release."""
        return (ids + [self.end] * length)[:length], min(len(ids) + 1, length)

    def to_text(self) -> str:
        """The content of a merges file: a header, then one merge per line."""
        header = f"#version: 0.2 nanomagvlt words={self.words} merges={len(self.merges)}"
        return "\n".join([header, *map(" ".join, self.merges)]) + "\n"

    @classmethod
    def from_text(cls, text: str, words: str | None = None) -> "BPE":
        """Reads the content of a merges file, ours or CLIP's own. `words` replaces the header's (by default "clip").
        Raises ValueError if merges are missing or malformed."""
        header, *lines = text.rstrip("\n").split("\n")
        fields = {"merges": str(len(lines)), "words": "clip"} | dict(re.findall(r"\b(words|merges)=(\w+)", header))
        if "bpe_simple_vocab_16e6" in header:
            lines, fields["merges"] = lines[:CLIP_MERGES], str(CLIP_MERGES)
        if "#version" not in header or fields["merges"] != str(len(lines)):
            raise ValueError(f"not a complete list of BPE merges: {len(lines)} lines after {header[:60]!r}")
        return cls([tuple(line.split()) for line in lines], words or fields["words"])

    def save(self, path: str | Path) -> None:
        """Writes a merges file, whole or not at all."""
        with whole(Path(path)) as file:
            file.write(self.to_text().encode("utf-8"))

    @classmethod
    def load(cls, path: str | Path, words: str | None = None) -> "BPE":
        """Reads a file of save(), or CLIP's bpe_simple_vocab_16e6.txt.gz. Raises ValueError for another file."""
        data = Path(path).read_bytes()
        try:
            text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
            return cls.from_text(text, words)
        except (gzip.BadGzipFile, EOFError, zlib.error, ValueError) as error:  # ValueError: also if it is not UTF-8
            raise ValueError(f"{path}: {error}") from None


if __name__ == "__main__":
    corpus = ["A red circle above a blue circle.", "A big red square.", "The redder the circle, the better!"]
    bpe = BPE.train(corpus, num_merges=20)
    for rank, (a, b) in enumerate(bpe.merges):
        print(f"merge {rank + 1:2d}: {a:>8} + {b:<8} -> id {512 + rank}  {a + b}")
    caption, rng, names = "The reddest circle above", random.Random(1), list(bpe.ids)
    print(f"\n{caption!r} with {bpe.vocab_size} ids, the last of them {END}")
    for dropout in (0.0, 0.1, 0.1, 0.5, 1.0):
        tokens = bpe.encode(caption, dropout, rng)
        print(f"dropout {dropout}: {len(tokens):2d} tokens  {' '.join(names[i] for i in tokens)}")
    print("padded:", *bpe.pad(bpe.encode(caption), 12), "decoded:", bpe.decode(bpe.encode(caption)))
