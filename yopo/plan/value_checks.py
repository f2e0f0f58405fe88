"""Checks of single values, each an error that names the field, the value and what is allowed.

Nothing here knows of plans, files or configs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import TypeVar, cast

import numpy as np
import torch

V = TypeVar("V")
_LARGEST = 2**63 - 1  # of a tensor's integers


def as_mask(name: str, values: object) -> torch.Tensor:
    """`values` (tensor, ndarray or nested lists of 0/1) as a fresh (L, H) bool tensor on the CPU.

    Raises ValueError that names `name`, the first offending index and its value.
    """
    cells = _cells(name, values)
    if cells.ndim != 2 or 0 in cells.shape:
        raise ValueError(
            f"{name} must have two dimensions (layers, heads), each row as long as the others and "
            f"none empty; got shape {cells.shape}"
        )
    for index, cell in np.ndenumerate(cells):
        if not (isinstance(cell, bool | int | float | np.number | np.bool_) and cell in (0, 1)):
            raise ValueError(f"{name}[{index[0]}, {index[1]}] is {cell!r}; allowed: 0, 1")
    # An explicit device: models are built under torch.device("meta") in transformers 5.
    return torch.tensor(cells.astype(bool).tolist(), dtype=torch.bool, device="cpu")


def integer(field: str, value: object, low: int, high: int | None) -> int:
    """`value` as an int, if it is a whole number in low..high (ValueError otherwise)."""
    # bool is an int in Python; `window: true` in a config is a mistake all the same.
    number = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    if high is None and number is not None and number > _LARGEST:
        high = _LARGEST
    allowed = f"whole numbers from {low}" + ("" if high is None else f" to {high}")
    if number is None or number < low or (high is not None and number > high):
        raise ValueError(f"{field} is {value!r}; allowed: {allowed}")
    return number


def ratio(field: str, value: object) -> float:
    """`value` as a float, if it is a finite number >= 1 (ValueError otherwise)."""
    try:
        real = isinstance(value, Real) and not isinstance(value, bool)
        number = float(cast(float, value)) if real else math.nan
    except OverflowError:  # a whole number no float holds; JSON allows it
        number = math.inf
    if not 1 <= number < math.inf:
        raise ValueError(
            f"{field} is {value!r}; allowed: finite numbers from 1 to the model's intermediate_size"
        )
    return number


def share(field: str, value: object) -> float:
    """`value` as a float, if it is a number above 0, to 1 (ValueError otherwise)."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    number = float(cast(float, value)) if real else math.nan
    if not 0 < number <= 1:
        raise ValueError(f"{field} is {value!r}; allowed: a share, above 0, to 1")
    return number


def as_numbers(name: str, values: object, dimensions: int) -> torch.Tensor:
    """`values` (tensor, ndarray or nested lists), finite numbers in so many dimensions, as a fresh
    contiguous float32 tensor on the CPU.

    Raises ValueError that names `name` and the shape, or the first offending index and its value.
    """
    if not isinstance(values, torch.Tensor | np.ndarray):
        for index, cell in np.ndenumerate(_cells(name, values)):
            if isinstance(cell, bool) or not isinstance(cell, Real):
                raise ValueError(f"{name}{list(index)} is {cell!r}; allowed: finite numbers")
    try:
        # An explicit device, as in as_mask; of a tensor as_tensor would make one elsewhere, too.
        given = values if isinstance(values, torch.Tensor) else torch.tensor(values, device="cpu")
        given = given.detach().cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError, NotImplementedError) as error:
        raise ValueError(f"{name} must be numbers of one shape: {error}") from error
    if given.dtype is torch.bool or given.is_complex():
        raise ValueError(f"{name} is of {given.dtype}; allowed: finite numbers")
    with torch.inference_mode(False):  # they outlive this call, and training may follow
        numbers = given.to(torch.float32, copy=True).contiguous()
    if numbers.dim() != dimensions or 0 in numbers.shape:
        raise ValueError(
            f"{name} has shape {tuple(numbers.shape)}; allowed: {dimensions} dimensions, none empty"
        )
    wrong = (~numbers.isfinite()).nonzero()
    if len(wrong):
        at = wrong[0].tolist()
        raise ValueError(f"{name}{at} is {float(numbers[tuple(at)])}; allowed: finite numbers")
    return numbers


def _cells(name: str, values: object) -> np.ndarray:
    """The elements of a tensor, ndarray or nested lists, each as it was given."""
    if isinstance(values, torch.Tensor):
        if values.is_meta:
            raise ValueError(f"{name} is a meta tensor, which has no values; make it on the CPU")
        values = values.detach().tolist()
    try:
        # dtype=object: otherwise one string among the numbers would make strings of them all.
        return np.array(values, dtype=object)
    except ValueError as error:  # rows of different depth
        raise ValueError(f"{name} must be a rectangular array: {error}") from error


def flag(field: str, value: object) -> bool:
    """`value` as a bool, if it is True or False (ValueError otherwise)."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{field} is {value!r}; allowed: True, False")
    return bool(value)


def per_layer(
    field: str, value: object, layers: int, check: Callable[[str, object], V]
) -> V | tuple[V, ...]:
    """One value for all layers, or a sequence with one for each, every one as `check` returns it; a
    sequence of equal ones becomes one. Raises ValueError for another length, or by `check`."""
    if isinstance(value, torch.Tensor | np.ndarray):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        return check(field, value)
    if len(value) != layers:
        raise ValueError(
            f"{field} has {len(value)} values; allowed: one for all layers, or {layers}, one each"
        )
    each = tuple(check(f"{field}[{number}]", one) for number, one in enumerate(value))
    return each[0] if len(set(each)) == 1 else each


def listed(names: Iterable[str]) -> str:
    """The names in one line, as errors give them."""
    return ", ".join(names) or "none"
