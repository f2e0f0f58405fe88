"""yopo.patch prunes models as they are built or loaded, and touches nothing else; which versions
are refused."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from layouts import make_case
from oracle import oracle_forward
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import yopo
from yopo import modeling_llama_prune as ours
from yopo import versions as _compat
from yopo.models import probe
from yopo.models.decoder import PrunedDecoder
from yopo.plan.pruning_plan import PruningPlan

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("transformers", "transformers.models.llama", "transformers.models.llama.modeling_llama")
NAMES = ("LlamaModel", "LlamaForCausalLM")
METHODS = ("post_init", "from_pretrained")
CONFIG = dict(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
)
PLAN = PruningPlan(torch.tensor([[1, 0], [0, 1]]), window=3, layer_cut=1)


def names() -> list[Any]:
    return [getattr(sys.modules[module], name) for module in MODULES for name in NAMES]


def methods() -> list[Any]:
    return [vars(PreTrainedModel)[name] for name in METHODS]


STOCK_NAMES, STOCK_METHODS = names(), methods()  # at collection: nothing may have been patched yet
StockLlama, StockCausalLM = STOCK_NAMES[:2]


@pytest.fixture
def patch() -> Iterator[Any]:
    """The module, enabled; undone afterwards."""
    import yopo.patch

    yopo.patch.enable()
    yield yopo.patch
    yopo.patch.undo()
    assert methods() == STOCK_METHODS


def is_in() -> bool:
    """Whether the patch is; the names of transformers' classes it never touches."""
    assert names() == STOCK_NAMES
    replaced = [a is not b for a, b in zip(methods(), STOCK_METHODS, strict=True)]
    assert all(replaced) or not any(replaced)
    return all(replaced)


def config_with(plan: PruningPlan | None, **more: Any) -> LlamaConfig:
    config = LlamaConfig(**CONFIG, **more)
    if plan is not None:
        plan.save_to(config)
    return config


def is_stock(model: Any, cls: type) -> bool:
    inner = getattr(model, "model", model)
    return type(model) is cls and type(inner) is StockLlama and yopo.plan_of(model) is None


def is_pruned(model: Any, cls: type, plan: PruningPlan = PLAN) -> bool:
    """By the plan, and really: an image's logits are the oracle's."""
    assert isinstance(model, cls) and type(model).__name__ == cls.__name__
    assert yopo.plan_of(model) == plan
    case = make_case([[("text", 2), ("image", 2, 2, False), ("text", 3)]], 16)
    with torch.no_grad():
        got = model.eval()(**case.kwargs())[0]
    if isinstance(model, PrunedDecoder):
        return bool(got.isfinite().all())
    truth = oracle_forward(model, plan, case.inputs_embeds, case.layout).logits
    return bool((got - truth).abs().max() < 1e-4)


def test_enable_and_undo_any_number_of_times(patch: Any) -> None:
    assert is_in()
    patch.enable()
    assert is_in()
    patch.undo()
    assert not is_in()
    patch.undo()
    assert not is_in()


def test_patched_leaves_things_as_they_were(patch: Any) -> None:
    with patch.patched():
        assert is_in()
    assert is_in()  # it was enabled before
    patch.undo()
    with pytest.raises(KeyError), patch.patched():
        assert is_in()
        raise KeyError
    assert not is_in()


def test_undo_leaves_a_wrapper_that_somebody_put_on_since(patch: Any) -> None:
    ours, calls = vars(PreTrainedModel)["post_init"], []

    @functools.wraps(ours)
    def theirs(self: Any) -> None:
        calls.append(type(self))
        ours(self)

    PreTrainedModel.post_init = theirs
    try:
        patch.undo()
        assert vars(PreTrainedModel)["post_init"] is theirs
        assert is_stock(StockCausalLM(config_with(PLAN)), StockCausalLM) and calls
        patch.enable()
        assert is_pruned(StockCausalLM(config_with(PLAN)), StockCausalLM)
        patch.undo()
        assert vars(PreTrainedModel)["post_init"] is theirs
    finally:
        PreTrainedModel.post_init = STOCK_METHODS[0]
    assert methods() == STOCK_METHODS


def test_the_plan_in_the_config_decides(patch: Any, tmp_path: Path) -> None:
    folders = {}
    for name, plan in (("dense", None), ("pruned", PLAN)):
        patch.undo()
        stock = AutoModelForCausalLM.from_config(config_with(plan))
        assert is_stock(stock, StockCausalLM)
        folders[name] = tmp_path / name
        stock.save_pretrained(folders[name])
    patch.enable()
    for load in (AutoModelForCausalLM.from_pretrained, StockCausalLM.from_pretrained):
        assert is_stock(load(folders["dense"]), StockCausalLM)
        assert is_pruned(load(folders["pruned"]), StockCausalLM)
    assert is_stock(AutoModel.from_pretrained(folders["dense"]), StockLlama)
    assert is_pruned(AutoModel.from_pretrained(folders["pruned"]), StockLlama)
    assert is_stock(AutoModelForCausalLM.from_config(config_with(None)), StockCausalLM)
    assert is_pruned(AutoModelForCausalLM.from_config(config_with(PLAN)), StockCausalLM)
    assert is_pruned(StockLlama(config_with(PLAN)), StockLlama)
    model, info = StockCausalLM.from_pretrained(folders["pruned"], output_loading_info=True)
    assert is_pruned(model, StockCausalLM) and not info["missing_keys"]
    patch.undo()
    assert is_stock(AutoModelForCausalLM.from_pretrained(folders["dense"]), StockCausalLM)
    # What was loaded meanwhile goes on by its plan.
    assert is_pruned(model, StockCausalLM)


def like_llava() -> type:
    """A class built as LLaVA builds its own."""

    class Model(transformers.LlamaModel):
        pass

    class CausalLM(transformers.LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super(transformers.LlamaForCausalLM, self).__init__(config)
            self.model = Model(config)
            self.vocab_size = config.vocab_size
            self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

    return CausalLM


@pytest.mark.parametrize("plan", [None, PLAN])
@pytest.mark.parametrize("cls", [transformers.LlamaForCausalLM, like_llava()])
def test_seeded_construction(patch: Any, cls: type, plan: PruningPlan | None) -> None:
    """Of classes defined before the patch came in, too."""
    states, after = [], []
    for enabled in (True, False):
        if not enabled:
            patch.undo()
        torch.manual_seed(4)
        model = cls(config_with(plan))
        assert (yopo.plan_of(model) == plan) == (enabled or plan is None)
        states.append(model.state_dict())
        after.append(torch.rand(3))
        ids = torch.tensor([[1, 2, 3]])
        assert model.eval()(ids).logits.shape == (1, 3, 31)
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert torch.equal(*after)


def test_a_class_may_go_on_building_after_post_init(patch: Any) -> None:
    """Or come by it twice, with another decoder."""

    class Longer(transformers.LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.first, self.model = self.model, transformers.LlamaModel(config)
            self.post_init()
            self.extra = torch.nn.Linear(2, 2)

    model = Longer(config_with(PLAN))
    assert is_pruned(model, Longer)
    assert isinstance(model.extra, torch.nn.Linear) and isinstance(model, StockCausalLM)


def test_a_model_that_comes_by_no_post_init_is_pruned_when_loaded(
    patch: Any, tmp_path: Path
) -> None:
    class Own(transformers.LlamaForCausalLM):
        post_init = vars(PreTrainedModel)["post_init"].__wrapped__  # as it was before the patch

    Own(config_with(PLAN)).save_pretrained(tmp_path)
    assert is_pruned(Own.from_pretrained(tmp_path), Own)


@pytest.mark.parametrize("how", ["from_pretrained", "from_config"])
@pytest.mark.parametrize(
    ("name", "auto"),
    [
        ("MistralForCausalLM", "AutoModelForCausalLM"),  # around a decoder that is known
        ("LlamaForSequenceClassification", "AutoModelForSequenceClassification"),
        ("OPTForCausalLM", "AutoModelForCausalLM"),
        ("BloomForCausalLM", "AutoModelForCausalLM"),
    ],
)
def test_a_plan_in_an_unknown_class_is_an_error_that_names_it(
    patch: Any, tmp_path: Path, name: str, auto: str, how: str
) -> None:
    cls = getattr(transformers, name)
    sizes = dict(CONFIG, ffn_dim=24, word_embed_proj_dim=16, n_layer=2, n_head=2, pad_token_id=0)
    config = cls.config_class(**sizes)
    config.intermediate_size = 24  # which a plan asks for, and Bloom's config lacks
    assert type(cls(config)) is cls
    patch.undo()
    PLAN.save_to(config)
    cls(config).save_pretrained(tmp_path)
    with (
        patch.patched(),
        pytest.raises(TypeError, match=rf"config of this {name} has a plan \(yopo\)") as caught,
    ):
        if how == "from_config":
            getattr(transformers, auto).from_config(config)
        else:
            getattr(transformers, auto).from_pretrained(tmp_path)
    for part in ("LlamaForCausalLM", "LlavaForConditionalGeneration", "take the plan out"):
        assert part in str(caught.value)


def test_a_part_with_its_model_s_config_is_no_unknown_model(patch: Any) -> None:
    """A resampler, say, that is a PreTrainedModel and takes the language model's config."""

    class Part(PreTrainedModel):
        config_class = LlamaConfig
        _supports_sdpa = True

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.linear = torch.nn.Linear(2, 2)
            self.post_init()

        def _init_weights(self, module: Any) -> None:
            pass

    class Whole(transformers.LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.part = Part(config)
            self.post_init()

    model = Whole(config_with(PLAN))
    assert is_pruned(model, Whole) and type(model.part) is Part
    with pytest.raises(TypeError, match="config of this Part has a plan"):
        Part(config_with(PLAN))


def test_an_unknown_part_with_a_plan_of_its_own_is_an_error(patch: Any) -> None:
    """The model around it, which has none, will not be asked."""

    class Around(PreTrainedModel):
        config_class = LlamaConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.inner = transformers.LlamaForSequenceClassification(config_with(PLAN))

    with pytest.raises(TypeError, match="config of this LlamaForSequenceClassification has"):
        Around(config_with(None))


def test_a_corrupt_plan_is_an_error(patch: Any) -> None:
    config = config_with(None)
    config.yopo = {"format": 99}
    with pytest.raises(ValueError, match="format is 99"):
        AutoModelForCausalLM.from_config(config)


def test_released_fields_are_a_plan_and_the_probe_s_twin_has_none(
    patch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = PruningPlan(PLAN.head_keep, window=3, layer_cut=1, ffn_ratio=2)
    np.save(tmp_path / "headmask_7b_1.npy", plan.head_keep.numpy())
    monkeypatch.setenv("YOPO_HEADMASK_DIR", str(tmp_path))
    monkeypatch.setattr(probe, "_VERDICTS", {})
    released = dict(attncut_w=3, layercut_num=1, headcut_num=1, mlpcut_ratio=2, sprompt_len=5)
    assert is_pruned(StockCausalLM(config_with(None, **released)), StockCausalLM, plan)
    assert [verdict.failed for verdict in probe._VERDICTS.values()] == [None]


@pytest.mark.parametrize("patched", [True, False])
def test_direct_construction_needs_no_patch(patch: Any, patched: bool, tmp_path: Path) -> None:
    if not patched:
        patch.undo()
    assert is_pruned(ours.LlamaForCausalLM(config_with(PLAN)), ours.LlamaForCausalLM)
    assert is_pruned(ours.LlamaModel(config_with(PLAN)), ours.LlamaModel)
    assert yopo.plan_of(ours.LlamaForCausalLM(config_with(None))) is None
    ours.LlamaForCausalLM(config_with(PLAN)).save_pretrained(tmp_path)
    assert is_pruned(ours.LlamaForCausalLM.from_pretrained(tmp_path), ours.LlamaForCausalLM)


def run(script: str, **environment: str) -> str:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_enables_in_a_fresh_process() -> None:
    said = run(
        "import yopo, sys; assert 'transformers' not in sys.modules\n"
        "import transformers\nstock = transformers.LlamaModel\n"
        "before = transformers.PreTrainedModel.post_init\nimport yopo.patch\n"
        "print(transformers.LlamaModel is stock, transformers.PreTrainedModel.post_init is before)"
    )
    assert said.split() == ["True", "False"]


@pytest.mark.parametrize(
    "version", ["4.36.0", "4.36.2", "4.57.6", "5.0.1", "5.1.0", "5.24.4", "5.25.0", "6.0.0.dev0"]
)
def test_versions_that_are_let_through(version: str) -> None:
    """Those newer than tested, too: there the layers of a model are probed."""
    _compat.require_transformers(version)


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("4.35.2", "older"),
        ("3.5.1", "older"),
        ("5.0.0", "tokenises LLaVA's prompts differently"),
        ("5.0.0rc1", "tokenises LLaVA's prompts differently"),
    ],
)
def test_unsupported_versions(version: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("YOPO_ANY_TRANSFORMERS", raising=False)
    with pytest.raises(ImportError) as caught:
        _compat.require_transformers(version)
    for part in (version, reason, "4.36.x to 5.24.x", "pip install 'transformers>=4.36,!="):
        assert part in str(caught.value)
    monkeypatch.setenv("YOPO_ANY_TRANSFORMERS", "1")
    with pytest.warns(UserWarning, match=reason):
        _compat.require_transformers(version)


def test_old_torch() -> None:
    with pytest.raises(ImportError, match=r"torch 2\.1 or newer and found 2\.0\.1"):
        _compat.require_transformers("4.37.2", "2.0.1+cu117")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _compat.require_transformers("4.37.2", "2.1.2+cu121")


def test_enable_asks_for_the_version(patch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    patch.undo()
    monkeypatch.setattr(_compat.transformers, "__version__", "4.30.0")
    monkeypatch.delenv("YOPO_ANY_TRANSFORMERS", raising=False)
    with pytest.raises(ImportError, match=r"4\.30\.0 is older"):
        patch.enable()
    assert not is_in()


@pytest.mark.skipif(_compat.has_families(), reason="this transformers is new enough for families")
def test_another_family_with_a_plan_is_refused_by_an_old_transformers(patch: Any) -> None:
    """And one without a plan is built as ever."""
    tower = dict(model_type="clip_vision_model", hidden_size=16, intermediate_size=24)
    tower |= dict(num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4)
    text = LlamaConfig(**CONFIG).to_dict()
    config = transformers.LlavaConfig(vision_config=tower, text_config=text)
    transformers.LlavaForConditionalGeneration(config)
    PruningPlan(torch.ones(2, 2)).save_to(config)
    with pytest.raises(ImportError, match="LlavaForConditionalGeneration needs transformers 4.45"):
        transformers.LlavaForConditionalGeneration(config)
