"""What a run of a recipe leaves to look at: answers measured against the dense model, a table, a
picture of the losses, and what it takes to go on after it was stopped. Trains nothing."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import trange
from transformers import TrainerCallback

from yopo.errors import BadInput
from yopo.files import write_json

RUN, RESULTS, PICTURE = "run.json", "results.json", "losses.png"
# Whatever these are, the numbers are the same.
_FREE = {"output_dir", "save_steps", "save_total_limit", "logging_steps", "disable_tqdm"}


@torch.no_grad()
def right_answers(
    model: Any, rows: list[dict[str, str]], collate: Callable[..., Any], batch: int, what: str
) -> float:
    """Percent of `rows` that `model` answers exactly right, the answer's end included: each of the
    answer's tokens is the likeliest after those before it, which is so if greedy generation gives
    it."""
    training, right = model.training, 0
    model.eval()
    for first in trange(0, len(rows), batch, desc=what):
        inputs = {n: v.to(model.device) for n, v in collate(rows[first : first + batch]).items()}
        labels = inputs.pop("labels")[:, 1:]
        guessed = model(**inputs, use_cache=False).logits[:, :-1].argmax(-1)
        right += int(((guessed == labels) | (labels == -100)).all(1).sum())
    model.train(training)
    return 100 * right / len(rows)


class LossPicture(TrainerCallback):
    """Draws the losses so far, whenever a checkpoint is saved and at the end."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        from matplotlib.figure import Figure

        axes = (figure := Figure((6, 3.5), layout="constrained")).subplots()
        for name in ("loss", "eval_loss"):
            points = [(row["step"], row[name]) for row in state.log_history if name in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=name)
        axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
        axes.legend()
        figure.savefig(Path(args.output_dir) / PICTURE, dpi=120)

    on_train_end = on_save


def last_checkpoint(folder: Path, given: dict[str, Any], files: list[str]) -> str | None:
    """The last whole checkpoint of this very run in `folder`, which is made for it if need be.

    given: what was asked for. files: its data. Raises BadInput where the folder is another run's.
    """
    asked = {name: value for name, value in given.items() if name not in _FREE}
    for file in files:
        asked[f"sha256 of {file}"] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    asked = json.loads(json.dumps(asked, default=str))
    if (folder / RUN).is_file():
        before = json.loads((folder / RUN).read_text())
        if before != asked:
            other = next(n for n in {**before, **asked} if before.get(n) != asked.get(n))
            raise BadInput(
                f"output_dir {folder} holds another run: its {other} is {before.get(other)!r}, "
                f"here {asked.get(other)!r}. Take another output_dir, or remove that one"
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise BadInput(
            f"output_dir {folder} is not empty and holds no run of these recipes: take another"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RUN, asked)
    # The state is what the Trainer writes last: a checkpoint without was cut off.
    states = folder.glob("checkpoint-*/trainer_state.json")
    whole = {int(state.parent.name.partition("-")[2]): state.parent for state in states}
    return str(whole[max(whole)]) if whole else None


class Results:
    """results.json in the run's folder: what was measured already is not measured again."""

    def __init__(self, folder: Path, main: bool) -> None:
        self._file, self._main = folder / RESULTS, main
        self.values: dict[str, Any] = {}
        if self._file.is_file():
            self.values = json.loads(self._file.read_text())

    def put(self, name: str, value: Callable[[], Any]) -> None:
        if name not in self.values:
            self.values[name] = value()
            if self._main:
                write_json(self._file, self.values)

    def table(self) -> str:
        kinds = ("dense", "pruned", "fine-tuned", "fine-tuned, plan off")
        rows = [f"  {name:<21} {self.values[name]:6.1f} %" for name in kinds]
        return "\n".join([f"right of {self.values['questions']} held-out questions:", *rows])
