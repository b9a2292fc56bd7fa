"""ModelSpec, how to build a network again, and LoadedModel, a network with all that it needs."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from askewq.errors import ModelError, near
from askewq.preprocessing import Preprocessing
from askewq.vocabulary import Pooling, Task

Source = Literal["timm", "transformers", "module"]

CONFIG = "config.json"
_UNNAMED = re.compile(r"LABEL_\d+")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """How to build a plain network, as plain JSON values.

    Attributes:
        source: where the class comes from.
        name: as the user gave it.
        task: what it is trained for.
        labels: class names, in the order of the logits; empty for causal-lm and embeddings.
        arguments: timm: architecture and keyword arguments of create_model; transformers: the
            config; module: nothing, its file is not stored.
        pooling: of feature-extraction: how the states of a text's tokens become its embedding.
    """

    source: Source
    name: str
    task: Task
    labels: tuple[str, ...]
    arguments: dict[str, Any]
    pooling: Pooling = "mean"


@dataclass(slots=True)
class LoadedModel:
    """A float32 network, how to build it again, and how its inputs are prepared."""

    model: nn.Module
    spec: ModelSpec
    preprocessing: Preprocessing
    notes: tuple[str, ...] = ()  # what of it is not trained for the data
    doubts: tuple[str, ...] = ()  # what is for the user to judge
    beside: dict[str, Any] = field(default_factory=dict)  # files of sentence-transformers


def path_of(name: str) -> Path:
    """Return where the model, weights or data set of a name would lie on this machine."""
    file, _, _ = name.rpartition(":")
    return Path(file if file.endswith(".py") else name.removeprefix("local-dir:")).expanduser()


def renamed(name: str, trained: Sequence[str], labels: Sequence[str]) -> tuple[str, ...]:
    """Return the doubt about a head whose classes have other names than the data's, if it has any.

    Args:
        name: of the network.
        trained: its classes in order; transformers calls those without a name LABEL_0, LABEL_1, ...
        labels: those of the data, which take their places.
    """
    theirs, ours = ({label.casefold() for label in some} for some in (trained, labels))
    if len(trained) != len(labels) or theirs == ours or all(map(_UNNAMED.fullmatch, trained)):
        return ()
    was, now = (", ".join(some[:5]) + ", ..." * (len(some) > 5) for some in (trained, labels))
    return (
        f"the head of {name!r} was trained for the classes {was}, and is taken to mean {now}, in "
        "this order; where that is wrong, give the classes in its config.json (id2label; timm's "
        "label_names) the names that the data have for them",
    )


def in_order_of(trained: Sequence[str], labels: Sequence[str]) -> tuple[str, ...]:
    """Return labels in the order of a head that was trained for the same ones, but for their case.

    Args:
        trained: the head's classes in order; where they are others, `labels` stay as they are.
    """
    theirs, ours = ([label.casefold() for label in names] for names in (trained, labels))
    if sorted(theirs) != sorted(ours) or len({*ours}) < len(ours):
        return tuple(labels)
    return tuple(labels[ours.index(label)] for label in theirs)


def unreachable(name: str, error: Exception) -> ModelError:
    """Return the error for a name under which nothing could be loaded."""
    import timm

    if "custom code" in str(error):
        return ModelError(
            f"the model {name!r} brings code of its own, which askewq does not run: a network that "
            "needs it cannot be trained, for an artifact brings none. For a teacher: read it; if "
            "you trust it, pass --trust-remote-code."
        )
    if "Unrecognized configuration class" in str(error):
        return ModelError(f"transformers has no network of {name!r} for this --task; pass another.")
    known = timm.is_model(name.split(".")[0])
    what = (
        "Its pretrained weights could not be fetched."
        if known
        else f"It is no timm name{near(name, timm.list_models())}, and no Hugging Face model was "
        "found under it."
    )
    return ModelError(
        f"the model {name!r} cannot be loaded: {first_line(error)}\n{what} Pass a timm name with "
        "--no-pretrained or --weights FILE.safetensors, a local Hugging Face folder, or "
        "path/to/file.py:factory; if the Hub is out of reach, a folder works offline."
    )


def first_line(error: Exception) -> str:
    """Return the start of an error that may be pages long."""
    return str(error).strip().split("\n")[0][:300]
