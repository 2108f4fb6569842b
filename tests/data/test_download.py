"""Downloads from a server on this machine that can end a connection early, and continue a download or not."""
import hashlib
import importlib.util
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("download", Path(__file__).parents[2] / "data" / "download.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

DATA = bytes(range(256)) * 40_000  # 10 MB: several chunks
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def server():
    """`sends` is the number of bytes that it sends before it closes the connection, `log` the requested ranges."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers.get("Range")
            here.log.append(asked)
            start = int(asked[6:-1]) if asked and here.can_resume else 0
            if self.path != "/file":
                return self.send_error(404)
            if start >= len(DATA):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(DATA)}")
                return self.end_headers()
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(DATA) - 1}/{len(DATA)}")
            self.send_header("Content-Length", str(len(DATA) - start))
            self.end_headers()
            self.wfile.write(DATA[start:start + here.sends])

        def log_message(self, *args):
            pass

    here = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    here.sends, here.can_resume, here.log = len(DATA), True, []
    here.url = f"http://127.0.0.1:{here.server_port}/file"
    threading.Thread(target=here.serve_forever, daemon=True).start()
    yield here
    here.shutdown()
    here.server_close()


def test_a_file_is_fetched_once_and_checked(server, tmp_path):
    for _ in range(2):
        assert module.download(server.url, tmp_path / "a" / "file", DIGEST) == DIGEST
    assert [path.read_bytes() for path in (tmp_path / "a").iterdir()] == [DATA] and server.log == [None]
    (tmp_path / "file.part").write_bytes(DATA)  # whole, of a process that was killed before it gave the name
    assert module.download(server.url, tmp_path / "file", DIGEST) == DIGEST


@pytest.mark.parametrize("can_resume", [True, False])
def test_an_interrupted_download_continues(can_resume, server, tmp_path):
    server.sends, server.can_resume = 4_000_000, can_resume
    with pytest.raises(ValueError, match="4,000,000 of"):
        module.download(server.url, tmp_path / "file", DIGEST)
    assert not (tmp_path / "file").exists() and (tmp_path / "file.part").stat().st_size == 4_000_000
    server.sends = len(DATA)
    module.download(server.url, tmp_path / "file", DIGEST)
    assert (tmp_path / "file").read_bytes() == DATA and server.log == [None, "bytes=4000000-"]


def test_a_wrong_file_does_not_get_the_name(server, tmp_path):
    with pytest.raises(ValueError, match=DIGEST):
        module.download(server.url, tmp_path / "file", "0" * 64)
    assert list(tmp_path.iterdir()) == []


def test_an_absent_file_or_host_is_named_in_one_line(server, tmp_path, capsys, monkeypatch):
    with pytest.raises(ValueError, match="files: 404"):
        module.download(server.url + "s", tmp_path / "file")
    monkeypatch.setitem(module.FILES, "clip-bpe", ("f", "http://127.0.0.1:1/file", ""))
    with pytest.raises(SystemExit) as exit:
        module.main(["clip-bpe", "--to", str(tmp_path)])
    assert exit.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
