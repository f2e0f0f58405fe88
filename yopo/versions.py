"""Every difference between versions of transformers and torch, with its reason; no other file asks
for a version."""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import cache
from typing import Any

import torch
import torch._dynamo
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

StaticCache = getattr(transformers.cache_utils, "StaticCache", None)  # from 4.38 on

# ---------------------------------------------------------------------------- supported versions

OLDEST, NEWEST = (4, 36), (5, 24)  # transformers, as tested; the shapes of Cache set the lower end
OLDEST_FAMILIES = (4, 45)  # before, prompts with one token for a whole image, expanded by the model
OLDEST_TORCH = (2, 1)  # scaled_dot_product_attention(scale=), torch.compiler


def require_transformers(version: str | None = None, torch_version: str | None = None) -> None:
    """Raises ImportError for installed (or named) versions that cannot be right. One newer than
    any tested is let through: the layers of each model are probed when a plan is put on.

    YOPO_ANY_TRANSFORMERS=1 turns a refused transformers into a warning.
    """
    version = version or transformers.__version__
    torch_version = torch_version or torch.__version__
    if Version(torch_version).release < OLDEST_TORCH:
        raise ImportError(
            f"yopo needs torch {_dotted(OLDEST_TORCH)} or newer and found {torch_version}: "
            f"pip install 'torch>={_dotted(OLDEST_TORCH)}'"
        )
    problem = _unsupported(version)
    if problem is None:
        return
    if os.environ.get("YOPO_ANY_TRANSFORMERS") == "1":
        warnings.warn(f"{problem}; going on, as YOPO_ANY_TRANSFORMERS=1 says", stacklevel=2)
        return
    raise ImportError(
        f"{problem}. Supported are {_dotted(OLDEST)}.x to {_dotted(NEWEST)}.x without 5.0.0: pip "
        f"install 'transformers>={_dotted(OLDEST)},!=5.0.0', or set YOPO_ANY_TRANSFORMERS=1 to try "
        "this one as it is"
    )


def has_families() -> bool:
    """Whether models other than Llama and the original LLaVA can be pruned."""
    return Version(transformers.__version__).release[:2] >= OLDEST_FAMILIES


def require_families(name: str) -> None:
    """Raises ImportError, which names the model, unless has_families()."""
    if not has_families():
        raise ImportError(
            f"pruning a {name} needs transformers {_dotted(OLDEST_FAMILIES)} or newer, found "
            f"{transformers.__version__}: pip install 'transformers>={_dotted(OLDEST_FAMILIES)}'"
        )


def newer_than_tested() -> str | None:
    """The version of transformers, if it is newer than any that yopo was tested with."""
    return transformers.__version__ if _release()[:2] > NEWEST else None


def weights_only_is_safe() -> bool:
    """Whether torch.load(weights_only=True) runs no code of the file: before torch 2.6 one could be
    made to (CVE-2025-32434)."""
    return Version(torch.__version__).release >= (2, 6)


def _unsupported(version: str) -> str | None:
    release = Version(version).release  # of a pre-release, the release that it leads to
    if release[:3] == (5, 0, 0):
        return f"transformers {version} tokenises LLaVA's prompts differently from all others"
    if release[:2] < OLDEST:
        return f"transformers {version} is older than any that yopo knows"
    return None


@cache
def _release() -> tuple[int, ...]:
    return Version(transformers.__version__).release


def _dotted(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))


# ------------------------------------------------------------------------------- torch.compile


# Whether torch.compile is tracing this call; torch.compiler can tell from 2.2 or so on. Asked in
# every layer, so it is torch's own function, which does nothing but say False.
is_compiling: Callable[[], bool] = (
    getattr(torch.compiler, "is_dynamo_compiling", None) or torch._dynamo.is_compiling
)

# Also under torch.export, which may trace by other means.
is_traced: Callable[[], bool] = getattr(torch.compiler, "is_compiling", None) or is_compiling

# Asked in a function that is `skipped`: not None where torch.compile traces what that calls. One of
# C, as one of Python would be traced itself. An older torch has none: it says None then.
TRACING: Callable[[], Any] = getattr(
    torch._C._dynamo.eval_frame, "get_eval_frame_callback", type(None)
)


def tells_tracing() -> bool:
    return TRACING is not type(None)


# Decorators. Neither the function nor what it calls is traced: a graph ends where it is called.
uncompiled = torch.compiler.disable
# Not the function, but each one that it calls: called itself, it is no break.
skipped = torch._dynamo.decorators.skip


# ------------------------------------------------------------------------------------ gradients


def autocast_dtype(kind: str) -> torch.dtype | None:
    """What torch.autocast, on a kind of device, makes products in; None where it is off. Before 2.4
    it was asked of each kind by a function of its own."""
    if hasattr(torch, "get_autocast_dtype"):
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if kind == "cpu":
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None


def is_transformed(tensor: Tensor) -> bool:
    """Whether it stands for several, under torch.func or is_grads_batched, which write into no part
    of one. torch has no public function for it, and of the latter none before 2.2: it raises."""
    known = torch._C._functorch
    legacy = getattr(known, "is_legacy_batchedtensor", known.is_batchedtensor)
    return known.is_functorch_wrapped_tensor(tensor) or legacy(tensor)


def _is_any_module_hooked() -> bool:
    kinds = ("forward", "forward_pre", "backward", "backward_pre")
    return any(vars(nn.modules.module)[f"_global_{kind}_hooks"] for kind in kinds)


# Whether there are hooks on all modules; before 2.2 torch had no function for it.
is_any_module_hooked: Callable[[], bool] = getattr(
    nn.modules.module, "_has_any_global_hook", _is_any_module_hooked
)


# ---------------------------------------------------------------------- rotary position angles


def rope(model: nn.Module, x: Tensor, position_ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin (B, n, R) of `position_ids` (B, n), for M-RoPE (3, B, n), in x's dtype; R is the
    rotated part of a head. `length` is that of the whole sequence.

    From the model's own module, so that scaled variants hold: `model.rotary_emb` from 4.43 on, each
    attention's before; (x, position_ids) from 4.38 on, (x, seq_len) tables before. M-RoPE's three
    sets of angles are put together by the attention up to 4.57, by the module itself from 5 on.
    """
    rotary = _rotary_of(model)
    if takes_any_position(model):
        names = ("rope_parameters", "rope_scaling")
        settings = next(filter(None, (getattr(model.config, name, None) for name in names)), {})
        sections = settings.get("mrope_section")
        if sections and position_ids.dim() == 2:
            position_ids = position_ids.expand(3, -1, -1)
        cos, sin = rotary(x, position_ids)
        if cos.dim() == 4:
            cos, sin = (_mrope(angles, sections) for angles in (cos, sin))
        return cos, sin
    cos, sin = rotary(x, seq_len=max(length, int(position_ids.max()) + 1))
    return cos[position_ids], sin[position_ids]


def takes_any_position(model: nn.Module) -> bool:
    """Whether an unpruned model takes position_ids beyond the length of its row: from 4.38 on."""
    rotary = type(_rotary_of(model))
    if rotary not in _TAKES_PLACES:  # not while torch.compile traces, which knows no signatures
        _TAKES_PLACES[rotary] = "position_ids" in inspect.signature(rotary.forward).parameters
    return _TAKES_PLACES[rotary]


_TAKES_PLACES: dict[type, bool] = {}


def _rotary_of(model: nn.Module) -> Any:
    return getattr(model, "rotary_emb", None) or model.layers[0].self_attn.rotary_emb


def _mrope(angles: Tensor, sections: list[int]) -> Tensor:
    """(3, B, n, D) → (B, n, D): of each half of the head `sections` take time, height and width."""
    parts = angles.split(list(sections) * 2, dim=-1)
    return torch.cat([part[i % 3] for i, part in enumerate(parts)], dim=-1)


# ------------------------------------------------------------------------------- sliding windows


def sliding_window(config: Any) -> int | None:
    """How far back attention reaches, None if all the way. Qwen's configs name a window that their
    use_sliding_window turns off; from 4.5x on layer_types says which layers have one at all."""
    window = getattr(config, "sliding_window", None)
    if window is None or not getattr(config, "use_sliding_window", True):
        return None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    return window if "sliding_attention" in kinds else None


# -------------------------------------------------------------------------------------- caches


def has_rms_norm() -> bool:
    """Whether torch computes a norm as one operation, from 2.4 on: fused weights need it."""
    return hasattr(torch.nn.functional, "rms_norm")


_LOG_SUMS = Version(torch.__version__).release >= (2, 5)  # asked while torch.compile traces


def has_log_sums() -> bool:
    """Whether torch's attention kernels that give the logarithms of their sums, too, can be called
    in one way: from 2.5 on."""
    return _LOG_SUMS


@cache
def has_flash(device: torch.device) -> bool:
    """Whether a CUDA device has flash attention: from Ampere on."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def crop_counts_removed() -> bool:
    """Whether a cache's crop is told how many tokens go (from 5 on), and not how many stay."""
    crop = getattr(DynamicCache, "crop", None)
    return crop is not None and "tokens_to_remove" in inspect.signature(crop).parameters


def read_stock_cache(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """(keys, values), each (B, H, past, D), of every layer that stock code filled; [] for an empty
    one or None.

    Layer objects from 4.54 on, two lists before, tuples of tuples up to 4.41.
    """
    if cache is None:
        return []
    if isinstance(cache, tuple | list):
        return [(layer[0], layer[1]) for layer in cache]
    layers = getattr(cache, "layers", None)
    if layers is not None:
        both = [(layer.keys, layer.values) for layer in layers]
    else:
        names = ("key_cache", "value_cache")
        both = list(zip(*(getattr(cache, name, ()) for name in names), strict=True))
    filled = [(keys, values) for keys, values in both if keys is not None]
    if not filled or longest(cache) is None:
        return filled
    past = int(cache.get_seq_length())  # of static layers the rest is empty
    return [(keys[:, :, :past], values[:, :, :past]) for keys, values in filled] if past else []


def llava_expects_images_in_ids() -> bool:
    """Whether stock LLaVA and LLaVA-NeXT take input_ids without image tokens, those of each decode
    step too, for a prompt that they have yet to expand, and then look into the cache: 4.46, 4.47.
    Embeddings they take as they are."""
    return (4, 46) <= Version(transformers.__version__).release[:2] <= (4, 47)


@cache
def no_maximum() -> Any:
    """What a DynamicCache says of its greatest length: None, or -1 from 4.54 on. It is asked for
    by get_max_length up to 4.45 and from 5.13 on, by get_max_cache_shape between."""
    layer = getattr(transformers.cache_utils, "DynamicLayer", None)
    asked = DynamicCache() if layer is None else layer()
    return (getattr(asked, "get_max_cache_shape", None) or asked.get_max_length)()


def longest(cache: Any) -> int | None:
    """How many tokens a StaticCache has room for; None of any other. Layers may differ (those with
    a sliding window), which a pruned pass goes by at other places."""
    if StaticCache is None or not isinstance(cache, StaticCache):
        return None
    layers = getattr(cache, "layers", ())
    return max([layer.max_cache_len for layer in layers] or [cache.max_cache_len])


def clear_stock_cache(cache: Any) -> None:
    """Lets go of the tensors in a cache, whichever lists this version holds them in."""
    for name in ("layers", "key_cache", "value_cache"):
        if isinstance(vars(cache).get(name), list):
            setattr(cache, name, [])


def emptied(cache: Any) -> tuple[type, dict[str, Any]] | None:
    """The class of a stock cache, and the attributes that it has when it is empty, none of which
    holds memory. None for a StaticCache of before 4.54, which is made with all its memory."""
    blank = dict(vars(cache))
    if "layers" in blank:
        blank["layers"] = list(map(copy, blank["layers"]))
        for layer in blank["layers"]:
            layer.keys = layer.values = None
            layer.is_initialized = False
            for name in [name for name in vars(layer) if name.startswith("cumulative_length")]:
                is_tensor = isinstance(getattr(layer, name), Tensor)
                setattr(layer, name, torch.tensor(0, device="cpu") if is_tensor else 0)
    elif type(cache) is StaticCache:
        return None
    else:
        blank |= {"key_cache": [], "value_cache": []}
        blank |= {name: 0 for name in ("_seen_tokens", "seen_tokens") if name in blank}
    return type(cache), blank


# -------------------------------------------------------------------------------------- classes

# The argument of forward, and the field of an output, that a cache goes by. 5.24 renamed it: it
# takes the old name as an argument still, but generate() and its own models pass on the new one,
# which a forward that knows the old one only never sees.
CACHE_NAMES = ("cache", "past_key_values")
CACHE_FIELD = next(
    name for name in CACHE_NAMES if name in BaseModelOutputWithPast.__dataclass_fields__
)


def passed_to_every_forward() -> tuple[str, ...]:
    """What generate() passes although a model's forward may not name it, of what LLaVA's own does
    not: cache_position from 4.38 to 5.3, and the cache by its new name."""
    positions = ("cache_position",) if (4, 38) <= _release() < (5, 4) else ()
    return positions + (("cache",) if CACHE_FIELD == "cache" else ())


def layer_returns_tuple() -> bool:
    """Whether Llama's decoder layers return a tuple: before 4.54."""
    return _release() < (4, 54)


def attention_output(rows: Tensor) -> tuple[Any, ...]:
    """What self-attention returns: its output, weights (None), and up to 4.47 the cache (None)."""
    return (rows, None) if _release() >= (4, 48) else (rows, None, None)


def checkpoints_itself(layer: nn.Module) -> bool:
    """Whether a layer does its own gradient checkpointing when called: from 4.52 on."""
    return hasattr(layer, "gradient_checkpointing")


@contextmanager
def nothing_captured() -> Iterator[None]:
    """Within, transformers' hooks of 5.2 on, which collect what layers return as hidden states of a
    model around the decoder, collect nothing: the rows of a pruned pass are packed."""
    module = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(module, "_active_collector", None)
    if collector is None or collector.get() is None:
        yield
        return
    token = collector.set(None)
    try:
        yield
    finally:
        collector.reset(token)


def llava_trainer_fits() -> bool:
    """Whether LLaVA's own Trainer works as it is: bit by bit no more from 4.46 on."""
    from transformers import trainer  # not at the top: it imports much

    of = (trainer.Trainer._get_train_sampler, trainer.Trainer._save_checkpoint)
    sampler, save = (inspect.signature(method).parameters for method in of)
    named = hasattr(trainer, "ALL_LAYERNORM_LAYERS")
    return named and "train_dataset" not in sampler and "metrics" in save


def attention_is_switchable() -> bool:
    """Whether config._attn_implementation acts on a live model: from 4.48 on; before, each kind of
    attention was a class of its own."""
    return hasattr(transformers.modeling_utils, "ALL_ATTENTION_FUNCTIONS")


# ----------------------------------------------------------------------------------- tokenizers


def auto_tokenizer_ignores_class() -> bool:
    """Whether AutoTokenizer goes by config.model_type against the tokenizer_class that a checkpoint
    names, if it knows that model_type, and so to other ids: from 5 to 5.23; before, the named class
    won, and from 5.24 on what it makes of tokenizer.model follows that file's own settings."""
    return (5,) <= _release() < (5, 24)
