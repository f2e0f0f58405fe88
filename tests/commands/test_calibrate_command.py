"""`python -m yopo calibrate` on a random LLaVA, and on the embedded one as the page has it."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import processes
import pytest
import random_llava
import torch
from layouts import needs_float16
from random_llava import HEADS, LAYERS
from safetensors.torch import load_file

import yopo
from yopo.calibration import neurons
from yopo.calibration.sample_statistics import Statistics
from yopo.checkpoint import neuron_order
from yopo.commands.command_line import main
from yopo.plan.pruning_plan import PruningPlan
from yopo.plan.sinks import FILE, Sinks
from yopo.prompts import load
from yopo.prompts.questions import Samples, read_questions

if importlib.util.find_spec("llava") is None:  # looked for, not imported: the patch comes first
    pytest.skip("llava-torch is not installed", allow_module_level=True)
pytestmark = [pytest.mark.llava, pytest.mark.usefixtures("patched"), needs_float16]

STATISTICS = "statistics.safetensors"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense checkpoint and twelve questions, some with answers."""
    folder = tmp_path_factory.mktemp("calibrate")
    random_llava.make(folder)
    words = ("what is in this image?", "how many?", "is it red?")
    lines = []
    for seed in range(12):
        random_llava.picture(seed).save(folder / f"{seed}.png")
        line = {"image": f"{seed}.png", "question": words[seed % 3]}
        lines.append(json.dumps(line | ({"answer": "a red circle"} if seed % 2 else {})))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def run(work: Path, tmp_path: Path, capsys: Any) -> Callable[..., tuple[int, str, str]]:
    """Runs the command; changes: options by name, None leaves one out, True is a flag."""

    def command(**changes: Any) -> tuple[int, str, str]:
        options: dict[str, Any] = {
            "data": work / "data.jsonl",
            "out": tmp_path / "llava-v1-pruned",
            "device": "cpu",
            **changes,
        }
        words = ["calibrate", str(options.pop("model", work / "llava-v1-random"))]
        for name, value in options.items():
            if value is not None:
                words.append(f"--{name.replace('_', '-')}")
                words += [] if value is True else [str(value)]
        code = main(words)
        return code, *capsys.readouterr()

    return command


def loaded(folder: Path) -> Any:
    from llava.model.builder import load_pretrained_model

    return load_pretrained_model(str(folder), None, folder.name, device="cpu")[1].float()


def test_the_folder_made_is_a_checkpoint_with_the_plan(
    run: Any, work: Path, tmp_path: Path
) -> None:
    code, out, _ = run(keep=0.75)
    made = tmp_path / "llava-v1-pruned"
    assert code == 0 and "12 questions, 0 passed over" in out and f"written: {made}" in out
    statistics = Statistics.load(made / STATISTICS)
    assert len(statistics) == 12  # a rule holds none out
    dense = loaded(work / "llava-v1-random")
    statistics.check(dense)
    plan = PruningPlan.load(made)
    expected = yopo.calibrate(dense, statistics=statistics, keep=0.75, mass="drop").plan
    order = neurons.ranked(statistics)
    assert (plan.head_keep, plan.window) != (None, None)
    assert torch.equal(plan.head_keep, expected.head_keep)
    assert plan.sinks.b is not None and (plan.head_mass, plan.cut_mass) == ("sink", "sink")
    assert plan.sinks == Sinks(**load_file(made / FILE), tokens=16)
    assert "sinks fitted to 12 samples: KL from the dense model" in out
    assert plan.ffn_order == neuron_order.checksum(order)
    assert torch.equal(torch.from_numpy(mask_in(made)), plan.head_keep)
    pruned = loaded(made)
    assert yopo.plan_of(pruned) == plan
    neurons.put(dense, order)
    weights = dense.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in pruned.state_dict().items())
    assert "% answered as by the dense model" in out and "visual FLOPs: " in out
    assert {file.suffix for file in made.iterdir()} == {".json", ".model", ".npy", ".safetensors"}
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("settings", [{"keep": 0.75}, {"budget": 0.3, "evaluations": 8}])
def test_plan_order_and_words_are_those_of_the_function(
    run: Any, work: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    code, out, _ = run(**settings)
    assert code == 0
    prompter, (questions, _) = (
        load(work / "llava-v1-random", "cpu"),
        read_questions(work / "data.jsonl"),
    )
    made = yopo.calibrate(
        prompter.model,
        Samples(questions, prompter),
        reorder_neurons=True,
        influence=True,
        **settings,
    )
    folder = tmp_path / "llava-v1-pruned"
    assert PruningPlan.load(folder) == made.plan
    assert torch.equal(neuron_order.load_order(folder / neuron_order.FILE), made.neuron_order)
    assert f"\n{made.report}\nwritten: " in out
    written = Statistics.load(folder / STATISTICS)
    assert written.samples == made.statistics.samples and written.model == made.statistics.model


@pytest.mark.slow
def test_processes_that_a_launcher_starts_share_the_questions_and_write_one_folder(
    run: Any, work: Path, tmp_path: Path
) -> None:
    out = tmp_path / "llava-shared"
    done = processes.run(
        "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "yopo", "calibrate",
        str(work / "llava-v1-random"), "--data", str(work / "data.jsonl"), "--out", str(out),
        "--device", "cpu", "--budget", "0.3", "--evaluations", "8", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(f"written: {out}") == 1
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a launcher has it
    try:
        assert run(budget=0.3, evaluations=8)[0] == 0
    finally:
        torch.set_num_threads(threads)
    assert PruningPlan.load(out) == PruningPlan.load(tmp_path / "llava-v1-pruned")
    assert not list(tmp_path.glob("*.partial"))


def mask_in(folder: Path) -> Any:
    import numpy as np

    (file,) = folder.glob("headmask_*.npy")
    return np.load(file, allow_pickle=False)


def test_a_budget_is_searched_and_what_was_tried_is_written(run: Any, tmp_path: Path) -> None:
    code, out, _ = run(budget=0.3, evaluations=12, mass="drop", first_neurons=True)
    made = tmp_path / "llava-v1-pruned"
    assert code == 0, out
    plan = PruningPlan.load(made)
    assert (plan.head_mass, plan.cut_mass, plan.ffn_order) == ("drop", "drop", None)
    with open(made / "search.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    (chosen,) = [row for row in rows if row["chosen"] == "1"]
    assert float(chosen["visual_flops"]) <= 0.3 and int(chosen["layer_cut"]) == plan.layer_cut
    assert float(chosen["kl"]) <= float(rows[0]["kl"]) and rows[0]["why"] == "hand-made"
    within = [row for row in rows if float(row["visual_flops"]) <= 0.3]
    assert float(chosen["kl"]) == min(float(row["kl"]) for row in within)
    assert 1 <= sum(row["pareto"] == "1" for row in rows) < len(rows) <= 12
    from PIL import Image

    with Image.open(made / "pareto.png") as picture:
        assert picture.size[0] > 500 and len(picture.convert("L").getcolors()) > 10


def test_sinks_are_tuned_where_asked(run: Any, tmp_path: Path) -> None:
    plain, tuned = tmp_path / "llava-plain", tmp_path / "llava-tuned"
    outs = [run(out=plain)[1], run(out=tuned, tune=6)[1]]
    assert all("12 questions of those that the statistics were taken of: " in out for out in outs)
    plans = [PruningPlan.load(folder) for folder in (plain, tuned)]
    assert replace(plans[0], sinks=plans[1].sinks) == plans[1]
    kl = [float(re.search(r"([\d.e-]+) with them", out)[1]) for out in outs]
    assert kl[1] <= kl[0]


def test_it_says_in_which_layers_the_image_still_matters(run: Any, tmp_path: Path) -> None:
    out = run()[1]
    means = Statistics.load(tmp_path / "llava-v1-pruned" / STATISTICS).influence.nanmean(0)
    told = out.split("leave at layer … ")[1].splitlines()[0].split(", ")
    assert [float(one.split(": ")[1]) for one in told] == pytest.approx(means.tolist(), rel=0.06)


def test_a_plan_is_made_again_from_statistics_alone(run: Any, tmp_path: Path) -> None:
    first, second = tmp_path / "llava-first", tmp_path / "llava-second"
    assert run(out=first, keep=0.5)[0] == 0
    code, out, _ = run(
        out=second, keep=0.9, data=None, statistics=first / STATISTICS, layer_cut=1, window=0
    )
    assert code == 0 and "questions" not in out
    plan = PruningPlan.load(second)
    assert plan.head_keep.sum() == round(0.9 * LAYERS * HEADS)
    assert plan.layer_cut == 1 and plan.window is None
    one, other = (Statistics.load(folder / STATISTICS) for folder in (first, second))
    assert one.samples == other.samples and one.model == other.model


def test_a_run_that_was_stopped_goes_on_and_makes_the_same(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from yopo.calibration import collect
    from yopo.prompts.llava_prompts import LlavaPrompter

    made, whole = tmp_path / "llava-v1-pruned", tmp_path / "llava-whole"
    assert run(out=whole)[0] == 0
    asked: list[int] = []
    answer = LlavaPrompter.__call__

    def stopping(self: Any, question: Any) -> Any:
        asked.append(1)
        if len(asked) == 6:
            raise KeyboardInterrupt
        return answer(self, question)

    monkeypatch.setattr(LlavaPrompter, "__call__", stopping)
    code, _, err = run()
    assert code == 130 and "the same command goes on from" in err
    assert not made.exists()
    assert len(Statistics.load(tmp_path / "llava-v1-pruned.partial" / STATISTICS)) == 5
    measured: list[str] = []
    measure = collect._measure

    def counting(*arguments: Any) -> Any:
        measured.append(arguments[-3])
        return measure(*arguments)

    monkeypatch.setattr(collect, "_measure", counting)
    assert run()[0] == 0
    assert len(measured) == 12 - 5
    one, other = (Statistics.load(folder / STATISTICS) for folder in (whole, made))
    assert torch.equal(one.ratios, other.ratios) and torch.equal(one.ffn_use, other.ffn_use)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (whole, made)]
    assert configs[0] == configs[1]


def test_images_that_cannot_be_read_are_named_and_counted(
    run: Any, work: Path, tmp_path: Path
) -> None:
    lines = (work / "data.jsonl").read_text().splitlines()
    bad = [json.dumps({"image": f"gone{i}.png", "question": "what?"}) for i in range(12)]
    data = tmp_path / "some.jsonl"
    data.write_text("\n".join([*lines[:4], *bad]))
    code, out, err = run(data=data, image_folder=work)
    assert code == 0 and "4 questions, 12 passed over" in out
    assert err.count("passed over: /") == 10 and "gone0.png" in err
    assert "passed over: 2 more" in err


# -------------------------------------------------------------------------------------- bad input


def refused(run: Any, tmp_path: Path, **changes: Any) -> str:
    before = sorted(tmp_path.rglob("*"))
    code, _, err = run(**changes)
    errors = [line for line in err.splitlines() if line.startswith("yopo: error: ")]
    assert code == 2 and len(errors) == 1, err
    left = [path for path in sorted(tmp_path.rglob("*")) if path not in before]
    assert all(".partial" in str(path) for path in left)
    return errors[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "--data is missing"),
        ({"data": None, "budget": 0.5, "statistics": "x"}, "--data is missing"),
        ({"data": "nowhere.jsonl"}, "there is no file 'nowhere.jsonl'"),
        ({"model": "nowhere"}, "there is no folder 'nowhere'"),
        ({"out": "pruned"}, "'llava' in the name"),
        ({"out": "llava-{work}"}, "is there already"),
        ({"budget": 25}, "--budget is 25; allowed: above 0, to 1"),
        ({"budget": 0.25, "keep": 0.5}, "--keep and --budget are both given"),
        ({"budget": 0.25, "layer_cut": 2}, "--layer-cut and --budget are both given"),
        ({"alpha": 0.1, "keep": 0.5}, "--alpha and --keep are both given"),
        ({"keep": 2}, "--keep is 2; allowed"),
        ({"layer_cut": 9}, "layer_cut is 9; allowed: whole numbers from 0 to 3"),
        ({"mass": "soft"}, "--mass is 'soft'; allowed"),
        ({"tune": 0}, "--tune is 0; allowed: whole numbers from 1"),
        ({"tune": 5, "mass": "drop"}, "--tune tunes sinks, but --mass is drop"),
        ({"tune": 5, "data": None, "statistics": "x"}, "--tune needs --data"),
        ({"samples": 0}, "--samples is 0"),
        ({"samples": 1, "budget": 0.5}, "1 samples: a search holds every second out"),
        ({"evaluations": 0}, "--evaluations is 0"),
        ({"alpha": "nan"}, "--alpha is nan"),
        ({"statistics": "nowhere.safetensors"}, "there are no statistics"),
        ({"budget": 0.02, "mass": "exact"}, "no plan with mass exact/exact reaches"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(
    run: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    if changes.get("out") == "llava-{work}":
        (tmp_path / "llava-there").mkdir()
        changes = {"out": tmp_path / "llava-there"}
    assert message in refused(run, tmp_path, **changes)


@pytest.mark.parametrize("name", ["notes.txt", "folder/notes.txt"])
def test_foreign_files_in_the_partial_folder_are_left_and_named(
    run: Any, tmp_path: Path, name: str
) -> None:
    file = tmp_path / "llava-v1-pruned.partial" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    assert name.split("/")[0] in refused(run, tmp_path)
    assert file.read_text() == "mine"


def test_what_a_run_that_was_killed_left_is_taken_away(run: Any, tmp_path: Path) -> None:
    partial = tmp_path / "llava-v1-pruned.partial"
    partial.mkdir()
    for name in ("config.json.7.140.partial", "statistics.safetensors.7.140.partial", "search.csv"):
        (partial / name).write_text("half of")
    assert run()[0] == 0
    names = {file.name for file in (tmp_path / "llava-v1-pruned").iterdir()}
    assert "config.json" in names
    assert "search.csv" not in names and not [name for name in names if "partial" in name]


def test_a_folder_below_a_file_is_refused(run: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be made" in refused(run, tmp_path, out=tmp_path / "file" / "llava-x")


def test_statistics_that_cannot_be_gone_on_with_name_what_to_remove(
    run: Any, tmp_path: Path
) -> None:
    partial = tmp_path / "llava-v1-pruned.partial"
    partial.mkdir()
    (partial / STATISTICS).write_bytes(b"cut")
    assert f"remove {partial} to start anew" in refused(run, tmp_path)


def test_statistics_of_another_model_are_refused(run: Any, tmp_path: Path) -> None:
    assert run(out=tmp_path / "llava-one")[0] == 0
    path = tmp_path / "llava-one" / STATISTICS
    # The checkpoint just made has its neurons in another order: another model to statistics.
    changes = {"model": tmp_path / "llava-one", "first_neurons": True}
    message = refused(run, tmp_path, statistics=path, **changes)
    assert (
        "the statistics are of another model, one of this shape but with other weights" in message
    )


def test_a_checkpoint_whose_neurons_were_reordered_is_not_reordered_again(
    run: Any, tmp_path: Path
) -> None:
    assert run(out=tmp_path / "llava-one")[0] == 0
    message = refused(run, tmp_path, model=tmp_path / "llava-one")
    assert "in another order already" in message
    assert run(model=tmp_path / "llava-one", first_neurons=True)[0] == 0
    plans = [PruningPlan.load(tmp_path / name) for name in ("llava-one", "llava-v1-pruned")]
    assert plans[0].ffn_order is not None and plans[0].ffn_order == plans[1].ffn_order
