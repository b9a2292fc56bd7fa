"""Codes to bytes and back, for every width and length, and the refusal of damaged bytes."""

import pytest
import torch
from conftest import GRIDS, bit_widths, grid_name, grids, seeds, shapes, weights_and_scales
from hypothesis import given
from hypothesis import strategies as st

from askewq.errors import FormatError
from askewq.grid import BITS, make_grid
from askewq.pack import pack, packed_size, unpack, unpack_values

every_width = pytest.mark.parametrize("bits", BITS)


def random_codes(bits: int | str, seed: int, *shape: int) -> torch.Tensor:
    """Return random codes of the grid of `bits`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, make_grid(bits).size, shape, generator=generator, dtype=torch.uint8)


@given(bits=bit_widths, length=st.integers(0, 70), seed=seeds)
def test_codes_survive_their_bytes(bits, length, seed):
    """unpack(pack(codes)) gives the codes back for every width and length."""
    codes = random_codes(bits, seed, length)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (packed_size(length, bits),)
    assert torch.equal(unpack(packed, bits, length), codes)


@given(bits=bit_widths, seed=seeds, shape=shapes)
def test_shape_and_memory_order_do_not_matter(bits, seed, shape):
    """Codes of any shape are packed in row-major order, even from a transposed view."""
    codes = random_codes(bits, seed, *shape)
    view = codes.permute(*reversed(range(codes.dim()))).contiguous()
    view = view.permute(*reversed(range(codes.dim())))
    packed = pack(codes, bits)
    assert torch.equal(packed, pack(view, bits))
    assert torch.equal(packed, pack(codes.reshape(-1), bits))
    assert torch.equal(unpack(packed, bits, codes.numel()).reshape(shape), codes)


@given(bits=bit_widths, seed=seeds)
def test_bytes_survive_their_codes(bits, seed):
    """pack(unpack(bytes)) gives the bytes back where they fill up whole groups of codes."""
    generator = torch.Generator().manual_seed(seed)
    size, count = (6, 30) if bits == "ternary" else (3 * bits, 24)
    top = 243 if bits == "ternary" else 256
    packed = torch.randint(0, top, (size,), generator=generator, dtype=torch.uint8)
    assert torch.equal(pack(unpack(packed, bits, count), bits), packed)


@every_width
@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0, 2)])
def test_no_codes_are_no_bytes(bits, shape):
    """A tensor without elements packs to nothing, and back."""
    codes = torch.zeros(shape, dtype=torch.uint8)
    assert pack(codes, bits).shape == (0,)
    assert packed_size(0, bits) == 0
    assert unpack(pack(codes, bits), bits, 0).shape == (0,)


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (1, [1, 0, 1, 1, 0, 0, 0, 1, 1], [0b10001101, 0b1]),
        ("ternary", [1, 0, 2, 1, 0, 2], [1 + 2 * 9 + 27, 2]),
        ("ternary", [2, 2, 2, 2, 2], [242]),
        (2, [0, 1, 2, 3, 3], [0b11100100, 0b11]),
        (3, [1, 2, 3, 7], [0b11010001, 0b1110]),
        (4, [1, 15, 7], [0xF1, 0x07]),
        (5, [31, 0, 1], [0b00011111, 0b00000100]),
        (6, [63, 1], [0b01111111, 0b0000]),
        (7, [127, 1], [0b11111111, 0b000000]),
        (8, [0, 255, 17], [0, 255, 17]),
    ],
)
def test_golden_bytes(bits, codes, packed):
    """Codes are laid end to end, the first in the lowest bits; the format may never change."""
    assert pack(torch.tensor(codes, dtype=torch.uint8), bits).tolist() == packed
    unpacked = unpack(torch.tensor(packed, dtype=torch.uint8), bits, len(codes))
    assert unpacked.tolist() == codes


@pytest.mark.parametrize(
    ("bits", "count", "size"),
    [
        (1, 1, 1), (1, 8, 1), (1, 9, 2),
        ("ternary", 1, 1), ("ternary", 5, 1), ("ternary", 6, 2),
        (2, 4, 1), (2, 5, 2),
        (3, 8, 3), (3, 9, 4), (3, 3, 2),
        (5, 8, 5), (7, 1, 1), (7, 2, 2), (8, 3, 3),
    ],
)  # fmt: skip
def test_packed_size(bits, count, size):
    """The size is the whole number of bytes that the codes need."""
    assert packed_size(count, bits) == size
    assert pack(random_codes(bits, 0, count), bits).numel() == size


@every_width
def test_packing_makes_a_copy(bits):
    """Neither direction returns a view of what it was given."""
    codes = random_codes(bits, 0, 40)
    packed = pack(codes, bits)
    kept = packed.clone()
    codes.zero_()
    assert torch.equal(packed, kept)
    unpacked = unpack(packed, bits, 40)
    kept = unpacked.clone()
    packed.zero_()
    assert torch.equal(unpacked, kept)


@pytest.mark.parametrize(
    ("bits", "count", "packed", "fragment"),
    [
        (2, 5, [0], "5 codes of 2 bits take 2 bytes, not 1"),
        (2, 5, [0, 0, 0], "5 codes of 2 bits take 2 bytes, not 3"),
        (3, 0, [0], "0 codes of 3 bits take 0 bytes, not 1"),
        ("ternary", 6, [0], "6 codes of ternary bits take 2 bytes, not 1"),
        (8, 2, [0], "2 codes of 8 bits take 2 bytes, not 1"),
        ("ternary", 5, [243], "byte 243 holds no five ternary codes (at most 242)"),
        ("ternary", 10, [0, 255], "byte 255 holds no five ternary codes"),
        ("ternary", 1, [3], "the bits that fill up the last byte after 1 codes are not zero"),
        ("ternary", 6, [0, 242], "after 6 codes are not zero"),
        (1, 1, [0b10], "after 1 codes are not zero"),
        (2, 3, [0b11000000], "after 3 codes are not zero"),
        (3, 1, [0b01000000], "after 1 codes are not zero"),
        (4, 1, [0x10], "after 1 codes are not zero"),
        (5, 3, [0, 0x80], "after 3 codes are not zero"),
        (7, 1, [0x80], "after 1 codes are not zero"),
    ],
)
def test_damaged_bytes_are_refused(bits, count, packed, fragment):
    """A wrong size, an impossible ternary byte and filling bits that are not zero are errors."""
    with pytest.raises(FormatError) as error:
        unpack(torch.tensor(packed, dtype=torch.uint8), bits, count)
    assert fragment in str(error.value)


@given(bits=bit_widths.filter(lambda bits: bits not in (8, "ternary")), count=st.integers(1, 60))
def test_every_filling_bit_is_checked(bits, count):
    """Setting any one bit behind the last code is refused."""
    packed = pack(random_codes(bits, count, count), bits)
    for bit in range(count * bits, 8 * packed.numel()):
        damaged = packed.clone()
        damaged[bit // 8] |= 1 << (bit % 8)
        with pytest.raises(FormatError, match="fill up the last byte"):
            unpack(damaged, bits, count)


@given(grid=grids, data=st.data())
def test_values_of_bytes_are_those_of_codes(grid, data):
    """Bytes unpack to the very values of their codes, for every grid, shape and scale."""
    weight, scale = data.draw(weights_and_scales(grid))
    weight, scale = weight.float(), scale.float()
    codes = grid.codes(weight, scale)
    values = unpack_values(pack(codes, grid.bits), grid, scale, tuple(codes.shape))
    assert torch.equal(values, grid.values(codes, scale))
    assert (values.dtype, values.shape) == (torch.float32, codes.shape)
    out = torch.full(codes.shape, torch.nan)
    unpack_values(pack(codes, grid.bits), grid, scale, tuple(codes.shape), out)
    assert torch.equal(out, values)


@every_width
@pytest.mark.parametrize("count", [2**15 - 1, 2**15, 2**15 + 1, 100_003])
def test_the_pieces_do_not_show(bits, count):
    """Codes of more than one piece survive, whatever is left over, and so do their values."""
    grid, codes = make_grid(bits), random_codes(bits, 1, count)
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, bits, count), codes)
    scale = torch.full((1, 1), 0.3)
    values = unpack_values(packed, grid, scale, (1, count))
    assert torch.equal(values, grid.values(codes.reshape(1, -1), scale))


@pytest.mark.parametrize("grid", GRIDS, ids=grid_name)
def test_rows_of_many_pieces(grid):
    """Each piece begins with a whole byte, and has the scales of its own rows."""
    codes = torch.randint(0, grid.size, (12_001, 3), dtype=torch.uint8)
    scale = 0.1 + torch.rand(12_001, 1)
    values = unpack_values(pack(codes, grid.bits), grid, scale, (12_001, 3))
    assert torch.equal(values, grid.values(codes, scale))


@every_width
def test_packing_leaves_the_codes(bits):
    """Neither direction writes into what it is given."""
    codes = random_codes(bits, 2, 40)
    before, packed = codes.clone(), pack(codes, bits)
    kept = packed.clone()
    unpack(packed, bits, 40)
    assert torch.equal(codes, before)
    assert torch.equal(packed, kept)


@every_width
def test_codes_that_start_anywhere_in_memory(bits):
    """A view whose first byte is not aligned packs like its copy."""
    codes = random_codes(bits, 3, 45)[5:]
    assert torch.equal(pack(codes, bits), pack(codes.clone(), bits))
    packed = pack(codes, bits)
    shifted = torch.cat([packed.new_zeros(1), packed])[1:]
    assert torch.equal(unpack(shifted, bits, 40), codes)
