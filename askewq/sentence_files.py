"""The files of sentence-transformers beside an encoder of texts: how it makes an embedding.

An artifact carries them on, so that SentenceTransformer(folder) gives the embeddings that were
judged.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from askewq import disk, trust
from askewq.errors import FormatError
from askewq.vocabulary import Pooling

_MODULES, _POOLING = "modules.json", "1_Pooling/config.json"
# The last two: the longest text, prompts, and how embeddings are compared.
NAMES = (_MODULES, _POOLING, "sentence_bert_config.json", "config_sentence_transformers.json")
# The modules that are known, and where their files lie; a cosine is the same without Normalize.
_PLACES = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": None}
_LIBRARY = "sentence_transformers."
# Poolings as they are called now, and by the flags that there were before.
_POOLINGS: dict[str, Pooling] = {
    **{"mean": "mean", "cls": "cls", "lasttoken": "lasttoken"},
    **{"mean_tokens": "mean", "cls_token": "cls"},
}
_FLAG = "pooling_mode_"
_SAID: dict[Pooling, str] = {
    "mean": "the mean over its tokens",
    "cls": "the state of its first token",
    "lasttoken": "the state of its last token",
}
# What transformers.utils.hub.cached_file is told so that it returns None where there is no file.
_MISSING = (
    "_raise_exceptions_for_gated_repo",
    "_raise_exceptions_for_missing_entries",
    "_raise_exceptions_for_connection_errors",
)


@dataclass(frozen=True, slots=True)
class SentenceFiles:
    """What they say.

    Attributes:
        pooling: how the states of a text become one; the mean where they say nothing.
        files: names and contents, for an artifact to carry on: none with a doubt.
        doubts: what they ask for and askewq does not do.
    """

    pooling: Pooling = "mean"
    files: dict[str, Any] = field(default_factory=dict)
    doubts: tuple[str, ...] = ()


def read(name: str) -> SentenceFiles:
    """Return what the files say of an encoder.

    Args:
        name: its folder, or its id on the Hub.

    Source: modules.json; where there is none sentence-transformers takes the mean.
    """
    modules = _content(name, _MODULES, list)
    if not modules:
        return SentenceFiles()
    files = {file: _content(name, file, dict) for file in NAMES[1:]}
    kinds, modes = [_kind(module) for module in modules], _modes(files[_POOLING])
    pooling = _POOLINGS.get(modes[0], "mean")
    wanted = [kind for kind in kinds if kind not in _PLACES]
    wanted += [mode for mode in modes if mode not in _POOLINGS or len(modes) > 1]
    if kinds[:2] != ["Transformer", "Pooling"] and not wanted:
        wanted = kinds
    if wanted:
        doubt = (
            f"the files that sentence-transformers reads beside {name!r} ask for more than askewq "
            f"does ({', '.join(wanted)}): it trains and judges as the embedding of a text "
            f"{_SAID[pooling]}, and an artifact has none of these files"
        )
        return SentenceFiles(pooling, doubts=(doubt,))
    return SentenceFiles(pooling, {_MODULES: modules, **{n: c for n, c in files.items() if c}})


def write(files: dict[str, Any], folder: Path) -> None:
    """Write files that `read` returned."""
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        disk.write(folder / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _kind(module: Any) -> str:
    """Return the class of a module, or what is not known of it."""
    if not isinstance(module, dict):
        return str(module)
    path, kind = module.get("path"), str(module.get("type"))
    if kind.startswith(_LIBRARY):
        kind = kind.rpartition(".")[2]
    return kind if _PLACES.get(kind) in (None, path) else f"{kind} in {path!r}"


def _modes(pooling: dict[str, Any]) -> list[str]:
    """Return the poolings that a config names; several are put side by side."""
    flags = [key.removeprefix(_FLAG) for key, on in pooling.items() if key.startswith(_FLAG) and on]
    told = pooling.get("pooling_mode") or flags or "mean"
    return [str(mode) for mode in told] if isinstance(told, list) else [str(told)]


def _content(name: str, file: str, kind: type) -> Any:
    """Return what a JSON file holds; nothing of its kind where there is none of that kind."""
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(name, file, **dict.fromkeys(_MISSING, False))
        content = trust.read_json(Path(found)) if found else None
    except (OSError, ValueError, FormatError):
        return kind()
    return content if isinstance(content, kind) else kind()
