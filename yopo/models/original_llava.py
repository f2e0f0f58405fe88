"""Learns from the original LLaVA package, without editing it, where the visual tokens of a call
are. Wraps methods of LLaVA classes; holds no mathematics and changes nothing that LLaVA computes.

How: LLaVA's `prepare_inputs_labels_for_multimodal` returns labels that are -100 at image features.
Given each token's *position* as its label, what comes back at or above 0 is text, and says which
input token it was; what comes back -100 and is not padding is an image feature. Which grid cell a
feature is follows from the config and the image sizes, by LLaVA's own helper functions.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from yopo.engine.layout import CALL, Call, Grid, VisualLayout, call, during, told

_PREPARE = "prepare_inputs_labels_for_multimodal"
Method = Callable[..., Any]


def is_llava(cls: type) -> bool:
    """Whether `cls` is a LLaVA class: one that puts image features between token embeddings."""
    return hasattr(cls, _PREPARE)


def instrument(cls: type) -> None:
    """Wraps the methods of a LLaVA class through which an image comes in; other classes are left
    alone, and so are methods that are wrapped already.

    On a model without a plan the wrappers hand everything through as it came, except
    `cache_position`, which generate() of transformers 4.38 to 5.3 passes and LLaVA's forward lacks.
    """
    if not is_llava(cls):
        return
    for name, wrap in _WRAPPERS.items():
        found = getattr(cls, name)
        if found not in _WRAPPED:
            wrapper = wrap(found, _own_signature(cls, name))
            _WRAPPED.add(wrapper)
            setattr(cls, name, wrapper)


def _own_signature(cls: type, name: str) -> inspect.Signature:
    """The signature of LLaVA's own method: yopo.apply puts a mixin's forward in front of it."""
    owner = next(base for base in cls.__mro__ if is_llava(base) and name in vars(base))
    return inspect.signature(vars(owner)[name])


def _wrap_generate(original: Method, signature: inspect.Signature) -> Method:
    @functools.wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _has_plan(self):
            return original(self, *args, **kwargs)
        with call():  # no image, unless prepare says otherwise
            return original(self, *args, **kwargs)

    return generate


def _wrap_forward(original: Method, signature: inspect.Signature) -> Method:
    names = list(signature.parameters)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    lacks_cache_position = "cache_position" not in names and not takes_any
    embeds_place = names.index("inputs_embeds") - 1  # among the arguments after self

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if lacks_cache_position:
            kwargs.pop("cache_position", None)
        visual = {name: kwargs.pop(name, None) for name in ("visual_mask", "visual_grids")}
        given = args[embeds_place] if len(args) > embeds_place else kwargs.get("inputs_embeds")
        if not _has_plan(self):
            return original(self, *args, **kwargs)
        if any(value is not None for value in visual.values()):
            with during(told(**visual)):
                return original(self, *args, **kwargs)
        if given is not None:  # generate's own, whose call is open, or foreign: nothing is known
            return original(self, *args, **kwargs)
        # Never the call that is open around this one: a logits processor may run a model, too.
        with call():
            return original(self, *args, **kwargs)

    forward.__signature__ = signature  # generate() looks up there what it may pass
    return forward


def _wrap_prepare(original: Method, signature: inspect.Signature) -> Method:
    @functools.wraps(original)
    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        known = CALL.get()
        if known is None or not _has_plan(self):
            return original(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        if bound.arguments["input_ids"] is None or bound.arguments["images"] is None:
            return original(self, *args, **kwargs)
        return _prepare_and_learn(self, original, bound, known)

    return prepare


_WRAPPERS: dict[str, Callable[[Method, inspect.Signature], Method]] = {
    _PREPARE: _wrap_prepare,
    "generate": _wrap_generate,
    "forward": _wrap_forward,
}
_WRAPPED: WeakSet[Method] = WeakSet()


def _has_plan(model: Any) -> bool:
    from yopo.models.attach import (
        plan_of,  # not at the top: attach.py instruments classes, and imports this
    )

    return plan_of(model) is not None


def _prepare_and_learn(
    model: Any, original: Method, bound: inspect.BoundArguments, known: Call
) -> tuple[Any, ...]:
    """Runs LLaVA's prepare with positions for labels, and leaves the layout in `known`.

    Returns what LLaVA returns for the caller's own arguments.
    """
    names = inspect.unwrap(original).__globals__  # LLaVA's constants and helpers, a fork's its own
    ignore, image_token = names["IGNORE_INDEX"], names["IMAGE_TOKEN_INDEX"]
    given = bound.arguments
    input_ids, labels, mask = given["input_ids"], given["labels"], given["attention_mask"]
    images, sizes = given["images"], given.get("image_sizes")

    valid_ids = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    shown = [int(n) for n in ((input_ids == image_token) & valid_ids).sum(1)]
    if input_ids.shape[1] > 1:
        _check_image_count(shown, len(images))

    device = input_ids.device if labels is None else labels.device
    positions = torch.arange(input_ids.shape[1], device=device).expand(input_ids.shape)
    given["labels"] = positions
    if mask is None:  # without one, LLaVA returns none, and padding could not be told from features
        given["attention_mask"] = valid_ids
    ids, position_ids, new_mask, past, embeds, positions = original(*bound.args, **bound.kwargs)
    new_mask_for_caller = None if mask is None else new_mask
    if embeds is None:  # LLaVA had nothing to put in, and gives back what it was given
        return ids, position_ids, mask, past, embeds, labels

    known.layout = _layout(
        model, names, shown, positions.cpu() == ignore, new_mask.bool().cpu(), images, sizes
    )
    if labels is not None:
        text = positions >= 0
        own = labels.gather(1, positions.clamp(min=0))
        labels = own.masked_fill(~text, ignore)
    return ids, position_ids, new_mask_for_caller, past, embeds, labels


def _check_image_count(shown: Sequence[int], given: int) -> None:
    needed = sum(max(1, n) for n in shown)
    if given < needed:
        raise ValueError(
            f"images holds {given} images, but the prompts use {needed}: the rows of input_ids "
            f"have {list(shown)} image tokens, and in a batch with images a row without any uses "
            "up one as well (LLaVA's rule; give a dummy there)"
        )


def _layout(
    model: Any,
    names: dict[str, Any],
    shown: Sequence[int],
    ignored: Tensor,
    valid: Tensor,
    images: Tensor | Sequence[Tensor],
    sizes: Sequence[tuple[int, int]] | None,
) -> VisualLayout | None:
    """The layout of prepared embeddings; None if no visual token is among them.

    shown: images in each row. ignored, valid (B, n) bool, CPU: labels that came back -100; not
    padding. sizes: (width, height) in pixels of each image.
    """
    features = ignored & valid
    limit = getattr(model.config, "tokenizer_model_max_length", None)
    visual = torch.zeros_like(features)
    grids: list[list[Grid]] = []
    image = 0
    for b, count in enumerate(shown):
        row = [_grids_of_image(model, names, images, sizes, image + i) for i in range(count)]
        image += max(1, count)
        cells = torch.tensor([cell for _, pattern in row for cell in pattern], dtype=torch.bool)
        places = features[b].nonzero().flatten()
        truncated = limit is not None and int(valid[b].sum()) == limit
        if len(places) > len(cells) or (len(places) < len(cells) and not truncated):
            raise ValueError(
                f"row {b}: LLaVA put in {len(places)} image features, but {count} images on the "
                f"grids {[grid for of_image, _ in row for grid in of_image]} (by mm_patch_merge_"
                f"type, image_aspect_ratio and image_sizes) make {len(cells)}: pass visual_mask "
                "and visual_grids for this model instead of images"
            )
        cells = cells[: len(places)]
        visual[b, places] = cells
        grids.append(_begun([grid for of_image, _ in row for grid in of_image], int(cells.sum())))
    return VisualLayout.from_mask(visual, grids) if visual.any() else None


def _begun(grids: Sequence[Grid], tokens: int) -> list[Grid]:
    """The grids that `tokens` visual tokens reach into: truncation may leave out the last ones, and
    what LLaVA leaves of a very long and thin image may have no cell at all."""
    kept: list[Grid] = []
    for rows, cols in grids:
        if tokens > 0 and rows * cols > 0:
            kept.append((rows, cols))
            tokens -= rows * cols
    return kept


def _grids_of_image(
    model: Any,
    names: dict[str, Any],
    images: Tensor | Sequence[Tensor],
    sizes: Sequence[tuple[int, int]] | None,
    index: int,
) -> tuple[list[Grid], list[bool]]:
    """The grids of image `index`, and for each of its features whether it is a cell of them.

    Follows LLaVA's prepare_inputs_labels_for_multimodal case by case. A newline embedding is no
    cell. A class token (mm_vision_select_feature "cls_patch") is a grid of its own.
    """
    tower = model.get_vision_tower()
    side = tower.num_patches_per_side
    tile: list[Grid] = [(side, side)]
    if getattr(tower, "select_feature", "patch") == "cls_patch":
        tile = [(1, 1), *tile]
    if not (isinstance(images, list) or images.ndim == 5):
        return tile, _cells(tile)
    tiles = 1 if images[index].ndim == 3 else images[index].shape[0]
    merge = getattr(model.config, "mm_patch_merge_type", "flat")
    if merge == "flat":
        return tile * tiles, _cells(tile * tiles)
    unpad = "unpad" in merge
    if tiles == 1:
        return tile, _cells(tile) + [False] * unpad
    across, down = names["get_anyres_image_grid_shape"](
        sizes[index], model.config.image_grid_pinpoints, tower.config.image_size
    )
    rows, cols = down * side, across * side
    if not unpad:
        grids = [*tile, (rows, cols)]
        return grids, _cells(grids)
    _, rows, cols = names["unpad_image"](torch.empty(1, rows, cols), sizes[index]).shape
    return [*tile, (rows, cols)], _cells(tile) + ([True] * cols + [False]) * rows


def _cells(grids: Sequence[Grid]) -> list[bool]:
    return [True] * sum(rows * cols for rows, cols in grids)
