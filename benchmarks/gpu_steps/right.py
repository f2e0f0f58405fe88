"""Step 1: is what the device computes right? Against the released code's recorded outputs and the
dense oracle of the tests (on the CPU, in float64), on tiny models; no time is measured here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import yopo
from gpu_steps.arms import FUSED, GRAPHED, NEEDED
from gpu_steps.clock import Deadline
from gpu_steps.journal import TIME_IS_UP
from gpu_steps.scale import Scale
from gpu_steps.session import Session
from gpu_steps.tables import ABSENT, FAILED, OK, SKIPPED
from gpu_steps.watch import Watch

SHARE = 60.0
# The largest difference allowed of any number: logits are of order one. TF32 would be above.
GOLDEN, FLOAT32 = 1e-3, 1e-4
BFLOAT16 = 0.05  # of a layout's logits, the norm of the error over that of the logits
GENERATED = 32
DECODED = 4  # steps after a prefill, where two ways to run are compared
MASSES = ("exact", "drop", "exact/drop", "sink")

Row = dict[str, Any]


def shares(scale: Scale) -> dict[str, float]:
    return {"right": SHARE}


def step(session: Session) -> None:
    deadline = session.clock.deadline("right")
    torch.set_float32_matmul_precision("highest")  # no TF32
    for name, work in _checks(session, deadline):
        if deadline.over:
            session.journal.add("right", name, SKIPPED, note=TIME_IS_UP)
        else:
            session.journal.attempt("right", name, work)


def _checks(session: Session, deadline: Deadline) -> list[tuple[str, Callable[[], Row]]]:
    from golden_files import CASES

    device, count = session.device, session.scale.layouts
    goldens = [(f"golden file {name}", partial(golden, name, device)) for name in CASES]
    layouts = [
        (f"random layouts, {name}", partial(random_layouts, dtype, count, device, deadline))
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    ]
    return [
        *goldens,
        ("live = fused", partial(live_is_fused, device)),
        ("live = graphed", partial(live_is_graphed, device)),
        (f"generate {GENERATED} tokens", partial(generates, device)),
        *(
            (f"no synchronisation in the layers, {mass}", partial(no_synchronisation, mass, device))
            for mass in MASSES
        ),
        *layouts,  # last: as many as there is time for
    ]


def judged(worst: float, allowed: float, **figures: Any) -> Row:
    """NaN is above any bound."""
    good = worst <= allowed
    row = {"worst": worst, "allowed": allowed, "status": OK if good else FAILED, **figures}
    return row if good else {**row, "error": f"differs by {worst:.3g}, allowed are {allowed:g}"}


def _worst(differences: list[float]) -> float:
    """The largest; NaN, if there is one."""
    return max(differences, key=lambda x: float("inf") if math.isnan(x) else x)


def _apart(ours: Tensor, truth: Tensor) -> float:
    """The largest difference. Raises ValueError where the shapes differ."""
    if ours.shape != truth.shape:
        raise ValueError(f"the shape is {tuple(ours.shape)}, expected {tuple(truth.shape)}")
    apart = (ours.detach().cpu().double() - truth.double()).abs()
    return math.nan if apart.isnan().any() else apart.max().item()


@torch.no_grad()
def golden(name: str, device: torch.device) -> Row:
    """Prefill, all rows of the last layer and those recorded of the others; decode with a cache."""
    from golden_files import GOLDEN as FOLDER
    from golden_files import one_image, plan_of, read
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    record, tensors = read(name)
    model = LlamaForCausalLM(LlamaConfig(**record["model"], eos_token_id=None, pad_token_id=0))
    model.load_state_dict(load_file(FOLDER / record["weights_file"]), strict=False)
    yopo.apply(model.eval().to(device), plan_of(record, tensors))
    embeds, grid = tensors["inputs_embeds"], tuple(record["grid"])
    batch, n, _ = embeds.shape
    out = model(
        inputs_embeds=embeds.to(device),
        visual_mask=one_image(batch, n, record["S"], grid).visual.to(device),
        visual_grids=[[grid]] * batch,
        output_hidden_states=True,
        use_cache=True,
    )
    states = out.hidden_states
    apart = [_apart(out.logits, tensors["logits"])]
    apart.append(_apart(states[-1], tensors["last_hidden_state"]))
    rows = tensors["hidden_rows"].to(device)
    for index, truth in enumerate(tensors["layer_hidden"]):
        apart.append(_apart(states[index + 1][:, rows], truth))
    for number in range(record["decode_steps"]):
        token = tensors["decode_tokens"][:, number : number + 1].to(device)
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        apart.append(_apart(out.logits[:, 0], tensors["decode_logits"][:, number]))
    return judged(_worst(apart), GOLDEN)


def _model(shape: Any, plan: yopo.PruningPlan, dtype: torch.dtype, device: torch.device) -> Any:
    """A tiny model of tests/support under `plan`."""
    from layouts import build
    from transformers import LlamaForCausalLM

    return yopo.apply(build(shape, cls=LlamaForCausalLM).to(dtype).to(device), plan)


def _given(case: Any, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What forward is given of a case of tests/support."""
    tensors = {k: v.to(device) for k, v in case.kwargs().items() if isinstance(v, Tensor)}
    tensors["inputs_embeds"] = tensors["inputs_embeds"].to(dtype)
    return {**case.kwargs(), **tensors}


def random_layouts(dtype: torch.dtype, count: int, device: torch.device, deadline: Deadline) -> Row:
    """Random batches, plans and shapes of the tests, in half of the time that is left."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st
    from layouts import cases, plans, shapes

    end, found = deadline.half(), []

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def look(data: Any) -> None:
        shape = data.draw(shapes())
        plan = data.draw(plans(shape))
        case = data.draw(cases(shape.heads * 8))
        if not end.over:
            found.append(_off(shape, plan, case, dtype, device))

    look()
    if not found:
        return {"status": SKIPPED, "note": TIME_IS_UP}
    return judged(
        _worst(found), FLOAT32 if dtype == torch.float32 else BFLOAT16, layouts=len(found)
    )


@torch.no_grad()
def _off(
    shape: Any, plan: yopo.PruningPlan, case: Any, dtype: torch.dtype, device: torch.device
) -> float:
    """How far a prefill is from the oracle's with the same weights: the largest difference of any
    logit or hidden state of float32, the relative error of the logits of bfloat16."""
    from layouts import build
    from oracle import oracle_forward
    from transformers import LlamaForCausalLM

    given = _given(case, dtype, device)
    model = _model(shape, plan, dtype, device)
    out = model(**given, output_hidden_states=True, use_cache=False)
    exact = build(shape, cls=LlamaForCausalLM).to(dtype)  # on the CPU
    embeds = given["inputs_embeds"].cpu()
    truth = oracle_forward(exact, plan, embeds, case.layout, case.attention_mask, case.position_ids)
    if dtype == torch.float32:
        pairs = [
            (out.logits, truth.logits),
            *zip(out.hidden_states, truth.hidden_states, strict=True),
        ]
        return _worst([_apart(ours.cpu()[case.valid], t[case.valid]) for ours, t in pairs])
    error = out.logits.cpu().double() - truth.logits
    return (error[case.valid].norm() / truth.logits[case.valid].norm()).item()


@torch.no_grad()
def live_is_fused(device: torch.device) -> Row:
    """A prefill and some steps, weights live and fused."""
    from layouts import SHAPE, a_plan, left_padded

    if not hasattr(yopo, NEEDED[FUSED]):
        return {"status": ABSENT, "note": f"there is no yopo.{NEEDED[FUSED]}"}
    case, apart = left_padded(), []
    for mass in ("exact", "drop"):
        model = _model(SHAPE, a_plan(mass, mass), torch.float32, device)
        live = _logits(model, case, device)
        yopo.fuse(model)
        apart.append(_apart(_logits(model, case, device), live))
        yopo.unfuse(model)
    return judged(_worst(apart), FLOAT32)


@torch.no_grad()
def live_is_graphed(device: torch.device) -> Row:
    """The same with captured steps; on a CPU they run uncaptured."""
    from layouts import SHAPE, a_plan, make_case, random_sinks

    if not hasattr(yopo, NEEDED[GRAPHED]):
        return {"status": ABSENT, "note": f"there is no yopo.{NEEDED[GRAPHED]}"}
    shape = replace(SHAPE, kv_heads=SHAPE.heads)
    rows = [("text", 3), ("image", 2, 3, False), ("text", 2)]
    case, apart = make_case([rows] * 2, shape.heads * 8), []
    for mass in ("drop", "sink"):
        plan = a_plan(sinks=random_sinks(shape, 3, True)).with_mass(mass)
        model = _model(shape, plan, torch.float32, device)
        live = _logits(model, case, device)
        yopo.graphed(model)
        apart += [_apart(_logits(model, case, device), live) for _ in range(2)]
    return judged(_worst(apart), FLOAT32)


def _logits(model: Any, case: Any, device: torch.device) -> Tensor:
    """(B, n + DECODED, V) on the CPU; every step is given token 1."""
    given = _given(case, torch.float32, device)
    out = model(**given, use_cache=True)
    logits, mask = [out.logits], given["attention_mask"]
    token = torch.ones(len(mask), 1, dtype=torch.long, device=device)
    for _ in range(DECODED):
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        out = model(
            input_ids=token,
            attention_mask=mask,
            past_key_values=out.past_key_values,
            use_cache=True,
        )
        logits.append(out.logits)
    return torch.cat(logits, dim=1).cpu()


@torch.no_grad()
def generates(device: torch.device) -> Row:
    """Greedy tokens of a batch padded on the left: those of the oracle, which recomputes all."""
    from layouts import SHAPE, a_plan, build, left_padded
    from oracle import oracle_greedy
    from transformers import LlamaForCausalLM

    case, plan = left_padded(), a_plan("exact", "drop")
    model = _model(SHAPE, plan, torch.float32, device)
    given = _given(case, torch.float32, device)
    given.pop("position_ids")
    out = model.generate(**given, max_new_tokens=GENERATED, do_sample=False)
    ours = out[:, -GENERATED:].cpu()  # 4.36 puts the bos token first
    exact = build(SHAPE, cls=LlamaForCausalLM)
    truth = oracle_greedy(
        exact, plan, case.inputs_embeds, case.layout, GENERATED, case.attention_mask
    )
    return judged(float((ours != truth).sum()), 0.0)


def no_synchronisation(mass: str, device: torch.device) -> Row:
    """In no layer of a prefill and a decode step the host waits for the device."""
    if device.type != "cuda":
        return {"status": SKIPPED, "note": "not on a CPU"}
    return watched(mass, device)


@torch.no_grad()
def watched(mass: str, device: torch.device) -> Row:
    """Runs a prefill and some steps; raises RuntimeError where the host waits in a layer."""
    from layouts import SHAPE, a_plan, left_padded, random_sinks

    plan = a_plan(sinks=random_sinks(SHAPE, 3, True)).with_mass(mass)
    model, case = _model(SHAPE, plan, torch.float32, device), left_padded()
    _logits(model, case, device)  # what is once for a model, its index tensors on the device
    with Watch(model.model.layers) as watch:
        _logits(model, case, device)
    if watch.calls != SHAPE.layers * (1 + DECODED):
        raise RuntimeError(f"the layers were called {watch.calls} times: not all was watched")
    return {"calls": watch.calls}
