"""The scripts as they are typed: every mistake gets one line that names it, status 2, and leaves no file behind."""
import importlib.util
import json
import os
import platform
import re
import shlex
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
from nanomagvlt.config import preset
from nanomagvlt.io import write_image
from nanomagvlt.masking import ORDERS, SCHEDULES
from nanomagvlt.model import MAGVLT
from nanomagvlt.sampling.pipeline import contact_sheet
from nanomagvlt.tokenizers.bpe import BPE
from nanomagvlt.tokenizers.vqgan import VQGAN
from nanomagvlt.training import checkpoint, pretrained
from test_pretrained import SIZES, in_their_layout

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("prepare", ROOT / "data" / "prepare.py")
prepare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)
SCRIPTS = {"train.py": train, "sample.py": sample, "eval.py": eval, "data/prepare.py": prepare}
ALL_TASKS = {"t2i": 1.0, "i2t": 1.0, "it2it": 1.0}


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
    return untrained(tmp_path / "runs" / "x" / "last.pt", task_weights=ALL_TASKS)


def refused(script: str, argv: list[str], capsys) -> str:
    """The one line of the script's error; it must leave no file behind."""
    before = sorted(Path.cwd().rglob("*"))
    with pytest.raises(SystemExit) as exit:
        SCRIPTS[script].main(argv)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and error.startswith(f"{script}: "), error
    assert sorted(Path.cwd().rglob("*")) == before
    return error


def sampled(typed: str, capsys) -> tuple[list[str], np.ndarray | None]:
    """The lines that sample.py prints after its first, and samples.png."""
    sample.main(shlex.split(typed))
    return capsys.readouterr().out.splitlines()[1:], np.asarray(Image.open("samples.png"))


def measured(typed: str, capsys) -> tuple[dict | list, str]:
    """The results that eval.py writes, and what it prints."""
    eval.main([*typed.split(), "--num-scenes", "3", "--out", "results.json"])
    return json.loads(Path("results.json").read_text()), capsys.readouterr().out


# ---- mistakes ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("typed, word", [
    ("train.py --widht 3", "--width"),
    ("train.py --preset tini", "'tiny'"),
    ("train.py --preset base", "--data"),
    ("train.py --preset base --data x", "--vqgan"),
    ("train.py --width many", "--width"),
    ("train.py --width 130", "heads 8"),
    ("train.py --layers 0", "layers 0"),
    ("train.py --grad-clip inf", "grad_clip inf"),
    ("train.py --vq-multipliers ''", "vq_multipliers"),
    ("train.py --task-weights t2i", "--task-weights"),
    ("train.py --task-weights t2ii=1", "'t2i'"),
    ("train.py --betas 0.9,x", "--betas"),
    ("train.py --stage vqgn", "--stage"),
    ("train.py --device cuda:9", "--device cuda:9"),
    ("train.py extra", "extra"),
    ("sample.py", "--prompt"),
    ("sample.py --prompt x", "train.py"),
    ("sample.py --prompt x --checkpoint no.pt", "no.pt"),
    ("sample.py --prompt x --num-samples 0", "--num-samples"),
    ("eval.py scene", "'scene'"),
    ("eval.py table --variants ful", "'full'"),
    ("eval.py speed --batches 1,x", "--batches"),
    ("data/prepare.py --source shapes:micro", "--vqgan"),
])
def test_mistakes_before_anything_is_trained(typed, word, capsys):
    script, *argv = shlex.split(typed)
    assert word in refused(script, argv, capsys)


@pytest.mark.parametrize("typed, word", [
    ("--image none.png", "none.png"),
    ("--image text.png", "text.png"),
    ("--image .", "directory"),
    ("--prompt x --checkpoint text.png", "text.png"),
    ("--prompt x --device meta", "--device meta"),
    ("--prompt x --out no/such/folder.png", "--out"),
    ("--prompt x --image-order haltom", "image_order"),
    ("--prompt x --guidance 2", "guidance 2"),
    ("--prompt x --text 'a [MASK]'", "--text"),
    ("--prompt x --region 0,0,9,9", "--image"),
    ("--image white.png --guidance 2", "--prompt"),
    ("--image white.png --text 'a circle'", "[MASK]"),
    ("--image white.png --prompt x --region 0,0,9", "--region"),
    ("--image white.png --prompt x --keep 1", "--keep"),
    ("--image white.png --prompt x --mask black.png", "mask"),
    ("--image white.png --prompt x --mask small.png", "small.png"),
    ("--image white.png --prompt x --mask glass.png", "glass.png"),
    ("--prompt x --candidates 3 --judge", "--num-samples"),
    ("--prompt x --candidates 9 --judge", "'x'"),
    ("--prompt x --candidates 9 --clip text.png", "text.png"),
    ("--prompt x --attention blue", "'blue'"),
    (f"--prompt '{'x' * 24} y' --attention y", "24"),
])
def test_mistakes_in_sampling(typed, word, trained, capsys):
    Path("text.png").write_text("no image")
    for name, colour, size in (("white", "white", (40, 32)), ("black", "black", (40, 32)), ("small", "white", (8, 8))):
        Image.new("RGB", size, colour).save(f"{name}.png")
    Image.new("RGBA", (40, 32)).save("glass.png")
    assert word in refused("sample.py", shlex.split(typed), capsys)


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_script_helps(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        SCRIPTS[script].main(["--help"])
    assert script in capsys.readouterr().out


def test_a_script_runs_from_anywhere_without_installation(tmp_path):
    command = [sys.executable, ROOT / "data" / "prepare.py", "--help"]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)


# ---- sample.py -----------------------------------------------------------------------------------------------

def test_drawings_depend_on_the_seed_and_the_settings_alone(trained, capsys):
    prompt = "--prompt 'a red circle' --num-samples"
    _, three = sampled(f"{prompt} 3", capsys)
    assert np.array_equal(three, sampled(f"{prompt} 3", capsys)[1])
    first = three[8:168:5, 8:168:5].astype(int)  # it is the single one; a larger batch may round a pixel differently
    assert abs(first - sampled(f"{prompt} 1", capsys)[1]).max() <= 1
    for other in (f"--seed {10 ** 30}", "--image-steps 5 --image-temperature 2,2", "--image-order halton"):
        assert not np.array_equal(three, sampled(f"{prompt} 3 {other}", capsys)[1])
    lines = {n: sampled(f"--prompt {'x' * n} --num-samples 1", capsys)[0] for n in (24, 25)}
    assert len(lines[25]) == len(lines[24]) + 1 and "24 tokens" in lines[25][0]


def test_captions_are_lines_that_can_be_printed(trained, capsys):
    sampled("--prompt x", capsys)
    lines, _ = sampled("--image samples.png --num-samples 3", capsys)
    assert len(lines) == 4 and "3 x samples.png" in lines[0] and all(map(str.isprintable, lines))


def test_sheets_tell_all_letters_apart_and_stay_small():
    picture = np.zeros((1, 32, 32, 3), np.uint8)
    sheets = [contact_sheet(picture, [text]) for text in ("жук", "лес", "über", "äber", "猫", "a", "x" * 20_000)]
    assert len({sheet.tobytes() for sheet in sheets}) == 7 and max(sheet.height for sheet in sheets) < 400


def test_what_steers_a_terminal_is_replaced_and_joiners_are_kept():
    kept = "👨\u200d👩\u200d👧 می\u200cخواهم \u3000\n\U000e0067"
    assert sample.printable(kept) == kept
    assert sample.printable("\x1b\0\r\x9b\u202e\u2066\u200f\u2028\udc80") == "\ufffd" * 9


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path, image = tmp_path / "a.png", Image.new("RGB", (9, 9))
    write_image(path, [image])
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="a.png"):
        patch.setattr(os, "fsync", full)
        write_image(path, [image.resize((99, 99))])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_temporary_files_of_processes_that_were_killed_are_removed_and_no_others(tmp_path):
    names = [f"a.png.{platform.node()}-{process}.tmp" for process in ("99999999", "1", str(os.getppid()), "backup")]
    for name in names:
        (tmp_path / name).touch()
    write_image(tmp_path / "a.png", [Image.new("RGB", (9, 9))])
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", *names[1:]}


def test_a_part_of_an_image_and_of_a_text_is_filled_in(trained, capsys):
    Image.new("RGB", (64, 32), "white").save("white.png")
    prompt = "--prompt 'a red circle' --num-samples 3"
    for part, count in (("", 4), ("--region 16,0,48,32", 16), ("--region 16,0,32,32 --outside", 8), ("--keep 0.5", 8),
                        ("--mask white.png --blend", 16)):
        assert f"{count} of 16" in sampled(f"--image white.png {prompt} {part}", capsys)[0][0]
    for everything in ("--region 0,0,64,32", "--keep 0"):           # all drawn again: a drawing like others
        drawn = sampled(f"--image white.png {prompt} {everything}", capsys)[1]
        assert np.array_equal(drawn, sampled(prompt, capsys)[1])
    lines, _ = sampled("--image white.png --text 'a [MASK:2] circle'", capsys)
    assert len(lines) == 9 and all(line.startswith("a") and line.endswith("circle") for line in lines[1:])


def test_images_and_captions_are_made_together_by_a_model_trained_for_it(trained, capsys):
    (_, first, *others), _ = sampled("--together --num-samples 3", capsys)
    assert len(others) == 2 and sampled("--together --num-samples 1", capsys)[0][1] == first
    lines, _ = sampled("--together --image samples.png --keep 0.5 --text 'a [MASK] circle' --trace", capsys)
    assert all(line.endswith("circle") for line in lines[1:9]) and "samples-steps.gif" in lines[0]
    untrained(Path("other.pt"))
    assert "it2it" in refused("sample.py", ["--together", "--checkpoint", "other.pt"], capsys)


def test_the_best_candidates_are_kept(trained, capsys):
    lines, _ = sampled("--prompt 'a red circle' --candidates 4 --judge --num-samples 3", capsys)
    assert "best 3 of 4" in lines[0]
    scores = [float(score) for score in re.findall(r"\d\.\d{3}", lines[0])]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)


def test_steps_and_attention_are_shown(trained, capsys):
    sampled("--prompt 'a red circle' --trace --attention 'red circle' --image-schedule square", capsys)
    strip, film = Image.open("samples-steps.png"), Image.open("samples-steps.gif")
    assert film.n_frames == 2 and strip.size == (196, 296) and Image.open("samples-attention.png").size == (196, 196)
    lines, _ = sampled("--image samples.png --trace --text-order random --text-temperature 1,1", capsys)
    assert lines[-2].startswith("  1  [") and lines[-1].startswith("  2  ")


@pytest.fixture
def published() -> None:
    """a.ckpt, a file as the authors' are, but small, and bpe.txt, four merges, which make its text vocabulary."""
    torch.manual_seed(0)
    cfg = preset("base", **SIZES | {"text_vocab": 518, "heads": 1})
    torch.save({"state_dict": in_their_layout(MAGVLT(cfg), VQGAN(cfg))}, "a.ckpt")
    BPE.train(["aaaa bbbb"], 4).save("bpe.txt")


def test_a_published_file_needs_its_own_merges(published, capsys):
    BPE([]).save("other.txt")
    for bpe, word in (("no.txt", "data/download.py"), ("other.txt", "other.txt")):
        assert word in refused("sample.py", f"--prompt x --checkpoint a.ckpt --bpe {bpe}".split(), capsys)


def test_a_published_file_draws_and_captions_and_so_does_its_conversion(published, capsys):
    sampled("--prompt x --checkpoint a.ckpt --bpe bpe.txt --num-samples 2 --image-steps 4", capsys)
    pretrained.main("a.ckpt --out ours.pt --bpe bpe.txt".split())
    captions = [sampled(f"--image samples.png --checkpoint {name} --bpe bpe.txt", capsys)[0][-8:]
                for name in ("a.ckpt", "ours.pt")]
    assert captions[0] == captions[1] and any(captions[0])


# ---- eval.py and data/prepare.py ------------------------------------------------------------------------------

def test_eval_scenes_writes_what_it_prints(trained, capsys):
    results, out = measured("scenes", capsys)
    for name in ("t2i_exact", "t2i_facts", "i2t_exact", "i2t_facts", "length", "reconstruction"):
        assert f"{results[name]['value']:.3f} [" in out


def test_eval_bias_needs_a_biased_world(trained, capsys):
    assert "shapes:micro" in refused("eval.py", ["bias"], capsys)
    untrained(Path("biased.pt"), data="shapes:micro-biased", text_length=60)
    results, out = measured("bias --checkpoint biased.pt", capsys)
    assert results["scenes"] == 3 and f"{results['i2t_usual']['value']:.3f} [" in out


def test_eval_edit_needs_captions_that_fit(trained, capsys):
    assert "text_length 24" in refused("eval.py", ["edit", "--num-scenes", "3"], capsys)
    untrained(Path("longer.pt"), task_weights=ALL_TASKS, text_length=60)
    results, out = measured("edit --num-pairs 2 --checkpoint longer.pt", capsys)
    names = [f"{part}_{how}" for part in ("object", "centre") for how in ("inpainted", "infilled")]
    for name in (*names, *(f"{name}_without" for name in names), "t2i", "i2t", "i2t_true_length", "pairs_agree"):
        assert f"{results[name]['value']:.3f} [" in out


def test_eval_sweep_varies_what_the_model_can_use(trained, capsys):
    rows, _ = measured("sweep --phrasings 1 --num-pairs 2", capsys)
    assert len(rows) == (len(ORDERS) + len(SCHEDULES) + 6 + 5) * 5 and not any("guidance" in row for row in rows)
    assert "condition_dropout" in refused("eval.py", ["sweep", "--vary", "guidance"], capsys)
    untrained(Path("guided.pt"), task_weights=ALL_TASKS, condition_dropout=0.1)
    found, _ = measured("sweep --phrasings 1 --checkpoint guided.pt --vary guidance", capsys)
    assert len(found) == 5 * 5
    assert [row["t2i_exact"] for row in found if row["guidance"] == 1] == [  # 1 is none: as the default order, gumbel
        row["t2i_exact"] for row in rows if row.get("order") == "gumbel"]


def test_prepare_then_train_on_it(trained, capsys):
    for folder in ("c/train --split train", "c/val --split val", "d/train"):
        prepare.main(f"--source shapes:micro --vqgan runs/x/vqgan.pt --pairs 40 --out {folder}".split())
    tiny = "--preset micro --vqgan runs/x/vqgan.pt --layers 1 --width 16 --heads 2 --steps 2 --eval-scenes 2"
    train.main(f"{tiny} --cache c --name y".split())
    assert "cache: reusing c/train, 40 pairs" in capsys.readouterr().out and Path("runs/y/last.pt").exists()
    meta = Path("d/train/meta.json")
    meta.write_text(re.sub(r'"vqgan": "\w+"', '"vqgan": "another"', meta.read_text()))
    with pytest.raises(SystemExit):
        train.main(f"{tiny} --cache d --name z".split())
    assert "d/train" in capsys.readouterr().err
