"""The packed artifact: quantized weights as codes and scales in one safetensors file.

docs/format.md specifies it. What is read back is, bit for bit, what was saved; anything that does
not follow the specification is refused by name.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from askewq import activations, digest, disk, manifest, trust
from askewq.errors import FormatError, ModelError, UnverifiedWarning, near
from askewq.layers import QuantizedWeight, quantized_layers, quantized_modules, uncompiled
from askewq.manifest import (
    VERSION,
    WITH_INPUTS,
    WITHOUT_DIGEST,
    PackedInput,
    PackedWeight,
    tensor_name,
)
from askewq.pack import pack

METADATA_KEY = "askewq"
# The header is read before anything is known of it, and as Python objects it takes up to twenty
# times its bytes: it may have this many, or its share of the file.
HEADER_BYTES, HEADER_SHARE = 2**22, 16


@dataclass(frozen=True, slots=True)
class Artifact:
    """The content of a packed file: `weights` on a grid, other `tensors`, and `shared` names.

    `digest` is that of the file it was read from, None where it has none; `inputs` are those of
    layers that round them, by the layer's name.
    """

    weights: dict[str, PackedWeight]
    tensors: dict[str, Tensor]
    shared: dict[str, str]
    digest: str | None = None
    inputs: dict[str, PackedInput] = field(default_factory=dict)

    def dense_state(self) -> dict[str, Tensor]:
        """Return an ordinary state dict: every tensor under its own name, weights snapped."""
        state = {**self.tensors, **{name: w.dense() for name, w in self.weights.items()}}
        return state | {name: state[source] for name, source in self.shared.items()}


def save(model: nn.Module, path: Path) -> None:
    """Write a model whose quantized weights are snapped; the file appears whole or not at all.

    Raises:
        DivergenceError: a quantized weight that is not finite.
    """
    tensors, metadata = serialize(artifact_of(model))
    with disk.appearing(path) as partial:
        save_file(tensors, partial, metadata)


def serialize(artifact: Artifact) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the header entries that a file with this content holds."""
    tensors = _apart(artifact.tensors)
    content: dict[str, Any] = {"version": VERSION, "weights": {}, "shared": artifact.shared}
    for name, weight in artifact.weights.items():
        tensors[f"{name}.codes"] = weight.codes.cpu()
        tensors[f"{name}.scale"] = weight.scale.detach().float().cpu().contiguous()
        content["weights"][name] = manifest.entry_of(weight)
    if artifact.inputs:
        content |= {"version": WITH_INPUTS, "inputs": {}}
    for name, rounded in artifact.inputs.items():
        tensors[tensor_name(name, "input_scale")] = rounded.scale.detach().cpu()
        content["inputs"][name] = manifest.input_entry_of(rounded)
    return tensors, {METADATA_KEY: digest.seal(content, tensors)}


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors on the CPU of which each fills its memory alone, as the file format wants."""
    apart, taken = {}, set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage()
        if storage.nbytes() != own.nbytes or storage.data_ptr() in taken:
            own = own.clone()
        taken.add(own.untyped_storage().data_ptr())
        apart[name] = own
    return apart


def artifact_of(model: nn.Module) -> Artifact:
    """Return the content of the file for a model with quantized layers.

    Raises:
        ModelError: a wrapper about a part of the model renames its tensors.
    """
    model = uncompiled(model)
    every = quantized_modules(model)
    # Of layers that share a weight, the first.
    of_latent = {id(layer.latent): layer for layer in reversed(every)}
    of_scale = {id(layer.weight_scale) for layer in every}
    tensors, state = list(_named_tensors(model)), model.state_dict()
    layers = {name: of_latent[id(tensor)] for name, tensor in tensors if id(tensor) in of_latent}
    _check_names(layers, state)
    scales = {name for name, tensor in tensors if id(tensor) in of_scale}
    scales |= input_scales(model)
    shared = shared_names(model)
    artifact = Artifact({}, {}, {}, inputs=inputs_of(model))
    for name, tensor in state.items():
        if name in scales:
            continue
        if name in shared:
            artifact.shared[name] = shared[name]
        elif name in layers:
            layer = layers[name]
            codes = pack(layer.codes(), layer.grid.bits)
            artifact.weights[name] = PackedWeight(
                layer.grid, tuple(tensor.shape), codes, layer.weight_scale, layer.channel_dim
            )
        else:
            artifact.tensors[name] = tensor
    return artifact


def _check_names(layers: Mapping[str, QuantizedWeight], state: Mapping[str, Tensor]) -> None:
    """Check that weights and tensors have the names in a state dict that a plain network gives."""
    held = {id(layer) for name, layer in layers.items() if name in state}
    renamed = [name for name, layer in layers.items() if id(layer) not in held]
    renamed += [name for name in state if "_orig_mod" in name.split(".")]
    if renamed:
        raise ModelError(
            f"a part of the model is wrapped, so that {renamed[0]!r} has another name in its state "
            "dict than in a plain network: save the network without wrappers about its parts "
            "(torch.compile, activation checkpoints), or compile in place, by module.compile()."
        )


def inputs_of(model: nn.Module) -> dict[str, PackedInput]:
    """Return how the layers of a model round their inputs, by the layer's first name."""
    return {
        name: PackedInput(layer.input_grid, layer.input_scale)
        for name, layer in activations.rounded_layers(model).items()
    }


def input_scales(model: nn.Module) -> set[str]:
    """Return every state-dict name of the scales of inputs."""
    return {
        tensor_name(name, "input_scale")
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, activations.RoundedInput)
    }


def attach_inputs_(model: nn.Module, artifact: Artifact) -> None:
    """Let the layers of a filled model round their inputs as the artifact says, in place."""
    if artifact.inputs:
        activations.nest_nothing_(model)
        activations.restore_forwards_(model, artifact.inputs)
    for name, rounded in artifact.inputs.items():
        layer = model.get_submodule(name)
        if not activations.takes_numbers(layer):
            kind = type(layer).__name__
            raise FormatError(f"{name!r} is {kind} in the model, whose input cannot be rounded.")
        device = next(layer.parameters(), next(layer.buffers(), rounded.scale)).device
        activations.round_input_(layer, rounded.grid, rounded.scale.to(device, copy=True))


def shared_names(model: nn.Module) -> dict[str, str]:
    """Return, for every further name of a tensor that has several, its first name."""
    first: dict[int, str] = {}
    shared = {}
    stored = {*model.state_dict()}  # a buffer may be left out of it under one of its names
    for name, tensor in _named_tensors(model):
        if name in stored and first.setdefault(id(tensor), name) != name:
            shared[name] = first[id(tensor)]
    return shared


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def is_packed(path: Path) -> bool:
    """Tell whether a safetensors file is a packed one, whatever is in it.

    Raises:
        FormatError: no safetensors file.
    """
    with _reading(path):
        _check_header(path)
        with safe_open(path, framework="pt") as file:
            return METADATA_KEY in (file.metadata() or {})


def read(path: Path) -> Artifact:
    """Read a packed file, or its shards, and check it against the specification and its digest.

    Raises:
        FormatError: naming the key that is wrong.
    """
    return read_files(files_of(path))


def files_of(path: Path) -> list[Path]:
    """Return the files that hold an artifact: `path`, or the shards that an index beside it names.

    Raises:
        FormatError: a damaged index.
    """
    index = path.with_name(path.name + ".index.json")
    if path.is_file() or not index.is_file():
        return [path]
    content = trust.read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    names = list(places.values()) if isinstance(places, dict) else []
    if not names or not all(map(trust.is_inside, names)):
        raise FormatError(f"{index} must name files beside it, not {sorted({*map(repr, names)})}.")
    return [path.with_name(name) for name in sorted(set(names))]


def read_files(paths: Sequence[Path]) -> Artifact:
    """Read an artifact from all of its files and check it against the specification.

    Raises:
        FormatError: naming the key that is wrong, or the file that does not go with the others.
    """
    with _reading(paths[0]):
        return _read(paths)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong with a stranger's bytes into a FormatError that names the file."""
    try:
        yield
    except FormatError:
        raise
    except Exception as error:  # they fail in ways that no list foresees
        raise FormatError(
            f"{path} is not a readable safetensors file: {type(error).__name__}: {error}"
        ) from error


def _read(paths: Sequence[Path]) -> Artifact:
    tensors, text = _content(paths[0])
    for path in paths[1:]:
        more, other = _content(path)
        if other != text or tensors.keys() & more.keys():
            raise FormatError(
                f"{path} does not go with {paths[0]}: shards of one artifact have the same "
                "manifest and no tensor twice."
            )
        tensors |= more
    every = dict(tensors)
    content = manifest.parse(text, paths[0])
    weights = {
        name: manifest.packed_weight(name, entry, tensors)
        for name, entry in content["weights"].items()
    }
    inputs = {
        name: manifest.packed_input(name, entry, tensors)
        for name, entry in content["inputs"].items()
    }
    for name in inputs:
        weight = tensor_name(name, "weight")
        if content["shared"].get(weight, weight) not in weights:
            raise FormatError(f"the input of {name!r} is rounded, but it has no packed weight.")
    for name, source in content["shared"].items():
        if source not in weights and source not in tensors:
            raise FormatError(f"{name!r} is said to share {source!r}, which is not in the file.")
        if name in weights or name in tensors:
            raise FormatError(f"{name!r} is both shared and stored.")
    if content["version"] == WITHOUT_DIGEST:
        warnings.warn(
            f"{paths[0]} is of format version 1, which has no digest: damage that leaves it "
            "readable would not be noticed.",
            UnverifiedWarning,
            stacklevel=4,  # whoever called `read`
        )
        return Artifact(weights, tensors, content["shared"])
    try:
        digest.check_seal(text, content["digest"], every)
    except FormatError as error:
        raise FormatError(f"{paths[0]}: {error}") from error
    return Artifact(weights, tensors, content["shared"], content["digest"], inputs)


def _check_header(path: Path) -> None:
    """Refuse a header that is longer than any of its kind, before memory is taken for it."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    most = max(HEADER_BYTES, path.stat().st_size // HEADER_SHARE)
    if length > most:
        raise FormatError(
            f"{path} is not a readable safetensors file: it claims a header of {length:,} bytes, "
            f"and at most {most:,} are accepted."
        )


def _content(path: Path) -> tuple[dict[str, Tensor], str]:
    """Return the tensors and the text of the manifest of one file."""
    with _reading(path):
        _check_header(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
    if METADATA_KEY not in metadata:
        raise FormatError(
            f"{path} has no {METADATA_KEY!r} entry in its header: it is an ordinary safetensors "
            "file, not a packed artifact; pass the folder that `askewq finetune` wrote."
        )
    return tensors, metadata[METADATA_KEY]


def check_fit(model: nn.Module, artifact: Artifact) -> None:
    """Check that a plain model has the names, shapes and types of an artifact.

    Raises:
        FormatError: a key that is missing or left over, a shape or type that differs, or one
            tensor for two of the artifact's.
    """
    if quantized := quantized_layers(model):
        raise FormatError(
            f"the model is quantized ({next(iter(quantized))}); an artifact fills a plain network "
            "like the one that was quantized, fresh from its constructor."
        )
    target = model.state_dict()
    if empty := [name for name, tensor in target.items() if tensor.is_meta]:
        raise FormatError(
            f"{empty[0]!r} of the model is on the meta device, which has no memory to fill; build "
            "the model on the CPU, or call model.to_empty(device=...)."
        )
    state: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        **{name: (tuple(t.shape), t.dtype) for name, t in artifact.tensors.items()},
        **{name: (weight.shape, torch.float32) for name, weight in artifact.weights.items()},
    }
    state |= {name: state[source] for name, source in artifact.shared.items()}
    missing = [key for key in target if key not in state]
    extra = [key for key in state if key not in target]
    if missing or extra:
        raise FormatError(
            f"the artifact does not fit the model: it lacks {missing[:5] or 'nothing'} "
            f"({len(missing)} keys), and the model does not know {extra[:5] or 'nothing'} "
            f"({len(extra)} keys){near(extra[0], missing) if extra else ''}."
        )
    for key, (shape, dtype) in state.items():
        if (shape, dtype) != (target[key].shape, target[key].dtype):
            same = shape == target[key].shape
            raise FormatError(
                f"{key!r} is {dtype} {list(shape)} in the artifact and "
                f"{target[key].dtype} {list(target[key].shape)} in the model"
                f"{'; fill a model of that type, and cast it then' if same else ''}."
            )
    for key, first in shared_names(model).items():
        if artifact.shared.get(key, key) != artifact.shared.get(first, first):
            raise FormatError(
                f"{first!r} and {key!r} are one tensor in the model and two in the artifact, and "
                "it can be only one of them; fill a model in which they are not shared."
            )


def load_into(model: nn.Module, artifact: Artifact) -> None:
    """Copy the artifact's dense state into a plain model with the same parameters, in place.

    Layers whose inputs the artifact rounds do so from then on.

    Raises:
        FormatError: as `check_fit`.
    """
    model = uncompiled(model)
    check_fit(model, artifact)
    target = model.state_dict()
    with torch.no_grad():
        for key, weight in artifact.weights.items():
            weight.dense(target[key])
        for key, tensor in artifact.tensors.items():
            target[key].copy_(tensor)
        for key, source in artifact.shared.items():
            if target[key].data_ptr() != target[source].data_ptr():
                target[key].copy_(target[source])
    attach_inputs_(model, artifact)
