"""Stage 1: a small CLIP vision tower, trained as a classifier of what each patch shows."""

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from data import COLOURS, IMAGE_SIZE, PATCHES_PER_SIDE, SHAPES, Split, augment, preprocess, save
from torch import nn
from tqdm import trange
from transformers import CLIPVisionConfig, CLIPVisionModel

WIDTH = 96
CROP_PATCHES = 15  # 40 pixels of easy-VQA, which hold its largest shape
USED_LAYERS = 4  # LLaVA reads hidden_states[-2]: the tower on disk has one layer more


def tower_config(layers: int) -> dict:
    """The fields of a CLIPVisionConfig."""
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 3,
        "image_size": IMAGE_SIZE,
        "patch_size": IMAGE_SIZE // PATCHES_PER_SIDE,
        "projection_dim": WIDTH,
    }


def new_tower() -> CLIPVisionModel:
    """An untrained tower of the layers that LLaVA reads, so that its output is what LLaVA takes."""
    return CLIPVisionModel(CLIPVisionConfig(**tower_config(USED_LAYERS)))


def features(
    tower: CLIPVisionModel, images: torch.Tensor, top: int = 0, left: int = 0
) -> torch.Tensor:
    """(batch, patches, width) patch features of preprocessed images, CLS dropped as in LLaVA.

    A smaller image is taken for the part of a whole one whose first patch is at (top, left): with
    a quarter of the patches a training step takes a quarter of the time.
    """
    model = getattr(tower, "vision_model", tower)  # transformers 5 has no inner vision_model
    patches = model.embeddings.patch_embedding(images)  # (batch, width, rows, columns)
    places = model.embeddings.position_embedding.weight
    grid = places[1:].unflatten(0, (PATCHES_PER_SIDE, PATCHES_PER_SIDE))
    grid = grid[top : top + patches.shape[2], left : left + patches.shape[3]].flatten(0, 1)
    cls = (model.embeddings.class_embedding + places[0]).expand(len(images), 1, -1)
    rows = torch.cat([cls, patches.flatten(2).transpose(1, 2) + grid], dim=1)
    return model.encoder(inputs_embeds=model.pre_layrnorm(rows)).last_hidden_state[:, 1:]


def _start_positions_as_sines(tower: CLIPVisionModel) -> None:
    """2-D sines for the learned positions: patches then find their neighbours from the start."""
    rows = torch.arange(PATCHES_PER_SIDE).float()
    angles = rows[:, None] * torch.pi / 2 ** torch.linspace(0, 4, WIDTH // 4)
    waves = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
    grid = torch.cat(
        [
            waves[:, None].expand(-1, PATCHES_PER_SIDE, -1),
            waves[None].expand(PATCHES_PER_SIDE, -1, -1),
        ],
        dim=2,
    )
    model = getattr(tower, "vision_model", tower)
    with torch.no_grad():
        model.embeddings.position_embedding.weight[1:] = 0.5 * grid.flatten(0, 1)


class Classifier(nn.Module):
    """The tower with two linear heads: shape and colour (class 0: background)."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = new_tower()
        _start_positions_as_sines(self.tower)
        self.shape = nn.Linear(WIDTH, 1 + len(SHAPES))
        self.colour = nn.Linear(WIDTH, 1 + len(COLOURS))

    def forward(
        self, images: torch.Tensor, top: int = 0, left: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, 1 + patches, classes) logits: of the mean feature, then of each patch's."""
        patches = features(self.tower, images, top, left)
        rows = torch.cat([patches.mean(dim=1, keepdim=True), patches], dim=1)
        return self.shape(rows), self.colour(rows)


def _loss(logits: torch.Tensor, labels: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the image's class on the mean, and of the class or background on patches."""
    whole = F.cross_entropy(logits[:, 0], labels + 1, ignore_index=0)
    each = torch.where(patches, labels[:, None] + 1, 0)
    weight = torch.ones(logits.shape[-1])
    weight[0] = 0.05  # nearly all patches are background
    # Where no question tells the class, the background is still known, the shape's patches not.
    each = torch.where(patches & (labels[:, None] < 0), -100, each)
    return whole + F.cross_entropy(logits[:, 1:].flatten(0, 1), each.flatten(), weight=weight)


@torch.no_grad()
def accuracy(model: Classifier, split: Split) -> tuple[float, float]:
    """Share of images whose shape, and whose colour, the mean feature gives right (percent)."""
    model.eval()
    shape, colour = [], []
    for part in torch.arange(min(len(split.pixels), 500)).split(100):
        shape_logits, colour_logits = model(preprocess(split.pixels[part]))
        shape.append(shape_logits[:, 0, 1:].argmax(-1))
        colour.append(colour_logits[:, 0, 1:].argmax(-1))
    model.train()

    def share(guess: torch.Tensor, truth: torch.Tensor) -> float:
        told = truth[: len(guess)] >= 0
        return 100 * (guess == truth[: len(guess)])[told].float().mean().item()

    return share(torch.cat(shape), split.shapes), share(torch.cat(colour), split.colours)


def train_tower(train: Split, test: Split, work: Path, steps: int, batch: int, rate: float) -> None:
    """Trains and leaves work/tower.pt; goes on from work/tower.partial.pt if that is there."""
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05)
    generator = torch.Generator().manual_seed(1)
    partial, first = work / "tower.partial.pt", 0
    if partial.exists():
        state = torch.load(partial, weights_only=True)
        first = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        generator.set_state(state["generator"])
    began = time.time()
    bar = trange(first, steps, initial=first, total=steps, desc="tower", mininterval=10)
    for step in bar:
        rows = torch.randint(len(train.pixels), (batch,), generator=generator)
        # Mostly on parts of 15 x 15 patches; at the end on whole images.
        count = CROP_PATCHES if step < 0.93 * steps else PATCHES_PER_SIDE
        top, left = torch.randint(PATCHES_PER_SIDE - count + 1, (2,), generator=generator).tolist()
        pixels, objects = augment(
            train.pixels[rows], train.objects[rows], generator, side=count * 64 // PATCHES_PER_SIDE
        )
        # A patch shows the shape if a quarter of it does.
        patches = F.interpolate(objects[:, None].float(), (count, count), mode="area") > 0.25
        patches = patches.flatten(1)
        shape_logits, colour_logits = model(preprocess(pixels), top, left)
        loss = _loss(shape_logits, train.shapes[rows], patches)
        loss = loss + _loss(colour_logits, train.colours[rows], patches)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            shape, colour = accuracy(model, test)
            bar.write(f"tower step {step + 1}: test shape {shape:.1f} % colour {colour:.1f} %")
            state = {"step": step + 1, "model": model.state_dict()}
            state |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            save(state | {"generator": generator.get_state()}, partial)
    save(model.tower.state_dict(), work / "tower.pt")
    print(f"tower: {time.time() - began:.0f} s for {steps - first} steps of {batch}")
