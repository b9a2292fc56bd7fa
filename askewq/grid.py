"""Grid: the finite set of values a quantized weight may take, and the fit of its scale.

A grid is affine: level = (first + step * code) * scale with code in 0 .. size - 1. The same grid
and the same scale serve training, evaluation and export; `values` of the same codes and scale
give the same bits wherever they are computed, because it is one float multiplication.

A weight is seen channels first, [out, ...] (`channels_first`), and then as rows that share one
scale, ``weight.reshape(scale.numel(), -1)``: the whole tensor, an output channel, or a group of
consecutive weights within an output channel. Every weight given to a function of this file is
channels first.
"""

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from askewq.errors import RecipeError
from askewq.vocabulary import ActBits, Bits, GridKind, GroupSize

# Code changes along a row's sweep up to which the exact sweep is made.
SWEEP_UP_TO = 2**16
# Numbers worked on at a time, so that they stay in the cache; torch does not split an operation of
# this size over threads, whose waiting for each other would cost more than they bring.
CHUNK = 2**15

# Significant bits of a fitted scale: those of fp16.
SCALE_DIGITS = 11
# The scale of a row of zeros; a code times it is a float32 number still.
NO_SCALE = torch.finfo(torch.float32).tiny * 2**24

BITS: tuple[Bits, ...] = (1, "ternary", 2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True, slots=True)
class Grid:
    """Levels (first + step * code) * scale, code = 0 .. size - 1.

    Weights are finite floats [out, ...], channels first; scales [out, groups], or [1, 1] for all.

    Attributes:
        first: the lowest level, in units of the scale.
        step: the distance between two levels, in units of the scale.
        size: how many levels there are.
    """

    bits: Bits
    first: float
    step: float
    size: int

    @property
    def last(self) -> int:
        """The highest code."""
        return self.size - 1

    @property
    def highest(self) -> float:
        """The highest level, in units of the scale."""
        return self.first + self.step * self.last

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
        rows = weight.reshape(scale.numel(), -1)
        codes = torch.empty(rows.shape, dtype=torch.uint8, device=weight.device)
        height = max(1, CHUNK // max(1, rows.shape[1]))
        scales = scale.reshape(-1, 1)
        parts = (pieces(tensor, height) for tensor in (rows, scales, codes))
        for part, part_scale, out in zip(*parts, strict=True):
            x = part / part_scale
            x -= self.first
            if self.step != 1:
                x /= self.step
            # constraint.nearest: no code is negative, so that a cast is its floor. Two casts take
            # a quarter of the time that torch takes for one from float to uint8.
            out.copy_(x.add_(0.5).clamp_(0, self.last + 0.5).to(torch.int32))
        return codes.reshape(weight.shape)

    def values(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Return the weights that codes stand for, in scale's dtype and codes' shape."""
        units = codes.reshape(scale.numel(), -1).to(scale.dtype)
        units.mul_(self.step).add_(self.first)
        return units.mul_(scale.reshape(-1, 1)).reshape(codes.shape)

    def snap(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Return every weight moved to its nearest level; snapping twice changes nothing."""
        return self.values(self.codes(weight, scale), scale)


def channels_first(weight: Tensor, channel_dim: int) -> Tensor:
    """Return a view of a weight with its output channels as the first dimension."""
    return weight.movedim(channel_dim, 0)


def channels_back(weight: Tensor, channel_dim: int) -> Tensor:
    """Return a weight given channels first as its layer has it, contiguous."""
    return weight.movedim(0, channel_dim).contiguous()


def pieces(tensor: Tensor, size: int) -> tuple[Tensor, ...]:
    """Return views of `size` rows each, or one of all rows where there is no cache to mind."""
    return tensor.split(size if tensor.device.type == "cpu" else max(1, len(tensor)))


def make_grid(bits: Bits, kind: GridKind = "auto") -> Grid:
    """Return the grid of a bit width.

    1 bit is {-1, +1}, ternary {-1, 0, +1}; b >= 2 bits are the integers -2^(b-1) .. 2^(b-1) - 1,
    or the 2^b half-integers symmetric about 0 (2 bits: -1.5, -0.5, 0.5, 1.5). "auto" is
    half-integer at 2 bits, where it was found to be more accurate (recipes/README.md).

    Raises:
        RecipeError: bits that are none of `BITS`, or half-integers where there is only one grid.
    """
    if type(bits) not in (int, str) or bits not in BITS:
        allowed = ", ".join(map(str, BITS))
        raise RecipeError(f"bits = {bits!r} is not a width that askewq can train; use {allowed}.")
    if kind not in get_args(GridKind):
        raise RecipeError(f"grid = {kind!r} is unknown; use 'auto', 'integer' or 'half-integer'.")
    if bits in (1, "ternary"):
        only = "{-1, +1}" if bits == 1 else "{-1, 0, +1}"
        if kind == "half-integer":
            raise RecipeError(
                f"grid = 'half-integer' does not go with bits = {bits}, whose one grid is {only}; "
                "leave out the grid, or use 2 or more bits."
            )
        return Grid(1, -1.0, 2.0, 2) if bits == 1 else Grid("ternary", -1.0, 1.0, 3)
    size = 2 ** int(bits)
    half = kind == "half-integer" or (kind == "auto" and bits == 2)
    first = -(size - 1) / 2 if half else -size / 2
    return Grid(bits, first, 1.0, size)


def input_grid(bits: ActBits, *, signed: bool) -> Grid:
    """Return the levels of a layer's inputs: integers, 0 among them but for the signs of 1 bit.

    Unsigned they are 0 .. 2^b - 1; signed the integer ones of `make_grid`.

    Raises:
        RecipeError: bits that are none of 1 to 8.
    """
    if type(bits) is not int or not 1 <= bits <= 8:
        raise RecipeError(f"act_bits = {bits!r} is no width of inputs; use 1 to 8, or 'none'.")
    return make_grid(bits, "integer") if signed else Grid(bits, 0.0, 1.0, 2**bits)


def mixed_grid(bits: Bits, kind: GridKind) -> Grid:
    """Return the grid of one width among several: of this kind, where the width has two."""
    return make_grid(bits, "integer" if bits in (1, "ternary") else kind)


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
    if type(group_size) is not int or group_size < 1:
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

    For given codes with levels u the best scale is <w, u> / <u, u>, which leaves an error of
    ||w||^2 - <w, u>^2 / <u, u>. Codes change only where a weight passes half-way between levels,
    so one sorted sweep tries all codes that any scale leads to: the result is exact. Long rows on
    fine grids get the best of 96 scales instead, within 1 % of the exact error where the weights
    thin out, as a normal's do, and within 5 % where they end at an edge, as uniform ones; for
    weights that lie on such a grid already it need not find that.

    The scale is then rounded to `SCALE_DIGITS` significant bits, so that what keeps scales in fp16
    holds it exactly. With e the relative rounding, the squared error grows by no more than
    e^2 <su, su>: at most 2^-22 of ||w||^2.

    Args:
        weight: [out, ...], floating point and finite.

    Returns:
        Positive scales, float32 (float64 for a float64 weight), shape `scale_shape`. A row of
        zeros gets one near the tiniest normal number: its levels are zeros for every purpose.
    """
    shape = scale_shape(weight.shape, group_size)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    rows = weight.detach().reshape(shape[0] * shape[1], -1)
    return shortened(best_scale(rows, grid)).to(dtype).reshape(shape)


def best_scale(rows: Tensor, grid: Grid) -> Tensor:
    """Return what `fit_scale` rounds, of every row of [rows, columns], float32 or float64."""
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    changes = rows.shape[1] * grid.size // 2  # of codes along the sweep of a row, at most
    if grid.levels().tolist() == [-1, 1]:
        return rows.to(torch.float64).abs().mean(dim=1)
    if changes <= SWEEP_UP_TO:
        parts = rows.split(max(1, CHUNK // changes))
        return torch.cat([_sweep(part.to(torch.float64), grid) for part in parts])
    parts = rows.split(max(1, CHUNK // rows.shape[1]))
    return torch.cat([_scan(part.to(dtype), grid) for part in parts])


def shortened(scale: Tensor) -> Tensor:
    """Return scales, given in float64, as positive float32 numbers of `SCALE_DIGITS` bits."""
    float32 = torch.finfo(torch.float32)
    scale = scale.nan_to_num(0.0).clamp(NO_SCALE, float32.max)
    fraction, exponent = torch.frexp(scale)
    units = (fraction * 2**SCALE_DIGITS).round()
    # Rounded up, the largest would be no float32 numbers any more.
    units = torch.where(exponent < 128, units, units.clamp_max(2**SCALE_DIGITS - 1))
    return torch.ldexp(units, exponent - SCALE_DIGITS)


def _sweep(rows: Tensor, grid: Grid) -> Tensor:
    """Return the best scale of every row, by trying all codes that any scale leads to."""
    levels = grid.levels().to(rows)
    sides = levels[levels >= 0], -levels[levels <= 0].flip(0)  # for w > 0 and w < 0, outwards
    width = max(map(len, sides)) - 1
    turns = rows.new_full((2, width), torch.inf)  # 1 / scale at which |w| = 1 takes its next level
    gains = rows.new_zeros((2, width))  # and what this adds to <w, u>
    costs = rows.new_zeros((2, width))  # and to <u, u>
    for i, side in enumerate(sides):
        n = len(side) - 1
        turns[i, :n] = (side[1:] + side[:-1]) / 2
        gains[i, :n] = side.diff()
        costs[i, :n] = side.square().diff()
    size, sign = rows.abs(), (rows < 0).long()
    turn = (turns[sign] / size.unsqueeze(-1)).flatten(1)
    gain = (gains[sign] * size.unsqueeze(-1)).flatten(1)
    cost = torch.where(torch.isinf(turn), 0.0, costs[sign].flatten(1))
    order = turn.argsort(dim=1)
    first = sides[0][0]  # where the sweep starts: every weight on its innermost level
    zeros = rows.new_zeros(rows.shape[0], 1)
    product = torch.cat([zeros, gain.gather(1, order).cumsum(1)], dim=1)
    product += first * size.sum(1, keepdim=True)
    square = torch.cat([zeros, cost.gather(1, order).cumsum(1)], dim=1)
    square += first * first * rows.shape[1]
    best = (product.square() / square).nan_to_num(0.0).argmax(1, keepdim=True)
    return (product.gather(1, best) / square.gather(1, best)).squeeze(1)


def _scan(rows: Tensor, grid: Grid) -> Tensor:
    """Return the best of 96 scales for every row: 32 over the whole range, 64 around the best."""
    exponent = torch.frexp(rows.abs().amax(dim=1, keepdim=True)).exponent.clamp(-100, 100)
    rows = torch.ldexp(rows, -exponent)  # near 1, so that no square overflows
    extremes = [e for e in (-grid.first, grid.highest) if e]
    high = rows.abs().amax(1, keepdim=True) / min(extremes)
    low = rows.square().mean(1, keepdim=True).sqrt() / max(extremes)
    best, most = high, torch.zeros_like(high)
    for count, reach in ((32, 0.5), (64, 2 / 32)):
        centre = (low * high).sqrt() if count == 32 else best
        for share in torch.linspace(-reach, reach, count).tolist():
            units = grid.snap(rows / (centre * (high / low) ** share), torch.ones_like(high))
            product = (rows * units).sum(1, keepdim=True)
            square = units.square().sum(1, keepdim=True)
            gain = product.square() / square
            best = torch.where(gain > most, product / square, best)
            most = torch.where(gain > most, gain, most)
    return torch.ldexp(best, exponent).squeeze(1).to(torch.float64)
