"""Questions about images, and models that are loaded to take them (`load`)."""

from yopo.prompts.loading import load
from yopo.prompts.prompter import Prompter

__all__ = ["Prompter", "load"]
