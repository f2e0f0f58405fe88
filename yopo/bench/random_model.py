"""What the arms of a benchmark share: a model of a preset's sizes with random weights, and a prompt
put to it. Nothing is run or timed here.

The model has Llama's layers: biases, rotary angles in three dimensions and fused projections of
other families, which cost next to nothing, are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from yopo.counting.flops import Prompt
from yopo.counting.presets import Shape
from yopo.engine.layout import VisualLayout


def random_model(shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    """A Llama of `shape` for inference; its weights are random, its norms' are ones."""
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        vocab_size=shape.vocab_size,
        max_position_embeddings=32768,
    )
    config._attn_implementation = "sdpa"
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _no_init(), device:
            model = transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)
    # A repeated block of random numbers: as good as fresh ones for timing, and there at once.
    block = torch.randn(1 << 20, dtype=torch.float32, device=device) * 0.02
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1)
                continue
            flat = parameter.view(-1)
            for start in range(0, len(flat), len(block)):
                flat[start : start + len(block)] = block[: len(flat) - start]
    return model


@contextmanager
def _no_init() -> Iterator[None]:
    """Leaves out the initialisation of weights, which are overwritten anyway."""
    names = ("normal_", "uniform_", "kaiming_uniform_", "trunc_normal_")
    saved = {name: getattr(nn.init, name) for name in names}
    try:
        for name in names:
            setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)
        yield
    finally:
        for name, function in saved.items():
            setattr(nn.init, name, function)


@dataclass(frozen=True)
class Case:
    """What every arm is given: embeddings (B, n, d), and where the visual tokens are."""

    prompt: Prompt
    embeds: Tensor
    layout: VisualLayout

    @classmethod
    def of(
        cls, prompt: Prompt, batch: int, shape: Shape, dtype: torch.dtype, device: torch.device
    ) -> Case:
        """`prompt`, `batch` times, as random numbers, the same each time."""
        n = prompt.text + prompt.visual
        generator = torch.Generator().manual_seed(0)
        embeds = torch.randn(batch, n, shape.hidden_size, generator=generator)
        return cls(prompt, embeds.to(device, dtype), prompt.layout(batch))
