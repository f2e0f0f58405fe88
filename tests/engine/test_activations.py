"""Visual rows use the first neurons of the FFN. An activation that takes values one by one is given
these alone; one that looks at several is given all, or their values would be other ones."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from yopo.engine.weights import gated_ffn, is_elementwise

ROWS, TEXT, WIDTH, ALL, FIRST = 7, 3, 8, 24, 10


class TopK(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (x >= x.topk(6, dim=-1).values[..., -1:])


class SoftmaxInDisguise(nn.Softmax):
    pass


class OtherSiLU(nn.SiLU):
    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(-1)


class HalvesSwapped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([torch.sigmoid(second) * first, first], dim=-1)


OF_SEVERAL: list[Callable[[Tensor], Tensor]] = [
    TopK(),
    SoftmaxInDisguise(-1),
    OtherSiLU(),
    HalvesSwapped(),
    nn.Softmax(-1),
    nn.LogSoftmax(-1),
    lambda x: x.softmax(-1),
    TopK().forward,
    nn.PReLU(ROWS),
]
ONE_BY_ONE = [nn.SiLU(), nn.GELU(), nn.PReLU(), nn.Hardtanh(), nn.functional.silu, torch.tanh]


def named(act: Any) -> str:
    """The same in every process: a function's own words have its address."""
    return str(act) if isinstance(act, nn.Module) else act.__name__


def ffn(act: Any, fused: bool) -> Any:
    torch.manual_seed(0)
    made = SimpleNamespace(act_fn=act, down_proj=nn.Linear(ALL, WIDTH))
    if fused:
        made.gate_up_proj = nn.Linear(WIDTH, 2 * ALL)
        return made
    made.gate_proj, made.up_proj = nn.Linear(WIDTH, ALL), nn.Linear(WIDTH, ALL)
    return made


def by_hand(mlp: Any, x: Tensor) -> Tensor:
    if hasattr(mlp, "gate_up_proj"):
        gate, up = mlp.gate_up_proj(x).chunk(2, dim=-1)
    else:
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    hidden = mlp.act_fn(gate) * up
    hidden[TEXT:, FIRST:] = 0
    return mlp.down_proj(hidden)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("act", OF_SEVERAL + ONE_BY_ONE, ids=named)
def test_the_first_neurons_have_the_values_that_the_whole_ffn_gives_them(
    act: Any, fused: bool
) -> None:
    if isinstance(act, nn.PReLU) and act.num_parameters > 1:
        act = nn.PReLU(ALL)
        act.weight.data = torch.randn(ALL)
    mlp, x = ffn(act, fused), torch.randn(ROWS, WIDTH)
    with torch.no_grad():
        found = gated_ffn(mlp, x, TEXT, FIRST, ALL)
        assert torch.allclose(found, by_hand(mlp, x), atol=1e-5)


def test_transformers_own_are_known_and_are_what_they_are_taken_for() -> None:
    """A value alone gives what it gives among others: asked of each one in transformers' table."""
    from transformers.activations import ACT2FN

    x = torch.randn(5, 16)
    for name in ACT2FN:
        act = ACT2FN[name]
        with torch.no_grad():
            assert is_elementwise(act), name
            assert torch.allclose(act(x)[:, :4], act(x[:, :4].clone()), atol=1e-6), name


@pytest.mark.parametrize("act", OF_SEVERAL[:-1], ids=named)
def test_what_looks_at_several_values_is_not_taken_for_elementwise(act: Any) -> None:
    assert not is_elementwise(act)
    assert all(map(is_elementwise, ONE_BY_ONE))


def test_a_forward_put_on_torch_s_class_is_nobody_s_known_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nn.SiLU, "forward", TopK.forward)
    assert not is_elementwise(nn.SiLU())
