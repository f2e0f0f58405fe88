"""Memory of a benchmark: what is free, what a model and each arm need, the peak of a piece of work.

Estimates are of the large tensors only; nothing is built or run here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import psutil
import torch
from torch.profiler import ProfilerActivity, profile

from yopo.counting.flops import Prompt
from yopo.counting.presets import Shape
from yopo.versions import read_stock_cache

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's notes break up the progress bar

_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|ALLOC_FAILED", re.IGNORECASE)


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def fixed_bytes(shape: Shape, prompt: Prompt, batch: int, dtype: torch.dtype) -> int:
    """Embeddings, logits' weights, and activations of one layer at once (widest: the FFN's)."""
    rows = batch * (prompt.text + prompt.visual)
    activations = rows * (3 * shape.intermediate_size + 8 * shape.hidden_size)
    return (2 * shape.vocab_size * shape.hidden_size + activations) * dtype.itemsize


def layer_bytes(shape: Shape, prompt: Prompt, batch: int, dtype: torch.dtype) -> int:
    """Weights and a dense KV cache of one layer."""
    rows = batch * (prompt.text + prompt.visual)
    cache = 2 * rows * shape.num_key_value_heads * shape.head_dim
    return (shape.layer_weights + cache) * dtype.itemsize


def square_bytes(shape: Shape, prompt: Prompt, batch: int, dtype: torch.dtype) -> int:
    """The n × n scores of one layer, which eager attention and the masked simulation form: with the
    mask added, as float32 for the softmax, and cast back."""
    n = prompt.text + prompt.visual
    return batch * shape.num_attention_heads * n * n * (2 * dtype.itemsize + 4)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is used up, whatever its class (torch has several)."""
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or bool(
        isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error))
    )


def peak_of(work: Callable[[], Any], device: torch.device) -> tuple[int, Any]:
    """By how many bytes the memory of tensors grew at most during `work`, and what it returned.

    On a CPU every allocation is looked at (slowly): what the process holds would also tell of the
    heap that earlier work left.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        base = torch.cuda.memory_allocated(device)
        result = work()
        return torch.cuda.max_memory_allocated(device) - base, result
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        result = work()
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns() if hasattr(e, "start_ns") else e.start_us())
    return max(accumulate((e.nbytes() for e in events), initial=0)), result


def cache_bytes(cache: Any) -> int:
    """Of the keys and values that a cache holds, stock's or ours."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes())
    return sum(t.numel() * t.element_size() for pair in read_stock_cache(cache) for t in pair)
