"""What the forward pass sees of a weight, and what becomes of an update: a rule for each method.

A rule is a pair of functions on rows [rows, columns] that share a scale [rows, 1]. `LAZY` is that
of AskewSGD's lazy closing; `RIVALS` are the methods beside AskewSGD, which share grid, scale,
layers and loop with it.
`docs/methods.md` states their equations and sources.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from askewq import constraint
from askewq.constraint import Scalar
from askewq.errors import RecipeError
from askewq.grid import BITS, Grid
from askewq.vocabulary import Bits, Method

# (weight, scale, grid, strength): `strength` is the method's own coefficient at this moment.
View = Callable[[Tensor, Tensor, Grid, float], Tensor]
Settle = Callable[[Tensor, Tensor, Grid, float], Tensor]


def _constant(final: float, _: float) -> float:
    return final


@dataclass(frozen=True, slots=True)
class Rule:
    """How weights are seen and what becomes of them after an update.

    Attributes:
        view: the weight that the forward pass sees, differentiable; None: the weight itself.
        settle: what becomes of the weight after an update of the base optimizer; None: nothing.
        bits: the widths that it can do.
        strength: the final value of its coefficient; None where it has none.
        strength_steps: how many updates that is for, where it adds up over them; 0: it does not.
        least, most: which final values lead to the grid, and stay numbers on the way.
        course: the coefficient at a progress in [0, 1], from its final value.
        learns_scale: whether the scale is trained with the weights.
        rescale: the scale that belongs to the weights now; None: it stays as it was fitted.
    """

    view: View | None = None
    settle: Settle | None = None
    bits: tuple[Bits, ...] = BITS
    strength: float | None = None
    strength_steps: int = 0
    least: float = 0.0
    most: float = 0.0
    course: Callable[[float, float], float] = _constant
    learns_scale: bool = False
    rescale: Callable[[Tensor, Grid], Tensor] | None = None

    @property
    def annealed(self) -> bool:
        """Whether its coefficient follows the progress."""
        return self.course is not _constant


class _Straight(torch.autograd.Function):
    """Gives `value` forward, to the bit, and hands its gradient to `weight`, times `factor`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: Tensor, factor: Tensor | None) -> Tensor:
        ctx.save_for_backward(factor)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (factor,) = ctx.saved_tensors
        return grads[0] if factor is None else grads[0] * factor, None, None


def straight(weight: Tensor, value: Tensor, factor: Tensor | None = None) -> Tensor:
    """Return `value` with the gradient of `weight` (straight-through), times `factor`."""
    return _Straight.apply(weight, value.detach(), factor)  # type: ignore[no-any-return]  # torch


def nearest_level(weight: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Return the nearest levels; NaN where a weight is not finite, so that the loss shows it."""
    return grid.snap(weight, scale).add_(weight, alpha=0)


def binaryconnect(weight: Tensor, scale: Tensor, grid: Grid, _: float) -> Tensor:
    """Return the nearest levels; the gradient passes straight through."""
    return straight(weight, nearest_level(weight.detach(), scale, grid))


def clip(weight: Tensor, scale: Tensor, grid: Grid, _: float) -> Tensor:
    """Return the weights limited to the range of the grid."""
    lowest, highest = grid.first, grid.highest
    return torch.minimum(torch.maximum(weight, lowest * scale), highest * scale)


def nearest_point(
    weight: Tensor, scale: Tensor, first: Scalar, step: Scalar, last: Scalar, radius: Scalar
) -> Tensor:
    """Return the nearest point of AskewSGD's intervals, `radius` level spacings around the levels.

    The intervals do not reach beyond the outermost levels. With radius 0 it is the nearest level,
    to the bits of `Grid.snap`.

    Args:
        weight, scale: [rows, columns], [rows, 1].
        first, step, last: of the grid; like `radius`, numbers or 0-d tensors.
    """
    level = (constraint.nearest((weight / scale - first) / step, last) * step + first) * scale
    reach = radius * scale * step
    inside = torch.minimum(torch.maximum(weight, level - reach), level + reach)
    return constraint.clamp(inside, first * scale, (first + step * last) * scale)


def lazy_projection(weight: Tensor, scale: Tensor, grid: Grid, radius: float) -> Tensor:
    """Return the nearest point of the intervals; with radius 0 this is binaryconnect."""
    point = nearest_point(weight.detach(), scale, grid.first, grid.step, grid.last, radius)
    return straight(weight, point)


class _LearnedStep(torch.autograd.Function):
    """LSQ's quantizer with its gradients for weight and scale."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, grid: Grid) -> Tensor:
        value = nearest_level(weight, scale, grid)
        ctx.save_for_backward(weight, scale)
        ctx.grid = grid
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, scale = ctx.saved_tensors
        grid, grad = ctx.grid, grads[0]
        units, ratio = grid.snap(weight, scale) / scale, weight / scale
        inside = (ratio > grid.first) & (ratio < grid.highest)
        of_scale = torch.where(inside, units - ratio, units)
        share = 1 / math.sqrt(weight.shape[1] * grid.highest)
        return grad * inside, share * (grad * of_scale).sum(1, keepdim=True), None


def lsq(weight: Tensor, scale: Tensor, grid: Grid, _: float) -> Tensor:
    """Return the nearest levels of a scale that is learned with the weights."""
    return _LearnedStep.apply(weight, scale, grid)  # type: ignore[no-any-return]  # torch


def proxquant(weight: Tensor, scale: Tensor, grid: Grid, strength: float) -> Tensor:
    """Return the proximal step of the distance to the grid, `strength` level spacings long."""
    level = grid.snap(weight, scale)
    away = weight - level
    return level + away.sign() * (away.abs() - strength * scale * grid.step).clamp_min(0)


def binaryrelax(weight: Tensor, scale: Tensor, grid: Grid, strength: float) -> Tensor:
    """Return the mean of weight and nearest level with weights 1 and `strength`, perhaps inf."""
    level = nearest_level(weight.detach(), scale, grid)
    return straight(weight, level + (weight.detach() - level) / (strength + 1))


# Coefficients (c1, c2) of SAWB by bits and first level, made by benchmarks/sawb.py; first level 0
# is that of inputs without a sign.
SAWB: dict[tuple[Bits, float], tuple[float, float]] = {
    (1, -1.0): (0.0, -1.0),
    ("ternary", -1.0): (2.537, 1.618),
    (2, -2.0): (2.410, 1.707),
    (2, -1.5): (2.081, 1.372),
    (3, -4.0): (2.099, 1.888),
    (3, -3.5): (2.106, 1.927),
    (4, -8.0): (1.597, 1.594),
    (4, -7.5): (1.612, 1.621),
    (5, -16.0): (0.984, 1.010),
    (6, -32.0): (0.640, 0.676),
    (7, -64.0): (0.386, 0.415),
    (8, -128.0): (0.218, 0.236),
    (1, 0.0): (2.534, 1.614),
    (2, 0.0): (2.315, 2.103),
    (3, 0.0): (1.687, 1.692),
    (4, 0.0): (1.127, 1.186),
    (5, 0.0): (0.648, 0.685),
    (6, 0.0): (0.398, 0.428),
    (7, 0.0): (0.228, 0.248),
    (8, 0.0): (0.129, 0.141),
}


def sawb(weight: Tensor, grid: Grid) -> Tensor:
    """Return the scale of every row, [rows, 1]."""
    square, size = (power.mean(1, keepdim=True) for power in (weight.square(), weight.abs()))
    return sawb_scale(square, size, grid)


def sawb_scale(square: Tensor, size: Tensor, grid: Grid) -> Tensor:
    """Return the scale of values by their mean square and size; the range covers the latter."""
    c1, c2 = SAWB[grid.bits, grid.first]
    scale = torch.maximum(c1 * square.sqrt() - c2 * size, size / grid.highest)
    return scale.clamp_min(torch.finfo(scale.dtype).tiny)


def log_quantize(grad: Tensor, bits: int) -> Tensor:
    """Return a gradient rounded to signed powers of two and zero, without bias.

    The levels are 0 and +-top / 2^k, k = 0 .. 2^(bits - 1) - 2, top the largest size that occurs.
    Between two levels one of them is drawn, so that the mean over the draws is the gradient.

    Source: LUQ, Chmiel et al. 2021 (arXiv 2112.10769), section 4.
    """
    if not grad.numel():  # that of an expert without a token, say
        return grad
    exact = grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad
    size = exact.abs()
    top = size.amax()
    least = 2 - 2 ** (bits - 1)
    # ratio = fraction * 2^exponent, the fraction from 1/2 up to 1; where it underflows frexp says 0
    ratio = size / top
    exponent = torch.where(ratio == 0, least, torch.frexp(ratio).exponent) - 1
    below = torch.where(exponent < least, 0, top * torch.ldexp(torch.ones_like(size), exponent))
    gap = torch.where(exponent < least, top * 2.0**least, below)
    up = torch.rand_like(size) * gap < size - below
    rounded = exact.sign() * (below + gap * up)
    return torch.where(top == 0, 0, rounded).to(grad.dtype)  # what is NaN stays NaN


class _LogGradient(torch.autograd.Function):
    """Gives an output as it is, and its gradient rounded to few bits."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, bits: int) -> Tensor:
        ctx.bits = bits
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return log_quantize(grads[0], ctx.bits), None


def quantize_gradient(bits: int, _: Any, __: Any, output: Tensor) -> Tensor:
    """Round the gradient that will reach a layer's output; a forward hook once `bits` is bound."""
    return _LogGradient.apply(output, bits) if output.requires_grad else output  # type: ignore[no-any-return]  # torch


def adaste(weight: Tensor, scale: Tensor, grid: Grid, beta: float) -> Tensor:
    """Return weights drawn toward their signs, to the sign itself from beta = 1 / alpha on."""
    return _AdaSTE.apply(weight, scale, grid, beta)  # type: ignore[no-any-return]  # torch


# Of AdaSTE's authors' code: the depth of the double well, and the size up to which a gradient or a
# weight, in units of the scale, counts as 0.
_ADASTE_ALPHA = 0.01
_ADASTE_ZERO = 1e-3


class _AdaSTE(torch.autograd.Function):
    """AdaSTE's minimiser of the double well and its adaptive gradient; beta is its curvature."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, grid: Grid, beta: float) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.beta = beta
        sign = nearest_level(weight, scale, grid)
        if beta * _ADASTE_ALPHA >= 1:
            return sign
        inner = (weight + beta * (1 + _ADASTE_ALPHA) * sign) / (1 + beta)
        return constraint.clamp(inner, -scale, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        grad, beta = grads[0], ctx.beta
        theta = weight / scale
        size = theta.abs()
        border, plain, reach = 0.0, 1.0, 1.0
        if (depth := beta * _ADASTE_ALPHA) < 1:
            border, plain = 1 - depth, 1 / (1 + beta)
            reach = (1 + 2 * beta + depth) * plain
        on_sign = size > border
        across = (2 * beta * (1 + _ADASTE_ALPHA) - size) * plain
        toward = (torch.where(on_sign, reach, across) / size).clamp(0, 0.5)
        away = plain * (~on_sign).to(size)
        factor = torch.where(theta * grad > 0, toward, away)
        small = ((grad * scale).abs() <= _ADASTE_ZERO) | (size <= _ADASTE_ZERO)
        return grad * torch.where(small, plain, factor), None, None, None


def mirror_descent(weight: Tensor, scale: Tensor, grid: Grid, strength: float) -> Tensor:
    """Return scale * tanh(strength * weight / scale); the mirror map takes the gradient as is."""
    return straight(weight, scale * torch.tanh(strength * weight.detach() / scale))


def project(weight: Tensor, scale: Tensor, grid: Grid, _: float) -> Tensor:
    """Return the nearest levels."""
    return nearest_level(weight, scale, grid)


def _ramp(final: float, progress: float) -> float:
    """Return the coefficient of ProxQuant: linear, then all the way for the last third."""
    return final * progress if progress < 2 / 3 else math.inf


def _growth(final: float, progress: float) -> float:
    """Return the coefficient of BinaryRelax: from 1, geometric, infinite in the last fifth."""
    return float(final ** (progress / 0.8)) if progress < 0.8 else math.inf


def _power(final: float, progress: float) -> float:
    """Return the coefficient of mirror descent: from 1, geometric, to its final value."""
    return float(final**progress)


def _well(_: float, progress: float) -> float:
    """Return the coefficient of AdaSTE: from alpha, geometric, to 1 / alpha after three tenths."""
    return float(_ADASTE_ALPHA ** (1 - 2 * min(1.0, progress / 0.3)))


# AskewSGD's own rule where its closing is lazy; the coefficient is the radius of the intervals.
LAZY = Rule(lazy_projection, clip)

RIVALS: dict[Method, Rule] = {
    "binaryconnect": Rule(binaryconnect, clip),
    "lsq": Rule(lsq, learns_scale=True),
    "proxquant": Rule(None, proxquant, strength=0.003, strength_steps=600, most=0.5, course=_ramp),
    "binaryrelax": Rule(binaryrelax, strength=500.0, least=1.0, most=1e9, course=_growth),
    "luq": Rule(binaryconnect, bits=(1, "ternary", 2, 3, 4), rescale=sawb),
    "adaste": Rule(adaste, bits=(1,), course=_well),
    "mirror-descent": Rule(
        mirror_descent, bits=(1,), strength=20_000.0, least=100.0, most=1e9, course=_power
    ),
    "projected-gradient": Rule(None, project),
}


def check_bits(method: Method, bits: Bits, source: str = "") -> None:
    """Check that a method can do a bit width.

    Args:
        source: what asks for these bits, where it is not `bits`.

    Raises:
        RecipeError: it cannot.
    """
    if method in RIVALS and bits not in RIVALS[method].bits:
        allowed = ", ".join(map(str, RIVALS[method].bits))
        raise RecipeError(
            f"method = {method} trains {allowed} bit, not {source or f'bits = {bits}'}; give "
            f"{'others' if source else 'other bits'}, or another method."
        )


def strength_for(method: Method, steps: int) -> float | None:
    """Return the strength by default of a method in a run of so many steps; None: it has none."""
    rule = RIVALS[method]
    if rule.strength is None or not rule.strength_steps:
        return rule.strength
    return min(rule.strength * (rule.strength_steps / steps), rule.most)


def check_strength(method: Method, strength: float | None) -> None:
    """Check that a method has a strength, and that this one ends on the grid.

    Raises:
        RecipeError: it has none, or it does not.
    """
    rule = RIVALS[method]
    if strength is None:
        return
    if rule.strength is None:
        raise RecipeError(f"method = {method} has no strength; leave it out.")
    if not rule.least <= strength <= rule.most or not strength:
        raise RecipeError(
            f"method = {method} ends on the grid with a strength from {rule.least:g} to "
            f"{rule.most:g}, and {strength:g} does not; left out, it is the method's own."
        )
