"""Tiny InternVL2 checkpoints with random weights, in their makers' own format, and what the makers'
code computes from them, written out short: InternViT, pixel shuffle, projector, InternLM2. Nothing
is learnt or downloaded.

Source of the mathematics: modeling_intern_vit.py, modeling_internvl_chat.py, modeling_internlm2.py
of OpenGVLab/InternVL.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

HIDDEN, LAYERS, HEADS, GROUPS, INTERMEDIATE = 32, 3, 4, 2, 48
VIT, VIT_HEADS, VIT_LAYERS, SIDE, PATCH = 24, 2, 2, 28, 7
TOKENS = (SIDE // PATCH // 2) ** 2  # of a tile
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|end|>", "<img>", "</img>", "<IMG_CONTEXT>")
WORDS = (
    "system user assistant what is in this image? a red circle and 12 blue boxes you are an AI "
    "whose name is InternVL <|>\n0123456789 ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz"
)
TEMPLATES = {
    "InternLM2ForCausalLM": "internlm2-chat",
    "Qwen2ForCausalLM": "Hermes-2",
    "Phi3ForCausalLM": "phi3-chat",
}
# Of InternViT-300M and of InternViT-6B.
PLAIN_VIT = {"qkv_bias": True, "qk_normalization": False, "norm_type": "layer_norm"}
LARGE_VIT = {"qkv_bias": False, "qk_normalization": True, "norm_type": "rms_norm"}


def make(
    folder: Path,
    architecture: str = "InternLM2ForCausalLM",
    vit: dict[str, Any] = PLAIN_VIT,
    language: dict[str, Any] | None = None,
    **config: Any,
) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """Writes a checkpoint; returns its folder, its config and its weights (float32).

    language, config: replace fields of llm_config and of config.json.
    """
    folder.mkdir(parents=True)
    vocabulary = _write_tokenizer(folder, architecture)
    content = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": SIDE,
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": TEMPLATES[architecture],
        "torch_dtype": "float32",
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "llm_config": {
            "architectures": [architecture],
            "attn_implementation": "eager",
            "vocab_size": vocabulary,
            "hidden_size": HIDDEN,
            "intermediate_size": INTERMEDIATE,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": GROUPS,
            "hidden_act": "silu",
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5000.0,
            "rope_scaling": None,
            "tie_word_embeddings": False,
            "bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            "sliding_window": None,
            "transformers_version": "4.37.2",
            **(language or {}),
        },
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "hidden_size": VIT,
            "intermediate_size": 40,
            "num_hidden_layers": VIT_LAYERS,
            "num_attention_heads": VIT_HEADS,
            "image_size": SIDE,
            "patch_size": PATCH,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            "drop_path_rate": 0.1,
            "initializer_factor": 0.1,
            **vit,
        },
        **config,
    }
    (folder / "config.json").write_text(json.dumps(content, indent=1))
    weights = _weights(content)
    save(folder, weights)
    return folder, content, weights


def save(folder: Path, weights: dict[str, Tensor], shards: int = 1, kind: str = "bin") -> None:
    """The weights as `shards` files, .bin or .safetensors, in place of those that are there."""
    from safetensors.torch import save_file

    for file in [
        *folder.glob("*.bin"),
        *folder.glob("*.safetensors"),
        *folder.glob("*.index.json"),
    ]:
        file.unlink()
    stem, suffix = ("pytorch_model", ".bin") if kind == "bin" else ("model", ".safetensors")
    names = [f"{stem}-{n + 1:05}-of-{shards:05}{suffix}" for n in range(shards)]
    names = names if shards > 1 else [stem + suffix]
    weight_map = {name: names[i * shards // len(weights)] for i, name in enumerate(weights)}
    for file in names:
        part = {name: weights[name].contiguous() for name in weights if weight_map[name] == file}
        if kind == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))


# -------------------------------------------------------------------------- what the makers compute


def image_features(weights: dict[str, Tensor], config: dict[str, Any], pixels: Tensor) -> Tensor:
    """(tiles, tokens, hidden) of pixels (tiles, 3, side, side)."""
    vit = config["vision_config"]
    inner = {n.removeprefix("vision_model."): w for n, w in weights.items() if "vision" in n}
    patches = F.conv2d(
        pixels,
        inner["embeddings.patch_embedding.weight"],
        inner["embeddings.patch_embedding.bias"],
        stride=vit["patch_size"],
    )
    x = patches.flatten(2).transpose(1, 2)
    x = torch.cat([inner["embeddings.class_embedding"].expand(len(x), 1, -1), x], dim=1)
    x = x + inner["embeddings.position_embedding"]

    def norm(x: Tensor, name: str) -> Tensor:
        if vit["norm_type"] == "layer_norm":
            return F.layer_norm(
                x, x.shape[-1:], inner[f"{name}.weight"], inner[f"{name}.bias"], 1e-6
            )
        return rms(x, inner[f"{name}.weight"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, inner[f"{name}.weight"], inner.get(f"{name}.bias"))

    for layer in range(vit["num_hidden_layers"]):
        at = f"encoder.layers.{layer}."
        q, k, v = linear(norm(x, at + "norm1"), at + "attn.qkv").chunk(3, dim=-1)
        if vit["qk_normalization"]:
            q = rms(q, inner[at + "attn.q_norm.weight"], 1e-6)
            k = rms(k, inner[at + "attn.k_norm.weight"], 1e-6)
        q, k, v = (t.unflatten(-1, (VIT_HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        attended = F.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v
        x = x + linear(attended.transpose(1, 2).flatten(2), at + "attn.proj") * inner[at + "ls1"]
        hidden = F.gelu(linear(norm(x, at + "norm2"), at + "mlp.fc1"))
        x = x + linear(hidden, at + "mlp.fc2") * inner[at + "ls2"]

    grid = x[:, 1:].unflatten(1, (SIDE // PATCH, -1))  # (tiles, rows, columns, VIT)
    pairs = grid.unflatten(1, (-1, 2)).unflatten(3, (-1, 2))  # rows and columns in twos
    merged = pairs.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)
    x = F.layer_norm(
        merged, merged.shape[-1:], weights["mlp1.0.weight"], weights["mlp1.0.bias"], 1e-5
    )
    x = F.gelu(F.linear(x, weights["mlp1.1.weight"], weights["mlp1.1.bias"]))
    return F.linear(x, weights["mlp1.3.weight"], weights["mlp1.3.bias"])


def internlm2_logits(weights: dict[str, Tensor], config: dict[str, Any], embeds: Tensor) -> Tensor:
    """(n, vocabulary) of embeddings (n, hidden), by the fused, grouped wqkv as it lies on disk."""
    llm = config["llm_config"]
    inner = {n.removeprefix("language_model."): w for n, w in weights.items()}
    heads, groups = llm["num_attention_heads"], llm["num_key_value_heads"]
    size = llm["hidden_size"] // heads
    n = len(embeds)
    frequencies = llm["rope_theta"] ** -(torch.arange(0, size, 2) / size)
    angles = torch.outer(torch.arange(n), frequencies).repeat(1, 2)

    def turn(x: Tensor) -> Tensor:  # (heads, n, size)
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()

    later = torch.ones(n, n).triu(1).bool()
    x = embeds
    for layer in range(llm["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        y = rms(x, inner[at + "attention_norm.weight"], llm["rms_norm_eps"])
        fused = F.linear(
            y, inner[at + "attention.wqkv.weight"], inner.get(at + "attention.wqkv.bias")
        )
        fused = fused.view(n, groups, heads // groups + 2, size)
        out = []
        for head in range(heads):
            group, place = divmod(head, heads // groups)
            q, k, v = (
                turned for turned in (fused[:, group, place], *fused[:, group, -2:].unbind(1))
            )
            scores = (turn(q[None])[0] @ turn(k[None])[0].mT) * size**-0.5
            out.append(F.softmax(scores.masked_fill(later, -torch.inf), dim=-1) @ v)
        attended = torch.cat(out, dim=-1)
        x = x + F.linear(
            attended, inner[at + "attention.wo.weight"], inner.get(at + "attention.wo.bias")
        )
        y = rms(x, inner[at + "ffn_norm.weight"], llm["rms_norm_eps"])
        gate = F.silu(F.linear(y, inner[at + "feed_forward.w1.weight"]))
        up = F.linear(y, inner[at + "feed_forward.w3.weight"])
        x = x + F.linear(gate * up, inner[at + "feed_forward.w2.weight"])
    return F.linear(rms(x, inner["model.norm.weight"], llm["rms_norm_eps"]), inner["output.weight"])


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


# -------------------------------------------------------------------------------- what is on disk


def _weights(config: dict[str, Any]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator)

    found: dict[str, Tensor] = {}

    def linear(name: str, rows: int, columns: int, bias: bool, scale: float = 1.0) -> None:
        found[f"{name}.weight"] = random(rows, columns, scale=scale / columns**0.5)
        if bias:
            found[f"{name}.bias"] = random(rows, scale=0.3)

    def norm(name: str, size: int, bias: bool) -> None:
        found[f"{name}.weight"] = 1 + random(size, scale=0.3)
        if bias:
            found[f"{name}.bias"] = random(size, scale=0.3)

    vit = config["vision_config"]
    layer_norm = vit["norm_type"] == "layer_norm"
    at = "vision_model.embeddings."
    found[at + "class_embedding"] = random(1, 1, VIT)
    found[at + "position_embedding"] = random(1, (SIDE // PATCH) ** 2 + 1, VIT)
    found[at + "patch_embedding.weight"] = random(VIT, 3, PATCH, PATCH, scale=0.1)
    found[at + "patch_embedding.bias"] = random(VIT, scale=0.3)
    for layer in range(VIT_LAYERS):
        at = f"vision_model.encoder.layers.{layer}."
        linear(at + "attn.qkv", 3 * VIT, VIT, vit["qkv_bias"], 1.4)
        linear(at + "attn.proj", VIT, VIT, True)
        if vit["qk_normalization"]:
            norm(at + "attn.q_norm", VIT, False)
            norm(at + "attn.k_norm", VIT, False)
        norm(at + "norm1", VIT, layer_norm)
        norm(at + "norm2", VIT, layer_norm)
        linear(at + "mlp.fc1", vit["intermediate_size"], VIT, True)
        linear(at + "mlp.fc2", VIT, vit["intermediate_size"], True)
        found[at + "ls1"], found[at + "ls2"] = random(VIT), random(VIT)
    norm("mlp1.0", 4 * VIT, True)
    linear("mlp1.1", HIDDEN, 4 * VIT, True)
    linear("mlp1.3", HIDDEN, HIDDEN, True)

    llm = config["llm_config"]
    architecture = llm["architectures"][0]
    head, groups = HIDDEN // llm["num_attention_heads"], llm["num_key_value_heads"]
    fused, inner = HIDDEN + 2 * groups * head, llm["intermediate_size"]
    internlm2 = architecture == "InternLM2ForCausalLM"
    first, last = (
        ("model.tok_embeddings", "output") if internlm2 else ("model.embed_tokens", "lm_head")
    )
    found[f"language_model.{first}.weight"] = random(llm["vocab_size"], HIDDEN)
    for layer in range(llm["num_hidden_layers"]):
        at = f"language_model.model.layers.{layer}."
        if internlm2:
            linear(at + "attention.wqkv", fused, HIDDEN, llm["bias"], 1.4)
            linear(at + "attention.wo", HIDDEN, HIDDEN, llm["bias"])
            linear(at + "feed_forward.w1", inner, HIDDEN, False)
            linear(at + "feed_forward.w3", inner, HIDDEN, False)
            linear(at + "feed_forward.w2", HIDDEN, inner, False)
            norm(at + "attention_norm", HIDDEN, False)
            norm(at + "ffn_norm", HIDDEN, False)
            continue
        if architecture == "Phi3ForCausalLM":
            linear(at + "self_attn.qkv_proj", fused, HIDDEN, False, 1.4)
            linear(at + "mlp.gate_up_proj", 2 * inner, HIDDEN, False)
        else:
            for letter, rows in (("q", HIDDEN), ("k", groups * head), ("v", groups * head)):
                linear(f"{at}self_attn.{letter}_proj", rows, HIDDEN, True, 1.4)
            linear(at + "mlp.gate_proj", inner, HIDDEN, False)
            linear(at + "mlp.up_proj", inner, HIDDEN, False)
        linear(at + "self_attn.o_proj", HIDDEN, HIDDEN, False)
        linear(at + "mlp.down_proj", HIDDEN, inner, False)
        norm(at + "input_layernorm", HIDDEN, False)
        norm(at + "post_attention_layernorm", HIDDEN, False)
    norm("language_model.model.norm", HIDDEN, False)
    if not llm["tie_word_embeddings"]:
        linear(f"language_model.{last}", llm["vocab_size"], HIDDEN, False, 2.0)
    return found


def _write_tokenizer(folder: Path, architecture: str) -> int:
    """The tokenizer's files as the architecture's checkpoints have them; how many tokens it has."""
    if architecture == "Qwen2ForCausalLM":
        from tokenizers.pre_tokenizers import ByteLevel

        vocabulary = {token: i for i, token in enumerate(sorted(ByteLevel.alphabet()))}
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        fields: dict[str, Any] = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": SPECIAL[1]}
        size = len(vocabulary)
    else:
        import sentencepiece

        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([WORDS, *WORDS.split()] * 3),
            model_writer=model,
            vocab_size=420,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",  # as Llama and InternLM2 have it
            remove_extra_whitespaces=False,
            character_coverage=1.0,
            # Llama's, so Phi-3's, tokenizer.model asks for a space before the text.
            add_dummy_prefix=architecture == "Phi3ForCausalLM",
            pad_id=-1,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        (folder / "tokenizer.model").write_bytes(model.getvalue())
        fields = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        fields |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}
        if architecture == "InternLM2ForCausalLM":
            code = "tokenization_internlm2.InternLM2Tokenizer"
            fields |= {"tokenizer_class": "InternLM2Tokenizer", "add_bos_token": True}
            fields["auto_map"] = {"AutoTokenizer": [code, None]}
        size = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    added = {token: size + i for i, token in enumerate(SPECIAL)}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    flags = dict(lstrip=False, rstrip=False, normalized=False, single_word=False, special=True)
    fields["added_tokens_decoder"] = {str(i): {"content": t, **flags} for t, i in added.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return size + len(SPECIAL)
