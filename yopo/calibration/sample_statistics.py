"""What a dense pass over samples tells of a model's heads, layers and FFN neurons: the numbers from
which plans are made (head_rule.py, neurons.py, search.py), and their file.

Knows neither how they are measured (collect.py) nor what is made of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from yopo.files import write_whole
from yopo.plan.config_fields import head_sizes
from yopo.plan.sinks import Sinks

FORMAT = "4"
# float64 holds sums: adding samples one by one, with or without a break, gives the same bits.
_DTYPES = {"ffn_use": torch.float64, "text_tokens": torch.int64, "visual_tokens": torch.int64}


@dataclass(frozen=True, eq=False)
class Statistics:
    """Of S samples through a model of L layers, H heads and I FFN neurons. Tensors on the CPU.

    model: the model's `fingerprint`. samples: S digests, one of each sample's inputs.
    ratios: (S, L, H), the released ratio of a sample (head_rule.visual_ratio).
    visual_mass: (S, L, H), the share of the softmax on visual keys, averaged over the sample's text
        queries that have an image before them.
    sink_sums: (S, 2, L, H), sums over these queries of w·x and of w, where x is the log-sum-exp of
        the query's scores with visual keys less the log of how many these are, and w its weight
        (collect.fit_weight).
    text_tokens: (S,) how many such queries there are. visual_tokens: (S,).
    influence: (S, L), KL of the next-token distribution of the dense model from that of one whose
        visual tokens leave at layer C; nan where not measured.
    ffn_use: (L, I), sum over all visual tokens of |hidden neuron| · |its column of down_proj|.
    """

    model: str
    samples: tuple[str, ...]
    ratios: Tensor
    visual_mass: Tensor
    sink_sums: Tensor
    text_tokens: Tensor
    visual_tokens: Tensor
    influence: Tensor
    ffn_use: Tensor

    def __len__(self) -> int:
        return len(self.samples)

    @classmethod
    def empty(cls, model: str, layers: int, heads: int, neurons: int) -> Statistics:
        shapes = {
            "ratios": (0, layers, heads),
            "visual_mass": (0, layers, heads),
            "sink_sums": (0, 2, layers, heads),
            "text_tokens": (0,),
            "visual_tokens": (0,),
            "influence": (0, layers),
            "ffn_use": (layers, neurons),
        }
        zeros = {n: torch.zeros(s, dtype=_DTYPES.get(n, torch.float32)) for n, s in shapes.items()}
        return cls(model=model, samples=(), **zeros)

    def then(self, later: Statistics) -> Statistics:
        """These samples, and after them those of `later`, through the same model."""
        if self.model != later.model:
            raise ValueError(other_model(later.model, self.model))
        joined = {name: torch.cat([getattr(self, name), getattr(later, name)]) for name in _STACKED}
        return replace(
            self,
            samples=self.samples + later.samples,
            ffn_use=self.ffn_use + later.ffn_use,
            **joined,
        )

    def check(self, model: nn.Module) -> None:
        """Raises ValueError unless they were taken from `model`, and of at least one sample."""
        here = fingerprint(model)
        if here != self.model:
            raise ValueError(other_model(self.model, here))
        if not self.samples:
            raise ValueError("statistics of no sample: nothing can be made of them")

    def sinks(self) -> Sinks:
        """Constant ones, which know nothing of the query nor of a plan: the start of a search."""
        total, weight = self.sink_sums.double().sum(0)
        return Sinks(total / weight)

    def save(self, path: str | Path) -> Path:
        """Writes `path` (.safetensors) in one step; returns it."""
        path = Path(path)
        metadata = {
            "format": FORMAT,
            "model": self.model,
            "samples": json.dumps(self.samples),
        }
        tensors = {name: getattr(self, name).contiguous() for name in (*_STACKED, "ffn_use")}
        with write_whole(path) as partial:
            save_file(tensors, partial, metadata=metadata)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Raises FileNotFoundError, or ValueError for a file that is no statistics or cut off."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"there are no statistics {str(path)!r} (from {Path.cwd()})")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is cut off or no safetensors file: {error}") from error
        if metadata.get("format") != FORMAT or tensors.keys() != {*_STACKED, "ffn_use"}:
            raise ValueError(f"{path} holds no statistics of this yopo (format {FORMAT})")
        samples = tuple(json.loads(metadata["samples"]))
        return cls(model=metadata["model"], samples=samples, **tensors)


_STACKED = tuple(
    field.name for field in fields(Statistics) if field.name not in ("model", "samples", "ffn_use")
)


_LOOKED_AT = 4096  # numbers of each parameter, or a few more


def fingerprint(model: nn.Module) -> str:
    """Which model it is: "LxHxKVxI-" of its language model and a hash over some of its weights.

    Over some of every parameter that is in plain floating point, tower, projector and embeddings
    too, as float32: a model has the same one in a wider type. FFN neurons in another order change
    it; adapters do once they change what the model computes.
    """
    # Not at the top: statistics are read without transformers.
    from yopo.models.parts import Parts

    parts = Parts.of(model)
    config = parts.decoder.config
    heads, kv_heads, _ = head_sizes(config)
    sizes = (config.num_hidden_layers, heads, kv_heads, config.intermediate_size)
    digest = hashlib.sha256()
    weights = [(name.replace(".base_layer", ""), p) for name, p in parts.outer.named_parameters()]
    adapted = any("lora_B" in name and bool(p.any()) for name, p in weights)
    for name, weight in sorted(weights, key=lambda pair: pair[0]):
        if weight.is_meta or not weight.is_floating_point() or ("lora_" in name and not adapted):
            continue
        flat = weight.detach().flatten()
        # Odd, so that it meets every column of a matrix whose width is a power of 2.
        step = flat.numel() // _LOOKED_AT | 1
        digest.update(flat[::step].float().cpu().numpy().tobytes())
    return "x".join(map(str, sizes)) + "-" + digest.hexdigest()[:32]


def other_model(theirs: str, here: str) -> str:
    """What to say of statistics taken from the model `theirs` where the model is `here`."""
    shapes = [mark.partition("-")[0] for mark in (theirs, here)]
    if shapes[0] != shapes[1]:
        what = f"of {shapes[0]} (layers x heads x key/value heads x FFN neurons), not {shapes[1]}"
    else:
        what = f"of this shape but with other weights (fingerprint {theirs}, here {here})"
    return f"the statistics are of another model, one {what}: take them anew from this one"


def digest_of(inputs: dict[str, Any]) -> str:
    """What tells one sample from another: a hash over its tensors and other values."""
    digest = hashlib.sha256()
    for name in sorted(inputs):
        digest.update(f"|{name}=".encode())
        for part in _parts(inputs[name]):
            if isinstance(part, Tensor):
                values = part.detach().cpu().contiguous()
                digest.update(f"{tuple(values.shape)}{values.dtype}".encode())
                digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
            else:
                digest.update(repr(part).encode())
    return digest.hexdigest()[:16]


def _parts(value: Any) -> Sequence[Any]:
    if isinstance(value, list | tuple):
        return [part for item in value for part in _parts(item)]
    return [value]
