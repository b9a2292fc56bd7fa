"""The manifest of a packed file: what it says of weights and inputs, and whether it can be true.

docs/format.md specifies it; whatever does not follow the specification is refused by name.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from askewq.errors import FormatError, RecipeError
from askewq.grid import Grid, channels_back, channels_first, input_grid, make_grid
from askewq.pack import check_packed, unpack_values

# Of a file whose layers round their inputs; without such, version 2 says all.
WITH_INPUTS = 3
VERSION = 2
# Files of version 1 have no digest, and channels come first in all of their weights.
WITHOUT_DIGEST = 1
_KEYS = {"version", "weights", "shared", "digest"}
_ENTRY_KEYS = {"bits", "grid", "shape", "channel_dim"}
_INPUT_KEYS = {"bits", "signed"}


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """One quantized weight.

    Attributes:
        grid: the levels, in units of the scale.
        shape: of the weight, as the layer has it.
        codes: packed, uint8, 1-D, in the order of the weight channels first.
        scale: [out, groups].
        channel_dim: the dimension of `shape` that counts output channels.
    """

    grid: Grid
    shape: tuple[int, ...]
    codes: Tensor
    scale: Tensor
    channel_dim: int = 0

    @property
    def channels(self) -> tuple[int, ...]:
        """The shape channels first, [out, ...]."""
        return tuple(channels_first(torch.empty(self.shape, device="meta"), self.channel_dim).shape)

    def dense(self, out: Tensor | None = None) -> Tensor:
        """Return the snapped weight, float32, of its shape; `out`: where to write it."""
        ready = out is not None and out.is_contiguous() and out.device == self.codes.device
        place = out if ready and self.channel_dim == 0 else None
        first = unpack_values(self.codes, self.grid, self.scale, self.channels, place)
        if out is None:
            return channels_back(first, self.channel_dim)
        if place is None:
            channels_first(out, self.channel_dim).copy_(first)
        return out


@dataclass(frozen=True, slots=True)
class PackedInput:
    """How one layer rounds its input: the levels, and their scale, 0-d."""

    grid: Grid
    scale: Tensor


def input_entry_of(rounded: PackedInput) -> dict[str, Any]:
    """Return what the manifest says of an input."""
    return {"bits": rounded.grid.bits, "signed": rounded.grid.first < 0}


def entry_of(weight: PackedWeight) -> dict[str, Any]:
    """Return what the manifest says of a weight."""
    return {
        "bits": weight.grid.bits,
        "grid": _levels(weight.grid),
        "shape": list(weight.shape),
        "channel_dim": weight.channel_dim,
    }


def _levels(grid: Grid) -> dict[str, Any]:
    return {"first": grid.first, "step": grid.step, "size": grid.size}


def parse(text: str, path: Path) -> dict[str, Any]:
    """Return the content of a manifest whose keys are exactly those of its version.

    Raises:
        FormatError: naming the key that is wrong; `path` is that of the file.
    """
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the manifest in {path} is not JSON: {error}") from error
    if not isinstance(manifest, dict) or type(manifest.get("version")) is not int:
        raise FormatError(f"the manifest in {path} names no version.")
    if manifest["version"] not in (WITHOUT_DIGEST, VERSION, WITH_INPUTS):
        raise FormatError(
            f"{path} has format version {manifest['version']}; this askewq reads versions "
            f"{WITHOUT_DIGEST} to {WITH_INPUTS}. A newer askewq wrote it: upgrade to read it."
        )
    first = manifest["version"] == WITHOUT_DIGEST
    keys = {
        WITHOUT_DIGEST: _KEYS - {"digest"},
        VERSION: _KEYS,
        WITH_INPUTS: _KEYS | {"inputs"},
    }
    _check_keys(manifest, keys[manifest["version"]], f"a manifest of version {manifest['version']}")
    manifest.setdefault("inputs", {})
    for key in ("weights", "shared", "inputs"):
        if not isinstance(manifest[key], dict):
            raise FormatError(f"{key!r} in the manifest must be a mapping.")
    if not all(isinstance(source, str) for source in manifest["shared"].values()):
        raise FormatError("'shared' in the manifest must map names to names.")
    for name, entry in manifest["weights"].items():
        expected = _ENTRY_KEYS - {"channel_dim"} if first else _ENTRY_KEYS
        _check_keys(entry, expected, f"the manifest's entry {name!r}")
    if manifest["version"] == WITH_INPUTS and not manifest["inputs"]:
        raise FormatError(f"{path} has format version {WITH_INPUTS} without any 'inputs'.")
    for name, entry in manifest["inputs"].items():
        _check_keys(entry, _INPUT_KEYS, f"the manifest's entry of the input of {name!r}")
    return manifest


def _check_keys(entry: Any, expected: set[str], what: str) -> None:
    if not isinstance(entry, dict) or set(entry) != expected:
        given = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        raise FormatError(f"{what} must have exactly the keys {sorted(expected)}, not {given}.")


def packed_weight(name: str, entry: dict[str, Any], tensors: dict[str, Tensor]) -> PackedWeight:
    """Take a weight's codes and scale out of `tensors`, checking every part.

    Raises:
        FormatError: what the entry says is impossible, or not what the tensors are.
    """
    shape, dim = entry["shape"], entry.get("channel_dim", 0)
    if not isinstance(shape, list) or not shape or not all(_is_size(size) for size in shape):
        raise FormatError(f"{name!r} has no usable shape: {shape!r}.")
    if type(dim) is not int or not 0 <= dim < len(shape):
        raise FormatError(f"{name!r} has no dimension {dim!r} that could count its channels.")
    grid = _grid(name, entry)
    missing = [key for key in (f"{name}.codes", f"{name}.scale") if key not in tensors]
    if missing:
        raise FormatError(f"the file lacks {', '.join(missing)}, which its manifest announces.")
    if name in tensors:
        raise FormatError(f"{name!r} is stored both packed and dense.")
    codes, scale = tensors.pop(f"{name}.codes"), tensors.pop(f"{name}.scale")
    if codes.dtype != torch.uint8 or codes.dim() != 1:
        raise FormatError(
            f"'{name}.codes' must be uint8 of one dimension, not {codes.dtype} {list(codes.shape)}."
        )
    try:
        check_packed(codes, grid.bits, math.prod(shape))
    except FormatError as error:
        raise FormatError(f"'{name}.codes': {error}") from error
    out = shape[dim]
    if scale.dtype != torch.float32 or scale.dim() != 2 or not _divides(scale.shape, out, shape):
        raise FormatError(
            f"'{name}.scale' must be float32 [{out}, groups] or [1, 1], groups dividing the "
            f"weights of an output channel, not {scale.dtype} {list(scale.shape)}."
        )
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise FormatError(f"'{name}.scale' holds a value that is not positive and finite.")
    return PackedWeight(grid, tuple(shape), codes, scale, dim)


def packed_input(name: str, entry: dict[str, Any], tensors: dict[str, Tensor]) -> PackedInput:
    """Take the scale of a layer's input out of `tensors`, checking every part.

    Raises:
        FormatError: what the entry says is impossible, or not what the tensor is.
    """
    if type(entry["signed"]) is not bool:
        raise FormatError(f"the input of {name!r} is signed or not, and not {entry['signed']!r}.")
    try:
        grid = input_grid(entry["bits"], signed=entry["signed"])
    except RecipeError as error:
        raise FormatError(
            f"the input of {name!r} has {entry['bits']!r} bits; 1 to 8 are possible."
        ) from error
    key = tensor_name(name, "input_scale")
    if key not in tensors:
        raise FormatError(f"the file lacks {key}, which its manifest announces.")
    scale = tensors.pop(key)
    if scale.dtype != torch.float32 or scale.dim() != 0:
        raise FormatError(
            f"{key!r} must be float32 without dimensions, not {scale.dtype} {list(scale.shape)}."
        )
    if not (math.isfinite(float(scale)) and float(scale) > 0):
        raise FormatError(f"{key!r} is not positive and finite.")
    return PackedInput(grid, scale)


def tensor_name(module: str, leaf: str) -> str:
    """Return the state-dict name of a module's tensor; the model itself may be the module."""
    return f"{module}.{leaf}" if module else leaf


def _grid(name: str, entry: dict[str, Any]) -> Grid:
    levels = entry["grid"] if isinstance(entry["grid"], dict) else {}
    for kind in ("integer", "half-integer"):
        if type(levels.get("size")) is not int:
            break
        try:
            grid = make_grid(entry["bits"], kind)
        except (RecipeError, TypeError):
            continue
        if _levels(grid) == levels:
            return grid
    raise FormatError(f"{name!r} has a grid that askewq does not know: {entry}.")


def _is_size(size: Any) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size > 0


def _divides(scale: torch.Size, out: int, shape: list[int]) -> bool:
    if tuple(scale) == (1, 1):
        return True
    return scale[0] == out and scale[1] > 0 and math.prod(shape) // out % scale[1] == 0
