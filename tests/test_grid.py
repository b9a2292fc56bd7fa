"""Grids, the way between weights, codes and values, and the fit of a scale."""

import math

import hypothesis
import pytest
import torch
from conftest import GRIDS, grid_name, grids, random_tensor, scales, seeds, weights_and_scales
from hypothesis import given
from hypothesis import strategies as st
from reference import bracket

from askewq import constraint
from askewq.errors import RecipeError
from askewq.grid import (
    BITS,
    SWEEP_UP_TO,
    Grid,
    _sweep,
    best_scale,
    fit_scale,
    make_grid,
    scale_shape,
)

every_grid = pytest.mark.parametrize("grid", GRIDS, ids=grid_name)


@pytest.mark.parametrize(
    ("bits", "kind", "levels"),
    [
        (1, "integer", [-1, 1]),
        ("ternary", "integer", [-1, 0, 1]),
        (2, "integer", [-2, -1, 0, 1]),
        (2, "half-integer", [-1.5, -0.5, 0.5, 1.5]),
        (3, "integer", [-4, -3, -2, -1, 0, 1, 2, 3]),
        (3, "half-integer", [-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5]),
        (4, "integer", list(range(-8, 8))),
        (8, "integer", list(range(-128, 128))),
        (8, "half-integer", [i - 127.5 for i in range(256)]),
        (1, "auto", [-1, 1]),
        ("ternary", "auto", [-1, 0, 1]),
        (2, "auto", [-1.5, -0.5, 0.5, 1.5]),
        (3, "auto", list(range(-4, 4))),
        (8, "auto", list(range(-128, 128))),
    ],
)
def test_levels_are_those_documented(bits, kind, levels):
    """A grid has exactly the levels that its name promises, ascending."""
    grid = make_grid(bits, kind)
    assert grid.levels().tolist() == levels
    assert grid.last == len(levels) - 1


@every_grid
def test_a_grid_has_as_many_levels_as_its_bits_can_hold(grid):
    """There are 2^b levels for b bits and 3 for ternary, evenly spaced."""
    levels = grid.levels()
    assert levels.numel() == grid.size == (3 if grid.bits == "ternary" else 2**grid.bits)
    assert set(levels.diff().tolist()) == {grid.step}


@pytest.mark.parametrize(
    ("bits", "storage"), [(1, 1.0), ("ternary", 1.6), (2, 2.0), (5, 5.0), (8, 8.0)]
)
def test_storage_bits(bits, storage):
    """A code takes its bits, a ternary code a fifth of a byte."""
    assert make_grid(bits).storage_bits == storage


def test_every_width_has_a_grid_and_is_a_value():
    """Grids are equal and hash alike when their bits and kind are the same."""
    assert len({make_grid(bits) for bits in [*BITS, *BITS]}) == len(BITS)


@pytest.mark.parametrize(
    ("bits", "kind", "fragment"),
    [
        (0, "integer", "bits = 0 is not a width that askewq can train; use 1, ternary, 2, 3"),
        (9, "integer", "bits = 9 is not"),
        (-2, "integer", "bits = -2 is not"),
        (1.58, "integer", "bits = 1.58 is not"),
        ("4", "integer", "bits = '4' is not"),
        ("binary", "integer", "bits = 'binary' is not"),
        (True, "integer", "bits = True is not"),
        (None, "integer", "bits = None is not"),
        (2, "float", "grid = 'float' is unknown; use 'auto', 'integer' or 'half-integer'"),
        (1, "half-integer", "whose one grid is {-1, +1}; leave out the grid"),
        ("ternary", "half-integer", "whose one grid is {-1, 0, +1}; leave out the grid"),
    ],
)
def test_grids_that_do_not_exist(bits, kind, fragment):
    """The error says what was given and what is allowed."""
    with pytest.raises(RecipeError) as error:
        make_grid(bits, kind)
    assert fragment in str(error.value)


@given(grid=grids, data=st.data())
def test_codes_name_the_nearest_level(grid, data):
    """No level, tried one by one, is nearer to a weight than the one its code stands for."""
    weight, scale = data.draw(weights_and_scales(grid))
    codes = grid.codes(weight, scale)
    assert codes.dtype == torch.uint8
    assert codes.shape == weight.shape
    rows = weight.reshape(scale.numel(), -1)
    for row, s, row_codes in zip(
        rows.tolist(), scale.flatten().tolist(), codes.reshape(rows.shape).tolist(), strict=True
    ):
        levels = [level * s for level in grid.levels().tolist()]
        for w, code in zip(row, row_codes, strict=True):
            nearest = min(abs(w - level) for level in levels)
            assert abs(w - levels[code]) <= nearest + 1e-12 * s * grid.size


@given(grid=grids, data=st.data())
def test_coordinates_count_levels(grid, data):
    """A coordinate k + z lies between the codes k and k + 1 of the levels around the weight."""
    weight, scale = data.draw(weights_and_scales(grid))
    x = grid.coordinate(weight, scale)
    assert x.shape == weight.shape
    s = scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
    for w, unit, coordinate in zip(*(t.flatten().tolist() for t in (weight, s, x)), strict=True):
        a, b = bracket(w, [level * unit for level in grid.levels().tolist()])
        assert a <= b
        expected = (a / unit - grid.first) / grid.step + (w - a) / (grid.step * unit)
        assert coordinate == pytest.approx(expected, abs=1e-9)


@given(grid=grids, scale=scales, dtype=st.sampled_from([torch.float32, torch.float64]), seed=seeds)
def test_codes_survive_their_values(grid, scale, dtype, seed):
    """codes(values(codes)) == codes for every code, over 24 orders of magnitude of the scale."""
    codes = torch.arange(grid.size, dtype=torch.uint8).repeat(3, 2)
    factors = torch.rand(3, 2, generator=torch.Generator().manual_seed(seed)) + 0.5
    scale_rows = (scale * factors).to(dtype)
    values = grid.values(codes, scale_rows)
    assert values.dtype == dtype
    assert torch.equal(grid.codes(values, scale_rows), codes)


@given(grid=grids, data=st.data(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_snapping_twice_changes_nothing(grid, data, dtype):
    """A snapped weight is a fixed point of the snap, bit for bit."""
    weight, scale = (tensor.to(dtype) for tensor in data.draw(weights_and_scales(grid)))
    once = grid.snap(weight, scale)
    twice = grid.snap(once, scale)
    assert once.dtype == dtype
    assert torch.equal(once, twice)
    assert torch.equal(once.signbit(), twice.signbit())


@every_grid
def test_values_are_one_multiplication(grid):
    """A value is level * scale rounded once, so it has the same bits wherever it is computed."""
    scale = torch.tensor([[0.1], [0.7], [1 / 3]])
    codes = torch.arange(grid.size, dtype=torch.uint8).repeat(3, 1)
    for row, s in zip(grid.values(codes, scale), scale, strict=True):
        assert torch.equal(row, grid.levels() * s)


def test_rows_of_groups_are_consecutive_weights():
    """With groups every scale covers consecutive weights of one output channel."""
    grid = make_grid(2, "integer")
    scale = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    weight = torch.tensor([[1.0, -2.0, 10.0, -20.0], [100.0, -200.0, 1000.0, -2000.0]])
    assert grid.codes(weight, scale).tolist() == [[3, 0, 3, 0], [3, 0, 3, 0]]
    assert torch.equal(grid.snap(weight, scale), weight)


@pytest.mark.parametrize(
    ("shape", "group_size", "expected"),
    [
        ((8, 4), "tensor", (1, 1)),
        ((8, 4), "channel", (8, 1)),
        ((8, 4), 4, (8, 1)),
        ((8, 4), 2, (8, 2)),
        ((8, 4), 1, (8, 4)),
        ((16, 3, 3, 3), 9, (16, 3)),
        ((16, 3, 3, 3), 27, (16, 1)),
        ((1, 5), "channel", (1, 1)),
    ],
)
def test_scale_shape(shape, group_size, expected):
    """A scale has a row per output channel and a column per group, or is one for the tensor."""
    assert scale_shape(torch.Size(shape), group_size) == expected


@pytest.mark.parametrize(
    ("group_size", "fragment"),
    [
        (0, "group_size = 0: use 'channel', 'tensor' or a positive number of weights"),
        (-4, "group_size = -4: use"),
        ("row", "group_size = 'row': use"),
        (True, "group_size = True: use"),
        (2.0, "group_size = 2.0: use"),
        (5, "group_size = 5 does not divide the 12 weights of an output channel of shape (8, 12)"),
        (24, "use a divisor of 12, or 'channel'"),
    ],
)
def test_group_sizes_that_do_not_exist(group_size, fragment):
    """The error names the group size, the row that it does not divide, and the way out."""
    with pytest.raises(RecipeError) as error:
        scale_shape(torch.Size((8, 12)), group_size)
    assert fragment in str(error.value)


def squared_errors(row: torch.Tensor, grid: Grid, candidates: torch.Tensor) -> torch.Tensor:
    """Return the squared rounding error of one float64 row under each candidate scale."""
    levels = grid.levels().double()
    errors = []
    for chunk in candidates.split(max(1, 200_000 // row.numel())):
        units = row / chunk.unsqueeze(1)
        middles = (levels[1:] + levels[:-1]) / 2
        rounded = levels[torch.bucketize(units, middles)]
        errors.append((row - rounded * chunk.unsqueeze(1)).square().sum(dim=1))
    return torch.cat(errors)


def assert_fitted(weight: torch.Tensor, grid: Grid, scale: torch.Tensor, tries: int) -> None:
    """Compare every row's squared error with the best of a dense scan of scales."""
    rows = weight.double().reshape(scale.numel(), -1)
    largest_level = grid.levels().abs().max().item()
    for i, (row, fitted) in enumerate(zip(rows, scale.double().flatten(), strict=True)):
        low = 0.2 * row.square().mean().sqrt() / largest_level
        high = 3 * row.abs().max() / min(grid.levels()[0].abs(), grid.levels()[-1].abs())
        scan = torch.logspace(low.log10(), high.log10(), tries, dtype=torch.float64)
        best = squared_errors(row, grid, scan).min()
        error = squared_errors(row, grid, fitted.reshape(1))[0]
        rounding = 2**-22 * row.square().sum()  # of the scale to 11 bits
        assert error <= 1.01 * best + rounding, f"row {i}: {error:.4g} where {best:.4g} is possible"


def heavy_tailed(seed: int, *shape: int) -> torch.Tensor:
    """Return Student's t numbers with 3 degrees of freedom."""
    spread = random_tensor(seed + 1, 3, *shape, dtype=torch.float32).square().mean(dim=0).sqrt()
    return random_tensor(seed, *shape, dtype=torch.float32) / spread


def skewed_rows(seed: int, *shape: int) -> torch.Tensor:
    """Return positive numbers only, so that half of the grid is of no use."""
    return random_tensor(seed, *shape, dtype=torch.float32).abs()


def normal_rows(seed: int, *shape: int) -> torch.Tensor:
    """Return normal numbers."""
    return random_tensor(seed, *shape, dtype=torch.float32)


@pytest.mark.parametrize("rows", [normal_rows, heavy_tailed, skewed_rows])
@pytest.mark.parametrize("columns", [1, 2, 9, 27, 64, 300])
@every_grid
def test_fitted_scale_is_within_one_percent_of_the_best(grid, columns, rows):
    """The squared error of every row is at most 1 % above the best found by brute force."""
    weight = rows(columns, 3, columns)
    assert_fitted(weight, grid, fit_scale(weight, grid), tries=3000)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fitted_scale_of_long_rows(bits):
    """Rows as long as those of real layers are fitted as well as short ones."""
    weight = torch.cat([normal_rows(0, 1, 4608), heavy_tailed(1, 1, 4608)])
    assert_fitted(weight, make_grid(bits), fit_scale(weight, make_grid(bits)), tries=1000)


@pytest.mark.parametrize("grid", [g for g in GRIDS if g.bits in (7, 8)], ids=grid_name)
def test_fitted_scale_of_rows_that_end_at_an_edge(grid):
    """Uniform weights, as those of a new layer, and two narrow peaks: within 5 % of the sweep's."""
    draw = torch.Generator().manual_seed(0)
    uniform = torch.rand(6, 1100, generator=draw) * 2 - 1
    peaks = (torch.rand(6, 1100, generator=draw) < 0.5).float() * 2 - 1
    weight = torch.cat([uniform, peaks + 0.05 * torch.randn(6, 1100, generator=draw)]).double()
    assert weight.shape[1] * grid.size // 2 > SWEEP_UP_TO
    for row, found, exact in zip(
        weight, fit_scale(weight, grid), _sweep(weight, grid), strict=True
    ):
        error, least = squared_errors(row, grid, torch.stack([found.squeeze(), exact]))
        assert error <= 1.05 * least


@pytest.mark.parametrize("columns", [2, 9, 27, 64])
@pytest.mark.parametrize("grid", [g for g in GRIDS if g.bits not in (7, 8)], ids=grid_name)
def test_the_sweep_is_exact(grid, columns):
    """No scale of a fine scan has a smaller error, by more than float64 rounds."""
    rows = normal_rows(columns, 3, columns).double()
    for row, scale in zip(rows, best_scale(rows, grid), strict=True):
        scan = scale * torch.logspace(-1, 1, 2001, dtype=torch.float64)
        smallest = squared_errors(row, grid, scan).min()
        assert squared_errors(row, grid, scale.reshape(1))[0] <= smallest * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("magnitude", [2.0**-80, 2.0**80])
def test_the_scan_scales_with_the_weights(magnitude):
    """Squares of tiny or huge weights in rows too long for the sweep stay within float32."""
    grid, weight = make_grid(8), normal_rows(5, 2, 700)
    assert weight.shape[1] * grid.size // 2 > SWEEP_UP_TO
    expected = fit_scale(weight, grid).double() * magnitude
    found = fit_scale(weight * magnitude, grid).double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("bits", ["ternary", 2, 3])
def test_an_outlier_does_not_hide_the_best_scale(bits):
    """One weight a thousand times the others leaves the fit within 1 % of the best."""
    weight = normal_rows(2, 2, 200)
    weight[0, 7] = 1000.0
    weight[1, 11] = 12.0
    assert_fitted(weight, make_grid(bits), fit_scale(weight, make_grid(bits)), tries=6000)


@given(seed=seeds, shape=st.tuples(st.integers(1, 5), st.integers(1, 40)), scale=scales)
@hypothesis.settings(max_examples=30)
def test_one_bit_has_the_closed_form(seed, shape, scale):
    """For levels -1 and +1 the best scale is the mean absolute weight of the row, in 11 bits."""
    weight = scale * random_tensor(seed % 1000, *shape)
    expected = torch.tensor([[math.fsum(map(abs, row)) / len(row)] for row in weight.tolist()])
    fitted = fit_scale(weight, make_grid(1))
    torch.testing.assert_close(fitted, expected.double(), rtol=2**-11, atol=0)


# From the least normal float32 to near the largest: rows of all these are fitted side by side.
magnitudes = st.floats(2.0**-126, 2.0**126)


@given(
    grid=grids, magnitude=magnitudes, seed=seeds, shape=st.sampled_from([(3, 1), (3, 7), (3, 40)])
)
def test_fitted_scales_are_fp16_numbers(grid, magnitude, seed, shape):
    """Eleven significant bits: within fp16's normal range a scale is an fp16 number, always > 0."""
    weight = (magnitude * random_tensor(seed % 1000, *shape)).float().clamp(-3e38, 3e38)
    weight[0] = weight[0].clamp(0, 1)  # a row that may be all zeros
    scale = fit_scale(weight, grid)
    assert bool(((scale > 0) & torch.isfinite(scale)).all())
    fraction, _ = torch.frexp(scale)
    assert torch.equal(fraction * 2**11, (fraction * 2**11).round())
    normal = (scale >= 2.0**-14) & (scale <= 65504)
    assert torch.equal(scale[normal].half().float(), scale[normal])


@pytest.mark.parametrize("value", [3.4e38, torch.finfo(torch.float32).max])
@every_grid
def test_the_largest_weights_have_a_finite_scale(grid, value):
    """A scale never rounds up to infinity."""
    assert torch.isfinite(fit_scale(torch.full((1, 4), value), grid)).all()


@given(grid=grids, seed=seeds, shape=st.sampled_from([(3, 1), (3, 2), (3, 9), (3, 70)]))
def test_rounding_the_scale_costs_no_more_than_theory_allows(grid, seed, shape):
    """The squared error grows by at most 2^-22 of the row's squared norm."""
    weight = random_tensor(seed % 1000, *shape)
    rounded = fit_scale(weight, grid)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("askewq.grid.SCALE_DIGITS", 52)
        exact = fit_scale(weight, grid)
    errors = [(weight - grid.snap(weight, s)).square().sum(1) for s in (rounded, exact)]
    assert bool((errors[0] <= errors[1] + (2**-22 + 1e-12) * weight.square().sum(1)).all())


@pytest.mark.parametrize("group_size", ["tensor", "channel", 9, 3])
@every_grid
def test_each_row_is_fitted_by_itself(grid, group_size):
    """A row's scale depends on the weights of this row alone, whatever the rows are."""
    weight = random_tensor(3, 4, 2, 3, 3, dtype=torch.float32)
    scale = fit_scale(weight, grid, group_size)
    assert tuple(scale.shape) == scale_shape(weight.shape, group_size)
    rows = weight.reshape(scale.numel(), -1)
    alone = torch.cat([fit_scale(row.reshape(1, -1), grid) for row in rows])
    torch.testing.assert_close(scale.reshape(-1, 1), alone, rtol=1e-6, atol=0)


@every_grid
def test_zero_rows_get_a_tiny_positive_scale(grid):
    """A row of zeros has levels that are zeros for every purpose, and spoils no other row."""
    weight = random_tensor(4, 3, 8, dtype=torch.float32)
    weight[1] = 0
    scale = fit_scale(weight, grid)
    assert 0 < scale[1] < 1e-30
    assert torch.isfinite(scale).all()
    assert grid.snap(weight, scale)[1].abs().max() < 1e-27
    assert torch.equal(scale[::2], fit_scale(weight[::2], grid))


@pytest.mark.parametrize("magnitude", [1e-20, 1e-6, 1e6, 1e20])
@every_grid
def test_the_fit_scales_with_the_weights(grid, magnitude):
    """Weights in another unit get the same scale in that unit."""
    weight = random_tensor(5, 2, 33, dtype=torch.float32)
    expected = fit_scale(weight, grid).double() * magnitude
    fitted = fit_scale(weight * magnitude, grid).double()
    torch.testing.assert_close(fitted, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("given_type", "fitted_type"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_type_of_the_scale(given_type, fitted_type):
    """Scales are float32, and float64 only for float64 weights; the weight is left alone."""
    weight = torch.nn.Parameter(random_tensor(6, 2, 16).to(given_type))
    before = weight.detach().clone()
    scale = fit_scale(weight, make_grid(3))
    assert scale.dtype == fitted_type
    assert not scale.requires_grad
    assert torch.equal(weight, before)


@given(grid=grids, data=st.data())
def test_codes_are_those_of_the_nearest_level(grid, data):
    """Codes are the constraint's own nearest level, half-way up, for every kind of row."""
    weight, scale = data.draw(weights_and_scales(grid))
    expected = constraint.nearest(grid.coordinate(weight, scale), grid.last)
    assert torch.equal(grid.codes(weight, scale), expected.to(torch.uint8))


@pytest.mark.parametrize("rows", [1, 3, 70_000])
def test_codes_of_more_weights_than_a_piece(rows):
    """The pieces that codes are made in do not show, whether rows are long or many."""
    grid = make_grid(3)
    weight = torch.randn(rows, 210_000 // rows)
    scale = 0.2 + torch.rand(rows, 1)
    expected = constraint.nearest(grid.coordinate(weight, scale), grid.last)
    assert torch.equal(grid.codes(weight, scale), expected.to(torch.uint8))
