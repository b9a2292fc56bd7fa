"""GGUF's block types, against the gguf package's own dequantization."""

import gguf
import pytest
import torch
from conftest import GRIDS, grid_name, random_tensor

from askewq.gguf_types import TYPES, choose, encode
from askewq.grid import make_grid
from askewq.manifest import PackedWeight
from askewq.pack import pack


def packed(grid, out=6, columns=512, groups=2) -> PackedWeight:
    """Return a random weight that has every code, with scales that fp16 holds."""
    codes = torch.randint(0, grid.size, (out, columns), dtype=torch.uint8)
    codes[0, : grid.size] = torch.arange(grid.size)
    scale = random_tensor(1, out, groups).abs().clamp(1e-3).half().float()
    return PackedWeight(grid, (out, columns), pack(codes, grid.bits), scale)


class TestEncode:
    @pytest.mark.parametrize("grid", GRIDS, ids=grid_name)
    def test_every_type_that_fits_is_exact(self, grid):
        """Gguf reads the artifact's weights, to the bit, from every type said to hold the grid."""
        weight = packed(grid)
        rows = torch.randperm(6)
        fitting = [kind for kind in TYPES if kind.factor(grid) is not None]
        assert bool(fitting) == (grid_name(grid) != "8-half-integer")
        for kind in fitting:
            blocks = encode(weight, kind, rows)
            stored = gguf.GGMLQuantizationType[kind.name]
            read = torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), stored))
            assert torch.equal(read, weight.dense()[rows]), kind.name

    @pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
    def test_sizes_are_ggmls(self, kind):
        """Weights and bytes of a block are those of the gguf package."""
        stored = gguf.GGMLQuantizationType[kind.name]
        assert gguf.GGML_QUANT_SIZES[stored] == (kind.weights, kind.size)

    def test_types_are_ordered_by_size(self):
        """The first that fits is the smallest."""
        sizes = [kind.size / kind.weights for kind in TYPES]
        assert sizes == sorted(sizes)

    def test_one_scale_for_all(self):
        """A scale [1, 1] is repeated in every block."""
        weight = packed(make_grid(4))
        weight = PackedWeight(weight.grid, weight.shape, weight.codes, torch.full((1, 1), 0.5))
        kind = choose(weight)
        blocks = encode(weight, kind, torch.arange(6))
        read = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind.name])
        assert torch.equal(torch.from_numpy(read), weight.dense())


class TestChoose:
    @pytest.mark.parametrize(
        ("bits", "kind", "groups", "name"),
        [
            (1, "integer", 2, "TQ1_0"),
            ("ternary", "integer", 2, "TQ1_0"),
            (2, "integer", 2, "Q2_K"),
            (2, "half-integer", 2, "Q2_K"),
            (3, "integer", 2, "Q3_K"),
            (3, "half-integer", 2, "Q4_0"),
            (4, "integer", 2, "Q4_0"),
            (4, "half-integer", 2, "Q4_K"),
            (5, "integer", 2, "Q5_0"),
            (5, "half-integer", 2, "Q5_K"),
            (6, "integer", 2, "Q6_K"),
            (7, "half-integer", 2, "Q8_0"),
            (8, "integer", 2, "Q8_0"),
            (8, "half-integer", 2, None),
            # groups of 32: no blocks of 256
            ("ternary", "integer", 16, "Q4_0"),
            (4, "half-integer", 16, "Q5_0"),
            # groups of 16: no blocks at all
            (4, "integer", 32, None),
        ],
    )
    def test_the_smallest_within_one_scale(self, bits, kind, groups, name):
        """The type follows from the grid and from how many weights share a scale."""
        chosen = choose(packed(make_grid(bits, kind), groups=groups))
        assert (chosen and chosen.name) == name

    def test_a_scale_beyond_fp16(self):
        """A scale that fp16 would make infinite has no type."""
        weight = packed(make_grid(4))
        weight.scale[0, 0] = 70000.0
        assert choose(weight) is None

    def test_weights_that_are_no_matrix(self):
        """GGUF's types are for matrices."""
        weight = packed(make_grid(4))
        kernel = PackedWeight(weight.grid, (6, 256, 2), weight.codes, weight.scale)
        assert choose(kernel) is None
