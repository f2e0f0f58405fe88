"""InternVL2's own format (InternVLChatModel with remote code) becomes transformers'
InternVLForConditionalGeneration: names, config, the fused projections taken apart.

Holds what is particular to this format; its prompts are in internvl_text.py, reading, checking and
writing are done elsewhere. None of the checkpoint's own code is run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from torch import Tensor

from yopo.checkpoint.shards import weight_files
from yopo.convert import internvl_text as prompts
from yopo.convert.common import Conversion, Make, Names, as_it_is, plan_in, rope
from yopo.errors import BadInput

_COMMON = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


class _Text(NamedTuple):
    """A language model: transformers' config class and the fields it takes besides the common."""

    config: str
    fields: tuple[str, ...]


_TEXTS = {
    "InternLM2ForCausalLM": _Text("LlamaConfig", ()),
    "LlamaForCausalLM": _Text("LlamaConfig", ("attention_bias", "mlp_bias", "head_dim")),
    "Qwen2ForCausalLM": _Text(
        "Qwen2Config", ("use_sliding_window", "sliding_window", "max_window_layers")
    ),
    "Phi3ForCausalLM": _Text(
        "Phi3Config",
        ("original_max_position_embeddings", "sliding_window", "resid_pdrop", "embd_pdrop"),
    ),
}
CONVERTS = (
    "InternVL2 as its makers write it (InternVLChatModel with one of "
    f"{', '.join(name.removesuffix('ForCausalLM') for name in _TEXTS)})"
)


def recognises(config: dict[str, Any]) -> bool:
    """Whether a config.json is one of this format."""
    return "InternVLChatModel" in (config.get("architectures") or ()) or (
        config.get("model_type") == "internvl_chat"
    )


def read(source: Path, config: dict[str, Any], vision_tower: str | None) -> Conversion:
    """How to convert the checkpoint in `source`. Raises BadInput naming what it has that
    transformers' class has not."""
    if not hasattr(transformers, "InternVLForConditionalGeneration"):
        raise BadInput(
            f"transformers {transformers.__version__} has no InternVLForConditionalGeneration: "
            "pip install 'transformers>=4.52'"
        )
    if vision_tower is not None:
        raise BadInput(f"--vision-tower is LLaVA's; {source} has its vision tower in it")
    language, vision = config.get("llm_config"), config.get("vision_config")
    if not isinstance(language, dict) or not isinstance(vision, dict):
        raise BadInput(f"{source}/config.json lacks llm_config or vision_config")
    architecture = _refuse_other_models(source, config, language)
    chat = prompts.read(source, config)
    side = int(config.get("force_image_size") or vision["image_size"])
    ratio = float(config.get("downsample_ratio", 0.5))
    tokens = int((side // vision["patch_size"]) ** 2 * ratio**2)
    new = transformers.InternVLConfig(
        vision_config=_vision_config(source, vision),
        text_config=_text_config(source, architecture, language),
        image_token_id=chat.image_id,
        image_seq_length=tokens,
        downsample_ratio=ratio,
        projector_hidden_act="gelu",
        vision_feature_layer=config.get("select_layer", -1),
        vision_feature_select_strategy="default",
        tie_word_embeddings=bool(language.get("tie_word_embeddings", False)),
    )
    return Conversion(
        kind=f"InternVL2 with {architecture.removesuffix('ForCausalLM')}",
        model_class=transformers.InternVLForConditionalGeneration,
        config=new,
        dtype=str(config.get("torch_dtype") or config.get("dtype") or "bfloat16"),
        rope=rope(language),
        plan=plan_in(source, {**config, "text_config": language}),
        weights=[(weight_files(source), _names(architecture, language))],
        write_rest=partial(prompts.write, chat, source, config, side, tokens),
        notes=[],
    )


def _refuse_other_models(source: Path, config: dict[str, Any], language: dict[str, Any]) -> str:
    """The language model's architecture."""
    architecture = next(iter(language.get("architectures") or ()), None)
    if architecture not in _TEXTS:
        raise BadInput(
            f"{source}: llm_config.architectures is {architecture!r}; allowed: {', '.join(_TEXTS)}"
        )
    for key, allowed, default in (
        ("ps_version", ("v2",), "v1"),
        ("use_backbone_lora", (0, None, False), 0),
        ("use_llm_lora", (0, None, False), 0),
        ("pad2square", (False, None), False),
    ):
        value = config.get(key, default)
        if value not in allowed:
            raise BadInput(
                f"{source}: {key} is {value!r}, which transformers' InternVL cannot do; allowed: "
                f"{allowed[0]!r}"
            )
    if language.get("rope_pos_id_version", "default") != "default":  # V2PE's fractional positions
        raise BadInput(
            f"{source}: llm_config.rope_pos_id_version is {language['rope_pos_id_version']!r}, "
            "which transformers' InternVL cannot do; allowed: 'default'"
        )
    return architecture


def _text_config(source: Path, architecture: str, language: dict[str, Any]) -> Any:
    text = _TEXTS[architecture]
    fields = {key: language[key] for key in _COMMON + text.fields if language.get(key) is not None}
    missing = [key for key in _COMMON[:5] if key not in fields]
    if missing:
        raise BadInput(f"{source}/config.json: llm_config lacks {', '.join(missing)}")
    fields.setdefault("tie_word_embeddings", False)
    if architecture == "InternLM2ForCausalLM":
        fields["attention_bias"] = bool(language.get("bias", True))
    return getattr(transformers, text.config)(**fields, **rope(language))


def _vision_config(source: Path, vision: dict[str, Any]) -> Any:
    # InternVisionConfig's names and defaults, as of InternVL2.
    names = {
        "hidden_size": ("hidden_size", None),
        "intermediate_size": ("intermediate_size", None),
        "num_hidden_layers": ("num_hidden_layers", None),
        "num_attention_heads": ("num_attention_heads", None),
        "image_size": ("image_size", None),
        "patch_size": ("patch_size", None),
        "attention_bias": ("qkv_bias", False),
        "use_qk_norm": ("qk_normalization", True),
        "hidden_act": ("hidden_act", "gelu"),
        "norm_type": ("norm_type", "rms_norm"),
        "layer_norm_eps": ("layer_norm_eps", 1e-6),
        "num_channels": ("num_channels", 3),
        "hidden_dropout_prob": ("dropout", 0.0),
        "attention_dropout": ("attention_dropout", 0.0),
        "layer_scale_init_value": ("initializer_factor", 0.1),
    }
    fields = {new: vision.get(old, default) for new, (old, default) in names.items()}
    missing = [names[new][0] for new, value in fields.items() if value is None]
    if missing:
        raise BadInput(f"{source}/config.json: vision_config lacks {', '.join(missing)}")
    return transformers.InternVLVisionConfig(
        **fields, use_absolute_position_embeddings=True, use_mask_token=False, use_mean_pooling=True
    )


# ---------------------------------------------------------------------------------------- weights

_PROJECTOR = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}
_VISION: Mapping[str, str] = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.projection_layer",
    "attn.q_norm": "attention.q_norm",
    "attn.k_norm": "attention.k_norm",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_EMBEDDINGS: Mapping[str, str] = {
    "class_embedding": "cls_token",
    "position_embedding": "position_embeddings",
    "patch_embedding.weight": "patch_embeddings.projection.weight",
    "patch_embedding.bias": "patch_embeddings.projection.bias",
}
_INTERNLM2: Mapping[str, str] = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def _names(architecture: str, language: dict[str, Any]) -> Names:
    """What becomes of a tensor of the checkpoint."""
    text = _same_names if architecture != "InternLM2ForCausalLM" else _internlm2_names(language)

    def names(name: str) -> list[tuple[str, Make]] | None:
        top, _, rest = name.partition(".")
        if name.endswith(".inv_freq"):
            return []
        if top == "language_model":
            return text(rest)
        if top == "vision_model":
            return _vision_names(rest)
        number, _, kind = rest.partition(".")
        if top == "mlp1" and number in _PROJECTOR:
            return [(f"multi_modal_projector.{_PROJECTOR[number]}.{kind}", as_it_is)]
        return None

    return names


def _same_names(name: str) -> list[tuple[str, Make]] | None:
    """Llama, Qwen2 and Phi-3 (fused in transformers, too) are transformers' own."""
    return [(f"language_model.{name}", as_it_is)]


def _internlm2_names(language: dict[str, Any]) -> Names:
    heads = int(language["num_attention_heads"])
    groups = int(language.get("num_key_value_heads") or heads)
    outer = {
        "model.tok_embeddings.weight": "model.embed_tokens.weight",
        "model.norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }

    def names(name: str) -> list[tuple[str, Make]] | None:
        if name in outer:
            return [(f"language_model.{outer[name]}", as_it_is)]
        match = re.fullmatch(r"(model\.layers\.\d+)\.(.+)\.(weight|bias)", name)
        if match is None:
            return None
        layer, module, kind = match.groups()
        if module == "attention.wqkv":
            return [
                (
                    f"language_model.{layer}.self_attn.{letter}_proj.{kind}",
                    partial(_of_groups, heads=heads, groups=groups, part=letter),
                )
                for letter in "qkv"
            ]
        if module not in _INTERNLM2:
            return None
        return [(f"language_model.{layer}.{_INTERNLM2[module]}.{kind}", as_it_is)]

    return names


def _of_groups(wqkv: Tensor, heads: int, groups: int, part: str) -> Tensor:
    """The rows of q, k or v in InternLM2's wqkv: for each group of heads that share keys, those of
    its queries, then of its key, then of its value."""
    per_group = heads // groups + 2
    rows = wqkv.reshape(groups, per_group, -1, *wqkv.shape[1:])  # (groups, per_group, D, …)
    chosen = {"q": rows[:, :-2], "k": rows[:, -2:-1], "v": rows[:, -1:]}[part]
    return chosen.reshape(-1, *wqkv.shape[1:])


def _vision_names(name: str) -> list[tuple[str, Make]] | None:
    outer = name.removeprefix("embeddings.")
    if outer != name:
        new = _EMBEDDINGS.get(outer)
        return None if new is None else [(f"vision_tower.embeddings.{new}", as_it_is)]
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name)
    if match is None:
        return None
    layer = f"vision_tower.encoder.layer.{match[1]}"
    if match[2] in ("ls1", "ls2"):
        return [(f"{layer}.lambda_{match[2][-1]}", as_it_is)]
    module, _, kind = match[2].rpartition(".")
    if module == "attn.qkv":
        return [
            (f"{layer}.attention.{letter}_proj.{kind}", partial(_third, index=index))
            for index, letter in enumerate("qkv")
        ]
    return [(f"{layer}.{_VISION[module]}.{kind}", as_it_is)] if module in _VISION else None


def _third(qkv: Tensor, index: int) -> Tensor:
    rows = qkv.shape[0] // 3
    return qkv[index * rows : (index + 1) * rows]
