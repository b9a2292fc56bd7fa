"""A tokenizer in a GGUF file, where llama.cpp has the same one: byte-level BPE."""

import json
from dataclasses import dataclass
from typing import Any

from askewq.preprocessing import TextPreprocessing
from askewq.spec import LoadedModel

# The regular expressions with which byte-level tokenizers split texts, and llama.cpp's names.
_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    f"{_WORD}\\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    f"{_WORD}\\p{{N}}{_REST}": "qwen2",
}

# gguf.TokenType
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer that llama.cpp has, too: byte-level BPE, split as `split` says."""

    tokenizer: Any
    parts: dict[str, Any]
    split: str


def _size(loaded: LoadedModel) -> int:
    """Return how many tokens the network knows."""
    model: Any = loaded.model
    return int(model.config.vocab_size)


def vocabulary(loaded: LoadedModel) -> Vocabulary | None:
    """Return the tokenizer in llama.cpp's terms; None where it would split texts otherwise."""
    text = loaded.preprocessing
    if not isinstance(text, TextPreprocessing) or not text.tokenizer.is_fast:
        return None
    if len(text.tokenizer) > _size(loaded):
        return None
    parts = json.loads(text.tokenizer.backend_tokenizer.to_str())
    if parts["model"]["type"] != "BPE" or parts["pre_tokenizer"] is None:
        return None
    if (parts["normalizer"] or {"type": "NFC"})["type"] != "NFC":  # text is in NFC nearly always
        return None
    *first, last = parts["pre_tokenizer"].get("pretokenizers", [parts["pre_tokenizer"]])
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    split = None
    if not first and last["use_regex"]:
        split = "gpt-2"
    elif [part["type"] for part in first] == ["Split"] and not last["use_regex"]:
        plain = first[0]["behavior"] == "Isolated" and not first[0]["invert"]
        split = SPLITS.get(first[0]["pattern"].get("Regex", "")) if plain else None
    # llama.cpp takes a piece that is in the vocabulary whole, without merges, for Llama 3 alone.
    if bool(parts["model"].get("ignore_merges")) != (split == "llama-bpe"):
        return None
    return None if split is None else Vocabulary(text.tokenizer, parts, split)


def add_tokenizer(writer: Any, loaded: LoadedModel) -> None:
    """Add the tokenizer where llama.cpp has the same one; else say that there is none."""
    found = vocabulary(loaded)
    if found is None:
        writer.add_tokenizer_model("none")
        return
    tokenizer, model = found.tokenizer, found.parts["model"]
    size = _size(loaded)
    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for token, i in model["vocab"].items():
        tokens[i], types[i] = token, NORMAL
    for added in found.parts["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(found.split)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    # tokenizers writes a merge as a pair, older versions as one text
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    writer.add_token_merges(merges)
    for number, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if number is not None:
            add(number)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    templates = tokenizer.chat_template
    if isinstance(templates, dict):  # each under its name, in gguf's own form
        templates = [{"name": name, "template": text} for name, text in templates.items()]
    if templates:
        writer.add_chat_template(templates)
