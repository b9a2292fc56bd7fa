"""How ONNX holds a quantized weight: INT2, INT4 or INT8 codes and the nodes that dequantize them.

What the nodes compute is, bit for bit, the artifact's weight.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from askewq.grid import channels_back
from askewq.manifest import PackedWeight
from askewq.pack import pack, unpack
from askewq.vocabulary import Bits

Form = Literal["levels", "doubled", "units"]


@dataclass(frozen=True, slots=True)
class Storage:
    """How one weight is written.

    Attributes:
        width: bits of the ONNX integer type, 2, 4 or 8.
        form: levels: the integer levels at the scale; doubled: twice the half-integer levels at
            half the scale; units: the levels less one half, then an addition of one half and a
            multiplication by the scale, which rounds once, as the artifact does.
    """

    width: int
    form: Form


def storage(weight: PackedWeight) -> Storage:
    """Return the smallest ONNX type that holds a weight exactly, and how.

    One that has its output channels last is fed to MatMul as it is, where `multiplies` decides.
    """
    grid = weight.grid
    last = len(weight.shape) == 2 and weight.channel_dim == 1
    widths = (4, 8) if last and not multiplies(weight, 2) else (2, 4, 8)
    width = next(w for w in widths if grid.size <= 2**w and grid.first >= -(2 ** (w - 1)))
    if grid.first % 1 == 0:
        return Storage(width, "levels")
    halved = weight.scale / 2
    fits = 2 * -grid.first <= 2 ** (width - 1) - 1 and torch.equal(2 * halved, weight.scale)
    return Storage(width, "doubled" if fits else "units")


def multiplies(weight: PackedWeight, width: int) -> bool:
    """Tell whether onnxruntime multiplies rightly by a dequantized matrix, output channels last.

    With 2-bit integers its MatMul (1.32) gives wrong numbers unless the output channels are a
    multiple of four. With a Transpose between the two, as of a Linear layer, they are right.
    """
    return width != 2 or weight.shape[weight.channel_dim] % 4 == 0


def _integers(weight: PackedWeight, form: Form) -> Tensor:
    """Return the integers that the file holds, int8, channels first."""
    grid = weight.grid
    codes = unpack(weight.codes, grid.bits, math.prod(weight.shape)).to(torch.int16)
    factor = 2 if form == "doubled" else 1
    first = math.floor(factor * grid.first)
    return (first + int(factor * grid.step) * codes).to(torch.int8).reshape(weight.channels)


def dequantize(
    name: str, weight: PackedWeight, kept: Storage, transposed: bool
) -> tuple[list[Any], list[Any]]:
    """Return the nodes that compute a weight, or a matrix's transpose, and their initializers."""
    integers = _integers(weight, kept.form)
    shape = weight.shape[::-1] if transposed else weight.shape
    channel_dim = 1 - weight.channel_dim if transposed else weight.channel_dim
    # Groups are made of a matrix; of more dimensions, channels first, and turned at the end.
    turned = channel_dim if weight.scale.shape[1] > 1 and len(shape) > 2 else 0
    if turned:
        shape, channel_dim = weight.channels, 0
    form = _units if kept.form == "units" else _levels
    scale = weight.scale / 2 if kept.form == "doubled" else weight.scale
    integers, scale, attributes = form(integers, scale, channel_dim)
    codes = _tensor(f"{name}.codes", integers, kept.width)
    tensors = [codes, _tensor(f"{name}.scale", scale)]
    steps: list[tuple[str, str, Any]]
    if kept.form == "units":
        tensors += [
            _tensor(f"{name}.one", torch.ones(())),
            _tensor(f"{name}.half", torch.full((), 0.5)),
        ]
        steps = [("DequantizeLinear", "one", {}), ("Add", "half", {}), ("Mul", "scale", {})]
    else:
        steps = [("DequantizeLinear", "scale", attributes)]
    if integers.shape != shape:
        tensors.append(_tensor(f"{name}.shape", torch.tensor(shape)))
        steps.append(("Reshape", "shape", {}))
    if turned:
        others = list(range(1, len(shape)))
        steps.append(("Transpose", "", {"perm": [*others[:turned], 0, *others[turned:]]}))
    return _chain(name, steps), tensors


def _levels(
    codes: Tensor, scale: Tensor, channel_dim: int
) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Return codes, scale and attributes for one DequantizeLinear: whole, by channel or blocked.

    `channel_dim` is where the graph wants the output channels.
    """
    out, groups = scale.shape
    if groups == 1:
        attributes = {"axis": channel_dim} if out > 1 else {}
        scale = scale.reshape(-1) if out > 1 else scale.reshape(())
        return channels_back(codes, channel_dim), scale, attributes
    codes = codes.reshape(out, -1)
    attributes = {"axis": 1 - channel_dim, "block_size": codes.shape[1] // groups}
    return channels_back(codes, channel_dim), channels_back(scale, channel_dim), attributes


def _units(codes: Tensor, scale: Tensor, channel_dim: int) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Return codes and a scale of as many dimensions, to multiply with."""
    out, groups = scale.shape
    if groups > 1:
        codes = codes.reshape(out, groups, -1)
        scale = scale.unsqueeze(2)
        place = 2 * channel_dim  # behind the groups and the weights of a group, or before them
    else:
        scale = scale.reshape(-1, *[1] * (codes.dim() - 1))
        place = channel_dim
    return channels_back(codes, place), channels_back(scale, place), {}


def _chain(name: str, steps: list[tuple[str, str, Any]]) -> list[Any]:
    """Return nodes (type, second input if any, attributes), each fed by the last, up to `name`."""
    import onnx

    nodes, before = [], f"{name}.codes"
    for i, (kind, second, attributes) in enumerate(steps, start=1):
        after = name if i == len(steps) else f"{name}.{kind}"
        inputs = [before, f"{name}.{second}"] if second else [before]
        nodes.append(
            onnx.helper.make_node(kind, inputs, [after], name=f"{name}/{kind}", **attributes)
        )
        before = after
    return nodes


def _tensor(name: str, values: Tensor, width: int | None = None) -> Any:
    """Return an initializer; int8 values are packed at `width` bits, the first lowest."""
    import onnx

    kinds = onnx.TensorProto
    if width is not None:
        kind = {2: kinds.INT2, 4: kinds.INT4, 8: kinds.INT8}[width]
        codes = values.contiguous().view(torch.uint8) & (2**width - 1)
        raw = pack(codes, cast(Bits, width))
    else:
        kind = kinds.FLOAT if values.is_floating_point() else kinds.INT64
        raw = values.contiguous()
    return onnx.helper.make_tensor(name, kind, values.shape, raw.numpy().tobytes(), raw=True)
