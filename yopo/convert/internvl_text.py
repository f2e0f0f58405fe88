"""What surrounds the weights of InternVL2: its tokenizer, its prompts (conversation.py of its
makers, as the chat template), image and video preprocessing. Weights and names are not known here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from yopo.convert import tokenizer_files as text
from yopo.errors import BadInput
from yopo.files import write_json

_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
_INTERNVL2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)
_INTERNVL2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的"
    "多模态大语言模型。"
)
# config.template → (before a role, after it, end of a message, system message)
_CONVERSATIONS = {
    "Hermes-2": ("<|im_start|>", "\n", "<|im_end|>", _INTERNVL2),
    "internlm2-chat": ("<|im_start|>", "\n", "<|im_end|>", _INTERNVL2),
    "phi3-chat": ("<|", "|>\n", "<|end|>", _INTERNVL2),
    "internvl2_5": ("<|im_start|>", "\n", "<|im_end|>\n", _INTERNVL2_5),
}
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@dataclass(frozen=True)
class Chat:
    """A checkpoint's tokenizer and prompts, read and checked."""

    tokenizer: Tokenizer
    template: str
    image_id: int
    stop_id: int


def read(source: Path, config: dict[str, Any]) -> Chat:
    """Raises BadInput where the tokenizer lacks a token or the prompts are not known."""
    name = config.get("template")
    if name not in _CONVERSATIONS:
        raise BadInput(
            f"{source}: template is {name!r}, of which the prompts are not known; allowed: "
            f"{', '.join(_CONVERSATIONS)}"
        )
    qwen = not (source / "tokenizer.model").is_file()
    kind = "Qwen2Tokenizer" if qwen else "LlamaTokenizer"
    tokenizer = text.load(source, (f"{kind}Fast", kind))
    if not qwen:
        text.as_sentencepiece(tokenizer, prefix=_begins_with_space(source))
    before, after, end, system = _CONVERSATIONS[name]
    ids = {}
    for token in (*list(_TOKENS.values())[:3], end.strip()):
        ids[token] = tokenizer.token_to_id(token)
        if ids[token] is None:
            raise BadInput(f"the tokenizer in {source} lacks {token!r}")
    if tokenizer.token_to_id(_TOKENS["video_token"]) is None:
        # Processors replace it before tokenizing; the model never sees it.
        tokenizer.add_special_tokens([_TOKENS["video_token"]])
    return Chat(
        tokenizer, _template(before, after, end, system), ids["<IMG_CONTEXT>"], ids[end.strip()]
    )


def write(
    chat: Chat, source: Path, config: dict[str, Any], side: int, tokens: int, folder: Path
) -> None:
    """Tokenizer, processors and generation_config.json. side: of a tile in pixels; tokens: visual
    tokens of a tile."""
    extra = {"extra_special_tokens": _TOKENS}
    text.write(folder, chat.tokenizer, source, chat.template, extra)
    steps = {
        "size": {"height": side, "width": side},
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": _MEAN,
        "image_std": _STD,
        "resample": 3,
    }
    image = {
        "image_processor_type": "GotOcr2ImageProcessorFast",
        "processor_class": "InternVLProcessor",
        "crop_to_patches": bool(config.get("dynamic_image_size", True)),
        "min_patches": config.get("min_dynamic_patch", 1),
        "max_patches": config.get("max_dynamic_patch", 12),
    }
    video = {"video_processor_type": "InternVLVideoProcessor", "do_sample_frames": False}
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": tokens}
    write_json(folder / "preprocessor_config.json", image | steps)
    write_json(folder / "video_preprocessor_config.json", video | steps)
    write_json(folder / "processor_config.json", processor)
    language = config["llm_config"]
    generation = {"eos_token_id": chat.stop_id, "pad_token_id": language.get("pad_token_id")}
    if generation["pad_token_id"] is None:
        generation["pad_token_id"] = chat.stop_id
    if language.get("bos_token_id") is not None:
        generation["bos_token_id"] = language["bos_token_id"]
    write_json(folder / "generation_config.json", generation)


def _template(before: str, after: str, end: str, system: str) -> str:
    """The chat template: images stand as their token at the head of the message, as the makers'
    `chat` puts them; the processor makes as many of it as there are visual tokens."""

    def quoted(string: str) -> str:
        return "'" + string.replace("\n", "\\n") + "'"

    def message(role: str, content: str) -> str:
        return f"{{{{ {quoted(before)} + {role} + {quoted(after)} + {content} + {quoted(end)} }}}}"

    return (
        "{%- macro words(content) -%}"
        "{%- if content is string -%}{{ content }}{%- else -%}"
        "{%- for part in content -%}"
        "{%- if part['type'] == 'image' -%}{{ '<IMG_CONTEXT>\\n' }}"
        "{%- elif part['type'] == 'video' -%}{{ '<video>\\n' }}"
        "{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
        "{%- endfor -%}{%- endif -%}{%- endmacro -%}"
        "{%- if not messages or messages[0]['role'] != 'system' -%}"
        + message("'system'", quoted(system))
        + "{%- endif -%}{%- for message in messages -%}"
        + message("message['role']", "words(message['content'])")
        + "{%- endfor -%}{%- if add_generation_prompt -%}"
        + f"{{{{ {quoted(before)} + 'assistant' + {quoted(after)} }}}}"
        + "{%- endif -%}"
    )


def _begins_with_space(source: Path) -> bool:
    """Whether tokenizer.model itself puts a space before a text: Llama's does, InternLM2's not."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise BadInput(f"{source} needs sentencepiece: pip install sentencepiece") from error
    model = SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    return model.encode("a", out_type=str)[0].startswith("▁")
