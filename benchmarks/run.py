"""Runs the project's benchmarks, one `python -m yopo bench` after the other, and writes them down.

    python benchmarks/run.py table   --layers 8 --dtype bfloat16    # benchmarks/table.jsonl, .md
    python benchmarks/run.py scaling --layers 2 --dtype bfloat16    # benchmarks/scaling.jsonl, .png

With --device cuda the files are table-cuda.jsonl, with --dtype float32 table-float32.jsonl and so
on. A configuration that stands in the
.jsonl already is not run again: delete its line for that.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tabulate import tabulate

HERE = Path(__file__).parent
TABLE = [  # plan, mass, batch; the ratio aimed at
    ("25", "drop", 1, 3.05),
    ("25", "sink", 1, 2.95),
    ("12", "drop", 1, 4.6),
    ("12", "sink", 1, 4.4),
    ("25", "exact", 1, 1.88),
    ("25", "exact/drop", 1, None),
    ("none", "drop", 1, 1.0),
    ("25", "drop", 4, None),
    ("25", "drop", 8, None),
]
EVERY_ARM = ("25", "exact", 1)  # here the masked simulation computes just what ours does
SCALING = [(images, 1) for images in (1, 2, 4, 8)] + [(1, batch) for batch in (2, 4, 8)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("table", "scaling"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    args, shared = parser.parse_known_args()  # the rest is bench's
    shared += ["--device", args.device, "--dtype", args.dtype]
    place = "" if args.device == "cpu" else f"-{args.device.partition(':')[0]}"
    place += "" if args.dtype == "bfloat16" else f"-{args.dtype}"
    if args.what == "table":
        runs = []
        for plan, mass, batch, aim in TABLE:
            every = "sdpa,eager,masked,live,yopo"
            arms = every if (plan, mass, batch) == EVERY_ARM else "sdpa,live,yopo"
            words = ["--plan", plan, "--mass", mass, "--batch", str(batch), "--arms", arms]
            runs.append((words, aim))
        results = _run(runs, shared, HERE / f"table{place}.jsonl")
        (HERE / f"table{place}.md").write_text(_markdown(results), encoding="utf-8")
    else:
        runs = [(["--images", str(i), "--batch", str(b)], None) for i, b in SCALING]
        arguments = ["--arms", "sdpa,yopo", "--steps", "0", "--rounds", "3", *shared]
        _plot(_run(runs, arguments, HERE / f"scaling{place}.jsonl"), HERE / f"scaling{place}.png")


def _run(runs: list[Any], shared: list[str], file: Path) -> list[dict[str, Any]]:
    """The results of all runs, from `file` where they are there already."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    done = {json.dumps(line["command"]): line for line in map(json.loads, lines)}
    results = []
    for words, aim in runs:
        command = ["bench", *words, *shared]
        if json.dumps(command) not in done:
            print("python -m yopo", *command, flush=True)
            run = [sys.executable, "-m", "yopo", *command]
            out = subprocess.run(run, check=True, stdout=subprocess.PIPE, text=True).stdout
            line = {"command": command, "aim": aim} | json.loads(out.splitlines()[-1])
            with file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
            done[json.dumps(command)] = line
        results.append(done[json.dumps(command)])
    return results


def _markdown(results: list[dict[str, Any]]) -> str:
    rows = []
    for line in results:
        ideal, ratio = line["prefill_ideal_ratio"], line["prefill_ratio_vs_sdpa"]
        rooflines = (line["prefill_roofline_fraction"], line["sdpa_roofline_fraction"])
        rows.append(
            {
                "plan": line["plan"],
                "mass": line["mass"] or "",
                "batch": line["batch"],
                "prefill × SDPA": _fixed(ratio, ".2f"),
                "live × SDPA": _fixed(_live_ratio(line), ".2f"),
                "ideal": f"{ideal:.2f}",
                "of the ideal": _fixed(ratio and ratio / ideal, ".0%"),
                "roofline: yopo / SDPA": " / ".join(_fixed(x, ".0%") for x in rooflines),
                "aim": line["aim"] or "",
                "decode × SDPA": _fixed(line["decode_ratio_vs_sdpa"], ".2f"),
                "peak MiB: SDPA / yopo": _mebibytes(line["peak_bytes"]),
                "KV MiB: SDPA / yopo": _mebibytes(line["cache_bytes"]),
                "SDPA s (min–max)": _seconds(line, "stock SDPA"),
                "yopo s (min–max)": _seconds(line, "yopo"),
            }
        )
    table = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
    first = results[0]
    return f"{first['preset']}, {first['layers']} layers; {first['device']}\n\n{table}\n"


def _live_ratio(line: dict[str, Any]) -> float | None:
    """Of medians; with weights read one by one."""
    times = line["prefill_median_s"]
    return times["stock SDPA"] / times["yopo, live"] if times.get("yopo, live") else None


def _mebibytes(of_arms: dict[str, int]) -> str:
    return " / ".join(f"{of_arms[arm] / 2**20:.0f}" for arm in ("stock SDPA", "yopo"))


def _fixed(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)


def _seconds(line: dict[str, Any], arm: str) -> str:
    if line["prefill_median_s"][arm] is None:
        return line["failed"][arm]
    low, high = line["prefill_spread_s"][arm]
    return f"{line['prefill_median_s'][arm]:.2f} ({low:.2f}–{high:.2f})"


def _plot(results: list[dict[str, Any]], file: Path) -> None:
    """Prefill time against the number of images, and against the batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, name, other in ((axes[0], "images", "batch"), (axes[1], "batch", "images")):
        lines = sorted((r for r in results if r[other] == 1), key=lambda r: r[name])
        for arm in ("stock SDPA", "yopo"):
            times = [r["prefill_median_s"][arm] for r in lines]
            axis.plot([r[name] for r in lines], times, marker="o", label=arm)
        axis.set_xlabel(f"{name} (of {results[0]['preset']}'s 576 tokens each)" if name == "images"
                        else "batch (one image a row)")  # fmt: skip
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("prefill, seconds (median)")
    axes[0].legend()
    figure.suptitle(
        f"plan {results[0]['plan']}, {results[0]['mass']}; {results[0]['device']}", fontsize=8
    )
    figure.tight_layout()
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()
