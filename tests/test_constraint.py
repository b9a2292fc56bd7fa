"""The constraint against the paper's one-dimensional problem, solved independently."""

import math

import pytest
import torch
from conftest import coordinates, pulls, random_tensor, relative_eps
from hypothesis import assume, given
from hypothesis import strategies as st
from reference import psi, psi_slope, velocity

from askewq import constraint

LEVELS = [0.0, 1.0, 2.0, 3.0]
LAST = 3
updates = st.floats(-3, 3)


def float64(number: float) -> torch.Tensor:
    return torch.tensor(number, dtype=torch.float64)


def skewed(x: float, update: float, eps: float, pull: float, clip: float = math.inf) -> float:
    """Return the displacement that the fast code makes of one update."""
    keep, drift = constraint.skew(float64(x), float64(update), LAST, eps, pull=pull, clip=clip)
    return update if keep else drift.item()


def decidable(x: float, eps: float) -> bool:
    """Tell whether rounding leaves no doubt on which side of the border x is."""
    slack = 16 * psi(x, LEVELS, eps)
    return slack == 0 or abs(slack) > 1e-12


@given(x=coordinates(LAST), eps=relative_eps)
def test_slack_and_slope_are_the_papers(x, eps):
    """Slack and slope equal psi and psi' in units of h^4 / 16, inside and outside the grid."""
    slack, slope = constraint.slack(float64(x), LAST, eps)
    assert slack.item() == pytest.approx(16 * psi(x, LEVELS, eps), rel=1e-12, abs=1e-12)
    assert slope.item() == pytest.approx(16 * psi_slope(x, LEVELS), rel=1e-12, abs=1e-12)


@given(x=coordinates(LAST), eps=relative_eps)
def test_slope_is_the_derivative_of_the_slack(x, eps):
    """The slope agrees with a finite difference wherever psi is smooth."""
    h = 1e-6
    assume(min(abs(x), abs(x - LAST)) > 2 * h)
    (left, right), _ = constraint.slack(
        torch.tensor([x - h, x + h], dtype=torch.float64), LAST, eps
    )
    _, slope = constraint.slack(float64(x), LAST, eps)
    assert slope.item() == pytest.approx((right - left).item() / (2 * h), rel=1e-4, abs=1e-4)


@given(x=coordinates(LAST), update=updates, eps=relative_eps, pull=pulls)
def test_velocity_is_the_closed_form_of_the_projection(x, update, eps, pull):
    """Before clipping it is the update, moved to the nearer end of the half-line V if outside."""
    assume(decidable(x, eps))
    slack, slope = 16 * psi(x, LEVELS, eps), 16 * psi_slope(x, LEVELS)
    result = skewed(x, update, eps, pull)
    if slack > 0 or (slack == 0 and slope == 0):
        expected = update
    elif slope == 0:
        expected = math.inf  # V is empty half-way between levels: the convention, unclipped
    else:
        end = -pull * slack / slope
        expected = max(update, end) if slope > 0 else min(update, end)
    assert result == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(x=coordinates(LAST), update=updates, eps=relative_eps, pull=pulls)
def test_no_velocity_in_the_set_is_closer(x, update, eps, pull):
    """Nothing in V, sought by brute force, is closer to the proposed update than the result."""
    slack, slope = 16 * psi(x, LEVELS, eps), 16 * psi_slope(x, LEVELS)
    assume(decidable(x, eps) and not (slack < 0 and slope == 0))
    result = skewed(x, update, eps, pull)
    reach = abs(update) + abs(result) + 1
    candidates = torch.linspace(-reach, reach, 2001, dtype=torch.float64)
    bound = -pull * slack
    if slack <= 0:
        candidates = candidates[candidates * slope >= bound]
        assert result * slope >= bound - 1e-9 * max(1, abs(bound))
    gaps = (candidates - update).abs()
    assert abs(result - update) <= gaps.min().item() * (1 + 1e-9) + 1e-12


@given(x=coordinates(LAST), update=updates, eps=relative_eps, pull=pulls, clip=st.floats(1e-6, 1))
def test_drift_is_clipped(x, update, eps, pull, clip):
    """A drift is the unclipped one, cut at `clip` on either side; a kept update is never cut."""
    assume(decidable(x, eps))
    keep, drift = constraint.skew(float64(x), float64(update), LAST, eps, pull=pull, clip=clip)
    free, unclipped = constraint.skew(
        float64(x), float64(update), LAST, eps, pull=pull, clip=math.inf
    )
    assert keep == free
    if not keep:
        assert abs(drift.item()) <= clip
        assert drift.item() == max(-clip, min(clip, unclipped.item()))


@given(x=coordinates(LAST), update=updates, eps=relative_eps, pull=pulls, clip=st.floats(1e-6, 1))
def test_velocity_is_the_references(x, update, eps, pull, clip):
    """The scalar reference, in other units and other words, gives the same displacement."""
    assume(decidable(x, eps))
    expected = velocity(x, update, LEVELS, eps, pull, clip)
    assert skewed(x, update, eps, pull, clip) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("update", [-0.3, 0.0, 0.3])
@pytest.mark.parametrize("level", range(LAST))
def test_half_way_goes_up_by_the_clip(dtype, update, level):
    """Exactly half-way between levels, where psi' = 0, the drift is +clip, by convention."""
    x = torch.tensor(level + 0.5, dtype=dtype)
    keep, drift = constraint.skew(
        x, torch.tensor(update, dtype=dtype), LAST, 0.5, pull=0.5, clip=0.125
    )
    assert not keep
    assert drift == 0.125


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_half_way_is_free_at_eps_one(dtype):
    """With eps = 1 even the exact middle between two levels keeps its update."""
    keep, _ = constraint.skew(
        torch.tensor([0.5, 1.5], dtype=dtype), torch.tensor([-0.1, 0.1], dtype=dtype),
        LAST, 1.0, pull=0.5, clip=0.1,
    )  # fmt: skip
    assert keep.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_inside_the_grid_is_bound_at_eps_one(dtype):
    """With eps = 1 no weight within the grid is held back, however close to half-way it is."""
    offsets = torch.linspace(-1e-3, 1e-3, 20001, dtype=torch.float64).to(dtype)
    x = torch.cat([level + 0.5 + offsets for level in range(LAST)])
    x = torch.cat([x, torch.linspace(0, LAST, 10001, dtype=torch.float64).to(dtype)])
    for update in (1e-6, -1e-6):
        keep, _ = constraint.skew(x, torch.full_like(x, update), LAST, 1.0, pull=0.5, clip=0.1)
        assert keep.all(), f"{int((~keep).sum())} of {keep.numel()} weights are not free"


@given(seed=st.integers(0, 1000))
def test_one_eps_per_weight_is_that_many_calls(seed):
    """A tensor of eps does what one call per weight with its own eps does."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(3, 5, generator=generator, dtype=torch.float64) * 5 - 1
    update = random_tensor(seed, 3, 5)
    eps = torch.rand(3, 5, generator=generator, dtype=torch.float64)
    eps[0, 0], eps[0, 1] = 0.0, 1.0
    keep, drift = constraint.skew(x, update, LAST, eps, pull=0.4, clip=0.1)
    for i in range(3):
        for j in range(5):
            one_keep, one_drift = constraint.skew(
                x[i, j], update[i, j], LAST, eps[i, j].item(), pull=0.4, clip=0.1
            )
            assert keep[i, j] == one_keep
            torch.testing.assert_close(drift[i, j], one_drift, rtol=1e-12, atol=1e-12)


def test_numbers_and_tensors_are_the_same_bounds():
    """Last level, eps, pull and clip may be numbers or 0-d tensors, with the same result."""
    x, update = random_tensor(0, 200) * 3, random_tensor(1, 200)
    numbers = (3.0, 0.3), {"pull": 0.4, "clip": 0.1}
    tensors = tuple(map(float64, numbers[0])), {k: float64(v) for k, v in numbers[1].items()}
    results = [constraint.skew(x, update, *args, **flags) for args, flags in (numbers, tensors)]
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-12, atol=1e-12)
    assert not results[0][0].all()
    assert results[0][0].any()


@given(eps=relative_eps)
def test_eps_of_inverts_radius_of(eps):
    """A relative eps survives the way over its radius and back."""
    radius = constraint.radius_of(eps)
    assert 0 <= radius <= 0.5
    assert constraint.eps_of(radius) == pytest.approx(eps, rel=1e-6, abs=1e-12)


@given(radius=st.floats(1e-6, 0.5))
def test_radius_of_inverts_eps_of(radius):
    """A radius survives the way over its relative eps and back."""
    # near 1/2 the radius is a square root of what is left of eps, so half the digits remain
    assert constraint.radius_of(constraint.eps_of(radius)) == pytest.approx(radius, abs=1e-7)


@pytest.mark.parametrize(("radius", "eps"), [(0.0, 0.0), (0.5, 1.0), (0.25, 0.5625)])
def test_radius_and_eps_at_known_points(radius, eps):
    """On the grid, free, and half of the way between them, both are known exactly."""
    assert constraint.eps_of(radius) == eps
    assert constraint.radius_of(eps) == radius


@given(radius=st.floats(0, 0.5), offset=st.floats(-0.5, 0.5), level=st.integers(1, LAST - 1))
def test_feasible_is_within_the_radius(radius, offset, level):
    """Between levels psi >= 0 exactly where the distance to a level is at most the radius."""
    assume(abs(abs(offset) - radius) > 1e-7)
    slack, _ = constraint.slack(float64(level + offset), LAST, constraint.eps_of(radius))
    assert (slack.item() >= 0) == (abs(offset) <= radius)


@given(eps=relative_eps, beyond=st.floats(0, 1), above=st.booleans())
def test_feasible_outside_is_within_a_quarter_of_the_root_of_eps(eps, beyond, above):
    """Outside the grid psi >= 0 exactly up to sqrt(eps) / 4 spacings from the last level."""
    assume(abs(beyond - math.sqrt(eps) / 4) > 1e-9)
    slack, _ = constraint.slack(float64(LAST + beyond if above else -beyond), LAST, eps)
    assert (slack.item() >= 0) == (beyond <= math.sqrt(eps) / 4)


@given(x=coordinates(LAST))
def test_nearest_is_the_nearest_level(x):
    """No level is nearer than the one returned; half-way, the upper one is."""
    level = constraint.nearest(float64(x), LAST).item()
    assert level in LEVELS
    assert abs(x - level) <= min(abs(x - other) for other in LEVELS) + 1e-15
    if x % 1 == 0.5 and 0 < x < LAST:
        assert level == x + 0.5


@pytest.mark.parametrize("as_tensor", [False, True])
def test_clamp_takes_numbers_and_tensors(as_tensor):
    """Bounds may be numbers or 0-d tensors; NaN passes through as with torch.clamp."""
    low, high = (float64(-1.0), float64(2.0)) if as_tensor else (-1.0, 2.0)
    x = torch.tensor([-3.0, -1.0, 0.5, 2.0, 7.0, math.nan], dtype=torch.float64)
    expected = torch.clamp(x, -1.0, 2.0)
    torch.testing.assert_close(
        constraint.clamp(x, low, high), expected, rtol=0, atol=0, equal_nan=True
    )
