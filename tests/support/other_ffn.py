"""An FFN that is put into layers by hand, in place of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class OtherFFN(nn.Module):
    """The FFN of a layer with another activation, under the same names."""

    def __init__(self, mlp: Any, act: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act, self.act_fn = act, nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
