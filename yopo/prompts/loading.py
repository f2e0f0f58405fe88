"""Which kind of prompter a checkpoint needs, by its config.json, and the checkpoint loaded so.
Nothing of either kind is known here."""

from __future__ import annotations

from pathlib import Path

from yopo.checkpoint.shards import read_json
from yopo.errors import BadInput
from yopo.prompts.prompter import Kind, Prompter


def load(path: str | Path, device: str) -> Prompter:
    """The checkpoint `path`, a folder or a Hub id, loaded on `device` ("cpu", "cuda", …). Raises
    BadInput where it is not there or cannot be loaded."""
    if kind_of(path) == "llava":
        from yopo.prompts.llava_prompts import LlavaPrompter

        return LlavaPrompter(str(path), device)
    from yopo.prompts.transformers_prompts import TransformersPrompter

    return TransformersPrompter(str(path), device)


def kind_of(path: str | Path) -> Kind:
    """Of the checkpoint `path`; reads no more than its config.json. Raises BadInput as `load`."""
    if Path(path).is_dir():
        config = read_json(Path(path) / "config.json")
    else:
        from transformers import PretrainedConfig

        try:
            config, _ = PretrainedConfig.get_config_dict(str(path))
        except (OSError, ValueError) as error:
            raise BadInput(
                f"there is no folder {str(path)!r} (from {Path.cwd()}), and the Hub gave no "
                f"config.json of that name: {error}"
            ) from error
    return "llava" if "mm_vision_tower" in config else "transformers"
