"""data/prepare.py makes a cache in parts: stopped and resumed, by many processes; and --inspect describes a source."""
import importlib.util
import platform
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nanomagvlt.data import cache, sources
from nanomagvlt.data.cache import TokenCache
from nanomagvlt.tokenizers.bpe import BPE
from nanomagvlt.tokenizers.vqgan import VQGAN
from nanomagvlt.training import checkpoint
from test_sources import captioned, png, tar, write

spec = importlib.util.spec_from_file_location("prepare_script", Path(__file__).parents[2] / "data" / "prepare.py")
prepare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)


@pytest.fixture(autouse=True)
def source(tmp_path, monkeypatch, cfg) -> str:
    """Five shards of 12 pairs, a folder that makes two pieces, and a VQ-GAN."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "PIECE", 4)
    noise = np.random.default_rng(0).integers(0, 255, (12, 20, 30, 3), dtype=np.uint8)
    Path("shards").mkdir()
    for shard in range(5):
        tar(f"shards/{shard:05d}.tar", captioned({f"{shard}{i:03d}": png(noise[i] ^ shard) for i in range(12)}))
    write(captioned({f"folder/{i}": png(size=(20, 20 + i)) for i in range(7)}))
    torch.manual_seed(0)
    checkpoint.save(Path("v.pt"), "vqgan", cfg, step=1, vqgan=VQGAN(cfg).state_dict())
    return "shards/{00000..00004}.tar,folder"


def run(source: str, out: str, *more: str) -> dict[str, bytes]:
    """Runs prepare.py; the files of the cache, if there is one."""
    prepare.main(["--source", source, "--vqgan", "v.pt", "--out", out, *more])
    return {path.name: path.read_bytes() for path in Path(out).glob("*")}


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """The names of the parts that were written, in this order."""
    names, write_part = [], cache.write_part
    monkeypatch.setattr(cache, "write_part", lambda path, *rest: write_part(path, *rest) or names.append(path.name))
    return names


def test_stopped_anywhere_and_resumed_it_is_the_same_cache(source, written, monkeypatch):
    flags = ("--crops", "2", "--clean-captions")
    whole = run(source, "whole", *flags)
    assert len(TokenCache(Path("whole"))) == 2 * (5 * 12 + 7) and len(written) == 7
    assert sorted(path.name for path in Path().iterdir() if "whole" in path.name) == ["whole"]
    encode_images, calls = cache.encode_images, []

    def breaks_off(*args):
        calls.append(1)
        if len(calls) in (1, 3, 6, 9, 12):
            raise KeyboardInterrupt
        return encode_images(*args)
    monkeypatch.setattr(cache, "encode_images", breaks_off)
    del written[:]
    for _ in range(5):
        with pytest.raises(SystemExit, match="130"):
            run(source, "c", *flags)
        assert not Path("c").exists() and len(written) == len(list(Path("c.parts").glob("*.npz")))
    Path("c.parts", written[0] + ".77.tmp").write_bytes(b"half a part, of a process that was killed")
    assert run(source, "c", *flags) == whole
    assert len(written) == len(set(written)) == 7 and not Path("c.parts").exists()


def test_a_finished_cache_is_kept_and_leftover_parts_are_removed(source, written):
    whole = run(source, "c")
    write({f"c.parts/{written[0]}": b"left by a process that was killed while it deleted the parts"})
    assert run(source, "c") == whole and len(written) == 7 and not Path("c.parts").exists()


def test_shares_in_any_order_make_the_same_cache(source, written, monkeypatch):
    whole = run(source, "whole")
    del written[:]
    for part in ("3/3", "1/3"):
        assert run(source, "c", "--part", part) == {}
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "3"), ("LOCAL_RANK", "1")):  # the second share, by torchrun
        monkeypatch.setenv(name, value)
    run(source, "c")
    monkeypatch.delenv("WORLD_SIZE")
    assert len(written) == len(set(written)) == 7
    assert sorted(path.name for path in Path("c.parts").iterdir()) == sorted(written)
    write({f"c/tokens.bin.{platform.node()}-99999999.tmp": b"", "c/captions.bin": b""})  # killed while they joined
    assert run(source, "c") == whole and len(written) == 7


def test_parts_of_other_settings_or_changed_shards_are_not_used(source, written):
    for more in ((), ("--crops", "1"), ("--crops", "1", "--seed", "1"), ("--clean-captions",)):
        run(source, "c", "--part", "1/1", *more)
    assert len(set(written)) == 4 * 7
    del written[:]
    tar("shards/00002.tar", captioned({"new": png()}))
    resumed = run(source, "c")
    assert len(written) == 1 and resumed == run(source, "afresh")


def test_a_bad_source_is_refused_and_repaired(written, capsys):
    sound = Path("shards/00001.tar").read_bytes()
    write({"shards/00001.tar": sound[:4000], "shards/00001_stats.json": b'{"successes": 12}'})
    with pytest.raises(SystemExit, match="2"):
        run("shards", "c")
    assert "00001.tar" in capsys.readouterr().err and not Path("c").exists()
    write({"shards/00001.tar": sound})
    del written[:]
    run("shards", "c")
    assert len(written) == 1 and len(TokenCache(Path("c"))) == 60


def test_a_damaged_part_is_named(source, capsys):
    run(source, "c", "--part", "1/1")
    part = sorted(Path("c.parts").iterdir())[0]
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(SystemExit, match="2"):
        run(source, "c")
    assert str(part) in capsys.readouterr().err and not Path("c").exists()


def test_inspect_counts_measures_and_shows_the_samples_of_a_source(capsys):
    write({"folder/0.png": b"no image"})
    BPE([]).save("bpe.txt")
    prepare.main(["--inspect", "--source", "folder", "--bpe", "bpe.txt", "--text-length", "8", "--image-size", "24",
                  "--vqgan", "v.pt"])
    out = capsys.readouterr().out
    for text in ("6 images with 6 captions in 2 pieces", "1 of 7", "1 x not an image", "20 to 20 (median 20) pixels",
                 "0.0% are smaller", "9 to 9 (median 9) tokens", "100.0% are longer than 8"):
        assert text in out
    assert (np.asarray(Image.open("inspect.png")) == (255, 0, 0)).all(-1).sum() == 6 * 160 ** 2
    prepare.main(["--inspect", "--source", "folder", "--part", "2/2", "--image-size", "21", "--sheet", "b.png"])
    out = capsys.readouterr().out
    for text in ("3 images", "100.0% are smaller than 21", "(median 1) words", "b.png"):
        assert text in out
