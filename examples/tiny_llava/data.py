"""easy-VQA as tensors: images, what they show, the questions, and a free augmentation."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import easy_vqa
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
# What OpenAI's CLIP uses; preprocessor_config.json says the same to LLaVA.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGE_SIZE = 96
PATCHES_PER_SIDE = 24


@dataclass
class Split:
    """One split; row i of every field is the same image."""

    paths: list[Path]
    pixels: torch.Tensor  # (images, 3, 64, 64) uint8
    objects: torch.Tensor  # (images, 64, 64) bool: the pixels of the shape
    turns: list[list[tuple[str, str]]]  # (question, answer) pairs about the image
    shapes: torch.Tensor  # (images,) index into SHAPES; -1 where no question tells
    colours: torch.Tensor  # (images,) index into COLOURS; -1 where no question tells


def is_negated(question: str) -> bool:
    """Whether it asks if something is absent: "is there not a circle?", "is no circle present?"."""
    return " not " in question or " no " in question


def _names(question: str, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if f" {name} " in question.replace("?", " ")]


def _told(turns: list[tuple[str, str]], names: tuple[str, ...]) -> int:
    """The shape (or colour) of an image, as its questions give it away; -1 if they do not."""
    for question, answer in turns:
        if answer in names:
            return names.index(answer)
        asked = _names(question, names)
        if asked and answer in ("yes", "no") and (answer == "yes") != is_negated(question):
            return names.index(asked[0])
    return -1


def all_turns(split: "Split") -> list[list[tuple[str, str]]]:
    """For each image every question of the split that can be asked about it, with its answer.

    Ten times as many as the split asks, and with enough that name what is there. Where the split
    does not tell both shape and colour of an image, the turns it has.
    """
    questions = sorted({question for turns in split.turns for question, _ in turns})
    result = []
    for turns, shape, colour in zip(split.turns, split.shapes, split.colours, strict=True):
        if min(shape, colour) < 0:
            result.append(turns)
            continue
        shown, answers = (SHAPES[shape], COLOURS[colour]), []
        for question in questions:
            there = all(name in shown for name in _names(question, SHAPES + COLOURS))
            if not question.startswith("what"):
                answers.append((question, "yes" if there != is_negated(question) else "no"))
            elif there:
                answers.append((question, shown["color" in question]))
        result.append(answers)
    return result


def load_split(name: str) -> Split:
    """The "train" or "test" split, from the installed easy-vqa package."""
    questions, answers, image_ids = getattr(easy_vqa, f"get_{name}_questions")()
    path_of = getattr(easy_vqa, f"get_{name}_image_paths")()
    turns: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, image_id in zip(questions, answers, image_ids, strict=True):
        turns[image_id].append((question, answer))
    ids = sorted(path_of)
    images = np.stack([np.asarray(Image.open(path_of[i]).convert("RGB")) for i in ids])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    # The background is one colour and covers most of every image: the median is a pixel of it.
    background = pixels.flatten(2).median(dim=2).values[:, :, None, None]
    return Split(
        paths=[Path(path_of[i]) for i in ids],
        pixels=pixels,
        objects=(pixels != background).any(dim=1),
        turns=[turns[i] for i in ids],
        shapes=torch.tensor([_told(turns[i], SHAPES) for i in ids]),
        colours=torch.tensor([_told(turns[i], COLOURS) for i in ids]),
    )


def augment(
    pixels: torch.Tensor, objects: torch.Tensor, generator: torch.Generator, side: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Puts each shape somewhere else, mirrored or not, on another light background.

    No question of easy-VQA names a place or a side, so every answer stays true.
    In: (batch, 3, 64, 64) uint8 and (batch, 64, 64) bool; out: the same, `side` pixels wide and
    high (no shape is larger than 40).
    """
    new_pixels = torch.empty(len(pixels), 3, side, side, dtype=torch.uint8)
    new_objects = torch.zeros(len(pixels), side, side, dtype=torch.bool)

    def draw(low: int, high: int, size: tuple[int, ...] = ()) -> torch.Tensor:
        return torch.randint(low, high, size, generator=generator)

    for index, (image, mask) in enumerate(zip(pixels, objects, strict=True)):
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        top, bottom = int(rows[0]), int(rows[-1]) + 1
        left, right = int(columns[0]), int(columns[-1]) + 1
        image, mask = image[:, top:bottom, left:right], mask[top:bottom, left:right]
        if draw(0, 2):
            image, mask = image.flip(-1), mask.flip(-1)
        background = draw(225, 256, (3, 1, 1)).to(torch.uint8)
        y = int(draw(0, side - mask.shape[0] + 1))
        x = int(draw(0, side - mask.shape[1] + 1))
        place = (slice(y, y + mask.shape[0]), slice(x, x + mask.shape[1]))
        new_pixels[index] = background
        new_pixels[index][:, place[0], place[1]] = torch.where(mask, image, background)
        new_objects[index][place] = mask
    return new_pixels, new_objects


def preprocess(pixels: torch.Tensor) -> torch.Tensor:
    """What CLIPImageProcessor makes of the images (bicubic, 1.5 times as large, normalised)."""
    images = pixels.float()
    height, width = (side * IMAGE_SIZE // 64 for side in images.shape[-2:])
    # Pillow resizes one axis after the other and rounds to whole levels each time.
    for size in ((images.shape[-2], width), (height, width)):
        images = F.interpolate(images, size=size, mode="bicubic", antialias=True)
        images = images.round().clamp(0, 255)
    mean, std = torch.tensor(CLIP_MEAN)[:, None, None], torch.tensor(CLIP_STD)[:, None, None]
    return (images / 255 - mean) / std


def save(value: object, path: Path) -> None:
    """torch.save, but `path` never holds half of it: a stage may be stopped at any time."""
    unfinished = path.with_suffix(".unfinished")
    torch.save(value, unfinished)
    unfinished.replace(path)
