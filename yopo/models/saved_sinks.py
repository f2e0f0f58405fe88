"""The file of a plan's sinks goes with the config that names it: transformers' configs write it
beside the config.json that they write, before anything is pushed to the Hub; and so does every
save_pretrained of a model, whatever its class. Of a config without sinks nothing is touched.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from yopo.plan.config_fields import blocks
from yopo.plan.pruning_plan import PruningPlan
from yopo.plan.sinks import named

_NAME = "to_json_file"


def accompany_configs() -> None:
    """From now on. Once more changes nothing."""
    stock = vars(PretrainedConfig)[_NAME]
    if hasattr(stock, "_yopo_stock"):
        return

    @functools.wraps(stock)
    def to_json_file(self: Any, json_file_path: Any, *args: Any, **kwargs: Any) -> Any:
        result = stock(self, json_file_path, *args, **kwargs)
        for block in blocks(self).values():
            if isinstance(block, dict) and named(block.get("sinks")):
                plan = PruningPlan.found_in(self)
                if plan is not None and plan.sinks is not None:
                    plan.sinks.save(Path(json_file_path).parent, block["sinks"]["file"])
        return result

    to_json_file._yopo_stock = stock  # type: ignore[attr-defined]
    setattr(PretrainedConfig, _NAME, to_json_file)


def leave_configs() -> None:
    """Gives transformers its own method back, until accompany_configs is called again."""
    here = vars(PretrainedConfig)[_NAME]
    setattr(PretrainedConfig, _NAME, getattr(here, "_yopo_stock", here))
