"""The paper's protocols on real photographs with tiny random weights: made, killed, shared, scored, refused."""
import json
import tarfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import eval
from nanomagvlt.evaluation import chunks, coco
from nanomagvlt.tokenizers.bpe import BPE, clean_caption
from nanomagvlt.evaluation.captions import score_captions
from nanomagvlt.rng import keyed_generator, random_rows
from nanomagvlt.sampling.clip import CLIP
from nanomagvlt.config import preset
from nanomagvlt.evaluation.fid import Moments, frechet_distance
from nanomagvlt.sampling.pipeline import load_pipeline
from nanomagvlt.model import MAGVLT
from nanomagvlt.tokenizers.vqgan import VQGAN
from test_pretrained import in_their_layout
from test_scripts import refused, untrained


class Eye(torch.nn.Module):
    """In Inception's place: three features of the pixels, and the logits of five classes."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3, 5)

    def forward(self, pixels):
        return torch.stack([pixels.mean((1, 2, 3)), pixels.std((1, 2, 3)), pixels[:, 0, 8:24, 8:24].mean((1, 2))], 1)

    def logits(self, features):
        return features @ self.fc.weight.T


@pytest.fixture(scope="module")
def world(shared, tmp_path_factory) -> Path:
    """Thirteen photographs in COCO's, NoCaps' and Karpathy's form, and networks of random weights."""
    folder = tmp_path_factory.mktemp("world")
    rows, captions = [], []
    (folder / "photos").mkdir()
    with tarfile.open(shared / "data/photos_mini/short_side_160_jpg/val/00000.tar") as tar:
        for number, name in enumerate(sorted(name for name in tar.getnames() if name.endswith(".jpg"))):
            (folder / "photos" / name).write_bytes(tar.extractfile(name).read())
            texts = json.loads(tar.extractfile(name.replace(".jpg", ".json")).read())["captions"]
            rows.append({"id": 100 + number, "file_name": name, "domain": coco.DOMAINS[number % 3]})
            captions += [{"image_id": 100 + number, "caption": text} for text in texts]
    assert len(rows) == 13 and len(captions) == 29
    one = {"images": rows[:1], "annotations": [{"image_id": 100, "caption": "a"}]}
    karpathys = [{"cocoid": row["id"], "filepath": "photos", "filename": row["file_name"],
                  "sentences": [{"raw": c["caption"]} for c in captions if c["image_id"] == row["id"]],
                  "split": "test" if i else "val"} for i, row in enumerate(rows)]
    for name, content in {
            "coco": {"images": rows, "annotations": captions}, "karpathy": {"images": karpathys},
            "strange": {**one, "annotations": [{"image_id": 7, "caption": "a"}]},
            "number": {**one, "images": [{"id": 100, "file_name": 100}]}, "list": [1],
            "twice": {**one, "images": rows[:1] * 2},
            "silent": {**one, "annotations": []}, "dots": {**one, "annotations": [{"image_id": 100, "caption": "..."}]},
            "out": {**one, "images": [{"id": 100, "file_name": "../coco.json"}]}}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    untrained(folder / "runs" / "x" / "last.pt", text_length=60)
    untrained(folder / "ar.pt", model="argvlt", text_length=60)
    BPE([]).save(folder / "bpe.txt")
    g = torch.Generator().manual_seed(0)
    judge = CLIP(resolution=16, patch=8, image_width=64, image_layers=1, text_width=64, text_layers=1,
                 context_length=20, vocab_size=514, features=8)
    torch.save({name: torch.randn(x.shape, generator=g) * 0.3 for name, x in judge.state_dict().items()},
               folder / "clip.pt")
    return folder


@pytest.fixture(scope="module")
def load_once():
    return cache(load_pipeline)


@pytest.fixture(autouse=True)
def small(world, load_once, tmp_path, monkeypatch):
    """Chunks of four, and each checkpoint is loaded only once."""
    for path in world.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chunks, "CHUNK", 4)
    torch.manual_seed(0)
    eye = Eye().requires_grad_(False)
    monkeypatch.setattr(eval, "load_inception", lambda path: eye)
    # The weights at this path are the same in all tests.
    monkeypatch.setattr(eval, "load_pipeline", lambda path, *others: load_once(world / path, *others))


def command(protocol: str, out: str, *more: str, captions: str = "coco.json", images: str = "photos") -> list[str]:
    return ["coco", "--protocol", protocol, "--captions", captions, "--images", images, "--out", out, *more,
            "--bpe", "bpe.txt", "--device", "cpu"]


T2I = ("--num", "13", "--candidates", "3", "--clip", "clip.pt", "--inception", "eye.pth")


def result(out: str) -> dict:
    return json.loads(Path(out, "result.json").read_text())


def column(out: str, name: str) -> list:
    return [row for path in sorted(Path(out).glob("made-*.pt")) for row in chunks.read(path)[name]]


def test_killed_shared_and_in_one_go_are_the_same_to_the_byte(monkeypatch, capsys):
    eval.main(command("t2i", "whole", *T2I))
    assert "13 of " in capsys.readouterr().out
    write, written = chunks.write, []

    def killed_at_the_third(path, content):
        if len(written) == 2:
            path.with_name(f"{path.name}.77.tmp").write_bytes(b"half a chunk")
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, content)
    monkeypatch.setattr(chunks, "write", killed_at_the_third)
    for _ in range(3):                                                         # at real-2, at made-0, at made-2
        written.clear()
        with pytest.raises(SystemExit) as stopped:
            eval.main(command("t2i", "killed", *T2I))
        assert stopped.value.code == 130 and not Path("killed", "result.json").exists()
    monkeypatch.setattr(chunks, "write", write)
    before = {path: path.stat().st_mtime_ns for path in Path("killed").glob("made-*.pt")}
    assert len(before) == 2
    eval.main(command("t2i", "killed", *T2I))
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())

    eval.main(command("t2i", "shared", *T2I, "--part", "2/2"))
    assert sorted(path.name for path in Path("shared").glob("made-*")) == ["made-00001.pt", "made-00003.pt"]
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    eval.main(command("t2i", "shared", *T2I))
    monkeypatch.delenv("WORLD_SIZE")
    assert not Path("shared", "result.json").exists()
    eval.main(command("t2i", "shared", *T2I))
    names = {path.name for path in Path("whole").iterdir()}
    assert names == {"settings.json", "result.json", *(f"made-0000{i}.pt" for i in range(4)),
                     *(f"reference-{k}.pt" for k in (0, 1, 2, 4, 8))}
    for path in Path("killed").glob("*.77.tmp"):
        path.unlink()
    assert all({path.name for path in Path(out).iterdir()} == names for out in ("killed", "shared"))
    for name in names:
        whole = Path("whole", name).read_bytes()
        assert Path("killed", name).read_bytes() == whole and Path("shared", name).read_bytes() == whole, name


def test_nothing_depends_on_the_chunk_and_other_chance_is_other_pictures(monkeypatch):
    eval.main(command("t2i", "a", *T2I))
    monkeypatch.setattr(chunks, "CHUNK", 5)
    eval.main(command("t2i", "b", *T2I))
    eval.main(command("t2i", "c", *T2I, "--seed", "1"))
    a, b, c = (torch.stack(column(out, "tokens")) for out in "abc")
    assert torch.equal(a, b) and (a != c).any(1).all()
    assert result("a")["scores"] == pytest.approx(result("b")["scores"], rel=1e-3, abs=1e-6)


def test_the_best_candidate_of_each_caption_and_its_scores():
    """Worked out again without any of the machinery."""
    eval.main(command("t2i", "out", *T2I))
    eval.main(command("t2i", "one", "--num", "13"))
    content, pipeline = json.loads(Path("coco.json").read_text()), load_pipeline("runs/x/last.pt", "cpu")
    judge, scores = eval.load_judge("clip.pt", "bpe.txt"), result("out")["scores"]
    texts = [row["caption"] for row in sorted(content["annotations"], key=lambda row: row["image_id"])]
    chosen = [texts[i] for i in torch.randperm(len(texts), generator=keyed_generator("which items"))[:13]]
    tokens, first, best = column("out", "tokens"), column("one", "tokens"), []
    for i, text in enumerate(chosen):
        three = torch.cat([pipeline.draw_tokens([text], keyed_generator(0, "t2i", i, c))[0] for c in range(3)])
        cosines = judge.model.similarity(judge.look(pipeline.tokens_to_image(three)), judge.read([text])).flatten()
        assert torch.equal(tokens[i], three[cosines.argmax()]) and torch.equal(first[i], three[0])
        best.append(max(0, cosines.max().item()))
    assert scores["CLIP score"] == pytest.approx(100 * np.mean(best), rel=1e-4)
    assert scores.keys() == {"FID", "FID-1", "FID-2", "FID-4", "FID-8", "IS", "IS deviation", "CLIP score"}
    eye, drawn, real = eval.load_inception(""), Moments(), Moments()
    photos = coco.read_squares(coco.read_photos(Path("coco.json"), Path("photos"))[0], 32)
    for moments, pictures in ((drawn, pipeline.tokens_to_image(torch.stack(tokens))), (real, photos)):
        moments.update(eye(torch.tensor(pictures).permute(0, 3, 1, 2) / 255))
    assert scores["FID"] == pytest.approx(frechet_distance(drawn, real), rel=1e-4)
    assert not result("one")["scores"]


def test_the_photographs_around_the_centre_stay():
    eval.main(command("inpaint", "out", "--num", "13", "--inception", "eye.pth"))
    pipeline = load_pipeline("runs/x/last.pt", "cpu")
    photos, _ = coco.read_photos(Path("coco.json"), Path("photos"))
    items, _ = coco.choose_items(photos, 13, all_captions=True)
    given = pipeline.image_to_tokens(coco.read_squares([item.photo for item in items], 32)).view(-1, 4, 4)
    tokens, centre = torch.stack(column("out", "tokens")).view(-1, 4, 4), slice(1, 3)
    assert (tokens[:, centre, centre] != given[:, centre, centre]).any()
    tokens[:, centre, centre] = given[:, centre, centre]
    assert torch.equal(tokens, given)
    assert result("out")["scores"].keys() == {"FID", "IS", "IS deviation"}


def test_captions_by_domain_and_of_karpathys_split(capsys):
    eval.main(command("nocaps", "nocaps", "--candidates", "2", "--clip", "clip.pt", "--temperature", "2"))
    eval.main(command("i2t", "i2t", "--num", "5", captions="karpathy.json", images="."))
    out = capsys.readouterr().out
    assert "5 of 12 images of karpathy.json, test" in out and "METEOR and SPICE" in out and "No CLIP score" in out
    photos, _ = coco.read_photos(Path("coco.json"), Path("photos"))
    written = {row["image_id"]: row["caption"] for row in json.loads(Path("nocaps/captions.json").read_text())}
    scores = result("nocaps")["scores"]
    for domain in ("near-domain", "overall"):
        chosen = {photo.id: photo.captions for photo in photos if domain in (photo.domain, "overall")}
        for name, value in score_captions({id: written[id] for id in chosen}, chosen).items():
            assert scores[f"{domain} {name}"] == pytest.approx(100 * value)
    assert {name.split()[0] for name in scores} == {*coco.DOMAINS, "overall", "CLIP"}
    assert result("i2t")["settings"]["split"] == "test" and len(column("i2t", "captions")) == 5


def check_infilled(out: str, bpe: BPE, as_read) -> None:
    """The words around the middle of each first caption, as it is read, are kept."""
    photos, _ = coco.read_photos(Path("coco.json"), Path("photos"))
    items, _ = coco.choose_items(photos, None, all_captions=False)
    for caption, text in zip((as_read(item.caption) for item in items), column(out, "captions"), strict=True):
        ids = bpe.encode(caption)[:60]
        hidden = len(ids) // 2
        start = hidden - hidden // 2
        head, tail = bpe.decode(ids[:start]), bpe.decode(ids[start + hidden:])
        assert text.startswith(head.strip()) and text.endswith(tail.strip()) and text != caption


def test_infilling_keeps_the_words_around_the_middle():
    eval.main(command("infill", "out"))
    check_infilled("out", load_pipeline("runs/x/last.pt", "cpu").bpe, lambda caption: caption)


@pytest.mark.parametrize("protocol", coco.PROTOCOLS)
def test_argvlts_are_measured_too(protocol):
    eval.main(command(protocol, "out", "--checkpoint", "ar.pt", "--num", "3"))
    assert "token by token" in result("out")["protocol"]


def test_the_authors_files_are_measured_as_they_are():
    """Their models have learnt cleaned captions: lower case, no - and no leading marks."""
    torch.manual_seed(0)
    cfg = preset("base", image_size=16, text_length=60, length_positions=16, text_vocab=518, codebook_size=20,
                 codebook_dim=8, vq_channels=32, vq_multipliers=(1, 2, 2), vq_res_blocks=1, vq_attention=(4, 8),
                 vq_latent=16, layers=1, width=24, heads=1)
    torch.save({"state_dict": in_their_layout(MAGVLT(cfg), VQGAN(cfg))}, "a.ckpt")
    BPE.train(["aaaa bbbb"], 4).save("four.txt")
    for protocol in ("t2i", "infill"):
        argv = command(protocol, protocol, "--checkpoint", str(Path("a.ckpt").absolute()), "--num", "13")
        eval.main([word.replace("bpe.txt", "four.txt") for word in argv])
    assert "10 steps" in result("t2i")["protocol"] and "12 steps" in result("infill")["protocol"]
    bpe = BPE.load("four.txt", words="release")
    check_infilled("infill", bpe, clean_caption)
    with pytest.raises(AssertionError):                                        # so it was not read as it is
        check_infilled("infill", bpe, str.lower)


def test_a_row_of_its_own_chance_is_the_single_sample():
    rows = random_rows((keyed_generator(i) for i in range(3)), 3, 5)
    for i, row in enumerate(rows):
        assert torch.equal(row, random_rows(keyed_generator(i), 1, 5)[0])


def test_the_papers_numbers_stand_only_beside_its_own_protocol(monkeypatch, capsys):
    """One whose split has thirteen photographs of 32 pixels, say."""
    same = replace(coco.PROTOCOLS["t2i"], num_photos=13, num=13, candidates=2, steps=2)
    monkeypatch.setattr(coco, "SIDE", 32)
    others = {"steps": 3}, {"num_photos": 14}, {"split": "test"}, {"num": 12}, {"candidates": 1}
    for i, changes in enumerate(({}, *others)):
        monkeypatch.setitem(coco.PROTOCOLS, "t2i", replace(same, **changes))
        given = ("--num", "13", "--candidates", "2", "--clip", "clip.pt", *("--inception", "eye.pth") * (i == 0))
        eval.main(command("t2i", f"out{i}", *given))
        out = capsys.readouterr().out
        assert ("the paper's, zero-shot: ARGVLT 16.93, ARGVLT large 13.01, MAGVLT 12.08, " in out) == (i == 0)
        assert ("The paper does not say which captions" in out) == bool(result(f"out{i}")["paper"]) == (i == 0)
    assert "No FID and no IS: they want --inception FILE, which `python data/download.py inception` fetches" in out


@pytest.mark.parametrize("argv, message", [
    (command("t2i", "o")[:3], "coco wants --captions"),
    (command("t2i", "o", "--candidates", "2"), "--candidates 2: CLIP chooses among them, so give --clip"),
    (command("t2i", "o"), "30,000 items are wanted, but there are 29: give --num 29 or less"),
    (command("t2i", "o", "--num", "3", "--inception", "eye.pth"), "3 drawings and 13 photographs are too few for FID"),
    (command("t2i", "o", captions="no.json"), "no.json: No such file"),
    (command("t2i", "o", captions="bpe.txt"), "bpe.txt: neither COCO's captions"),
    (command("t2i", "o", images="."), "has no "),
    (command("i2t", "o", "--split", "tset", captions="karpathy.json"), "karpathy.json: has no images of split 'tset'"),
    (command("i2t", "o", "--split", "val"), "--split val: coco.json has no splits"),
    (command("i2t", "o", "--inception", "eye.pth"), "--inception looks at drawings, and i2t makes none"),
    (command("nocaps", "o", captions="karpathy.json", images="."), "image 101 is of domain ''; NoCaps' file has in-"),
    (command("i2t", "o", "--clip", "bpe.txt"), "bpe.txt: no archive and no state dict"),
    (command("i2t", "o", "--checkpoint", "bpe.txt"), "bpe.txt: not a checkpoint"),
    (command("i2t", "o", "--part", "3/2"), "'3/2' is no share"),
    (command("i2t", "photos"), "photos is there and holds something else"),
    (command("i2t", "bpe.txt"), "bpe.txt is there and holds something else"),
    (command("i2t", "o", captions="strange.json"), "strange.json: has captions of image 7, but no such image"),
    (command("i2t", "o", captions="out.json"), "photos has no ../coco.json, image 100 of out.json"),
    (command("i2t", "o", "--checkpoint", "ar.pt", "--steps", "3"), "--steps: an ARGVLT makes one token after the other"),
    (command("i2t", "o", "--steps", "0"), "--steps 0: must be at least 1"),
    (command("i2t", "o", captions="number.json"), "number.json: neither COCO's captions"),
    (command("i2t", "o", captions="list.json"), "list.json: neither COCO's captions"),
    (command("i2t", "o", captions="twice.json"), "twice.json: has two images 100"),
    (command("i2t", "o", captions="silent.json"), "silent.json: image 100 has no caption"),
    (command("i2t", "o", captions="dots.json"), "dots.json: image 100 has a caption without words"),
])
def test_what_is_refused(argv, message, capsys):
    assert message in refused("eval.py", argv, capsys)


def test_a_folder_of_other_settings_and_a_damaged_chunk(capsys):
    eval.main(command("i2t", "o", "--num", "5"))
    capsys.readouterr()
    for more, message in ((("--seed", "1"), "seed 0, not 1"), (("--num", "4"), "num 5, not 4"),
                          (("--steps", "3"), "text_steps 2, not 3"), (("--clip", "clip.pt"), "candidates 1, not 64")):
        assert f"o was begun with {message}: give the same, or another --out" in refused(
            "eval.py", [*command("i2t", "o", "--num", "5"), *more], capsys)
    Path("o/made-00001.pt").write_bytes(b"PK")
    with pytest.raises(SystemExit):
        eval.main(command("i2t", "o", "--num", "5"))
    assert "o/made-00001.pt: damaged" in capsys.readouterr().err
    Path("others").mkdir()
    for path in Path("photos").iterdir():
        Path("others", path.name).write_bytes(b"no photo")
    with pytest.raises(SystemExit):
        eval.main(command("i2t", "p", images="others"))
    assert "jpg: not an image" in capsys.readouterr().err
