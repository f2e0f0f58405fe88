"""yopo.patch puts its classes into transformers and takes them out; the version gate refuses."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from yopo import modeling_llama_prune as ours
from yopo import versions as _compat
from yopo.models import original_llava as llava
from yopo.plan.pruning_plan import PruningPlan

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("transformers", "transformers.models.llama", "transformers.models.llama.modeling_llama")
NAMES = ("LlamaModel", "LlamaForCausalLM")
CONFIG = dict(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
)


def installed() -> dict[tuple[str, str], type]:
    return {
        (module, name): getattr(importlib.import_module(module), name)
        for module in MODULES
        for name in NAMES
    }


STOCK = installed()  # at collection: nothing may have been patched by then


@pytest.fixture
def patch() -> Iterator[Any]:
    """The module, enabled; undone afterwards."""
    import yopo.patch

    yopo.patch.enable()
    yield yopo.patch
    yopo.patch.undo()


def is_ours() -> bool:
    now = installed()
    assert all(value is getattr(ours, name) for (_, name), value in now.items()) or now == STOCK
    return now != STOCK


def test_enable_and_undo_any_number_of_times(patch: Any) -> None:
    assert is_ours()
    patch.enable()
    assert is_ours()
    patch.undo()
    assert not is_ours()
    patch.undo()
    assert not is_ours()
    assert all(installed()[key] is value for key, value in STOCK.items())


def test_patched_leaves_things_as_they_were(patch: Any) -> None:
    with patch.patched():
        assert is_ours()
    assert is_ours()  # it was enabled before
    patch.undo()
    with pytest.raises(KeyError), patch.patched():
        assert is_ours()
        raise KeyError
    assert not is_ours()


def test_auto_classes_follow(patch: Any, tmp_path: Path) -> None:
    patch.undo()
    config = LlamaConfig(**CONFIG)
    for _ in range(2):
        # Resolved before: the mapping must not remember.
        assert type(AutoModel.from_config(config)) is STOCK["transformers", "LlamaModel"]
        causal = AutoModelForCausalLM.from_config(config)
        assert type(causal) is STOCK["transformers", "LlamaForCausalLM"]
        causal.save_pretrained(tmp_path)
        with patch.patched():
            assert MODEL_MAPPING[LlamaConfig] is ours.LlamaModel
            assert MODEL_FOR_CAUSAL_LM_MAPPING[LlamaConfig] is ours.LlamaForCausalLM
            assert type(AutoModel.from_config(config)) is ours.LlamaModel
            assert type(AutoModelForCausalLM.from_config(config)) is ours.LlamaForCausalLM
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
            assert type(loaded) is ours.LlamaForCausalLM and type(loaded.model) is ours.LlamaModel
            assert type(AutoModel.from_pretrained(tmp_path)) is ours.LlamaModel


def like_llava() -> type:
    """A class built as LLaVA builds its own, on whatever transformers has at this moment."""

    class Model(transformers.LlamaModel):
        pass

    class CausalLM(transformers.LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super(LlamaForCausalLM, self).__init__(config)
            self.model = Model(config)
            self.vocab_size = config.vocab_size
            self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

    LlamaForCausalLM = transformers.LlamaForCausalLM
    return CausalLM


@pytest.mark.parametrize("make", [lambda: transformers.LlamaForCausalLM, like_llava])
def test_seeded_construction(patch: Any, make: Any) -> None:
    states, after = [], []
    for enabled in (True, False):
        if not enabled:
            patch.undo()
        cls = make()
        assert issubclass(cls, ours.LlamaForCausalLM) == enabled
        torch.manual_seed(4)
        model = cls(LlamaConfig(**CONFIG))
        states.append(model.state_dict())
        after.append(torch.rand(3))
        ids = torch.tensor([[1, 2, 3]])
        assert model.eval()(ids).logits.shape == (1, 3, 31)
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert torch.equal(*after)


def with_prepare(base: type) -> type:
    class FakeLlava(base):
        def prepare_inputs_labels_for_multimodal(
            self, input_ids, position_ids, attention_mask, past_key_values, labels, images
        ):
            """LLaVA's."""

        def generate(self, inputs=None, images=None, **kwargs):
            """LLaVA's."""

        def forward(self, input_ids=None, inputs_embeds=None, images=None):
            return input_ids

    return FakeLlava


def test_llava_classes_are_instrumented_once_and_others_never(patch: Any) -> None:
    made = with_prepare(transformers.LlamaForCausalLM)
    wrapped = {name: vars(made)[name] for name in ("generate", "forward")}
    assert all(hasattr(method, "__wrapped__") for method in wrapped.values())
    assert made.generate.__doc__ == "LLaVA's."
    llava.instrument(made)
    assert all(vars(made)[name] is method for name, method in wrapped.items())
    derived = type("Derived", (made,), {})
    assert "forward" not in vars(derived)  # what it inherits is wrapped
    assert "forward" not in vars(type("Plain", (transformers.LlamaForCausalLM,), {}))


def test_a_model_made_under_the_patch_stays_itself(patch: Any) -> None:
    """What is loaded within `with patched():` is used after it."""
    made = with_prepare(transformers.LlamaForCausalLM)
    patch.undo()
    assert hasattr(made.forward, "__wrapped__")
    patch.enable()  # classes made under an earlier enable are no reason to refuse
    assert is_ours()


EARLY = """
import sys, types
import transformers
module = types.ModuleType("llava.model.language_model.llava_llama")
sys.modules[module.__name__] = module
class LlavaLlamaForCausalLM(transformers.LlamaForCausalLM):
    __module__ = module.__name__
    def prepare_inputs_labels_for_multimodal(self): ...
module.LlavaLlamaForCausalLM = LlavaLlamaForCausalLM
stock = transformers.LlamaForCausalLM
try:
    import yopo.patch
except ImportError as error:
    print(error)
assert transformers.LlamaForCausalLM is stock
"""


def run(script: str, **environment: str) -> str:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_llava_imported_first_is_an_error_that_says_what_to_do() -> None:
    said = run(EARLY)
    assert "llava.model.language_model.llava_llama was imported before yopo.patch" in said
    for remedy in ("`import yopo.patch` above", "python -m yopo run -m", "yopo.apply(model, plan)"):
        assert remedy in said


def test_importing_enables_in_a_fresh_process() -> None:
    said = run(
        "import yopo, sys; assert 'transformers' not in sys.modules\n"
        "import yopo.patch, transformers\nprint(transformers.LlamaModel.__module__)"
    )
    assert said.strip() == "yopo.modeling_llama_prune"


@pytest.mark.parametrize("version", ["4.36.0", "4.36.2", "4.57.6", "5.0.1", "5.1.0", "5.23.4"])
def test_supported_versions(version: str) -> None:
    _compat.require_transformers(version)


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("4.35.2", "older"),
        ("3.5.1", "older"),
        ("5.0.0", "tokenises LLaVA's prompts differently"),
        ("5.0.0rc1", "tokenises LLaVA's prompts differently"),
        ("5.24.0", "newer"),
        ("5.24.0.dev0", "newer"),
        ("6.0.0", "newer"),
    ],
)
def test_unsupported_versions(version: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("YOPO_ANY_TRANSFORMERS", raising=False)
    with pytest.raises(ImportError) as caught:
        _compat.require_transformers(version)
    for part in (version, reason, "4.36.x to 5.23.x", "pip install 'transformers>=4.36,<5.24"):
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
    assert not is_ours()


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
