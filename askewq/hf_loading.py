"""Artifacts in transformers: ``AutoModelFor*.from_pretrained(folder)`` keeps the weights packed.

An artifact's config.json has the model type `askewq`, so that transformers alone refuses it. Here
that type leads to the network's own config (registration.py), which carries the quantization
method `askewq`; its quantizer puts packed layers in place before transformers' loader fills them.
What is saved is an artifact again. A model is complete or refused: transformers would only warn
of weights that are missing and make them up.
"""

import functools
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from askewq import activations, checkpoint
from askewq.artifact import check_config, config_content
from askewq.errors import FormatError, ModelError
from askewq.hf_models import cast_, plain_json
from askewq.manifest import PackedInput, PackedWeight, tensor_name
from askewq.packed import (
    PackedTensor,
    Slot,
    artifact_of,
    attach_,
    attached,
    seal_,
    slot_of,
    unpack_,
)
from askewq.spec import ModelSpec
from askewq.vocabulary import MODEL_TYPE


def config_from(content: dict[str, Any], **kwargs: Any) -> Any:
    """Return the config of an artifact's network, with the quantization method `askewq`.

    Args:
        content: of config.json.
        kwargs: as PreTrainedConfig.from_dict takes them.

    Raises:
        FormatError: a damaged config.json, or one of a newer version.
        ModelError: an artifact of a network that is not from transformers.
    """
    where = str(kwargs.get("name_or_path") or "this artifact")
    spec, preprocessing = check_config(content, f"config.json of {where}")
    if spec.source != "transformers":
        raise ModelError(
            f"{where} is an artifact of a {spec.source} network, which transformers does not "
            "have; load it with askewq.load(folder)."
        )
    arguments = dict(spec.arguments)
    try:
        plain: Any = type(AutoConfig.for_model(arguments.pop("model_type")))
    except (KeyError, ValueError, TypeError) as error:
        raise FormatError(
            f"config.json of {where} describes no network of transformers ({error}); it is "
            "damaged, or needs a newer transformers."
        ) from error
    arguments["quantization_config"] = AskewConfig(
        name=spec.name,
        task=spec.task,
        labels=list(spec.labels),
        pooling=spec.pooling,
        preprocessing=preprocessing,
    ).to_dict()
    return _config_class(plain).from_dict(arguments, **kwargs)


class _WritesArtifact:
    """Mixin of a config that is written as an artifact's config.json, and as nothing else."""

    def to_json_file(self, json_file_path: Any, use_diff: bool = True) -> None:
        """Write config.json; `use_diff` is transformers' and changes nothing here."""
        if not hasattr(self, "quantization_config"):  # after model.dequantize()
            super().to_json_file(json_file_path, use_diff)  # type: ignore[misc]
            return
        arguments = plain_json(self.to_dict())  # type: ignore[attr-defined]
        kept = arguments.pop("quantization_config")
        # Labels may have been given other names in from_pretrained; a file may have 10 before 2.
        names = dict(sorted(self.id2label.items())).values() if kept["labels"] else ()  # type: ignore[attr-defined]
        arguments["_name_or_path"] = kept["name"]  # not the folder that it was read from
        named = kept["name"], kept["task"], tuple(names)
        spec = ModelSpec("transformers", *named, arguments, kept["pooling"])
        text = json.dumps(config_content(spec, kept["preprocessing"]), indent=2, ensure_ascii=False)
        Path(json_file_path).write_text(text + "\n", encoding="utf-8")

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle by the original class: a class made at run time has no name to import."""
        return _empty_config, (type(self).__bases__[1],), self.__dict__


@functools.cache
def _config_class(plain: Any) -> Any:
    """Return a subclass of the same name, by which transformers finds the network's class."""
    names = {"__module__": plain.__module__, "__init__": plain.__init__}
    return type(plain.__name__, (_WritesArtifact, plain), names)


def _empty_config(plain: Any) -> Any:
    made = _config_class(plain)
    return made.__new__(made)


@register_quantization_config(MODEL_TYPE)
@dataclass
class AskewConfig(QuantizationConfigMixin):
    """What config.json says beside the network's own config; bits and grids are in the weights."""

    name: str = ""
    task: str = ""
    labels: list[str] = field(default_factory=list)
    pooling: str = "mean"
    preprocessing: dict[str, Any] = field(default_factory=dict)
    quant_method: str = MODEL_TYPE  # type: ignore[assignment]  # an enum of built-in methods


@register_quantizer(MODEL_TYPE)
class AskewQuantizer(HfQuantizer):
    """Puts packed layers where the artifact has packed weights, and writes them as they are."""

    requires_calibration = True  # trained by askewq, never made from a float model here

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise FormatError("there is no file with weights beside this artifact's config.json.")
        folder, paths = Path(model.name_or_path), [Path(name) for name in checkpoint_files]
        for path in paths:
            # Compared as written: the file may be a link into the Hub's cache.
            inside = path.is_relative_to(folder) and ".." not in path.relative_to(folder).parts
            if folder.is_dir() and not inside:
                raise FormatError(
                    f"the weights of {folder} are said to be {path}; they are beside its "
                    "config.json."
                )
        stored = checkpoint.read_files(paths)
        names = _names_in(model, [*stored.weights, *stored.tensors, *stored.shared])
        self.whole = all(names.get(name) == name for name in (*stored.weights, *stored.tensors))
        held: dict[str, PackedTensor] = {}
        for name, weight in stored.weights.items():
            if name in names:
                slot = slot_of(model, names[name])
                held[name] = _on_meta(weight, slot)
                attach_(slot, held[name])
        self.sharing = {}
        for name, source in stored.shared.items():
            if source in held and name in names:
                slot = slot_of(model, names[name])
                # Two names of one weight: the loader would take the second for missing.
                del slot.layer._parameters[slot.leaf]
                self.sharing[slot] = held[source]
                slot.layer._is_hf_initialized = True  # type: ignore[assignment]
        for name, rounded in stored.inputs.items():
            given = names.get(tensor_name(name, "weight"))
            if given is not None:
                module = given.rpartition(".")[0]
                names[tensor_name(name, "input_scale")] = tensor_name(module, "input_scale")
                _round_on_meta(model.get_submodule(module), rounded)
        packed = {names[n] for n in (*stored.weights, *stored.shared) if n in names}
        tied = model.all_tied_weights_keys
        for target, source in list(tied.items()):
            if target in packed and source not in model.state_dict():
                del tied[target]
        _check_complete(model, stored, names)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for slot, weight in self.sharing.items():
            slot.layer._modules[slot.leaf] = weight
        del self.sharing
        for module in list(model.modules()):
            if attached(module):
                seal_(module)
        made_up = getattr(model, "generation_config", None)
        if made_up is not None and made_up._from_model_config:
            # Without a file of its own it was read from config.json, which is not the network's.
            model.generation_config = type(made_up).from_model_config(model.config)
        return model

    # transformers 5.12 does not hand over the model.
    def update_weight_conversions(self, weight_conversions: Any, model: Any = None) -> list[Any]:
        """An artifact has the network's own names: there is nothing to convert."""
        return []

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the content of the file, which is the one that was loaded.

        Raises:
            ModelError: the model was cast since, so that its float tensors are others, or is a
                part of the network that config.json describes.
        """
        if not self.whole:
            raise ModelError(
                f"{type(model).__name__} is a part of the artifact's network, and config.json "
                "describes the whole; load it with the Auto class of its task to save it."
            )
        content = artifact_of(model)
        for name, tensor in content.tensors.items():
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                raise ModelError(
                    f"{name} is {tensor.dtype}, and an artifact holds what was evaluated, in "
                    "float32; load it without dtype= to save it."
                )
        return checkpoint.serialize(content)

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        unpack_(model)
        if dtype is not None:  # by default what the config says: a name after save_pretrained
            cast_(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        return model

    def is_serializable(self) -> bool:
        """Tell transformers that the model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """A packed model has no weights to train."""
        return False


def _round_on_meta(layer: nn.Module, rounded: PackedInput) -> None:
    """Let a layer round its input, with a scale for transformers' loader to fill."""
    activations.round_input_(layer, rounded.grid, rounded.scale.to("meta"))
    layer._is_hf_initialized = True  # type: ignore[assignment]


def _on_meta(weight: PackedWeight, slot: Slot) -> PackedTensor:
    """Return a packed weight without content, of the type that the layer was built with."""
    empty = replace(weight, codes=weight.codes.to("meta"), scale=weight.scale.to("meta"))
    packed = PackedTensor(empty)
    parameter = slot.parameter
    if tuple(parameter.shape) != weight.shape:
        raise FormatError(
            f"a weight of {type(slot.layer).__name__} is {list(weight.shape)} in the artifact and "
            f"{list(parameter.shape)} in the model that config.json describes."
        )
    packed.dtype = parameter.dtype
    # What is loaded needs no random numbers first; transformers asks both. A layer with a buffer
    # that no file holds (Gemma's scaled embedding) needs transformers to fill that one.
    packed._is_hf_initialized = True  # type: ignore[assignment]
    if not slot.layer._non_persistent_buffers_set:
        slot.layer._is_hf_initialized = True  # type: ignore[assignment]
    return packed


def _names_in(model: Any, names: list[str]) -> dict[str, str]:
    """Return the name in the model of every stored name: a base model has no prefix and no head."""
    known, prefix = {*model.state_dict()}, f"{model.base_model_prefix}."
    found = {}
    for name in names:
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if candidate in known:
                found[name] = candidate
                break
    return found


def _check_complete(model: Any, stored: checkpoint.Artifact, names: dict[str, str]) -> None:
    """Check that nothing of the model is left for transformers to make up, nor of the artifact out.

    Raises:
        FormatError: naming what is missing, of another shape, or in a head that the model has not.
    """
    scales = [tensor_name(name, "input_scale") for name in stored.inputs]
    given = {names[name] for name in (*stored.tensors, *stored.shared, *scales) if name in names}
    inside = {
        f"{names[name]}.{leaf}"
        for name in stored.weights
        if name in names
        for leaf in ("codes", "scale")
    }
    state = model.state_dict()
    shapes = {names[n]: tensor.shape for n, tensor in stored.tensors.items() if n in names}
    if other := [name for name, shape in shapes.items() if state[name].shape != shape]:
        raise FormatError(
            f"{other[0]} is {list(shapes[other[0]])} in the artifact and "
            f"{list(state[other[0]].shape)} in the model that was asked for."
        )
    missing = [n for n in state if n not in given and n not in inside]
    if missing:
        raise FormatError(
            f"the artifact has no {', '.join(missing[:5])} ({len(missing)} keys) for "
            f"{type(model).__name__}, and askewq makes no weights up; use the Auto class of the "
            "task that it was trained for."
        )
    over = [n for n in (*stored.tensors, *stored.weights, *stored.shared) if n not in names]
    if over and model.base_model is not model:
        raise FormatError(
            f"the artifact has {', '.join(over[:5])}, and {type(model).__name__} has no place for "
            "it; use the Auto class of the task that it was trained for."
        )
