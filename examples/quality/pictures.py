"""The pictures and questions of both tasks: easy-VQA, and grids of handwritten digits.

All of it is made from installed packages (easy-vqa, scikit-learn), the same on every machine. Words
become token ids here as well; no model lives here.
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "tiny_llava"))
import data as easy  # examples/tiny_llava/data.py: easy-VQA as tensors

Turn = tuple[str, str, str]  # kind of the question, question, answer (a word; "read" has four)
SIDE = 96  # pixels of a picture's side
CELLS = 4  # digits to a side
CELL = SIDE // CELLS
TRAIN_DIGITS = 1200  # of load_digits' 1,797; the others are seen in test pictures only
KINDS = ("position", "count", "beside", "row")
LEARNED = KINDS[:2]  # those that the dense reader learned well enough to study pruning on
ASKED = 2  # questions of each kind about a test picture
# The word for each of Task.classes, by channel; none for background.
SHOWN = (("", *map(str, range(10)), *easy.SHAPES), ("", *easy.COLOURS))


@dataclass
class Task:
    """One split of one task; row i of every field is the same picture.

    pixels: (n, 3, 96, 96) uint8.
    classes: (n, 2, 144) int64, what each patch shows (labels for the tower): in channel 0 a digit
        1..10 or a shape 11..13, 0 for background; in channel 1 a colour 1..8, 0 for background.
    grids: (n, 4, 4) int64, the digits; None for easy-VQA.
    turns: the questions of each picture with their answers (digits for training: none, they are
        drawn from `grids`).
    """

    pixels: Tensor
    classes: Tensor
    grids: Tensor | None
    turns: list[list[Turn]]

    def first(self, count: int) -> "Task":
        grids = None if self.grids is None else self.grids[:count]
        return Task(self.pixels[:count], self.classes[:count], grids, self.turns[:count])


def digits_task(split: str, pictures: int) -> Task:
    """Grids of 4 x 4 handwritten digits; "test" has other handwriting, and two questions a kind."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    chosen = order[:TRAIN_DIGITS] if split == "train" else order[TRAIN_DIGITS:]
    generator = torch.Generator().manual_seed({"train": 1, "test": 2}[split])
    glyphs = torch.from_numpy(images[chosen]).float().view(-1, 1, 8, 8) / 16
    labels = torch.from_numpy(labels[chosen]).long()
    # A digit of each class is equally likely in each cell.
    draw = torch.rand(pictures * CELLS**2, len(labels), generator=generator)
    wanted = torch.randint(10, (pictures * CELLS**2, 1), generator=generator)
    index = draw.masked_fill_(labels != wanted, -1).argmax(1)
    ink = _written(glyphs[index], augment=split == "train", generator=generator)
    ink = ink.view(pictures, CELLS, CELLS, CELL, CELL).transpose(2, 3).flatten(3).flatten(1, 2)
    paper = 225 + 30 * torch.rand(pictures, 3, 1, 1, generator=generator)
    pixels = (paper * (1 - 0.9 * ink[:, None])).round().to(torch.uint8)
    grids = labels[index].view(pictures, CELLS, CELLS)
    shown = (grids + 1).repeat_interleave(3, 1).repeat_interleave(3, 2).flatten(1)
    dice = random.Random(3)
    asked = [[ask(kind, grid, dice) for kind in KINDS * ASKED] for grid in grids.tolist()]
    turns = asked if split == "test" else [[] for _ in asked]
    return Task(pixels, torch.stack([shown, torch.zeros_like(shown)], 1), grids, turns)


def _written(glyphs: Tensor, augment: bool, generator: torch.Generator) -> Tensor:
    """(n, 1, 8, 8) to (n, 24, 24): each digit 16 pixels wide somewhere in its cell; with `augment`
    also turned, larger or smaller."""
    n = len(glyphs)
    angle, scale = torch.zeros(n), torch.full((n,), CELL / 16)
    move = (torch.rand(n, 2, generator=generator) - 0.5) * 0.5
    if augment:
        angle = (torch.rand(n, generator=generator) - 0.5) * 0.6
        scale = scale * (0.85 + 0.3 * torch.rand(n, generator=generator))
    cos, sin = scale * angle.cos(), scale * angle.sin()
    turn = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    theta = torch.cat([turn, (turn @ move[:, :, None])], dim=2)
    parts = []
    for some, what in zip(glyphs.split(20000), theta.split(20000), strict=True):
        places = F.affine_grid(what, [len(some), 1, CELL, CELL], align_corners=False)
        parts.append(F.grid_sample(some, places, align_corners=False)[:, 0])
    return torch.cat(parts)


def ask(kind: str, grid: list[list[int]], dice: random.Random) -> Turn:
    """A question of the kind about the grid of digits. Yes and no are equally likely."""
    present = sorted({digit for row in grid for digit in row})
    row, column = dice.randrange(CELLS), dice.randrange(CELLS)
    if kind == "position":
        question = f"which digit at row-{row + 1} column-{column + 1}"
        return kind, question, str(grid[row][column])
    if kind == "count":
        digit = dice.choice(present) if dice.random() < 0.8 else dice.randrange(10)
        return kind, f"how many {digit}", str(sum(line.count(digit) for line in grid))
    if kind == "read":
        line = grid[row] if dice.random() < 0.5 else [line[column] for line in grid]
        where = f"row-{row + 1}" if line is grid[row] else f"column-{column + 1}"
        return kind, f"read {where}", " ".join(map(str, line))
    yes = dice.random() < 0.5
    if kind == "row":
        here = set(grid[row])
        others = [digit for digit in present if digit not in here]
        yes = yes or not others
        digit = dice.choice(sorted(here) if yes else others)
        return kind, f"is {digit} in row-{row + 1}", "yes" if yes else "no"
    if kind == "beside":
        pairs = {(line[i], line[i + 1]) for line in grid for i in range(CELLS - 1)}
        pair = dice.choice(sorted(pairs))
        while not yes and pair in pairs:
            pair = (dice.choice(present), dice.choice(present))
        return kind, f"is {pair[0]} left of {pair[1]}", "yes" if yes else "no"
    raise ValueError(f"kind is {kind!r}; allowed: {', '.join(KINDS)}")


def _spaced(question: str) -> str:
    return question.replace("?", " ?")


def easy_task(split: str, copies: int = 0) -> Task:
    """easy-VQA. Training: every question that can be asked of each picture, and `copies` more of
    each picture with the shape elsewhere; test: the split's own 9,673 questions, nothing else."""
    part = easy.load_split(split)
    turns = easy.all_turns(part) if split == "train" else part.turns
    kinded = [[("easy", _spaced(q), a) for q, a in about] for about in turns]
    generator = torch.Generator().manual_seed(4)
    moved = [easy.augment(part.pixels, part.objects, generator) for _ in range(copies)]
    pixels = torch.cat([part.pixels, *(pixels for pixels, _ in moved)])
    objects = torch.cat([part.objects, *(mask for _, mask in moved)])
    pixels = F.interpolate(pixels.float(), (SIDE, SIDE), mode="bilinear").round().to(torch.uint8)
    # A patch shows the shape if a quarter of it does.
    shows = (F.interpolate(objects[:, None].float(), (12, 12), mode="area") > 0.25).flatten(1)
    labels = torch.stack([part.shapes + 11, part.colours + 1], 1).repeat(copies + 1, 1)
    told = (torch.stack([part.shapes, part.colours], 1) >= 0).repeat(copies + 1, 1)
    classes = torch.where(shows[:, None], labels[:, :, None], 0)
    classes = torch.where(shows[:, None] & ~told[:, :, None], -100, classes)
    return Task(pixels, classes, None, kinded * (copies + 1))


def draw_turns(
    task: Task,
    picture: int,
    count: int,
    dice: random.Random,
    kinds: Sequence[str] = LEARNED,
    readings: int = 0,
) -> list[Turn]:
    """Training questions about a picture, of `kinds` about digits, and `readings` lines to read.

    Of easy-VQA half are among those that name what is there: seven in eight of its yes/no questions
    name what is not (see tiny_llava's language.py).
    """
    if task.grids is not None:
        grid = task.grids[picture].tolist()
        asked = [ask(dice.choice(kinds), grid, dice) for _ in range(count)]
        # Last, so that no question can be answered off them.
        return asked + [ask("read", grid, dice) for _ in range(readings)]
    turns = task.turns[picture]
    there = [t for t in turns if _names_what_is_there(t)] or turns
    return [dice.choice(there if dice.random() < 0.5 else turns) for _ in range(count)]


def _names_what_is_there(turn: Turn) -> bool:
    _, question, answer = turn
    return answer not in ("yes", "no") or (answer == "yes") != easy.is_negated(question)


@cache
def vocabulary() -> dict[str, int]:
    """Every word of every question and answer, with its token id."""
    import easy_vqa

    questions, answers, _ = easy_vqa.get_train_questions()
    words = {word for text in (*questions, *answers) for word in _spaced(text).split()}
    words |= {"which", "digit", "at", "how", "many", "is", "in", "left", "of", "read"}
    words |= {f"{line}-{number}" for line in ("row", "column") for number in range(1, CELLS + 1)}
    words |= {str(number) for number in range(CELLS**2 + 1)}
    return {word: i for i, word in enumerate(("<pad>", "<s>", *sorted(words)))}


def tokens(text: str) -> list[int]:
    """Token ids of a question or an answer: one a word."""
    return [vocabulary()[word] for word in text.split()]
