"""Head masks: where they are looked for and in which order, what is refused, the download.

Nothing here reaches the network: the upstream address is a server on this machine, or nobody.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from yopo.plan import head_mask

LAYERS, HEADS = 4, 6
SHARED = Path(__file__).resolve().parents[3] / "shared" / "headmask"
NAME_7B = "headmask_7b_16.npy"


def mask(seed: int, shape: tuple[int, int] = (LAYERS, HEADS)) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


class Server:
    """An HTTP server of `files` that counts what it was asked for."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append(self.path)
                body = server.files.get(self.path)
                self.send_response(404 if body is None else 200)
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, *_args: object) -> None:
                """Keep the test's output to itself."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/masks"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.http.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("YOPO_HEADMASK_URL", made.url + "/")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield made
    made.http.shutdown()
    made.http.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Folders of this test alone for all that is searched, and an address where nobody answers."""
    found = {name: tmp_path / name for name in ("checkpoint", "env", "work", "home", "hub")}
    for folder in found.values():
        folder.mkdir()
    monkeypatch.chdir(found["work"])
    monkeypatch.setenv("YOPO_HEADMASK_DIR", str(found["env"]))
    monkeypatch.setenv("YOPO_HEADMASK_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HOME", str(found["home"]))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(found["hub"]))
    monkeypatch.setattr(
        "huggingface_hub.file_download.HF_HUB_CACHE", str(found["hub"]), raising=False
    )
    found["cache"] = head_mask.cache_folder()
    found["cache"].mkdir(parents=True)
    return found


# --- the search --------------------------------------------------------------------------------

ORDER = ["checkpoint", "checkpoint/headmask", "env", "work/headmask", "cache"]


@pytest.mark.parametrize("first", range(len(ORDER)))
def test_the_first_place_in_the_order_wins(first, places, tmp_path):
    for index, place in list(enumerate(ORDER))[first:]:
        folder = places.get(place, tmp_path / place)
        head_mask.save(folder / "headmask_test_3.npy", mask(index))
    assert head_mask.find(3, LAYERS, HEADS, places["checkpoint"]).equal(mask(first))
    assert head_mask.find(3, LAYERS, HEADS, str(places["checkpoint"])).equal(mask(first))


@pytest.mark.parametrize(("shape", "name"), [((32, 32), "7b"), ((40, 40), "13b")])
def test_released_sizes_take_their_own_name_only(shape, name, places):
    head_mask.save(places["env"] / "headmask_other_12.npy", mask(1, shape))
    with pytest.raises(FileNotFoundError, match=f"headmask_{name}_12.npy"):
        head_mask.find(12, *shape)
    head_mask.save(places["env"] / f"headmask_{name}_12.npy", mask(2, shape))
    assert head_mask.find(12, *shape).equal(mask(2, shape))


@pytest.mark.parametrize("shape", [(LAYERS, HEADS), (32, 40), (40, 40)])
def test_a_file_of_the_right_name_and_another_shape_is_refused_with_both(shape, places):
    path = head_mask.save(places["env"] / NAME_7B, mask(0, shape))
    with pytest.raises(ValueError) as caught:
        head_mask.find(16, 32, 32)
    assert all(str(part) in str(caught.value) for part in (path, shape, (32, 32)))


def test_other_sizes_pass_over_masks_of_other_shapes_and_say_so(places, tmp_path):
    head_mask.save(places["env"] / "headmask_a_3.npy", mask(0, (LAYERS, HEADS + 1)))
    with pytest.raises(
        FileNotFoundError, match=r"headmask_a_3\.npy, shape \(4, 7\), wanted \(4, 6\)"
    ):
        head_mask.find(3, LAYERS, HEADS)
    head_mask.save(places["env"] / "headmask_b_3.npy", mask(1))
    head_mask.save(places["env"] / "headmask_b_13.npy", mask(2))
    assert head_mask.find(3, LAYERS, HEADS).equal(mask(1))


def test_several_masks_that_fit_must_agree(places):
    head_mask.save(places["env"] / "headmask_a_3.npy", mask(0))
    head_mask.save(places["env"] / "headmask_b_3.npy", mask(0))
    assert head_mask.find(3, LAYERS, HEADS).equal(mask(0))
    head_mask.save(places["env"] / "headmask_c_3.npy", mask(1))
    with pytest.raises(ValueError, match="headmask_a_3.npy, headmask_b_3.npy, headmask_c_3.npy"):
        head_mask.find(3, LAYERS, HEADS)


@pytest.mark.parametrize("place", ["headmask_test_3.npy", "headmask/headmask_test_3.npy"])
@pytest.mark.parametrize("revision", [None, "b" * 40])
def test_a_hub_checkpoint_is_searched_where_the_hub_keeps_it(place, revision, places):
    repo = places["hub"] / "models--someone--pruned"
    commit = revision or "a" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    snapshot = repo / "snapshots" / commit
    head_mask.save(snapshot / place, mask(5))
    (snapshot / "config.json").write_text("{}")
    assert head_mask.find(3, LAYERS, HEADS, "someone/pruned", revision).equal(mask(5))


@pytest.mark.parametrize(
    "checkpoint",
    [None, "", "someone/unknown", "/no/such/folder", "a/b/c", "..", "~/none"],
)
def test_a_checkpoint_that_is_nowhere_does_not_end_the_search(checkpoint, places):
    head_mask.save(places["env"] / "headmask_test_3.npy", mask(0))
    assert head_mask.find(3, LAYERS, HEADS, checkpoint).equal(mask(0))


def test_a_mask_that_is_nowhere_is_an_error_with_places_and_remedies(places, monkeypatch):
    places["env"].rmdir()
    with pytest.raises(FileNotFoundError) as caught:
        head_mask.find(3, LAYERS, HEADS, places["checkpoint"])
    text = str(caught.value)
    for place in ("checkpoint", "env", "cache"):
        assert str(places[place]) in text
    assert str(places["work"] / "headmask") in text and f"{places['env']} (no such folder)" in text
    for word in ("headcut_num = 3", "YOPO_HEADMASK_DIR", "./headmask", "network", "save_to"):
        assert word in text


def test_masks_are_on_the_cpu_even_while_models_are_built_on_meta(places):
    head_mask.save(places["env"] / "headmask_test_3.npy", mask(0))
    with torch.device("meta"):
        found = head_mask.find(3, LAYERS, HEADS)
    assert found.device.type == "cpu" and found.equal(mask(0))


# --- the download ------------------------------------------------------------------------------


@pytest.fixture
def published(server: Server, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The bytes the server has for NAME_7B, taken as the published ones."""
    body = npy(mask(7, (32, 32)).numpy())
    server.files[f"/masks/{NAME_7B}"] = body
    monkeypatch.setitem(head_mask.SHA256, NAME_7B, hashlib.sha256(body).hexdigest())
    return body


def test_a_published_mask_that_is_nowhere_is_downloaded_once(server, published, places):
    assert head_mask.find(16, 32, 32).equal(mask(7, (32, 32)))
    assert head_mask.find(16, 32, 32).equal(mask(7, (32, 32)))
    assert server.asked == [f"/masks/{NAME_7B}"]
    assert [path.name for path in places["cache"].iterdir()] == [NAME_7B]
    assert (places["cache"] / NAME_7B).read_bytes() == published


def test_a_mask_that_lies_nearer_is_not_downloaded(server, published, places):
    head_mask.save(places["work"] / "headmask" / NAME_7B, mask(8, (32, 32)))
    assert head_mask.find(16, 32, 32).equal(mask(8, (32, 32)))
    assert not server.asked


@pytest.mark.parametrize("damage", ["another file", "cut off", "longer"])
def test_a_download_with_a_wrong_sum_is_refused_and_not_kept(damage, server, published, places):
    body = {
        "another file": npy(np.ones((LAYERS, HEADS))),
        "cut off": published[:-1],
        "longer": published + b"0",
    }[damage]
    server.files[f"/masks/{NAME_7B}"] = body
    with pytest.raises(ValueError) as caught:
        head_mask.find(16, 32, 32)
    text = str(caught.value)
    assert head_mask.SHA256[NAME_7B] in text and hashlib.sha256(body).hexdigest() in text
    assert f"{server.url}/{NAME_7B}" in text and "YOPO_HEADMASK_URL" in text
    assert not list(places["cache"].iterdir())


def test_a_cached_file_with_a_wrong_sum_is_refused_naming_both(server, published, places):
    path = head_mask.save(places["cache"] / NAME_7B, mask(8, (32, 32)))
    with pytest.raises(ValueError) as caught:
        head_mask.find(16, 32, 32)
    text = str(caught.value)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest in text and head_mask.SHA256[NAME_7B] in text
    assert str(path) in text and "delete" in text
    assert not server.asked


@pytest.mark.parametrize("flag", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "constant"])
@pytest.mark.parametrize("value", ["1", "true", "ON"])
def test_offline_flags_forbid_the_download(flag, value, server, published, monkeypatch):
    if flag == "constant":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setenv(flag, value)
    with pytest.raises(FileNotFoundError, match="OFFLINE is set"):
        head_mask.find(16, 32, 32)
    assert not server.asked


def test_an_offline_flag_of_0_forbids_nothing(server, published, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert head_mask.find(16, 32, 32).equal(mask(7, (32, 32)))


def test_a_mask_nobody_published_is_not_asked_for(server):
    with pytest.raises(FileNotFoundError, match="no mask of that name is published"):
        head_mask.find(12, 32, 32)
    with pytest.raises(FileNotFoundError, match="no mask of that name is published"):
        head_mask.find(16, LAYERS, HEADS)
    assert not server.asked


def test_a_server_without_the_file_is_told_with_the_other_places(server, places):
    with pytest.raises(FileNotFoundError, match="404") as caught:
        head_mask.find(16, 32, 32)
    assert f"{server.url}/{NAME_7B}" in str(caught.value) and str(places["env"]) in str(
        caught.value
    )
    assert not list(places["cache"].iterdir())


def test_no_network_is_told_with_the_other_places(places, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(FileNotFoundError, match=r"http://127\.0\.0\.1:9/headmask_7b_16\.npy"):
        head_mask.find(16, 32, 32)


# --- the published masks -----------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the published masks are not in {SHARED}")
@pytest.mark.parametrize("name", sorted(head_mask.SHA256))
def test_the_published_masks_are_found_and_have_the_sums_in_the_source(name, server, monkeypatch):
    path = SHARED / name
    assert hashlib.sha256(path.read_bytes()).hexdigest() == head_mask.SHA256[name]
    layers, num = (32 if "_7b_" in name else 40), int(name.removesuffix(".npy").rpartition("_")[2])
    monkeypatch.setenv("YOPO_HEADMASK_DIR", str(SHARED))
    found = head_mask.find(num, layers, layers)
    assert found.numpy().tolist() == np.load(path).tolist()
    assert found[:2].all() and abs(found.float().mean().item() * layers - num) < 2
    monkeypatch.delenv("YOPO_HEADMASK_DIR")
    server.files[f"/masks/{name}"] = path.read_bytes()
    assert head_mask.find(num, layers, layers).equal(found), "downloaded, against the real sum"
    assert server.asked == [f"/masks/{name}"]
