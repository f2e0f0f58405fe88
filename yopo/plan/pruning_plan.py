"""PruningPlan: what is pruned, decided once per model; read from and written to configs and files.

Holds no mathematics and knows nothing of models, layouts or inputs. The file format is block.py's,
where a plan stands in a config config_fields.py's, mask files are head_mask.py's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import torch

from yopo.files import read_json, write_json
from yopo.plan import block as plan_block
from yopo.plan import config_fields, head_mask, words
from yopo.plan.config_fields import RELEASED_FIELDS as RELEASED_FIELDS
from yopo.plan.sinks import FILE, REMEDY, Sinks, sinks_beside
from yopo.plan.value_checks import as_mask, flag, integer, listed, per_layer, ratio

MASSES = ("exact", "drop", "sink")
_LOADABLE = (
    "give a file that PruningPlan.save wrote, a config.json with a plan in it, or the folder of a "
    "pruned checkpoint"
)


@dataclass(frozen=True, eq=False)
class PruningPlan:
    """What is pruned in a model of L layers and H heads, the same for every input.

    `window`, `ffn` and `visual_attention` are one value for all layers, or a sequence of L.

    head_keep: (L, H) bool, True where the head keeps reading visual tokens; any 0/1 values do.
    window: visual tokens see visual keys of their own grid within (window - 1) // 2 rows and
        columns; None: no window.
    layer_cut: from this layer on, 0..L, no head reads visual values; None: the layer after the last
        one in which `head_keep` keeps a head.
    ffn_ratio: visual tokens use the first int(I / ffn_ratio) FFN neurons; >= 1.
    ffn: in place of the ratio, how many of the first neurons they use, 0..I; None: all of them.
    visual_attention: False: visual tokens do not attend, though heads may read them.
    head_mass, cut_mass: where the softmax share of visual keys goes, for pruned heads below
        layer_cut and for all heads from it on: "exact", "drop" or "sink".
    window_causal: the window also hides later visual tokens (models never fine-tuned without).
    prune_visual_queries: pruned heads give zero for visual queries.
    sinks: what "sink" takes for the visual keys of a blind head (sinks.py); may be there unused.
    ffn_order: the plan is for weights whose FFN neurons are in the order of this checksum
        (neurons.py); None: for the weights as they were trained.

    Raises ValueError naming the field, its value and what is allowed.
    """

    head_keep: torch.Tensor
    window: int | Sequence[int | None] | None = None
    layer_cut: int = cast(int, None)  # an int in every plan made
    ffn_ratio: float = 1
    head_mass: str = "exact"
    cut_mass: str = "exact"
    window_causal: bool = False
    prune_visual_queries: bool = True
    sinks: Sinks | None = None
    ffn_order: str | None = None
    ffn: int | Sequence[int | None] | None = None
    visual_attention: bool | Sequence[bool] = True

    def __post_init__(self) -> None:
        def put(field: str, value: object) -> None:
            object.__setattr__(self, field, value)

        put("head_keep", as_mask("head_keep", self.head_keep))
        layers = self.num_layers
        put("window", per_layer("window", self.window, layers, _window))
        cut = self._last_reader() + 1 if self.layer_cut is None else self.layer_cut
        put("layer_cut", integer("layer_cut", cut, 0, layers))
        put("ffn_ratio", ratio("ffn_ratio", self.ffn_ratio))
        put("ffn", per_layer("ffn", self.ffn, layers, _neurons))
        if self.ffn is not None and self.ffn_ratio != 1:
            raise ValueError(
                f"ffn is {self.ffn} and ffn_ratio {self.ffn_ratio:g}: give one of them"
            )
        put("visual_attention", per_layer("visual_attention", self.visual_attention, layers, flag))
        for field in ("head_mass", "cut_mass"):
            if getattr(self, field) not in MASSES:
                raise ValueError(f"{field} is {getattr(self, field)!r}; allowed: {listed(MASSES)}")
        for field in ("window_causal", "prune_visual_queries"):
            put(field, flag(field, getattr(self, field)))
        self._check_sinks()
        order = self.ffn_order
        named = isinstance(order, str) and re.fullmatch("sha256:[0-9a-f]{64}", order)
        if order is not None and not named:
            raise ValueError(
                f"ffn_order is {order!r}; allowed: None, or 'sha256:' and 64 hex digits"
            )

    def _check_sinks(self) -> None:
        if self.sinks is None:
            if "sink" in (self.head_mass, self.cut_mass):
                raise ValueError(
                    f"head_mass is {self.head_mass!r} and cut_mass {self.cut_mass!r}, but the plan "
                    f"has no sinks; {REMEDY}"
                )
        elif not isinstance(self.sinks, Sinks):
            raise ValueError(f"sinks is a {type(self.sinks).__name__}; allowed: None, Sinks")
        elif self.sinks.a.shape != self.head_keep.shape:
            raise ValueError(
                f"sinks.a has shape {tuple(self.sinks.a.shape)}; allowed: head_keep's, "
                f"{tuple(self.head_keep.shape)}: these sinks are of another model; {REMEDY}"
            )

    def _last_reader(self) -> int:
        """The last layer with a head that keeps reading; -1: none."""
        return int(self.head_keep.any(1).nonzero().max()) if self.head_keep.any() else -1

    @classmethod
    def dense(cls, config: Any) -> PruningPlan:
        """The plan under which nothing of the model that `config` describes is pruned."""
        layers, heads, _ = config_fields.model_sizes(config)
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
        keep, attends = self.head_keep.numpy().tobytes(), self.visual_attention
        return hash((keep, self.window, self.layer_cut, self.ffn_ratio, self.ffn, attends))

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer."""
        return _each(self.window, self.num_layers)

    @property
    def visual_attends(self) -> tuple[bool, ...]:
        """Whether visual tokens attend in each layer."""
        return _each(self.visual_attention, self.num_layers)

    def ffn_neurons(self, intermediate_size: int) -> tuple[int, ...]:
        """How many of the I FFN neurons visual tokens use in each layer."""
        if self.ffn is not None:
            given = _each(self.ffn, self.num_layers)
            chosen = [intermediate_size if one is None else one for one in given]
            if max(chosen) > intermediate_size:
                raise ValueError(
                    f"ffn is {max(chosen)}; allowed: 0 to intermediate_size, {intermediate_size}"
                )
            return tuple(chosen)
        neurons = int(intermediate_size / self.ffn_ratio)
        if neurons < 1:
            raise ValueError(
                f"ffn_ratio is {self.ffn_ratio:g}, which leaves no neuron of intermediate_size "
                f"{intermediate_size}; allowed: 1 to {intermediate_size}"
            )
        return (neurons,) * self.num_layers

    def validate(self, config: Any) -> None:
        """Raise ValueError unless the plan fits the model that `config` describes."""
        layers, heads, size = config_fields.model_sizes(config)
        if (self.num_layers, self.num_heads) != (layers, heads):
            raise ValueError(
                f"head_keep has shape {tuple(self.head_keep.shape)}, the model's config has "
                f"(num_hidden_layers, num_attention_heads) = ({layers}, {heads}); give a plan made "
                "for this model"
            )
        self.ffn_neurons(size)
        if self.sinks is not None and self.sinks.b is not None:
            dim = config_fields.head_dim(config)
            if self.sinks.b.shape[2] != dim:
                raise ValueError(
                    f"sinks.b has shape {tuple(self.sinks.b.shape)}, the model's heads have {dim} "
                    f"features: these sinks are of another model; {REMEDY}"
                )

    def save_to(self, config: Any) -> None:
        """Write the plan into `config.yopo`, JSON-able, in place of any other block; the released
        fields stay as they are. Sinks with b are a file of their own, which save_pretrained writes
        (`Sinks.save`). A config that leaves its sizes to its class's defaults is not held against
        the plan."""
        if config_fields.tells_sizes(config):
            self.validate(config)
        config_fields.put_block(config, self._to_block())

    @classmethod
    def from_config(cls, config: Any) -> PruningPlan | None:
        """The plan of a transformers config (or its to_dict()), None where it carries none.

        A `yopo` block wins over the released fields. $YOPO_MASS (HEAD[/CUT]) overrides the mass
        modes. Raises ValueError for a corrupt block, bad or incomplete released fields, blocks that
        differ, or a plan that does not fit the model; FileNotFoundError for a head mask that cannot
        be had.
        """
        plan = cls.found_in(config)
        if plan is None:
            return None
        if os.environ.get("YOPO_MASS"):
            plan = plan.with_mass(os.environ["YOPO_MASS"], name="YOPO_MASS")
        plan.validate(config)
        return plan

    def save(self, file: str | Path) -> None:
        """Write the plan to `file` as JSON, whole or not at all; `load` gives an equal one. Sinks
        with b go into FILE.sinks.safetensors beside it."""
        path = Path(file)
        if path.name == "config.json" or path.is_dir():
            raise ValueError(
                f"{path} is {'a folder' if path.is_dir() else 'the place of a config'}; give the "
                "plan a file of its own, such as plan.json. In a checkpoint's config it is written "
                "by yopo.apply and save_pretrained"
            )
        beside = sinks_beside(path.name)
        if self.sinks is not None:
            self.sinks.save(path.parent, beside)
        write_json(path, self._to_block(beside))

    @classmethod
    def load(cls, file: str | Path) -> PruningPlan:
        """The plan in `file`: one that `save` wrote, a config.json with a plan in it (a `yopo`
        block or the released fields), or a checkpoint's folder.

        The plan is what the file says: $YOPO_MASS is for models loaded with their plan. Raises
        FileNotFoundError where there is no such file or head mask, and ValueError naming the file
        where it holds no plan, or one that cannot be.
        """
        path = Path(file)
        if path.is_dir():
            path = path / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there; {_LOADABLE}")
        try:
            content = read_json(path)
            plan = cls._in_file(content, path.parent)
        except ValueError as error:
            raise ValueError(f"no plan can be read from {path}: {error}") from error
        if plan is None:
            raise ValueError(
                f"{path} holds no plan, neither a 'yopo' block nor the released fields "
                f"({listed(RELEASED_FIELDS)}); {_LOADABLE}"
            )
        return plan

    @classmethod
    def _in_file(cls, content: dict[str, Any], folder: Path) -> PruningPlan | None:
        if plan_block.is_block(content):
            return cls(**plan_block.unpack(content, str(folder)))
        plan = cls.found_in(content | {"_name_or_path": str(folder)})
        if plan is not None and config_fields.tells_sizes(content):
            plan.validate(content)
        return plan

    @classmethod
    def found_in(cls, config: Any) -> PruningPlan | None:
        """The plan in a config as it stands there, not yet held against the model."""
        blocks = config_fields.blocks(config)
        origin = [config_fields.get(config, name) for name in ("_name_or_path", "_commit_hash")]
        plans = {place: cls._from_block(block, place, origin) for place, block in blocks.items()}
        released = config_fields.released_values(config)
        if len(set(plans.values())) > 1:
            raise ValueError(
                f"the 'yopo' blocks of {' and '.join(plans)} hold different plans; delete the one "
                "that is not meant"
            )
        if plans:
            return next(iter(plans.values()))
        return cls._from_released(released, config) if released else None

    @classmethod
    def _from_block(cls, block: object, place: str, origin: list[Any]) -> PruningPlan:
        """The plan of a `yopo` block. Anything wrong raises ValueError: never silently dense.
        origin: the checkpoint that the config is from, and its revision."""
        try:
            return cls(**plan_block.unpack(block, *origin))
        except ValueError as error:
            raise ValueError(
                f"the 'yopo' block of {place} is corrupt: {error}. Restore it, or delete the whole "
                "key for a model without this plan"
            ) from error

    @classmethod
    def _from_released(cls, released: dict[str, Any], config: Any) -> PruningPlan:
        """The plan of the released fields: exact mass, the mask from a file."""
        config_fields.refuse_incomplete(released)
        layers, heads, _ = config_fields.model_sizes(config)
        keep = head_mask.find(
            released["headcut_num"],
            layers,
            heads,
            config_fields.get(config, "_name_or_path"),
            revision=config_fields.get(config, "_commit_hash"),
        )
        return cls(
            keep,
            window=released["attncut_w"],
            layer_cut=released["layercut_num"],
            ffn_ratio=released["mlpcut_ratio"],
        )

    def with_mass(self, setting: str, *, name: str = "mass") -> PruningPlan:
        """This plan with the masses HEAD[/CUT] of `setting`; HEAD alone is for both.

        Raises ValueError that calls the setting `name`: for other words, and for "sink" where the
        plan has no sinks.
        """
        head, cut = split_masses(setting, name)
        if "sink" in (head, cut) and self.sinks is None:
            raise ValueError(f"{name} is {setting!r}, but the plan has no sinks; {REMEDY}")
        return replace(self, head_mass=head, cut_mass=cut)

    def summary(self) -> str:
        """What is pruned, in words."""
        return words.summary(self)

    def _to_block(self, sinks_file: str = FILE) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.sinks is not None:
            values["sinks"] = self.sinks.to_block(sinks_file)
        return plan_block.pack(values)


def _each(value: Any, layers: int) -> tuple[Any, ...]:
    """The value of each layer, of one that `per_layer` gave."""
    return value if isinstance(value, tuple) else (value,) * layers


def _window(field: str, value: object) -> int | None:
    return None if value is None else integer(field, value, 1, None)


def _neurons(field: str, value: object) -> int | None:
    return None if value is None else integer(field, value, 0, None)


def split_masses(setting: str, name: str = "mass") -> tuple[str, str]:
    """(head_mass, cut_mass) of HEAD[/CUT]; raises ValueError that calls the setting `name`."""
    head, slash, cut = setting.partition("/") if isinstance(setting, str) else ("", "", "")
    cut = cut if slash else head
    if head not in MASSES or cut not in MASSES:
        raise ValueError(
            f"{name} is {setting!r}; allowed: HEAD or HEAD/CUT, each one of {listed(MASSES)}"
        )
    return head, cut
