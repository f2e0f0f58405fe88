"""Writes the folders: LLaVA's checkpoint format as of 2023, loaded alike by old and new versions.

The configs are written by hand in the style of liuhaotian/llava-v1.5-7b, since what transformers 5
saves cannot be read by 4.36.
"""

import json
from pathlib import Path

import torch
from data import CLIP_MEAN, CLIP_STD, IMAGE_SIZE
from safetensors.torch import save_file
from tower import USED_LAYERS, WIDTH, tower_config

HERE = Path(__file__).resolve().parent
CLIP_FOLDER = HERE / "clip-tiny"
CHECKPOINTS = {kind: HERE / "checkpoints" / f"tiny-llava-v1-{kind}" for kind in ("dense", "pruned")}
LAYERS, HEADS, HIDDEN, INTERMEDIATE = 6, 6, 192, 512


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def llama_config(vocabulary: int) -> dict:
    """The fields of a LlamaConfig."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def write_text_files(folder: Path, vocabulary: int, extra: dict | None = None) -> None:
    """All json files of a LLaVA checkpoint; `extra` goes into its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlavaLlamaForCausalLM"],
        # The package's own name for it. With the older "llava" transformers 5 ignores
        # tokenizer_class and leaves out the space before the first word of every piece of text.
        "model_type": "llava_llama",
        **llama_config(vocabulary),
        "max_length": 4096,
        "rope_scaling": None,
        "pretraining_tp": 1,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0",
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "mm_hidden_size": WIDTH,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        # Relative to the root of the repository, from which LLaVA must therefore run.
        "mm_vision_tower": "examples/tiny_llava/clip-tiny",
        "tune_mm_mlp_adapter": False,
        "tune_mm_vision_resampler": False,
        "unfreeze_mm_vision_tower": False,
        "use_mm_proj": True,
        **(extra or {}),
    }
    _write(folder / "config.json", config)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    _write(folder / "generation_config.json", {**ids, "transformers_version": "4.31.0"})
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    tokens = {kind: {"content": name, **flags} for kind, name in names.items()}
    _write(folder / "special_tokens_map.json", {**tokens, "pad_token": "<unk>"})
    tokenizer = {
        "add_bos_token": True,
        "add_eos_token": False,
        **{kind: {"__type": "AddedToken", **token} for kind, token in tokens.items()},
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": 2048,
        "pad_token": None,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    }
    _write(folder / "tokenizer_config.json", tokenizer)


def write_weights(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """model.safetensors in float16, under the given names."""
    weights = {name: value.detach().half().contiguous() for name, value in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_clip(weights: dict[str, torch.Tensor]) -> None:
    """clip-tiny/: the trained tower and one more layer, which LLaVA computes but never reads."""
    CLIP_FOLDER.mkdir(exist_ok=True)
    config = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model"}
    config |= tower_config(USED_LAYERS + 1) | {"torch_dtype": "float16"}
    _write(CLIP_FOLDER / "config.json", config)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    preprocessor = {
        "crop_size": size,
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": CLIP_MEAN,
        "image_processor_type": "CLIPImageProcessor",
        "image_std": CLIP_STD,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": IMAGE_SIZE},
    }
    _write(CLIP_FOLDER / "preprocessor_config.json", preprocessor)
    # Named as up to transformers 4; transformers 5 has no "vision_model." and drops it on loading.
    weights = {f"vision_model.{n.removeprefix('vision_model.')}": w for n, w in weights.items()}
    last, unread = f".layers.{USED_LAYERS - 1}.", f".layers.{USED_LAYERS}."
    zeros = {n.replace(last, unread): torch.zeros_like(w) for n, w in weights.items() if last in n}
    write_weights(CLIP_FOLDER, weights | zeros)
