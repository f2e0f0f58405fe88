"""Tiny random models of each family, and batches of prompts with images for them.

Where the visual tokens are is worked out here by plain counting (LLaVA-NeXT: by having the stock
model pack features that say where they come from), not by yopo.models.families, which is judged.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor

from yopo.versions import has_families

VOCAB, HIDDEN, HEADS, KV, LAYERS, NEURONS = 48, 32, 4, 2, 3, 24
PAD, IMAGE, VIDEO, START, END = 0, 5, 6, 7, 8
FIRST_WORD = 10
SIDE, PATCH = 4, 4  # LLaVA's tower: 4 × 4 patches of 4 × 4 pixels
PINPOINTS = [[16, 32], [32, 16], [32, 32], [16, 48]]

Place = tuple[int, int, int] | None  # (grid of the image, row, column); None: text


@dataclass(frozen=True)
class Kind:
    """A family with one of its text models. sizes: the images that a batch may draw."""

    name: str
    cls: str
    text: str
    sizes: tuple[Any, ...]
    videos: tuple[Any, ...] = ()

    @property
    def exists(self) -> bool:
        return has_families() and hasattr(transformers, self.cls)

    @property
    def qwen(self) -> bool:
        return self.cls.startswith("Qwen")


QWEN = ((1, 4, 6), (1, 2, 2), (1, 6, 4))  # (time, height, width) in patches
CLIPS = ((2, 4, 4), (3, 2, 4))
NEXT = ((20, 30), (40, 12), (16, 16), (33, 31), (10, 44))  # (height, width) in pixels
_ALL = (
    Kind("llava-llama", "LlavaForConditionalGeneration", "llama", (None,)),
    Kind("llava-mistral", "LlavaForConditionalGeneration", "mistral", (None,)),
    Kind("llava_next-llama", "LlavaNextForConditionalGeneration", "llama", NEXT),
    Kind("llava_next-mistral", "LlavaNextForConditionalGeneration", "mistral", NEXT),
    Kind("qwen2_vl", "Qwen2VLForConditionalGeneration", "", QWEN, CLIPS),
    Kind("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", "", QWEN, CLIPS),
    # An image of one tile, and of two with a thumbnail; a video is a tile for each frame.
    Kind("internvl-llama", "InternVLForConditionalGeneration", "llama", (1, 3)),
    Kind("internvl-qwen2", "InternVLForConditionalGeneration", "qwen2", (1, 3)),
    Kind("internvl-phi3", "InternVLForConditionalGeneration", "phi3", (1, 3)),
)
KINDS = {kind.name: kind for kind in _ALL}
HERE = [name for name, kind in KINDS.items() if kind.exists]


def config(kind: Kind, **changes: Any) -> Any:
    text = dict(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=NEURONS,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )
    if kind.text == "phi3":
        text["partial_rotary_factor"] = 0.5
    text.update(changes)
    cls = getattr(transformers, kind.cls.replace("ForConditionalGeneration", "Config"))
    if kind.qwen:
        return _qwen_config(kind, cls, text)
    text["model_type"] = kind.text
    clip = dict(
        model_type="clip_vision_model",
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE * PATCH,
        patch_size=PATCH,
    )
    if kind.cls.startswith("InternVL"):
        tower = clip | dict(model_type="internvl_vision", image_size=32)  # 8 × 8, merged to 4 × 4
        ids = dict(image_token_id=IMAGE, image_seq_length=SIDE * SIDE, tie_word_embeddings=False)
        return cls(text_config=text, vision_config=tower, **ids)
    ids = dict(image_token_index=IMAGE, image_seq_length=1, tie_word_embeddings=False)
    more = {} if kind.name.startswith("llava-") else {"image_grid_pinpoints": PINPOINTS}
    return cls(text_config=text, vision_config=clip, **ids, **more)


def _qwen_config(kind: Kind, cls: type, text: dict[str, Any]) -> Any:
    text["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 1, 1]}
    text["rope_theta"] = 10000.0
    tower = dict(depth=2, num_heads=2, patch_size=PATCH, spatial_merge_size=2)
    if kind.name == "qwen2_vl":
        tower |= dict(embed_dim=16, hidden_size=HIDDEN, mlp_ratio=2)
    else:
        tower |= dict(hidden_size=16, intermediate_size=24, out_hidden_size=HIDDEN)
        tower |= dict(window_size=2 * 2 * PATCH, fullatt_block_indexes=[1])
    ids = dict(
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    flat = cls(**text, **ids, vision_config=tower)  # as checkpoints have it, up to 4.57
    if getattr(flat, "text_config", flat).hidden_size == text["hidden_size"]:
        return flat
    return cls(text_config=text, vision_config=tower, tie_word_embeddings=False, **ids)


@lru_cache(maxsize=32)
def _weights(name: str, vocab: int) -> dict[str, Tensor]:
    """Random weights under which attention is neither flat nor one-hot and every part matters."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    model = getattr(transformers, KINDS[name].cls)(config(KINDS[name], vocab_size=vocab))
    for key, value in model.state_dict().items():
        if not value.is_floating_point() or "inv_freq" in key:
            continue
        noise = torch.randn(value.shape, generator=generator)
        if "embed_tokens" in key or "newline" in key:
            state[key] = noise
        elif value.dim() < 2:
            norm = not key.endswith("bias")
            state[key] = norm + 0.3 * noise
        else:
            sharp = 1.3 if any(part in key for part in ("q_proj", "k_proj", "qkv")) else 1.0
            state[key] = sharp * noise / (value.numel() / value.shape[0]) ** 0.5
        if "lm_head" in key:
            state[key][:FIRST_WORD] = 0  # that no placeholder is ever generated
    return state


def build(kind: Kind, vocab: int = VOCAB) -> Any:
    """A fresh stock model in eval mode."""
    model = getattr(transformers, kind.cls)(config(kind, vocab_size=vocab))
    loaded = model.load_state_dict(_weights(kind.name, vocab), strict=False)
    assert not loaded.unexpected_keys
    assert all("inv_freq" in name or "position_ids" in name for name in loaded.missing_keys)
    return model.eval()


# ------------------------------------------------------------------------------------- the parts


def stack_of(model: Any) -> Any:
    """The decoder stack, by the names that the versions give it."""
    inner = getattr(model, "model", None)
    for holder in (model, inner):
        modules = {} if holder is None else holder._modules
        if "language_model" in modules:
            found = modules["language_model"]
            return found._modules.get("model", found)
    return inner


def head_of(model: Any) -> Any:
    return model.lm_head if "lm_head" in model._modules else model.language_model.lm_head


def seen_by_oracle(model: Any) -> SimpleNamespace:
    """The text model as oracle.py wants it, its linears apart."""
    stack = stack_of(model)
    layers = []
    for layer in stack.layers:
        attn, mlp = layer.self_attn, layer.mlp
        if hasattr(attn, "qkv_proj"):
            parts = attn.qkv_proj.weight.split([HIDDEN, KV * 8, KV * 8])
            q, k, v = (SimpleNamespace(weight=part, bias=None) for part in parts)
            attn = SimpleNamespace(q_proj=q, k_proj=k, v_proj=v, o_proj=attn.o_proj)
            parts = mlp.gate_up_proj.weight.chunk(2)
            gate, up = (SimpleNamespace(weight=part, bias=None) for part in parts)
            mlp = SimpleNamespace(gate_proj=gate, up_proj=up, down_proj=mlp.down_proj)
        norms = {n: getattr(layer, n) for n in ("input_layernorm", "post_attention_layernorm")}
        layers.append(SimpleNamespace(self_attn=attn, mlp=mlp, **norms))
    inner = SimpleNamespace(layers=layers, norm=stack.norm)
    return SimpleNamespace(config=stack.config, model=inner, lm_head=head_of(model))


# ------------------------------------------------------------------------------------ the images


@lru_cache(maxsize=64)
def _places_of_next(size: tuple[int, int]) -> tuple[tuple[tuple[int, int], ...], tuple[Place, ...]]:
    """LLaVA-NeXT's: stock packs features that hold (tile, row, column), a newline being −1."""
    model = build(KINDS["llava_next-llama"])
    packer = model if hasattr(model, "pack_image_features") else model.model
    from transformers.models.llava_next import modeling_llava_next as stock

    tall, wide = stock.get_anyres_image_grid_shape(list(size), PINPOINTS, SIDE * PATCH)
    cells = torch.cartesian_prod(
        torch.arange(1 + tall * wide), torch.arange(SIDE), torch.arange(SIDE)
    )
    features = cells.view(1 + tall * wide, SIDE * SIDE, 3).float()
    packed, _ = packer.pack_image_features(
        [features], torch.tensor([size]), "default", image_newline=-torch.ones(3)
    )
    rows = (packed[0] if isinstance(packed, list) else packed).long().tolist()
    base, tiles = rows[: SIDE * SIDE], rows[SIDE * SIDE :]
    assert all(tile == 0 for tile, _, _ in base)
    big = [
        None if tile < 0 else ((tile - 1) // wide * SIDE + row, (tile - 1) % wide * SIDE + col)
        for tile, row, col in tiles
    ]
    top, left = (min(place[axis] for place in big if place) for axis in (0, 1))
    bottom, right = (max(place[axis] for place in big if place) for axis in (0, 1))
    places: list[Place] = [(0, row, col) for _, row, col in base]
    places += [place and (1, place[0] - top, place[1] - left) for place in big]
    return ((SIDE, SIDE), (bottom - top + 1, right - left + 1)), tuple(places)


def places(kind: Kind, size: Any) -> tuple[tuple[tuple[int, int], ...], tuple[Place, ...]]:
    """The grids of an image (or clip) and, for each of its features, the place."""
    if kind.cls.startswith("LlavaNext"):
        return _places_of_next(size)
    if kind.qwen:
        grids = ((size[1] // 2, size[2] // 2),) * size[0]
    else:
        grids = ((SIDE, SIDE),) * (size or 1)
    cells = [
        (index, row, col)
        for index, (rows, cols) in enumerate(grids)
        for row in range(rows)
        for col in range(cols)
    ]
    return grids, tuple(cells)


def pixels(kind: Kind, size: Any, seed: int) -> Tensor:
    """What the tower takes for one image or clip."""
    generator = torch.Generator().manual_seed(1000 + seed)
    if kind.qwen:
        return torch.randn(size[0] * size[1] * size[2], 3 * 2 * PATCH * PATCH, generator=generator)
    if kind.cls.startswith("InternVL"):
        return torch.randn(size, 3, 32, 32, generator=generator)
    tiles = 1
    if kind.cls.startswith("LlavaNext"):
        from transformers.models.llava_next import modeling_llava_next as stock

        tall, wide = stock.get_anyres_image_grid_shape(list(size), PINPOINTS, SIDE * PATCH)
        tiles = 1 + tall * wide
    return torch.randn(tiles, 3, SIDE * PATCH, SIDE * PATCH, generator=generator)


# ------------------------------------------------------------------------------------ the batches

# A row is a list of ("text", length), ("image", index of a size) and ("video", index of a size).
Segment = tuple[str, int]


@dataclass
class Batch:
    kind: Kind
    rows: list[list[Segment]]
    seed: int
    ids: Tensor
    mask: Tensor
    layout: SimpleNamespace
    grids: list[list[tuple[int, int]]]
    shown: list[list[tuple[str, Any, int]]] = field(default_factory=list)  # (kind, size, seed)

    def inputs(self, model: Any, positions: bool = True) -> dict[str, Any]:
        """The arguments of forward; `positions`: with the positions that generate() would give."""
        every = [one for row in self.shown for one in row]
        given = {"input_ids": self.ids, "attention_mask": self.mask}
        given |= visual_inputs(self.kind, every)
        if self.kind.qwen:
            given |= token_types(model, self.ids)
        if positions:
            given["position_ids"] = position_ids(model, given)
        return given

    def alone(self, b: int) -> Batch:
        return make(self.kind, [self.rows[b]], seed=self.seed, first=b)


def visual_inputs(kind: Kind, every: list[tuple[str, Any, int]]) -> dict[str, Any]:
    images = [one for one in every if one[0] == "image"]
    clips = [one for one in every if one[0] == "video"]
    made = {
        what: [pixels(kind, size, s) for _, size, s in ones]
        for what, ones in (("image", images), ("video", clips))
    }
    if kind.qwen:
        given = {}
        for what, ones, name in (("image", images, ""), ("video", clips, "_videos")):
            if ones:
                given["pixel_values" + name] = torch.cat(made[what])
                given[what + "_grid_thw"] = torch.tensor([size for _, size, _ in ones])
        return given
    if not images:
        return {}
    if kind.cls.startswith("LlavaNext"):
        most = max(map(len, made["image"]))
        stacked = [torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])]) for x in made["image"]]
        sizes = torch.tensor([size for _, size, _ in images])
        return {"pixel_values": torch.stack(stacked), "image_sizes": sizes}
    return {"pixel_values": torch.cat(made["image"])}


def token_types(model: Any, ids: Tensor) -> dict[str, Tensor]:
    if "mm_token_type_ids" not in inspect.signature(model.forward).parameters:
        return {}
    return {"mm_token_type_ids": ((ids == IMAGE) + 2 * (ids == VIDEO)).int()}


def position_ids(model: Any, given: dict[str, Any]) -> Tensor:
    """As generate() makes them: counted over the mask; Qwen's own in three dimensions."""
    mask = given["attention_mask"]
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    owner = model if hasattr(model, "get_rope_index") else getattr(model, "model", None)
    if not hasattr(owner, "get_rope_index"):
        return counted
    names = inspect.signature(owner.get_rope_index).parameters
    return owner.get_rope_index(**{name: given[name] for name in names if name in given})[0]


def make(
    kind: Kind,
    rows: list[list[Segment]],
    *,
    pads: list[tuple[int, int]] | None = None,
    seed: int = 0,
    first: int = 0,
) -> Batch:
    """pads: per row the weights (left, right) that share out its padding. first: what row 0 would
    be called in a larger batch, so that it gets the same words and pictures."""
    laid, shown, all_grids = [], [], []
    for b, segments in enumerate(rows, start=first):
        generator = torch.Generator().manual_seed(100 * seed + b)
        tokens: list[int] = []
        cells: list[tuple[int, int, int]] = []
        grids: list[tuple[int, int]] = []
        seen: list[tuple[str, Any, int]] = []
        for index, (what, value) in enumerate(segments):
            if what == "text":
                words = torch.randint(FIRST_WORD, VOCAB, (value,), generator=generator).tolist()
                tokens += words
                cells += [(-1, -1, -1)] * value
                continue
            size = (kind.sizes if what == "image" else kind.videos)[value]
            new, marks = places(kind, size)
            around = kind.qwen or kind.cls.startswith("InternVL")
            token = IMAGE if what == "image" else VIDEO
            tokens += [START] * around + [token] * len(marks) + [END] * around
            inside = [(len(grids) + m[0], m[1], m[2]) if m else (-1, -1, -1) for m in marks]
            cells += [(-1, -1, -1)] * around + inside + [(-1, -1, -1)] * around
            grids += new
            seen.append((what, size, 100 * seed + 10 * b + index))
        laid.append((tokens, cells))
        shown.append(seen)
        all_grids.append(grids)
    width = max(len(tokens) for tokens, _ in laid) + (pads is not None)
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros_like(ids)
    image, row, col = (torch.full_like(ids, -1) for _ in range(3))
    for b, (tokens, cells) in enumerate(laid):
        spare = width - len(tokens)
        left, right = pads[b] if pads else (0, 1)
        at = slice(spare * left // (left + right), spare * left // (left + right) + len(tokens))
        ids[b, at], mask[b, at] = torch.tensor(tokens), 1
        image[b, at], row[b, at], col[b, at] = torch.tensor(cells).unbind(1)
    layout = SimpleNamespace(visual=image >= 0, image=image, row=row, col=col)
    return Batch(kind, rows, seed, ids, mask, layout, all_grids, shown)


def into_stack(model: Any, inputs: dict[str, Any]) -> SimpleNamespace:
    """What a stock model hands to its decoder stack (embeds, positions), and its output."""
    caught: dict[str, Any] = {}

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        caught.update(kwargs)

    handle = stack_of(model).register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        out = model(**inputs)
    handle.remove()
    return SimpleNamespace(
        embeds=caught["inputs_embeds"], positions=caught.get("position_ids"), out=out
    )


def angles(model: Any, positions: Tensor | None, n: int) -> Tensor:
    """(B, n, R/2) rotary angles of positions (B, n), or (3 or 4, B, n)."""
    kind_config = stack_of(model).config
    settings = getattr(kind_config, "rope_parameters", None) or {}
    theta = settings.get("rope_theta") or getattr(kind_config, "rope_theta", 10000.0)
    part = settings.get("partial_rotary_factor") or getattr(
        kind_config, "partial_rotary_factor", 1.0
    )
    turned = int(HIDDEN // HEADS * part)
    inverse = 1.0 / theta ** (torch.arange(0, turned, 2).float() / turned)
    if positions is None:
        positions = torch.arange(n)[None]
    if positions.dim() == 2:
        return positions[..., None].float() * inverse
    axes = torch.tensor([0, 0, 1, 2])  # mrope_section [2, 1, 1]
    return positions[-3:].float()[axes].permute(1, 2, 0) * inverse
