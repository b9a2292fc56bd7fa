"""What a stranger's folder may not do: lead out of itself, bring code, or be larger than it says.

docs/security.md lists the threats; these are the checks that neither the formats nor the
libraries that read them make.
"""

import json
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from askewq.errors import FormatError, ModelError

# More than any config.json has: labels of 20,000 classes take half a megabyte.
CONFIG_BYTES = 2**24
# Of both transformers makes the arguments of a tokenizer; files that the first names are looked for
# beside it.
_TOKENIZER_CONFIG, _SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
# Under these keys tokenizers take a vocabulary, or the path of one.
_VOCABULARY = ("vocab", "merges", "source_spm", "target_spm", "base", "multi")
# Old tokenizers have a path of their maker's machine here, which nobody opens.
_UNUSED = "special_tokens_map_file"


def read_json(path: Path) -> Any:
    """Return the content of a small JSON file.

    Raises:
        FormatError: it is too large, or no JSON.
    """
    try:
        if (size := path.stat().st_size) > CONFIG_BYTES:
            raise FormatError(f"{path} has {size:,} bytes; at most {CONFIG_BYTES:,} are read.")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def check_index(folder: Path) -> None:
    """Check that the shards of a Hugging Face folder are files in it.

    Raises:
        ModelError: naming the index and the file that it leads to.
    """
    for index in sorted(folder.glob("*.index.json")):
        content = read_json(index)
        shards = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(shards, dict):
            raise ModelError(f"{index} has no weight_map.")
        for name in shards.values():
            if not is_inside(name):
                raise ModelError(
                    f"{index} leads out of its folder, to {name!r}; shards are files beside it."
                )


def check_tokenizer(folder: Path) -> None:
    """Check that a tokenizer's files are in its folder.

    Raises:
        FormatError: naming the key and the file.
    """
    for name in (_TOKENIZER_CONFIG, _SPECIAL_TOKENS):
        path = folder / name
        content = read_json(path) if path.is_file() else None
        for key, value in (content if isinstance(content, dict) else {}).items():
            file = key.endswith("_file") and key != _UNUSED
            found = file and name == _TOKENIZER_CONFIG and is_inside(value)
            if value and not found and (file or (key in _VOCABULARY and isinstance(value, str))):
                raise FormatError(f"{path}: {key} leads out of the folder, to {value!r}.")


def check_arguments(arguments: Any, path: str) -> None:
    """Check that a network's config has none of its parts fetched, as code or as weights.

    transformers takes an attention that is named like a repository, owner/name, from the Hub, and
    lets timm take a network from a file, a folder or the Hub.

    Raises:
        FormatError: naming the key.
    """
    if isinstance(arguments, dict):
        kind, name = arguments.get("model_type"), str(arguments.get("backbone"))
        elsewhere = kind == "timm_backbone" and {*"/:"} & {*name}
        if kind == "timm_wrapper" or elsewhere or _fetches_backbone(arguments):
            raise FormatError(f"{path}: a {kind} may be read from elsewhere, and is not built.")
    pairs = arguments.items() if isinstance(arguments, dict) else enumerate(arguments)
    for key, value in pairs:
        if "implementation" in str(key) and "/" in str(value):
            raise FormatError(f"{path}: {key} = {value!r} would run code from the Hub.")
        if isinstance(value, dict | list):
            check_arguments(value, path)


def _fetches_backbone(arguments: dict[str, Any]) -> bool:
    """Tell whether transformers would look up a network's part by a name that its config gives."""
    if arguments.get("backbone") is None or arguments.get("backbone_config") is not None:
        return False
    from transformers import CONFIG_MAPPING

    kind = str(arguments.get("model_type"))
    return kind in CONFIG_MAPPING and "backbone_config" in CONFIG_MAPPING[kind].sub_configs


def is_inside(name: Any) -> bool:
    """Tell whether a name is that of a file in the folder itself."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set("/\\\0") & set(name)


@contextmanager
def at_most(parameters: int) -> Iterator[None]:
    """Within the block this thread builds no network with more; memory is not touched before.

    One that is given to several layers, or to one again, counts once.

    Raises:
        FormatError: a network that has more.
    """
    total, thread = 0, threading.get_ident()
    counted: dict[int, weakref.ref[nn.Parameter]] = {}

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal total
        if threading.get_ident() != thread:  # torch calls this for the networks of every thread
            return
        before = counted.get(id(parameter))
        if parameter is None or (before is not None and before() is parameter):
            return
        counted[id(parameter)] = weakref.ref(parameter)
        total += max(1, parameter.numel())  # layers without weights take time
        if total > parameters:
            raise FormatError(
                f"it describes a network of more than {total:,} parameters, and the weights "
                f"beside it are for at most {parameters:,}"
            )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
