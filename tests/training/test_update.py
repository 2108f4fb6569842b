"""One update, however it is cut into parts and shared among processes."""
import copy
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from nanomagvlt import objectives
from nanomagvlt.config import preset
from nanomagvlt.data.cache import rows_of_step
from nanomagvlt.model import MAGVLT
from nanomagvlt.tokenizers.bpe import BPE
from nanomagvlt.training import update
from nanomagvlt.training.loop import optimizer_for, scaler_for

ROOT = Path(__file__).parents[2]
EVERYTHING = dict(image_size=32, codebook_size=12, layers=1, width=16, heads=2, bpe_merges=0, bpe_dropout=0.1,
                  text_length=40, text_bucket=40, batch_size=8, micro_batch=2, unroll_mask=True, mixsel="select",
                  label_smoothing=0.1, dropout=0.1, condition_dropout=0.1,
                  task_weights={"t2i": 1.0, "i2t": 1.0, "it2it": 1.0}, length_pass="main", lr=1e-3, warmup=1)


class Cache:
    """Forty pairs: captions of unequal length."""

    partners = np.array([1, -1] * 20)

    def rows_of_step(self, step, batch_size, seed):
        return rows_of_step(step, batch_size, 40, seed)

    def tokens_of(self, rows):
        chance = np.random.default_rng(0).integers(0, 12, (40, 32))
        return torch.from_numpy(chance[rows]).split(16, dim=1)

    def captions(self, rows):
        return ["a red circle above a blue square"[:2 + i % 30] for i in rows]


def trained(steps: int, score=None, **changes) -> tuple[MAGVLT, list]:
    """A small model after some updates, all of the method switched on; and their loss terms."""
    cfg = preset("tiny", **{**EVERYTHING, **changes})
    torch.manual_seed(0)
    model, scaler = MAGVLT(cfg), scaler_for(cfg, torch.device("cpu"))
    optimizer, parts, history = optimizer_for(model, cfg, cfg.lr), update.Parts(cfg, Cache(), BPE([]), model.device), []
    for step in range(steps):
        _, terms, _ = update.update_model(model, optimizer, scaler, cfg, parts, score or objectives.score_pass, step)
        history.append(terms)
    return model, history


def test_the_gradient_is_the_mean_of_the_parts(monkeypatch):
    """Parts of 2 of a batch of 8, against each part's own gradient, written out."""
    model, terms = trained(1)
    cfg = model.cfg
    torch.manual_seed(0)
    fresh = MAGVLT(cfg)
    parts, means = update.Parts(cfg, Cache(), BPE([]), fresh.device), {}
    for number, rows, batch in parts.of_step(0):
        torch.manual_seed(update.keyed_seed(cfg.seed, "dropout", 0, 2 * number))
        rng = update.partial(update.batch_uniform, fresh.device, 8, rows, cfg.seed, 0)
        loss, of_part = objectives.losses(fresh, update.draw_task(cfg, 0), batch, rng)
        (loss / 4).backward()
        means = {name: means.get(name, 0.0) + term / 4 for name, term in of_part.items()}
    torch.nn.utils.clip_grad_norm_(fresh.parameters(), cfg.grad_clip)
    assert gradients_agree(gradients(fresh), gradients(model))
    assert all(torch.allclose(means[name], terms[0][name]) for name in terms[0]) and means.keys() == terms[0].keys()


def gradients(model: MAGVLT) -> dict[str, torch.Tensor]:
    """Of the last update. Weights are not compared: where a gradient is all rounding, Adam makes a full step of it."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def gradients_agree(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], rtol=0, atol=1e-6) for name in a)


def shared(folder: Path) -> None:
    """The work of each process in the next test: the same updates, and their gradients in a file."""
    from nanomagvlt.training import distributed
    distributed.begin(torch.device("cpu"))
    model, terms = trained(6)
    torch.save([gradients(model), terms], folder / f"{distributed.rank()}.pt")
    if os.environ.get("BREAK"):  # a NaN in one process must change no weight in any
        before, cfg = copy.deepcopy(model.state_dict()), model.cfg
        if distributed.rank() == 1:
            original = objectives.total_loss
            objectives.total_loss = lambda cfg, **terms: original(cfg, **terms) * float("nan")
        _, _, norm = update.update_model(model, optimizer_for(model, cfg, 1.0), scaler_for(cfg, model.device), cfg,
                                         update.Parts(cfg, Cache(), BPE([]), model.device), objectives.score_pass, 7)
        assert norm != norm and all(torch.equal(before[n], p) for n, p in model.state_dict().items())
        (folder / f"unchanged-{distributed.rank()}").touch()
    distributed.end()


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_one_two_and_four_processes_do_the_same(processes, tmp_path):
    """All tasks, UnrollMask, MixSel, BPE dropout, unequal numbers of masked positions; then a NaN in one of them."""
    code = f"import test_update; from pathlib import Path; test_update.shared(Path({str(tmp_path)!r}))"
    (tmp_path / "go.py").write_text(code)
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'training'}", "OMP_NUM_THREADS": "1", "BREAK": "1"}
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port",
                    str(29_500 + processes + os.getpid() % 1000), str(tmp_path / "go.py")], env=env, check=True,
                   capture_output=True, timeout=300)
    model, expected = trained(6)
    for rank in range(processes):
        found, terms = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert gradients_agree(found, gradients(model))
        assert all(torch.allclose(a[name], b[name], atol=1e-5) for a, b in zip(expected, terms) for name in a)
    assert len(list(tmp_path.glob("unchanged-*"))) == processes


def test_the_order_of_rows_in_a_part_changes_no_gradient(monkeypatch):
    """All of the method except dropout: a row keeps its random numbers, wherever it stands."""
    settings = dict(micro_batch=8, dropout=0.0, task_weights={"t2i": 1.0})
    expected, _ = trained(1, **settings)
    monkeypatch.setattr(update.Parts, "order", lambda self, rows, step: np.array([3, 0, 7, 1, 6, 2, 5, 4]))
    assert gradients_agree(gradients(trained(1, **settings)[0]), gradients(expected))


def test_parts_of_t2i_have_captions_of_similar_length():
    cfg = preset("tiny", **{**EVERYTHING, "text_bucket": 1, "task_weights": {"t2i": 1.0}})
    _, batches = zip(*update.Parts(cfg, Cache(), BPE([]), torch.device("cpu")).make(0))
    widths = [batch["text_tokens"].shape[1] for batch in batches]
    assert widths == sorted(widths) and widths[0] < widths[-1]
    assert sorted(torch.cat([batch["rows"] for batch in batches]).tolist()) == list(range(8))


@pytest.mark.parametrize("bucket", [40, 4])
def test_a_whole_run_compiles_at_most_six_graphs(bucket, monkeypatch):
    """20 updates of all tasks, in two parts, with one padded length or many: no graph breaks."""
    torch._dynamo.reset()
    counter, seen = CompileCounter(), []
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    compiled = update.compiled_score(preset("tiny", **{**EVERYTHING, "text_bucket": bucket, "compile": True}))

    def score(*args):
        result = compiled(*args)
        seen.append(counter.frame_count)
        return result
    model, terms = trained(20, score, micro_batch=4, text_bucket=bucket)
    passes = [2 * (3 - ("unroll" not in of_a_step)) for of_a_step in terms]
    assert seen[-1] <= 6 and len(seen) == sum(passes)
    expected, _ = trained(20, micro_batch=4, text_bucket=bucket)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters()))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_for_matrices_only(precision):
    model, terms = trained(2, precision=precision)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(term.dtype == torch.float32 for of_a_step in terms for term in of_a_step.values())
    _, exact = trained(2)
    assert any(a[name] != b[name] for a, b in zip(terms, exact) for name in a)
    assert all(torch.allclose(a[name], b[name], rtol=0.05) for a, b in zip(terms, exact) for name in a)
