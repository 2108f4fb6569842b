"""Fetches published files: python data/download.py clip-bpe

An interrupted download continues where it stopped. A file with a known SHA-256 is checked before it gets its name.
data/README.md describes each file, its licence, and other places to find it.
"""
import hashlib
import http.client
import sys
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # run as a script from anywhere, without installing

from nanomagvlt.training.cli import Parser

# name: (file, address, SHA-256 where one is known)
FILES = {
    "clip-bpe": ("bpe_simple_vocab_16e6.txt.gz",
                 "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz",
                 "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"),
    "magvlt-base": ("magvlt-it2it-base.ckpt",
                    "https://arena.kakaocdn.net/brainrepo/models/magvlt/magvlt-it2it-base.ckpt", ""),
    "magvlt-large": ("magvlt-it2it-large.ckpt",
                     "https://arena.kakaocdn.net/brainrepo/models/magvlt/magvlt-it2it-large.ckpt", ""),
    "taming-vqgan": ("vqgan_imagenet_f16_16384.ckpt",
                     "https://heibox.uni-heidelberg.de/d/a7530b09fed84f80a887/files/?p=%2Fckpts%2Flast.ckpt&dl=1", ""),
    "inception": ("pt_inception-2015-12-05-6726825d.pth",
                  "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                  "pt_inception-2015-12-05-6726825d.pth",
                  "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"),
}


def download(url: str, path: Path, sha256: str = "") -> str:
    """Fetches a file, by way of path.part, and returns its SHA-256. A file that exists is only checked.

    Raises ValueError, one line, if the file cannot be fetched or has another SHA-256. path.part keeps what has arrived,
    and the next call continues it, unless the content is wrong.
    """
    part = path.with_name(path.name + ".part")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _fetch(url, part)
        except urllib.error.HTTPError as error:
            raise ValueError(f"{url}: {error.code} {error.reason}; data/README.md names other places") from None
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"{url}: {error}; run the same command again to continue") from None
    fetched = path if path.exists() else part
    with open(fetched, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 and found != sha256:
        part.unlink(missing_ok=True)
        raise ValueError(f"{path}: its SHA-256 is {found}, not {sha256}: delete it, and fetch it again")
    fetched.replace(path)
    return found


def _fetch(url: str, part: Path) -> None:
    """Appends the missing bytes to part. Raises OSError or HTTPException if the connection fails."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{have}":
            return  # the server has no more bytes: part is whole
        raise
    with answer:
        continues = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        have = have if continues else 0  # a server without ranges sends all of it
        total = have + int(answer.headers["Content-Length"]) if "Content-Length" in answer.headers else None
        with (open(part, "ab" if continues else "wb") as file,
              tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.stem) as bar):
            while chunk := answer.read(1 << 20):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and part.stat().st_size != total:
        raise OSError(f"the connection ended after {part.stat().st_size:,} of {total:,} bytes")


def fetch(args) -> None:
    """Downloads the files of args.names."""
    for name in args.names:
        file, url, sha256 = FILES[name]
        found = download(url, args.to / file, sha256)
        print(f"{args.to / file}: SHA-256 {found}" + ("" if sha256 else " (none is published to compare it with)"))


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="data/download.py", description=__doc__)
    parser.add_argument("names", nargs="+", choices=FILES, metavar="name", help=", ".join(FILES))
    parser.add_argument("--to", type=Path, default=ROOT / "data" / "downloads", help="folder (default data/downloads)")
    parser.run(fetch, parser.parse(argv))


if __name__ == "__main__":
    main()
