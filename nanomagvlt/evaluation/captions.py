"""Appendix - How good captions are by the field's measures: BLEU, ROUGE-L and CIDEr-D; METEOR and SPICE through Java.

All of them ask how much of a caption stands in what people wrote about the same image, its references. BLEU counts
shared n-grams (Papineni et al., ACL 2002), ROUGE-L takes the longest common subsequence (Lin, 2004), CIDEr compares
n-grams weighted by how much they tell (Vedantam et al., CVPR 2015). Numbers can be compared with published ones only
if every detail is that of pycocoevalcap, by which they are computed, so here they are, odd ones included.

What is counted is words as the Penn Treebank has them ("don't" is two): pycocoevalcap lets Stanford's Java tokenizer
cut them. tokenize() does the same in its manner: equal on COCO's captions, not on every web address or smiley.
"""
import importlib
import importlib.util
import math
import shutil
from collections import Counter
from collections.abc import Callable, Hashable
from pathlib import Path

import regex

from nanomagvlt.io import write_json

# ---- words --------------------------------------------------------------------------------------------------

CURLY = str.maketrans("‘’", "''")
CUTS = regex.compile(r"(?<=\w)(?=n't\b|'(?:s|m|d|re|ve|ll)\b)|(?<=\bcan)(?=not\b)")   # do|n't, it|'s, can|not
# The kinds of words, tried in this order. What is none of them is dropped: quotes, dashes, commas, full stops and the
# like, which pycocoevalcap leaves out, and emoji beyond U+FFFF, which the Java program cannot read.
WORDS = regex.compile(r"""
    n't\b | '(?:s|m|d|re|ve|ll|em)\b | '\d0s\b | 'n'                          # what CUTS cut off; '90s; rock 'n' roll
  | (?:\b\p{L}\.)+(?!\w)                                                      # u.s., e.g., j.
  | \b(?:mr|mrs|ms|dr|prof|rev|st|jr|sr|mt|ave|blvd|rd|ft|inc|co|corp|ltd|vs|etc|est|dept|no(?=\.\s*\d))\.
  | \d+(?:[.,:/]\d+)+ | \.\d+\b                                               # 1,000  3.5  10:30  1/2  .5
  | [\p{L}\p{M}\p{N}]+(?:[-/&_][\p{L}\p{M}\p{N}]+ | [.']\p{L}+)*              # word, t-shirt, and/or, o'neil
  | [\#@]\p{L}\w* | [!?]{2,} | \*+                                            # a single ! is dropped, !! is not
  | [^\s.,;:!?'"`“”…–—\-\U00010000-\U0010FFFF]                                # any other sign, one by one
""", regex.VERBOSE)
# PTB's names of brackets. pycocoevalcap drops them in capitals, and by then they are lower case: so they stay.
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}


def tokenize(text: str) -> list[str]:
    """The words of a caption, lower case, without punctuation, as pycocoevalcap's PTBTokenizer gives them."""
    words = WORDS.findall(CUTS.sub(" ", text.translate(CURLY).lower()))
    return [BRACKETS.get(word, word) for word in words]


def count_ngrams(words: list[str]) -> list[Counter]:
    """How often each n-gram occurs, one Counter for each n = 1 to 4."""
    return [Counter(zip(*(words[i:] for i in range(n)))) for n in range(1, 5)]


# ---- scores: candidates are lists of words, references lists of such lists ----------------------------------

def bleu(candidates: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    """BLEU-1 to BLEU-4 of all candidates together; its counts are added up before anything is divided."""
    right, written, length, wanted_length = [0] * 4, [0] * 4, 0, 0
    for words, refs in zip(candidates, references):
        length += len(words)
        wanted_length += min((abs(len(ref) - len(words)), len(ref)) for ref in refs)[1]     # the closest, or shorter
        of_refs = [count_ngrams(ref) for ref in refs]
        for n, counts in enumerate(count_ngrams(words)):
            written[n] += counts.total()
            # An n-gram counts as often as it stands in that reference which has it most often.
            right[n] += sum(min(count, max(ref[n][ngram] for ref in of_refs)) for ngram, count in counts.items())
    # The penalty for brevity: exp(1 - r / c) where c < r. The tiny numbers, pycocoevalcap's, avoid divisions by zero.
    penalty = math.exp(min(0.0, 1 - (wanted_length + 1e-9) / (length + 1e-15)))
    precisions = [(r + 1e-15) / (w + 1e-9) for r, w in zip(right, written)]
    return [penalty * math.prod(precisions[:n]) ** (1 / n) for n in range(1, 5)]            # geometric means


def rouge_l(candidate: list[str], references: list[list[str]], beta: float = 1.2) -> float:
    """ROUGE-L: F_beta of precision and recall, each by the reference for which it is best."""
    common = [longest_common(candidate, ref) for ref in references]
    if not any(common):
        return 0.0
    precision = max(common) / len(candidate)
    recall = max(n / len(ref) for n, ref in zip(common, references))
    return (1 + beta ** 2) * precision * recall / (recall + beta ** 2 * precision)


def longest_common(a: list[str], b: list[str]) -> int:
    """How many words the longest common subsequence has; gaps are allowed. Row by row of the usual table."""
    row = [0] * (len(b) + 1)                                                   # row[j]: of a so far and b[:j]
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            above = row[j]
            row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
            diagonal = above
    return row[-1]


def cider(candidates: list[list[str]], references: list[list[list[str]]], sigma: float = 6.0) -> list[float]:
    """CIDEr-D of each candidate; its average is what is published as CIDEr (sometimes times 100).

    An n-gram weighs log(images / images in whose references it is): "a" next to nothing, "giraffe" much. So scores
    depend on all references that are given, and with one image everything weighs nothing.
    """
    of_refs = [[count_ngrams(ref) for ref in refs] for refs in references]
    seen_in = Counter(ngram for refs in of_refs for n in range(4) for ngram in set().union(*(r[n] for r in refs)))

    def vectors(ngrams: list[Counter]) -> list[tuple[dict, float]]:
        """For each n, the weights count * log(images / seen_in), and their length."""
        weighted = [{ngram: count * math.log(len(references) / max(1, seen_in[ngram]))
                     for ngram, count in counts.items()} for counts in ngrams]
        return [(weights, math.sqrt(sum(w * w for w in weights.values()))) for weights in weighted]

    scores = []
    for words, refs, ngrams in zip(candidates, references, of_refs):
        ours, total = vectors(count_ngrams(words)), 0.0
        for ref, counts in zip(refs, ngrams):
            # The cosine, but repeating a word helps no further than the reference has it (D: min).
            cosines = [sum(min(w, theirs[ngram]) * theirs[ngram] for ngram, w in mine.items() if ngram in theirs)
                       / (my_length * their_length or 1)
                       for (mine, my_length), (theirs, their_length) in zip(ours, vectors(counts))]
            total += sum(cosines) / 4 * math.exp(-(len(words) - len(ref)) ** 2 / (2 * sigma ** 2))
        scores.append(10 * total / len(refs))
    return scores


def score_captions(results: dict[Hashable, str], references: dict[Hashable, list[str]],
                   tokenizer: Callable[[str], list[str]] = tokenize) -> dict[str, float]:
    """Bleu_1 to Bleu_4, ROUGE_L and CIDEr, by pycocoevalcap's names. Both are by image id, and of the same images.

    tokenizer=str.split is for text that is tokenized already. Raises ValueError, one line, as check_captions() does.
    """
    check_captions(results, references)
    candidates = [tokenizer(text) for text in results.values()]
    refs = [[tokenizer(text) for text in references[image]] for image in results]
    for image, texts in zip(results, refs):
        if not all(texts):
            raise ValueError(f"image {image!r}: reference {texts.index([]) + 1} has no words")
    rouges = [rouge_l(*pair) for pair in zip(candidates, refs)]
    return {**{f"Bleu_{n}": value for n, value in enumerate(bleu(candidates, refs), 1)},
            "ROUGE_L": sum(rouges) / len(rouges), "CIDEr": sum(cider(candidates, refs)) / len(candidates)}


def check_captions(results: dict[Hashable, str], references: dict[Hashable, list[str]]) -> None:
    """Raises ValueError, one line, where captions and references are not of the same images, or there are none."""
    if not results:
        raise ValueError("there are no captions to score")
    for images, others, what in ((results, references, "references"), (references, results, "caption")):
        if missing := [image for image in images if image not in others]:
            raise ValueError(f"{len(missing)} of {len(images)} images have no {what}, the first of them {missing[0]!r}")
    for image, texts in references.items():
        if not texts:
            raise ValueError(f"image {image!r} has an empty list of references")


# ---- files, and the metrics that are Java programs ----------------------------------------------------------

def write_results_json(path: str | Path, results: dict[Hashable, str]) -> None:
    """Captions in COCO's results format, which the evaluation server and pycocoevalcap read."""
    write_json(Path(path), [{"image_id": image, "caption": text} for image, text in results.items()])


def java_metrics(results: dict[Hashable, str], references: dict[Hashable, list[str]]) -> tuple[dict[str, float], str]:
    """METEOR and SPICE by pycocoevalcap, and what there is to say: one line where either is missing, else "".

    They are Java programs with dictionaries of their own, and nothing else gives their numbers. They are run if they
    are there, on the words that tokenize() gives, and never needed. Raises ValueError as check_captions() does.
    """
    check_captions(results, references)
    if importlib.util.find_spec("pycocoevalcap") is None or shutil.which("java") is None:
        return {}, ("METEOR and SPICE are not computed: they want Java 1.8 and `pip install pycocoevalcap`; or give "
                    "the file of write_results_json() to a machine that has them")
    scores, failed = {}, []
    ours = {image: [" ".join(tokenize(text))] for image, text in results.items()}
    refs = {image: [" ".join(tokenize(text)) for text in references[image]] for image in results}
    for name in ("Meteor", "Spice"):
        try:
            module = importlib.import_module(f"pycocoevalcap.{name.lower()}.{name.lower()}")
            scores[name.upper()] = float(getattr(module, name)().compute_score(refs, ours)[0])
        except Exception as error:  # no memory, no models, another Java: each fails in its own way, and it is said
            failed.append(f"{name.upper()} ({' '.join(str(error).split())[:100] or type(error).__name__})")
    return scores, f"pycocoevalcap could not compute {' and '.join(failed)}" if failed else ""
