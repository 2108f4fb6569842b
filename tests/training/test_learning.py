"""Does it learn? A real training run of the one-object world, from nothing, in a few minutes."""
import json
from pathlib import Path

import pytest

import train


@pytest.mark.slow
def test_micro_world_is_learnt_from_nothing(tmp_path, monkeypatch):
    """Most unseen scenes are exactly drawn, and exactly told: a model that ignores the condition gets 1 in 96.

    The last line holds the same results against the next scene's condition: what ignoring would get.
    """
    monkeypatch.chdir(tmp_path)
    train.main(["--preset", "micro"])
    result = {name: value["value"] for name, value in json.loads(Path("runs/micro/scenes.json").read_text()).items()
              if isinstance(value, dict)}
    assert result["reconstruction"] >= 0.75
    for task in ("t2i", "i2t"):
        assert result[f"{task}_exact"] >= 0.7 and result[f"{task}_facts"] >= 0.75
        assert result[f"{task}_exact_ignoring"] <= 0.2 and result[f"{task}_facts_ignoring"] <= 0.7
