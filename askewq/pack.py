"""Codes to bytes and back: b bits a code, ternary codes five to a byte.

Codes are laid end to end, the first in the lowest bits of the first byte (docs/format.md, section
"Codes"); the bits that fill up the last byte are zero. ``unpack(pack(codes, b), b, n)`` gives
back the codes for every width, length and shape.
"""

import torch
from torch import Tensor

from askewq.errors import FormatError
from askewq.vocabulary import Bits

_POWERS_OF_3 = (1, 3, 9, 27, 81)


def packed_size(count: int, bits: Bits) -> int:
    """Return how many bytes `count` codes take."""
    return -(-count // 5) if bits == "ternary" else -(-count * bits // 8)


def pack(codes: Tensor, bits: Bits) -> Tensor:
    """Return codes (uint8, any shape) as uint8 bytes, 1-D, on the same device."""
    flat = codes.reshape(-1)
    if bits == 8:
        return flat.clone()
    if bits == "ternary":
        digits = _pad(flat, 5).reshape(-1, 5)
        weights = torch.tensor(_POWERS_OF_3, dtype=torch.uint8, device=codes.device)
        return (digits * weights).sum(dim=1, dtype=torch.uint8)
    words = torch.zeros(-(-flat.numel() // 8), dtype=torch.int64, device=codes.device)
    for i, column in enumerate(_pad(flat, 8).reshape(-1, 8).unbind(dim=1)):
        words |= column.to(torch.int64) << (i * bits)
    packed = words.view(torch.uint8).reshape(-1, 8)[:, :bits].reshape(-1)
    return packed[: packed_size(flat.numel(), bits)].clone()


def unpack(packed: Tensor, bits: Bits, count: int) -> Tensor:
    """Return the `count` codes held in `packed` (uint8, 1-D) as uint8, 1-D.

    Raises:
        FormatError: as `check_packed`.
    """
    check_packed(packed, bits, count)
    if bits == 8:
        return packed.clone()
    if bits == "ternary":
        digits = torch.stack([(packed // power) % 3 for power in _POWERS_OF_3], dim=1)
        return digits.reshape(-1)[:count]
    padded = torch.zeros(-(-count // 8), 8, dtype=torch.uint8, device=packed.device)
    padded[:, :bits] = _pad(packed, bits).reshape(-1, bits)
    words = padded.view(torch.int64).reshape(-1)
    codes = torch.stack([(words >> (i * bits)) & (2**bits - 1) for i in range(8)], dim=1)
    return codes.to(torch.uint8).reshape(-1)[:count]


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
    """Return a 1-D tensor with zeros appended up to a multiple of `multiple` elements."""
    return torch.nn.functional.pad(flat, (0, -flat.numel() % multiple))
