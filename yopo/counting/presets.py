"""Shapes of published models, for benchmarks and counting. Numbers only: building a model or a pass
is done elsewhere. Sources: the models' config.json on the Hub.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A language model: transformers' config names, and one image's visual grid.

    head_size: width of a head where it is not hidden_size / heads. qkv_bias, o_bias, mlp_bias:
    which projections have one. tied: the logits use the embedding's weights.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    grid: tuple[int, int]
    head_size: int | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False

    @property
    def head_dim(self) -> int:
        return self.head_size or self.hidden_size // self.num_attention_heads

    @property
    def layer_weights(self) -> int:
        """Parameters of the matrices of one layer."""
        heads = 2 * (self.num_attention_heads + self.num_key_value_heads) * self.head_dim
        return self.hidden_size * (heads + 3 * self.intermediate_size)

    @property
    def layer_parameters(self) -> int:
        """All parameters of one layer: matrices, biases, two norms."""
        qkv = (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
        biases = self.qkv_bias * qkv + self.o_bias * self.hidden_size
        biases += self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        return self.layer_weights + biases + 2 * self.hidden_size


# Qwen-VL and InternVL choose the grid by the image; these are what 448 × 448 pixels give.
# LLaVA-NeXT (llava-v1.6-vicuna) is the language model of LLaVA-1.5 with further grids.
_QWEN_7B = Shape(3584, 18944, 28, 28, 4, 152064, (16, 16), qkv_bias=True)
PRESETS = {
    "llava-1.5-7b": Shape(4096, 11008, 32, 32, 32, 32000, (24, 24)),
    "llava-1.5-13b": Shape(5120, 13824, 40, 40, 40, 32000, (24, 24)),
    "qwen2-vl-7b": _QWEN_7B,
    "qwen2.5-vl-7b": _QWEN_7B,
    "internvl2-4b": Shape(3072, 8192, 32, 32, 32, 32020, (16, 16)),
    "internvl2-8b": Shape(4096, 14336, 32, 32, 8, 92553, (16, 16)),
    "internvl2-26b": Shape(6144, 16384, 48, 48, 8, 92553, (16, 16)),
}
