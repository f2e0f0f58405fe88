"""What the families share: a model whose forward puts image features in the place of placeholder
tokens, and the layout that follows from these. Holds no mathematics and changes nothing that the
stock forward computes; knows no family."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType, MappingProxyType
from typing import Any

import torch
from torch import Tensor

from yopo.engine.layout import Grid, VisualLayout
from yopo.engine.visual_cache import VisualCache
from yopo.models.ahead import forget_ready, make_ready_ahead, with_cache
from yopo.models.arguments import cache_of
from yopo.models.exchange import named, stock_method, with_signature
from yopo.models.generating import Generating
from yopo.models.told import CALL, Call, during, told
from yopo.versions import (
    TRACING,
    is_compiling,
    llava_expects_images_in_ids,
    skipped,
    uncompiled,
)

# What may be shown → the argument of forward that brings its pixels.
KINDS = {"image": "pixel_values", "video": "pixel_values_videos"}


@dataclass(frozen=True)
class Image:
    """The features of one image (tile, or video) in the order in which they take placeholders.

    grids: (rows, cols) one after the other.
    cells: for each feature whether it is a cell of these grids; if not, it is text (a newline).
    """

    grids: tuple[Grid, ...]
    cells: tuple[bool, ...]

    @classmethod
    def of(cls, *grids: Grid) -> Image:
        """Grids and nothing between them."""
        return cls(grids, (True,) * sum(rows * cols for rows, cols in grids))


class Composite(Generating):
    """Put before the stock class of a composite while a plan is applied; a family's file derives
    from it. `self` is the live stock module."""

    def token(self, kind: str) -> int:
        """The id of the placeholder of an "image" or a "video"."""
        raise NotImplementedError

    def images(self, kind: str, given: Mapping[str, Any]) -> Sequence[Image]:
        """The images (or videos) in the order in which they take placeholders, from the arguments
        of forward, or of get_image_features, by name."""
        raise NotImplementedError

    # By kind the features encoded last, each with its image, until a forward has used them.
    _yopo_encoded: Mapping[str, Sequence[tuple[Tensor, Image]]] = MappingProxyType({})

    # Whether the stock forward calls the text stack with as many tokens as it gets, and with the
    # mask, the positions and the cache that it gets.
    hands_on = False

    @skipped
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stock's, inside a call (layout.py) of the layout that its arguments have."""
        begun = _begin(self, args, kwargs, TRACING() is not None)
        token = CALL.set(begun.known)
        try:
            out = begun.stock(*begun.args, **begun.kwargs)
        finally:
            taken = begun.taken
            CALL.reset(token)
            _end(self)
            forget_ready(begun.kwargs)
        if begun.layout is not None and not taken:
            raise _not_taken(self)
        return out

    @classmethod
    def _yopo_attributes(cls, stock: type) -> dict[str, Any]:
        """What images come in through, with stock's signatures: generate() looks names up there."""
        made = {"forward": with_signature(Composite.forward, stock.forward, ())}
        for kind in KINDS:
            name = f"get_{kind}_features"
            if hasattr(stock, name):
                made[name] = with_signature(_encoder(kind, name), getattr(stock, name), ())
        return made

    def _made_ready(self, given: Mapping[str, Any], known: Call) -> dict[str, Any] | None:
        """The arguments with a cache that carries the pass, see ahead.py; None: there is none."""
        decoder = self.language_model
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        if not hasattr(decoder, "yopo_plan") or (ids is None) == (embeds is None):
            return None
        size = decoder.config.hidden_size
        shape = (ids if embeds is None else embeds).shape[:2]
        like = torch.empty(*shape, size, device="meta")
        others = {n: v for n, v in given.items() if n not in ("input_ids", *KINDS.values())}
        with during(known):
            ready = make_ready_ahead(decoder, {**others, "inputs_embeds": like})
        cache = None if ready is None else cache_of(ready)
        if not isinstance(cache, VisualCache):
            return None
        return with_cache(given, cache)

    def _embedded(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments with embeddings for input_ids, where these show no image."""
        given = dict(given)
        if given.get("input_ids") is not None and given.get("pixel_values") is None:
            given["inputs_embeds"] = self.get_input_embeddings()(given.pop("input_ids"))
        return given

    def _note_encoded(self, kind: str, out: Any, given: Mapping[str, Any]) -> None:
        """Notes on the features of each image which image they are of: generate() of 5.1x on
        encodes first, and forward then gets neither pixels nor sizes."""
        features = getattr(out, "pooler_output", None)
        if isinstance(features, tuple | list):
            pairs = list(zip(features, self.images(kind, given), strict=True))
            for one, image in pairs:
                one.yopo_image = image
            kept = {kind: [(one.detach(), image) for one, image in pairs]}
            self._yopo_encoded = {**self._yopo_encoded, **kept}

    def _shown(self, given: Mapping[str, Any]) -> list[tuple[int, Sequence[Image]]]:
        """For each kind of placeholder of which images are shown its id and the images."""
        shown = []
        for kind, pixels in KINDS.items():
            encoded = (given.get("mm_encoder_outputs") or {}).get(kind)
            if encoded is not None:
                each = list(encoded.pooler_output)
                images = [self._encoded_image(kind, features) for features in each]
                if None in images:
                    images = self.images(kind, {**given, pixels: each})
            elif given.get(pixels) is not None and len(given[pixels]) > 0:
                images = self.images(kind, given)
            else:
                continue
            shown.append((self.token(kind), images))
        return shown

    def _encoded_image(self, kind: str, features: Tensor) -> Image | None:
        """Which image `features` are of; None if they did not come from here."""
        image = getattr(features, "yopo_image", None)
        if image is None:  # on a copy, as hooks that move or cast make one, the note is lost
            for original, of in self._yopo_encoded.get(kind, ()):
                alike = original.shape == features.shape
                if alike and torch.equal(original.to(features), features):
                    return of
        return image

    def forget_encoded(self) -> None:
        _end(self)

    def _placeholders(self, given: Mapping[str, Any]) -> Callable[[int], Tensor]:
        """Where (B, n) a token stands; by its embedding, if embeddings are all there is."""
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        if ids is not None:
            return lambda token: (ids == token).cpu()
        table = self.get_input_embeddings()

        def places(token: int) -> Tensor:
            mine = table(torch.tensor(token, device=embeds.device))
            return (embeds == mine).all(-1).cpu()

        return places


@dataclass(frozen=True)
class _Begun:
    """A forward: what is known during it, and stock's, with its arguments. ahead: the cache that
    carries a pass to the decoder."""

    known: Call | None
    stock: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    layout: VisualLayout | None = None
    ahead: Any = None

    @property
    def taken(self) -> bool:
        """Whether a decoder under a plan was reached."""
        told = self.known is not None and self.known.taken
        return told or (self.ahead is not None and self.ahead.ready is None)


@uncompiled
def _begin(self: Any, args: Any, kwargs: dict[str, Any], traced: bool) -> _Begun:
    stock = stock_method(self, Composite)
    if not isinstance(self, Composite):
        return _Begun(CALL.get(), stock, args, kwargs)
    visual = {name: kwargs.pop(name, None) for name in ("visual_mask", "visual_grids")}
    given, layout = named(self, args, kwargs), None
    if any(value is not None for value in visual.values()):
        known = told(**visual)
    else:
        shown = self._shown(given)
        if not shown and given.get("inputs_embeds") is not None:
            return _Begun(CALL.get(), stock, args, kwargs)  # foreign: nothing is known of them
        cached = isinstance(cache_of(given), VisualCache)
        if llava_expects_images_in_ids() and cached:
            args, kwargs = (), self._embedded(given)
            given = kwargs
        layout = _layout(self._placeholders(given), shown, cached) if shown else None
        known = Call(layout)
    ready = self._made_ready(given, known) if traced and self.hands_on else None
    if ready is None:
        return _Begun(known, stock, args, kwargs, layout)
    return _Begun(known, stock, (), ready, layout, cache_of(ready))


@uncompiled
def _end(self: Any) -> None:
    vars(self).pop("_yopo_encoded", None)


def _not_taken(model: Any) -> ValueError:
    return ValueError(
        f"the text model of this {type(model).__name__} is not the one that the plan was put on, "
        "and has computed the image unpruned: put the plan on once more (yopo.apply), or take it "
        "off (yopo.remove)"
    )


def size_given(given: Mapping[str, Any], name: str) -> list[Any]:
    """The argument that holds the images' sizes, as lists.

    Raises ValueError where it is missing.
    """
    if given.get(name) is None:
        raise ValueError(
            f"images came without {name}: pass what the model's processor gives, whole (generate's "
            "prefill_chunk_size loses it: leave that out)"
        )
    return torch.as_tensor(given[name]).tolist()


def _encoder(kind: str, name: str) -> FunctionType:
    def encode(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = stock_method(self, Composite, name)(*args, **kwargs)
        if isinstance(self, Composite) and not is_compiling():
            self._note_encoded(kind, out, named(self, args, kwargs, name))
        return out

    return encode


def _layout(
    places: Callable[[int], Tensor],
    shown: Iterable[tuple[int, Sequence[Image]]],
    cached: bool = False,
) -> VisualLayout | None:
    """The layout of the rows; None if no visual token is among them. `cached`: an image is in the
    cache already.

    Raises ValueError where the images do not fill the placeholders of the rows, each whole.
    """
    rows: list[list[tuple[int, Image]]] = []
    visual = torch.zeros(0, 0, dtype=torch.bool)
    for token, images in shown:
        found = places(token)
        if not rows:
            rows, visual = [[] for _ in found], torch.zeros_like(found)
        waiting = list(images)
        for b, row in enumerate(found):
            columns = row.nonzero().flatten()
            at = 0
            while at < len(columns):
                image = waiting.pop(0) if waiting else None
                if image is None or at + len(image.cells) > len(columns):
                    raise ValueError(
                        f"row {b} has {len(columns)} image tokens (id {token}), which the images "
                        f"given do not fill: {at} are filled, and "
                        + (f"the next has {len(image.cells)}" if image else "none is left")
                        + " (features, by its size). Let the model's own processor make the "
                        "prompt (it writes one token for each feature), and do not cut images, as "
                        "generate's prefill_chunk_size does; with several images in a row also "
                        "leave out num_beams and num_return_sequences (up to transformers 5.14 "
                        "they mix up the images of a row)"
                    )
                here = columns[at : at + len(image.cells)]
                visual[b, here] = torch.tensor(image.cells, dtype=torch.bool)
                rows[b].append((int(here[0]), image))
                at += len(here)
        if waiting and cached:
            raise ValueError(
                f"{len(waiting)} of {len(images)} images given have no image tokens among the new "
                "tokens, and the cache holds an image already: for a further turn leave the images "
                "that it holds (their pixel_values) out"
            )
        if waiting:
            raise ValueError(
                f"{len(waiting)} of {len(images)} images given have no image tokens (id {token}) "
                "in the prompt: let the model's own processor make it"
            )
    # Images and videos of a row in the order of their places.
    ordered = [[image for _, image in sorted(row, key=lambda item: item[0])] for row in rows]
    grids = [[grid for image in row for grid in image.grids] for row in ordered]
    return VisualLayout.from_mask(visual, grids) if visual.any() else None
