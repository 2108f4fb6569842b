"""The common measures of captions: BLEU, ROUGE-L and CIDEr-D. (METEOR and SPICE are Java programs.)

Each measure compares a caption with its references, which people wrote about the same image:
  BLEU      the n-grams that both have (Papineni et al., ACL 2002)
  ROUGE-L   their longest common subsequence (Lin, 2004)
  CIDEr-D   the n-grams that both have, rare ones with a greater weight (Vedantam et al., CVPR 2015)
Papers publish the numbers of the package pycocoevalcap. So every detail here is as in pycocoevalcap, even the odd ones.

The words are those of the Penn Treebank ("don't" is two words). pycocoevalcap uses Stanford's Java tokenizer for
them; tokenize() gives the same words for COCO's captions, but not for every web address or emoticon.
"""
import math
from collections import Counter
from collections.abc import Hashable

import regex

CUTS = regex.compile(r"(?<=\w)(?=n['’]t\b|['’](?:s|m|d|re|ve|ll)\b)|(?<=\bcan)(?=not\b)")  # do|n't, it|'s, can|not
CUT_OFF = regex.compile(r"(n?)’(t|s|m|d|re|ve|ll)")     # these get a straight apostrophe; within words, ’ stays
# The kinds of words, tried in this order. All else is dropped: quotes, dashes, commas and full stops, because
# pycocoevalcap omits them, and emoji beyond U+FFFF, because the Java program cannot read them.
WORDS = regex.compile(r"""
    n['’]t\b | ['’](?:s|m|d|re|ve|ll|em)\b | ['’]\d0s\b | ['’]n['’]           # cut off by CUTS; '90s; rock 'n' roll
  | (?:\b\p{L}\.)+(?!\w)                                                      # u.s., e.g., j.
  | \b(?:mr|mrs|ms|dr|prof|rev|st|jr|sr|mt|ave|blvd|rd|ft|inc|co|corp|ltd|vs|etc|est|dept|no(?=\.\s*\d))\.
  | \d+(?:[.,:/]\d+)+ | \.\d+\b                                               # 1,000  3.5  10:30  1/2  .5
  | [\p{L}\p{M}\p{N}]+(?:[-/&_][\p{L}\p{M}\p{N}]+ | \.\p{L}+                # word, t-shirt, and/or,
      | (?<=\b[a-hj-xz] | \w[aeiouy])['’‘]\p{L}+)*                             # o'neil, ma'am; but qur an
  | [\#@]\p{L}\w* | [!?]{2,} | \*+                                            # a single ! is dropped, !! is not
  | [^\s.,;:!?'’‘"`“”…–—\-\U00010000-\U0010FFFF]                                # any other sign, one by one
""", regex.VERBOSE)
# The Penn Treebank's names of brackets. pycocoevalcap drops them in capitals only, so these stay.
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}


def tokenize(text: str) -> list[str]:
    """The words of a caption, lower case, without punctuation, as pycocoevalcap's PTBTokenizer gives them."""
    words = WORDS.findall(CUTS.sub(" ", text.lower()))
    return [CUT_OFF.sub(r"\1'\2", word) if CUT_OFF.fullmatch(word) else BRACKETS.get(word, word) for word in words]


def count_ngrams(words: list[str]) -> list[Counter]:
    """How often each n-gram occurs, one Counter for each n = 1 to 4."""
    return [Counter(zip(*(words[i:] for i in range(n)))) for n in range(1, 5)]


def bleu(candidates: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    """BLEU-1 to BLEU-4 of all candidates together: counts are summed over the candidates, then divided."""
    matches, totals, length, reference_length = [0] * 4, [0] * 4, 0, 0
    for words, refs in zip(candidates, references):
        length += len(words)
        reference_length += min((abs(len(ref) - len(words)), len(ref)) for ref in refs)[1]  # the closest (or shorter)
        ref_ngrams = [count_ngrams(ref) for ref in refs]
        for n, counts in enumerate(count_ngrams(words)):
            totals[n] += counts.total()
            # An n-gram matches at most as often as it occurs in the reference that has most of it.
            matches[n] += sum(min(count, max(ref[n][ngram] for ref in ref_ngrams)) for ngram, count in counts.items())
    # The brevity penalty is exp(1 - r / c) if c < r, else 1. pycocoevalcap's tiny numbers avoid divisions by zero.
    penalty = math.exp(min(0.0, 1 - (reference_length + 1e-9) / (length + 1e-15)))
    precisions = [(m + 1e-15) / (t + 1e-9) for m, t in zip(matches, totals)]
    return [penalty * math.prod(precisions[:n]) ** (1 / n) for n in range(1, 5)]            # geometric means


def rouge_l(candidate: list[str], references: list[list[str]], beta: float = 1.2) -> float:
    """ROUGE-L: F_beta of the best precision and the best recall, which may come from two references."""
    common = [longest_common(candidate, ref) for ref in references]
    if not any(common):
        return 0.0
    precision = max(common) / len(candidate)
    recall = max(n / len(ref) for n, ref in zip(common, references))
    return (1 + beta ** 2) * precision * recall / (recall + beta ** 2 * precision)


def longest_common(a: list[str], b: list[str]) -> int:
    """The length of the longest common subsequence (gaps are allowed), by dynamic programming."""
    row = [0] * (len(b) + 1)                                # row[j]: the length for the words of a so far and b[:j]
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            above = row[j]
            row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
            diagonal = above
    return row[-1]


def cider(candidates: list[list[str]], references: list[list[list[str]]], sigma: float = 6.0) -> list[float]:
    """CIDEr-D of each candidate. Their mean is published as CIDEr (sometimes times 100).

    The weight of an n-gram is log(images / images with the n-gram in a reference): small for "a", large for "giraffe".
    So a score depends on the references of all images, and all weights are 0 if there is only one image.
    """
    ref_ngrams = [[count_ngrams(ref) for ref in refs] for refs in references]
    num_images = Counter(ngram for refs in ref_ngrams for n in range(4) for ngram in set().union(*(r[n] for r in refs)))

    def vectors(ngrams: list[Counter]) -> list[tuple[dict, float]]:
        """For each n, the vector of count * log(images / images with the n-gram), and its length."""
        weighted = [{ngram: count * math.log(len(references) / max(1, num_images[ngram]))
                     for ngram, count in counts.items()} for counts in ngrams]
        return [(weights, math.sqrt(sum(w * w for w in weights.values()))) for weights in weighted]

    scores = []
    for words, refs, ngrams in zip(candidates, references, ref_ngrams):
        ours, total = vectors(count_ngrams(words)), 0.0
        for ref, counts in zip(refs, ngrams):
            # The cosine, but a word's repetitions count at most as often as in the reference (the D in CIDEr-D).
            cosines = [sum(min(w, theirs[ngram]) * theirs[ngram] for ngram, w in mine.items() if ngram in theirs)
                       / (my_length * their_length or 1)
                       for (mine, my_length), (theirs, their_length) in zip(ours, vectors(counts))]
            total += sum(cosines) / 4 * math.exp(-(len(words) - len(ref)) ** 2 / (2 * sigma ** 2))
        scores.append(10 * total / len(refs))
    return scores


def score_captions(results: dict[Hashable, str], references: dict[Hashable, list[str]]) -> dict[str, float]:
    """Bleu_1 to Bleu_4, ROUGE_L and CIDEr, with pycocoevalcap's names, of {image id: caption}.

    The references, {image id: captions}, are of the same images, at least one, and each has at least one word.
    """
    candidates = [tokenize(text) for text in results.values()]
    refs = [[tokenize(text) for text in references[image]] for image in results]
    rouges = [rouge_l(*pair) for pair in zip(candidates, refs)]
    return {**{f"Bleu_{n}": value for n, value in enumerate(bleu(candidates, refs), 1)},
            "ROUGE_L": sum(rouges) / len(rouges), "CIDEr": sum(cider(candidates, refs)) / len(candidates)}
