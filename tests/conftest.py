"""Settings every test shares: one thread; property tests that print how to repeat a failure."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

pytest_plugins = ["matrix"]

torch.set_num_threads(1)
os.environ.pop("YOPO_MASS", None)  # the caller's shell must not change what is tested

settings.register_profile(
    "yopo",
    deadline=None,
    print_blob=True,
    database=None,
    # derandomized by default: a red run is red for everybody; YOPO_RANDOM=1 looks further each time
    derandomize=not os.environ.get("YOPO_RANDOM"),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("yopo")

_RESET = {cls: cls.reset_parameters for cls in (torch.nn.Linear, torch.nn.LayerNorm)}


@pytest.fixture(autouse=True)
def weights_are_initialised() -> Iterator[None]:
    """LLaVA's loader turns the initialisation of these layers off, for the whole process: models
    that later tests build would have whatever was in memory."""
    yield
    for cls, reset in _RESET.items():
        cls.reset_parameters = reset


@pytest.fixture(scope="module")
def patched() -> Iterator[None]:
    """yopo.patch, for one module. Not at import: other tests' transformers must stay stock."""
    import yopo.patch

    yopo.patch.enable()
    yield
    yopo.patch.undo()
