"""The annealed interval constraint of AskewSGD on plain tensors, following the paper's equations.

Everything here is in *code units*: a weight w with scale s on a grid first, first + step, ... is
x = (w / s - first) / step, so that the levels are the integers 0 .. last and their spacing is 1.
The interval size is the relative eps in [0, 1]: 1 leaves the space between levels free, 0 leaves
only the levels. With z the position between two levels and d the distance beyond the outermost one,

    phi(x) = z^2 (1 - z)^2  or  d^2        psi(x) = eps - 16 phi(x)        feasible: psi(x) >= 0

Source: Leconte, Schechtman, Moulines, AISTATS 2023 (arXiv 2211.03741), section 3 and Algorithm 1;
the division by h^4 / 16 that makes eps relative is ours.
"""

import math

import torch
from torch import Tensor

Scalar = float | Tensor


def nearest(x: Tensor, last: Scalar) -> Tensor:
    """Return the level nearest to each x, as a float tensor; half-way goes up."""
    level = torch.floor(x + 0.5)
    return clamp(level, 0.0, last)


def clamp(x: Tensor, low: Scalar, high: Scalar) -> Tensor:
    """Return x limited to [low, high]; unlike torch.clamp, either bound may be a 0-d tensor."""
    x = torch.where(x < low, low, x)
    return torch.where(x > high, high, x)


def slack(x: Tensor, last: Scalar, eps: Scalar) -> tuple[Tensor, Tensor]:
    """Return psi(x) and its slope psi'(x), both of x's shape; `eps` broadcasts.

    psi = eps - 16 phi is factored as (e - q)(e + q) with e = sqrt(eps), q = 4 sqrt(phi) and,
    inside, q = 1 - m^2, m = 2 z - 1: subtracting 16 phi from eps would lose psi's sign near
    half-way, where a free weight (eps = 1) has to stay free.
    """
    e = eps.sqrt() if isinstance(eps, Tensor) else math.sqrt(eps)
    inside = (x >= 0) & (x <= last)
    m = 2 * (x - torch.floor(x)) - 1
    d = torch.where(x < 0, x, x - last)
    q = torch.where(inside, 1 - m * m, 4 * d.abs())
    below = torch.where(inside, (e - 1) + m * m, e - q)
    slope = torch.where(inside, 8 * q * m, -32 * d)
    return below * (e + q), slope


def skew(
    x: Tensor, update: Tensor, last: Scalar, eps: Scalar, *, pull: Scalar, clip: Scalar
) -> tuple[Tensor, Tensor]:
    """Split an update of x into the part that the constraint allows and the drift for the rest.

    Algorithm 1, per element: an update is kept where psi > 0, or where it already makes psi grow
    at a rate of at least ``-pull * psi``; elsewhere it is replaced by ``-pull * psi / psi'``, at
    most `clip` long, and by ``+clip`` where psi' = 0 (half-way between levels).

    Args:
        x: weights in code units, any shape.
        update: the proposed displacement (after momentum and weight decay), same units and shape.
        last: the highest level, number of levels - 1.
        eps: relative eps, a number or a tensor that broadcasts with x (one eps per weight).
        pull: share of a Newton step toward the interval made in one update (the paper's
            gamma * alpha).
        clip: the largest drift in one update, in level spacings (the paper's gamma * M).

    Returns:
        ``(keep, drift)``: a bool mask, and the displacement to use where it is False.
    """
    psi, slope = slack(x, last, eps)
    keep = (psi > 0) | (update * slope >= -pull * psi)
    drift = clamp(-pull * psi / slope, -clip, clip)
    return keep, torch.where(slope == 0, clip, drift)


def radius_of(eps: float) -> float:
    """Return the half-width of an interval, in level spacings, for a relative eps in [0, 1]."""
    return (1 - math.sqrt(1 - math.sqrt(eps))) / 2


def eps_of(radius: float) -> float:
    """Return the relative eps whose interval reaches `radius` level spacings (0 to 1/2)."""
    return (4 * radius * (1 - radius)) ** 2
