"""Adapters of peft itself on a pruned model: what they compute; the plan goes with them."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_checks import a_plan, mixed, some_sinks
from random_families import HERE, KINDS, build, make, stack_of
from torch import Tensor, nn

import yopo
from yopo.models.peft_adapters import PLAN_FILE
from yopo.plan.pruning_plan import PruningPlan

pytest.importorskip("torch.distributed.tensor", reason="peft needs it, and does not import it")
peft = pytest.importorskip("peft")
KIND = KINDS["llava-llama"]
if KIND.name not in HERE:
    pytest.skip("this transformers is older than the families' support", allow_module_level=True)

PLAN, OTHER = a_plan(), a_plan(window=None)
DROP = a_plan(head_mass="drop", cut_mass="drop")
IN_LAYERS = r".*language_model.*\.(?:%s)"
EVERY = IN_LAYERS % "[qkvo]_proj|gate_proj|up_proj|down_proj"
BATCH = make(KIND, mixed(KIND))
LABELS = BATCH.ids.masked_fill(BATCH.mask == 0, -100)
INPUTS = BATCH.inputs(None, positions=False)


def base(plan: PruningPlan | None = None) -> Any:
    return build(KIND) if plan is None else yopo.apply(build(KIND), plan)


def lora(**changes: Any) -> Any:
    values = dict(r=2, lora_alpha=4, target_modules=IN_LAYERS % "q_proj|down_proj")
    return peft.LoraConfig(**(values | changes))


def shaken(adapted: Any, seed: int = 5) -> Any:
    """With adapter weights that matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.data = noise if "lora_" in name else parameter.data + noise
    return adapted.eval()


def with_lora(model: Any, seed: int = 5, **changes: Any) -> Any:
    return shaken(peft.get_peft_model(model, lora(**changes)), seed)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(**INPUTS).logits[BATCH.mask.bool()]


def runs_as(model: Any, plan: PruningPlan | None, like: Tensor) -> bool:
    return yopo.plan_of(model) == plan and torch.equal(logits(model), like)


# ------------------------------------------------------------------------------- what they compute

TUNERS: dict[str, Callable[[], Any]] = {
    "q and down": lora,
    "every projection": lambda: lora(target_modules=EVERY),
    "one layer": lambda: lora(target_modules=r".*language_model.*layers\.1\..*(?:k|up)_proj"),
    "DoRA": lambda: lora(target_modules=EVERY, use_dora=True),
    "rsLoRA": lambda: lora(use_rslora=True),
    "a head of its own": lambda: lora(modules_to_save=["lm_head"]),
    "norms of its own": lambda: lora(modules_to_save=["post_attention_layernorm"]),
    "a projection of its own": lambda: lora(modules_to_save=["v_proj"]),
    "embeddings": lambda: lora(target_modules=["embed_tokens", "v_proj"]),
    "IA3": lambda: peft.IA3Config(
        target_modules=IN_LAYERS % "[kv]_proj|down_proj",
        feedforward_modules=IN_LAYERS % "down_proj",
    ),
    "OFT": lambda: peft.OFTConfig(target_modules=IN_LAYERS % "[qo]_proj", oft_block_size=4),
}


@pytest.mark.parametrize("plan", [PLAN, DROP], ids=["exact", "drop"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("tuner", TUNERS)
def test_an_adapter_is_as_merged(tuner: str, when: str, plan: PruningPlan) -> None:
    if when == "before":
        adapted = yopo.apply(shaken(peft.get_peft_model(base(), TUNERS[tuner]())), plan)
    else:
        adapted = shaken(peft.get_peft_model(base(plan), TUNERS[tuner]()))
    found = logits(adapted)
    with adapted.disable_adapter():
        assert (logits(adapted) - found).abs().max() > 0.05, "the adapter does nothing"
        assert (logits(adapted) - logits(base(plan))).abs().max() < 1e-5
    merged = adapted.merge_and_unload()
    assert yopo.plan_of(merged) == plan
    assert (logits(merged) - found).abs().max() < 1e-3
    dense = logits(yopo.remove(copy.deepcopy(merged)))
    assert (dense - found).abs().max() > 0.05, "the plan does nothing"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("plan", [PLAN, DROP], ids=["exact", "drop"])
def test_an_adapter_trains_as_its_merged_weights_would(
    plan: PruningPlan, checkpointing: bool
) -> None:
    adapted = with_lora(base(plan), target_modules=EVERY).train()
    if checkpointing:
        adapted.gradient_checkpointing_enable()
    adapted(**INPUTS, labels=LABELS, use_cache=False).loss.backward()
    merged = copy.deepcopy(adapted).merge_and_unload().train().requires_grad_()
    merged.zero_grad()
    merged(**INPUTS, labels=LABELS, use_cache=False).loss.backward()
    seen = 0
    for name, module in adapted.get_base_model().named_modules():
        if not hasattr(module, "lora_A"):
            continue
        down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
        whole = 2.0 * merged.get_submodule(name).weight.grad  # lora_alpha / r
        assert (down.grad - up.T @ whole).abs().max() < 1e-4, name
        assert (up.grad - whole @ down.T).abs().max() < 1e-4, name
        seen += 1
    assert seen == 7 * len(stack_of(merged).layers)


def test_a_second_adapter_and_a_change_between_them() -> None:
    alone = [logits(with_lora(base(PLAN), seed)) for seed in (1, 2)]
    adapted = with_lora(base(PLAN), 1)
    adapted.add_adapter("second", lora())
    adapted.set_adapter("second")
    shaken(adapted, 2)
    assert torch.equal(logits(adapted), alone[1])
    adapted.set_adapter("default")
    assert torch.equal(logits(adapted), alone[0])
    adapted.merge_adapter()
    assert (logits(adapted) - alone[0]).abs().max() < 1e-3
    adapted.unmerge_adapter()
    assert (logits(adapted) - alone[0]).abs().max() < 1e-4


@pytest.mark.parametrize("part", ["mlp", "self_attn"])
def test_whole_parts_of_layers_kept_by_an_adapter(part: str) -> None:
    """Copies of them are pruned, whether made before the plan or after."""
    other = "o_proj" if part == "mlp" else "up_proj"
    config = lora(target_modules=IN_LAYERS % other, modules_to_save=[part])
    adapted = shaken(peft.get_peft_model(base(PLAN), config))
    earlier = shaken(peft.get_peft_model(base(), config))
    dense = logits(earlier)
    assert torch.equal(logits(yopo.apply(earlier, PLAN)), logits(adapted))
    assert torch.equal(logits(yopo.remove(earlier)), dense)
    found = logits(adapted)
    assert (logits(adapted.merge_and_unload()) - found).abs().max() < 1e-3
    assert (found - logits(base(PLAN))).abs().max() > 0.05


def two_adapters(model: Any) -> Any:
    adapted = with_lora(model, 1)
    adapted.add_adapter("second", lora())
    adapted.set_adapter("second")
    return shaken(adapted, 2)


def test_an_adapter_for_each_row_is_refused_at_an_image_and_stock_without() -> None:
    adapted = two_adapters(base(PLAN))
    names = ["default", "second", "default"]
    with pytest.raises(ValueError, match=r"adapter_names treats each row .* \(model.set_adapter\)"):
        adapted(**INPUTS, adapter_names=names)
    text = dict(input_ids=BATCH.ids[1:2, :6].expand(3, -1), adapter_names=names)
    assert torch.equal(adapted(**text).logits, two_adapters(base())(**text).logits)
    assert logits(adapted).isfinite().all()  # what was refused leaves nothing behind


def test_an_adapter_for_the_end_of_each_row_is_refused_at_an_image_and_stock_without() -> None:
    """aLoRA: from certain tokens of a prompt on."""
    if "alora_invocation_tokens" not in inspect.signature(peft.LoraConfig).parameters:
        pytest.skip("this peft has no aLoRA")
    last = int(BATCH.ids[0][BATCH.mask[0] == 1][-1])
    config = dict(alora_invocation_tokens=[last], task_type="CAUSAL_LM")
    adapted = with_lora(base(PLAN), **config)
    with pytest.raises(ValueError, match="alora_offsets treats each row"):
        adapted(**INPUTS)
    text = dict(input_ids=BATCH.ids[1:2, :6])
    assert torch.equal(adapted(**text).logits, with_lora(base(), **config)(**text).logits)


def test_adapters_that_are_mixed_by_row_are_refused_at_an_image() -> None:
    config = peft.PolyConfig(target_modules=EVERY, r=2, n_tasks=2, task_type="CAUSAL_LM")
    adapted = shaken(peft.get_peft_model(base(PLAN), config))
    tasks = torch.tensor([0, 1, 0])
    with pytest.raises(ValueError, match="the adapter of type POLY treats each row"):
        adapted(**INPUTS, task_ids=tasks)
    with adapted.disable_adapter():
        assert (logits(adapted) - logits(base(PLAN))).abs().max() < 1e-5


def test_eight_threads_are_one_after_the_other() -> None:
    adapted = with_lora(base(PLAN), target_modules=EVERY)
    made = [make(KIND, mixed(KIND), seed=seed) for seed in range(4)]
    batches = [batch.inputs(None, positions=False) for batch in made]

    def run(number: int) -> Tensor:
        with torch.no_grad():
            return adapted(**batches[number % len(batches)]).logits

    expected = [run(number) for number in range(len(batches))]
    with ThreadPoolExecutor(8) as pool:
        for number, found in enumerate(pool.map(run, range(24))):
            assert torch.equal(found, expected[number % len(batches)])


def test_trained_prompts_go_before_the_image() -> None:
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=2,
        token_dim=32,
        num_layers=3,
        num_attention_heads=4,
    )
    adapted = shaken(peft.get_peft_model(base(PLAN), config))
    with torch.no_grad():
        found = adapted(**INPUTS).logits[:, 2:]
        inner = adapted.get_base_model()
        features = inner.get_image_features(INPUTS["pixel_values"], return_dict=True).pooler_output
        embeds = inner.get_input_embeddings()(BATCH.ids)
        embeds[BATCH.layout.visual] = torch.cat(list(features))
        prompt = adapted.get_prompt(len(BATCH.ids))
        ours = stack_of(inner)(
            inputs_embeds=torch.cat([prompt, embeds], dim=1),
            attention_mask=nn.functional.pad(BATCH.mask, (2, 0), value=1),
            visual_mask=nn.functional.pad(BATCH.layout.visual, (2, 0)),
            visual_grids=BATCH.grids,
        ).last_hidden_state[:, 2:]
        expected = inner.lm_head(ours)
    valid = BATCH.mask.bool()
    assert (found - expected)[valid].abs().max() < 1e-5


def test_an_adapter_on_four_bit_weights(tmp_path: Path) -> None:
    """bitsandbytes' layers are called, with all rows: as the same weights, dequantised."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base().save_pretrained(tmp_path / "base")
    load = partial(type(base()).from_pretrained, tmp_path / "base", quantization_config=bits)
    plain = yopo.apply(load().dequantize().float().eval(), PLAN)
    assert type(stack_of(plain).layers[0].mlp.up_proj) is nn.Linear
    quantised = yopo.apply(load().eval(), PLAN)
    assert (logits(quantised) - logits(plain)).abs().max() < 1e-4
    found = []
    for model in (quantised, plain):
        adapted = with_lora(peft.prepare_model_for_kbit_training(model), target_modules=EVERY)
        adapted.train()(**INPUTS, labels=LABELS, use_cache=False).loss.backward()
        found.append([p.grad for name, p in adapted.named_parameters() if "lora_" in name])
    assert len(found[0]) == 2 * 7 * len(stack_of(plain).layers)
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(*found, strict=True))
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(load(), tmp_path / "adapter")
    assert yopo.plan_of(loaded) == PLAN


# ------------------------------------------------------------------------- the plan goes with them


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """A dense model, and an adapter that was made on it under PLAN."""
    base().save_pretrained(tmp_path / "base")
    model = type(base()).from_pretrained(tmp_path / "base")
    with_lora(yopo.apply(model, PLAN)).save_pretrained(tmp_path / "adapter")
    return {name: tmp_path / name for name in ("base", "adapter")}


@pytest.fixture
def answer() -> Tensor:
    return logits(with_lora(base(PLAN)))


def by_peft(adapter: Path) -> Any:
    return peft.PeftModel.from_pretrained(base(), adapter)


def by_name(adapter: Path) -> Any:
    """As a second one."""
    adapted = with_lora(base(), 9)
    adapted.load_adapter(str(adapter), "mine")
    adapted.set_adapter("mine")
    return adapted


def by_mixed_model(adapter: Path) -> Any:
    return peft.PeftMixedModel.from_pretrained(base(), str(adapter))


def by_transformers(adapter: Path) -> Any:
    model = base()
    model.load_adapter(str(adapter))
    return model


def by_transformers_at_once(adapter: Path) -> Any:
    return type(base()).from_pretrained(adapter)


@pytest.mark.parametrize(
    "load", [by_peft, by_name, by_mixed_model, by_transformers, by_transformers_at_once]
)
def test_a_plan_comes_with_its_adapter(
    load: Callable[[Path], Any], folders: dict[str, Path], answer: Tensor
) -> None:
    assert PruningPlan.load(folders["adapter"] / PLAN_FILE) == PLAN
    loaded = load(folders["adapter"]).eval()
    assert runs_as(loaded, PLAN, answer)
    outer = next(module for module in loaded.modules() if isinstance(module, type(base())))
    assert PruningPlan.from_config(outer.config) == PLAN


def save_by_transformers(model: Any, folder: Path) -> None:
    try:
        model.active_adapters()  # save_pretrained asks for them
    except ValueError as error:
        pytest.skip(f"this transformers wants a newer peft than there may be: {error}")
    model.save_pretrained(folder)


def test_transformers_own_adapters_take_the_plan_along(
    folders: dict[str, Path], answer: Tensor, tmp_path: Path
) -> None:
    save_by_transformers(by_transformers(folders["adapter"]), tmp_path / "again")
    assert (tmp_path / "again" / "adapter_config.json").exists()
    assert runs_as(by_peft(tmp_path / "again").eval(), PLAN, answer)


def test_sinks_come_with_the_adapter(tmp_path: Path) -> None:
    plan = a_plan(head_mass="sink", cut_mass="sink", sinks=some_sinks(KIND))
    adapted = with_lora(base(plan))
    found = logits(adapted)
    adapted.save_pretrained(tmp_path / "by peft")
    loaded = by_transformers(tmp_path / "by peft").eval()
    assert runs_as(loaded, plan, found)
    save_by_transformers(loaded, tmp_path / "by transformers")
    assert runs_as(by_peft(tmp_path / "by transformers").eval(), plan, found)


def test_a_model_under_the_plan_already_keeps_it(folders: dict[str, Path], answer: Tensor) -> None:
    loaded = peft.PeftModel.from_pretrained(base(PLAN), folders["adapter"]).eval()
    assert runs_as(loaded, PLAN, answer)


def test_each_adapter_has_the_plan_where_it_is_saved(tmp_path: Path) -> None:
    adapted = two_adapters(base(PLAN))
    adapted.save_pretrained(tmp_path)
    found = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob(PLAN_FILE))
    assert found == sorted([PLAN_FILE, f"second/{PLAN_FILE}"])
    adapted.save_pretrained(tmp_path / "one", selected_adapters=["second"])
    assert [*(tmp_path / "one").rglob(PLAN_FILE)] == [tmp_path / "one" / "second" / PLAN_FILE]
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path, subfolder="second")
    assert yopo.plan_of(loaded) == PLAN


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    with_lora(base(PLAN)).save_pretrained(tmp_path, is_main_process=False)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_without_a_plan_nothing_is_written_or_changed(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    adapted = with_lora(base())
    adapted.save_pretrained(tmp_path / "dense")
    assert not (tmp_path / "dense" / PLAN_FILE).exists()
    loaded = by_peft(tmp_path / "dense").eval()
    assert runs_as(loaded, None, logits(adapted))
    pruned = peft.PeftModel.from_pretrained(base(PLAN), tmp_path / "dense")
    assert yopo.plan_of(pruned) == PLAN
    adapted.save_pretrained(folders["adapter"])  # over one that was made under a plan
    assert runs_as(by_peft(folders["adapter"]).eval(), None, logits(adapted))


@pytest.mark.parametrize("how", ["from_pretrained", "load_adapter", "transformers"])
def test_another_plan_is_refused_and_the_model_left_as_it_was(
    how: str, folders: dict[str, Path]
) -> None:
    model = base(OTHER)
    if how == "load_adapter":
        model = with_lora(model)
    before, names = logits(model), [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError) as raised:
        if how == "from_pretrained":
            peft.PeftModel.from_pretrained(model, folders["adapter"])
        elif how == "load_adapter":
            model.load_adapter(folders["adapter"], "mine")
        else:
            model.load_adapter(str(folders["adapter"]))
    said = str(raised.value)
    assert str(folders["adapter"] / PLAN_FILE) in said and "yopo.remove" in said
    assert PLAN.summary() in said and OTHER.summary() in said
    assert [name for name, _ in model.named_modules()] == names
    assert runs_as(model, OTHER, before)


def test_a_plan_that_cannot_be_put_on_is_an_error(tmp_path: Path) -> None:
    with_lora(base(PLAN)).save_pretrained(tmp_path)
    a_plan(head_mass="drop").save(tmp_path / PLAN_FILE)
    PruningPlan(torch.ones(2, 4)).save(tmp_path / PLAN_FILE)
    with pytest.raises(ValueError, match=f"{PLAN_FILE}, which cannot be put on this model: head"):
        by_peft(tmp_path)
    (tmp_path / PLAN_FILE).write_text("{")
    with pytest.raises(ValueError, match=f"no plan can be read from .*{PLAN_FILE}"):
        by_peft(tmp_path)
    unknown = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), lora(target_modules=["0"]))
    unknown.save_pretrained(tmp_path / "linear")
    PLAN.save(tmp_path / "linear" / PLAN_FILE)
    with pytest.raises(ValueError, match="this model: yopo cannot prune a PeftModel"):
        peft.PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 4)), tmp_path / "linear")


def test_the_mass_of_the_environment_is_not_written_but_used(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("YOPO_MASS", "drop")
    answer = logits(with_lora(base(DROP)))
    loaded = by_peft(folders["adapter"]).eval()
    assert runs_as(loaded, DROP, answer)
    base(PLAN).save_pretrained(tmp_path / "pruned")
    from yopo import patch

    try:
        patch.enable()
        pruned = type(base()).from_pretrained(tmp_path / "pruned")
        adapted = peft.PeftModel.from_pretrained(pruned, folders["adapter"]).eval()
        assert runs_as(adapted, DROP, answer)
        adapted.save_pretrained(tmp_path / "again")
    finally:
        patch.undo()
    assert PruningPlan.load(tmp_path / "again" / PLAN_FILE) == PLAN


def test_methods_are_wrapped_once_and_transformers_left_alone_by_undo() -> None:
    from transformers import PreTrainedModel

    from yopo import patch

    patch.enable()
    patch.undo()
    assert not hasattr(PreTrainedModel.save_pretrained, "_yopo_stock")
    assert not hasattr(PreTrainedModel.load_adapter, "_yopo_stock")
    base(PLAN)
    yopo.apply(base(), PLAN)
    for method in (PreTrainedModel.save_pretrained, peft.PeftModel.load_adapter):
        assert not hasattr(method._yopo_stock, "_yopo_stock")
        assert method.__doc__ == method._yopo_stock.__doc__


@pytest.mark.slow
def test_it_does_not_matter_when_peft_is_imported(folders: dict[str, Path]) -> None:
    script = """
        import sys
        import yopo.patch
        from transformers import LlavaForConditionalGeneration
        model = LlavaForConditionalGeneration.from_pretrained(sys.argv[1])
        assert "peft" not in sys.modules
        import torch.distributed.tensor
        from peft import PeftModel
        print(yopo.plan_of(PeftModel.from_pretrained(model, sys.argv[2])).summary())
    """
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), *folders.values()],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == PLAN.summary().strip()
