"""Learns from the original LLaVA package, without editing it, where the visual tokens are in what
its `prepare_inputs_labels_for_multimodal` returns, and remembers it (known_layouts.py). Holds no
mathematics and changes nothing that LLaVA computes.

How: LLaVA's own method returns labels that are -100 at image features. Given each token's
*position* as its label, what comes back at or above 0 is text, and says which input token it was;
what comes back -100 and is not padding is an image feature. Which grid cell a feature is follows
from the config and the image sizes, by LLaVA's own helper functions. A method of anybody else's is
called as its caller called it, once: what it returns is LLaVA's layout if its text lies where
LLaVA's would, by the embeddings of the tokens, and else unknown.

The method is wrapped on the very class that defines it, so that it may be replaced, overridden and
called as before, under any class that a model is given later.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from functools import cache
from types import FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from transformers import PreTrainedModel

from yopo.engine.layout import Grid, VisualLayout
from yopo.models.decoder import PrunedDecoder
from yopo.models.known_layouts import recall, remember
from yopo.models.llava_arguments import ADAPTED, adapt, chain, exchange_method
from yopo.models.told import CALL
from yopo.versions import is_compiling, uncompiled

_PREPARE = "prepare_inputs_labels_for_multimodal"
_NAMES = {"input_ids", "attention_mask", "labels", "images"}  # that it is known by
_CONSTANTS = {"IGNORE_INDEX": -100, "IMAGE_TOKEN_INDEX": -200}
Method = Callable[..., Any]
Picture = tuple[list[Grid], list[bool]]  # grids, and for each feature whether it is a cell of them

_WRAPPED: WeakSet[Method] = WeakSet()
_SEEN: WeakKeyDictionary[type, list[Any]] = WeakKeyDictionary()  # methods when last instrumented


def is_llava(cls: type) -> bool:
    """Whether `cls` is a LLaVA class: one that puts image features between token embeddings."""
    return hasattr(cls, _PREPARE)


def instrument(cls: type) -> None:
    """Wraps what `cls` inherits of LLaVA's methods, each on the class that defines it and once;
    does nothing to other classes.

    For models without a plan the wrappers hand everything through as it came. They are never taken
    off: a model that has a plan may live longer than the patch.

    Raises TypeError, once all others are wrapped, for a class that does not let a method be set.
    """
    refused: list[TypeError] = []
    for owner in _owners(cls):
        found = vars(owner).get(_PREPARE)
        signature = _signature_to_learn_by(found)
        try:
            if signature is not None:
                exchange_method(owner, _PREPARE, _wrap(found, signature))
            adapt(owner)
        except TypeError as error:
            refused.append(error)
    if refused:
        raise refused[0]


def keep_instrumented(model: Any) -> None:
    """Instruments the class of `model` again where a method of LLaVA's was put back or replaced
    since, and a function that was put on the model itself."""
    cls = type(model)
    owners = _known_owners(cls)
    if not owners:
        return
    if _SEEN.get(cls) != _methods(owners):
        instrument(cls)
        _SEEN[cls] = _methods(owners)
    found = vars(model).get(_PREPARE)
    if isinstance(found, MethodType | FunctionType):
        bound = isinstance(found, MethodType) and found.__self__ is model
        function = found.__func__ if bound else _unbound(found)
        signature = _signature_to_learn_by(function)
        if signature is not None:
            setattr(model, _PREPARE, MethodType(_wrap(function, signature), model))


def _unbound(found: Method) -> Method:
    @functools.wraps(found)
    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        return found(*args, **kwargs)

    del prepare.__wrapped__  # which takes other arguments
    return prepare


def _owners(cls: type) -> tuple[type, ...]:
    """The classes that `cls` has LLaVA's methods from."""
    return tuple(owner for owner in cls.__mro__ if is_llava(owner))


_known_owners = cache(_owners)


def _methods(owners: Sequence[type]) -> list[Any]:
    return [vars(owner).get(name) for owner in owners for name in (_PREPARE, *ADAPTED)]


def _signature_to_learn_by(found: Any) -> inspect.Signature | None:
    """By which names a method takes its arguments; None for one that need not be wrapped, as it
    calls one that is, or cannot be."""
    if not inspect.isfunction(found) or any(method in _WRAPPED for method in chain(found)):
        return None
    innermost = inspect.unwrap(found)
    if _PREPARE in innermost.__code__.co_names:  # super()'s, or another class's
        return None
    signature = inspect.signature(innermost)
    if signature.parameters.keys() >= _NAMES:
        return signature
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    return (
        inspect.signature(_as_llava_has_it) if inspect.Parameter.VAR_POSITIONAL in kinds else None
    )


def _as_llava_has_it(
    self, input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes=None
): ...  # for its signature: that of a method that takes any arguments


def _wrap(original: Method, signature: inspect.Signature) -> Method:
    own = original.__globals__.get("__name__", "").partition(".")[0] == "llava"

    @functools.wraps(original)
    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_compiling() and uncompiled(_is_asked_for)(self):
            return uncompiled(prepare)(self, *args, **kwargs)  # embeddings are known by values
        try:
            bound = signature.bind(self, *args, **kwargs)
        except TypeError:  # the original has its own words for it
            return original(self, *args, **kwargs)
        given = bound.arguments
        shows = given.get("input_ids") is not None and given.get("images") is not None
        if not shows or not _is_asked_for(self):
            return original(self, *args, **kwargs)
        if own:
            learnt = _prepare_and_learn(self, original, bound)
            return original(self, *args, **kwargs) if learnt is None else learnt
        out = original(self, *args, **kwargs)
        _learn_from(self, _Names(self, original), bound.arguments, out)
        return out

    _WRAPPED.add(prepare)
    return prepare


def _is_asked_for(model: Any) -> bool:
    """Whether the layout will be asked for: under a plan, unless the call has a visual_mask."""
    known = CALL.get()
    if known is not None and known.visual_mask is not None:
        return False
    get_model = getattr(model, "get_model", None)
    decoder = None if get_model is None else get_model()
    if isinstance(decoder, PreTrainedModel):
        return isinstance(decoder, PrunedDecoder) and decoder.yopo_plan is not None
    decoders = [module for module in model.modules() if isinstance(module, PrunedDecoder)]
    return any(decoder.yopo_plan is not None for decoder in decoders)


def _prepare_and_learn(
    model: Any, original: Method, bound: inspect.BoundArguments
) -> tuple[Any, ...] | None:
    """Runs LLaVA's prepare with positions for labels, and remembers the layout.

    Returns what LLaVA returns for the caller's own arguments; None for a method that does not
    return what LLaVA's does, (…, attention_mask, past_key_values, inputs_embeds, labels).
    """
    names = _Names(model, original)
    ignore, image_token = names["IGNORE_INDEX"], names["IMAGE_TOKEN_INDEX"]
    given = bound.arguments
    input_ids, labels = given["input_ids"], given.get("labels")
    mask, images, sizes = given.get("attention_mask"), given["images"], given.get("image_sizes")

    valid_ids = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    shown = ((input_ids == image_token) & valid_ids).sum(1).tolist()
    if input_ids.shape[1] > 1:
        _check_image_count(shown, len(images))

    device = input_ids.device if labels is None else labels.device
    given["labels"] = torch.arange(input_ids.shape[1], device=device).expand(input_ids.shape)
    if mask is None:  # without one, LLaVA returns none, and padding could not be told from features
        given["attention_mask"] = valid_ids
    out = original(*bound.args, **bound.kwargs)
    if not isinstance(out, tuple) or len(out) < 5:
        return None
    *first, new_mask, past, embeds, positions = out
    if embeds is None:  # LLaVA had nothing to put in, and gives back what it was given
        return (*first, mask, past, embeds, labels)
    fields = (embeds, positions, new_mask)
    if not all(isinstance(x, Tensor) and x.shape[:2] == embeds.shape[:2] for x in fields):
        return None

    ignored, valid = positions.cpu() == ignore, new_mask.bool().cpu()
    rows = _images_of_rows(model, names, shown, images, sizes)
    remember(embeds, _layout(model, rows, ignored & valid, valid))
    if labels is not None:
        text = positions >= 0
        own = labels.gather(1, positions.clamp(min=0))
        labels = own.masked_fill(~text, ignore)
    return (*first, None if mask is None else new_mask, past, embeds, labels)


def _learn_from(model: Any, names: _Names, given: dict[str, Any], out: Any) -> None:
    """Remembers the layout of what a method of somebody else's returned, where it is LLaVA's: each
    row is its tokens with features for the image tokens, by the embeddings of the text."""
    if not isinstance(out, tuple | list) or len(out) < 5:
        return
    new_mask, embeds = out[-4], out[-2]
    if not isinstance(embeds, Tensor) or embeds.dim() != 3:
        return
    if recall(embeds, VisualLayout.empty(len(embeds))) is not None:  # it has called LLaVA's
        return
    try:
        layout = _laid_out_by_llava(model, names, given, new_mask, embeds)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return  # not by LLaVA's rules; shown.py refuses what stays unknown
    if layout is not None:
        remember(embeds, layout)


@torch.no_grad()
def _laid_out_by_llava(
    model: Any, names: _Names, given: dict[str, Any], new_mask: Tensor | None, embeds: Tensor
) -> VisualLayout | None:
    ids, mask = given["input_ids"], given.get("attention_mask")
    image_token, images = names["IMAGE_TOKEN_INDEX"], given["images"]
    kept = [row if mask is None else row[mask[b].bool()] for b, row in enumerate(ids)]
    shown = [int((row == image_token).sum()) for row in kept]
    _check_image_count(shown, len(images))
    rows = _images_of_rows(model, names, shown, images, given.get("image_sizes"))
    filled = []  # tokens of each row, the image token at each feature
    for row, pictures in zip(kept, rows, strict=True):
        lengths = torch.ones_like(row)
        lengths[row == image_token] = lengths.new_tensor([len(cells) for _, cells in pictures])
        filled.append(row.repeat_interleave(lengths)[: _longest(model)])
    width, table = embeds.shape[1], model.get_model().embed_tokens
    if max(map(len, filled)) != width or len(filled) != len(embeds):
        return None
    valid = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=ids.device)
    features = torch.zeros_like(valid)
    for b, tokens in enumerate(filled):
        text, said = tokens != image_token, table(tokens[tokens != image_token]).to(embeds)
        for start in (0, width - len(tokens)):  # padded on the right, on the left
            here = torch.zeros_like(valid[b])
            here[start : start + len(tokens)] = True
            as_masked = new_mask is None or torch.equal(new_mask[b].to(here), here)
            if as_masked and torch.equal(embeds[b, here.to(embeds.device)][text], said):
                valid[b], features[b, here] = here, ~text
                break
        else:
            return None
    return _layout(model, rows, features.cpu(), valid.cpu())


def _longest(model: Any) -> int | None:
    """What LLaVA cuts prompts to; None: it does not."""
    return getattr(model.config, "tokenizer_model_max_length", None)


class _Names:
    """LLaVA's constants and helper functions as a method has them: from its own module, a fork's
    too, else from where the classes of the model are defined."""

    def __init__(self, model: Any, method: Method) -> None:
        modules = (sys.modules.get(cls.__module__) for cls in type(model).__mro__)
        homes = [vars(module) for module in modules if module is not None]
        self._homes = [inspect.unwrap(method).__globals__, *homes, _CONSTANTS]

    def __getitem__(self, name: str) -> Any:
        for home in self._homes:
            if name in home:
                return home[name]
        raise ValueError(
            f"{name}, by which LLaVA lays out an image in tiles, is not where this model's classes "
            "are defined: pass visual_mask and visual_grids for this model instead of images"
        )


def _check_image_count(shown: Sequence[int], given: int) -> None:
    needed = sum(max(1, n) for n in shown)
    if given < needed:
        raise ValueError(
            f"images holds {given} images, but the prompts use {needed}: the rows of input_ids "
            f"have {list(shown)} image tokens, and in a batch with images a row without any uses "
            "up one as well (LLaVA's rule; give a dummy there)"
        )


def _images_of_rows(
    model: Any,
    names: _Names,
    shown: Sequence[int],
    images: Tensor | Sequence[Tensor],
    sizes: Sequence[tuple[int, int]] | None,
) -> list[list[Picture]]:
    """Of each row the images shown in it. sizes: (width, height) in pixels of each image."""
    rows, first = [], 0
    for count in shown:
        rows.append([_picture(model, names, images, sizes, first + i) for i in range(count)])
        first += max(1, count)
    return rows


def _layout(
    model: Any, rows: Sequence[Sequence[Picture]], features: Tensor, valid: Tensor
) -> VisualLayout:
    """The layout of prepared embeddings, of the pictures of each row. features, valid (B, n) bool,
    CPU: what came of images; what is not padding."""
    visual = torch.zeros_like(features)
    grids: list[list[Grid]] = []
    for b, row in enumerate(rows):
        cells = torch.tensor([cell for _, pattern in row for cell in pattern], dtype=torch.bool)
        places = features[b].nonzero().flatten()
        truncated = int(valid[b].sum()) == _longest(model)
        if len(places) > len(cells) or (len(places) < len(cells) and not truncated):
            raise ValueError(
                f"row {b}: LLaVA put in {len(places)} image features, but {len(row)} images on the "
                f"grids {[grid for of_image, _ in row for grid in of_image]} (by mm_patch_merge_"
                f"type, image_aspect_ratio and image_sizes) make {len(cells)}: pass visual_mask "
                "and visual_grids for this model instead of images"
            )
        cells = cells[: len(places)]
        visual[b, places] = cells
        grids.append(_begun([grid for of_image, _ in row for grid in of_image], int(cells.sum())))
    return VisualLayout.from_mask(visual, grids)


def _begun(grids: Sequence[Grid], tokens: int) -> list[Grid]:
    """The grids that `tokens` visual tokens reach into: truncation may leave out the last ones, and
    what LLaVA leaves of a very long and thin image may have no cell at all."""
    kept: list[Grid] = []
    for rows, cols in grids:
        if tokens > 0 and rows * cols > 0:
            kept.append((rows, cols))
            tokens -= rows * cols
    return kept


def _picture(
    model: Any,
    names: _Names,
    images: Tensor | Sequence[Tensor],
    sizes: Sequence[tuple[int, int]] | None,
    index: int,
) -> Picture:
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
