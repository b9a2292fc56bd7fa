"""The layers whose weights can be on a grid: their classes, and where their output channels are.

Everything else about a layer is the same for all of them: `grid.channels_first` views a weight
as output channels, and rows that share a scale lie within one. Where one index of that dimension
stands for several channels (one of every group of a transposed convolution, of every expert), the
weights of each lie together, so that a channel is a group of weights like any other.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from askewq.errors import ModelError


def _fits(_: nn.Module) -> str:
    return ""


def _one(_: nn.Module, __: Sequence[int]) -> int:
    return 1


@dataclass(frozen=True, slots=True)
class Kind:
    """A class of layers.

    Attributes:
        stock: the class whose forward uses the weight linearly; subclasses may have their own.
        channel_dim: the dimension of a weight that counts output channels.
        sample: a small input, to see what a forward does with the weight; None: it cannot be seen
            from outside, and only the stock forward is known to be linear.
        obstacle: why one layer of this class cannot be quantized all the same; empty: it can.
        on_request: quantized only where the user names the layer.
        looks_up: its input are indices, which cannot be rounded.
        leaves: the names that its weights may have.
        parts: of a layer and the shape of a weight: the output channels at one index of
            `channel_dim`.
    """

    stock: type[nn.Module]
    channel_dim: int
    sample: Callable[[nn.Module], Tensor] | None
    obstacle: Callable[[nn.Module], str] = _fits
    on_request: bool = False
    looks_up: bool = False
    leaves: tuple[str, ...] = ("weight",)
    parts: Callable[[nn.Module, Sequence[int]], int] = _one

    @property
    def one_input(self) -> bool:
        """Whether one tensor of numbers goes in, which can be rounded."""
        return not self.looks_up and self.leaves == ("weight",)


def kind_of(layer: nn.Module) -> Kind | None:
    """Return the kind of a layer; None: its weight cannot be on a grid."""
    found = next((kind for kind in _kinds() if isinstance(layer, kind.stock)), None)
    return found or _experts(layer)


def leaves_of(layer: nn.Module) -> list[str]:
    """Return the names of a layer's weights that can be on a grid."""
    kind = kind_of(layer)
    own = dict(layer.named_parameters(recurse=False))
    return [leaf for leaf in kind.leaves if leaf in own] if kind else []


def channel_dim(layer: nn.Module) -> int:
    """Return the dimension of a layer's weight that counts its output channels.

    Raises:
        ModelError: a layer of no kind.
    """
    kind = kind_of(layer)
    if kind is None:
        raise ModelError(
            f"{type(layer).__name__} is no layer that askewq can quantize; those are "
            f"{', '.join(kind.stock.__name__ for kind in _kinds())}, and their subclasses."
        )
    return kind.channel_dim


def ramp(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return fixed values from -1 to 1, of the dtype and on the device of `like`."""
    values = torch.linspace(-1, 1, math.prod(shape), dtype=like.dtype, device=like.device)
    return values.reshape(tuple(shape))


def _features(layer: nn.Module) -> Tensor:
    return ramp((1, cast(nn.Linear, layer).in_features), layer.get_parameter("weight"))


def _image(layer: nn.Module) -> Tensor:
    conv = cast(nn.Conv2d, layer)
    spans = zip(conv.kernel_size, conv.dilation, strict=True)
    shape = (1, conv.in_channels, *(2 * (k - 1) * d + 2 for k, d in spans))
    return ramp(shape, layer.get_parameter("weight"))


def _rows_in(layer: nn.Module) -> Tensor:
    weight = layer.get_parameter("weight")
    return ramp((1, weight.shape[0]), weight)


def _indices(layer: nn.Module) -> Tensor:
    weight = layer.get_parameter("weight")
    return torch.arange(min(len(weight), 8), device=weight.device).unsqueeze(0)


def _embedding_obstacle(layer: nn.Module) -> str:
    table = cast(nn.Embedding, layer)
    if table.max_norm is not None:
        return "max_norm rescales its weight in place"
    return "its gradients are sparse" if table.sparse else ""


def _groups(layer: nn.Module, _: Sequence[int]) -> int:
    return cast(nn.ConvTranspose2d, layer).groups


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_TORCH = (
    Kind(nn.Linear, 0, _features),
    *(Kind(conv, 0, _image) for conv in (nn.Conv1d, nn.Conv2d, nn.Conv3d)),
    *(Kind(conv, 1, _image, parts=_groups) for conv in _TRANSPOSED),
    Kind(nn.Embedding, 0, _indices, _embedding_obstacle, on_request=True, looks_up=True),
    Kind(nn.MultiheadAttention, 0, None, leaves=_PROJECTIONS),
)


def _kinds() -> tuple[Kind, ...]:
    """Return all kinds; a model has a layer of transformers only where transformers is imported."""
    module: Any = sys.modules.get("transformers.pytorch_utils")
    return _TORCH if module is None else (*_TORCH, Kind(module.Conv1D, 1, _rows_in))


# What transformers tells every module of stacked experts about its weights; no class has it all.
_STACKED = {"has_gate", "has_bias", "is_transposed"}
_EXPERT_LEAVES = ("gate_up_proj", "up_proj", "down_proj")


def _experts(layer: nn.Module) -> Kind | None:
    """Return the kind of a module of experts, weights [experts, out, in] or [experts, in, out]."""
    told = vars(layer)
    weights = [
        weight for leaf in _EXPERT_LEAVES if (weight := layer._parameters.get(leaf)) is not None
    ]
    if not told.keys() >= _STACKED or any(weight.dim() != 3 for weight in weights):
        return None
    channel_dim, other = (2, 0) if told["is_transposed"] else (0, 1)
    return Kind(
        type(layer), channel_dim, None, leaves=_EXPERT_LEAVES, parts=lambda _, shape: shape[other]
    )
