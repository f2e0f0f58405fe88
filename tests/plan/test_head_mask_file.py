"""Head mask files: written whole, read back, and refused by name where they are anything else."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from yopo.plan import head_mask

LAYERS, HEADS = 4, 6


def mask(seed: int) -> torch.Tensor:
    return torch.rand(LAYERS, HEADS, generator=torch.Generator().manual_seed(seed)) < 0.5


def test_a_saved_mask_comes_back_equal_and_leaves_no_other_file(tmp_path):
    path = head_mask.save(tmp_path / "deep" / "headmask_x_3.npy", mask(0))
    assert head_mask.load(path).equal(mask(0)) and head_mask.load(path).dtype == torch.bool
    head_mask.save(path, mask(1).tolist())
    assert head_mask.load(path).equal(mask(1))
    assert list(path.parent.iterdir()) == [path]
    assert np.load(path).dtype == bool, "the released code reads bool"


def test_saving_refuses_what_could_not_be_found_or_read_again(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.npy"):
        head_mask.save(tmp_path / "mask.pt", mask(0))
    with pytest.raises(ValueError, match=r"head_keep\[0, 1\] is 2"):
        head_mask.save(tmp_path / "mask.npy", [[1, 2]])
    assert not list(tmp_path.glob("mask*"))


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32, np.float64])
def test_masks_of_0_and_1_load_from_any_number_type(dtype, tmp_path):
    np.save(tmp_path / "m.npy", mask(0).numpy().astype(dtype))
    assert head_mask.load(tmp_path / "m.npy").equal(mask(0))


@pytest.mark.parametrize(
    "change", [np.asfortranarray, lambda a: a.astype(">i4"), lambda a: a - 0.0]
)
def test_masks_load_in_any_order_of_their_bytes(change, tmp_path):
    np.save(tmp_path / "m.npy", change(mask(0).numpy().astype(np.int32)))
    assert head_mask.load(str(tmp_path / "m.npy")).equal(mask(0))


# --- what is no mask ---------------------------------------------------------------------------


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def headed(header: bytes, data: bytes = b"", version: bytes = b"\1\0") -> bytes:
    """A file with this header, whatever it says."""
    padded = header + b" " * (117 - len(header)) + b"\n"
    size = len(padded).to_bytes(2 if version[0] == 1 else 4, "little")
    return b"\x93NUMPY" + version + size + padded + data


def claiming(shape: str, descr: str = "'|b1'") -> bytes:
    return headed(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode())


def archive() -> bytes:
    file = io.BytesIO()
    np.savez(file, mask=np.ones((2, 2)))
    return file.getvalue()


GOOD = npy(np.ones((LAYERS, HEADS), dtype=bool))
BAD_FILES = {
    "empty": (b"", "not in the .npy format"),
    "text": (b"not a mask", "not in the .npy format"),
    "another magic": (b"\x93NUMPZ" + GOOD[6:], "not in the .npy format"),
    "another version": (headed(b"{}", version=b"\3\0"), "version"),
    "header cut off": (GOOD[:40], "header cannot be read"),
    "header cut off inside": (headed(b"{'descr': '|b1', "), "header cannot be read"),
    "header that nests": (headed(b"(" * 100), "header cannot be read"),
    "header of code": (headed(b"__import__('os').getcwd()"), "header cannot be read"),
    "header of odd keys": (headed(b"{1: 2, 'a': 3, None: 4}"), "header cannot be read"),
    "header that claims gigabytes": (
        b"\x93NUMPY\2\0" + (2**32 - 1).to_bytes(4, "little") + b"{",
        "header cannot be read",
    ),
    "10^13 rows": (claiming("(10000000000000, 10)"), "100000000000000 bytes, but 0 follow"),
    "10^30 rows": (claiming("(1" + "0" * 30 + ", 1)"), "but 0 follow"),
    "rows below 0": (claiming("(-4, -6)"), "shape"),
    "wide numbers": (claiming("(2, 2)", "'<f8'"), "32 bytes, but 0 follow"),
    "data cut off": (GOOD[:-5], "24 bytes, but 19 follow"),
    "data too long": (GOOD + b"\0", "24 bytes, but 25 follow"),
    "two arrays": (GOOD + GOOD, "24 bytes, but"),
    "pickled": (npy(np.array([[None]], dtype=object)), "dtype object"),
    "archive": (archive(), r"\.npz archive"),
    "archive cut off": (archive()[:60], r"\.npz archive"),
    "strings": (npy(np.array([["1", "0"]])), "dtype"),
    "complex": (npy(np.ones((2, 2), dtype=complex)), "dtype"),
    "dates": (npy(np.ones((2, 2), dtype="datetime64[s]")), "dtype"),
    "records": (npy(np.ones((2, 2), dtype=[("a", bool)])), "dtype"),
    "numbers of no size": (claiming("(2, 2)", "'|V0'"), "dtype"),
    "no dimension": (npy(np.array(True)), "two dimensions"),
    "one dimension": (npy(np.ones(4)), "two dimensions"),
    "three dimensions": (npy(np.ones((2, 2, 2))), "two dimensions"),
    "no heads": (npy(np.ones((2, 0))), "two dimensions"),
    "a half": (npy(np.array([[1, 0.5]])), r"\[0, 1\] is .*0.5"),
    "a nan": (npy(np.array([[1, np.nan]])), r"\[0, 1\] is .*nan"),
    "a two": (npy(np.array([[1, 0], [2, 0]])), r"\[1, 0\] is .*2"),
    "a two among booleans": (GOOD[:-1] + b"\2", r"\[3, 5\] is 2"),
    "too large": (GOOD + bytes(1 << 24), "bytes; allowed"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_that_is_no_mask_is_refused_by_name_in_one_line(kind, tmp_path):
    data, words = BAD_FILES[kind]
    path = tmp_path / "m.npy"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=words) as caught:
        head_mask.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert "replace it with a file that" in str(caught.value)


@pytest.mark.parametrize("what", ["a folder", "a pipe"])
def test_what_is_no_file_is_refused_by_name_and_not_waited_for(what, tmp_path):
    path = tmp_path / "m.npy"
    path.mkdir() if what == "a folder" else os.mkfifo(path)
    with pytest.raises(ValueError, match=r"m\.npy is no file"):
        head_mask.load(path)


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.npy"):
        head_mask.load(tmp_path / "none.npy")


def test_loading_never_runs_what_a_file_holds(tmp_path):
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)

    np.save(tmp_path / "m.npy", np.array([[Evil()]], dtype=object))
    with pytest.raises(ValueError, match="dtype object"):
        head_mask.load(tmp_path / "m.npy")
    assert not (tmp_path / "ran").exists()


VALID = [GOOD, npy(np.ones((LAYERS, HEADS))), npy(np.asfortranarray(mask(0).numpy()))]


@given(data=st.data(), valid=st.sampled_from(VALID))
def test_a_damaged_file_gives_a_mask_or_a_value_error_that_names_it(data, valid, tmp_path_factory):
    path = tmp_path_factory.mktemp("masks") / "m.npy"
    content = bytearray(valid)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content)))
        content[place : place + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    path.write_bytes(content)
    _mask_or_error(path)


LITERALS = st.sampled_from(
    ["'descr'", "'shape'", "'fortran_order'", "'|b1'", "'O'", "[('a', 'f')]"]
)
LITERALS |= st.sampled_from(
    ["True", "None", "(4, 6)", "(4, -6)", "10**99", "1e999", "{", "'", "\\"]
)


@given(pairs=st.lists(st.tuples(LITERALS, LITERALS), max_size=4), data=st.binary(max_size=24))
def test_any_header_gives_a_mask_or_a_value_error_that_names_the_file(
    pairs, data, tmp_path_factory
):
    path = tmp_path_factory.mktemp("masks") / "m.npy"
    said = "{" + ", ".join(f"{key}: {value}" for key, value in pairs) + "}"
    path.write_bytes(headed(said.encode(), data))
    _mask_or_error(path)


def _mask_or_error(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            found = head_mask.load(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            return
    assert found.dtype == torch.bool and found.ndim == 2 and 0 not in found.shape
