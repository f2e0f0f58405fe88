"""The folder a calibration becomes: the checkpoint with its plan (pruned_folder.py), and beside
it the statistics, the head mask, and what a search tried. Writes what was found; finds nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from yopo.files import PARTIAL

if TYPE_CHECKING:
    from yopo.calibration.calibrate import Calibration

STATISTICS = "statistics.safetensors"
TRIALS = "search.jsonl"  # while it is being made


def is_ours(source: Path, path: Path) -> bool:
    """Whether `write` of the checkpoint `source` may have made `path`, and so may delete it."""
    from yopo.checkpoint import neuron_order, pruned_folder  # not at the top: these take a second
    from yopo.plan import sinks

    name = PARTIAL.sub("", path.name)
    own = (*pruned_folder.RESULTS, neuron_order.FILE, sinks.FILE)
    copied = (source / name).is_file()
    return path.is_file() and (copied or any(Path(name).match(pattern) for pattern in own))


def write(calibration: Calibration, source: Path, folder: Path) -> None:
    """Fills `folder` from the checkpoint `source` that was calibrated. Statistics that are there
    already may stay; what else `is_ours` is removed first: it may not belong to this plan."""
    from yopo.calibration import search_report
    from yopo.checkpoint import pruned_folder
    from yopo.plan import head_mask

    plan, report = calibration.plan, calibration.report
    if folder.is_dir():
        for file in folder.iterdir():
            if file.name != STATISTICS and is_ours(source, file):
                file.unlink()
    pruned_folder.write(source, folder, plan, calibration.neuron_order)
    calibration.statistics.save(folder / STATISTICS)
    size = head_mask.SIZES.get(tuple(plan.head_keep.shape), "{}x{}".format(*plan.head_keep.shape))
    kept = round(float(plan.head_keep.sum()) / plan.num_layers)
    head_mask.save(folder / f"headmask_{size}_{kept}.npy", plan.head_keep)
    if report.search is not None:
        search_report.write_csv(folder / "search.csv", report.search)
        search_report.draw(folder / "pareto.png", report.search)
