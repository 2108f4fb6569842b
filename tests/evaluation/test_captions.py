"""Against pycocoevalcap's own numbers and the Java tokenizer's words; cases by hand; what must be refused."""
import json
import math
import sys

import pytest

from nanomagvlt.evaluation import captions
from nanomagvlt.evaluation.captions import (bleu, cider, java_metrics, longest_common, rouge_l, score_captions, tokenize,
                                 write_results_json)

NAMES = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr")
# What pycocoevalcap 1.2 gives, as the shared folder's README has it.
KNOWN = {"coco100": (0.606975, 0.402893, 0.249113, 0.150119, 0.445073, 0.789180),
         "candsB": (0.627675, 0.429392, 0.297417, 0.204543, 0.468108, 0.585196),
         "candsC": (0.587987, 0.395616, 0.275791, 0.190440, 0.448458, 0.496387),
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
    ("I cannot; they couldn’t", "i can not they could n't"),
    ("A t-shirt and/or jeans -- $9.99, 50% off...", "a t-shirt and/or jeans $ 9.99 50 % off"),
    ("Mr. O'Neil in the U.S.A., e.g. at no. 5", "mr. o'neil in the u.s.a. e.g. at no. 5"),
    ("rock 'n' roll of the '90s (\"live\")", "rock 'n' roll of the '90s -lrb- live -rrb-"),
    ("12:30pm, 1,000 men and 3-year-old #twins!!", "12:30 pm 1,000 men and 3-year-old #twins !!"),
    ("Two “dogs”\non a café’s roof…🐶", "two dogs on a café 's roof"),
    ("An x.ray of men.women in the U.S.A at 5 a.m.", "an x.ray of men.women in the u.s.a at 5 a.m."),
    (" . ", ""),
])
def test_words(text, words):
    assert " ".join(tokenize(text)) == words


def test_known_scores(shared):
    folder = shared / "data" / "coco_caption"
    lines = {name: (folder / "nlg_eval" / f"{name}.txt").read_text().splitlines() for name in ("hyp", "ref1", "ref2")}
    found = {"coco100": score_captions(*pairs(folder / "coco100" / "raw_refs4_hyp1.json")),
             "candsB": score_captions(*pairs(folder / "abstract48S" / "candsB_refs5_raw.json")),
             "candsC": score_captions(*pairs(folder / "abstract48S" / "candsC_refs5_raw.json")),
             "nlg_eval": score_captions(dict(enumerate(lines["hyp"])),
                                        dict(enumerate(zip(lines["ref1"], lines["ref2"]))), str.split)}
    for name, values in KNOWN.items():
        assert found[name] == pytest.approx(dict(zip(NAMES, values)), abs=5.1e-7), name


def test_scores_of_single_images_to_the_last_digits(shared):
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


def test_by_hand():
    """The unigram precision of Papineni et al.'s example is 2 / 7; a third of the length costs exp(1 - 3)."""
    refs = [["the cat is on the mat".split(), "there is a cat on the mat".split()]]
    assert bleu([["the"] * 7], refs)[0] == pytest.approx(2 / 7)
    assert bleu([["the", "cat"]], refs)[0] == pytest.approx(math.exp(1 - 6 / 2))
    assert longest_common("a b c b d a b".split(), "b d c a b a".split()) == 4             # Cormen et al.'s: b c b a
    p, r = 3 / 4, 3 / 5
    assert rouge_l("a b x c".split(), ["a y b c z".split()]) == pytest.approx(2.44 * p * r / (r + 1.44 * p))
    # Two images; "a" is in both and weighs nothing, so only "cat" counts: cosine 1 for n = 1, for bigrams 1, else 0.
    assert cider([["a", "cat"], ["a", "cat"]], [[["a", "cat"]], [["a", "dog"]]]) == pytest.approx([5, 0])


def test_the_same_caption_is_the_best_and_none_the_worst():
    texts = {1: "a man rides a brown horse", 2: "two dogs on a red sofa", 3: "an empty street at night"}
    references = {image: [text] for image, text in texts.items()}
    best = score_captions(texts, references)
    assert best == pytest.approx({**dict.fromkeys(NAMES, 1.0), "CIDEr": 10.0})
    order = {3: texts[3], 1: texts[1], 2: texts[2]}
    assert score_captions(order, references) == pytest.approx(best)
    assert max(score_captions(dict.fromkeys(texts, ""), references).values()) < 1e-9


@pytest.mark.parametrize("results, references, message", [
    ({}, {}, "there are no captions to score"),
    ({1: "a", 2: "b"}, {1: ["a"]}, "1 of 2 images have no references, the first of them 2"),
    ({1: "a"}, {1: ["a"], "x": ["b"]}, "1 of 2 images have no caption, the first of them 'x'"),
    ({1: "a"}, {1: []}, "image 1 has an empty list of references"),
    ({1: "a"}, {1: ["a", "..."]}, "image 1: reference 2 has no words"),
])
def test_refused(results, references, message):
    with pytest.raises(ValueError) as error:
        score_captions(results, references)
    assert str(error.value) == message


def test_files(tmp_path):
    path = tmp_path / "results.json"
    write_results_json(path, {7: "a dog", "b": "ein Hündchen"})
    assert json.loads(path.read_text()) == [{"image_id": 7, "caption": "a dog"},
                                            {"image_id": "b", "caption": "ein Hündchen"}]


RESULTS, REFERENCES = {1: "A dog.", 2: "a cat"}, {2: ["a cat", "Cats!"], 1: ["a dog"]}


def test_without_java_one_line_says_so(monkeypatch):
    monkeypatch.setattr(captions.shutil, "which", lambda name: None)
    scores, line = java_metrics(RESULTS, REFERENCES)
    assert scores == {} and "METEOR and SPICE are not computed" in line and "\n" not in line
    with pytest.raises(ValueError, match="1 of 2 images have no references"):
        java_metrics(RESULTS, {1: ["a dog"]})


@pytest.fixture
def without_pycocoevalcap(monkeypatch):
    """Neither the real one, before, nor the one of the test, after."""
    for name in [name for name in sys.modules if name.startswith("pycocoevalcap")]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [name for name in sys.modules if name.startswith("pycocoevalcap")]:
        del sys.modules[name]


def test_what_java_gives_and_what_it_cannot(without_pycocoevalcap, monkeypatch, tmp_path):
    """A package of that name that stands in for the real one: one metric works, the other fails."""
    for name in ("meteor", "spice"):
        path = tmp_path / "pycocoevalcap" / name / f"{name}.py"
        path.parent.mkdir(parents=True)
        path.write_text("""
class Meteor:
    def compute_score(self, references, results):
        assert results == {1: ["a dog"], 2: ["a cat"]} and references == {1: ["a dog"], 2: ["a cat", "cats"]}
        return 0.25, [0.25, 0.25]
class Spice:
    def compute_score(self, references, results):
        raise OSError("no models\\nat all")
""")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(captions.shutil, "which", lambda name: "/usr/bin/java")
    scores, line = java_metrics(RESULTS, REFERENCES)
    assert scores == {"METEOR": 0.25} and line == "pycocoevalcap could not compute SPICE (no models at all)"
