"""The scripts as they are typed: every mistake gets one line that names it, status 2, and leaves no file behind."""
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval
import sample
import train
from nanomagvlt.training import checkpoint, pretrained
from nanomagvlt.tokenizers.bpe import BPE
from nanomagvlt.config import preset
from nanomagvlt.model import MAGVLT
from nanomagvlt.tokenizers.vqgan import VQGAN
from test_pretrained import in_their_layout

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("prepare", ROOT / "data" / "prepare.py")
prepare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)
SCRIPTS = {"train.py": train, "sample.py": sample, "eval.py": eval, "data/prepare.py": prepare}
NEEDED = {"train.py": [], "sample.py": ["--prompt", "x"], "eval.py": [],
          "data/prepare.py": ["--source", "shapes:micro", "--vqgan", "v.pt", "--out", "o"]}


@pytest.fixture(autouse=True)
def an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def untrained(path: Path, **changes) -> Path:
    """A run with untrained weights."""
    torch.manual_seed(0)
    cfg = preset("micro", bpe_merges=0, layers=1, width=16, heads=2, vq_channels=4, image_steps=2, text_steps=2,
                 **changes)
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(path, "magvlt", cfg, step=1, model=MAGVLT(cfg).state_dict(), bpe=BPE([]).to_text(),
                    vqgan=VQGAN(cfg).state_dict())
    checkpoint.save(path.with_name("vqgan.pt"), "vqgan", cfg, step=1, vqgan=VQGAN(cfg).state_dict())
    return path


@pytest.fixture
def trained(tmp_path) -> Path:
    return untrained(tmp_path / "runs" / "x" / "last.pt")


def refused(script: str, argv: list[str], capsys) -> str:
    """The one line of the script's error; it must leave no file behind."""
    before = sorted(Path.cwd().rglob("*"))
    with pytest.raises(SystemExit) as exit:
        SCRIPTS[script].main(argv)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and error.startswith(f"{script}: "), error
    assert sorted(Path.cwd().rglob("*")) == before
    return error


@pytest.mark.parametrize("script, argv, word", [
    ("train.py", ["--widht", "3"], "--width"),
    ("train.py", ["--preset", "tini"], "'tiny'"),
    ("train.py", ["--width", "130"], "heads 4"),
    ("train.py", ["--width", "many"], "--width"),
    ("train.py", ["--preset", "base"], "--data"),
    ("train.py", ["--preset", "base", "--data", "x"], "--vqgan"),
    ("train.py", ["--layers", "0"], "layers 0"),
    ("train.py", ["--lr", "-1"], "lr -1.0"),
    ("train.py", ["--vq-multipliers", ""], "vq_multipliers"),
    ("train.py", ["--vq-steps", "200"], "vq_start 200"),
    ("train.py", ["--clip", "inf"], "clip inf"),
    ("train.py", ["--codebook-size", "65537"], "codebook_size 65537"),
    ("train.py", ["--task-weights", "t2i"], "--task-weights"),
    ("train.py", ["--task-weights", "t2j=1"], "'t2i'"),
    ("train.py", ["--betas", "0.9,x"], "--betas"),
    ("train.py", ["--stage", "vqgn"], "--stage"),
    ("train.py", ["--device", "cuda:9"], "--device cuda:9"),
    ("train.py", ["--micro-batch", "3"], "micro_batch 3"),
    ("train.py", ["extra"], "extra"),
    ("sample.py", ["--promt", "x"], "--prompt"),
    ("sample.py", [], "--prompt"),
    ("sample.py", ["--prompt", "x"], "python train.py --preset tiny"),
    ("sample.py", ["--prompt", "x", "--checkpoint", "no.pt"], "no.pt"),
    ("sample.py", ["--prompt", "x", "--num-samples", "0"], "--num-samples 0"),
    ("eval.py", ["--num-scnes", "3"], "--num-scenes"),
    ("eval.py", ["scene"], "'scene'"),
    ("eval.py", ["--num-scenes", "0"], "--num-scenes 0"),
    ("eval.py", [], "python train.py --preset tiny"),
    ("eval.py", ["--checkpoint", "no.pt"], "no.pt"),
    ("eval.py", ["table", "--variants", "ful"], "'full'"),
    ("eval.py", ["speed", "--repeats", "0"], "--repeats 0"),
    ("eval.py", ["speed", "--batches", "1,x"], "--batches"),
    ("data/prepare.py", ["--sorce", "x"], "--source"),
    ("data/prepare.py", NEEDED["data/prepare.py"], "v.pt"),
])
def test_mistakes_before_anything_is_trained(script, argv, word, capsys):
    assert word in refused(script, argv, capsys)


@pytest.mark.parametrize("argv, word", [
    (["--image", "none.png"], "none.png"),
    (["--image", "text.png"], "text.png"),
    (["--image", "."], "Is a directory"),
    (["--prompt", "x", "--image-steps", "17"], "image_steps 17"),
    (["--prompt", "x", "--image-temperature", "0,0"], "image_temperature"),
    (["--prompt", "x", "--image-temperature", "nan,1"], "image_temperature"),
    (["--image", "text.png", "--text-temperature", "0"], "text_temperature"),
    (["--prompt", "x", "--device", "meta"], "--device meta"),
    (["--prompt", "x", "--image-top-k", "-1"], "image_top_k -1"),
    (["--prompt", "x", "--image-order", "haltom"], "image_order"),
    (["--prompt", "x", "--out", "no/such/folder.png"], "--out no/such/folder.png"),
    (["--prompt", "x", "--checkpoint", "text.png"], "text.png"),
    (["--image", "text.png", "--prompt", "x"], "text.png"),
    (["--text", "a [MASK]"], "--image"),
    (["--text", "a [MASK]", "--prompt", "x"], "--prompt"),
    (["--image", "white.png", "--text", "a circle"], "[MASK]"),
    (["--image", "white.png", "--text", "a [MASK:99]"], "24"),
    (["--image", "white.png", "--text", "a [MASK] [MASK:0]"], "[MASK:3]"),
    (["--prompt", "x", "--region", "0,0,9,9"], "--image"),
    (["--image", "white.png", "--region", "0,0,9,9"], "--prompt"),
    (["--image", "white.png", "--prompt", "x", "--region", "0,0,9,99"], "40 x 32"),
    (["--image", "white.png", "--prompt", "x", "--region", "0,0,9"], "--region"),
    (["--image", "white.png", "--prompt", "x", "--mask", "black.png"], "mask"),
    (["--image", "white.png", "--prompt", "x", "--mask", "small.png"], "small.png"),
    (["--image", "white.png", "--prompt", "x", "--mask", "text.png"], "text.png"),
    (["--image", "white.png", "--prompt", "x", "--mask", "glass.png"], "glass.png"),
    (["--image", "white.png", "--prompt", "x", "--keep", "1"], "--keep 1.0"),
    (["--image", "white.png", "--prompt", "x", "--keep", "0", "--mask", "x.png"], "--mask and --keep"),
    (["--image", "white.png", "--prompt", "x", "--outside"], "--region"),
    (["--image", "white.png", "--blend"], "--prompt"),
    (["--image", "white.png", "--guidance", "2"], "--guidance"),
    (["--prompt", "x", "--guidance", "2"], "guidance 2.0"),
    (["--prompt", "x", "--candidates", "3"], "--candidates 3"),
    (["--prompt", "x", "--candidates", "9"], "--clip"),
    (["--prompt", "x", "--judge"], "--candidates"),
    (["--prompt", "x", "--candidates", "9", "--judge"], "--judge"),
    (["--prompt", "x", "--candidates", "9", "--judge", "--trace"], "--trace"),
    (["--prompt", "x", "--candidates", "9", "--clip", "text.png", "--bpe", "runs/x/last.pt"], "text.png"),
    (["--prompt", "x", "--candidates", "9", "--clip", "text.png", "--bpe", "no"], "data/download.py clip-bpe"),
    (["--prompt", "x", "--attention", "blue"], "'blue'"),
    (["--prompt", "x" * 24 + " y", "--attention", "y"], "24"),
    (["--prompt", "x", "--clean"], "--clean"),
    (["--together"], "it2it"),
    (["--together", "--prompt", "x"], "--prompt"),
    (["--prompt", "x", "--sha256", "00"], "SHA-256"),
])
def test_mistakes_in_sampling(argv, word, trained, capsys):
    Path("text.png").write_text("no image")
    for name, colour, size in (("white", "white", (40, 32)), ("black", "black", (40, 32)), ("small", "white", (8, 8))):
        Image.new("RGB", size, colour).save(f"{name}.png")
    Image.new("RGBA", (40, 32)).save("glass.png")
    assert word in refused("sample.py", argv, capsys)


@pytest.mark.parametrize("argv, word", [
    (["--data", "nowhere"], "nowhere"),
    (["--data", "shapes:tinny"], "'tiny'"),
    (["--vqgan", "no.pt"], "no.pt"),
    (["--cache", "no"], "no/train"),
    (["--bpe", "no.txt"], "no.txt"),
    (["--vq-channels", "8"], "--vq-channels 8"),
])
def test_mistakes_that_training_finds_on_its_way(argv, word, trained, capsys):
    with pytest.raises(SystemExit) as exit:
        train.main(["--preset", "micro", "--pairs", "40", "--vq-images", "40", "--vqgan", "runs/x/vqgan.pt", *argv])
    last = capsys.readouterr().err.splitlines()[-1]
    assert exit.value.code == 2 and last.startswith("train.py: ") and word in last


def test_drawing_and_captioning(trained, capsys):
    def drawn(*argv) -> np.ndarray:
        sample.main(["--prompt", "a red circle", "--num-samples", "3", *argv])
        return np.asarray(Image.open("samples.png"))
    first = drawn()
    assert "-> samples.png\n3 x 'a red circle'" in capsys.readouterr().out
    assert np.array_equal(first, drawn()) and not np.array_equal(first, drawn("--seed", "1"))
    assert not np.array_equal(first, drawn("--image-steps", "5", "--image-temperature", "2,2", "--image-top-k", "3"))
    assert not np.array_equal(first, drawn("--seed", str(10 ** 30))) and "only the first" not in capsys.readouterr().out
    sample.main(["--prompt", "x" * 25, "--num-samples", "1"])
    assert "longer than 24 tokens" in capsys.readouterr().out
    capsys.readouterr()
    sample.main(["--image", "samples.png", "--num-samples", "3", "--checkpoint", str(trained)])
    lines = capsys.readouterr().out.split("\n")
    assert len(lines) == 6 and all(line.isprintable() for line in lines) and "3 x samples.png" in lines[1]


def test_editing_filling_choosing_and_watching(tmp_path, capsys):
    untrained(tmp_path / "runs" / "x" / "last.pt", task_weights={"t2i": 1.0, "i2t": 1.0, "it2it": 1.0})

    def run(*argv, count=3) -> tuple[str, np.ndarray]:
        sample.main([*argv, "--num-samples", str(count)])
        return capsys.readouterr().out, np.asarray(Image.open("samples.png"))
    Image.new("RGB", (64, 32), "white").save("white.png")
    picture, prompt, drawn = ("--image", "white.png"), ("--prompt", "a red circle"), {}
    for part in ("", "--region 16,0,48,32", "--region 16,0,32,32 --outside", "--mask white.png", "--keep 0.5",
                 "--blend"):
        out, drawn[part] = run(*picture, *prompt, *part.split())
        assert "3 x 'a red circle'" in out
    assert "8 of 16 tokens" in run(*picture, *prompt, "--region", "16,0,32,32", "--outside")[0]
    _, plain = run(*prompt)
    for everything in ("--region 0,0,64,32", "--keep 0"):           # all drawn again: a drawing like others
        assert np.array_equal(run(*picture, *prompt, *everything.split())[1], plain)
    one = run(*prompt, count=1)[1]
    assert np.array_equal(plain[8:168:5, 8:168:5], one)                           # the first is the single one
    out, _ = run(*picture, "--text", "a [MASK:2] circle")
    assert all(line.startswith("a") and line.endswith("circle") for line in out.splitlines()[2:])
    together = run("--together")[0]
    assert len(together.splitlines()) == 5 and run("--together", count=1)[0].splitlines()[2] == together.splitlines()[2]
    assert "-> samples.png" in run("--together", *picture, "--keep", "0.5", "--text", "a [MASK] circle", "--trace")[0]
    assert "the best 3 of 4: " in run(*prompt, "--candidates", "4", "--judge", "--image-order", "halton")[0]
    assert run(*picture, "--candidates", "4", "--judge")[0].count("  (0.") == 3
    run(*prompt, "--trace", "--attention", "red circle", "--image-schedule", "square")
    strip, film = Image.open("samples-steps.png"), Image.open("samples-steps.gif")
    assert film.n_frames == 2 and strip.size == (196, 296) and Image.open("samples-attention.png").size == (196, 196)
    assert "  2  " in run(*picture, "--trace", "--text-order", "random", "--text-temperature", "1,1")[0]


def test_eval_scenes_writes_what_it_prints(trained, capsys):
    eval.main(["scenes", "--num-scenes", "3", "--phrasings", "2", "--out", "scenes.json"])
    results, out = json.loads(Path("scenes.json").read_text()), capsys.readouterr().out
    assert results["scenes"] == 3 and f"{results['t2i_facts']['value']:.3f} [" in out
    assert {"t2i_exact", "i2t_exact", "i2t_facts", "length", "reconstruction"} <= set(results)


def test_eval_bias_needs_a_biased_world(trained, tmp_path, capsys):
    assert "shapes:micro" in refused("eval.py", ["bias"], capsys)
    biased = untrained(tmp_path / "biased.pt", data="shapes:micro-biased", text_length=60)
    eval.main(["bias", "--checkpoint", str(biased), "--num-scenes", "3", "--out", "bias.json"])
    results, out = json.loads(Path("bias.json").read_text()), capsys.readouterr().out
    assert results["scenes"] == 3 and f"{results['i2t_usual']['value']:.3f} [" in out


def test_eval_edit_and_sweep(tmp_path, capsys):
    with pytest.raises(SystemExit):
        eval.main(["edit", "--checkpoint", str(untrained(tmp_path / "short.pt")), "--num-scenes", "3"])
    assert "text_length 24" in capsys.readouterr().err
    untrained(tmp_path / "runs" / "x" / "last.pt", task_weights={"t2i": 1.0, "i2t": 1.0, "it2it": 1.0}, text_length=60)
    eval.main(["edit", "--num-scenes", "3", "--phrasings", "2", "--num-pairs", "2", "--out", "edit.json"])
    results, out = json.loads(Path("edit.json").read_text()), capsys.readouterr().out
    for name in ("object_inpainted", "object_inpainted_without", "object_infilled", "object_infilled_without",
                 "centre_inpainted", "centre_inpainted_without", "centre_infilled", "centre_infilled_without", "t2i",
                 "i2t", "i2t_true_length", "pairs_agree"):
        assert f"{results[name]['value']:.3f} [" in out
    eval.main(["sweep", "--num-scenes", "2", "--phrasings", "1", "--num-pairs", "2", "--out", "sweep.json"])
    rows, out = json.loads(Path("sweep.json").read_text()), capsys.readouterr().out
    assert len(rows) == (8 + 6 + 5) * 5 and "order halton" in out and "guidance" not in out
    assert "condition_dropout" in refused("eval.py", ["sweep", "--vary", "guidance"], capsys)
    guided = untrained(tmp_path / "guided.pt", condition_dropout=0.1)
    eval.main(["sweep", "--num-scenes", "2", "--phrasings", "1", "--checkpoint", str(guided), "--vary", "guidance",
               "--out", "guided.json"])
    found, out = json.loads(Path("guided.json").read_text()), capsys.readouterr().out
    assert len(found) == 5 * 5 and "guidance 1.5          t2i" in out and "order" not in out
    assert [row["t2i_exact"] for row in found if row["guidance"] == 1] == [  # 1 is none: as the default order, gumbel
        row["t2i_exact"] for row in rows if row.get("order") == "gumbel"]


def test_prepare_then_train_on_it(trained, capsys):
    for split in ("train", "val"):
        prepare.main(["--source", "shapes:micro", "--vqgan", "runs/x/vqgan.pt", "--out", f"c/{split}", "--pairs", "40",
                      "--split", split])
    assert "40 pairs -> c/train" in capsys.readouterr().out
    train.main(["--preset", "micro", "--vqgan", "runs/x/vqgan.pt", "--cache", "c", "--layers", "1", "--width", "16",
                "--heads", "2", "--steps", "2", "--eval-scenes", "2", "--name", "y"])
    out = capsys.readouterr().out
    assert "cache: reusing c/train, 40 pairs" in out and Path("runs/y/last.pt").exists()
    prepare.main(["--source", "shapes:micro", "--vqgan", "runs/x/vqgan.pt", "--out", "d/train", "--pairs", "40"])
    meta = Path("d/train/meta.json")
    meta.write_text(re.sub(r'"vqgan": "\w+"', '"vqgan": "another"', meta.read_text()))
    with pytest.raises(SystemExit):
        train.main(["--preset", "micro", "--vqgan", "runs/x/vqgan.pt", "--cache", "d", "--name", "z"])
    assert "d/train" in capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_as_typed(script):
    result = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and script in result.stdout and result.stderr == ""


@pytest.fixture(scope="module")
def published_file(tmp_path_factory) -> bytes:
    """A file as the authors' are, but small; its text vocabulary is that of four merges."""
    torch.manual_seed(0)
    cfg = preset("base", image_size=16, text_length=5, length_positions=5, text_vocab=518, codebook_size=20,
                 codebook_dim=8, vq_channels=32, vq_multipliers=(1, 2, 2), vq_res_blocks=1, vq_attention=(4, 8),
                 vq_latent=16, layers=1, width=24, heads=3)
    path = tmp_path_factory.mktemp("published") / "a.ckpt"
    torch.save({"state_dict": in_their_layout(MAGVLT(cfg), VQGAN(cfg))}, path)
    return path.read_bytes()


@pytest.mark.parametrize("argv, word", [
    (["--bpe", "bpe.txt", "--sha256", "0" * 64], "SHA-256"),
    (["--bpe", "no.txt"], "data/download.py clip-bpe"),
    (["--bpe", "other.txt"], "other.txt"),
])
def test_a_published_file_with_another_digest_or_other_merges_is_refused(argv, word, published_file, capsys):
    Path("a.ckpt").write_bytes(published_file)
    BPE([]).save("other.txt")
    assert word in refused("sample.py", ["--prompt", "x", "--checkpoint", "a.ckpt", "--heads", "3", *argv], capsys)


def test_a_published_file_draws_and_captions(published_file, capsys):
    Path("a.ckpt").write_bytes(published_file)
    BPE.train(["aaaa bbbb"], 4).save("bpe.txt")
    sample.main("--prompt x --checkpoint a.ckpt --heads 3 --bpe bpe.txt --num-samples 2 --image-steps 4".split())
    assert "s a picture" in capsys.readouterr().out
    pretrained.main("a.ckpt --out ours.pt --heads 3 --bpe bpe.txt".split())
    for name in ("a.ckpt", "ours.pt"):
        sample.main(f"--image samples.png --checkpoint {name} --heads 3 --bpe bpe.txt --clean".split())
    lines = capsys.readouterr().out.splitlines()
    assert lines[3:11] == lines[13:21] and len(lines) == 21
