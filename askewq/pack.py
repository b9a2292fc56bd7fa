"""Codes to bytes and back: b bits a code, ternary codes five to a byte.

Codes are laid end to end, the first in the lowest bits of the first byte (docs/format.md, section
"Codes"); the bits that fill up the last byte are zero. ``unpack(pack(codes, b), b, n)`` gives
back the codes for every width, length and shape.

Eight codes are one 64-bit word, a byte each. Packing moves neighbours together in three steps
(bytes to pairs, pairs to fours, fours to eight); unpacking takes the steps backwards.
"""

import functools
import math
from array import array

import torch
from torch import Tensor

from askewq.errors import FormatError
from askewq.grid import CHUNK, Grid, pieces
from askewq.vocabulary import Bits

_POWERS_OF_3 = (1, 3, 9, 27, 81)
# Words of eight codes (ternary: bytes of five) worked on at a time.
_WORDS = CHUNK // 8
# The type of b bytes, where there is one.
_WHOLE: dict[Bits, torch.dtype] = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def packed_size(count: int, bits: Bits) -> int:
    """Return how many bytes `count` codes take."""
    return -(-count // 5) if bits == "ternary" else -(-count * bits // 8)


def pack(codes: Tensor, bits: Bits) -> Tensor:
    """Return codes (uint8, any shape) as uint8 bytes, 1-D, on the same device."""
    flat = codes.reshape(-1)
    if bits == 8 or not len(flat):
        return flat.clone()
    group = 5 if bits == "ternary" else 8
    parts = pieces(flat, group * _WORDS)
    packed = torch.cat([_join(_pad(part, group).reshape(-1, group), bits) for part in parts])
    size = packed_size(flat.numel(), bits)
    return packed if packed.numel() == size else packed[:size].clone()


def _join(codes: Tensor, bits: Bits) -> Tensor:
    """Return codes, [n, 8] or ternary [n, 5], as bytes."""
    if bits == "ternary":
        packed = codes[:, 0].clone()
        for i, power in enumerate(_POWERS_OF_3[1:], 1):
            packed.add_(codes[:, i], alpha=power)
        return packed
    words = codes.view(torch.int64)
    for mask, shift in _steps(bits):
        low = words & mask
        words = low.bitwise_or_((words ^ low).bitwise_right_shift_(shift))
    if bits in _WHOLE:  # a cast is faster than picking bytes
        return words.to(_WHOLE[bits]).view(torch.uint8).view(-1)
    return words.view(torch.uint8)[:, :bits].reshape(-1)


def unpack(packed: Tensor, bits: Bits, count: int) -> Tensor:
    """Return the `count` codes held in `packed` (uint8, 1-D) as uint8, 1-D.

    Raises:
        FormatError: as `check_packed`.
    """
    check_packed(packed, bits, count)
    return _unpack(packed, bits, count)


def _unpack(packed: Tensor, bits: Bits, count: int) -> Tensor:
    if bits == 8 or not len(packed):
        return packed.clone()
    if bits == "ternary":
        table = torch.frombuffer(_ternary_digits(), dtype=torch.uint8).view(256, 5)
        table = table.to(packed.device)
        return table.index_select(0, packed.to(torch.int32)).reshape(-1)[:count]
    parts = pieces(_pad(packed, bits).reshape(-1, bits), _WORDS)
    return torch.cat([_part(part, bits) for part in parts])[:count]


def unpack_rows(packed: Tensor, bits: Bits, columns: int, rows: Tensor) -> Tensor:
    """Return the codes of some rows of a matrix with so many columns, uint8 [n, columns].

    Args:
        packed: uint8, 1-D, checked.
        rows: int64 [n], within the matrix.
    """
    group, width = (5, 1) if bits == "ternary" else (8, int(bits))  # codes in so many bytes
    first = rows * columns
    span = -(-columns // group) + (1 if columns % group else 0)  # groups that a row may touch
    places = (first // group * width).view(-1, 1) + torch.arange(span * width, device=rows.device)
    # Behind the last row there may be no bytes: what is read instead belongs to no row.
    found = packed[places.clamp_(max=len(packed) - 1)].view(-1)
    codes = _unpack(found, bits, len(rows) * span * group).view(len(rows), span * group)
    if columns % group == 0:
        return codes
    within = (first % group).view(-1, 1) + torch.arange(columns, device=rows.device)
    return codes.gather(1, within)


def _part(packed: Tensor, bits: int) -> Tensor:
    """Return the 8 n codes in [n, b] bytes."""
    padded = torch.zeros(len(packed), 8, dtype=torch.uint8, device=packed.device)
    padded[:, :bits] = packed
    words = padded.view(torch.int64)
    for mask, shift in reversed(_steps(bits)):
        low = words & mask
        words = low.bitwise_or_((words ^ low).bitwise_left_shift_(shift))
    return words.view(torch.uint8).reshape(-1)


@functools.cache
def _steps(bits: int) -> tuple[tuple[int, int], ...]:
    """Return mask and shift of the three steps of packing.

    Before a step every lane of a word holds a field in its lowest bits, at first a byte with one
    code; the mask selects the lower field of every two lanes, the shift brings the upper one to it.
    """
    steps = []
    for lane in (8, 16, 32):
        field = bits * lane // 8
        mask = sum(((1 << field) - 1) << start for start in range(0, 64, 2 * lane))
        steps.append((mask, lane - field))
    return tuple(steps)


# No tensor is kept: one that was made while a network is traced has no content.
@functools.cache
def _ternary_digits() -> bytearray:
    """Return the five codes in every byte, 256 times 5."""
    return bytearray(byte // power % 3 for byte in range(256) for power in _POWERS_OF_3)


def unpack_values(
    packed: Tensor,
    grid: Grid,
    scale: Tensor,
    shape: tuple[int, ...],
    out: Tensor | None = None,
) -> Tensor:
    """Return ``grid.values`` of the codes in checked bytes: float32 of this shape.

    Where every byte holds whole codes a table of bytes gives their levels at once.

    Args:
        packed: uint8, 1-D, as `check_packed` accepts it for the grid's bits and the shape.
        scale: float32 [out, groups].
        out: where to write the weight, contiguous float32 of its shape; a new tensor by default.
    """
    count = torch.Size(shape).numel()
    if grid.bits in (3, 5, 6, 7):
        values = grid.values(_unpack(packed, grid.bits, count).reshape(shape), scale)
        return values if out is None else out.copy_(values)
    table, each = _level_table(grid, packed.device), _codes_a_byte(grid)
    result = scale.new_empty(shape) if out is None else out
    rows = result.view(scale.numel(), -1)
    # So many rows at a time that they begin with a whole byte and stay in the cache.
    whole = each // math.gcd(each, rows.shape[1])
    height = max(1, CHUNK // rows.shape[1] // whole) * whole
    parts = (pieces(tensor, height) for tensor in (rows, scale.view(-1, 1)))
    found = pieces(packed, height * rows.shape[1] // each)
    # Written to again and again: fewer calls a piece, which cost as much as the arithmetic.
    entries, levels = table[:0], rows[:0]
    for part, part_scale, part_bytes in zip(*parts, found, strict=True):
        if levels.shape != part.shape:  # the first piece, and a shorter last one
            entries = table.new_empty(len(part_bytes), *table.shape[1:])
            levels = entries.view(torch.float32).view(-1)[: part.numel()].view(part.shape)
        torch.index_select(table, 0, part_bytes.to(torch.int32), out=entries)
        torch.mul(levels, part_scale, out=part)
    return result


def _codes_a_byte(grid: Grid) -> int:
    return 5 if grid.bits == "ternary" else 8 // int(grid.bits)


def _level_table(grid: Grid, device: torch.device) -> Tensor:
    """Return the levels, in units of the scale, of the codes in every byte: 256 rows of float32.

    A row of four levels is one number of 16 bytes, of two one of 8: torch copies numbers faster
    than rows.
    """
    each, levels = _codes_a_byte(grid), _levels(grid)
    number = {1: torch.float32, 2: torch.complex64, 4: torch.complex128}
    if each in number:
        return torch.frombuffer(levels, dtype=number[each]).to(device)
    return torch.frombuffer(levels, dtype=torch.float32).view(256, each).to(device)


@functools.cache
def _levels(grid: Grid) -> bytearray:
    """Return the content of `_level_table`: of every byte its codes' levels, float32."""
    base = 3 if grid.bits == "ternary" else 2 ** int(grid.bits)
    powers = [base**i for i in range(_codes_a_byte(grid))]
    codes = (byte // power % base for byte in range(256) for power in powers)
    return bytearray(array("f", (grid.first + grid.step * min(c, grid.last) for c in codes)))


def check_packed(packed: Tensor, bits: Bits, count: int) -> None:
    """Check that bytes are what `pack` writes for `count` codes.

    Raises:
        FormatError: a wrong number of bytes, a byte above 242 in ternary, or filling bits that
            are not zero.
    """
    expected = packed_size(count, bits)
    if packed.numel() != expected:
        raise FormatError(
            f"{count} codes of {bits} bits take {expected} bytes, not {packed.numel()}."
        )
    if expected == 0:
        return
    if bits == "ternary":
        if int(packed.max()) >= 3**5:
            raise FormatError(
                f"byte {int(packed.max())} holds no five ternary codes (at most 242)."
            )
        limit = 3 ** (count - 5 * (expected - 1))
    else:
        limit = 2 ** (count * bits - 8 * (expected - 1))
    if int(packed[-1]) >= limit:
        raise FormatError(f"the bits that fill up the last byte after {count} codes are not zero.")


def _pad(flat: Tensor, multiple: int) -> Tensor:
    """Return a copy of a 1-D tensor with zeros appended up to a multiple of `multiple` elements."""
    return torch.nn.functional.pad(flat, (0, -flat.numel() % multiple))
