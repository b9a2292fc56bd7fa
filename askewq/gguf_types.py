"""GGUF's block types: the smallest that holds a grid exactly, and the bytes of its blocks.

A block is a number of consecutive weights of a row with a scale d in fp16. Codes are never fitted
anew: they are the artifact's, so that the file is exact wherever its scales are fp16 numbers.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from askewq.grid import Grid
from askewq.manifest import PackedWeight
from askewq.pack import unpack


@dataclass(frozen=True, slots=True)
class BlockType:
    """One of GGUF's types.

    Attributes:
        name: as ggml calls it.
        weights, size: of a block; `size` in bytes.
        low, high: the integers q that a block holds.
        affine: a weight is d q - dmin m, m an integer of 4 bits (Q2_K) or 6; else it is d q.
    """

    name: str
    weights: int
    size: int
    low: int
    high: int
    affine: bool = False

    def factor(self, grid: Grid) -> int | None:
        """Return what makes the levels (affine: their offset) integers, 1 or 2; None: no place."""
        factor = 1 if grid.first % 1 == 0 else 2
        if self.affine:
            fits = grid.step == 1 and grid.last <= self.high
        else:
            fits = self.low <= factor * grid.first and factor * grid.highest <= self.high
        return factor if fits else None


# By bits a weight. The affine ones hold half-integer grids in no more bits than integer ones.
TYPES = (
    BlockType("TQ1_0", 256, 54, -1, 1),
    BlockType("Q2_K", 256, 84, 0, 3, affine=True),
    BlockType("Q3_K", 256, 110, -4, 3),
    BlockType("Q4_0", 32, 18, -8, 7),
    BlockType("Q4_K", 256, 144, 0, 15, affine=True),
    BlockType("Q5_0", 32, 22, -16, 15),
    BlockType("Q5_K", 256, 176, 0, 31, affine=True),
    BlockType("Q6_K", 256, 210, -32, 31),
    BlockType("Q8_0", 32, 34, -128, 127),
)
LARGEST = 65504.0  # of fp16


def choose(weight: PackedWeight) -> BlockType | None:
    """Return the smallest type whose blocks lie within one scale and hold the grid, if any."""
    run = math.prod(weight.channels[1:]) // weight.scale.shape[1]
    if len(weight.shape) != 2 or float(weight.scale.max()) > LARGEST:
        return None
    fitting = (t for t in TYPES if run % t.weights == 0 and t.factor(weight.grid) is not None)
    return next(fitting, None)


def encode(weight: PackedWeight, kind: BlockType, rows: Tensor) -> Tensor:
    """Return a matrix as blocks, uint8 [out, bytes of a row], its rows in the order `rows`."""
    grid, (out, columns) = weight.grid, weight.channels
    factor = kind.factor(grid) or 1
    codes = unpack(weight.codes, grid.bits, out * columns).reshape(out, columns)[rows]
    scale = weight.scale.expand(out, -1)[rows]
    blocks = codes.reshape(-1, kind.weights)
    scale = scale.reshape(-1).repeat_interleave(len(blocks) // scale.numel())
    if kind.affine:
        d = scale.half()
        least = (d.float() / factor).half()
        packed = _affine(kind.name, blocks, _bytes(d), _bytes(least), round(-factor * grid.first))
    else:
        offset = round(factor * grid.first) - kind.low
        held = (blocks.to(torch.int16) * round(factor * grid.step) + offset).to(torch.uint8)
        packed = _symmetric(kind.name, held, _bytes((scale / factor).half()))
    return packed.reshape(out, -1)


def _bytes(values: Tensor) -> Tensor:
    """Return fp16 [n] as uint8 [n, 2]."""
    return values.contiguous().view(torch.uint8).reshape(-1, 2)


def _symmetric(name: str, u: Tensor, d: Tensor) -> Tensor:
    """Return blocks [n, size] of u = q - low, uint8 [n, weights], and d."""
    if name == "TQ1_0":
        parts = u[:, :160].reshape(-1, 5, 32), u[:, 160:240].reshape(-1, 5, 16)
        return torch.cat([*map(_base_3, parts), _base_3(u[:, 240:].reshape(-1, 4, 4)), d], 1)
    if name == "Q3_K":
        # 6-bit scales of 16 weights each, less 32: 33 sixteen times, low and high bits apart
        scales = _constant([0x11] * 8 + [0xAA] * 4, u)
        return torch.cat([_planes(u >> 2, 32, 1), _planes(u & 3, 32, 2), scales, d], 1)
    if name == "Q4_0":
        return torch.cat([d, _planes(u, 16, 4)], 1)
    if name == "Q5_0":
        return torch.cat([d, _planes(u >> 4, 1, 1), _planes(u & 15, 16, 4)], 1)
    if name == "Q6_K":
        scales = _constant([1] * 16, u)
        return torch.cat([_planes(u & 15, 64, 4), _planes(u >> 4, 32, 2), scales, d], 1)
    return torch.cat([d, u ^ 0x80], 1)  # Q8_0: bytes of q = u - 128


def _affine(name: str, u: Tensor, d: Tensor, least: Tensor, m: int) -> Tensor:
    """Return blocks [n, size] of codes u, uint8 [n, weights], for weights d u - least m."""
    if name == "Q2_K":
        return torch.cat([_constant([1 | m << 4] * 16, u), _planes(u, 32, 2), d, least], 1)
    # eight 6-bit multipliers of d, all 1, and of least, all m; of the last four the high bits apart
    scales = _constant([1] * 4 + [m & 63 | m >> 4 << 6] * 4 + [1 | (m & 15) << 4] * 4, u)
    high = [_planes(u >> 4, 32, 1)] if name == "Q5_K" else []
    return torch.cat([d, least, scales, *high, _planes(u & 15, 32, 4)], 1)


def _planes(values: Tensor, width: int, bits: int) -> Tensor:
    """Pack values, uint8 [n, weights]: byte j holds values j, j + width, ..., the first lowest."""
    planes = values.reshape(len(values), -1, 8 // bits, width)
    packed = torch.zeros_like(planes[:, :, 0])
    for k, plane in enumerate(planes.unbind(2)):
        packed |= plane << (k * bits)
    return packed.flatten(1)


def _base_3(digits: Tensor) -> Tensor:
    """Pack up to five ternary digits, uint8 [n, digits, width], as fractions of 256."""
    powers = torch.tensor([81, 27, 9, 3, 1][: digits.shape[1]], dtype=torch.int32)
    number = (digits * powers.view(1, -1, 1)).sum(1)
    return ((number * 256 + 242) // 243).to(torch.uint8)


def _constant(values: list[int], like: Tensor) -> Tensor:
    """Return the same bytes for every block."""
    return torch.tensor(values, dtype=torch.uint8).expand(len(like), -1)
