"""Chapter 8 - text <-> tokens.

A caption becomes numbers by byte-pair encoding: start from single bytes and glue neighbours together, in the
order in which training found the pairs most frequent. What is common ends as one token, what is rare as
several, nothing is unknown. MAGVLT (section 4.1) takes CLIP's tokens, 49,408 ids, at most 64 to a caption; in
training a tenth of the merges is left out at random (appendix A: BPE dropout 0.1), so that the model sees one
word cut in many ways.

How to read on: `split_clip` cuts a text into words, `merge` is the algorithm, `BPE.train` finds the merges.
`python -m nanomagvlt.bpe` shows all three at work. Then read on in argvlt.py.
"""
import gzip
import heapq
import html
import random
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import ftfy
import regex

from nanomagvlt.io import whole

START, END, END_OF_WORD = "<|startoftext|>", "<|endoftext|>", "</w>"
CLIP_MERGES = 49_408 - 512 - 2     # CLIP's own file lists 262,144 merges, of which CLIP uses these first ones
CACHE_SIZE = 65_536                # words remembered; real captions repeat a few thousand words endlessly


def bytes_to_symbols() -> dict[int, str]:
    """A visible character for each of the 256 bytes (GPT-2's table), so that merges fit a text file."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]             # blanks and controls: 256, 257, ...
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


BYTE_TO_SYMBOL = bytes_to_symbols()
SYMBOL_TO_BYTE = {s: b for b, s in BYTE_TO_SYMBOL.items()} | {" ": 32}   # " ": a word's end, decoded


# ---- cutting a text into words: CLIP's way, and the MAGVLT release's --------------------------------------

CLIP_WORDS = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
                           r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


def clean(text: str) -> str:
    """CLIP's cleaning: broken encodings mended, HTML entities resolved, white space collapsed, lower case."""
    nothing_to_mend = text.isascii() and text.isprintable() and "&" not in text   # most captions; ftfy is slow
    if not nothing_to_mend:
        text = html.unescape(html.unescape(ftfy.fix_text(text)))            # twice: "&amp;amp;" is common on the web
    return regex.sub(r"\s+", " ", text).strip().lower()


def split_clip(text: str) -> list[str]:
    """CLIP's words: letters together, each digit alone, other marks together. One symbol per byte."""
    # "replace": a lone surrogate has no bytes, and a question mark is better than a crash
    return ["".join(BYTE_TO_SYMBOL[b] for b in word.encode("utf-8", errors="replace"))
            for word in CLIP_WORDS.findall(clean(text))]


RELEASE_REMOVED = regex.compile(r"[^\P{C}\t\n\r]|\ufffd")       # controls, save three that are blanks
RELEASE_WORDS = regex.compile(r"[\p{P}$+<=>^`|~]|[^\s\p{P}$+<=>^`|~]+")


def split_release(text: str) -> list[str]:
    """The words of the authors' release, which the published weights expect. Not CLIP's.

    CLIP's merges, but cut as BERT does (each punctuation mark alone, digits together, nothing mended), and
    with characters looked up where CLIP looks up bytes. So an e acute, by chance the symbol of byte 233, is
    known, a euro sign is not; and one unknown character removes all that is not ASCII from the text.
    """
    words = RELEASE_WORDS.findall(RELEASE_REMOVED.sub("", text).lower())
    if all(character in SYMBOL_TO_BYTE for word in words for character in word):
        return words
    return split_release(text.encode("ascii", errors="ignore").decode())


SPLITTERS = {"clip": split_clip, "release": split_release}


def clean_caption(text: str) -> str:
    """What the authors' data sets do to a caption before BPE; their sampling leaves prompts as they are."""
    text = text.lower().lstrip(",.!?*#:;~").replace("-", " ").replace("/", " ")
    text = text.replace("<person>", "person").replace("< person >", "person")
    return re.sub(r"\s{2,}", " ", text).rstrip("\n")                   # a blank may stay at either end


def clean_written(text: str) -> str:
    """What the authors' release may do to a caption that was generated: its first sentence, without stutter.

    clean_caption(), then < and > go, all from the first full stop on, and each word that repeats the one before;
    " ." ends it. A text in which nothing is left stays empty.
    """
    words = clean_caption(text).replace("<", "").replace(">", "").split(".")[0].split()
    words = [word for word, before in zip(words, ["", *words]) if word != before]
    return " ".join([*words, "."]) if words else ""


# ---- byte-pair encoding ------------------------------------------------------------------------------------

def to_symbols(word: str) -> list[str]:
    """The last symbol carries the word's end: "cat" and the "cat" of "catalogue" are different tokens."""
    return [*word[:-1], word[-1] + END_OF_WORD]


def merge(symbols: list[str], ranks: dict[tuple[str, str], int], dropout: float = 0.0,
          rng: random.Random | None = None) -> list[str]:
    """Do the merge of lowest rank, leftmost first, until none is left.

    BPE dropout (Provilkov et al. 2020, algorithm 1): at every step each possible merge is dropped with
    probability p, and the best of the others is done; all dropped at once ends the word. Only merges better
    than the one done matter, so coins are tossed best first until one survives. The dropped then come back.
    """
    n, symbols = len(symbols), [*symbols, ""]                    # "" closes the list: no merge knows it
    left, right = list(range(-1, n)), list(range(1, n + 2))      # a linked list and a heap: O(n log n) in all

    def candidate(i: int) -> list[tuple[int, int]]:
        rank = ranks.get((symbols[i], symbols[right[i]])) if i >= 0 else None
        return [] if rank is None else [(rank, i)]

    heap = sorted(entry for i in range(n) for entry in candidate(i))
    dropped = []
    while heap:
        entry = heapq.heappop(heap)
        i = entry[1]
        if not symbols[i] or candidate(i) != [entry]:            # out of date: a neighbour was merged since
            continue
        if dropout > 0 and rng.random() < dropout:
            dropped.append(entry)
            continue
        j = right[i]
        symbols[i], symbols[j] = symbols[i] + symbols[j], ""
        right[i] = right[j]
        left[right[i]] = i
        for entry in [*dropped, *candidate(left[i]), *candidate(i)]:
            heapq.heappush(heap, entry)
        dropped = []
    return [symbol for symbol in symbols if symbol]


class BPE:
    """Ids in order: 256 bytes, the same 256 ending a word, one per merge, <|startoftext|>, <|endoftext|>."""

    def __init__(self, merges: list[tuple[str, str]], words: str = "clip"):
        if words not in SPLITTERS:
            raise ValueError(f"words={words!r}: choose one of {', '.join(SPLITTERS)}")
        self.merges, self.words = [(a, b) for a, b in merges], words
        self.ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        pieces = {s: s for s in BYTE_TO_SYMBOL.values()}         # symbol -> what it decodes to
        pieces |= {s + END_OF_WORD: s + " " for s in pieces}
        for number, (a, b) in enumerate(self.merges, 1):
            if a not in pieces or b not in pieces or a + b in pieces:
                raise ValueError(f"merge {number}, {a!r} {b!r}, must join two earlier symbols into a new one")
            pieces[a + b] = pieces[a] + pieces[b]
        pieces |= {START: "", END: ""}
        self.ids = {symbol: i for i, symbol in enumerate(pieces)}
        self.pieces = list(pieces.values())
        self.vocab_size, self.end = len(pieces), self.ids[END]
        self.cache = {START: [self.ids[START]], END: [self.end]}

    @classmethod
    def train(cls, texts: Iterable[str], num_merges: int) -> "BPE":
        """Merge the most frequent pair, of equals the first in order, again and again while there is one."""
        words = Counter(word for text in texts for word in split_clip(text) if word not in (START, END))
        splits, sizes = [to_symbols(word) for word in words], list(words.values())
        counts, where = Counter(), defaultdict(set)              # of a pair: how often, in which unique words

        def count(k: int, size: int):
            for pair in zip(splits[k], splits[k][1:]):
                counts[pair] += size
                where[pair].add(k)
                if counts[pair] == 0:
                    del counts[pair], where[pair]

        merges = []
        for k, size in enumerate(sizes):
            count(k, size)
        while len(merges) < num_merges and counts:
            most = max(counts.values())
            best = min(pair for pair, times in counts.items() if times == most)
            merges.append(best)
            for k in list(where[best]):                      # only words that hold the pair are counted anew
                count(k, -sizes[k])
                splits[k] = merge(splits[k], {best: 0})
                count(k, sizes[k])
        return cls(merges)

    def encode(self, text: str, dropout: float = 0.0, rng: random.Random | None = None) -> list[int]:
        """Ids of any text, without start or end. Dropout, for training, takes its chance from `rng` alone.

        With words="clip" a special token written out in the text becomes that token, as in CLIP."""
        if not 0 <= dropout <= 1 or (dropout > 0 and rng is None):
            raise ValueError(f"dropout={dropout} must be a probability and, above 0, come with a rng")
        return [i for word in SPLITTERS[self.words](text) for i in self._encode_word(word, dropout, rng)]

    def _encode_word(self, word: str, dropout: float, rng: random.Random | None) -> list[int]:
        if word in self.cache and (dropout == 0 or word in (START, END)):
            return self.cache[word]
        ids = [self.ids[symbol] for symbol in merge(to_symbols(word), self.ranks, dropout, rng)]
        if dropout == 0 and len(self.cache) < CACHE_SIZE:
            self.cache[word] = ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text; special tokens vanish (so cut at the end token first), broken utf-8 becomes U+FFFD."""
        ids = list(ids)
        if bad := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"id {bad[0]} is not in the vocabulary of {self.vocab_size}")
        text = "".join(self.pieces[i] for i in ids)
        if self.words == "clip":
            text = bytes(SYMBOL_TO_BYTE[s] for s in text).decode("utf-8", errors="replace")
        return text.strip()

    def pad(self, ids: list[int], length: int) -> tuple[list[int], int]:
        """Exactly `length` ids, end tokens after the caption, and the caption's length, counting one of them.

        A caption of `length` or more is cut and then has no end token, as in the release."""
        return (ids + [self.end] * length)[:length], min(len(ids) + 1, length)

    def to_text(self) -> str:
        header = f"#version: 0.2 nanomagvlt words={self.words} merges={len(self.merges)}"
        return "\n".join([header, *map(" ".join, self.merges)]) + "\n"

    @classmethod
    def from_text(cls, text: str, words: str | None = None) -> "BPE":
        """A first line with a version, then one merge a line: all of them, but of CLIP's own file the 48,894
        that CLIP uses. `words` is what the first line says, else "clip"; an argument overrides it."""
        header, *lines = text.rstrip("\n").split("\n")
        said = dict(re.findall(r"\b(words|merges)=(\w+)", header))
        if "bpe_simple_vocab_16e6" in header:
            lines, said = lines[:CLIP_MERGES], {"merges": str(CLIP_MERGES)}
        if "#version" not in header or said.get("merges", str(len(lines))) != str(len(lines)):
            raise ValueError(f"no whole list of BPE merges: {len(lines)} lines after {header[:60]!r}")
        merges = [tuple(line.split()) for line in lines]
        if bad := [number for number, pair in enumerate(merges, 2) if len(pair) != 2]:
            raise ValueError(f"line {bad[0]} is not two symbols with a blank between them")
        return cls(merges, words or said.get("words", "clip"))

    def save(self, path: str | Path) -> None:
        """Plain text, or gzip where the name ends in .gz. Whole or not at all."""
        path, data = Path(path), self.to_text().encode("utf-8")
        with whole(path) as file:
            file.write(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)

    @classmethod
    def load(cls, path: str | Path, words: str | None = None) -> "BPE":
        """What `save` wrote, or CLIP's bpe_simple_vocab_16e6.txt.gz; `words` as for `from_text`."""
        data = Path(path).read_bytes()
        try:
            text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
            return cls.from_text(text, words)
        except (gzip.BadGzipFile, EOFError, zlib.error, ValueError) as error:  # ValueError: not utf-8, too
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
