"""The `yopo` block: a plan as JSON, the way config.json and plan files hold it. Turns the values of
PruningPlan's fields into a block and back; knows neither the class nor configs nor files.

Format 1; every key but the last must be there, no other may:
  format                 1
  layers, heads          shape of the masks
  head_keep              one hex string per layer, 2 * ceil(heads / 8) digits: head 0 is the most
                         significant bit of the first byte; the surplus bits of the last byte are 0
  window                 int or null
  layer_cut, ffn_ratio   numbers
  head_mass, cut_mass    "exact", "drop" or "calibrated"
  window_causal, prune_visual_queries   true or false
  text_mass              null, or one list of numbers per layer
  ffn_order              only where FFN neurons were put in another order: "sha256:" and 64 digits
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from yopo.plan.value_checks import integer, listed

FORMAT = 1
_OPTIONAL = frozenset({"ffn_order"})
_FIELDS = frozenset(
    {"head_keep", "window", "layer_cut", "ffn_ratio", "head_mass", "cut_mass", "window_causal"}
    | {"prune_visual_queries", "text_mass"}
    | _OPTIONAL
)
_WANTED = _FIELDS | {"format", "layers", "heads"}


def pack(values: dict[str, Any]) -> dict[str, Any]:
    """The block of a plan with these `values`, tensors among them."""
    layers, heads = values["head_keep"].shape
    block = {"format": FORMAT, "layers": layers, "heads": heads} | values
    rows = np.packbits(values["head_keep"].numpy(), axis=1)
    block["head_keep"] = [row.tobytes().hex() for row in rows]
    if values["text_mass"] is not None:
        block["text_mass"] = values["text_mass"].tolist()
    return {key: value for key, value in block.items() if key not in _OPTIONAL or value is not None}


def unpack(block: object) -> dict[str, Any]:
    """The values of the fields in `block`, as the plan's constructor takes and checks them.

    Raises ValueError for what is no block of this format.
    """
    if not isinstance(block, dict):
        raise ValueError(f"it must be a JSON object, got {type(block).__name__}")
    version = block.get("format")
    if type(version) is not int or version != FORMAT:
        raise ValueError(
            f"format is {version!r}; this yopo reads {FORMAT}: make the plan again, or use the "
            "yopo that wrote it"
        )
    missing = sorted(_WANTED - block.keys() - _OPTIONAL)
    unknown = sorted(map(str, block.keys() - _WANTED))
    if missing or unknown:
        raise ValueError(f"missing keys: {listed(missing)}; unknown keys: {listed(unknown)}")
    layers = integer("layers", block["layers"], 1, None)
    heads = integer("heads", block["heads"], 1, None)
    values = {field: block.get(field) for field in _FIELDS}
    values["head_keep"] = _mask(block["head_keep"], layers, heads)
    # The constructor reads None as "no cut"; in a block that is a value lost.
    values["layer_cut"] = integer("layer_cut", block["layer_cut"], 0, layers)
    return values


def is_block(content: dict[str, Any]) -> bool:
    """Whether a JSON object is a block itself, and no config that has one in it."""
    return not content.keys().isdisjoint({"format", "head_keep"}) and "yopo" not in content


def _mask(rows: object, layers: int, heads: int) -> np.ndarray:
    """The (layers, heads) mask of the hex `rows`."""
    if not isinstance(rows, list) or len(rows) != layers:
        got = f"{len(rows)} rows" if isinstance(rows, list) else type(rows).__name__
        raise ValueError(f"head_keep must be a list of {layers} rows (layers), got {got}")
    digits = 2 * ((heads + 7) // 8)
    mask = []
    for index, row in enumerate(rows):
        # ASCII digits only, and no blanks: bytes.fromhex alone would pass over those.
        is_hex = isinstance(row, str) and re.fullmatch("[0-9a-fA-F]*", row)
        if not is_hex or len(row) != digits:
            raise ValueError(
                f"head_keep[{index}] is {row!r}; allowed: {digits} hex digits for {heads} heads"
            )
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(row), dtype=np.uint8))
        if bits[heads:].any():
            raise ValueError(f"head_keep[{index}] is {row!r}: it has bits beyond head {heads - 1}")
        mask.append(bits[:heads])
    return np.stack(mask)
