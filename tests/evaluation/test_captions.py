"""Captions' scores against pycocoevalcap's numbers and the Java tokenizer's words, and by hand."""
import json
import math

import pytest

from nanomagvlt.evaluation.captions import bleu, cider, longest_common, rouge_l, score_captions, tokenize

NAMES = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr")
# The numbers of pycocoevalcap 1.2, from the README of the shared folder.
KNOWN = {"coco100/raw_refs4_hyp1.json": (0.606975, 0.402893, 0.249113, 0.150119, 0.445073, 0.789180),
         "abstract48S/candsB_refs5_raw.json": (0.627675, 0.429392, 0.297417, 0.204543, 0.468108, 0.585196),
         "abstract48S/candsC_refs5_raw.json": (0.587987, 0.395616, 0.275791, 0.190440, 0.448458, 0.496387),
         "nlg_eval": (0.550000, 0.428174, 0.284043, 0.201143, 0.522104, 1.242192)}


def pairs(path) -> tuple[dict, dict]:
    """Captions and references of a file {"res": {id: [caption]}, "gts": {id: [caption, ...]}}."""
    content = json.loads(path.read_text())
    return {image: texts[0] for image, texts in content["res"].items()}, content["gts"]


def test_words_are_those_of_the_java_tokenizer(shared):
    rows = [json.loads(line) for line in (shared / "data/coco_caption/ptb_golden.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["source"] != "edge"]
    assert len(rows) == 1345
    assert [tokenize(row["text"]) for row in rows] == [row["ptb"].split() for row in rows]


@pytest.mark.parametrize("text, words", [
    ("Don't! It's the dogs' toy, he'll say.", "do n't it 's the dogs toy he 'll say"),
    ("Mr. O'Neil in the U.S.A., e.g. at no. 5", "mr. o'neil in the u.s.a. e.g. at no. 5"),
    ("rock 'n' roll of the '90s (\"live\")", "rock 'n' roll of the '90s -lrb- live -rrb-"),
    ("12:30pm, 1,000 men and 3-year-old #twins!!", "12:30 pm 1,000 men and 3-year-old #twins !!"),
    ("Two “dogs”\non a café’s roof…🐶", "two dogs on a café 's roof"),
    (" . ", ""),
    ("Don’t, it’s O’Neil’s: five o’clock, Côte d’Ivoire", "do n't it 's o’neil 's five o’clock côte d’ivoire"),
    ("the Qur’an of Hawai’i, ma'am", "the qur an of hawai’i ma'am"),
])
def test_words_by_hand(text, words):
    assert " ".join(tokenize(text)) == words


@pytest.mark.parametrize("name", KNOWN)
def test_scores_are_those_of_pycocoevalcap(name, shared):
    path = shared / "data" / "coco_caption" / name
    if name == "nlg_eval":
        texts = [(path / f"{part}.txt").read_text().splitlines() for part in ("hyp", "ref1", "ref2")]
        results, references = dict(enumerate(texts[0])), dict(enumerate(zip(*texts[1:])))
    else:
        results, references = pairs(path)
    assert score_captions(results, references) == pytest.approx(dict(zip(NAMES, KNOWN[name])), abs=5.1e-7)


def test_scores_of_single_images_are_exact(shared):
    folder = shared / "data" / "coco_caption" / "coco100"
    gold = json.loads((folder / "per_image_scores_ptb.json").read_text())
    results, references = pairs(folder / "ptb_tokenized.json")
    words = [results[image].split() for image in gold["ids"]]
    refs = [[text.split() for text in references[image]] for image in gold["ids"]]
    assert cider(words, refs) == pytest.approx(gold["CIDEr"], rel=0, abs=1e-9)
    assert [rouge_l(*pair) for pair in zip(words, refs)] == pytest.approx(gold["ROUGE_L"], rel=0, abs=1e-9)
    single = [bleu([w], [r]) for w, r in zip(words, refs)]
    for n in (1, 4):
        assert [scores[n - 1] for scores in single] == pytest.approx(gold[f"Bleu_{n}"], rel=0, abs=1e-9)


def test_scores_by_hand():
    """The unigram precision of Papineni et al.'s example is 2 / 7; a third of the length costs exp(1 - 3)."""
    refs = [["the cat is on the mat".split(), "there is a cat on the mat".split()]]
    assert bleu([["the"] * 7], refs)[0] == pytest.approx(2 / 7)
    assert bleu([["the", "cat"]], refs)[0] == pytest.approx(math.exp(1 - 6 / 2))
    assert longest_common("a b c b d a b".split(), "b d c a b a".split()) == 4             # Cormen et al.'s: b c b a
    p, r = 3 / 4, 3 / 5
    assert rouge_l("a b x c".split(), ["a y b c z".split()]) == pytest.approx(2.44 * p * r / (r + 1.44 * p))
    # Two images. "a" is in both and has weight 0, so only "cat" and "a cat" count: cosine 1 for n = 1 and 2, else 0.
    assert cider([["a", "cat"], ["a", "cat"]], [[["a", "cat"]], [["a", "dog"]]]) == pytest.approx([5, 0])


def test_an_equal_caption_has_the_highest_score_and_an_empty_one_the_lowest():
    texts = {1: "a man rides a brown horse", 2: "two dogs on a red sofa", 3: "an empty street at night"}
    references = {image: [text] for image, text in texts.items()}
    best = {**dict.fromkeys(NAMES, 1.0), "CIDEr": 10.0}
    assert score_captions({image: texts[image] for image in (3, 1, 2)}, references) == pytest.approx(best)
    assert max(score_captions(dict.fromkeys(texts, ""), references).values()) < 1e-9
