"""What the source formats of `convert` have in common: the `Conversion` that each of them fills in,
the plan and the rotary angles of a config, folders named by path or Hub id. Nothing of one format.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from yopo.errors import BadInput
from yopo.plan.pruning_plan import PruningPlan

Make = Callable[[Tensor], Tensor]
Names = Callable[[str], "list[tuple[str, Make]] | None"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.npy")


@dataclass
class Conversion:
    """Everything that a format's file knows about converting one checkpoint.

    dtype: what config.json says; tensors keep the dtype that they have.
    rope: rope_theta and rope_scaling of the text model, as transformers 4 names them.
    weights: files, and what becomes of a tensor in them: the names it gets with how each is made
        of it; [] where the new model has no use for it; None where it should not be there.
    write_rest: writes tokenizer and processors into a folder.
    """

    kind: str
    model_class: type
    config: Any
    dtype: str
    rope: dict[str, Any]
    plan: PruningPlan | None
    weights: list[tuple[list[Path], Names]]
    write_rest: Callable[[Path], None]
    notes: list[str] = field(default_factory=list)


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def plan_in(source: Path, config: dict[str, Any]) -> PruningPlan | None:
    """The plan in the checkpoint's config.json. Raises BadInput where it cannot be read."""
    if os.environ.get("YOPO_MASS"):
        raise BadInput(
            "YOPO_MASS is set, which would be written into the new checkpoint for good; unset it "
            "(it works on the converted one, too)"
        )
    try:
        return PruningPlan.from_config({**config, "_name_or_path": str(source)})
    except (ValueError, OSError) as error:
        raise BadInput(f"the plan of {source} cannot be read: {error}") from error


def rope(config: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling; from transformers 5 on, both are in rope_parameters."""
    newer = dict(config.get("rope_parameters") or {})
    theta = newer.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    scaling = config.get("rope_scaling")
    if newer.get("rope_type", "default") != "default":
        scaling = newer
    if not scaling:
        return {"rope_theta": float(theta)}
    scaling = dict(scaling)
    if scaling.get("type") == "su":  # Phi-3's first name for it
        scaling["type"] = "longrope"
    return {"rope_theta": float(theta), "rope_scaling": scaling}


def local_folder(path: str, what: str) -> Path:
    """The folder `path`, or that of a Hub id, downloaded if need be. BadInput: there is neither."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if not _HUB_ID.fullmatch(path) or folder.parent.exists():
        raise BadInput(f"{what}: there is no folder {path!r} (from {Path.cwd()})")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # of the Hub's, of requests' and of httpx's classes, by version
        raise BadInput(
            f"{what}: there is no folder {path!r} (from {Path.cwd()}), and the Hub gave none of "
            f"that name: {error}"
        ) from error
