"""Where a plan stands in a model's config: as a `yopo` block or in the released fields, at the top
or in `text_config`. Finds and checks them; making a plan of them is pruning_plan.py's.

A config is an object of transformers or its dict, as in config.json.
"""

from __future__ import annotations

from typing import Any

from yopo.plan.value_checks import integer, listed, ratio

RELEASED_FIELDS = ("attncut_w", "layercut_num", "headcut_num", "mlpcut_ratio", "sprompt_len")
_SIZES = ("num_hidden_layers", "num_attention_heads", "intermediate_size")


def model_sizes(config: Any) -> tuple[int, int, int]:
    """(layers, heads, FFN neurons) of the language model. Raises ValueError where one lacks."""
    text = _holders(config)[-1][1]
    layers, heads, size = (integer(f"config.{name}", get(text, name), 1, None) for name in _SIZES)
    return layers, heads, size


def head_sizes(config: Any) -> tuple[int, int, int]:
    """(query heads, key/value heads, features of a head), which configs may leave to be derived."""
    text = _holders(config)[-1][1]
    heads = get(text, "num_attention_heads")
    kv_heads = get(text, "num_key_value_heads") or heads
    return heads, kv_heads, get(text, "head_dim") or get(text, "hidden_size") // heads


def head_dim(config: Any) -> int:
    """D, the features of a head."""
    return head_sizes(config)[2]


def tells_sizes(config: Any) -> bool:
    """Whether the config has the model's sizes; files may leave them to their class's defaults."""
    text = _holders(config)[-1][1]
    return all(get(text, name) is not None for name in _SIZES)


def blocks(config: Any) -> dict[str, object]:
    """Each `yopo` block by the config that holds it, in words."""
    words = {"config": "the config", "config.text_config": "the config's text_config"}
    return {
        words[place]: get(holder, "yopo")
        for place, holder in _holders(config)
        if _has(holder, "yopo")
    }


def put_block(config: Any, block: dict[str, Any]) -> None:
    """Write `block` at the top of the config, and take away any other, which it replaces."""
    for _, holder in _holders(config):
        if isinstance(holder, dict):
            holder.pop("yopo", None)
        else:
            vars(holder).pop("yopo", None)
    if isinstance(config, dict):
        config["yopo"] = block
    else:
        config.yopo = block


def released_values(config: Any) -> dict[str, Any]:
    """The released fields that are in the config, each checked.

    Raises ValueError naming the field, its value and what is allowed; and where the top and
    `text_config` say different things.
    """
    layers = heads = None
    there = any(get(h, field) is not None for _, h in _holders(config) for field in RELEASED_FIELDS)
    if there and tells_sizes(config):  # what sizes a model without a plan has is not ours to judge
        layers, heads, _ = model_sizes(config)
    found: dict[str, tuple[str, Any]] = {}
    for place, holder in _holders(config):
        for field in RELEASED_FIELDS:
            value = get(holder, field)
            if value is None:
                continue
            value = _released_value(f"{place}.{field}", field, value, layers, heads)
            first, known = found.setdefault(field, (f"{place}.{field}", value))
            if value != known:
                raise ValueError(
                    f"{first} is {known}, but {place}.{field} is {value}; leave one of them"
                )
    return {field: value for field, (_, value) in found.items()}


def _released_value(
    name: str, field: str, value: object, layers: int | None, heads: int | None
) -> float:
    if field == "mlpcut_ratio":
        return ratio(name, value)
    low, high = {
        "attncut_w": (1, None),
        "layercut_num": (0, layers),
        "headcut_num": (0, heads),
        "sprompt_len": (0, None),
    }[field]
    return integer(name, value, low, high)


def refuse_incomplete(released: dict[str, Any]) -> None:
    """Raises ValueError where only some of the released fields are there and no block is."""
    missing = [name for name in RELEASED_FIELDS if name not in released]
    if missing:
        raise ValueError(
            f"the config has some released pruning fields but not {listed(missing)}; add them "
            f"(all of {listed(RELEASED_FIELDS)} belong together), or remove the others for a "
            "model without a plan"
        )


def get(config: Any, name: str) -> Any:
    """The value called `name`, None where there is none."""
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


def _has(config: Any, name: str) -> bool:
    return name in config if isinstance(config, dict) else hasattr(config, name)


def _holders(config: Any) -> list[tuple[str, Any]]:
    """The config and, in a composite one, the part that describes the language model, by name."""
    text = get(config, "text_config")
    return [("config", config)] + ([] if text is None else [("config.text_config", text)])
