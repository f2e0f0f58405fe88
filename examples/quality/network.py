"""The model: a small convolutional tower, a projector, and a Llama. Its sizes, its inputs.

The language side is a stock LlamaForCausalLM; under a plan it runs through yopo.apply and
visual_mask. No training and no data here.
"""

from typing import Any

import torch
import torch.nn.functional as F
from pictures import CELLS, vocabulary
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

GRID = (8, 8)  # four visual tokens to a digit: the tower's 12 x 12 patches, averaged
VISUAL = GRID[0] * GRID[1]
WIDTH = 96  # of the tower
BOS = 1
CLASSES = (14, 9)  # what the tower learns to tell of each patch, see pictures.Task.classes
LLAMA = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "initializer_range": 0.05,
    "tie_word_embeddings": False,
    "bos_token_id": BOS,
    "eos_token_id": None,
    "pad_token_id": 0,
}


class Tower(nn.Module):
    """Pixels (b, 3, 96, 96) uint8 to features of patches (b, 144, 96)."""

    def __init__(self) -> None:
        super().__init__()

        def block(inside: int, out: int, stride: int) -> nn.Sequential:
            convolution = nn.Conv2d(inside, out, 3, stride, padding=1, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU())

        self.down = nn.Sequential(block(3, 32, 2), block(32, 64, 2), block(64, WIDTH, 2))
        self.mix = nn.ModuleList(block(WIDTH, WIDTH, 1) for _ in range(3))

    def forward(self, pixels: Tensor) -> Tensor:
        rows = self.down((pixels.float() - 200) / 60)
        for block in self.mix:
            rows = rows + block(rows)
        return rows.flatten(2).transpose(1, 2)


class TowerClassifier(nn.Module):
    """The tower with what trains it: two classes for each patch."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = Tower()
        self.heads = nn.ModuleList(nn.Linear(WIDTH, count) for count in CLASSES)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        features = self.tower(pixels)
        return [head(features).transpose(1, 2) for head in self.heads]


def _places(count: int, hidden: int) -> Tensor:
    """(count, hidden): embeddings of rows or columns, those of one cell alike."""
    cells = torch.randn(CELLS, hidden).repeat_interleave(count // CELLS, 0)
    return 0.5 * cells + 0.1 * torch.randn(count, hidden)


class Projector(nn.Module):
    """Patch features to embeddings, with what CLIP's own position embeddings would bring along."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.row = nn.Parameter(_places(GRID[0], hidden))
        self.column = nn.Parameter(_places(GRID[1], hidden))

    def forward(self, features: Tensor) -> Tensor:
        places = (self.row[:, None] + self.column[None]).flatten(0, 1)
        return self.layers(features) + places


class Reader(nn.Module):
    """Projector and language model: reads <s>, the picture, and turns of question and answer.

    grid: a coarser one than GRID downsamples the picture: each visual token is then the mean of
    those on its part of the picture, and so are their embeddings of rows and columns."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.grid = GRID
        config = LlamaConfig(**LLAMA | {"vocab_size": len(vocabulary())} | changes)
        self.llama = LlamaForCausalLM(config)
        self.projector = Projector(config.hidden_size)

    @torch.no_grad()
    def start_well(self) -> None:
        """An initialisation from which looking things up is soon learned: heads attend to what is
        like the query and copy it (mimetic initialisation, arXiv 2305.09828), and the words for
        rows and columns begin as the embeddings of those."""
        words = self.llama.get_input_embeddings().weight
        words.normal_(std=0.5)
        for kind in ("row", "column"):
            cells = getattr(self.projector, kind).unflatten(0, (CELLS, -1)).mean(1)
            for index, cell in enumerate(cells):
                words[vocabulary()[f"{kind}-{index + 1}"]] = cell
        for layer in self.llama.model.layers:
            attention = layer.self_attn
            attention.k_proj.weight.mul_(1.5)
            attention.q_proj.weight.copy_(attention.k_proj.weight)
            attention.o_proj.weight.copy_(attention.v_proj.weight.T)

    @property
    def config(self) -> Any:
        return self.llama.config

    def prefix(self, features: Tensor) -> Tensor:
        """Features (b, 64, 96) to the embeddings of <s> and picture (b, 65, d)."""
        bos = self.llama.get_input_embeddings()(torch.full((len(features), 1), BOS))
        picture = self.projector(features)
        if self.grid != GRID:
            cells = picture.transpose(1, 2).unflatten(2, GRID)
            picture = F.adaptive_avg_pool2d(cells, self.grid).flatten(2).transpose(1, 2)
        return torch.cat([bos, picture], dim=1)

    def forward(self, features: Tensor, ids: Tensor) -> Tensor:
        """Logits (b, n, words) at the ids (b, n) after the picture; padding is on the right."""
        embeds = torch.cat([self.prefix(features), self.llama.get_input_embeddings()(ids)], dim=1)
        place, extra = torch.arange(embeds.shape[1]), {}
        if hasattr(self.config, "yopo"):
            extra["visual_mask"] = ((place > 0) & (place <= VISUAL)).expand(len(ids), -1)
        keep = ids.shape[1]
        return self.llama(
            inputs_embeds=embeds, use_cache=False, logits_to_keep=keep, **extra
        ).logits
