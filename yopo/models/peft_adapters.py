"""The plan goes with an adapter: what peft and transformers save of a pruned model with an adapter
is the adapter alone, without the config that holds the plan. So a file beside it holds the plan,
and a model that loads the adapter gets it. Calls with an adapter for each row are made known.

Wraps methods of peft, and of transformers' models where these save and load adapters, once peft has
been imported; without a plan they do what they did. What a plan does to a model is attach.py's.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PreTrainedModel
from transformers.integrations.peft import PeftAdapterMixin
from transformers.utils import cached_file

from yopo.models.arguments import BY_ROW
from yopo.models.parts import plan_of
from yopo.models.trained_sinks import settle_sinks
from yopo.plan.pruning_plan import PruningPlan
from yopo.plan.sinks import sinks_beside

PLAN_FILE, ADAPTER_FILE = "yopo_plan.json", "adapter_config.json"
_PLACE = (
    "subfolder",
    "revision",
    "cache_dir",
    "token",
    "local_files_only",
)  # in a Hub's repository

_MISSING = ("missing_entries", "connection_errors")

# Arguments, and kinds of adapters, that treat rows or tokens of the batch apart.
_BY_ROW = ("adapter_names", "alora_offsets")
_KINDS_BY_ROW = ("POLY", "XLORA")

Apply = Callable[[Any, PruningPlan], Any]


def accompany_adapters(apply: Apply) -> None:
    """From now on, or from when peft is imported, adapters take plans with them; `apply` puts a
    plan on a model. Once more changes nothing."""
    peft = sys.modules.get("peft")
    if peft is not None and hasattr(peft, "PeftModel"):
        _wrap(peft, apply)
    elif not any(isinstance(finder, _OnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnImport(lambda peft: _wrap(peft, apply)))


def leave_transformers() -> None:
    """Gives transformers its own methods back, until accompany_adapters is called again. peft's go
    on."""
    sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _OnImport)]
    for cls, name in ((PreTrainedModel, "save_pretrained"), (PeftAdapterMixin, "load_adapter")):
        found = vars(cls)[name]
        # Of a wrapper that somebody put around ours since, functools.wraps makes all but that so.
        if getattr(found, "_yopo_itself", None) is found:
            setattr(cls, name, found._yopo_stock)


class _OnImport(MetaPathFinder):
    """Has `then` called with peft as soon as somebody has imported it; who only asks whether it is
    there changes nothing."""

    def __init__(self, then: Callable[[ModuleType], None]) -> None:
        self._then = then

    def find_spec(self, name: str, *where: Any) -> ModuleSpec | None:
        if name != "peft":
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(name, *where) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:  # not left meanwhile
                    sys.meta_path.remove(self)
                    self._then(module)

            spec.loader.exec_module = exec_module
        return spec


def _wrap(peft: ModuleType, apply: Apply) -> None:
    _replace(PreTrainedModel, "save_pretrained", _saving(_folders_of_transformers))
    _replace(PeftAdapterMixin, "load_adapter", _loading(apply))
    _replace(peft.PeftModel, "save_pretrained", _saving(_folders_of_peft))
    for cls in (peft.PeftModel, peft.PeftMixedModel):
        _replace(cls, "load_adapter", _loading(apply))
        # Before the adapter's layers are put into a model that may have another plan.
        _replace(cls, "from_pretrained", _checking)
    _replace(peft.PeftModel, "_enable_peft_forward_hooks", _telling)


def _replace(cls: type, name: str, wrapper: Callable[[Callable[..., Any]], Any]) -> None:
    stock = vars(cls).get(name)
    if stock is None:  # a peft that has not got it yet
        return
    function = getattr(stock, "__func__", stock)  # of a class method
    if hasattr(function, "_yopo_stock"):
        return
    made = functools.wraps(function)(wrapper(function))
    made._yopo_stock, made._yopo_itself = function, made
    setattr(cls, name, made if stock is function else type(stock)(made))


# ------------------------------------------------------------------------------------------ saving


def _saving(
    folders: Callable[[Any, dict[str, Any]], Sequence[Path]],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A method that saves, and then writes the plan into each of the `folders` of an adapter."""

    def wrapper(stock: Callable[..., Any]) -> Callable[..., Any]:
        def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = stock(self, *args, **kwargs)
            given = _arguments(stock, self, args, kwargs)
            if given.get("is_main_process", True):
                for folder in folders(self, given):
                    _write_plan(self, folder / PLAN_FILE)
            return result

        return save_pretrained

    return wrapper


def _folders_of_peft(model: Any, given: dict[str, Any]) -> list[Path]:
    """Where peft has put the adapters: the one called default at the top, others by their names."""
    names = given.get("selected_adapters") or list(model.peft_config)
    top = Path(given["save_directory"])
    return [top if name == "default" else top / name for name in names]


def _folders_of_transformers(model: Any, given: dict[str, Any]) -> list[Path]:
    has_adapter = getattr(model, "_hf_peft_config_loaded", False)
    return [Path(given["save_directory"])] if has_adapter else []


def _write_plan(model: Any, file: Path) -> None:
    """The plan as the model's config has it, which $YOPO_MASS does not change; no plan: no file,
    not an earlier model's either."""
    if not (file.parent / ADAPTER_FILE).is_file():
        return
    settle_sinks(model)
    plan = plan_of(model)
    if plan is None:
        file.unlink(missing_ok=True)
        return
    (PruningPlan.found_in(_outermost(model).config) or plan).save(file)


# ----------------------------------------------------------------------------------------- loading


def _loading(apply: Apply) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A method that loads an adapter, and then puts on the plan that came with it."""

    def wrapper(stock: Callable[..., Any]) -> Callable[..., Any]:
        def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
            given = _arguments(stock, self, args, kwargs)
            found = _plan_beside(given.get("model_id", given.get("peft_model_id")), given)
            if found is None:
                return stock(self, *args, **kwargs)
            file, plan = found
            _refuse_another(self, file, plan)
            result = stock(self, *args, **kwargs)
            if plan_of(self) is None:
                try:
                    apply(self, plan)
                except (TypeError, ValueError, ImportError) as error:
                    raise ValueError(
                        f"the adapter was made under the plan in {file}, which cannot be put on "
                        f"this model: {error}. Load it on the model that it was made for, or "
                        f"delete {PLAN_FILE} to use it without a plan"
                    ) from error
            return result

        return load_adapter

    return wrapper


def _checking(stock: Callable[..., Any]) -> Callable[..., Any]:
    """A class method that makes a model with an adapter of another model and a saved adapter."""

    def from_pretrained(cls: type, model: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        found = _plan_beside(model_id, kwargs)
        if found is not None:
            _refuse_another(model, *found)
        return stock(cls, model, model_id, *args, **kwargs)

    return from_pretrained


def _plan_beside(adapter: Any, given: dict[str, Any]) -> tuple[str, PruningPlan] | None:
    """The file with the plan of a saved adapter (a folder, or a Hub's repository), and the plan,
    with the masses that $YOPO_MASS names; None: it has none."""
    if adapter is None:  # a state dict was handed over
        return None
    given = {**given, **(given.get("adapter_kwargs") or {})}
    where = {name: given[name] for name in _PLACE if given.get(name) is not None}
    where |= {f"_raise_exceptions_for_{what}": False for what in _MISSING}
    try:
        file = cached_file(adapter, PLAN_FILE, **where)
        if file is not None:
            cached_file(adapter, sinks_beside(PLAN_FILE), **where)  # there when the plan is read
    except OSError:  # no such repository: who loads the adapter says so in their own words
        return None
    if file is None:
        return None
    plan, mass = PruningPlan.load(file), os.environ.get("YOPO_MASS")
    return str(file), plan.with_mass(mass, name="YOPO_MASS") if mass else plan


def _refuse_another(model: Any, file: str, plan: PruningPlan) -> None:
    here = plan_of(model)
    if here is not None and here != plan:
        outer = _outermost(model)
        name = getattr(outer.config, "_name_or_path", None) or type(outer).__name__
        raise ValueError(
            f"the adapter was made under the plan in {file} ({plan.summary()}), but the model "
            f"{name} runs under another ({here.summary()}). Take that off first (yopo.remove), or "
            f"delete {PLAN_FILE} to use the adapter under the model's"
        )


# ----------------------------------------------------------------------------------------- running


def _telling(stock: Callable[..., Any]) -> Callable[..., Any]:
    """The context of a call, in which peft has hooks on its layers that treat rows apart: tells the
    decoder, and takes the hooks off again where the call fails, which peft does not."""

    @contextmanager
    def _enable_peft_forward_hooks(self: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
        by_row = next((name for name in _BY_ROW if kwargs.get(name) is not None), None)
        kind = getattr(getattr(self, "active_peft_config", None), "peft_type", None)
        if kind in _KINDS_BY_ROW and getattr(self, "has_active_enabled_adapter", True):
            by_row = f"the adapter of type {kind.value}"
        if by_row is None:
            with stock(self, *args, **kwargs):
                yield
            return
        token, hooks = BY_ROW.set(by_row), stock(self, *args, **kwargs)
        try:
            hooks.__enter__()
            try:
                yield
            finally:
                hooks.__exit__(None, None, None)
        finally:
            BY_ROW.reset(token)

    return _enable_peft_forward_hooks


def _outermost(model: Any) -> PreTrainedModel:
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def _arguments(
    function: Callable[..., Any], self: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """What a method was called with, by name."""
    bound = inspect.signature(function).bind(self, *args, **kwargs).arguments
    return {**bound, **bound.get("kwargs", {})}
