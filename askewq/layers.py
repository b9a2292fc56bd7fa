"""Quantization-aware layers: the original module with a grid and a scale, and its own forward.

A layer becomes quantization-aware by a change of class to a subclass of its own: same object,
same Parameter, same state-dict keys (plus ``weight_scale``), same hooks and the same forward, so
that every subclass of Linear and Conv that uses its weight linearly keeps working. AskewSGD trains
the Parameter itself, so the forward pass sees the relaxed weight; after the snap, the snapped one.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from askewq.errors import DivergenceError
from askewq.grid import Grid

SUPPORTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class QuantizedLayer(nn.Module):
    """Mixin of a layer whose weight belongs on a grid.

    Attributes:
        grid: the levels, in units of the scale.
        weight_scale: buffer [out, groups], written in place only.
    """

    grid: Grid
    weight: Tensor
    weight_scale: Tensor

    def codes(self) -> Tensor:
        """Return the code of the level nearest to each weight, uint8, the weight's shape.

        Raises:
            DivergenceError: a weight that is NaN or infinite has no nearest level.
        """
        weight = self.weight.detach()
        if not torch.isfinite(weight).all():
            raise DivergenceError(
                f"a weight of shape {tuple(weight.shape)} holds NaN or infinite values and cannot "
                "be rounded; go back to an earlier checkpoint and train with a smaller lr."
            )
        return self.grid.codes(weight, self.weight_scale)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle by the original class: a class made at run time has no name to import."""
        return _empty_layer, (type(self).__bases__[1],), self.__dict__

    def snap_(self) -> None:
        """Move every weight to its nearest level, in place."""
        with torch.no_grad():
            self.weight.copy_(self.grid.values(self.codes(), self.weight_scale))


@functools.cache
def _quantized_class(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"Quantized{cls.__name__}", (QuantizedLayer, cls), {"__module__": __name__})


def _empty_layer(cls: type[nn.Module]) -> nn.Module:
    """Return an instance for pickle and deepcopy to fill."""
    quantized = _quantized_class(cls)  # type: ignore[arg-type]  # a class is hashable
    return quantized.__new__(quantized)


def quantize_layer_(layer: nn.Module, grid: Grid, scale: Tensor) -> None:
    """Make a Linear or Conv quantization-aware, in place; `scale` is [out, groups]."""
    layer.register_buffer("weight_scale", scale)
    layer.__class__ = _quantized_class(type(layer))  # type: ignore[arg-type]  # a class is hashable
    layer.grid = grid  # type: ignore[assignment]  # a plain attribute, not a submodule


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Return the quantization-aware layers by name; of layers that share a weight, the first."""
    found: dict[int, tuple[str, QuantizedLayer]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            found.setdefault(id(module.weight), (name, module))
    return dict(found.values())


def snap_(model: nn.Module) -> None:
    """Move every quantized weight of the model to its nearest level, in place."""
    for layer in quantized_layers(model).values():
        layer.snap_()


@contextmanager
def snapped(model: nn.Module) -> Iterator[None]:
    """Within the block the quantized weights sit on their levels; after it they are as before."""
    layers = quantized_layers(model).values()
    relaxed = [layer.weight.detach().clone() for layer in layers]
    try:
        snap_(model)
        yield
    finally:
        with torch.no_grad():
            for layer, weight in zip(layers, relaxed, strict=True):
                layer.weight.copy_(weight)
