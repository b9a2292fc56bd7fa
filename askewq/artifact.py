"""The output folder as an artifact: model.safetensors, config.json and the preprocessing files.

An artifact never names code to run: a module of the user's own is passed in again by the user.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from askewq import checkpoint, digest, disk, layers, sentence_files, trust
from askewq import packed as packed_layers
from askewq.errors import AskewError, FormatError, ModelError, OutputError
from askewq.hf_models import cast_, is_transformers, load_processor, load_tokenizer
from askewq.models import build, build_on_meta
from askewq.preprocessing import ImagePreprocessing, Preprocessing
from askewq.spec import CONFIG, LoadedModel, ModelSpec, Source, first_line
from askewq.timm_models import check_arguments
from askewq.vocabulary import IMAGE_TASKS, MODEL_TYPE, Pooling, Task

ARTIFACT = "model.safetensors"
# How a language model ends and draws its tokens; transformers reads it there.
GENERATION = "generation_config.json"
VERSION = 2
# A config.json of version 1 has no digest, one of version 3 a pooling other than the mean.
WITHOUT_DIGEST, POOLED = 1, 3
# Types that a network may be loaded in.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What decides which network is built, and how its inputs are prepared.
_SEALED = ("source", "name", "task", "labels", "arguments", "preprocessing")
_SEALED_OF = {WITHOUT_DIGEST: _SEALED, VERSION: _SEALED, POOLED: (*_SEALED, "pooling")}
LOAD_WITH = "import askewq, then AutoModelFor*.from_pretrained(folder) or askewq.load(folder)"


def save_config(loaded: LoadedModel, folder: Path) -> None:
    """Write config.json and the preprocessing files beside an artifact."""
    content = config_content(loaded.spec, loaded.preprocessing.save(folder))
    text = json.dumps(content, indent=2, ensure_ascii=False)
    disk.write(folder / CONFIG, text + "\n")
    sentence_files.write(loaded.beside, folder)
    generation = getattr(loaded.model, "generation_config", None)
    if generation is not None and not generation._from_model_config:
        disk.write(folder / GENERATION, generation.to_json_string())


def config_content(spec: ModelSpec, preprocessing: dict[str, Any]) -> dict[str, Any]:
    """Return what config.json holds.

    transformers without askewq must never return a network with random weights for it. Its Auto
    classes refuse a model type that they do not know. A class of one architecture would only warn
    of that and go on, with the config in `arguments` where that is its own; but it refuses a
    quantization_config without a quant_method.
    """
    refused = {"library": "askewq", "load_with": LOAD_WITH}
    content = asdict(spec)
    if spec.source == "transformers":
        content["arguments"] = {**spec.arguments, "quantization_config": refused}
    content["preprocessing"] = preprocessing
    content = json.loads(json.dumps(content))  # tuples as they will be read back
    version = VERSION if spec.pooling == "mean" else POOLED
    content = {key: content[key] for key in _SEALED_OF[version]}
    return {
        "model_type": MODEL_TYPE,
        "askewq_version": version,
        "quantization_config": refused,
        **content,
        "digest": digest.of_config(content),
    }


def is_artifact(folder: Path) -> bool:
    """Tell whether a folder says that it is an artifact; it may still be damaged."""
    path = folder / CONFIG
    if not path.is_file() or path.stat().st_size > trust.CONFIG_BYTES:
        return False
    return '"askewq_version"' in path.read_text("utf-8", errors="replace")


def read_spec(folder: Path) -> tuple[ModelSpec, dict[str, Any]]:
    """Return the spec and the preprocessing values in an artifact's config.json.

    Raises:
        FormatError: no artifact there, a newer version, or a damaged file.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise FormatError(
            f"{folder} is not an askewq artifact: it has no {CONFIG}; pass the folder that "
            "`askewq finetune --output` wrote, of the Hub's what huggingface_hub.snapshot_download "
            "returns. What `askewq.save` wrote is loaded into a network of yours: pass model=... "
            "to askewq.load."
        )
    return check_config(trust.read_json(path), str(path))


def check_config(content: Any, path: str) -> tuple[ModelSpec, dict[str, Any]]:
    """Return the spec and the preprocessing values in the content of a config.json.

    Raises:
        FormatError: another version, or a damaged file; `path` names it.
    """
    version = content.get("askewq_version") if isinstance(content, dict) else None
    if type(version) is not int or version not in _SEALED_OF:
        raise FormatError(
            f"{path} has askewq_version {version!r}; this askewq reads {WITHOUT_DIGEST} to "
            f"{POOLED}. An artifact of a newer askewq needs a newer askewq."
        )
    keys = _SEALED_OF[version]
    digests = () if version == WITHOUT_DIGEST else ("digest",)
    if missing := [key for key in (*keys, *digests) if key not in content]:
        raise FormatError(f"{path} lacks {', '.join(missing)}.")
    if content["source"] not in get_args(Source) or content["task"] not in get_args(Task):
        raise FormatError(
            f"{path} names an unknown source or task: {content['source']!r}, {content['task']!r}."
        )
    labels, arguments = content["labels"], content["arguments"]
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise FormatError(f"{path}: labels must be a list of names, not {labels!r}.")
    if not isinstance(arguments, dict) or not isinstance(content["name"], str):
        raise FormatError(f"{path}: name must be a text and arguments a mapping.")
    if not isinstance(content["preprocessing"], dict):
        raise FormatError(f"{path}: preprocessing must be a mapping.")
    pooling: Any = content["pooling"] if version == POOLED else "mean"
    if pooling not in get_args(Pooling):
        raise FormatError(f"{path} names an unknown pooling: {pooling!r}.")
    sealed = {key: content[key] for key in keys}
    if version != WITHOUT_DIGEST and content["digest"] != digest.of_config(sealed):
        raise FormatError(
            f"{path} does not have the digest that it was written with: it was damaged or changed. "
            "Copy or make it again."
        )
    trust.check_arguments(arguments, path)
    arguments = {key: value for key, value in arguments.items() if key != "quantization_config"}
    named = content["source"], content["name"], content["task"]
    return ModelSpec(*named, tuple(labels), arguments, pooling), content["preprocessing"]


def load_artifact(
    folder: Path, *, factory: str | None = None, keep_packed: bool = False
) -> LoadedModel:
    """Return the plain model of an artifact with its snapped weights, in eval mode.

    Args:
        keep_packed: layers hold codes and unpack them on use, instead of dense weights.
        factory: ``path/to/file.py:factory`` for an artifact of a module of the user's own, whose
            code an artifact never carries or names on its own authority.

    Raises:
        FormatError: not an artifact, damaged, or of a newer version.
        ModelError: an own module without `factory`, or another network with one.
    """
    model, spec, preprocessing = _network(folder, factory, keep_packed)
    texts = spec.task == "feature-extraction"
    beside = sentence_files.read(str(folder)).files if texts else {}
    return LoadedModel(model, spec, restore(spec, preprocessing, folder), beside=beside)


def _network(
    folder: Path, factory: str | None, keep_packed: bool
) -> tuple[nn.Module, ModelSpec, dict[str, Any]]:
    """Return what `load_artifact` does, with the values of its preprocessing."""
    spec, preprocessing = read_spec(folder)
    _check_preprocessing(spec, preprocessing)
    if factory is not None and spec.source != "module":
        raise ModelError(
            f"--model goes with an artifact of a module of your own; {folder} is of {spec.name} "
            f"from {spec.source}: leave it out."
        )
    if spec.source == "module":
        if factory is None:
            raise ModelError(
                f"the artifact {folder} is of a module of your own ({spec.name}); askewq runs no "
                "code that an artifact names: pass the module, --model path/to/file.py:factory or "
                "askewq.load(folder, model=...)."
            )
        spec = replace(spec, name=factory)
    content = checkpoint.read(folder / ARTIFACT)
    model = plain_network(spec, folder, content)
    _fill(model, content, keep_packed)
    read_generation(model, folder)
    return model.eval(), spec, preprocessing


def read_generation(model: nn.Module, folder: Path) -> None:
    """Give a network that generates the settings of its folder for that, if there are any.

    Raises:
        FormatError: a damaged file.
    """
    if not (folder / GENERATION).is_file() or not hasattr(model, "generation_config"):
        return
    made: Any = model.generation_config
    trust.read_json(folder / GENERATION)  # it is small
    try:  # made of a dict it would count as changed, and be judged more strictly when it is saved
        model.generation_config = type(made).from_pretrained(folder)
    except Exception as error:  # it comes from a stranger, perhaps
        raise FormatError(
            f"{folder / GENERATION} is damaged ({type(error).__name__}: {first_line(error)})."
        ) from error


def plain_network(spec: ModelSpec, folder: Path, content: checkpoint.Artifact) -> nn.Module:
    """Return the network of an artifact before it is filled.

    Raises:
        FormatError: a config.json that describes none, or one much larger than its weights.
    """
    if spec.source == "module":
        return build(spec)
    return _build_described(spec, folder, _parameters(content))


def _parameters(artifact: checkpoint.Artifact) -> int:
    """Return how many numbers an artifact fills."""
    packed = sum(math.prod(weight.shape) for weight in artifact.weights.values())
    return packed + sum(tensor.numel() for tensor in artifact.tensors.values())


def _build_described(spec: ModelSpec, folder: Path, parameters: int) -> nn.Module:
    """Build the network that config.json describes; it comes from a stranger, perhaps."""
    try:
        if spec.source == "timm":
            check_arguments(spec)
        # A layer that is replaced while the network is built counts twice; an encoder, a decoder
        # and a head that are tied to one embedding, of a large vocabulary nearly all, four times.
        with trust.at_most(4 * parameters), torch.random.fork_rng(devices=[]):
            build_on_meta(spec)  # takes no memory, whatever the numbers
        return build(spec)
    except Exception as error:  # wrong arguments fail in every way that a network can
        reason = f"{type(error).__name__}: {str(error).strip()[:300]}"
        raise FormatError(
            f"{folder / CONFIG} describes no {spec.source} network that can be built here "
            f"({reason}); it is damaged, or needs another version of {spec.source}."
        ) from error


def restore(spec: ModelSpec, values: dict[str, Any], folder: Path) -> Preprocessing:
    """Return an artifact's preprocessing, of config.json and the files beside it.

    Raises:
        FormatError: damaged values, or a tokenizer that leads out of the folder.
        ModelError: files of a tokenizer or image processor that are missing.
    """
    _check_preprocessing(spec, values)
    if spec.task not in IMAGE_TASKS:
        trust.check_tokenizer(folder)
        with _without_warnings():
            return load_tokenizer(str(folder), False, values["max_length"])
    if spec.source == "transformers":
        return load_processor(str(folder), trust_remote_code=False)
    return ImagePreprocessing.restore(values)


def _check_preprocessing(spec: ModelSpec, values: dict[str, Any]) -> None:
    """Check what config.json says of the preprocessing, whose files may be elsewhere."""
    length = values.get("max_length")
    if spec.task not in IMAGE_TASKS and (not isinstance(length, int) or length < 2):
        raise FormatError(f"config.json: preprocessing has no usable max_length: {length!r}.")
    if spec.task in IMAGE_TASKS and spec.source != "transformers":
        ImagePreprocessing.restore(values)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep transformers from warning that it does not know the model type of an artifact."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _fill(model: nn.Module, content: checkpoint.Artifact, keep_packed: bool) -> None:
    fill = packed_layers.load_packed_into if keep_packed else checkpoint.load_into
    fill(model, content)


def verify(folder: Path) -> list[str]:
    """Check all of an artifact that can be checked; return what was, as lines to print.

    Raises:
        FormatError: damage, or an artifact of version 1, which has no digests.
        ModelError: a tokenizer or image processor that cannot be read.
    """
    spec, preprocessing = read_spec(folder)
    content = checkpoint.read(folder / ARTIFACT)
    version = trust.read_json(folder / CONFIG)["askewq_version"]
    if content.digest is None or version == WITHOUT_DIGEST:
        raise FormatError(
            f"{folder} is of version {WITHOUT_DIGEST}, which has no digests: it can be read, but "
            "not verified. A run that is resumed to its end writes it anew."
        )
    lines = [
        f"{ARTIFACT}: {len(content.weights)} packed weights and {len(content.tensors)} other "
        f"tensors have the digest {content.digest}",
        f"{CONFIG} has its digest",
    ]
    if spec.source == "module":
        lines.append(f"whether they fit {spec.name} shows when it is loaded: it is your own")
    else:
        model = _build_described(spec, folder, _parameters(content))
        checkpoint.check_fit(model, content)
        read_generation(model, folder)
        lines.append(f"they fit the network that {CONFIG} describes")
    restore(spec, preprocessing, folder)
    if spec.source == "transformers":
        part = "image processor" if spec.task in IMAGE_TASKS else "tokenizer"
        lines.append(f"the {part} beside them, which has no digest, can be read")
    return lines


def save(model: nn.Module, folder: str | Path) -> None:
    """Pack the weights of a network from a training loop of your own: `askewq.save`.

    Args:
        model: one with quantized layers, after `askewq.snap_`.
        folder: gets model.safetensors alone, from which `load(folder, model=...)` fills a plain
            network like the one that was quantized; one that was saved before is replaced. Put no
            config.json of transformers there. Of several processes one saves.

    Raises:
        ModelError: no quantized layer, or a weight that is not on a level, or not float32.
        DivergenceError: a weight that is not finite.
        OutputError: a file in the place of the folder.
        FormatError: the folder is a whole artifact, with weights that belong to its config.json,
            or a model of transformers, or has ordinary weights under that name.
    """
    folder, model = Path(folder), layers.unwrapped(model)
    _check_packable(model)
    disk.check_place(folder, "")
    if is_artifact(folder):
        raise FormatError(
            f"{folder} is an artifact, whose config.json belongs to its weights; save to another "
            "folder."
        )
    if (folder / CONFIG).is_file() and "model_type" in trust.read_json(folder / CONFIG):
        raise FormatError(
            f"{folder / CONFIG} describes a model of transformers, which would take the packed "
            "weights for its own, find none, and be random; save to another folder."
        )
    if (folder / ARTIFACT).exists() and not checkpoint.is_packed(folder / ARTIFACT):
        raise FormatError(
            f"{folder / ARTIFACT} holds ordinary weights, which would be lost; save to another "
            "folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save(model, folder / ARTIFACT)


def save_artifact(loaded: LoadedModel, folder: str | Path) -> None:
    """Write a whole artifact from a training loop of your own, as `askewq finetune` does.

    Args:
        loaded: as `models.load` gave it, its network quantized and trained, after `askewq.snap_`.
        folder: one that does not exist or is empty, which appears whole or not at all: the weights,
            config.json and the files of the preprocessing. Of several processes one saves.

    Raises:
        ModelError: no quantized layer, or a weight that is not on a level, or not float32; a
            network that config.json does not describe.
        DivergenceError: a weight that is not finite.
        OutputError: a file in the place of the folder, or a folder that holds something.
    """
    folder, model, spec = Path(folder), layers.unwrapped(loaded.model), loaded.spec
    _check_packable(model)
    disk.check_place(folder, "")
    if folder.is_dir() and any(folder.iterdir()):
        raise OutputError(f"{folder} is not empty; save to another folder.")
    with disk.appearing_folder(folder.resolve()) as partial:
        checkpoint.save(model, partial / ARTIFACT)
        save_config(loaded, partial)
        try:
            load_artifact(partial, factory=spec.name if spec.source == "module" else None)
        except AskewError as error:
            reason = str(error).replace(str(partial), str(folder))
            raise ModelError(
                f"the artifact of {spec.name!r} could not be loaded again, and nothing is left of "
                f"it: {reason} Change the weights of what `models.load` gave, and no part of it."
            ) from error


def _check_packable(model: nn.Module) -> None:
    """Check that the weights of quantized layers are what a file holds."""
    quantized = layers.quantized_layers(model)
    if not quantized:
        raise ModelError(
            "the model has no quantized layer, and so nothing to pack; save it with torch or "
            "safetensors, or call askewq.quantize(model, bits=2) before training."
        )
    between = [name for name, layer in quantized.items() if not layer.is_snapped()]
    for name in between:
        quantized[name].codes()  # raises where a weight is NaN, which snapping does not mend
    if between:
        raise ModelError(
            f"{len(between)} layers, {between[0]!r} the first, are not on their levels for good: "
            "call askewq.snap_(model), or finish_() of a Polisher, evaluate it, and save it then."
        )
    for name, layer in quantized.items():
        if layer.latent.dtype != torch.float32:
            raise ModelError(
                f"{name} is {layer.latent.dtype}, and packed weights are float32: quantize and "
                "train a network in float32 (bf16 by autocast), and cast what was loaded; one in "
                "float64 goes by model.float()."
            )


def load(
    folder: str | Path,
    *,
    model: nn.Module | None = None,
    dtype: torch.dtype | None = None,
    packed: bool = False,
) -> nn.Module:
    """Load an artifact as the network that was evaluated, weights snapped: `askewq.load`.

    Args:
        folder: what `askewq finetune --output` or `askewq.save` wrote.
        model: a fresh network to fill, needed for a module of your own and for what `askewq.save`
            wrote; filled in place.
        dtype: of floating-point parameters and buffers; float32 as trained by default. Buffers
            that no file holds (rotary frequencies) stay float32 in a model of transformers, as
            they do in its own `from_pretrained`.
        packed: layers keep their codes and unpack them whenever they are used: less memory and a
            slower forward pass, under torch.no_grad() with the very same result (with gradients
            torch may choose other kernels). Such a model cannot be trained, traced or exported.
            The dense network is made first: where that has no room, transformers' own
            `from_pretrained` of an artifact (README) makes none.

    Returns:
        The model in eval mode.

    Raises:
        FormatError: a damaged artifact, or one that does not fit `model`.
        ModelError: no network as `model`, or no type as `dtype`.
    """
    folder = Path(folder)
    if dtype is not None and dtype not in _DTYPES:
        known = ", ".join(map(str, _DTYPES))
        raise ModelError(f"dtype = {dtype!r} must be a torch.dtype, one of {known}.")
    if model is not None:
        _fill(model, checkpoint.read(folder / ARTIFACT), packed)
    else:
        model, _, _ = _network(folder, None, packed)
    if dtype is not None and is_transformers(model):
        cast_(model, dtype)
    elif dtype is not None:
        model.to(dtype)
    return model.eval()
