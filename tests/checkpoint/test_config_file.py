"""What a config.json tells: shapes of every format, grids, and errors for those that cannot be
read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from yopo.checkpoint.config_file import read_checkpoint
from yopo.counting.presets import PRESETS
from yopo.plan import recipes
from yopo.plan.pruning_plan import PruningPlan

LLAVA = {
    "model_type": "llava",  # the original's: HF's own LLaVA has the same model_type
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
}


def write(folder: Path, config: Any) -> Path:
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder


def sizes(shape: Any) -> tuple[int, ...]:
    return (shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers,
            shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim)  # fmt: skip


def test_original_llava(tmp_path: Path) -> None:
    found = read_checkpoint(write(tmp_path, LLAVA))
    assert sizes(found.shape) == sizes(PRESETS["llava-1.5-7b"])
    assert found.grid == (24, 24)
    assert found.plan() is None


@pytest.mark.parametrize(
    ("tower", "grid"),
    [
        ("openai/clip-vit-large-patch14", (16, 16)),
        ("google/siglip-so400m-patch14-384", (27, 27)),
        ("somebody/tower", None),
        (None, None),
    ],
)
def test_grid_of_a_towers_name(tmp_path: Path, tower: Any, grid: Any) -> None:
    assert read_checkpoint(write(tmp_path, LLAVA | {"mm_vision_tower": tower})).grid == grid


def test_grid_of_a_tower_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named relative to the working directory or to the checkpoint."""
    tower = tmp_path / "checkpoint" / "clip"
    tower.mkdir(parents=True)
    write(tower, {"vision_config": {"image_size": 96, "patch_size": 4}})
    write(tmp_path / "checkpoint", LLAVA | {"mm_vision_tower": "clip"})
    assert read_checkpoint(tmp_path / "checkpoint").grid == (24, 24)
    monkeypatch.chdir(tmp_path / "checkpoint")
    assert read_checkpoint(".").grid == (24, 24)


COMPOSITE = {  # name of the config class, text model, what else, its grid
    "llava": ("LlavaConfig", {"model_type": "llama"}, {}, (24, 24)),
    "llava_next": ("LlavaNextConfig", {"model_type": "llama"}, {}, (24, 24)),
    "internvl": ("InternVLConfig", {"model_type": "qwen2"}, {}, (16, 16)),
    "qwen2_vl": ("Qwen2VLConfig", {}, {}, (16, 16)),
    "qwen2_5_vl": ("Qwen2_5_VLConfig", {}, {}, (16, 16)),
}


@pytest.mark.parametrize("family", COMPOSITE)
def test_composite_configs_as_transformers_saves_them(tmp_path: Path, family: str) -> None:
    name, text, more, grid = COMPOSITE[family]
    cls = getattr(transformers, name, None)
    if cls is None:
        pytest.skip(f"no {name} in this transformers")
    told = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=50)  # fmt: skip
    config = cls(text_config={**text, **told}, **more) if text else cls(**told)
    config.save_pretrained(tmp_path)
    found = read_checkpoint(tmp_path)
    assert sizes(found.shape) == (64, 96, 3, 4, 2, 16)
    assert found.shape.vocab_size == 50
    assert found.grid == grid
    assert found.shape.qkv_bias == (family not in ("llava", "llava_next"))


def test_sizes_left_out_are_the_text_models_defaults(tmp_path: Path) -> None:
    """llava-hf/llava-1.5-7b-hf names its text model and its vocabulary, no more."""
    text = {"_name_or_path": "lmsys/vicuna-7b-v1.5", "model_type": "llama", "vocab_size": 32064}
    vision = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}
    config = {"model_type": "llava", "text_config": text, "vision_config": vision}
    found = read_checkpoint(write(tmp_path, config))
    assert sizes(found.shape) == sizes(PRESETS["llava-1.5-7b"])
    assert found.shape.vocab_size == 32064
    plan = recipes.paper_25(32, 32).with_mass("drop")
    plan.save_to(block := {"num_hidden_layers": 32, "num_attention_heads": 32,
                           "intermediate_size": 11008})  # fmt: skip
    for holder in (config, text):
        holder["yopo"] = block["yopo"]
        assert read_checkpoint(write(tmp_path, config)).plan() == plan
        del holder["yopo"]


def test_internvls_own_format(tmp_path: Path) -> None:
    text = {"model_type": "internlm2", "hidden_size": 6144, "intermediate_size": 16384,
            "num_hidden_layers": 48, "num_attention_heads": 48, "num_key_value_heads": 8,
            "vocab_size": 92553}  # fmt: skip
    config = {
        "model_type": "internvl_chat",
        "force_image_size": 448,
        "downsample_ratio": 0.5,
        "llm_config": text,
        "vision_config": {"image_size": 448, "patch_size": 14},
    }
    found = read_checkpoint(write(tmp_path, config))
    assert sizes(found.shape) == sizes(PRESETS["internvl2-26b"])
    assert found.grid == PRESETS["internvl2-26b"].grid
    assert found.plan() is None


def test_released_fields_find_their_mask_in_the_checkpoint(tmp_path: Path) -> None:
    import torch

    from yopo.plan import head_mask

    keep = torch.rand(32, 32, generator=torch.Generator().manual_seed(0)) < 0.5
    head_mask.save(tmp_path / "headmask_7b_16.npy", keep)
    fields = dict(attncut_w=5, layercut_num=16, headcut_num=16, mlpcut_ratio=2, sprompt_len=35)
    plan = read_checkpoint(write(tmp_path, LLAVA | fields)).plan()
    assert plan == PruningPlan(keep, window=5, layer_cut=16, ffn_ratio=2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "no JSON object"),
        ({"model_type": "bert"}, "hidden_size is None"),
        ({"text_config": 3}, "text_config is 3"),
        ({"llm_config": {"model_type": "internlm2", "hidden_size": 8}}, "intermediate_size"),
        (LLAVA | {"num_key_value_heads": 5}, "no multiple of the 5"),
        (LLAVA | {"num_hidden_layers": "32"}, "num_hidden_layers is '32'"),
        (LLAVA | {"head_dim": "x"}, "head_dim is 'x'"),
        (LLAVA | {"head_dim": 0}, "head_dim is 0"),
        (LLAVA | {"vision_config": {"image_size": "x", "patch_size": 14}}, "how large an image"),
        (LLAVA | {"vision_config": {"image_size": {"a": 1}, "patch_size": [14, 14]}}, "how large"),
        (LLAVA | {"vision_config": {"image_size": -4, "patch_size": 14}}, "not one patch"),
        (LLAVA | {"vision_config": {"image_size": 336, "patch_size": 1000}}, "not one patch"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_checkpoint(write(tmp_path, config))


def test_no_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="it has no config.json"):
        read_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not there"):
        read_checkpoint(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="is a file"):
        read_checkpoint(write(tmp_path, LLAVA) / "config.json")
