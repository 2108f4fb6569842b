"""Real runs of train.py, made small: one object, a model of a few thousand weights, six updates of each network."""
import copy
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import sample
import train
from nanomagvlt import io
from nanomagvlt.config import PRESETS, preset
from nanomagvlt.training import cli, cost, loop, train_vqgan, update

SMALL = """
    --preset micro --pairs 60 --eval-scenes 3 --bpe-merges 20 --bpe-dropout 0.1 --vq-images 60 --vq-steps 6 --vq-start 2
    --vq-batch 4 --vq-channels 4 --vq-latent 8 --codebook-size 16 --codebook-dim 4 --layers 1 --width 16 --heads 2
    --dropout 0.1 --task-weights t2i=1,i2t=1,it2it=1 --steps 6 --batch-size 4 --warmup 2 --log-every 1 --eval-every 3
    --sample-every 6 --save-every 4 --image-steps 2 --text-steps 2""".split()


WHOLE = [*SMALL, *"--micro-batch 2 --unroll-mask true --mixsel select".split()]  # in two parts, all of the method


def run(*more: str) -> Path:
    train.main([*WHOLE, *more])
    return Path("runs/micro")


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def content(folder: Path) -> dict:
    """All that a run wrote, by file name: checkpoints as loaded, all else as bytes; the clock's readings aside."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"):
        if path.suffix == ".pt":
            what = torch.load(path, weights_only=True)
            what = {name: value for name, value in what.items() if name not in ("seconds", "cpu_seconds")}
        else:
            what = re.sub(rb'"(cpu_)?seconds": [0-9.]+, ', b"", path.read_bytes())
        found[str(path.relative_to(folder))] = what
    return found


@pytest.fixture(scope="module")
def straight_folder(tmp_path_factory) -> Path:
    """Where an uninterrupted run was made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("straight"))
        run()
    return folder


@pytest.fixture(scope="module")
def straight(straight_folder) -> dict:
    """What an uninterrupted run writes."""
    return content(straight_folder / "runs" / "micro")


def test_a_run_leaves_what_the_readme_says(straight):
    cache = ("caption_ends.bin", "captions.bin", "meta.json", "partners.bin", "tokens.bin", "views.bin")
    assert set(straight) == {"best.pt", "bpe.txt", "config.json", "last.pt", "log.jsonl", "samples/000006.png",
                             "scenes.json", "vqgan.pt", "vqgan_log.jsonl",
                             *(f"cache/train/{name}" for name in cache), *(f"cache/val/{name}" for name in cache)}
    log = [json.loads(line) for line in straight["log.jsonl"].splitlines()]
    assert [line["step"] for line in log if "task" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in log if "val_mask" in line] == [3, 6]
    assert straight["last.pt"]["step"] == 6 and straight["config.json"] != straight["scenes.json"]



@pytest.mark.parametrize("update", [3, *(pytest.param(update, marks=pytest.mark.slow) for update in (1, 5))])
@pytest.mark.parametrize("module, stage", [(train_vqgan, "update_vqgan"), (train, "update_model")])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(module, stage, update, straight, tmp_path, monkeypatch,
                                                              capsys):
    """Ctrl-C in the middle of an update. Six updates of batch 4 on 60 pairs: the epoch is not over either."""
    monkeypatch.chdir(tmp_path)
    original = getattr(module, stage)

    def with_ctrl_c(*args):
        if args[-1] == update - 1:
            signal.raise_signal(signal.SIGINT)
        return original(*args)
    monkeypatch.setattr(module, stage, with_ctrl_c)
    with pytest.raises(SystemExit) as exit:
        run()
    assert exit.value.code == 130
    assert f"at step {update}; the same command goes on" in capsys.readouterr().out
    monkeypatch.setattr(module, stage, original)
    resumed = content(run())
    assert f"going on at step {update}" in capsys.readouterr().out
    assert [name for name in straight if not equal(straight[name], resumed[name])] == []
    assert set(resumed) == set(straight)


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(straight, tmp_path, monkeypatch):
    """Nothing is saved at update 5, so the last save, at 4, is what counts."""
    monkeypatch.chdir(tmp_path)

    def killed(*args, original=train.update_model):
        return original(*args) if args[-1] < 5 else sys.exit(9)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "update_model", killed)
        run()
    with open("runs/micro/log.jsonl", "a") as log:
        log.write('{"step": 5, "ta')  # and the machine went down while it wrote
    assert equal(straight, content(run()))


def test_a_finished_run_does_nothing_again(straight, straight_folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(straight_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    assert equal(straight, content(run()))
    out = capsys.readouterr().out
    assert all(f"{stage}: reusing" in out for stage in ("vqgan", "cache", "bpe"))


def test_a_run_does_not_change_its_settings(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run("--stage", "bpe")
    before = content(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        run("--width", "24")
    assert exit.value.code == 2
    error = capsys.readouterr().err.strip()
    assert "width = 16, now it is 24: take another --name" in error and "\n" not in error
    assert equal(before, content(tmp_path))


def test_learning_rate():
    rates = [loop.learning_rate(step, 1.0, 10, 110) for step in range(111)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0 and rates[60] == pytest.approx(0.5) and rates[110] == 0
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))
    late = [loop.learning_rate(step, 1.0, 10, 110, 0.2) for step in range(111)]
    assert late[10:91] == [1.0] * 81 and late[100] == pytest.approx(0.5) and late[110] == 0


def test_tasks_are_drawn_by_weight(cfg):
    cfg.task_weights = {"t2i": 8.0, "i2t": 1.0, "it2it": 1.0}
    tasks = [update.draw_task(cfg, step) for step in range(2000)]
    assert abs(tasks.count("t2i") / 2000 - 0.8) < 0.03 and abs(tasks.count("i2t") / 2000 - 0.1) < 0.03


def test_no_decay_on_biases_norms_embeddings_positions(cfg, model):
    cfg.optimizer = "adamw"
    decayed, rest = train.optimizer_for(model, cfg, 1e-3).param_groups
    assert decayed["weight_decay"] == cfg.weight_decay and rest["weight_decay"] == 0
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(names[id(p)].endswith(".weight") and "norm" not in names[id(p)] for p in decayed["params"])
    undecayed = {names[id(p)] for p in rest["params"]}
    assert {"token_table.weight", "position_table.weight", "output_bias", "head.2.weight"} <= undecayed
    assert len(decayed["params"]) + len(rest["params"]) == len(names)


def test_muon_moves_matrices_of_blocks_along_all_directions_alike_and_the_rest_as_adamw(cfg, model):
    after = {}
    for cfg.optimizer in ("adamw", "muon"):
        trained, g = copy.deepcopy(model), torch.Generator().manual_seed(0)
        optimizer = train.optimizer_for(trained, cfg, 1e-3)
        for p in trained.parameters():
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step()
        after[cfg.optimizer] = dict(trained.named_parameters())
    for name, before in model.named_parameters():
        if name.startswith("blocks.") and before.ndim == 2:
            moved = before * (1 - 1e-3 * cfg.weight_decay) - after["muon"][name]
            sizes = torch.linalg.svdvals(moved) / (1e-3 * 0.2 * max(before.shape) ** 0.5)
            assert 0.6 < sizes.min() and sizes.max() < 1.3, name
        else:
            assert torch.equal(after["muon"][name], after["adamw"][name]), name


def test_what_samples_is_the_moving_average_of_what_is_trained(straight, cfg, model):
    averaged = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p += 1.0
    before = {name: p.clone() for name, p in averaged.named_parameters()}
    train.update_ema(averaged, model, 0.75)
    assert all(torch.allclose(p, before[name] + 0.25) for name, p in averaged.named_parameters())
    saved = straight["last.pt"]
    assert saved["model"].keys() == saved["trained"].keys() and not equal(saved["model"], saved["trained"])


def test_argvlt_trains_draws_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(*"--model argvlt --task-weights t2i=1,i2t=1 --segments true --unroll-mask false --mixsel select".split())
    log = [json.loads(line) for line in Path("runs/micro/log.jsonl").read_text().splitlines()]
    assert {"generated", "condition", "mixsel"} <= log[0].keys() and "val_generated" in log[-1]
    capsys.readouterr()
    sample.main(["--prompt", "a red circle", "--num-samples", "2"])
    sample.main(["--image", "samples.png", "--num-samples", "2"])
    sample.main(["--image", "samples.png", "--prompt", "a red circle", "--num-samples", "2", "--visible-first", "true"])
    sample.main(["--image", "samples.png", "--text", "a [MASK:2] circle", "--num-samples", "2"])
    assert capsys.readouterr().out.splitlines()[-1].endswith("circle")
    for flag in ("--together", "--trace", "--image-steps=2"):
        with pytest.raises(SystemExit):
            sample.main([*(["--prompt", "x"] if flag != "--together" else []), flag])
        assert "ARGVLT" in capsys.readouterr().err



@pytest.mark.parametrize("start", [2, 4])
def test_a_vqgan_that_diverges_says_so_and_changes_nothing(start, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run("--stage", "vqgan", "--vq-lr", "1e30", "--save-every", "1", "--vq-start", str(start))
    error = capsys.readouterr().err
    assert "--vq-lr" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("name", PRESETS)
def test_the_settings_of_each_preset_go_together_for_both_models(name):
    for model in ("magvlt", "argvlt"):
        assert preset(name, model=model).model == model  # ValueError, if they did not


def test_a_folder_in_which_nothing_was_done_may_be_begun_anew(tmp_path):
    run = tmp_path / "x"
    run.mkdir()
    train.check_run_config(preset("micro", data="shapes:typo"), run, {})
    train.check_run_config(preset("micro"), run, {})
    (run / "vqgan.pt").touch()
    with pytest.raises(ValueError, match="width"):
        train.check_run_config(preset("micro", width=64), run, {})
    kept = json.loads((run / "config.json").read_text())
    del kept["it2it_ratio"]  # begun before the setting existed: it then has its default
    (run / "config.json").write_text(json.dumps(kept))
    with pytest.raises(ValueError, match="it2it_ratio"):
        train.check_run_config(preset("micro", it2it_ratio="same"), run, {})
    train.check_run_config(preset("micro"), run, {})


@pytest.fixture
def pictures(tmp_path, monkeypatch) -> None:
    """A folder d of six pictures, each with a caption."""
    monkeypatch.chdir(tmp_path)
    Path("d").mkdir()
    for i in range(6):
        Image.new("RGB", (40, 20), (40 * i, 90, 200)).save(f"d/{i}.png")
        Path(f"d/{i}.txt").write_text(f"picture {i}")


def refused(capsys, *flags: str) -> str:
    """The one line with which a run is refused. It changes no file."""
    before = content(Path())
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        run(*flags)
    [line] = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and equal(before, content(Path()))
    return line


@pytest.mark.parametrize("flags, named", [
    ("--data nowhere", "nowhere"), ("--data shapes:tinny", "'tiny'"), ("--data d --val-data nowhere", "nowhere"),
    ("--data d --val-data empty", "empty"), ("--data d --vq-channels 6", "vq_groups"),
    ("--cache c", "c/train"), ("--data d --cache c", "--vqgan"), ("--data d --cache c --val-data d", "val_data"),
    ("--data d --val-data bare", "bare"), ("--data d --vqgan v.pt", "v.pt"),
    ("--data d --bpe b.txt", "b.txt"), ("--data d --vq-vgg v.pth", "vq_lpips"),
    ("--data d --compile true", "--compile"), ("--data d --vq-attention 7", "vq_attention")])
def test_what_a_run_lacks_is_found_before_work_begins(flags, named, pictures, monkeypatch, capsys):
    def no_compiler(*args):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")
    monkeypatch.setattr(torch, "compile", no_compiler)
    Path("empty").mkdir()
    Path("bare").mkdir()
    Path("bare/0.png").write_bytes(Path("d/0.png").read_bytes())
    assert named in refused(capsys, *flags.split())


def test_a_run_goes_on_where_its_inputs_are_the_same_wherever_they_are(pictures, capsys):
    run("--data", "d", "--val-data", "./d", "--stage", "bpe")
    Path("d").rename("moved")
    run("--data", "./moved", "--val-data", "moved", "--stage", "bpe")
    Path("moved/3.txt").write_text("picture 7")
    assert "train pairs" in refused(capsys, "--data", "moved", "--stage", "bpe")
    own = ["--cache", "runs/micro/cache", "--vqgan", "runs/micro/vqgan.pt"]
    kept = content(Path("runs/micro/cache"))
    run(*own, "--stage", "bpe")
    assert equal(kept, content(Path("runs/micro/cache")))
    with pytest.raises(SystemExit):
        run(*own, "--name", "other", "--fit", "pad")
    assert "--fit" in capsys.readouterr().err


def test_one_process_at_a_time_uses_a_run(pictures, capsys):
    run("--data", "d", "--stage", "vqgan")
    with io.lock(Path("runs/micro/.lock")):
        assert f"process {os.getpid()}" in refused(capsys, "--data", "d")
    run("--data", "d", "--stage", "cache")


def test_a_damaged_log_loses_its_damaged_lines_alone(tmp_path):
    path, lines = tmp_path / "log.jsonl", [f'{{"step": {i}}}\n'.encode() for i in range(9)]
    for damage in (b"\0" * 500, b'{"step": 5, "ta', b"3\n", b"\xff\n", b'{"loss": 1}\n', b'{"step": "x"}\n'):
        path.write_bytes(b"".join(lines[:3]) + damage + b"\n" + b"".join(lines[3:]) + damage.rstrip())
        loop.Log(path, 6).write(step=7)
        assert path.read_bytes() == b"".join(lines[:8])


@pytest.mark.parametrize("error, named", [
    (ValueError("--x 3 is too much"), "--x 3"), (OSError(28, "No space left on device", "runs/a"), "runs/a: No space"),
    (MemoryError("no"), "memory"), (torch.OutOfMemoryError("CUDA out of memory."), "--micro-batch"),
    (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: 9 bytes"), "can't allocate memory: 9 bytes"),
    (RuntimeError("TritonMissing: none"), "--compile"), (RuntimeError("a fault of this program"), "")])
def test_errors_that_the_user_can_mend_are_one_line(error, named):
    line = cli.explain(error)
    assert named in line and bool(line) == bool(named) and "\n" not in line


def test_updates_that_are_not_finite_change_nothing_and_three_in_a_row_end_the_run(straight, tmp_path, monkeypatch,
                                                                                   capsys):
    """One is skipped and counted. The third in a row stops, and the last save is from before."""
    monkeypatch.chdir(tmp_path)
    original, bad = update.objectives.total_loss, {2}

    def total_loss(cfg, **terms):
        return original(cfg, **terms) * (float("nan") if step[0] in bad else 1.0)
    step = [0]

    def counting(*args, call=train.update_model):
        step[0] = args[-1]
        return call(*args)
    monkeypatch.setattr(train, "update_model", counting)
    monkeypatch.setattr(update.objectives, "total_loss", total_loss)
    run()
    log = [json.loads(line) for line in Path("runs/micro/log.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in log if "task" in line] == [0, 0, 1, 1, 1, 1]
    straight_log = log

    def with_ctrl_c(*args):
        if args[-1] == 4:
            signal.raise_signal(signal.SIGINT)
        return counting(*args)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "update_model", with_ctrl_c)
        run("--name", "resumed")
    run("--name", "resumed")
    log = [json.loads(line) for line in Path("runs/resumed/log.jsonl").read_text().splitlines()]
    untimed = {"seconds": 0, "cpu_seconds": 0}
    assert [line | untimed for line in log] == [line | untimed for line in straight_log]
    bad |= {3, 4, 5}
    with pytest.raises(SystemExit):
        run("--name", "bad")
    assert "the gradients of 3 updates in a row, up to step 5, were not finite" in capsys.readouterr().err
    assert torch.load("runs/bad/last.pt", weights_only=True)["step"] == 4
    trained = torch.load("runs/bad/last.pt", weights_only=True)["trained"]
    assert all(p.isfinite().all() for p in trained.values())


def test_fp16_lowers_a_loss_scale_that_is_too_large_and_resumes_exactly(tmp_path, monkeypatch):
    """It starts so large that over three updates in a row are skipped: no divergence. Ctrl-C in the second."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "scaler_for", lambda *args: torch.amp.GradScaler("cpu", init_scale=2.0 ** 20))
    flags = "--precision", "fp16", "--eval-scenes", "0"
    straight = content(run(*flags))
    log = [json.loads(line) for line in straight["log.jsonl"].splitlines()]
    skipped = [line["skipped"] for line in log if "task" in line]
    assert skipped[3] == 4 and skipped[5] < 6 and straight["last.pt"]["scaler"]["scale"] == 2.0 ** (20 - skipped[5])
    for name in ("last.pt", "log.jsonl"):
        (Path("runs/micro") / name).unlink()

    def with_ctrl_c(*args, original=train.update_model):
        if args[-1] == 1:
            signal.raise_signal(signal.SIGINT)
        return original(*args)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "update_model", with_ctrl_c)
        run(*flags)
    assert equal(straight, content(run(*flags)))


def test_a_gpu_without_bfloat16_is_told_of_fp16(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert "--precision fp16" in refused(capsys, "--precision", "bf16")


def test_a_dry_run_says_what_it_costs_and_does_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main([*SMALL, "--text-window", "0", "--dry-run"])
    assert "parameters   14,822" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_operations_of_an_update_are_those_of_the_formula():
    """Two layers of base in t2i, UnrollMask and MixSel included: backward costs twice the forward pass."""
    cfg, length, d = preset("base", layers=2), 256 + 64 + 4, 1024
    blocks = 2 * length * (12 * d ** 2 + 2 * length * d)                   # qkv, proj and MLP; Q K^T and A V
    head = 256 * (d ** 2 + d * cfg.codebook_size)
    assert cost.flops_of_update(cfg, "t2i") == pytest.approx(3 * 3 * 2 * (blocks + head), rel=0.001)


def test_a_benchmark_measures_updates_and_keeps_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(["--preset", "tiny", "--layers", "1", "--width", "16", "--heads", "2", "--batch-size", "4",
                "--micro-batch", "2", "--benchmark", "1"])
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split() for line in lines if line.startswith(("t2i", "i2t", "it2it"))}
    assert all(float(seconds) * float(a_second) == pytest.approx(4, rel=0.02)
               for _, seconds, a_second, *_ in rows.values()) and len(rows) == 3
    assert any("aten::" in line for line in lines) and not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        train.main(["--preset", "tiny", "--benchmark", "0"])


def test_memory_grows_with_pairs_and_blocks():
    """In bfloat16 a block keeps twenty times (L, D) of a pair, and no (H, L, L), which would be two and a half more."""
    kept = {(layers, pairs): cost.activation_bytes(preset("base", layers=layers), "t2i", pairs)
            for layers, pairs in ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2))}
    a_pair = kept[1, 2] - kept[1, 1]
    assert kept[1, 4] - kept[1, 2] == 2 * a_pair > 0
    assert 19 < (kept[2, 2] - kept[2, 1] - a_pair) / (324 * 1024 * 2) < 21
