"""How ONNX holds a rounded input: QuantizeLinear and DequantizeLinear in front of the layer.

The integers are of the smallest of ONNX's types that holds the levels. QuantizeLinear divides by
the scale, rounds half-way to even and saturates, as `activations.round_to` does. Signs are made by
Less and Where; Max and Min come before where the levels are fewer than the type's. They are no
Clip, because onnxruntime (1.32) fails on a Clip in front of 2- and 4-bit integers; for the same
reason they stand, doing nothing, behind a Clip of the network's own.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from askewq.activations import rounded_layers
from askewq.manifest import PackedInput

# While torch exports the network, a node of this type stands for the rounding of an input.
DOMAIN, MARK = "askewq", "RoundInput"


def type_name(rounded: PackedInput) -> str:
    """Return the smallest ONNX type that holds the levels: INT2 to UINT8."""
    return f"{'INT' if rounded.grid.first < 0 else 'UINT'}{width(rounded)}"


def width(rounded: PackedInput) -> int:
    """Return the bits of that type."""
    bits = rounded.grid.bits
    return next(w for w in (2, 4, 8) if isinstance(bits, int) and bits <= w)


@contextmanager
def marked(model: nn.Module) -> Iterator[None]:
    """Within the block the layers mark their input, for an exporter, instead of rounding it."""
    layers = rounded_layers(model)
    for name, layer in layers.items():
        layer.__dict__["rounded"] = functools.partial(_mark, name)
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.__dict__["rounded"]


def _mark(name: str, x: Tensor) -> Tensor:
    made: Any = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{MARK}", (x,), {"layer": name}, dtype=x.dtype, shape=x.shape, version=1
    )
    return made  # type: ignore[no-any-return]  # torch


def fill_inputs(model: Any, inputs: dict[str, PackedInput]) -> None:
    """Put the nodes that round in the place of the marks, in place."""
    nodes: list[Any] = []
    # onnxruntime takes away what the levels behind it seem to imply, also where they do not: Clip,
    # and in front of signed levels Relu.
    before = {output: node.op_type for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.domain != DOMAIN:
            nodes.append(node)
            continue
        rounded = inputs[node.attribute[0].s.decode()]
        taken_away = ("Clip", "Relu") if rounded.grid.first < 0 else ("Clip",)
        limited = rounded.grid.bits != width(rounded) or before.get(node.input[0]) in taken_away
        made, tensors = _round(node.input[0], node.output[0], rounded, limited)
        nodes += made
        model.graph.initializer.extend(tensors)
    kept = [_copy(node) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    domains = [entry for entry in model.opset_import if entry.domain != DOMAIN]
    kept = [_copy(entry) for entry in domains]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def _copy(message: Any) -> Any:
    made = type(message)()
    made.CopyFrom(message)
    return made


def _round(x: str, y: str, rounded: PackedInput, limited: bool) -> tuple[list[Any], list[Any]]:
    """Return the nodes that make `y` of `x`, and their initializers, whose names `y` begins."""
    import onnx

    grid, scale = rounded.grid, float(rounded.scale)
    kinds = onnx.TensorProto
    lowest, highest = grid.first, grid.highest
    numbers = {"scale": scale}
    steps: list[tuple[str, list[str]]] = []
    if grid.step == 2:
        numbers |= {"null": 0.0, "low": -scale, "high": scale}
        steps = [("Less", ["input", "null"]), ("Where", ["Less", "low", "high"])]
    elif limited:
        numbers |= {"low": lowest * scale, "high": highest * scale}
        steps = [("Max", ["input", "low"]), ("Min", ["Max", "high"])]
    steps += [
        ("QuantizeLinear", [steps[-1][0] if steps else "input", "scale", "zero"]),
        ("DequantizeLinear", ["QuantizeLinear", "scale", "zero"]),
    ]
    local = {key: f"{y}.{key}" for key in (*numbers, "zero", *(kind for kind, _ in steps))}
    local |= {"input": x, "DequantizeLinear": y}
    nodes = [
        onnx.helper.make_node(kind, [local[i] for i in given], [local[kind]], name=f"{y}/{kind}")
        for kind, given in steps
    ]
    tensors = [onnx.helper.make_tensor(local[k], kinds.FLOAT, [], [v]) for k, v in numbers.items()]
    zero = onnx.helper.make_tensor(local["zero"], getattr(kinds, type_name(rounded)), [], [0])
    return nodes, [*tensors, zero]
