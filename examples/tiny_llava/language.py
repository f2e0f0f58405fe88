"""Stages 2 and 3: the projector and the language model, on the frozen tower's features."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from checkpoint import HIDDEN, llama_config
from data import PATCHES_PER_SIDE, Split, all_turns, augment, is_negated, preprocess, save
from text import Prompts
from torch import nn
from tower import WIDTH
from tqdm import tqdm, trange
from transformers import CLIPVisionModel, LlamaConfig, LlamaForCausalLM

MOST_TURNS = 5


@torch.no_grad()
def compute_features(folder: Path, split: Split, path: Path) -> torch.Tensor:
    """(2, images, 576, width) float16, kept in `path`: of each image, then of it augmented."""
    if not path.exists():
        tower = CLIPVisionModel.from_pretrained(folder, dtype=torch.float32)
        moved, _ = augment(split.pixels, split.objects, torch.Generator().manual_seed(2))
        done = []
        for part in tqdm(torch.stack([split.pixels, moved]).flatten(0, 1).split(50), "features"):
            layers = tower(preprocess(part), output_hidden_states=True).hidden_states
            done.append(layers[-2][:, 1:].half())  # what LLaVA takes
        save(torch.cat(done).unflatten(0, (2, -1)), path)
    return torch.load(path, weights_only=True)


def pool(patches: torch.Tensor, side: int) -> torch.Tensor:
    """(batch, 576, width) to (batch, side * side, width), averaged over squares of patches."""
    grid = patches.transpose(1, 2).unflatten(2, (PATCHES_PER_SIDE, PATCHES_PER_SIDE))
    return F.adaptive_avg_pool2d(grid, side).flatten(2).transpose(1, 2)


class TinyLlava(nn.Module):
    """LLaVA from the tower's features on; its tensors are named as in a LLaVA checkpoint."""

    def __init__(self, vocabulary: int, system: list[int]) -> None:
        super().__init__()
        self.llama = LlamaForCausalLM(LlamaConfig(**llama_config(vocabulary)))
        self.projector = nn.Sequential(
            nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN)
        )
        self.system = torch.tensor(system)

    def embed(self, patches: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The rows of system prompt, image and (batch, n) ids after it."""
        words = self.llama.get_input_embeddings()
        before = words(self.system).expand(len(ids), -1, -1)
        return torch.cat([before, self.projector(patches), words(ids)], dim=1)

    def forward(self, patches: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Logits at the (batch, n) ids. Padding is on the right: nothing learned attends to it."""
        rows = self.embed(patches, ids)
        return self.llama(inputs_embeds=rows, use_cache=False, logits_to_keep=ids.shape[1]).logits

    def llava_weights(self) -> dict[str, torch.Tensor]:
        """All tensors under the names of a LLaVA checkpoint."""
        projector = self.projector.state_dict()
        named = {f"model.mm_projector.{name}": value for name, value in projector.items()}
        return {**self.llama.state_dict(), **named}


def _chance(question: str, answer: str, negations: bool) -> float:
    """How likely a turn is drawn, relative to others; questions with "no" or "not" if `negations`.

    Seven in eight yes/no questions name something that is not there. Drawn evenly, the language
    model answers for long as if nothing asked for were ever there (88 % right); and it must learn
    to compare what is asked for with what it sees before it can turn the outcome round.
    """
    if is_negated(question) and not negations:
        return 0.0
    there = answer in ("yes", "no") and (answer == "yes") != is_negated(question)
    return 5.0 if there else 1.0


def _batches(
    turns: list[list[tuple[str, str]]],
    stored: torch.Tensor,
    prompts: Prompts,
    batch: int,
    seed: int,
    negations: bool,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For ever: features, ids after the image, and labels.

    Each row is one image with some of its questions in one conversation, so that the image is paid
    for once. Its first turn is a single-turn conversation: later ones cannot be seen from it.
    """
    generator = torch.Generator().manual_seed(seed)
    chances = [torch.tensor([_chance(*turn, negations) for turn in about]) for about in turns]
    able = torch.tensor([index for index, chance in enumerate(chances) if chance.any()])
    while True:
        images = able[torch.randint(len(able), (batch,), generator=generator)].tolist()
        copies = torch.randint(len(stored), (batch,), generator=generator)
        rows, labels = [], []
        for image in images:
            most = min(MOST_TURNS, int(chances[image].count_nonzero()))
            order = torch.multinomial(chances[image], most, generator=generator).tolist()
            # One conversation in four starts as in LLaVA's CLI, without the first answers.
            silent = torch.rand((), generator=generator) < 0.25
            dropped = int(torch.randint(min(3, most), (), generator=generator)) if silent else 0
            told = [place >= dropped for place in range(most)]
            ids, targets = prompts.conversation([turns[image][index] for index in order], told)
            rows.append(torch.tensor(ids))
            labels.append(torch.tensor(targets))
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        targets = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        yield stored[copies, images].float(), ids, targets


@torch.no_grad()
def quick_accuracy(
    model: TinyLlava, stored: torch.Tensor, split: Split, prompts: Prompts, side: int
) -> float:
    """Percent of right first words on a question about each of the first 300 images."""
    generator = torch.Generator().manual_seed(3)
    right = 0
    for start in range(0, 300, 20):
        chosen = []
        for turns in split.turns[start : start + 20]:
            chosen.append(turns[int(torch.randint(len(turns), (), generator=generator))])
        ids = [torch.tensor(prompts.question(question)) for question, _ in chosen]
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        logits = model(pool(stored[0, start : start + 20].float(), side), padded)
        last = logits[torch.arange(20), torch.tensor([len(row) - 1 for row in ids])]
        truth = torch.tensor([prompts.answer(answer)[0] for _, answer in chosen])
        right += (last.argmax(-1) == truth).sum().item()
    return 100 * right / 300


def train_language(
    name: str,
    model: TinyLlava,
    data: tuple[Split, torch.Tensor, Split, torch.Tensor],
    prompts: Prompts,
    work: Path,
    *,
    side: int,
    steps: int,
    batch: int,
    rate: float,
    negations: bool = True,
) -> None:
    """Trains `model` on images of side x side tokens and leaves work/NAME.pt.

    Goes on from work/NAME.partial.pt if that is there.
    """
    train, stored, test, test_stored = data
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05)
    unfinished, first = work / f"{name}.partial.pt", 0
    if unfinished.exists():
        state = torch.load(unfinished, weights_only=True)
        first = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    began = time.time()
    batches = _batches(all_turns(train), stored, prompts, batch, side + first, negations)
    bar = trange(first, steps, initial=first, total=steps, desc=name, mininterval=10)
    parameters = list(model.parameters())

    def learn(part: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Loss and gradients of a part of a batch."""
        patches, ids, targets = part
        logits = model(pool(patches, side), ids)[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten())
        return loss.detach(), torch.autograd.grad(loss, parameters)

    # A part of the batch for each core: with threads inside of each small operation instead, cores
    # wait for one another all the time (8 times as long when the machine has other work).
    cores = os.cpu_count() or 1
    torch.set_num_threads(1)
    workers = ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,))
    for step, whole in zip(bar, batches, strict=False):
        parts = zip(*(tensor.chunk(cores) for tensor in whole), strict=True)
        losses, gradients = zip(*workers.map(learn, parts), strict=True)
        for parameter, *shares in zip(parameters, *gradients, strict=True):
            parameter.grad = torch.stack(shares).mean(dim=0)
        loss = torch.stack(losses).mean()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % 50 == 0 or step + 1 == steps:
            share = quick_accuracy(model, test_stored, test, prompts, side)
            bar.write(f"{name} step {step + 1}: {share:.1f} % of 300 test questions")
            state = {"step": step + 1, "model": model.state_dict()}
            state |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            save(state, unfinished)
    save(model.state_dict(), work / f"{name}.pt")
    print(f"{name}: {time.time() - began:.0f} s for {steps - first} steps of {batch}")
