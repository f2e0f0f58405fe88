"""Reads the config.json of a checkpoint folder: the language model's shape, one image's grid, the
plan. No weights, tokenizer or model class is touched.

Formats: the original LLaVA's (sizes at the top, `mm_vision_tower`), composite ones (`text_config`
and `vision_config`: HF-native LLaVA, LLaVA-NeXT, Qwen-VL, InternVL; `llm_config`: InternVL's own),
and plain language models. What a composite config leaves out is its model_type's default, as in
transformers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from yopo.counting.presets import Shape
from yopo.files import read_json
from yopo.plan.pruning_plan import PruningPlan
from yopo.plan.value_checks import integer

Grid = tuple[int, int]

_TEXT_NAMES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "head_dim", "attention_bias", "mlp_bias",
    "tie_word_embeddings",
)  # fmt: skip
_QWEN_PIXELS = 448  # Qwen-VL takes any size; its grids here are those of a 448 × 448 image


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint's config says.

    config: as PruningPlan.from_config takes it. kind: its format and model type, in words.
    grid: (rows, cols) of one image; None where the config does not say.
    """

    folder: Path
    config: dict[str, Any]
    kind: str
    shape: Shape
    grid: Grid | None

    def plan(self) -> PruningPlan | None:
        """Its own plan, None if it has none; raises as PruningPlan.from_config does."""
        return PruningPlan.from_config(self.config)


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Raises ValueError or OSError that says what is missing or wrong, and the remedy."""
    folder = Path(folder)
    raw = _config_json(folder)
    nested = next((raw[key] for key in ("text_config", "llm_config") if key in raw), None)
    if nested is not None and not isinstance(nested, dict):
        raise ValueError(f"{folder}/config.json: text_config is {nested!r}; it must be an object")
    text = raw if nested is None else _with_defaults(nested, raw)
    try:
        shape = _shape(text, raw)
    except ValueError as error:
        raise ValueError(
            f"{folder}/config.json does not describe a language model that can be counted: {error}"
        ) from error
    config = raw | {"_name_or_path": str(folder)}
    if nested is not None:
        config["text_config"] = text
    try:
        grid = _grid(raw, folder)
    except (ValueError, TypeError, IndexError, KeyError) as error:
        raise ValueError(
            f"{folder}/config.json does not say how large an image and its patches are: {error}. "
            "Put right its vision_config"
        ) from error
    return Checkpoint(folder, config, _kind(raw, nested), shape, grid)


def _config_json(folder: Path) -> dict[str, Any]:
    """Raises FileNotFoundError or ValueError saying what is there instead."""
    if not folder.is_dir():
        there = "is a file" if folder.is_file() else "is not there"
        raise FileNotFoundError(
            f"{folder} {there}; give the folder of a checkpoint, with its config.json "
            f"(from {Path.cwd()})"
        )
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is no checkpoint: it has no {file.name}")
    return read_json(file)


def _with_defaults(text: dict[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    """`text` with the values that transformers would give it where it says nothing."""
    # LLaVA's first composite configs do not name the text model: it is Llama there.
    family = text.get("model_type") or ("llama" if "llava" in str(raw.get("model_type")) else "")
    if family not in CONFIG_MAPPING:
        return text
    told = {name: text[name] for name in _TEXT_NAMES if name in text}
    return {**CONFIG_MAPPING[family](**told).to_dict(), **text}


def _shape(text: dict[str, Any], raw: dict[str, Any]) -> Shape:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: integer(name, text.get(name), 1, None) for name in names}
    heads = sizes["num_attention_heads"]
    kv_heads = text.get("num_key_value_heads") or heads
    sizes["num_key_value_heads"] = integer("num_key_value_heads", kv_heads, 1, heads)
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads {heads} is no multiple of the {kv_heads} kv heads")
    vocab = text.get("vocab_size", raw.get("vocab_size"))
    head_size = text.get("head_dim")
    qwen2 = "qwen2" in str(text.get("model_type"))
    return Shape(
        **sizes,
        vocab_size=integer("vocab_size", vocab, 1, None),
        grid=(1, 1),
        head_size=None if head_size is None else integer("head_dim", head_size, 1, None),
        qkv_bias=qwen2 or bool(text.get("attention_bias")),
        o_bias=not qwen2 and bool(text.get("attention_bias")),
        mlp_bias=bool(text.get("mlp_bias")),
        tied=bool(raw.get("tie_word_embeddings", text.get("tie_word_embeddings"))),
    )


def _kind(raw: dict[str, Any], nested: dict[str, Any] | None) -> str:
    name = str(raw.get("model_type") or "unnamed model")
    if nested is not None:
        return f"{name}, a composite config with a {nested.get('model_type') or 'llama'} text model"
    return f"{name}, the original LLaVA's format" if "mm_vision_tower" in raw else name


def _grid(raw: dict[str, Any], folder: Path) -> Grid | None:
    """The grid of one image (of one tile or view, where there are several)."""
    vision, family = raw.get("vision_config"), str(raw.get("model_type"))
    if isinstance(vision, dict):
        if "vl" in family and "qwen" in family:
            merge = vision.get("spatial_merge_size", 2)
            patch = vision.get("patch_size", vision.get("spatial_patch_size", 14))
            return _square(_QWEN_PIXELS, patch * merge)
        size = raw.get("force_image_size") or vision.get("image_size")
        patch = vision.get("patch_size")
        if not patch and family.startswith("llava"):
            size, patch = 336, 14  # the tower of LlavaConfig's defaults
        return _square(size, patch, raw.get("downsample_ratio", 1))
    tower = raw.get("mm_vision_tower")
    if not isinstance(tower, str):
        return None
    for place in (Path(tower), folder / tower):
        if (place / "config.json").is_file():
            inner = read_json(place / "config.json")
            inner = inner.get("vision_config", inner)
            return _square(inner.get("image_size"), inner.get("patch_size"))
    # A Hub id says it: openai/clip-vit-large-patch14-336, google/siglip-so400m-patch14-384.
    named = re.search(r"patch(\d+)(?:-(\d+))?", tower)
    return _square(int(named[2] or 224), int(named[1])) if named else None


def _square(size: Any, patch: Any, ratio: float = 1) -> Grid | None:
    if isinstance(size, list | tuple):
        size = size[0]
    if isinstance(patch, list | tuple):
        patch = patch[0]
    if not size or not patch:
        return None
    side = int(size // patch * ratio)
    if side < 1:
        raise ValueError(f"image_size is {size}, patch_size {patch}: there is not one patch")
    return side, side
