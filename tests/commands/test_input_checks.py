"""Images that are named by their address: fetched before anything is loaded, or refused."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import random_llava

from yopo.commands.input_checks import local_image
from yopo.errors import BadInput

PAGES = {"/text.png": b"no image"}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server that has picture.png, which is on the disk too, and text.png."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    random_llava.picture(1).save(tmp_path / "picture.png")
    pages = {"/picture.png": (tmp_path / "picture.png").read_bytes(), **PAGES}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path in pages else 404)
            self.end_headers()
            self.wfile.write(pages.get(self.path, b"not here"))

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    serving = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=serving.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{serving.server_port}"
    serving.shutdown()
    serving.server_close()
    thread.join()


def test_an_image_at_an_address_is_fetched(server: str, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    fetched = local_image(f"{server}/picture.png", folder)
    assert fetched.parent == folder
    assert fetched.read_bytes() == (tmp_path / "picture.png").read_bytes()
    here = str(tmp_path / "picture.png")
    assert local_image(here, folder) == Path(here)


def test_what_cannot_be_fetched_or_is_no_image_is_refused(server: str, tmp_path: Path) -> None:
    for name, message in (
        ("no.png", "cannot be fetched: HTTP Error 404"),
        ("text.png", "is not an image PIL can read"),
    ):
        with pytest.raises(BadInput, match=f"{name}.*{message}"):
            local_image(f"{server}/{name}", tmp_path)
    for address in ("http://127.0.0.1:1/a.png", "http:///a.png", "http://a b/c.png"):
        with pytest.raises(BadInput, match="cannot be fetched"):
            local_image(address, tmp_path)
