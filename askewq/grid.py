"""Grid: the finite set of values a quantized weight may take, and the fit of its scale.

A grid is affine: level = (first + step * code) * scale with code in 0 .. size - 1. The same grid
and the same scale serve training, evaluation and export; `values` of the same codes and scale
give the same bits wherever they are computed, because it is one float multiplication.

A weight is seen as rows that share one scale: ``weight.reshape(scale.numel(), -1)``. One row is
the whole tensor, an output channel, or a group of consecutive weights within an output channel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from askewq import constraint
from askewq.errors import RecipeError
from askewq.vocabulary import Bits, GridKind, GroupSize

# Scales tried in fitting. In short rows the error is a jagged function of the scale.
CANDIDATES = 24
SHORT_ROW = 64
SHORT_ROW_CANDIDATES = 256
# Weights that are fitted at a time.
CHUNK = 2**16

BITS: tuple[Bits, ...] = (1, "ternary", 2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True, slots=True)
class Grid:
    """Levels (first + step * code) * scale, code = 0 .. size - 1."""

    bits: Bits
    first: float
    step: float
    size: int

    @property
    def last(self) -> int:
        """The highest code."""
        return self.size - 1

    @property
    def storage_bits(self) -> float:
        """Bits that one packed code takes; a ternary code is a fifth of a byte."""
        return 1.6 if self.bits == "ternary" else float(self.bits)

    def levels(self) -> Tensor:
        """Return all levels in units of the scale, float32 [size], ascending."""
        return self.first + self.step * torch.arange(self.size, dtype=torch.float32)

    def coordinate(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Return weights in code units, where the levels are 0 .. last; weight's shape."""
        rows = weight.reshape(scale.numel(), -1)
        return ((rows / scale.reshape(-1, 1) - self.first) / self.step).reshape(weight.shape)

    def codes(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Return the code of the level nearest to each weight, uint8, weight's shape."""
        return constraint.nearest(self.coordinate(weight, scale), self.last).to(torch.uint8)

    def values(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Return the weights that codes stand for, in scale's dtype and codes' shape."""
        units = self.first + self.step * codes.reshape(scale.numel(), -1).to(scale.dtype)
        return (units * scale.reshape(-1, 1)).reshape(codes.shape)

    def snap(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Return every weight moved to its nearest level; snapping twice changes nothing."""
        return self.values(self.codes(weight, scale), scale)


def make_grid(bits: Bits, kind: GridKind = "integer") -> Grid:
    """Return the grid of a bit width.

    1 bit is {-1, +1}, ternary {-1, 0, +1}; b >= 2 bits are the integers -2^(b-1) .. 2^(b-1) - 1,
    or the 2^b half-integers symmetric about 0 (2 bits: -1.5, -0.5, 0.5, 1.5).

    Raises:
        RecipeError: bits that are none of `BITS`, or half-integers where there is only one grid.
    """
    if type(bits) not in (int, str) or bits not in BITS:
        allowed = ", ".join(map(str, BITS))
        raise RecipeError(f"bits = {bits!r} is not a width that askewq can train; use {allowed}.")
    if kind not in ("integer", "half-integer"):
        raise RecipeError(f"grid = {kind!r} is unknown; use 'integer' or 'half-integer'.")
    if bits in (1, "ternary"):
        only = "{-1, +1}" if bits == 1 else "{-1, 0, +1}"
        if kind == "half-integer":
            raise RecipeError(
                f"grid = 'half-integer' does not go with bits = {bits}, whose one grid is {only}; "
                "leave out the grid, or use 2 or more bits."
            )
        return Grid(1, -1.0, 2.0, 2) if bits == 1 else Grid("ternary", -1.0, 1.0, 3)
    size = 2 ** int(bits)
    first = -size / 2 if kind == "integer" else -(size - 1) / 2
    return Grid(bits, first, 1.0, size)


def scale_shape(shape: torch.Size, group_size: GroupSize) -> tuple[int, int]:
    """Return ``(out, groups)``, the shape of the scale of a weight [out, ...].

    Raises:
        RecipeError: a group size that is no positive number or does not divide the row length.
    """
    if group_size == "tensor":
        return 1, 1
    row = shape[1:].numel()
    if group_size == "channel":
        return shape[0], 1
    if isinstance(group_size, str | bool) or group_size < 1:
        raise RecipeError(
            f"group_size = {group_size!r}: use 'channel', 'tensor' or a positive number of weights."
        )
    if row % group_size:
        raise RecipeError(
            f"group_size = {group_size} does not divide the {row} weights of an output channel of "
            f"shape {tuple(shape)}; use a divisor of {row}, or 'channel'."
        )
    return shape[0], row // group_size


def fit_scale(weight: Tensor, grid: Grid, group_size: GroupSize = "channel") -> Tensor:
    """Return the scale that minimises ||weight - snap(weight)||^2 in every row.

    1 bit has the closed form mean |w|. Otherwise the codes under a number of scales, between the
    row's root mean square over the largest level and its maximum over the smaller extreme, are
    tried, each with the scale that fits them best; then a finer search around the best, and a few
    alternations of codes and scale (Lloyd), none of which makes it worse. Up to 2 bits the error is
    within 1 % of the best (checked against a dense scan in float64).

    Args:
        weight: [out, ...], floating point and finite.

    Returns:
        Positive scales, float32 (float64 for a float64 weight), shape `scale_shape`. A row of
        zeros gets the tiniest normal number: its levels are then zeros for every purpose.
    """
    shape = scale_shape(weight.shape, group_size)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    rows = weight.detach().to(dtype).reshape(shape[0] * shape[1], -1)
    tiny = torch.finfo(torch.float32).tiny * 2**24
    if grid.bits == 1:
        scale = rows.abs().mean(dim=1, keepdim=True)
    else:
        # A few rows at a time, so that what is computed in between stays in the cache.
        parts = rows.split(max(1, CHUNK // rows.shape[1]))
        scale = torch.cat([_search(part, grid) for part in parts])
    return scale.clamp_min(tiny).reshape(shape)


def _search(rows: Tensor, grid: Grid) -> Tensor:
    # Near 1 by an exact power of two, so that no square overflows.
    exponent = torch.frexp(rows.abs().amax(dim=1, keepdim=True)).exponent.clamp(-100, 100)
    rows = torch.ldexp(rows, -exponent)
    extremes = abs(grid.first), grid.first + grid.step * grid.last
    tiny = torch.finfo(rows.dtype).tiny
    low = rows.square().mean(dim=1, keepdim=True).sqrt().clamp_min(tiny) / max(extremes)
    high = rows.abs().amax(dim=1, keepdim=True).clamp_min(tiny)
    high = high / (min(extremes) - grid.step / 2)  # beyond it the outermost level is not used
    best, error = high, torch.full_like(high, torch.inf)
    count = SHORT_ROW_CANDIDATES if rows.shape[1] <= SHORT_ROW else CANDIDATES
    ratio = (high / low) ** (1 / (count - 1))
    for i in range(count):
        best, error = _better(rows, grid, low * ratio**i, best, error)
    for _ in range(2):  # twice more, each time between the neighbours of the best so far
        center, ratio = best, ratio**0.25
        for i in range(-4, 5):
            best, error = _better(rows, grid, center * ratio**i, best, error)
    for _ in range(2):
        best, error = _better(rows, grid, best, best, error)
    return torch.ldexp(best, exponent)


def _better(
    rows: Tensor, grid: Grid, candidate: Tensor, best: Tensor, error: Tensor
) -> tuple[Tensor, Tensor]:
    """Take, row by row, the scale <w, u> / <u, u> that fits the candidate's codes u, if better."""
    codes = constraint.nearest((rows / candidate - grid.first) / grid.step, grid.last)
    units = grid.first + grid.step * codes
    fitted = (rows * units).sum(dim=1, keepdim=True) / units.square().sum(dim=1, keepdim=True)
    new = (rows - fitted * units).square().sum(dim=1, keepdim=True)
    wins = (fitted > 0) & (new < error)  # false for rows whose codes are all zero
    return torch.where(wins, fitted, best), torch.where(wins, new, error)
