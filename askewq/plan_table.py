"""The plan as a table: what happens to every layer with parameters, and what that adds up to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from askewq.grid import Grid, channels_first, scale_shape
from askewq.pack import packed_size
from askewq.vocabulary import ActBits, GroupSize

# Begins the note of a layer whose rows the group size does not divide.
PER_CHANNEL = "scale per channel"


class Place(NamedTuple):
    """A module and the name that a weight has in it."""

    name: str
    leaf: str

    @property
    def called(self) -> tuple[str, ...]:
        """The module's name; then the weight's own, where it is not `weight`."""
        own = f"{self.name}.{self.leaf}".lstrip(".")
        return (self.name,) if self.leaf == "weight" else (self.name, own)


@dataclass(frozen=True, slots=True)
class PlannedLayer:
    """One weight: its grid, or the reason why it stays as it is.

    Attributes:
        names: the module that owns the weight first, then those that share it.
        leaves: the weight's name in each; that of the first parameter where it has no weight.
        kind: the module's class.
        shape: of that parameter.
        parameters: elements in all parameters that this module owns first; of a module with several
            weights, in this one, and in what is no weight with the first of them.
        grid: None for a layer left in floating point.
        channel_dim: the dimension of the weight that counts output channels.
        group_size: of the scale; a layer whose rows it does not divide falls back to "channel", or
            to the weights of a channel where there are several at one index of `channel_dim`.
        note: why it stays float, or what is special.
        act_bits: of the layer's input, which `activations.round_inputs` rounds.
    """

    names: tuple[str, ...]
    leaves: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    parameters: int
    grid: Grid | None
    channel_dim: int
    group_size: GroupSize
    note: str
    act_bits: ActBits = "none"

    @property
    def label(self) -> str:
        """What the layer is called in tables: of several weights, each has a name of its own."""
        first = Place(self.names[0], self.leaves[0])
        return first.called[-1] if self.grid else self.names[0]

    @property
    def called(self) -> tuple[str, ...]:
        """The names that patterns match."""
        places = map(Place, self.names, self.leaves)
        return tuple(name for place in places for name in place.called)

    @property
    def weights(self) -> int:
        """Quantized weights of the layer."""
        return torch.Size(self.shape).numel() if self.grid else 0

    @property
    def packed_bytes(self) -> int:
        """Bytes of its codes and float32 scales."""
        if self.grid is None:
            return 0
        out, groups = scale_shape(channels(self.shape, self.channel_dim), self.group_size)
        return packed_size(self.weights, self.grid.bits) + 4 * out * groups


@dataclass(frozen=True, slots=True)
class Plan:
    """What happens to every layer with parameters, in the order of the model.

    Attributes:
        layers: one entry a weight; layers that share one are one entry.
    """

    layers: tuple[PlannedLayer, ...]

    @property
    def quantized(self) -> tuple[PlannedLayer, ...]:
        """The layers that get a grid."""
        return tuple(layer for layer in self.layers if layer.grid)

    @property
    def total_parameters(self) -> int:
        """All parameters of the model, shared ones counted once."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def quantized_parameters(self) -> int:
        """The parameters that get a grid."""
        return sum(layer.weights for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Packed codes and scales, in bits, over the quantized weights."""
        return 8 * sum(layer.packed_bytes for layer in self.layers) / self.quantized_parameters

    @property
    def predicted_bytes(self) -> int:
        """Size of the packed model: codes, scales, and everything else as float32."""
        rest = self.total_parameters - self.quantized_parameters
        return sum(layer.packed_bytes for layer in self.layers) + 4 * rest


def channels(shape: Sequence[int], channel_dim: int) -> torch.Size:
    """Return the shape of a weight channels first."""
    return channels_first(torch.empty(tuple(shape), device="meta"), channel_dim).shape
