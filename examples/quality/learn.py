"""Training: the tower on patch labels, then the reader on questions; dense or under a plan.

Every stage leaves its result in the work folder, is skipped when that is there, and goes on from
where it was stopped. What is trained when, and for how long, is run.py's.
"""

import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from network import GRID, Reader, Tower, TowerClassifier
from pictures import SHOWN, Task, draw_turns, tokens
from torch import Tensor, nn
from tqdm import tqdm, trange

from yopo.training.distillation import divergence

WORKERS = 2  # parts of a batch at a time: operations are too small to share one among cores
TURNS = 8  # questions to a picture in one training sequence
READINGS = 2  # "read row-2" and the like: four answers at the price of one question


@cache
def fast_products() -> torch.dtype:
    """bfloat16 where this machine multiplies it faster than float32; else float32."""

    def seconds(dtype: torch.dtype) -> float:
        rows, weight = torch.ones(1024, 128, dtype=dtype), torch.ones(352, 128, dtype=dtype)
        took = []
        for _ in range(5):
            began = time.perf_counter()
            F.linear(rows, weight)
            took.append(time.perf_counter() - began)
        return min(took)

    return min(torch.float32, torch.bfloat16, key=seconds)


def products() -> torch.autocast:
    """Within it products are `fast_products`."""
    return torch.autocast("cpu", torch.bfloat16, enabled=fast_products() is torch.bfloat16)


def save(value: object, path: Path) -> None:
    """torch.save, but `path` never holds half of it: a stage may be stopped at any time."""
    unfinished = path.with_suffix(".unfinished")
    torch.save(value, unfinished)
    unfinished.replace(path)


class Course:
    """Optimizer and one-cycle schedule of a model, kept in PATH.partial every 50 steps."""

    def __init__(self, model: nn.Module, steps: int, rate: float, path: Path, warm: float) -> None:
        self.model, self.steps, self.path = model, steps, path
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, rate, (0.9, 0.98), weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, rate, steps, pct_start=warm
        )
        self.partial, self.first = path.with_suffix(".partial"), 0
        if self.partial.exists():
            state = torch.load(self.partial, weights_only=True)
            self.first = state["step"]
            for name in ("model", "optimizer", "schedule"):
                getattr(self, name).load_state_dict(state[name])

    def step(self, gradients: list[Tensor], index: int) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        if (index + 1) % 50 == 0:
            state = {name: getattr(self, name).state_dict() for name in ("optimizer", "schedule")}
            save(state | {"model": self.model.state_dict(), "step": index + 1}, self.partial)

    def finish(self) -> None:
        save(self.model.state_dict(), self.path)
        self.partial.unlink(missing_ok=True)


def train_tower(tasks: list[Task], path: Path, steps: int, batch: int = 64) -> Tower:
    """The tower, learned on both tasks' patch labels; frozen from here on."""
    model = TowerClassifier()
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.tower.eval()
    course = Course(model, steps, 3e-3, path, warm=0.1)
    dice = torch.Generator().manual_seed(5 + course.first)
    weights = [torch.ones(head.out_features) for head in model.heads]
    for weight in weights:
        weight[0] = 0.3  # most patches are background
    torch.set_num_threads(1)
    bar = trange(course.first, steps, initial=course.first, total=steps, desc="tower")
    for index in bar:
        pixels, labels = [], []
        for task in tasks:
            rows = torch.randint(len(task.pixels), (batch // len(tasks),), generator=dice)
            pixels.append(task.pixels[rows])
            labels.append(task.classes[rows])
        loss = torch.zeros(())
        with products():
            logits = model(torch.cat(pixels))
        for channel, (guess, weight) in enumerate(zip(logits, weights, strict=True)):
            truth = torch.cat(labels)[:, channel]
            loss = loss + F.cross_entropy(guess.float(), truth, weight, label_smoothing=0.05)
        course.step(list(torch.autograd.grad(loss, course.parameters)), index)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    course.finish()
    return model.tower.eval()


@torch.inference_mode()
def tower_accuracy(path: Path, task: Task) -> list[float]:
    """Percent of patches with something on them that the tower classifies rightly, by channel."""
    model = TowerClassifier()
    model.load_state_dict(torch.load(path, weights_only=True))
    model.eval()
    right, seen = [0, 0], [0, 0]
    for pixels, labels in zip(task.pixels.split(100), task.classes.split(100), strict=True):
        for channel, logits in enumerate(model(pixels)):
            truth = labels[:, channel]
            right[channel] += ((logits.argmax(1) == truth) & (truth > 0)).sum().item()
            seen[channel] += (truth > 0).sum().item()
    return [100 * r / max(s, 1) for r, s in zip(right, seen, strict=True)]


def pool(patches: Tensor) -> Tensor:
    """(b, 144, 96) to (b, 64, 96), each the mean of 2 x 2 patches of one digit's cell."""
    grid = patches.transpose(1, 2).unflatten(2, (12, 12))
    return F.adaptive_avg_pool2d(grid, GRID).flatten(2).transpose(1, 2)


@torch.inference_mode()
def features(tower: Tower, task: Task, path: Path) -> Tensor:
    """(pictures, 64, 96) float16, kept in `path`."""
    if not path.exists():
        parts = [pool(tower(part)).half() for part in tqdm(task.pixels.split(100), path.stem)]
        save(torch.cat(parts), path)
    return torch.load(path, weights_only=True, mmap=True)


def align(model: Reader, tasks: list[tuple[Task, Tensor]], steps: int, batch: int = 32) -> None:
    """LLaVA's first stage, in seconds: the projector learns to make of each visual token the
    embeddings of the words for what it shows. What the model says begins as these embeddings."""
    words = model.llama.get_input_embeddings().weight.detach()
    tables = [torch.zeros(len(shown), words.shape[1]) for shown in SHOWN]
    for table, shown in zip(tables, SHOWN, strict=True):
        table[1:] = words[[tokens(word)[0] for word in shown[1:]]]
    generator = torch.Generator().manual_seed(1)
    layers = model.projector.layers
    optimizer = torch.optim.AdamW(layers.parameters(), 3e-3)
    torch.set_num_threads(1)
    for _ in trange(steps, desc="projector"):
        loss = torch.zeros(())
        for task, stored in tasks:
            rows = torch.randint(len(stored), (batch,), generator=generator)
            patches = task.classes[rows].clamp(min=0).unflatten(2, (12, 12)).float()
            classes = F.adaptive_max_pool2d(patches, GRID).long().flatten(2)
            told = sum(table[shown] for table, shown in zip(tables, classes.unbind(1), strict=True))
            loss = loss + F.mse_loss(layers(stored[rows].float()), told)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        model.llama.lm_head.weight.copy_(0.2 * words)


def sequence(turns: list[tuple[str, str, str]]) -> tuple[list[int], list[int]]:
    """Ids after the picture, and labels: at each question's end the answer, -100 elsewhere."""
    ids, labels = [], []
    for _, question, answer in turns:
        asked, told = tokens(question), tokens(answer)
        ids += asked + told
        labels += [-100] * (len(asked) - 1) + told + [-100]  # each one place before its token
    return ids, labels


def pad(rows: list[list[int]], value: int = 0) -> Tensor:
    tensors = [torch.tensor(row) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def train_reader(
    model: Reader,
    tasks: list[tuple[Task, Tensor]],
    path: Path,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    warm: float = 0.05,
    readings: float = 0.0,
    teacher: Reader | None = None,
) -> None:
    """Trains the model as it stands (dense or under a plan) on all tasks alike; leaves `path`.

    teacher: who says what is right, in place of the answers.
    readings: for this share of the steps it also reads READINGS lines of digits off each picture.
    """
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return
    course = Course(model, steps, rate, path, warm)
    generator = torch.Generator().manual_seed(seed + course.first)
    dice = random.Random(seed + course.first)
    began, running = time.time(), {}

    def learn(part: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """The loss, which places are right, and gradients, of a part of a batch."""
        seen, ids, targets = part
        asked = targets >= 0
        with products():
            logits = model(seen.float(), ids).float()
            with torch.no_grad():
                told = None if teacher is None else teacher(seen.float(), ids)[asked]
        right = logits.argmax(-1) == targets
        if told is None:
            loss = F.cross_entropy(logits[asked], targets[asked])
        else:
            loss = divergence(logits[asked], told, targets[asked], temperature=1.0, weight=1.0)
            loss = loss / asked.sum()
        # bfloat16 weights' own gradients are cast back by autocast.
        return loss.detach(), right, torch.autograd.grad(loss, course.parameters)

    model.train()
    # For sequences this short, half the time of SDPA's backward on a CPU; a plan has its own.
    model.llama.set_attn_implementation("eager")
    torch.set_num_threads(1)
    bar = trange(course.first, steps, initial=course.first, total=steps, desc=path.stem)
    bar.mininterval = 20
    with ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,)) as workers:
        for index in bar:
            parts, named = [], []
            more = READINGS if index < readings * steps else 0
            for task, stored in tasks:
                # One task a part: their sequences are of different lengths.
                rows = torch.randint(len(stored), (batch // len(tasks),), generator=generator)
                turns = [draw_turns(task, row, TURNS, dice, readings=more) for row in rows.tolist()]
                made = [sequence(about) for about in turns]
                ids, labels = pad([m[0] for m in made]), pad([m[1] for m in made], -100)
                parts.append((stored[rows], ids, labels))
                named.append([t[0] for about in turns for t in about for _ in t[2].split()])
            losses, rights, gradients = zip(*workers.map(learn, parts), strict=True)
            course.step([torch.stack(g).mean(0) for g in zip(*gradients, strict=True)], index)
            for labels, part, right in zip(named, parts, rights, strict=True):
                for kind, hit in zip(labels, right[part[2] >= 0].tolist(), strict=True):
                    running[kind] = 0.998 * running.get(kind, 0.0) + 0.002 * hit
            if (index + 1) % 50 == 0:
                shares = " ".join(f"{kind} {100 * share:.1f}" for kind, share in running.items())
                loss = torch.stack(losses).mean()
                bar.write(f"{path.stem} {index + 1}: loss {loss:.3f}; right of late: {shares}")
                sys.stdout.flush()
    model.llama.set_attn_implementation("sdpa")
    course.finish()
    print(f"{path.stem}: {time.time() - began:.0f} s for {steps - course.first} steps of {batch}")
