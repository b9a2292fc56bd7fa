"""Pretrained models from timm, Hugging Face or the user's own file, as one LoadedModel.

Weights are never unpickled beyond plain tensors, and no code from the Hub runs unless it was
asked for.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from askewq import sentence_files
from askewq.errors import ModelError
from askewq.hf_models import (
    auto_class,
    build_transformers,
    follow_padding,
    guess_hf_task,
    hf_config,
    load_tokenizer,
    load_transformers,
)
from askewq.own_models import call_factory, load_weights
from askewq.preprocessing import ImagePreprocessing
from askewq.spec import CONFIG, LoadedModel, ModelSpec, Source, unreachable
from askewq.timm_models import build_timm, load_timm
from askewq.vocabulary import EMBEDDING_TASKS, IMAGE_TASKS, Task


def find_source(name: str) -> Source:
    """Tell where a model of this name comes from.

    Raises:
        ModelError: a file or a folder that is not there.
    """
    import timm

    file, _, factory = name.rpartition(":")
    if file.endswith(".py") or name.endswith(".py"):
        if not Path(file).is_file() or not factory:
            raise ModelError(
                f"the model {name!r}: there is no file {file or name!r}, or no function named; a "
                "model of your own is given as path/to/file.py:factory."
            )
        return "module"
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) or timm.is_model(name.split(".")[0]):
        return "timm"
    if name.startswith("timm/") and not Path(name).exists():  # as the Hub spells it
        return "timm"
    local = Path(name).is_dir() or name.startswith((".", "/", "~"))
    if local and not (Path(name) / CONFIG).is_file():
        raise ModelError(
            f"the model {name!r}: the folder has no {CONFIG} (or does not exist). What askewq.save "
            "wrote names no network; askewq.load(folder, model=...) fills one."
        )
    return "transformers"


def guess_task(name: str, source: Source, *, trust_remote_code: bool = False) -> Task:
    """Return the task of a model where it can be told safely.

    Raises:
        ModelError: a Hugging Face model without a head that says it.
    """
    if source != "transformers":
        return "image-classification"
    return guess_hf_task(name, trust_remote_code)


def load(
    name: str,
    task: Task,
    labels: tuple[str, ...] = (),
    *,
    source: Source | None = None,
    pretrained: bool = True,
    weights: Path | None = None,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
    image_size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    max_length: int | None = None,
) -> LoadedModel:
    """Load a model for a task with these labels, in float32.

    Args:
        labels: class names; where the pretrained head has another number of classes, a new head
            is made (timm, transformers; said in `notes`). Ignored for tasks without labels.
        image_size, mean, std, max_length: override the model's own preprocessing.

    Raises:
        ModelError: unknown name, Hub out of reach, weights that do not fit.
    """
    source = source or find_source(name)
    if source == "module" and not pretrained:
        raise ModelError(
            f"--no-pretrained does not go with {name!r}: the weights of a module of your own are "
            "those that its function gives it; leave it out."
        )
    _check_task(name, source, task)
    if source == "timm":
        loaded = load_timm(name, task, labels, pretrained and weights is None, image_size)
    elif source == "module":
        spec = ModelSpec("module", name, task, labels, {})
        loaded = LoadedModel(build(spec), spec, ImagePreprocessing())
    else:
        if weights is not None:
            raise ModelError(
                "--weights goes with timm models and modules of your own; for a Hugging Face model "
                "pass the folder that holds config.json and the weights as --model."
            )
        loaded = load_transformers(name, task, labels, pretrained, trust_remote_code)
    if task not in IMAGE_TASKS:
        config: Any = loaded.model.config
        # XLNet's is -1, for any number.
        positions = max(0, getattr(config.get_text_config(), "max_position_embeddings", None) or 0)
        texts = load_tokenizer(tokenizer or name, trust_remote_code, max_length, positions or None)
        if task in EMBEDDING_TASKS and "attention_mask" not in texts.tokenizer.model_input_names:
            raise ModelError(
                f"the tokenizer in {tokenizer or name!r} gives no attention_mask, which says what "
                f"tokens count for --task {task}; pass another --tokenizer."
            )
        if task == "text-classification":
            follow_padding(loaded, texts.tokenizer.pad_token_id)
        if task in EMBEDDING_TASKS:
            found = sentence_files.read(name)
            loaded.spec = replace(loaded.spec, pooling=found.pooling)
            loaded.beside, loaded.doubts = found.files, loaded.doubts + found.doubts
        loaded.preprocessing = texts
    if isinstance(loaded.preprocessing, ImagePreprocessing):
        loaded.preprocessing = loaded.preprocessing.override(image_size, mean, std)
    elif image_size or mean or std:
        raise ModelError(
            f"--image-size, --mean and --std do not go with {name!r}, whose own tokenizer or image "
            "processor prepares its input; change the files beside the model instead."
        )
    if weights is not None:
        load_weights(loaded.model, weights)
    loaded.model.float()
    # Each in memory of its own: where a mapped file begins decides how sums are made, and buffers
    # that are views of one table are no longer so.
    for tensor in (*loaded.model.parameters(), *loaded.model.buffers()):
        tensor.data = tensor.data.clone()
    return loaded


def build(spec: ModelSpec) -> nn.Module:
    """Return the plain network of a spec with arbitrary weights, float32.

    Raises:
        ModelError: a module of the user's whose file is not there, or that fails.
    """
    if spec.source == "timm":
        return build_timm(spec)
    if spec.source == "module":
        return call_factory(spec.name)
    return build_transformers(spec)


def build_on_meta(spec: ModelSpec) -> nn.Module:
    """Build a network without memory, where its class can do without."""
    try:
        with torch.device("meta"):
            return build(spec)
    except (NotImplementedError, RuntimeError):
        return build(spec)


def load_bare(
    name: str,
    source: Source,
    task: Task,
    *,
    trust_remote_code: bool = False,
    image_size: int | None = None,
) -> nn.Module:
    """Return the network of a name with arbitrary weights: no weights, tokenizer or data needed.

    Raises:
        ModelError: unknown name, a config that the Hub should give and does not, or a task that
            the network is not for.
    """
    _check_task(name, source, task)
    if source == "timm":
        return load_timm(name, task, (), False, image_size).model
    if source == "module":
        return call_factory(name)
    config = hf_config(name, trust_remote_code)
    try:
        made = auto_class(task).from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a config can be wrong in every way
        raise unreachable(name, error) from error
    return cast(nn.Module, made)


def _check_task(name: str, source: Source, task: Task) -> None:
    if source != "transformers" and task not in IMAGE_TASKS:
        raise ModelError(
            f"--task {task} goes with models from transformers, and {name!r} is from {source}, for "
            f"{' and '.join(IMAGE_TASKS)}."
        )
