"""LLaVA-1.5 as the original package (llava-torch) writes it, and the pruned checkpoints released
with YOPO, become transformers' LlavaForConditionalGeneration: names, config, prompts.

Holds what is particular to this format; reading, checking and writing are done elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, normalizers
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from yopo.checkpoint.shards import read_json, weight_files
from yopo.convert import tokenizer_files as text
from yopo.convert.common import Conversion, Make, Names, as_it_is, local_folder, plan_in, rope
from yopo.errors import BadInput
from yopo.files import write_json

CONVERTS = "LLaVA-1.5 as llava-torch writes it (LlavaLlamaForCausalLM)"
IMAGE = "<image>"
_SYSTEM = (  # LLaVA's conversation "v1"
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
_TEXT_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
# Of a CLIP with both towers: what LLaVA never reads.
_OTHER_TOWER = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")

_TEMPLATE = (
    "{%- macro words(content) -%}"
    "{%- if content is string -%}{{ content }}{%- else -%}"
    "{%- for part in content if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}"
    "{%- for part in content if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}"
    "{%- endif -%}{%- endmacro -%}"
    "{%- if messages and messages[0]['role'] == 'system' -%}"
    "{{ words(messages[0]['content']) + ' ' }}"
    '{%- else -%}{{ "' + _SYSTEM + ' " }}{%- endif -%}'
    "{%- for message in messages if message['role'] != 'system' -%}"
    "{%- if message['role'] == 'user' -%}{{ 'USER: ' + words(message['content']) + ' ' }}"
    "{%- else -%}{{ 'ASSISTANT: ' + words(message['content']) + '</s>' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)


def recognises(config: dict[str, Any]) -> bool:
    """Whether a config.json is one of this format."""
    named = "LlavaLlamaForCausalLM" in (config.get("architectures") or ())
    typed = config.get("model_type") in ("llava", "llava_llama") and not config.get("architectures")
    return (named or typed) and "text_config" not in config


def read(source: Path, config: dict[str, Any], vision_tower: str | None) -> Conversion:
    """How to convert the checkpoint in `source`. Raises BadInput naming what it has that
    transformers' class has not."""
    _refuse_other_models(source, config)
    plan = plan_in(source, config)
    tower = _tower(source, config, vision_tower)
    tokenizer, image_id = _tokenizer(source)
    old_rows = config["vocab_size"]
    # A multiple of 64, as llava-hf's own have: GPUs multiply by such matrices faster.
    rows = old_rows if image_id < old_rows else -(-(image_id + 1) // 64) * 64
    new = _config(config, tower, image_id, rows)
    trained_tower = bool(config.get("unfreeze_mm_vision_tower"))
    weights = [(weight_files(source), _names(old_rows, rows, trained_tower))]
    notes = []
    if trained_tower:  # LLaVA then builds the tower first, and the checkpoint's own overwrites it
        notes.append("the vision tower is the checkpoint's own (unfreeze_mm_vision_tower)")
    else:
        weights.append((weight_files(tower), tower_names))
    if rows > old_rows:
        notes.append(
            f"{IMAGE} is token {image_id}; the {rows - old_rows} rows added to embeddings and "
            "lm_head are the mean of the others, so that greedy decoding never picks one"
        )
    files = {
        "preprocessor_config.json": _preprocessor(tower, config),
        "processor_config.json": _processor(new),
        "generation_config.json": _generation(source, config, tokenizer),
    }

    def write_rest(folder: Path) -> None:
        extra = {"extra_special_tokens": {"image_token": IMAGE}}
        text.write(folder, tokenizer, source, _TEMPLATE, extra)
        for name, content in files.items():
            write_json(folder / name, content)

    return Conversion(
        kind=CONVERTS,
        model_class=LlavaForConditionalGeneration,
        config=new,
        dtype=str(config.get("torch_dtype") or config.get("dtype") or "float16"),
        rope=rope(config),
        plan=plan,
        weights=weights,
        write_rest=write_rest,
        notes=notes,
    )


def _refuse_other_models(source: Path, config: dict[str, Any]) -> None:
    def refuse(key: str, allowed: str, why: str) -> None:
        raise BadInput(
            f"{source}: {key} is {config.get(key)!r}, allowed: {allowed}; transformers' LLaVA {why}"
        )

    if config.get("mm_projector_type", "linear") != "mlp2x_gelu":
        refuse("mm_projector_type", "mlp2x_gelu", "has that projector only")
    if config.get("mm_patch_merge_type", "flat") != "flat":
        refuse("mm_patch_merge_type", "flat", "has no tiles (that is LLaVA-NeXT)")
    if config.get("image_aspect_ratio") not in (None, "square", "pad"):
        refuse("image_aspect_ratio", "pad, square", "has no tiles (that is LLaVA-NeXT)")
    if config.get("mm_use_im_start_end"):
        refuse("mm_use_im_start_end", "false", "puts no tokens around an image")
    if config.get("tie_word_embeddings"):
        refuse("tie_word_embeddings", "false", "of this format never ties them")
    if config.get("mm_vision_select_feature", "patch") not in ("patch", "cls_patch"):
        refuse("mm_vision_select_feature", "patch, cls_patch", "knows no other")
    missing = [key for key in ("vocab_size", "mm_vision_tower") if key not in config]
    if missing:
        raise BadInput(f"{source}/config.json lacks {', '.join(missing)}")


# ------------------------------------------------------------------------------- the vision tower


def _tower(source: Path, config: dict[str, Any], given: str | None) -> Path:
    named = str(given or config["mm_vision_tower"])
    what = "--vision-tower" if given else f"mm_vision_tower of {source} (or give --vision-tower)"
    tower = local_folder(named, what)
    kind = read_json(tower / "config.json").get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise BadInput(f"{what}: {tower} is a {kind}; allowed: clip, clip_vision_model")
    return tower


def _config(config: dict[str, Any], tower: Path, image_id: int, rows: int) -> LlavaConfig:
    """rows: of the embedding."""
    vision = _vision_config(tower)
    cells = (vision.image_size // vision.patch_size) ** 2
    class_token = config.get("mm_vision_select_feature", "patch") == "cls_patch"
    return LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(
            vocab_size=rows,
            tie_word_embeddings=False,
            **{key: config[key] for key in _TEXT_FIELDS if config.get(key) is not None},
            **rope(config),
        ),
        image_token_index=image_id,
        image_seq_length=cells + class_token,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="full" if class_token else "default",
        vision_feature_layer=config.get("mm_vision_select_layer", -2),
        tie_word_embeddings=False,
    )


def _vision_config(tower: Path) -> CLIPVisionConfig:
    content = read_json(tower / "config.json")
    content = content.get("vision_config") or content
    fields = (
        "hidden_size",
        "intermediate_size",
        "projection_dim",
        "num_hidden_layers",
        "num_attention_heads",
        "num_channels",
        "image_size",
        "patch_size",
        "hidden_act",
        "layer_norm_eps",
    )
    return CLIPVisionConfig(**{key: content[key] for key in fields if key in content})


def _preprocessor(tower: Path, config: dict[str, Any]) -> dict[str, Any]:
    """preprocessor_config.json: CLIP's steps, after padding to a square where LLaVA pads."""
    given = read_json(tower / "preprocessor_config.json")
    size, crop = given.get("size", 224), given.get("crop_size", 224)
    pad = config.get("image_aspect_ratio") == "pad"
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
    return {
        "image_processor_type": "LlavaImageProcessor" if pad else "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        **({"do_pad": True} if pad else {}),
        **{step: given.get(step, True) for step in steps},
        "size": {"shortest_edge": size} if isinstance(size, int) else size,
        "crop_size": {"height": crop, "width": crop} if isinstance(crop, int) else crop,
        "image_mean": given.get("image_mean", OPENAI_CLIP_MEAN),
        "image_std": given.get("image_std", OPENAI_CLIP_STD),
        "resample": given.get("resample", 3),
        "rescale_factor": given.get("rescale_factor", 1 / 255),
    }


# ---------------------------------------------------------------------------------------- weights


def _processor(new: LlavaConfig) -> dict[str, Any]:
    return {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE,
        "patch_size": new.vision_config.patch_size,
        "vision_feature_select_strategy": new.vision_feature_select_strategy,
        "num_additional_image_tokens": 1,
    }


def _generation(source: Path, config: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation = {key: config[key] for key in ids if config.get(key) is not None}
    if "pad_token_id" not in generation:
        pad = text.special_tokens(source).get("pad_token")
        if pad is None:
            raise BadInput(
                f"{source} names no padding token: neither pad_token_id in config.json, nor a pad, "
                "unk or eos token in tokenizer_config.json or special_tokens_map.json. Add one"
            )
        generation["pad_token_id"] = tokenizer.token_to_id(pad)
    return generation


def _names(rows: int, new_rows: int, tower: bool) -> Names:
    """What becomes of a tensor of the LLaVA checkpoint; `tower`: its own vision tower is used."""
    grow = _grow(rows, new_rows)
    special: dict[str, list[tuple[str, Make]]] = {
        "model.image_newline": [],  # read for tiles only
        "model.embed_tokens.weight": [("language_model.model.embed_tokens.weight", grow)],
        "lm_head.weight": [("language_model.lm_head.weight", grow)],
    }
    for part in ("weight", "bias"):
        for old, new in (("0", "linear_1"), ("2", "linear_2")):
            name = f"multi_modal_projector.{new}.{part}"
            special[f"model.mm_projector.{old}.{part}"] = [(name, as_it_is)]

    def names(name: str) -> list[tuple[str, Make]] | None:
        if name in special:
            return special[name]
        if name.startswith("model.vision_tower."):
            inner = name.removeprefix("model.vision_tower.").removeprefix("vision_tower.")
            return tower_names(inner) if tower else []
        if name.endswith(".rotary_emb.inv_freq"):  # a buffer of checkpoints of 2023
            return []
        return [(f"language_model.{name}", as_it_is)] if name.startswith("model.") else None

    return names


def tower_names(name: str) -> list[tuple[str, Make]] | None:
    """What becomes of a tensor of a CLIP checkpoint, with or without its text tower."""
    if name.startswith(_OTHER_TOWER):
        return []
    return [(f"vision_tower.vision_model.{name.removeprefix('vision_model.')}", as_it_is)]


def _grow(rows: int, new_rows: int) -> Make:
    """Appends the mean row until there are `new_rows`. A logit from the mean row of lm_head is the
    mean of the other logits, so it is never the largest."""

    def grow(matrix: Tensor) -> Tensor:
        if matrix.shape[0] != rows:
            raise ValueError(f"vocab_size is {rows}")
        if new_rows == rows:
            return matrix
        mean = matrix.mean(dim=0, keepdim=True, dtype=torch.float32).to(matrix.dtype)
        return torch.cat([matrix, mean.expand(new_rows - rows, -1)])

    return grow


# -------------------------------------------------------------------------------------- tokenizer


def _tokenizer(source: Path) -> tuple[Tokenizer, int]:
    """The tokenizer with <image> as a token, and the id of that.

    LLaVA cuts its prompt at <image> and tokenizes each part as a text of its own, which therefore
    begins with a ▁. That is had here by a space put behind the last <image> of a run.
    """
    tokenizer = text.load(source, ("LlamaTokenizerFast", "LlamaTokenizer"))
    if tokenizer.token_to_id("▁") is None:
        raise BadInput(f"the tokenizer in {source} is not Llama's: it has no '▁'")
    text.as_sentencepiece(tokenizer, prefix=True)
    rule = Regex(rf"{IMAGE}(?!{IMAGE})(?=[\s\S])")
    tokenizer.normalizer = normalizers.Replace(rule, f"{IMAGE} ")
    tokenizer.add_special_tokens([AddedToken(IMAGE, normalized=True, special=True)])
    return tokenizer, tokenizer.token_to_id(IMAGE)
