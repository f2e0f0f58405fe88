"""Reads .npy files that nobody vouches for: two-dimensional arrays of numbers, small as head masks
are. What a header claims is held against the file's size before it is believed.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np

# numpy.load is not for this: it believes the header, and reserves what it asks for.
_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_MAX_BYTES = 1 << 24  # a thousand layers of a thousand heads, in 16 bytes each


def read(path: Path) -> np.ndarray:
    """The array in `path`. Raises ValueError for anything but a whole file of numbers."""
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise ValueError(f"it has {size} bytes; allowed: {_MAX_BYTES}")
    data = path.read_bytes()
    if data.startswith(b"PK"):
        raise ValueError("it is an .npz archive; a head mask is a single .npy array")
    shape, fortran_order, dtype, start = _header(data)
    if dtype.kind not in "biuf":
        raise ValueError(f"it holds dtype {dtype}; a head mask is bool or 0/1 numbers")
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"it has shape {shape}; allowed: two dimensions (layers, heads), none 0")
    claimed, there = shape[0] * shape[1] * dtype.itemsize, len(data) - start
    if claimed != there:
        raise ValueError(
            f"its header says shape {shape} of {dtype}, {claimed} bytes, but {there} follow; it is "
            "cut off or damaged"
        )
    if dtype.kind == "b":  # any byte but 0 would pass for True
        dtype = np.dtype(np.uint8)
    array = np.frombuffer(data, dtype, offset=start)
    return array.reshape(shape, order="F" if fortran_order else "C")


def _header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """(shape, Fortran order, dtype, where the data begins)."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
    except ValueError as error:
        raise ValueError("it is not in the .npy format") from error
    if version not in _READERS:
        raise ValueError(f"it is in version {version} of the .npy format; allowed: 1.0, 2.0")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python's parser, about what is in the header
            shape, fortran_order, dtype = _READERS[version](file)
    # numpy lets through what Python's tokenizer and parser and its own dtype() raise of nonsense.
    except Exception as error:
        raise ValueError("its header cannot be read; it is cut off or damaged") from error
    return shape, fortran_order, dtype, file.tell()
