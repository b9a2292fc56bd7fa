"""timm models: their weights, their preprocessing, and the arguments that build them again."""

import inspect
import json
import re
from pathlib import Path
from typing import Any

from torch import nn

from askewq.errors import ModelError
from askewq.preprocessing import ImagePreprocessing
from askewq.spec import CONFIG, LoadedModel, ModelSpec, in_order_of, renamed, unreachable
from askewq.vocabulary import EMBEDDING_TASKS, Task

_WORDNET = re.compile(r"n\d{8}")


def load_timm(
    name: str,
    task: Task,
    labels: tuple[str, ...],
    pretrained: bool,
    image_size: int | None,
) -> LoadedModel:
    """Load a timm model, with a head for these labels where there are any, and none for embeddings.

    A head that has been trained for the same labels, but for their case, keeps its order of them.
    Without its head it returns what the head was given: pooled features [batch, width].
    """
    from timm.data.config import resolve_data_config

    name = _of_hub(name)
    arguments, cfg = _timm_arguments(name)
    notes = []
    default_classes = cfg.get("num_classes")
    kept = bool(labels) and pretrained and default_classes == len(labels)
    doubts: tuple[str, ...] = ()
    if kept:
        trained = [str(label) for label in cfg.get("label_names") or ()]
        labels = in_order_of(trained, labels)
        doubts = renamed(name, trained, labels) if trained else _unnamed(name, labels)
    if task in EMBEDDING_TASKS:
        arguments["num_classes"] = 0
    elif labels:
        arguments["num_classes"] = len(labels)
        if pretrained and not kept:
            notes.append(
                f"the head for {default_classes} classes was replaced by one for {len(labels)}"
            )
    try:
        model, arguments = _create_timm(name, arguments, pretrained, image_size)
    except (OSError, RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise unreachable(name, error) from error
    data = resolve_data_config({}, model=model)
    preprocessing = ImagePreprocessing(
        size=tuple(data["input_size"][1:]),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        crop_pct=data["crop_pct"],
        interpolation=data["interpolation"],
        crop_mode=data["crop_mode"],
    )
    spec = ModelSpec("timm", name, task, labels, arguments)
    return LoadedModel(model, spec, preprocessing, tuple(notes), doubts)


def _unnamed(name: str, labels: tuple[str, ...]) -> tuple[str, ...]:
    """Return the doubt about a head whose classes nobody named, if it has any.

    Those of ImageNet are in the order of their WordNet ids, which folders of its images are called.
    """
    if all(_WORDNET.fullmatch(label) for label in labels):
        return ()
    return (
        f"{name!r} does not name the {len(labels)} classes of its head, which are taken to be "
        f"those of the data in their order: {', '.join(labels[:5])}{', ...' * (len(labels) > 5)}",
    )


def _of_hub(name: str) -> str:
    """Return the name that timm knows of weights that the Hub has as timm/name."""
    import timm

    if not name.startswith("timm/"):
        return name
    bare = name.removeprefix("timm/")
    return bare if timm.is_model_pretrained(bare) else f"hf-hub:{name}"


def _timm_arguments(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what rebuilds a timm model without the Hub, and its pretrained configuration."""
    import timm
    from timm.models import load_model_config_from_hf, parse_model_name

    try:
        source, identifier = parse_model_name(name)
        if not source:
            known = timm.get_pretrained_cfg(name, allow_unregistered=True)
            return {"model_name": name}, {} if known is None else known.to_dict()
        if source == "local-dir":
            content = json.loads((Path(identifier) / CONFIG).read_text(encoding="utf-8"))
            cfg = content.get("pretrained_cfg", content)
            cfg = {**cfg, "label_names": cfg.get("label_names") or content.get("label_names")}
            architecture, extra = content["architecture"], content.get("model_args", {})
            if not isinstance(architecture, str) or not isinstance(extra or {}, dict):
                raise ValueError("architecture must be a name, and model_args its arguments")
        else:
            cfg, architecture, extra = load_model_config_from_hf(identifier)
    except (OSError, LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise unreachable(name, error) from error
    arguments = {"model_name": architecture, **(extra or {})}
    _check_describing(arguments)
    return arguments, cfg


def _create_timm(
    name: str, arguments: dict[str, Any], pretrained: bool, image_size: int | None
) -> tuple[nn.Module, dict[str, Any]]:
    """Create a timm model, telling it the image size where its class depends on one."""
    import timm

    arguments = {**arguments, "num_classes": arguments.get("num_classes")}
    arguments = {key: value for key, value in arguments.items() if value is not None}
    if image_size is not None:
        sized = {**arguments, "img_size": image_size}
        try:
            return timm.create_model(**{**sized, "model_name": name}, pretrained=pretrained), sized
        except TypeError:
            pass  # a network that takes images of any size has no such argument
    return timm.create_model(**{**arguments, "model_name": name}, pretrained=pretrained), arguments


def build_timm(spec: ModelSpec) -> nn.Module:
    """Return the network that a spec describes, weights arbitrary."""
    import timm

    return timm.create_model(**spec.arguments, pretrained=False)


def check_arguments(spec: ModelSpec) -> None:
    """Check that building a spec reads no file and no Hub: it may come from a stranger's artifact.

    Raises:
        ModelError: arguments that do more than describe a network.
    """
    import timm

    name = str(spec.arguments.get("model_name"))
    if not timm.is_model(name.split(".")[0]):
        raise ModelError(f"there is no timm network {name!r}.")
    _check_describing(spec.arguments)


def _check_describing(arguments: dict[str, Any]) -> None:
    import timm

    loading = set(inspect.signature(timm.create_model).parameters) - {"model_name", "kwargs"}
    if loading & set(arguments):
        raise ModelError(f"the arguments {arguments} do not only describe a timm network.")


def is_published(name: str) -> bool:
    """Tell whether timm itself says where the weights of a name come from, not the name."""
    import timm

    return timm.is_model(name.split(".")[0]) and not {":", "/"} & set(name)
