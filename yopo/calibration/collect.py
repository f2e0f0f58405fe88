"""One dense pass over samples, looked at from inside: fills `Statistics`.

The model runs through yopo's own engine under a plan that prunes nothing, so that every family,
transformers version and way of saying where the image is works as it does when pruned. Nothing
n × n is ever held: queries go by in blocks (log-sum-exp over the visual keys, and over all).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from yopo.calibration.processes import in_turn, is_first
from yopo.calibration.sample_statistics import Statistics, digest_of, fingerprint
from yopo.engine import forward as engine
from yopo.engine.layer import LayerCall, Shared, Stores, signed
from yopo.engine.layer_plan import SEEN, LayerPlans
from yopo.engine.layout import VisualLayout
from yopo.engine.visual_cache import VisualCache
from yopo.errors import CannotGoOn
from yopo.models.layers import call_layer
from yopo.models.trial import decoder_of, under
from yopo.prompts.sample import Sample, prompt_of

BLOCK = 2**23  # scores held at a time
SAVE_SECONDS = 20  # between two writes of the file


def collect(
    model: nn.Module,
    samples: Iterable[Sample],
    *,
    limit: int | None = None,
    path: str | Path | None = None,
    known: Statistics | None = None,
    influence: bool = True,
    progress: bool = False,
) -> Statistics:
    """Statistics of `model`, dense whatever its plan, over `samples`, model inputs of one prompt
    each (sample.py).

    limit: take only so many. path: a file kept up to date; what is in it already is not measured
    again. known: statistics to go on from instead. influence: also measure how much visual tokens
    still matter after each layer, which costs about as much as the rest.

    Raises ValueError for samples that are none; CannotGoOn, which is one, where those known are of
    others or of another model, or the file cannot be read.
    """
    total = len(samples) if hasattr(samples, "__len__") else None
    total = min((count for count in (total, limit) if count is not None), default=None)
    with torch.no_grad(), under(model, None):
        decoder = decoder_of(model)
        sizes = decoder.config.num_attention_heads, decoder.config.intermediate_size
        empty = Statistics.empty(fingerprint(model), len(decoder.layers), *sizes)
        found = _going_on(empty, known, path)
        done, norms, saved_at = len(found), _column_norms(decoder), 0.0
        silent = not (progress and is_first())
        bar = tqdm(islice(samples, limit), "statistics", total, disable=silent, mininterval=1)
        path = path if is_first() else None

        def measured(index: int, sample: Sample) -> Statistics | None:
            inputs = prompt_of(sample)
            digest = digest_of(inputs)
            if index < done:
                _refuse_other(found, index, digest)
                return None
            try:
                return _measure(model, decoder, inputs, norms, digest, found.model, influence)
            except ValueError as error:
                raise ValueError(f"sample {index} (the first is 0): {error}") from error

        try:
            for one in in_turn(bar, measured, lambda sample: digest_of(prompt_of(sample))):
                found = found if one is None else found.then(one)
                if path is not None and time.monotonic() - saved_at > SAVE_SECONDS:
                    found.save(path)
                    saved_at = time.monotonic()
        finally:
            if path is not None and len(found) > done:
                found.save(path)
    if len(found) == 0:
        raise ValueError("there is no sample to take statistics of")
    return found


def _going_on(empty: Statistics, known: Statistics | None, path: str | Path | None) -> Statistics:
    """What is known already: `known`, what the file `path` holds, or `empty`."""
    try:
        if known is None and path is not None and Path(path).exists():
            known = Statistics.load(path)
        return empty if known is None else empty.then(known)
    except ValueError as error:
        raise CannotGoOn(str(error)) from error


def _refuse_other(found: Statistics, index: int, digest: str) -> None:
    if found.samples[index] != digest:
        raise CannotGoOn(
            f"sample {index} is not the one that the statistics were begun with: give the same "
            "samples in the same order, or start anew"
        )


def _measure(
    model: nn.Module,
    decoder: nn.Module,
    inputs: dict[str, Any],
    norms: list[Tensor],
    digest: str,
    model_mark: str,
    influence: bool,
) -> Statistics:
    """Statistics of one sample; `model` runs under a plan that prunes nothing. norms: as
    `_column_norms` of its decoder."""
    watch = _Watch(decoder, norms)
    with watch:
        logits = model(**inputs, use_cache=False).logits[0, -1]
    if not bool(logits.isfinite().all()):
        raise ValueError(
            "the dense model's logits are not finite. Look at its weights and dtype (float16 "
            "overflows in some models: try bfloat16 or float32)"
        )
    if not watch.ratios:
        raise ValueError("it shows no image: calibrating takes prompts with one")
    moved = [float("nan")] * len(decoder.layers)
    if influence:
        head = model.get_output_embeddings()
        moved = [_kl(logits, head(row)) for row in watch.without_image_from_each_layer()]
    return Statistics(
        model=model_mark,
        samples=(digest,),
        ratios=torch.stack(watch.ratios)[None],
        visual_mass=torch.stack(watch.visual_mass)[None],
        sink_sums=torch.stack(watch.sink_sums, dim=1)[None],
        text_tokens=torch.tensor([watch.text_tokens]),
        visual_tokens=torch.tensor([watch.visual_tokens]),
        influence=torch.tensor([moved], dtype=torch.float32),
        ffn_use=torch.stack(watch.ffn_use),
    )


def _column_norms(decoder: nn.Module) -> list[Tensor]:
    """For each layer the norms (I,) of down_proj's columns, float64 on the CPU; 1 where they cannot
    be read (quantised, offloaded)."""
    norms = []
    for layer in decoder.layers:
        weight = getattr(layer.mlp.down_proj, "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point() and not weight.is_meta:
            norms.append(weight.float().norm(dim=0).double().cpu())
        else:
            norms.append(torch.ones(decoder.config.intermediate_size, dtype=torch.float64))
    return norms


def _kl(reference: Tensor, logits: Tensor) -> float:
    """KL of the distribution of `logits` from that of `reference`, both (V,), in nats."""
    p, q = (x.float().log_softmax(-1) for x in (reference, logits))
    return float((p.exp() * (p - q)).sum())


class _Watch:
    """Looks on while a sample goes through the layers: use as a context manager around the pass.

    Afterwards, one entry for each layer: ratios, visual_mass (H,); sink_sums (2, H); ffn_use (I,).
    """

    def __init__(self, decoder: nn.Module, norms: list[Tensor]) -> None:
        self._decoder, self._norms = decoder, norms
        self.ratios: list[Tensor] = []
        self.visual_mass: list[Tensor] = []
        self.sink_sums: list[Tensor] = []
        self.ffn_use: list[Tensor] = []
        self.text_tokens = self.visual_tokens = 0
        self._text_rows: list[Tensor] = []  # each layer's input, (rows, d), text and visual
        self._shared: Shared | None = None

    def __enter__(self) -> _Watch:
        self._exit = ExitStack()
        token = engine.OBSERVER.set(self._attention)
        self._exit.callback(engine.OBSERVER.reset, token)
        for layer in self._decoder.layers:
            for module, look in (
                (layer.input_layernorm, self._layer_input),
                (layer.mlp.down_proj, self._neurons),
            ):
                self._exit.callback(module.register_forward_pre_hook(look).remove)
        return self

    def __exit__(self, *error: Any) -> None:
        self._exit.close()

    def _layer_input(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._text_rows.append(args[0])

    def _attention(
        self, call: LayerCall, still: Tensor, q: Tensor, visual_q: Tensor, stores: Stores
    ) -> None:
        """q (T, H, D), visual_q (V, H, D); all keys are in the first store, visual ones first."""
        shared = call.shared
        index, scale = shared.index, shared.scale
        if index.text.batch != 1:
            raise ValueError(
                f"a sample has {index.text.batch} rows; calibrating takes prompts one by one: give "
                "each a batch of its own"
            )
        if self._shared is None:
            self._shared = shared
        store = stores[SEEN]
        text_at, visual_at = (x.order[0].to(q.device) for x in (index.text, index.visual))
        keys_at = torch.cat([visual_at, text_at])
        n_visual = len(visual_at)
        behind = text_at > visual_at[0]  # the text queries with an image before them
        if not bool(behind.any()):
            raise ValueError("it has no text after the image: nothing is asked")
        keys = store.keys[0]
        of_text, of_visual = (
            log_sums(rows, at, keys, keys_at, n_visual, scale)
            for rows, at in ((q, text_at), (visual_q, visual_at))
        )
        # Both shares, as the lesser one is lost in 1 - the greater.
        received = of_text.softmax(0).sum(2) + of_visual.softmax(0).sum(2)  # (2, H)
        self.ratios.append((received[0] / received[1]).float().cpu())
        of_text = of_text[:, :, behind]
        self.visual_mass.append(of_text.softmax(0)[0].mean(1).float().cpu())
        before = (visual_at[None, :] < text_at[behind, None]).sum(1)
        weight = fit_weight(of_text)
        sums = [(weight * (of_text[0] - before.log())).sum(1), weight.sum(1)]
        self.sink_sums.append(torch.stack(sums).float().cpu())
        self.text_tokens, self.visual_tokens = int(behind.sum()), n_visual

    def _neurons(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """The hidden FFN neurons (rows, I), text first."""
        visual = args[0][-self.visual_tokens :]
        use = visual.abs().sum(0, dtype=torch.float64)
        norms = self._norms[len(self.ffn_use)]
        self.ffn_use.append(use.cpu() * norms)

    def without_image_from_each_layer(self) -> Iterable[Tensor]:
        """For each layer C the last text row (d,), normed, if visual tokens leave at C: the text
        rows alone go on from there, at the places that they have in the whole prompt."""
        shared, layers = self._shared, self._decoder.layers
        n = len(shared.index.text)
        config = self._decoder.config
        plan = self._decoder.yopo_plan
        whole = LayerPlans.build(config, plan)
        cos, sin = shared.text_angles
        angles = cos.transpose(0, 1), signed(sin).transpose(0, 1)  # negated twice
        valid = torch.ones(1, n, dtype=torch.bool, device="cpu")
        how = engine.Run(call_layer, keep_cache=False)
        for cut in range(len(layers)):
            rest = replace(whole, plans=whole.plans[cut:], dropout=0.0)
            cache = VisualCache.adopt(None, plan, 1, valid[:, :0], rest.stored)
            index = engine.prepare(VisualLayout.empty(1, n), valid, cache, plan)
            text = self._text_rows[cut][None, :n]
            rows = engine.run(layers[cut:], rest, index, text, *angles, cache, how)
            yield self._decoder.norm(rows[:, -1:])[0, -1]


def blocks(queries: int, scores_each: int) -> Iterable[slice]:
    step = max(1, BLOCK // scores_each)
    return (slice(start, start + step) for start in range(0, queries, step))


def scores_of(q: Tensor, at: Tensor, keys: Tensor, keys_at: Tensor, scale: float) -> Tensor:
    """(H, Q, K) float32 scores of q (Q, H, D) with keys (KV, K, D), -inf where a key comes later;
    at (Q,), keys_at (K,): places in the sequence."""
    q = q.transpose(0, 1).float().unflatten(0, (keys.shape[0], -1))  # (KV, H / KV, Q, D)
    scores = (q @ keys.float().transpose(1, 2)[:, None]).flatten(0, 1) * scale
    return scores.masked_fill_(keys_at[None, :] > at[:, None], -torch.inf)


def log_sums(
    q: Tensor, at: Tensor, keys: Tensor, keys_at: Tensor, n_visual: int, scale: float
) -> Tensor:
    """(2, H, Q) float64, the log-sum-exp of each query's scores with visual keys, the first
    `n_visual`, and with text keys; arguments as of `scores_of`."""
    found = []
    for block in blocks(len(q), q.shape[1] * keys.shape[1]):
        scores = scores_of(q[block], at[block], keys, keys_at, scale)
        parts = scores.tensor_split([n_visual], dim=-1)
        found.append(torch.stack([part.logsumexp(-1) for part in parts]))
    return torch.cat(found, dim=2).double()


def fit_weight(sums: Tensor) -> Tensor:
    """(H, Q) how much each query counts when a sink is fitted to its `log_sums`: by how much the
    text's part m of its softmax changes with the sink's logit, m(1 - m), and a little more: a query
    whose mass is all on one side must not be taken to the other. Of little more, 1e-4, came ten
    times the KL on the embedded model, all of it from a few such queries."""
    text = torch.sigmoid(sums[1] - sums[0])
    return text * (1 - text) + 0.03
