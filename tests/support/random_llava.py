"""A tiny LLaVA checkpoint with random weights, in the original package's format, for the drop-in
tests: 4 × 4 visual tokens an image, three layers of four heads. Nothing is learnt or downloaded."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from yopo.plan.pruning_plan import PruningPlan

HIDDEN, LAYERS, HEADS, INTERMEDIATE = 32, 3, 4, 24
CLIP_HIDDEN, SIDE, PATCH = 24, 4, 7
PIXELS = SIDE * PATCH
IMAGE = -200  # the id that stands for an image
PINPOINTS = [[PIXELS, 2 * PIXELS], [2 * PIXELS, PIXELS], [2 * PIXELS, 2 * PIXELS]]
TEXT = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. "
    "USER: what is in this image? ASSISTANT: a red circle and 12 blue boxes\n"
    "how many? no yes green yellow triangle; left: right! (is it?) 0123456789 ABCDEFGHIJKLMNOP"
)


def a_plan(**changes: Any) -> PruningPlan:
    """Heads of every kind: all, none and some kept; a window, a cut and an FFN slice."""
    values = dict(window=3, layer_cut=2, ffn_ratio=2) | changes
    keep = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1]])
    return PruningPlan(keep, **values)


def make(folder: Path, plan: PruningPlan | None = None, **config: Any) -> Path:
    """Writes a checkpoint and its vision tower under `folder`; returns the checkpoint's path.

    `config` replaces fields of its config.json.
    """
    tower, checkpoint = folder / "clip", folder / "llava-v1-random"
    checkpoint.mkdir(parents=True)
    _write_tower(tower)
    vocabulary = _write_tokenizer(checkpoint)
    fields: dict[str, Any] = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "torch_dtype": "float16",
        "image_aspect_ratio": "pad",
        "mm_hidden_size": CLIP_HIDDEN,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": str(tower),
        "use_mm_proj": True,
        **config,
    }
    if plan is not None:
        plan.save_to(fields)
    _write_json(checkpoint / "config.json", fields)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    _write_json(checkpoint / "generation_config.json", ids)
    weights = _weights(vocabulary)
    if "unpad" not in fields.get("mm_patch_merge_type", ""):
        del weights["model.image_newline"]
    _write_weights(checkpoint / "model.safetensors", weights)
    return checkpoint


def load(folder: Path) -> tuple[Any, Any]:
    """The model in float32, and its image processor."""
    from llava.model.builder import load_pretrained_model

    _, model, processor, _ = load_pretrained_model(str(folder), None, folder.name, device="cpu")
    return in_float32(model), processor


def pixels(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, PIXELS, PIXELS, generator=generator)


def batch(rows: list[list[int]], side: str = "right") -> tuple[Tensor, Tensor]:
    """Padded ids and their mask."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width)
    for b, row in enumerate(rows):
        at = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[b, at], mask[b, at] = torch.tensor(row), 1
    return ids, mask.long()


def in_float32(model: Any) -> Any:
    """The loaded model in float32: in LLaVA's hard-coded float16 little could be compared."""
    model.float()
    for layer in model.model.layers:
        rotary = getattr(layer.self_attn, "rotary_emb", None)
        if hasattr(rotary, "cos_cached"):  # up to 4.37, tables made in float16
            rotary._set_cos_sin_cache(rotary.max_seq_len_cached, "cpu", torch.float32)
    return model


def picture(seed: int, width: int = 40, height: int = 30) -> Any:
    """A PIL image of noise."""
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def _weights(vocabulary: int) -> dict[str, Tensor]:
    """Under which attention is neither flat nor one-hot, and an end of text is unlikely."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return random(rows, columns, scale=scale / columns**0.5)

    weights = {
        "model.embed_tokens.weight": random(vocabulary, HIDDEN),
        "model.norm.weight": 1 + random(HIDDEN, scale=0.3),
        "lm_head.weight": matrix(vocabulary, HIDDEN, 2),
        "model.image_newline": random(HIDDEN),
        "model.mm_projector.0.weight": matrix(HIDDEN, CLIP_HIDDEN),
        "model.mm_projector.0.bias": random(HIDDEN, scale=0.3),
        "model.mm_projector.2.weight": matrix(HIDDEN, HIDDEN, 2),
        "model.mm_projector.2.bias": random(HIDDEN, scale=0.3),
    }
    weights["lm_head.weight"][2] = 0
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for name in "qkvo":
            scale = 1.4 if name in "qk" else 2.5
            weights[f"{at}self_attn.{name}_proj.weight"] = matrix(HIDDEN, HIDDEN, scale)
        weights[at + "mlp.gate_proj.weight"] = matrix(INTERMEDIATE, HIDDEN)
        weights[at + "mlp.up_proj.weight"] = matrix(INTERMEDIATE, HIDDEN)
        weights[at + "mlp.down_proj.weight"] = matrix(HIDDEN, INTERMEDIATE)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{at}{name}.weight"] = 1 + random(HIDDEN, scale=0.3)
    return weights


def _write_tower(folder: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    folder.mkdir(exist_ok=True)
    config = {
        "model_type": "clip_vision_model",
        "hidden_size": CLIP_HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": PIXELS,
        "patch_size": PATCH,
        "projection_dim": CLIP_HIDDEN,
    }
    _write_json(folder / "config.json", config)
    generator = torch.Generator().manual_seed(2)
    weights = {
        # Named as up to transformers 4; transformers 5 has no "vision_model." and takes both.
        f"vision_model.{name.removeprefix('vision_model.')}": (
            torch.randn(value.shape, generator=generator) * 0.3 + ("norm" in name)
        )
        for name, value in CLIPVisionModel(CLIPVisionConfig(**config)).state_dict().items()
        if value.is_floating_point()
    }
    _write_weights(folder / "model.safetensors", weights)
    size = {"height": PIXELS, "width": PIXELS}
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": size,
        "size": {"shortest_edge": PIXELS},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
        "resample": 3,
    }
    _write_json(folder / "preprocessor_config.json", preprocessor)


def _write_tokenizer(folder: Path) -> int:
    """A sentencepiece tokenizer that knows the characters of LLaVA's prompts; its size."""
    import sentencepiece

    model, words = io.BytesIO(), TEXT.split()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT, *words] * 3),
        model_writer=model,
        vocab_size=130,
        model_type="bpe",
        character_coverage=1.0,
        pad_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    fields = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": None,
        "legacy": False,
        "model_max_length": 1024,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", fields)
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1))


def _write_weights(file: Path, weights: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    halves = {name: value.half().contiguous() for name, value in weights.items()}
    save_file(halves, file, metadata={"format": "pt"})
