"""PruningPlan: what is pruned, decided once per model; read from and written to a model's config.

Holds no mathematics and knows nothing of models, layouts or inputs. Mask files are head_mask.py's.

The `yopo` block in config.json (format 1; every key but the last must be there, no other may):
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

import os
import re
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from yopo.plan import head_mask
from yopo.plan.value_checks import as_mask, as_shares, integer, ratio

MASSES = ("exact", "drop", "calibrated")
RELEASED_FIELDS = ("attncut_w", "layercut_num", "headcut_num", "mlpcut_ratio", "sprompt_len")
FORMAT = 1
_OPTIONAL = ("ffn_order",)


@dataclass(frozen=True, eq=False)
class PruningPlan:
    """What is pruned in a model of L layers and H heads, the same for every input.

    head_keep: (L, H) bool, True where the head keeps reading visual tokens; any 0/1 values do.
    window: visual tokens see visual keys of their own grid within (window - 1) // 2 rows and
        columns; None: no window.
    layer_cut: from this layer on, 0..L, no head reads visual values; None means L, no cut.
    ffn_ratio: visual tokens use the first int(I / ffn_ratio) FFN neurons; >= 1.
    head_mass, cut_mass: where the softmax share of visual keys goes, for pruned heads below
        layer_cut and for all heads from it on: "exact", "drop" or "calibrated".
    window_causal: the window also hides later visual tokens (models never fine-tuned without).
    prune_visual_queries: pruned heads give zero for visual queries.
    text_mass: (L, H) in [0, 1], the share that stays on text keys; with "calibrated" only.
    ffn_order: the plan is for weights whose FFN neurons are in the order of this checksum
        (neurons.py); None: for the weights as they were trained.

    Raises ValueError naming the field, its value and what is allowed.
    """

    head_keep: torch.Tensor
    window: int | None = None
    layer_cut: int | None = None
    ffn_ratio: float = 1
    head_mass: str = "exact"
    cut_mass: str = "exact"
    window_causal: bool = False
    prune_visual_queries: bool = True
    text_mass: torch.Tensor | None = None
    ffn_order: str | None = None

    def __post_init__(self) -> None:
        def put(field: str, value: object) -> None:
            object.__setattr__(self, field, value)

        put("head_keep", as_mask("head_keep", self.head_keep))
        if self.window is not None:
            put("window", integer("window", self.window, 1, None))
        cut = self.num_layers if self.layer_cut is None else self.layer_cut
        put("layer_cut", integer("layer_cut", cut, 0, self.num_layers))
        put("ffn_ratio", ratio("ffn_ratio", self.ffn_ratio))
        for field in ("head_mass", "cut_mass"):
            if getattr(self, field) not in MASSES:
                raise ValueError(f"{field} is {getattr(self, field)!r}; allowed: {_list(MASSES)}")
        for field in ("window_causal", "prune_visual_queries"):
            if not isinstance(getattr(self, field), bool | np.bool_):
                raise ValueError(f"{field} is {getattr(self, field)!r}; allowed: True, False")
            put(field, bool(getattr(self, field)))
        calibrated = "calibrated" in (self.head_mass, self.cut_mass)
        if calibrated != (self.text_mass is not None):
            raise ValueError(
                f"head_mass {self.head_mass!r}, cut_mass {self.cut_mass!r} and text_mass "
                f"{'given' if self.text_mass is not None else 'None'} do not fit: text_mass is "
                "given exactly when a mass is 'calibrated'"
            )
        if self.text_mass is not None:
            put("text_mass", as_shares("text_mass", self.text_mass, tuple(self.head_keep.shape)))
        order = self.ffn_order
        named = isinstance(order, str) and re.fullmatch("sha256:[0-9a-f]{64}", order)
        if order is not None and not named:
            raise ValueError(
                f"ffn_order is {order!r}; allowed: None, or 'sha256:' and 64 hex digits"
            )

    @classmethod
    def dense(cls, config: Any) -> PruningPlan:
        """The plan under which nothing of the model that `config` describes is pruned."""
        layers, heads, _ = _model_sizes(config)
        return cls(torch.ones(layers, heads, dtype=torch.bool, device="cpu"))

    @property
    def num_layers(self) -> int:
        return self.head_keep.shape[0]

    @property
    def num_heads(self) -> int:
        return self.head_keep.shape[1]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PruningPlan):
            return NotImplemented
        return self._to_block() == other._to_block()

    def __hash__(self) -> int:
        return hash((self.head_keep.numpy().tobytes(), self.window, self.layer_cut, self.ffn_ratio))

    def ffn_neurons(self, intermediate_size: int) -> int:
        """How many of the I FFN neurons visual tokens use: int(I / ffn_ratio), at least 1."""
        neurons = int(intermediate_size / self.ffn_ratio)
        if neurons < 1:
            raise ValueError(
                f"ffn_ratio is {self.ffn_ratio:g}, which leaves no neuron of intermediate_size "
                f"{intermediate_size}; allowed: 1 to {intermediate_size}"
            )
        return neurons

    def validate(self, config: Any) -> None:
        """Raise ValueError unless the plan fits the model that `config` describes."""
        layers, heads, size = _model_sizes(config)
        if (self.num_layers, self.num_heads) != (layers, heads):
            raise ValueError(
                f"head_keep has shape {tuple(self.head_keep.shape)}, the model's config has "
                f"(num_hidden_layers, num_attention_heads) = ({layers}, {heads}); give a plan made "
                "for this model"
            )
        self.ffn_neurons(size)

    def save_to(self, config: Any) -> None:
        """Write the plan into `config.yopo`, JSON-able; the released fields stay as they are."""
        self.validate(config)
        block = self._to_block()
        if isinstance(config, dict):
            config["yopo"] = block
        else:
            config.yopo = block

    @classmethod
    def from_config(cls, config: Any) -> PruningPlan | None:
        """The plan of a transformers config (or its to_dict()), None where it carries none.

        A `yopo` block wins over the released fields. $YOPO_MASS (HEAD[/CUT]) overrides the mass
        modes. Raises ValueError for a corrupt block, incomplete released fields or a plan that does
        not fit the model; FileNotFoundError for a head mask that cannot be had.
        """
        holders = (config, _text_config(config))
        blocks = [_get(holder, "yopo") for holder in holders if _has(holder, "yopo")]
        if blocks:
            plan = cls._from_block(blocks[0])
        else:
            found = (cls._from_released(holder, config) for holder in holders)
            plan = next((plan for plan in found if plan is not None), None)
        if plan is None:
            return None
        if os.environ.get("YOPO_MASS"):
            plan = plan.with_mass(os.environ["YOPO_MASS"], name="YOPO_MASS")
        plan.validate(config)
        return plan

    def with_mass(
        self, setting: str, *, text_mass: object = None, name: str = "mass"
    ) -> PruningPlan:
        """This plan with the masses HEAD[/CUT] of `setting`; HEAD alone is for both.

        text_mass: constants for "calibrated" where the plan has none of its own; not used by other
        masses. Raises ValueError that calls the setting `name`: for other words, and for
        "calibrated" without constants.
        """
        head, cut = split_masses(setting, name)
        if "calibrated" not in (head, cut):
            return replace(self, head_mass=head, cut_mass=cut, text_mass=None)
        constants = text_mass if self.text_mass is None else self.text_mass
        if constants is None:
            raise ValueError(
                f"{name} is {setting!r}, but the plan has no calibrated text_mass; use exact or "
                "drop, or a plan that yopo.calibrate made with this mass"
            )
        return replace(self, head_mass=head, cut_mass=cut, text_mass=constants)

    def summary(self) -> str:
        """What is pruned, in words."""
        kept = int(self.head_keep[: self.layer_cut].sum())
        total = self.layer_cut * self.num_heads
        parts = []
        if self.window is not None:
            rho = (self.window - 1) // 2
            parts.append(
                f"see visual neighbours within {rho} rows and columns (window {self.window})"
            )
        if self.ffn_ratio != 1:
            parts.append(f"use 1/{self.ffn_ratio:g} of the FFN neurons")
        visual = " and ".join(parts) or "are not restricted"
        cut = (
            f", and none from layer {self.layer_cut} of {self.num_layers} on"
            if self.layer_cut < self.num_layers
            else ""
        )
        return (
            f"Visual tokens {visual}; they are read by {kept} of {total} heads in "
            f"{self.layer_cut} layers{cut}. Mass on visual keys: {self.head_mass} in pruned heads, "
            f"{self.cut_mass} in cut layers."
        )

    def _to_block(self) -> dict[str, Any]:
        block: dict[str, Any] = {
            "format": FORMAT,
            "layers": self.num_layers,
            "heads": self.num_heads,
        }
        block |= {field.name: getattr(self, field.name) for field in fields(self)}
        packed = np.packbits(self.head_keep.numpy(), axis=1)
        block["head_keep"] = [row.tobytes().hex() for row in packed]
        if self.text_mass is not None:
            block["text_mass"] = self.text_mass.tolist()
        for name in _OPTIONAL:
            if block[name] is None:
                del block[name]
        return block

    @classmethod
    def _from_block(cls, block: object) -> PruningPlan:
        """The plan of a `yopo` block. Anything wrong raises ValueError: never silently dense."""
        try:
            return cls._parse_block(block)
        except ValueError as error:
            raise ValueError(
                f"the 'yopo' block of the config is corrupt: {error}. Restore it, or delete the "
                "whole key for a model without this plan"
            ) from error

    @classmethod
    def _parse_block(cls, block: object) -> PruningPlan:
        if not isinstance(block, dict):
            raise ValueError(f"it must be a JSON object, got {type(block).__name__}")
        version = block.get("format")
        if type(version) is not int or version != FORMAT:
            raise ValueError(f"format is {version!r}; this yopo reads {FORMAT}")
        wanted = {"format", "layers", "heads"} | {field.name for field in fields(cls)}
        missing = sorted(wanted - block.keys() - set(_OPTIONAL))
        unknown = sorted(map(str, block.keys() - wanted))
        if missing or unknown:
            raise ValueError(f"missing keys: {_list(missing)}; unknown keys: {_list(unknown)}")
        layers = integer("layers", block["layers"], 1, None)
        heads = integer("heads", block["heads"], 1, None)
        values = {field.name: block.get(field.name) for field in fields(cls)}
        values["head_keep"] = _unpack(block["head_keep"], layers, heads)
        # The constructor reads None as "no cut"; in a block that is a value lost.
        values["layer_cut"] = integer("layer_cut", block["layer_cut"], 0, layers)
        return cls(**values)

    @classmethod
    def _from_released(cls, holder: Any, config: Any) -> PruningPlan | None:
        """The plan of the released fields in `holder`: exact mass, the mask from a file."""
        missing = [name for name in RELEASED_FIELDS if _get(holder, name) is None]
        if len(missing) == len(RELEASED_FIELDS):
            return None
        if missing:
            raise ValueError(
                f"the config has some released pruning fields but not {_list(missing)}; add them "
                f"(all of {_list(RELEASED_FIELDS)} belong together), or remove the others for a "
                "model without a plan"
            )
        layers, heads, _ = _model_sizes(config)
        window = integer("attncut_w", _get(holder, "attncut_w"), 1, None)
        cut = integer("layercut_num", _get(holder, "layercut_num"), 0, layers)
        num = integer("headcut_num", _get(holder, "headcut_num"), 0, heads)
        ffn_ratio = ratio("mlpcut_ratio", _get(holder, "mlpcut_ratio"))
        integer("sprompt_len", _get(holder, "sprompt_len"), 0, None)
        keep = head_mask.find(
            num,
            layers,
            heads,
            _get(config, "_name_or_path"),
            revision=_get(config, "_commit_hash"),
        )
        return cls(keep, window=window, layer_cut=cut, ffn_ratio=ffn_ratio)


def split_masses(setting: str, name: str = "mass") -> tuple[str, str]:
    """(head_mass, cut_mass) of HEAD[/CUT]; raises ValueError that calls the setting `name`."""
    head, slash, cut = setting.partition("/") if isinstance(setting, str) else ("", "", "")
    cut = cut if slash else head
    if head not in MASSES or cut not in MASSES:
        raise ValueError(
            f"{name} is {setting!r}; allowed: HEAD or HEAD/CUT, each one of {_list(MASSES)}"
        )
    return head, cut


def _has(config: Any, name: str) -> bool:
    return name in config if isinstance(config, dict) else hasattr(config, name)


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


def _text_config(config: Any) -> Any:
    """The part of a composite config that describes the language model, else the config itself."""
    nested = _get(config, "text_config")
    return config if nested is None else nested


def _model_sizes(config: Any) -> tuple[int, int, int]:
    """(layers, heads, FFN neurons) of the language model."""
    text = _text_config(config)
    names = ("num_hidden_layers", "num_attention_heads", "intermediate_size")
    layers, heads, size = (integer(f"config.{name}", _get(text, name), 1, None) for name in names)
    return layers, heads, size


def _list(names: Any) -> str:
    return ", ".join(names) or "none"


def _unpack(rows: object, layers: int, heads: int) -> np.ndarray:
    """The (layers, heads) mask of the hex `rows`; the module's docstring has the bit order."""
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
