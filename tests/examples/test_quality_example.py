"""examples/quality on a tiny random reader: pictures, rivals, evaluation, intervals, the report."""

from __future__ import annotations

import json
import random
import re
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version

if Version(transformers.__version__) < Version("4.57"):
    pytest.skip("the study is written for recent transformers", allow_module_level=True)
for needed in ("sklearn", "easy_vqa", "PIL", "tqdm"):
    pytest.importorskip(needed)

FOLDER = Path(__file__).resolve().parents[2] / "examples/quality"
sys.path.insert(0, str(FOLDER))

import answers  # noqa: E402
import learn  # noqa: E402
import pictures  # noqa: E402
import report  # noqa: E402
import rivals  # noqa: E402
import variants  # noqa: E402
from network import CLASSES, GRID, VISUAL, Reader  # noqa: E402

from yopo import PruningPlan, apply  # noqa: E402
from yopo.counting import flops  # noqa: E402


@pytest.fixture(scope="module")
def digits() -> pictures.Task:
    return pictures.digits_task("test", 6)


@pytest.fixture(scope="module")
def reader() -> Reader:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    return Reader(**small, initializer_range=0.3).eval()


@pytest.fixture(scope="module")
def batch(digits: pictures.Task) -> answers.Batch:
    features = torch.randn(6, VISUAL, 96, generator=torch.Generator().manual_seed(1))
    [(_, found)] = answers.batches(digits.turns, features)
    return found


def test_questions_about_digits_are_answered_by_the_grid(digits: pictures.Task) -> None:
    grid = [[1, 2, 3, 4], [5, 5, 7, 8], [9, 0, 1, 2], [3, 4, 5, 6]]
    dice = random.Random(0)
    said: dict[str, set[str]] = {}
    for kind in (*pictures.KINDS, "read"):
        for _ in range(60):
            _, question, answer = pictures.ask(kind, grid, dice)
            numbers = [int(number) for number in re.findall(r"\d+", question)]
            said.setdefault(kind, set()).add(answer)
            if kind == "position":
                assert answer == str(grid[numbers[0] - 1][numbers[1] - 1])
            elif kind == "count":
                assert answer == str(sum(row.count(numbers[0]) for row in grid))
            elif kind == "read":
                at = numbers[0] - 1
                line = grid[at] if "row" in question else [row[at] for row in grid]
                assert answer == " ".join(map(str, line))
            elif kind == "row":
                assert (answer == "yes") == (numbers[0] in grid[numbers[1] - 1])
            else:
                pairs = [(row[i], row[i + 1]) for row in grid for i in range(3)]
                assert (answer == "yes") == (tuple(numbers) in pairs)
    assert said["row"] == said["beside"] == {"yes", "no"}
    assert all(len(turns) == pictures.ASKED * len(pictures.KINDS) for turns in digits.turns)


def test_pictures_show_their_digits_where_the_labels_say(digits: pictures.Task) -> None:
    ink = 255 - digits.pixels.float().mean(1)
    each = ink.unflatten(1, (4, 24)).unflatten(3, (4, 24)).transpose(2, 3).flatten(3).mean(-1)
    assert (each > 25).all()  # every cell has a digit in it
    assert torch.equal(digits.grids, pictures.digits_task("test", 6).grids)
    shown = digits.classes[:, 0].view(-1, 12, 12)
    assert torch.equal(shown[:, 1::3, 1::3] - 1, digits.grids)


def test_aligned_visual_tokens_say_the_digit_they_show(digits: pictures.Task) -> None:
    assert tuple(map(len, pictures.SHOWN)) == CLASSES
    torch.manual_seed(0)
    reader = Reader(hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    reader.start_well()
    shown = digits.classes[:, 0].unflatten(1, (12, 12))[:, 1::3, 1::3]  # one patch of each cell
    seen = torch.nn.functional.one_hot(shown, 96).float().repeat_interleave(2, 1)
    features = seen.repeat_interleave(2, 2).flatten(1, 2)  # (6, 64, 96), as of 8 x 8 tokens
    learn.align(reader, [(digits, features)], steps=200, batch=6)
    words = reader.llama.get_input_embeddings().weight
    made = reader.projector.layers(features)[:, :: 2 * 8 + 2]  # the first token of the diagonal
    nearest = torch.cdist(made, words[[pictures.tokens(str(digit))[0] for digit in range(10)]])
    assert torch.equal(nearest.argmin(-1), torch.stack([grid.diagonal() for grid in digits.grids]))
    assert torch.equal(reader.llama.lm_head.weight, 0.2 * words)


def test_no_test_digit_is_a_training_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[set[bytes]] = []

    def spy(glyphs: torch.Tensor, augment: bool, generator: torch.Generator) -> torch.Tensor:
        drawn.append({glyph.numpy().tobytes() for glyph in glyphs})
        return torch.zeros(len(glyphs), pictures.CELL, pictures.CELL)

    monkeypatch.setattr(pictures, "_written", spy)
    pictures.digits_task("train", 300)
    pictures.digits_task("test", 300)
    assert not drawn[0] & drawn[1]


def test_easy_vqa_has_all_its_test_questions() -> None:
    task = pictures.easy_task("test")
    assert sum(map(len, task.turns)) == 9673
    assert len(task.pixels) == len(task.turns) == 1000


def one_prefill(reader: Reader, batch: answers.Batch) -> torch.Tensor:
    logits = reader(batch.features[batch.owner], batch.ids)
    return logits[torch.arange(len(batch.ids)), batch.last]


@pytest.mark.parametrize("pruned", [False, True])
def test_shared_prefix_answers_as_one_prefill_does(
    reader: Reader, batch: answers.Batch, pruned: bool
) -> None:
    copy = Reader(**{k: getattr(reader.config, k) for k in ("hidden_size", "intermediate_size")},
                  num_hidden_layers=4)  # fmt: skip
    copy.load_state_dict(reader.state_dict())
    if pruned:
        keep = torch.rand(4, 4, generator=torch.Generator().manual_seed(2)) < 0.6
        apply(copy.llama, PruningPlan(keep, window=5, layer_cut=3, ffn_ratio=2, cut_mass="drop"))
    with torch.no_grad():
        whole = one_prefill(copy, batch)
        torch.testing.assert_close(answers.question_logits(copy, batch), whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_a_rival_that_keeps_all_tokens_is_the_dense_reader(
    reader: Reader, batch: answers.Batch, layer: int
) -> None:
    dense = answers.guesses(reader)(batch)
    assert torch.equal(rivals.dropping(reader, layer, VISUAL)(batch), dense)
    assert len(set(dense.tolist())) > 2  # a reader that says one thing would prove nothing


def test_a_rival_that_keeps_none_of_layer_0_never_sees_the_picture(
    reader: Reader, batch: answers.Batch
) -> None:
    blind = rivals.dropping(reader, 0, 0)
    other = replace(batch, features=torch.randn_like(batch.features))
    assert torch.equal(blind(batch), blind(other))
    late = rivals.dropping(reader, 2, 0)
    assert not torch.equal(late(batch), late(other))


def test_fastv_keeps_what_the_last_token_attends_to(reader: Reader, batch: answers.Batch) -> None:
    seen = []

    def spy(attention: torch.Tensor) -> torch.Tensor:
        seen.append(attention)
        return attention

    rivals.dropping(reader, 2, 10, spy)(batch)
    reader.llama.set_attn_implementation("eager")
    embeds = torch.cat(
        [reader.prefix(batch.features[batch.owner]),
         reader.llama.get_input_embeddings()(batch.ids)], dim=1,
    )  # fmt: skip
    with torch.no_grad():
        maps = reader.llama.model(inputs_embeds=embeds, output_attentions=True).attentions[1]
    reader.llama.set_attn_implementation("sdpa")
    last = maps.mean(1)[torch.arange(len(embeds)), 1 + VISUAL + batch.last]
    torch.testing.assert_close(seen[0], last[:, 1 : 1 + VISUAL], atol=1e-5, rtol=0)


def test_flops_of_a_rival_are_the_dense_ones_where_it_keeps_all(reader: Reader) -> None:
    layers = flops.prefill_flops(reader.config, flops.Prompt(1, (GRID,), 5))
    dense = sum(x.visual_projections + x.visual_attention + x.visual_ffn for x in layers)
    assert rivals.visual_flops(reader.config, 0, VISUAL) == dense
    assert rivals.visual_flops(reader.config, 4, 0) == dense
    assert rivals.visual_flops(reader.config, 2, 0) == dense / 2
    assert rivals.affordable(reader.config, 2, 0.4) is None
    keep = rivals.affordable(reader.config, 1, 0.4)
    assert rivals.visual_flops(reader.config, 1, keep) <= 0.4 * dense
    assert rivals.visual_flops(reader.config, 1, keep + 1) > 0.4 * dense


def test_plans_made_by_hand_keep_within_their_budget() -> None:
    config = Reader().config
    ratios = torch.rand(100, 12, 4, generator=torch.Generator().manual_seed(0))
    for budget in variants.BUDGETS:
        plan = variants.plan_by_hand(budget, ratios)
        assert 0.8 * budget < variants.shares(config, plan)[0] <= budget
    assert variants.shares(config, None) == (100, 100)


def test_recipes_take_the_first_layers_of_the_order_and_no_more_than_the_budget_asks() -> None:
    config, order = Reader().config, [5, 0, 3, 7, 1, 2, 11, 4, 10, 9, 8, 6]
    for rule, budgets in variants.RECIPES.items():
        for budget in budgets:
            plan = variants.within(config, rule, order, budget)
            assert plan is not None and variants.shares(config, plan)[0] <= budget
            lost = next(n for n in range(13) if variants.recipe(config, rule, order[:n]) == plan)
            if lost:
                more = variants.recipe(config, rule, order[: lost - 1])
                assert variants.shares(config, more)[0] > budget
    read = variants.within(config, "ViCA", order, 4).head_keep.any(1).nonzero().flatten()
    assert read.tolist() == sorted(order[-len(read) :])  # those that matter most
    assert variants.within(config, "ShortV", order, 12) is None  # keys and values alone are more


def test_every_variant_has_a_name_of_its_own_and_the_matrix_is_whole() -> None:
    made = variants.all_variants()
    assert len({one.name for one in made}) == len(made)
    for rule in ("hand", "search"):
        for budget in variants.BUDGETS:
            for mass in ("exact", "drop", "sink"):
                for tuned in (False, True):
                    assert variants.Variant(rule, budget, mass, tuned) in made


def test_a_coarser_picture_has_the_means_of_its_parts(reader: Reader, batch: answers.Batch) -> None:
    whole = reader.prefix(batch.features)
    try:
        reader.grid = (4, 2)
        coarse = reader.prefix(batch.features)
    finally:
        reader.grid = GRID
    assert torch.equal(coarse[:, :1], whole[:, :1]) and coarse.shape[1] == 1 + 4 * 2
    parts = whole[:, 1:].unflatten(1, (4, 2, 2, 4)).mean((2, 4)).flatten(1, 2)
    torch.testing.assert_close(coarse[:, 1:], parts)
    for budget, (rows, columns) in rivals.COARSE.items():
        assert rows * columns <= rivals.kept(Reader().config, "downsampling", budget / 100)[1]


def test_vtw_as_a_recipe_answers_as_dropping_every_token(batch: answers.Batch) -> None:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    reader = Reader(**small, initializer_range=0.3).eval()
    dropped = rivals.dropping(reader, 2, 0)(batch)
    apply(reader.llama, variants.recipe(reader.config, "VTW", [3, 2]))
    assert torch.equal(answers.guesses(reader)(batch), dropped)


def test_interval_draws_pictures_not_questions() -> None:
    together = [[True] * 10, [False] * 10] * 50
    apart = [[True] * 5 + [False] * 5] * 100
    assert answers.interval(apart) == (50, 50)
    low, high = answers.interval(together)
    assert 38 < low < 42 < 58 < high < 62
    loss = answers.mean_loss({"a": together, "b": apart}, {"a": apart, "b": apart})
    assert loss[0] == 0 and -6 < loss[1] < -4 < 4 < loss[2] < 6


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_report_writes_table_and_figure(tmp_path: Path, digits: pictures.Task) -> None:
    test = {"easy": digits, "digits": digits}
    right = [[True, True, False, True, True, False, False, True]] * 6
    (tmp_path / "measured").mkdir()
    given = [variants.Variant("dense"), variants.Variant("search", 25, "drop")]
    given.append(variants.Variant("FastV", 25))
    for one in given:
        fact = {"name": one.name, **vars(one), "plan": "words", "visual": one.budget}
        fact |= {"right": {"easy": right, "digits": right}}
        (tmp_path / "measured" / f"{one.name}.json").write_text(json.dumps(fact))
    rows = report.write_report(tmp_path / "measured", tmp_path, test)
    assert [row["name"] for row in rows] == [one.name for one in given]
    assert rows[1]["easy"] == 62.5 and rows[1]["digits"] == 75  # of the kinds that are studied
    assert rows[1]["below_dense"] == rows[1]["beside"] == 0
    assert (tmp_path / "quality.png").stat().st_size > 10000
    assert (tmp_path / "quality.csv").read_text().count("\n") == 4
    told = (tmp_path / "quality.md").read_text()
    assert "| search | drop | no | 62.5 · **75.0** (75.0–75.0) at 25.0 |" in told
    assert "| search, 25 %, not fine-tuned: 96.5 or more | missed: 75.0 |" in told
    assert "no worse than anything else | met: 75.0, FastV 75.0 |" in told
