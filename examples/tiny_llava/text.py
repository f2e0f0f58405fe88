"""The tokenizer, and questions and answers as the token ids of a LLaVA conversation."""

import string
from functools import cache
from pathlib import Path

import easy_vqa
import sentencepiece
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import tokenizer_image_token
from transformers import PreTrainedTokenizerBase

Turns = tuple[tuple[str, str | None], ...]  # questions and answers; None: not answered (yet)
VOCABULARY = 640
# A little plain English beside the package's prompts, so that common words are few tokens.
ENGLISH = """The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs.
This picture shows one shape on a light background. It can be a circle, a rectangle or a triangle,
and it is black, blue, brown, gray, green, red, teal or yellow. What can you see in this image?
Please describe what you see. How many shapes are there? Where is it? Is it large or small?
There is one shape and it is not red. I do not know. Yes, there is. No, there is not."""


def train_tokenizer(folder: Path) -> None:
    """Writes folder/tokenizer.model: a sentencepiece BPE set up like Llama's."""
    words = " ".join([string.ascii_letters, string.digits, string.punctuation])
    prompts = [conversation.get_prompt() for conversation in conv_templates.values()]
    questions, answers, _ = easy_vqa.get_train_questions()
    turns = [f"USER: {q} ASSISTANT: {a}" for q, a in zip(questions, answers, strict=True)]
    sentences = [words, *ENGLISH.splitlines() * 50, *prompts * 50, *turns[::10]]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in sentences for line in text.splitlines()),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        split_digits=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()


class Prompts:
    """Conversations of the template that LLaVA's CLI takes, cut into reusable pieces of ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._ids = cache(self._tokenize)  # only some hundred different texts are ever asked for
        # Everything before the image; its length is the released code's `sprompt_len`.
        self.system: list[int] = self._ids((("?", None),))[0]

    def _tokenize(self, turns: Turns) -> tuple[list[int], list[int]]:
        """Ids before and after the image; an answer None is one to be generated."""
        conversation = conv_templates["llava_v1"].copy()
        for index, (question, answer) in enumerate(turns):
            image = f"{DEFAULT_IMAGE_TOKEN}\n" if index == 0 else ""
            conversation.append_message(conversation.roles[0], image + question)
            conversation.append_message(conversation.roles[1], answer)
        ids = tokenizer_image_token(conversation.get_prompt(), self.tokenizer)
        place = ids.index(IMAGE_TOKEN_INDEX)
        return ids[:place], ids[place + 1 :]

    def _rest(self, turns: Turns, beyond: list[int]) -> list[int]:
        """The ids after the image that follow `beyond`."""
        ids = self._ids(turns)[1]
        if ids[: len(beyond)] != beyond:
            raise ValueError(f"the tokens of {turns} depend on what comes later")
        return ids[len(beyond) :]

    def question(self, text: str, after: str | None = "") -> list[int]:
        """A question with the "ASSISTANT:" after it; "" is before any answer, i.e. the first turn.

        `after` None is a turn after one without an answer: LLaVA's CLI drops its own answers from
        the conversation, because it looks for them behind the prompt (`output_ids[0, n:]`).
        """
        if after == "":
            return self._rest(((text, None),), [])
        return self._rest((("?", after), (text, None)), self._ids((("?", after),))[1])

    def answer(self, text: str) -> list[int]:
        """An answer with the end of sequence."""
        return self._rest((("?", text),), self._ids((("?", None),))[1])

    def conversation(
        self, turns: list[tuple[str, str]], told: list[bool]
    ) -> tuple[list[int], list[int]]:
        """Ids after the image, and labels (-100: not learned); an untold answer is left out."""
        ids: list[int] = []
        labels: list[int] = []
        after: str | None = ""
        for (question, answer), tell in zip(turns, told, strict=True):
            asked, answered = self.question(question, after), self.answer(answer) * tell
            ids += asked + answered
            labels += [-100] * len(asked) + answered
            after = "yes" if tell else None  # any answer: what follows does not depend on it
        return ids, labels
