"""What a config of these recipes may say, beside transformers' own TrainingArguments (or TRL's
SFTConfig), and how it is read. Names are TRL's and transformers' where they have one."""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from yopo.errors import BadInput

OBJECTIVES = ("distill", "plain")


@dataclass
class Recipe:
    """Which model, data and plan; what learns, and by which loss."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub id of a transformers model"})
    train_file: str = field(metadata={"help": "questions with answers, as JSON lines"})
    eval_file: str = field(metadata={"help": "the same, held out: measured before and after"})
    plan: str | None = field(
        default=None, metadata={"help": "a plan's file or folder; none: the model's own"}
    )
    image_folder: str | None = field(
        default=None, metadata={"help": "of relative paths (none: the file's)"}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "rows to train on"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "rows to measure on"})
    skip_rows: bool = field(
        default=False, metadata={"help": "leave rows out that cannot be used, not stop at them"}
    )
    objective: str = field(
        default="distill", metadata={"help": "distill: KL from the dense model; plain: the labels"}
    )
    temperature: float = field(default=1.0, metadata={"help": "of distillation"})
    distill_weight: float = field(default=1.0, metadata={"help": "of KL; the rest is the labels'"})
    fixed_teacher: bool = field(
        default=True, metadata={"help": "it is asked once before, where the weights all learn"}
    )
    tighten_stages: int = field(
        default=1, metadata={"help": "plans that tighten over the first half of the steps"}
    )
    train_sinks: bool = field(default=False, metadata={"help": "the plan's sinks alone learn"})
    train_vision: bool = field(default=False, metadata={"help": "the vision tower learns, too"})
    dtype: str = field(default="float32", metadata={"help": "of the weights"})
    load_in_4bit: bool = field(default=False, metadata={"help": "nf4, by bitsandbytes"})
    use_peft: bool = field(default=False, metadata={"help": "LoRA adapters alone learn"})
    lora_r: int = field(default=16, metadata={"help": "rank"})
    lora_alpha: int = field(default=32, metadata={"help": "scale"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout"})
    lora_target_modules: str = field(
        default=r".*language_model.*_proj", metadata={"help": "names, as a regular expression"}
    )

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise BadInput(f"objective is {self.objective!r}; allowed: {', '.join(OBJECTIVES)}")
        if self.train_sinks and self.use_peft:
            raise BadInput("train_sinks and use_peft are both true: choose what learns")
        if self.load_in_4bit and not self.use_peft:
            raise BadInput("load_in_4bit is true: 4-bit weights do not learn; set use_peft: true")


def read(argv: Sequence[str], arguments: type) -> tuple[Recipe, Any, dict[str, Any]]:
    """The recipe and `arguments` of CONFIG.yaml [--name value …], and all that was given by name.

    Raises BadInput for a config that cannot be read, and names that neither knows."""
    if not argv or argv[0].startswith("-"):
        raise BadInput("the first argument is the config: sft.py CONFIG.yaml [--name value …]")
    try:
        given = yaml.safe_load(Path(argv[0]).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput(f"the config {argv[0]} cannot be read: {error}") from error
    if not isinstance(given, dict):
        raise BadInput(f"the config {argv[0]} is no mapping of names to values")
    given = {name: value for name, value in given.items() if value is not None}
    known = {one.name for cls in (Recipe, arguments) for one in fields(cls) if one.init}
    if unknown := sorted(given.keys() - known):
        raise BadInput(f"the config {argv[0]} has {', '.join(unknown)}, which nobody knows")
    words = [word for name, value in given.items() for word in (f"--{name}", *_words(value))]
    usage = f"{Path(sys.argv[0]).name} CONFIG.yaml [--name value …]"
    parser = HfArgumentParser((Recipe, arguments), allow_abbrev=False, usage=usage)
    named, left = parser.parse_known_args([*words, *argv[1:]])
    if left:
        raise BadInput(f"{' '.join(left)}: no such option")
    chosen = set(given) | {word[2:].partition("=")[0] for word in argv[1:] if word.startswith("--")}
    told = {name: value for name, value in vars(named).items() if name in chosen}
    try:
        recipe, training = parser.parse_args_into_dataclasses([*words, *argv[1:]])
    except (ValueError, ImportError) as error:
        raise BadInput(f"{argv[0]}: {error}") from error
    training.remove_unused_columns = False  # rows are questions until they are collated
    return recipe, training, told


def _words(value: Any) -> Iterable[str]:
    """A value of YAML as the command line has it."""
    if isinstance(value, list):
        return [word for one in value for word in _words(one)]
    return [json.dumps(value) if isinstance(value, dict) else str(value)]


def rows_of(file: str, recipe: Recipe, most: int | None) -> list[dict[str, str]]:
    """The rows of a file of questions: image, question and answer.

    Raises BadInput, which names the file and the line, for a row without image, answer or question;
    with skip_rows such are left out, and said."""
    from yopo.prompts.questions import read_questions

    if not Path(file).is_file():
        raise BadInput(f"there is no file of questions {file!r} (from {Path.cwd()})")
    folder = None if recipe.image_folder is None else Path(recipe.image_folder)
    found, unusable = read_questions(Path(file), most, folder, answered=True)
    if unusable and not recipe.skip_rows:
        raise BadInput(
            f"{len(unusable)} rows cannot be used: {'; '.join(unusable[:3])}. Mend them, or set "
            "skip_rows: true to go on without"
        )
    for line in unusable:
        print(f"passed over: {line}", file=sys.stderr)
    return [{"image": str(q.image), "question": q.question, "answer": q.answer} for q in found]
