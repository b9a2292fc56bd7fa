"""The constrained step of one layer, and its lazy view of the weight, as pure tensor functions.

Base update and constraint are made together: one pass over memory when compiled with torch.compile;
eager, with the same result but for the last bit of AdamW's, where no compiler is found.
"""

import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from askewq import constraint, methods
from askewq.grid import Grid
from askewq.vocabulary import Closing

# Resolution at which the closing threshold is found, in bins between a level and half-way.
DISTANCE_BINS = 4096


class Interval(NamedTuple):
    """The constraint as the update sees it: 0-d tensors, so that no new value recompiles."""

    first: Tensor
    step: Tensor
    last: Tensor
    eps: Tensor
    pull: Tensor
    clip: Tensor
    within: Tensor


def constrain(
    weight: Tensor, plain: Tensor, scale: Tensor, interval: Interval, closing: Closing
) -> Tensor:
    """Return where weights land whose plain update would put them at `plain`.

    Args:
        weight: current weights as rows, [rows, columns].
        plain: the same after the base update; feasible weights land exactly here.
        scale: [rows, 1].
        closing: "lazy" only keeps weights within the range of the grid; with "staggered", weights
            within ``interval.within`` of a level, and those already on one, have eps = 0: they
            land on the level itself.
    """
    first, step, last, eps, pull, clip, within = interval
    if closing == "lazy":
        return constraint.clamp(plain, first * scale, (first + step * last) * scale)
    unit = scale * step
    x = (weight / scale - first) / step
    keep, drift = constraint.skew(x, (plain - weight) / unit, last, eps, pull=pull, clip=clip)
    landed = torch.where(keep, plain, weight + drift * unit)
    if closing == "single":
        return landed
    level = constraint.nearest(x, last)
    on_level = (level * step + first) * scale
    closed = ((x - level).abs() <= within) | (weight == on_level)
    return torch.where(closed, on_level, landed)


def sgd_(
    weight: Tensor,
    grad: Tensor,
    buffers: list[Tensor],
    scale: Tensor,
    interval: Interval,
    knobs: dict[str, Tensor],
    *,
    nesterov: bool,
    closing: Closing,
) -> None:
    """Update weight and momentum buffer, all [rows, columns], in place: torch's SGD, skewed."""
    grad = grad + knobs["weight_decay"] * weight
    for buffer in buffers:  # one with momentum, none without
        buffer.copy_(knobs["momentum"] * buffer + grad)
        grad = grad + knobs["momentum"] * buffer if nesterov else buffer
    plain = weight - knobs["lr"] * grad
    weight.copy_(constrain(weight, plain, scale, interval, closing))


def adamw_(
    weight: Tensor,
    grad: Tensor,
    buffers: list[Tensor],
    scale: Tensor,
    interval: Interval,
    knobs: dict[str, Tensor],
    *,
    in_levels: bool,
    closing: Closing,
) -> None:
    """Update weight and both moments, all [rows, columns], in place: torch's AdamW, skewed.

    `in_levels`: the step size is in level spacings instead of the weights' own units.
    """
    exp_avg, exp_avg_sq = buffers
    exp_avg.copy_(exp_avg + knobs["mix1"] * (grad - exp_avg))
    exp_avg_sq.copy_(knobs["beta2"] * exp_avg_sq + knobs["mix2"] * grad * grad)
    denominator = exp_avg_sq.sqrt() / knobs["bias2_sqrt"] + knobs["eps"]
    length = knobs["step_size"] * scale * interval.step if in_levels else knobs["step_size"]
    plain = weight * knobs["keep"] - length * (exp_avg / denominator)
    weight.copy_(constrain(weight, plain, scale, interval, closing))


def lazy_projection(weight: Tensor, scale: Tensor, grid: Grid, radius: float) -> Tensor:
    """Return what `methods.lazy_projection` does, to the bit, in one pass over memory."""
    if torch.compiler.is_compiling():  # the whole model is, and this becomes a part of it
        return methods.lazy_projection(weight, scale, grid, radius)
    number = functools.partial(torch.tensor, dtype=weight.dtype)
    numbers = (number(float(n)) for n in (grid.first, grid.step, grid.last, radius))
    kernel = compiled(methods.nearest_point, weight.device.type)
    # One kernel, whatever the forward pass around it does.
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        point = kernel(weight.detach(), scale, *numbers)
    return methods.straight(weight, point)


# The rule of lazy closing for weights that are worth compiling for.
LAZY = replace(methods.LAZY, view=lazy_projection)


def distance_bins(weight: Tensor, scale: Tensor, interval: Interval) -> Tensor:
    """Return the bin of every weight's distance to its nearest level, int32, weight's shape."""
    x = (weight / scale - interval.first) / interval.step
    distance = (x - constraint.nearest(x, interval.last)).abs()
    bins = distance * (2 * DISTANCE_BINS)
    last = DISTANCE_BINS - 1.0
    return torch.where(bins < last, bins, last).to(torch.int32)  # NaN counts as far away


def compiled(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """Return a kernel compiled for a device type, or itself where no compiler is found."""
    return _compile(function) if can_compile(device) else function


@functools.cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    arguments: dict[str, Any] = {"dynamic": True, "fullgraph": True}
    # One process may train several models with several settings, each of them a variant.
    if "recompile_limit" in inspect.signature(torch.compile).parameters:  # not in older ones
        arguments["recompile_limit"] = 64
    return torch.compile(function, **arguments)


@functools.cache
def can_compile(device: str) -> bool:
    """Try the compiler once per device type; say so when there is none."""
    x = torch.ones(2, 8, device=device)
    try:
        torch.compile(lambda t: t * 2 + 1, dynamic=True)(x)
    except Exception as error:  # noqa: BLE001  # torch raises a different type for every toolchain
        warnings.warn(
            f"torch.compile does not work here ({type(error).__name__}), so the constrained step "
            "runs eagerly: the same but for rounding, several times slower. A C++ compiler (CPU) "
            "or Triton (CUDA) makes it one pass over memory.",
            stacklevel=2,
        )
        return False
    return True
