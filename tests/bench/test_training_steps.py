"""bench --train: what a forward keeps is counted once, ours keeps less with an image and as much
without, and times are of the step alone."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from yopo.bench import train_steps as training
from yopo.commands.command_line import main
from yopo.counting.flops import Prompt
from yopo.counting.presets import PRESETS
from yopo.counting.setting import Setting
from yopo.plan import recipes

TINY = replace(
    PRESETS["llava-1.5-7b"],
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=11,
    grid=(6, 6),
)


def test_a_pruned_step_keeps_less_with_an_image_and_as_much_without() -> None:
    plan = recipes.named_plan("25", 4, 4).with_mass("drop")
    prompt = Prompt.around((TINY.grid,), 8)
    setting = Setting("tiny", TINY, plan, "25", prompt, 2, "float32")
    stock, ours = training.training_figures(
        training.measure_training(setting, torch.device("cpu"), 2)
    )
    assert (stock["arm"], ours["arm"]) == (training.STOCK, training.OURS)
    assert stock["image_ratio"] == stock["image_kept_of_stock"] == 1
    assert 0.2 < ours["image_kept_of_stock"] < 0.8
    assert ours["text_kept_bytes"] == stock["text_kept_bytes"]
    assert min(ours["image_s"], ours["text_s"], ours["image_ratio"]) > 0


def test_kept_is_neither_parameter_nor_input_and_counted_once() -> None:
    model = torch.nn.Linear(3, 3, bias=False)
    x = torch.randn(5, 3, requires_grad=True)

    def step() -> None:
        hidden = model(x)  # keeps x and the weight, which are there anyway
        (hidden * hidden).sum().backward()  # keeps hidden, twice

    assert training._kept(model, x, step) == 5 * 3 * 4


def test_the_command_prints_a_table_and_its_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PRESETS, "llava-1.5-7b", TINY)
    arguments = ["--layers", "2", "--rounds", "1", "--dtype", "float32", "--text-tokens", "8"]
    assert main(["bench", "--train", *arguments]) == 0
    out = capsys.readouterr().out.splitlines()
    assert any("kept, MiB" in line for line in out)
    figures = json.loads(out[-1])["training"]
    assert [row["arm"] for row in figures] == [training.STOCK, training.OURS]
