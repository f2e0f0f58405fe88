"""What cannot be converted is said in one line, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conversions import refused
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import Tensor

from yopo.checkpoint import shards
from yopo.commands.command_line import main
from yopo.errors import BadInput

if Version(transformers.__version__) < Version("4.45"):
    pytest.skip("converted checkpoints are for transformers 4.45 on", allow_module_level=True)


def test_a_target_that_is_there_is_left_alone(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    assert main(["convert", str(source), str(target)]) == 2
    assert "DST is there already" in capsys.readouterr().err
    assert [path.name for path in target.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf"])
def test_shards_of_no_size_are_refused(
    tmp_path: Path, source: Path, size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(source, tmp_path / "new", "--shard-gb is", capsys, "--shard-gb", size)


def test_missing_surplus_and_misshapen_tensors_are_named(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(source / "model.safetensors")
    lost = "model.layers.1.self_attn.k_proj.weight"
    for changed, message in (
        (
            {n: w for n, w in weights.items() if n != lost},
            "1 missing, by the names of the new model: language_model.layers.1",
        ),
        (
            {**weights, "model.layers.3.mlp.up_proj.weight": torch.ones(2, 2)},
            "too many: model.layers.3",
        ),
        ({**weights, "adapter.weight": torch.ones(2, 2)}, "too many: adapter.weight"),
        ({**weights, lost: torch.ones(2, 2)}, f"{lost} in"),
        ({**weights, "lm_head.weight": torch.ones(5, 32)}, "lm_head.weight in"),
    ):
        save_file(changed, source / "model.safetensors")
        refused(source, tmp_path / "new", message, capsys)


def test_tensors_that_the_vision_tower_lacks_are_named(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "clip" / "model.safetensors"
    weights = load_file(file)
    lost = next(name for name in weights if "layers.1.mlp.fc1.weight" in name)
    save_file({n: w for n, w in weights.items() if n != lost}, file)
    refused(source, tmp_path / "new", "vision_tower.encoder.layers.1.mlp.fc1.weight", capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlavaMptForCausalLM"]}, "LlavaMptForCausalLM"),
        ({"architectures": ["MobileVLM"]}, "InternVL2 as its makers write it"),
        ({"architectures": None, "model_type": "bert"}, "(bert)"),
        ({"text_config": {}}, "in transformers' own format already"),
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "LLaVA-NeXT"),
        ({"image_aspect_ratio": "anyres"}, "LLaVA-NeXT"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantised by bitsandbytes"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised by gptq"),
        ({"attncut_w": 5}, "some released pruning fields"),
        ({"yopo": {"format": 1}}, "block of the config is corrupt"),
        ({"mm_vision_tower": "no/such/tower"}, "mm_vision_tower"),
        ({"hidden_size": "many"}, "transformers cannot make a model of"),
        ({"num_attention_heads": 0}, "transformers cannot make a model of"),
    ],
)
def test_what_cannot_be_converted_is_said(
    tmp_path: Path, source: Path, change: dict[str, Any], message: str, capsys: Any
) -> None:
    file = source / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    refused(source, tmp_path / "new", message, capsys)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.0.mlp.up_proj.SCB", torch.ones(4)),
        ("model.layers.0.mlp.up_proj.qweight", torch.ones(4, dtype=torch.int32)),
        ("model.layers.0.mlp.up_proj.weight", torch.ones(4, dtype=torch.uint8)),
    ],
)
def test_quantised_weights_are_named(
    tmp_path: Path, source: Path, name: str, value: Tensor, capsys: Any
) -> None:
    weights = {**load_file(source / "model.safetensors"), name: value}
    save_file(weights, source / "model.safetensors")
    refused(
        source, tmp_path / "new", f"quantised, which cannot be converted: it holds {name}", capsys
    )


def test_a_pickle_that_would_run_code_is_not_read(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "model.safetensors").unlink()
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (ran,))

    torch.save({"model.norm.weight": Evil()}, source / "pytorch_model.bin")
    refused(source, tmp_path / "new", "holds more than tensors", capsys)
    assert not ran.exists()


def test_damaged_files_are_named(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, config = source / "model.safetensors", source / "config.json"
    whole, text = weights.read_bytes(), config.read_text()
    weights.write_bytes(whole[:-10])
    refused(source, tmp_path / "new", "model.safetensors is cut off", capsys)
    weights.unlink()
    refused(source, tmp_path / "new", "has no weights", capsys)
    (source / "pytorch_model.bin").write_bytes(b"PK\x03\x04 cut off")
    refused(source, tmp_path / "new", "pytorch_model.bin is cut off", capsys)
    (source / "pytorch_model.bin").unlink()
    weights.write_bytes(whole)
    config.write_text(text[:50])
    refused(source, tmp_path / "new", "config.json is not JSON", capsys)
    config.write_text(text)
    (source / "tokenizer.model").unlink()
    refused(source, tmp_path / "new", "has no tokenizer", capsys)
    refused(tmp_path / "none", tmp_path / "new", "there is no folder", capsys)
    refused("nobody/nothing-of-that-name", tmp_path / "new", "there is no folder", capsys)


def test_a_vision_tower_that_is_no_clip_is_refused(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "siglip"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    refused(source, tmp_path / "new", "is a siglip", capsys, "--vision-tower", str(other))


def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    for name in ("../model.safetensors", "/etc/passwd", 3):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(BadInput, match="no file beside it"):
            shards.weight_files(tmp_path)
