"""The paper's protocols with tiny random weights: killed, shared, scored, refused."""
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval
from nanomagvlt.evaluation import coco
from nanomagvlt.evaluation.captions import score_captions
from nanomagvlt.evaluation.fid import frechet_distance
from nanomagvlt.rng import keyed_generator
from nanomagvlt.sampling.clip import CLIP, load_judge
from nanomagvlt.sampling.pipeline import load_pipeline
from nanomagvlt.tokenizers.bpe import BPE, clean_caption
from test_scripts import refused, untrained


class Eye(torch.nn.Module):
    """A stand-in for Inception: three features of the pixels, and the logits of five classes."""
    fc = torch.nn.Linear(3, 5).requires_grad_(False)

    def forward(self, pixels):
        return torch.stack([pixels.mean((1, 2, 3)), pixels.std((1, 2, 3)), pixels[:, 0, 8:24, 8:24].mean((1, 2))], 1)

    def logits(self, features):
        return self.fc(features)


EYE, load_once = Eye(), cache(load_pipeline)
DOMAINS = ["in-domain", "near-domain", "out-domain"]
T2I = ("--num", "13", "--candidates", "3", "--clip", "clip.pt", "--inception", "eye.pth")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Thirteen images, two captions each, in the form of NoCaps and of Karpathy, and networks of random weights."""
    folder, rng, captions, karpathys = tmp_path_factory.mktemp("world"), np.random.default_rng(0), [], []
    (folder / "photos").mkdir()
    rows = [{"id": 100 + i, "file_name": f"{i}.png", "domain": DOMAINS[i % 3]} for i in range(13)]
    for i, row in enumerate(rows):
        Image.fromarray(rng.integers(0, 20 * i + 10, (36, 40 + i, 3), np.uint8)).save(folder / f"photos/{i}.png")
        texts = [f"A - photo, number {i} of 13 on the left-hand side.", f"{i} blobs and {i + 1} dots"]
        captions += [{"image_id": 100 + i, "caption": text} for text in texts]
        karpathys.append({"cocoid": 100 + i, "filepath": "photos", "filename": f"{i}.png",
                          "split": "test" if i else "val", "sentences": [{"raw": text} for text in texts]})
    for name, content in {
            "karpathy": {"images": karpathys}, "coco": {"images": rows, "annotations": captions},
            "silent": {"images": rows[:1], "annotations": []},
            "dots": {"images": rows[:1], "annotations": [{"image_id": 100, "caption": "..."}]},
            "out": {"images": [{"id": 100, "file_name": "../coco.json"}], "annotations": captions[:1]}}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    untrained(folder / "runs" / "x" / "last.pt", text_length=60)
    untrained(folder / "ar.pt", model="argvlt", text_length=60)
    untrained(folder / "clean.pt", clean_captions=True, text_length=60)
    BPE([]).save(folder / "bpe.txt")
    torch.manual_seed(0)
    judge = CLIP(resolution=16, patch=8, image_width=64, image_layers=1, text_width=64, text_layers=1,
                 context_length=20, vocab_size=514, features=8)
    torch.save({name: torch.randn(x.shape) * 0.3 for name, x in judge.state_dict().items()}, folder / "clip.pt")
    return folder


@pytest.fixture(autouse=True)
def small(world, tmp_path, monkeypatch):
    """Files of four items; each checkpoint is loaded only once."""
    for path in world.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(coco, "CHUNK", 4)
    monkeypatch.setattr(coco, "load_inception", lambda path: EYE)
    monkeypatch.setattr(coco, "load_pipeline", lambda path, *others: load_once(world / path, *others))


def command(protocol: str, out: str, *more: str, captions: str = "coco.json", images: str = "photos") -> list[str]:
    return ["coco", "--protocol", protocol, "--captions", captions, "--images", images, "--out", out, *more,
            "--bpe", "bpe.txt", "--device", "cpu"]


def result(out: str) -> dict:
    return json.loads(Path(out, "result.json").read_text())


def column(out: str, name: str) -> np.ndarray:
    return coco.column(sorted(Path(out).glob("generated-*.npz")), name)


def given(all_captions: bool) -> tuple[list, np.ndarray, list[str]]:
    """The images of 13 items of coco.json, their pixels and their captions."""
    photos, _ = coco.read_photos(Path("coco.json"), Path("photos"), need_words=True)
    photos, captions = zip(*coco.choose_items(photos, 13, all_captions))
    return photos, np.stack([coco.square(Image.open(f"photos/{photo.file}"), 32, "crop") for photo in photos]), captions


def test_killed_shared_and_in_one_go_are_the_same_to_the_byte(monkeypatch):
    eval.main(command("t2i", "whole", *T2I))
    write, written = coco.write_arrays, []

    def killed_at_the_sixth(path, **arrays):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, **arrays)
    monkeypatch.setattr(coco, "write_arrays", killed_at_the_sixth)
    with pytest.raises(SystemExit) as stopped:
        eval.main(command("t2i", "killed", *T2I))
    assert stopped.value.code == 130 and len(list(Path("killed").glob("*.npz"))) == 5
    monkeypatch.setattr(coco, "write_arrays", write)
    eval.main(command("t2i", "killed", *T2I))
    eval.main(command("t2i", "shared", *T2I, "--part", "2/2"))
    assert sorted(path.name for path in Path("shared").glob("g*")) == ["generated-00001.npz", "generated-00003.npz"]
    eval.main(command("t2i", "shared", *T2I, "--part", "1/2"))
    assert not Path("shared", "result.json").exists()
    eval.main(command("t2i", "shared", *T2I))
    files = [{path.name: path.read_bytes() for path in Path(out).iterdir()} for out in ("whole", "killed", "shared")]
    assert files[0] == files[1] == files[2] and len(files[0]) == 10


def test_the_best_candidate_of_each_caption_and_its_scores():
    """Computed again, one drawing at a time."""
    eval.main(command("t2i", "out", *T2I, "--seed", "7"))
    eval.main(command("t2i", "one", "--num", "13", "--seed", "7"))
    pipeline, judge, best = load_pipeline("runs/x/last.pt", "cpu"), load_judge("clip.pt", "bpe.txt"), []
    tokens, first = column("out", "tokens"), column("one", "tokens")
    for i, text in enumerate(given(all_captions=True)[2]):
        three = torch.cat([pipeline.draw_tokens([text], keyed_generator(7, "t2i", i, c))[0] for c in range(3)])
        images, texts = judge.image_features(pipeline.tokens_to_image(three)), judge.text_features([text])
        cosines = judge.model.similarity(images, texts).flatten()
        assert np.array_equal(tokens[i], three[cosines.argmax()]) and np.array_equal(first[i], three[0])
        best.append(max(0, cosines.max().item()))
    drawn, real = (EYE(torch.tensor(images).permute(0, 3, 1, 2) / 255)
                   for images in (pipeline.tokens_to_image(torch.tensor(tokens)), given(all_captions=False)[1]))
    scores = result("out")["scores"]
    assert scores["CLIP score"] == pytest.approx(100 * np.mean(best), rel=1e-4)
    assert scores["FID"] == pytest.approx(frechet_distance(drawn, real), rel=1e-4)
    assert scores.keys() == {"FID", "FID-1", "FID-2", "FID-4", "FID-8", "IS", "IS deviation", "CLIP score"}
    assert not result("one")["scores"]


def test_inpainting_keeps_the_tokens_around_the_centre():
    eval.main(command("inpaint", "out", "--num", "13", "--inception", "eye.pth"))
    original = load_pipeline("runs/x/last.pt", "cpu").image_to_tokens(given(all_captions=True)[1]).view(-1, 4, 4)
    is_new = (torch.tensor(column("out", "tokens")).view(-1, 4, 4) != original).any(0)
    assert is_new[1:3, 1:3].any() and is_new.sum() == is_new[1:3, 1:3].sum()
    assert result("out")["scores"].keys() == {"FID", "IS", "IS deviation"}


def test_captions_are_scored_by_domain_and_by_karpathys_split():
    eval.main(command("nocaps", "nocaps", "--candidates", "2", "--clip", "clip.pt", "--text-temperature", "2,2"))
    eval.main(command("i2t", "i2t", captions="karpathy.json", images="."))
    assert len(column("i2t", "captions")) == 12                                # one of the 13 is of another split
    written = {row["image_id"]: row["caption"] for row in json.loads(Path("nocaps/captions.json").read_text())}
    scores = result("nocaps")["scores"]
    for domain in ("near-domain", "overall"):
        chosen = {photo.id: photo.captions for photo in given(False)[0] if domain in (photo.domain, "overall")}
        for name, value in score_captions({id: written[id] for id in chosen}, chosen).items():
            assert scores[f"{domain} {name}"] == pytest.approx(100 * value)
    assert {name.split()[0] for name in scores} == {*DOMAINS, "overall", "CLIP"}


@pytest.mark.parametrize("checkpoint, as_read", [("runs/x/last.pt", str), ("clean.pt", clean_caption)])
def test_infilling_keeps_the_words_around_the_middle_as_the_model_reads_them(checkpoint, as_read):
    eval.main(command("infill", "out", "--checkpoint", checkpoint))
    bpe = BPE([])
    for caption, text in zip(map(as_read, given(all_captions=False)[2]), column("out", "captions"), strict=True):
        ids = bpe.encode(caption)[:60]
        start = len(ids) // 2 - len(ids) // 2 // 2
        head, tail = bpe.decode(ids[:start]), bpe.decode(ids[start + len(ids) // 2:])
        assert text.startswith(head.strip()) and text.endswith(tail.strip()) and text != caption


@pytest.mark.parametrize("protocol", coco.PROTOCOLS)
def test_argvlts_are_measured_too(protocol):
    eval.main(command(protocol, "out", "--checkpoint", "ar.pt", "--num", "3"))
    assert result("out")["settings"]["num"] == 3


def test_the_papers_results_stand_only_beside_its_own_protocol(monkeypatch, capsys):
    same = replace(coco.PROTOCOLS["t2i"], num_images=13, num=13, candidates=2, steps=2)
    monkeypatch.setattr(coco, "SIDE", 32)
    others = {"steps": 3}, {"num_images": 14}, {"split": "test"}, {"num": 12}, {"candidates": 1}
    for i, changes in enumerate(({}, *others)):
        monkeypatch.setitem(coco.PROTOCOLS, "t2i", replace(same, **changes))
        more = ("--num", "13", "--candidates", "2", "--clip", "clip.pt", *("--inception", "eye.pth") * (i == 0))
        eval.main(command("t2i", f"out{i}", *more))
        assert ("16.93" in capsys.readouterr().out) == bool(result(f"out{i}")["paper"]) == (i == 0)


@pytest.mark.parametrize("argv, words", [
    (command("t2i", "o")[:3], "--captions"),
    (command("t2i", "o", "--candidates", "2"), "--clip"),
    (command("t2i", "o"), "--num 26"),
    (command("t2i", "o", "--num", "3", "--inception", "eye.pth"), "--inception"),
    (command("t2i", "o", captions="bpe.txt"), "bpe.txt"),
    (command("t2i", "o", images="."), "0.png"),
    (command("i2t", "o", captions="out.json"), "../coco.json"),
    (command("i2t", "o", captions="silent.json"), "caption"),
    (command("i2t", "o", captions="dots.json"), "words"),
    (command("i2t", "o", "--inception", "eye.pth"), "--inception"),
    (command("i2t", "photos"), "photos"),
    (command("i2t", "bpe.txt"), "bpe.txt"),
])
def test_one_line_says_what_is_wrong(argv, words, capsys):
    assert words in refused("eval.py", argv, capsys)


def test_a_folder_is_continued_only_with_its_own_settings_and_whole_files(capsys):
    argv = command("i2t", "o", "--num", "5")
    eval.main(argv)
    for more, words in (("--seed 1", "seed 0"), ("--num 4", "num 5"), ("--text-steps 3", "text_steps 2")):
        capsys.readouterr()
        assert words in refused("eval.py", [*argv, *more.split()], capsys)
    Path("o/generated-00001.npz").write_bytes(b"PK")
    assert "o/generated-00001.npz" in refused("eval.py", argv, capsys)


def test_a_broken_image_is_an_error(capsys):
    content = {"images": [{"id": 1, "file_name": "o.json"}], "annotations": [{"image_id": 1, "caption": "a"}]}
    Path("o.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        eval.main(command("i2t", "p", captions="o.json", images="."))
    assert "o.json: not an image" in capsys.readouterr().err
