"""Each method against its published equations: scalar loops, brute force over a fine line."""

import copy
import functools
import math
import pickle
import warnings

import builders
import pytest
import torch
import yaml
from builders import finetune
from conftest import grid_name
from hypothesis import given, settings
from hypothesis import strategies as st

import askewq
from askewq import choices, config, kernels, layers, methods, recipe_files, rivals
from askewq.errors import ModelError, RecipeError
from askewq.grid import fit_scale, make_grid
from askewq.methods import RIVALS

GRIDS = [make_grid(1), make_grid("ternary"), make_grid(2, "integer"), make_grid(2, "half-integer")]
GRIDS += [make_grid(4)]
grids = st.sampled_from(GRIDS)
# The highest level of each of them: LSQ's Q_P.
HIGHEST = {(1, -1): 1, ("ternary", -1): 1, (2, -2): 1, (2, -1.5): 1.5, (4, -8): 7}
SAWB_GRIDS = [(1,), ("ternary",), (2,), (2, "half-integer"), (3,), (3, "half-integer")]
SAWB_GRIDS += [(4,), (4, "half-integer")]
ANY_BITS = [name for name, rival in RIVALS.items() if len(rival.bits) > 1]


def rows(seed: int, shape: tuple[int, int] = (3, 40)) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights around the grids' range, and scales."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(shape[0], 1, generator=generator, dtype=torch.float64) + 0.5
    weight = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return weight, scale


def nearest(value: float, scale: float, grid) -> float:
    """Return the nearest level by trying them all."""
    levels = [(grid.first + grid.step * code) * scale for code in range(grid.size)]
    return min(levels, key=lambda level: abs(level - value))


def distance(z: torch.Tensor, scale: float, grid) -> torch.Tensor:
    """Return the distance of every z to its nearest level."""
    levels = grid.levels().to(z) * scale
    return (z[:, None] - levels).abs().amin(1)


def gradient(view, weight, scale, grid, strength=0.0):
    """Return a view's value and the gradient that reaches weight and scale for a fixed loss."""
    weight, scale = weight.clone().requires_grad_(), scale.clone().requires_grad_()
    value = view(weight, scale, grid, strength)
    loss_gradient = torch.sin(torch.arange(weight.numel(), dtype=weight.dtype)).view(weight.shape)
    value.backward(loss_gradient)
    return value.detach(), weight.grad, scale.grad, loss_gradient


@given(st.integers(0, 999), grids)
@settings(deadline=None, max_examples=30)
def test_binaryconnect(seed, grid):
    """The nearest level forward, the identity backward, the range of the grid afterwards."""
    weight, scale = rows(seed)
    value, grad, _, given_gradient = gradient(methods.binaryconnect, weight, scale, grid)
    kept = methods.clip(weight, scale, grid, 0.0)
    assert torch.equal(grad, given_gradient)
    for i, row in enumerate(weight.tolist()):
        s = scale[i].item()
        lowest, highest = grid.first * s, (grid.first + grid.step * grid.last) * s
        for j, w in enumerate(row):
            assert value[i, j].item() == pytest.approx(nearest(w, s, grid), abs=1e-12)
            assert kept[i, j].item() == pytest.approx(min(max(w, lowest), highest), abs=1e-12)


@given(st.integers(0, 999), grids)
@settings(deadline=None, max_examples=30)
def test_lsq(seed, grid):
    """Esser et al. 2020, equations 2, 3 and 5: rounding passes, clipping blocks, s learns."""
    weight, scale = rows(seed)
    value, grad, of_scale, given_gradient = gradient(methods.lsq, weight, scale, grid)
    low, high = grid.first, grid.first + grid.step * grid.last
    for i, row in enumerate(weight.tolist()):
        s = scale[i].item()
        total = 0.0
        for j, w in enumerate(row):
            g, v = given_gradient[i, j].item(), w / s
            units = nearest(v, 1.0, grid)
            assert value[i, j].item() == pytest.approx(units * s, abs=1e-12)
            assert grad[i, j].item() == (g if low < v < high else 0.0)
            total += g * (units - v if low < v < high else units)
        factor = 1 / math.sqrt(len(row) * HIGHEST[grid.bits, grid.first])
        assert of_scale[i].item() == pytest.approx(factor * total, rel=1e-9, abs=1e-9)


def assert_minimises(weight, found, scale, grid, penalty):
    """Check on a fine line that no z has less (z - w)^2 / 2 + penalty(distance) than found."""
    line = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    everywhere = penalty(distance(line, scale.item(), grid))
    at_found = (found[0] - weight[0]) ** 2 / 2 + penalty(distance(found[0], scale.item(), grid))
    for w, cost in zip(weight[0], at_found, strict=True):
        assert cost <= ((line - w) ** 2 / 2 + everywhere).min() + 1e-7


@given(st.integers(0, 999), grids, st.floats(0.01, 0.4))
@settings(deadline=None, max_examples=20)
def test_proxquant_is_a_proximal_step(seed, grid, strength):
    """Bai et al. 2019: the step minimises (z - w)^2 / 2 + t |z - nearest level|."""
    weight, scale = rows(seed, (1, 12))
    found = methods.proxquant(weight, scale, grid, strength)
    length = strength * scale.item() * grid.step
    assert_minimises(weight, found, scale, grid, lambda away: length * away)


@given(st.integers(0, 999), grids, st.floats(0.1, 100))
@settings(deadline=None, max_examples=20)
def test_binaryrelax_is_a_relaxed_projection(seed, grid, strength):
    """Yin et al. 2018: x minimises (z - y)^2 / 2 + strength dist(z, levels)^2 / 2."""
    weight, scale = rows(seed, (1, 12))
    value, grad, _, given_gradient = gradient(methods.binaryrelax, weight, scale, grid, strength)
    assert torch.equal(grad, given_gradient)
    assert_minimises(weight, value, scale, grid, lambda away: strength * away**2 / 2)


@given(st.integers(0, 999), grids, st.floats(0, 0.5))
@settings(deadline=None, max_examples=20)
def test_the_lazy_form_sees_the_projection_on_the_intervals(seed, grid, radius):
    """The forward pass sees the point of the constraint set nearest to the latent weight."""
    weight, scale = rows(seed, (1, 12))
    value, grad, _, given_gradient = gradient(methods.lazy_projection, weight, scale, grid, radius)
    assert torch.equal(grad, given_gradient)
    s = scale.item()
    levels = grid.levels().double() * s
    line = torch.linspace(levels[0].item(), levels[-1].item(), 200_001, dtype=torch.float64)
    feasible = line[distance(line, s, grid) <= radius * s * grid.step + 1e-12]
    feasible = torch.cat([feasible, levels])
    for w, x in zip(weight[0].tolist(), value[0].tolist(), strict=True):
        here = torch.tensor([x], dtype=torch.float64)
        assert distance(here, s, grid).item() <= radius * s * grid.step + 1e-9
        assert abs(x - w) <= (feasible - w).abs().min().item() + 1e-3


@pytest.mark.parametrize("project", [methods.lazy_projection, kernels.lazy_projection])
@pytest.mark.parametrize("grid", GRIDS, ids=grid_name)
def test_a_lazy_interval_of_no_width_is_its_level(grid, project):
    """With radius 0 the forward pass sees the levels, to the bit, compiled or not."""
    weight, scale = rows(1, (40, 50))
    for factor in (1.0, 1e-3, 3.7e5):
        seen = project(factor * weight, factor * scale, grid, 0.0)
        assert torch.equal(seen, grid.snap(factor * weight, factor * scale))


@pytest.mark.parametrize("grid", GRIDS, ids=grid_name)
def test_the_compiled_projection_is_the_eager_one(grid):
    """One pass over memory gives the same points, to the bit, and the same gradient."""
    assert kernels.can_compile("cpu"), "without a compiler this test compares nothing"
    weight, scale = rows(2, (30, 70))
    for radius in (0.5, 0.3, 0.011, 0.0):
        eager, compiled = (
            gradient(project, weight, scale, grid, radius)
            for project in (methods.lazy_projection, kernels.lazy_projection)
        )
        for one, other in zip(eager[:2], compiled[:2], strict=True):
            assert torch.equal(one, other)


def test_binaryrelax_ends_on_the_levels():
    """In its second phase, strength infinite, the forward pass sees levels alone."""
    weight, scale = rows(1)
    grid = make_grid(2, "integer")
    value = methods.binaryrelax(weight, scale, grid, math.inf)
    assert torch.equal(value, grid.snap(weight, scale))


@pytest.mark.parametrize("grid", [make_grid(*key) for key in SAWB_GRIDS], ids=str)
def test_sawb_finds_nearly_the_best_scale_of_a_normal_row(grid):
    """Choi et al. 2018: two moments give the scale, within the fit's error of the best one."""
    row = torch.randn(1, 50_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    best = fit_scale(row, grid, "channel").item()
    assert methods.sawb(row, grid).item() == pytest.approx(best, rel=0.12)
    assert methods.sawb(3 * row, grid).item() == pytest.approx(3 * methods.sawb(row, grid).item())


@pytest.mark.parametrize(
    ("bits", "highest", "c1", "c2"), [(2, 1.5, 3.12, 2.064), (4, 7.5, 12.1, 12.2)]
)
def test_sawb_is_the_published_formula(bits, highest, c1, c2):
    """The published clip, c1 sqrt(E w^2) - c2 E|w|, is the highest level times our scale."""
    row = torch.randn(1, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    published = c1 * row.square().mean().sqrt() - c2 * row.abs().mean()
    ours = highest * methods.sawb(row, make_grid(bits, "half-integer"))
    assert ours.item() == pytest.approx(published.item(), rel=0.015)


@pytest.mark.parametrize("row", [[0.0] * 8, [0.0] * 7 + [5.0]])
def test_sawb_gives_a_positive_scale_for_any_row(row):
    """Rows that no standard distribution resembles still have a usable scale."""
    assert (methods.sawb(torch.tensor([row]), make_grid(2, "integer")) > 0).all()


@pytest.mark.parametrize("grid", [make_grid(*key) for key in SAWB_GRIDS], ids=str)
def test_sawb_covers_the_mean_size(grid):
    """Of weights of one size none is cut off, though the two moments would give less."""
    row = torch.full((1, 7), 0.3)
    highest = methods.sawb(row, grid) * (grid.first + grid.step * grid.last)
    assert highest.item() >= 0.3 * (1 - 1e-6)


def test_luq_follows_the_weights_with_its_scale():
    """After every update the scale is SAWB's of the new weights."""
    model = small()
    askewq.quantize(model, 2)
    follower = rivals.Follower(model, "luq")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    follower.attach(optimizer)
    for layer in (model[1], model[1]):
        expected = methods.sawb(layer.latent.detach(), layer.grid)
        torch.testing.assert_close(layer.weight_scale, expected)
        layer(torch.randn(5, 8)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 7])
def test_logarithmic_gradients_are_unbiased_powers_of_two(bits, dtype):
    """LUQ: only +-top / 2^k and 0 occur, each the neighbour of its value, and the mean is right."""
    torch.manual_seed(0)
    grad = torch.tensor([1.0, -0.7, 0.3, 0.05, -0.011, 0.001, 0.0], dtype=dtype)
    draws = methods.log_quantize(grad.expand(20_000, -1), bits)
    assert draws.dtype == dtype
    grad, draws = grad.double(), draws.double()
    levels = [2.0**-k for k in range(2 ** (bits - 1) - 1)]
    assert set(draws.abs().unique().tolist()) <= {0.0, *levels}
    for value, column in zip(grad.tolist(), draws.unbind(1), strict=True):
        below = max((level for level in [0.0, *levels] if level <= abs(value)), default=0.0)
        above = min((level for level in levels if level >= abs(value)), default=0.0)
        assert set(column.abs().unique().tolist()) <= {below, above}
        error = column.std().item() / 20_000**0.5
        assert column.mean().item() == pytest.approx(value, abs=5 * error + 1e-12)


def test_a_gradient_of_zeros_stays():
    """Without a largest size there is nothing to round to."""
    assert torch.equal(methods.log_quantize(torch.zeros(5), 4), torch.zeros(5))
    assert methods.log_quantize(torch.zeros(0, 3), 4).shape == (0, 3)  # no token came
    # Of its ratio to the largest size nothing is left in float32.
    tiny = torch.tensor([10.0, 1e-45, -1e-45])
    assert methods.log_quantize(tiny, 4).tolist() == [10.0, 0.0, 0.0]
    # A gradient that is not finite stays one, so that the run finds out.
    for bad in (torch.nan, torch.inf):
        assert not methods.log_quantize(torch.tensor([1.0, -2.0, bad]), 4).isfinite().all()


def test_luq_rounds_the_gradients_of_its_layers_outputs():
    """With gradient_bits what reaches a layer's output is on the few levels of 4 bits."""
    model = small()
    askewq.quantize(model, 2)
    x = torch.randn(5, 6)
    rivals.Follower(model, "luq", gradient_bits=4)
    output = model[:2](x)
    output.backward(torch.linspace(-1, 1, output.numel()).view(output.shape))
    # The bias's gradient is the sum of what reached the output: sums of powers of two.
    scaled = model[1].bias.grad * 2**6
    assert torch.equal(scaled, scaled.round())


def adaste_of(theta: float, g: float, beta: float) -> tuple[float, float]:
    """Return what the forward pass sees and the factor of the gradient, both in units of s."""
    sign = -1.0 if theta < 0 else 1.0
    if beta >= 100:
        seen, plain, border, reach = sign, 1.0, 0.0, 1.0
    else:
        seen = max(-1.0, min(1.0, (theta + beta * 1.01 * sign) / (1 + beta)))
        plain, border, reach = 1 / (1 + beta), 1 - 0.01 * beta, (1 + 2.01 * beta) / (1 + beta)
    if abs(g) <= 1e-3 or abs(theta) <= 1e-3:
        return seen, plain
    if g * theta > 0:
        if abs(theta) <= border:
            reach = (2.02 * beta - abs(theta)) / (1 + beta)
        return seen, max(0.0, min(0.5, reach / abs(theta)))
    return seen, plain if abs(theta) <= border else 0.0


@given(st.integers(0, 999), st.sampled_from([0.01, 0.3, 2.0, 50.0, 99.0, 100.0]))
@settings(deadline=None, max_examples=60)
def test_adaste(seed, beta):
    """Le et al. 2022 as their code has it: the well's minimiser, and the adaptive gradient."""
    weight, scale = rows(seed)
    weight[:, ::5] *= 1e-4  # as good as 0
    value, grad, _, given_gradient = gradient(methods.adaste, weight, scale, make_grid(1), beta)
    for i, row in enumerate(weight.tolist()):
        s = scale[i].item()
        for j, w in enumerate(row):
            g = given_gradient[i, j].item()
            seen, factor = adaste_of(w / s, g * s, beta)
            assert value[i, j].item() == pytest.approx(seen * s, abs=1e-6)  # levels: float32
            assert grad[i, j].item() == pytest.approx(g * factor, abs=1e-12)


@pytest.mark.parametrize("theta", [-1.6, -0.7, -0.2, 0.4, 0.9, 2.5])
@pytest.mark.parametrize("beta", [0.3, 2.0, 50.0, 100.0])
def test_adaste_sees_the_minimiser_of_its_inner_problem(theta, beta):
    """Le et al. 2022: w* minimises (w - theta)^2 + beta (w - (1 + alpha) sign w)^2 on [-1, 1]."""
    line = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    cost = (line - theta) ** 2 + beta * (line - 1.01 * line.sign()) ** 2
    weight, scale = torch.full((1, 1), theta).double(), torch.ones(1, 1).double()
    seen = methods.adaste(weight, scale, make_grid(1), beta)
    assert seen.item() == pytest.approx(line[cost.argmin()].item(), abs=2e-5)


@given(st.integers(0, 999), st.floats(1, 50))
@settings(deadline=None, max_examples=30)
def test_mirror_descent(seed, strength):
    """Ajanthan et al. 2021: w = tanh(beta theta), and theta takes the gradient of w."""
    weight, scale = rows(seed)
    value, grad, _, given_gradient = gradient(
        methods.mirror_descent, weight, scale, make_grid(1), strength
    )
    assert torch.equal(grad, given_gradient)
    for i, row in enumerate(weight.tolist()):
        s = scale[i].item()
        expected = [s * math.tanh(strength * w / s) for w in row]
        assert value[i].tolist() == pytest.approx(expected, abs=1e-12)


@given(st.integers(0, 999), grids)
@settings(deadline=None, max_examples=20)
def test_projected_gradient(seed, grid):
    """Every update ends on the nearest level."""
    weight, scale = rows(seed)
    found = methods.project(weight, scale, grid, 0.0)
    for i, row in enumerate(weight.tolist()):
        expected = [nearest(w, scale[i].item(), grid) for w in row]
        assert found[i].tolist() == pytest.approx(expected, abs=1e-12)


# By progress: below the first the course is a number, from there on the last value for good.
COURSES = {
    "proxquant": ([(0.0, 0.0), (0.25, 0.00075), (0.6, 0.0018)], 2 / 3, math.inf),
    "binaryrelax": ([(0.0, 1.0), (0.4, 500**0.5), (0.6, 500**0.75)], 0.8, math.inf),
    "mirror-descent": ([(0.0, 1.0), (0.25, 20000**0.25), (0.5, 20000**0.5)], 1.0, 20_000.0),
    "adaste": ([(0.0, 0.01), (0.15, 1.0), (0.225, 10.0)], 0.3, 100.0),
}


@pytest.mark.parametrize("name", COURSES)
def test_the_coefficients_follow_their_course(name):
    """They take the values of docs/methods.md on the way, grow, and stay at the end's."""
    rival, (before, end, last) = RIVALS[name], COURSES[name]
    course = functools.partial(rival.course, rival.strength or 0.0)
    for progress, value in before:
        assert course(progress) == pytest.approx(value)
    assert course(end - 1e-6) < last
    assert [course(p) for p in (end, (end + 1) / 2, 1.0)] == pytest.approx([last] * 3)
    values = [course(i / 100) for i in range(101)]
    assert values == sorted(values)


def small() -> torch.nn.Sequential:
    """Return a small network."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 8),
        torch.nn.Linear(8, 8),
        torch.nn.Conv1d(8, 4, 1),
        torch.nn.Linear(1, 2),
    )


class TestFollower:
    def test_a_frozen_layer_keeps_its_learned_scale(self):
        """The optimizer need not have it."""
        model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(4)))
        askewq.quantize(model, 2)
        model[2].requires_grad_(False)
        follower = rivals.Follower(model, "lsq")
        assert model[1].weight_scale.requires_grad
        assert not model[2].weight_scale.requires_grad
        follower.attach(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))

    def test_tied_layers_have_one_scale_after_a_cast(self):
        """Each gets a buffer of its own then, and both follow the weight."""
        model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(4)))
        model[2].weight = model[1].weight
        askewq.quantize(model, 2)
        follower = rivals.Follower(model, "luq")
        model.double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        follower.attach(optimizer)
        before = model[2].weight_scale.clone()
        model(torch.randn(8, 4).double()).square().sum().backward()
        optimizer.step()
        assert torch.equal(model[1].weight_scale, model[2].weight_scale)
        assert not torch.equal(model[2].weight_scale, before)

    def test_gradients_are_rounded_while_it_lasts(self):
        """Once for each layer, and no longer after a snap or under another method."""
        model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(4)))
        askewq.quantize(model, 2)
        for _ in range(2):
            rivals.Follower(model, "luq", gradient_bits=2)
            assert len(model[2]._forward_hooks) == 1
        copied = copy.deepcopy(model)
        rivals.Follower(copied, "luq")
        assert not copied[2]._forward_hooks
        assert len(model[2]._forward_hooks) == 1
        askewq.snap_(model)
        assert not model[2]._forward_hooks

    @pytest.mark.parametrize("method", RIVALS)
    @pytest.mark.parametrize("progress", [0.5, 1.0])
    def test_a_weight_that_is_nan_is_seen(self, method, progress):
        """The loss says so, rather than the snap at the end."""
        model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(4)))
        askewq.quantize(model, 1)
        follower = rivals.Follower(model, method)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        follower.attach(optimizer)
        with torch.no_grad():
            model[2].latent[0, 0] = math.nan
        follower.anneal(progress)
        made = model(torch.randn(8, 4))
        assert not made.isfinite().all()
        made.square().sum().backward()
        optimizer.step()
        assert not model(torch.randn(8, 4)).isfinite().all()

    def test_the_forward_pass_sees_the_method(self):
        """A layer's forward multiplies by the view, and the Parameter stays what is trained."""
        model = small()
        plain = model[1].weight
        askewq.quantize(model, 2)
        follower = rivals.Follower(model, "binaryconnect")
        layer = model[1]
        assert layer.latent is plain
        assert dict(model.named_parameters())["1.weight"] is plain
        x = torch.randn(5, 8)
        expected = x @ layer.grid.snap(plain, layer.weight_scale).T + layer.bias
        torch.testing.assert_close(layer(x), expected)
        layer(x).sum().backward()
        torch.testing.assert_close(plain.grad, x.sum(0).expand(8, 8))
        assert follower.feasible_share() == 1

    @pytest.mark.parametrize("method", ["mirror-descent", "binaryrelax", "adaste", "proxquant"])
    def test_it_begins_where_its_course_does(self, method):
        """The first forward pass has the strength of progress 0, without a call of `anneal`."""
        model = small()
        askewq.quantize(model, 1)
        rivals.Follower(model, method)
        rule = methods.RIVALS[method]
        assert model[1].strength == rule.course(rule.strength or 0.0, 0.0)

    def test_every_step_ends_with_the_methods_part(self):
        """The hook on the optimizer settles the weights: projected ones are on levels."""
        model = small()
        askewq.quantize(model, 2)
        follower = rivals.Follower(model, "projected-gradient")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        follower.attach(optimizer)
        model[1](torch.randn(5, 8)).square().sum().backward()
        before = model[1].latent.clone()
        optimizer.step()
        layer = model[1]
        assert not torch.equal(layer.latent, before)
        assert torch.equal(layer.latent, layer.grid.snap(layer.latent, layer.weight_scale))

    def test_a_learned_scale_is_shared_by_tied_layers_and_becomes_a_buffer_again(self):
        """LSQ's scale is one Parameter for layers that share a weight, and a buffer at the end."""
        model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(4)))
        model[2].weight = model[1].weight
        askewq.quantize(model, 2)
        keys = list(model.state_dict())
        rivals.Follower(model, "lsq")
        scale = model[1].weight_scale
        assert isinstance(scale, torch.nn.Parameter)
        assert model[2].weight_scale is scale
        assert sum(p is scale for p in model.parameters()) == 1
        assert sorted(model.state_dict()) == sorted(keys)
        layers.snap_(model)
        assert not isinstance(model[1].weight_scale, torch.nn.Parameter)
        assert model[2].weight_scale is model[1].weight_scale
        assert model[1].weight is model[1].latent

    def test_a_learned_scale_stays_positive(self):
        """An update that would turn the scale over leaves it tiny."""
        model = small()
        askewq.quantize(model, 2)
        follower = rivals.Follower(model, "lsq")
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        follower.attach(optimizer)
        model[1].weight_scale.grad = torch.full_like(model[1].weight_scale, 100.0)
        optimizer.step()
        assert (model[1].weight_scale > 0).all()

    def test_learned_scales_are_not_ddps(self, tmp_path):
        """DDP, which was there before them, would let every process learn its own."""
        model = small()
        askewq.quantize(model, 2)
        store = f"file://{tmp_path}/store"
        torch.distributed.init_process_group("gloo", store, rank=0, world_size=1)
        try:
            wrapped = torch.nn.parallel.DistributedDataParallel(model)
            with pytest.raises(ModelError, match=r"Follower of model\.module, and wrap it after"):
                rivals.Follower(wrapped, "lsq")
            rivals.Follower(wrapped, "binaryconnect")
        finally:
            torch.distributed.destroy_process_group()

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda all: pickle.loads(pickle.dumps(all))])
    def test_a_copy_goes_on_as_the_original(self, copied):
        """Model, optimizer and Follower together: torch copies no hooks of an optimizer."""
        model = small()
        askewq.quantize(model, 2)
        follower = rivals.Follower(model, "projected-gradient")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        follower.attach(optimizer)
        other, its_optimizer, _ = copied((model, optimizer, follower))
        x = torch.randn(5, 8)
        for network, trains in ((model, optimizer), (other, its_optimizer)):
            network[1](x).square().sum().backward()
            trains.step()
        assert torch.equal(other[1].latent, model[1].latent)
        assert other[1].is_snapped() is False  # it follows its method
        assert torch.equal(
            other[1].latent, other[1].grid.snap(other[1].latent, other[1].weight_scale)
        )

    def test_an_optimizer_without_the_learned_scales_is_refused(self):
        """Built before the Follower it would train the weights and leave the scales."""
        model = small()
        askewq.quantize(model, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(RecipeError, match="build the optimizer after it"):
            rivals.Follower(model, "lsq").attach(optimizer)

    def test_weights_below_float32_are_refused(self):
        """As by AskewSGD: they would not hold small updates."""
        model = small()
        askewq.quantize(model, 2)
        with pytest.raises(ModelError, match="keep the model in float32"):
            rivals.Follower(model.to(torch.bfloat16), "binaryconnect")

    @pytest.mark.parametrize("method", RIVALS)
    def test_a_model_that_follows_a_method_can_be_pickled(self, method):
        """Saved whole and loaded again it sees the same weights."""
        model = small()
        askewq.quantize(model, 1)
        rivals.Follower(model, method)
        again = pickle.loads(pickle.dumps(model))  # our own bytes
        assert torch.equal(again[1].weight, model[1].weight)

    def test_tied_layers_keep_one_scale_where_a_conversion_split_it(self):
        """`.double()` copies a shared buffer twice; a method makes it one again."""
        model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(4)))
        model[2].weight = model[1].weight
        askewq.quantize(model, 2)
        model.double()
        rivals.Follower(model, "luq")
        assert model[2].weight_scale is model[1].weight_scale

    def test_snapped_shows_levels_and_restores_the_method(self):
        """Within `snapped` the method is off; after it view and weights are as before."""
        model = small()
        askewq.quantize(model, 1)
        rivals.Follower(model, "mirror-descent")
        latent, seen = model[1].latent.clone(), model[1].weight.detach().clone()
        with askewq.snapped(model):
            assert model[1].weight is model[1].latent
            assert torch.equal(model[1].weight.abs().unique(), model[1].weight_scale.unique())
        assert torch.equal(model[1].latent, latent)
        assert torch.equal(model[1].weight, seen)

    @pytest.mark.parametrize("progress", [7, -0.1, math.nan])
    def test_annealed_by_a_share_of_the_steps(self, progress):
        """The number of a step would close everything at once."""
        model = small()
        askewq.quantize(model, 1)
        follower = rivals.Follower(model, "proxquant")
        with pytest.raises(RecipeError, match=r"no share of the training steps.*\(i \+ 1\) / n"):
            follower.anneal(progress)

    @pytest.mark.parametrize(
        ("method", "warns"), [("binaryrelax", True), ("adaste", True), ("lsq", False)]
    )
    def test_snapping_what_was_never_annealed_warns(self, method, warns):
        """For then the method never acted; one without a course acts from the start."""
        model = small()
        askewq.quantize(model, 1)
        follower = rivals.Follower(model, method)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            askewq.snap_(model)
        assert ["Follower" in str(one.message) for one in caught] == [True] * warns
        askewq.quantize(other := small(), 1)
        follower = rivals.Follower(other, method)
        follower.anneal(0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            askewq.snap_(other)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (askewq.snap_, "was snapped for good"),
            (lambda model: rivals.Follower(model, "lsq"), "follows another method"),
            (lambda model: model.to(torch.bfloat16), "became torch.bfloat16"),
        ],
    )
    def test_no_step_goes_on_after_a_change_of_the_model(self, change, reason):
        """The weights would leave the grid, or hardly move, without a word."""
        model = small()
        askewq.quantize(model, 1)
        follower = rivals.Follower(model, "binaryconnect")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        follower.attach(optimizer)
        change(model)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        with pytest.raises(ModelError, match=reason):
            optimizer.step()
        assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())

    def test_what_cannot_be_is_refused(self):
        """An unknown method, a strength without use, a model without low-bit layers."""
        model = small()
        with pytest.raises(ModelError, match="quantize"):
            rivals.Follower(model, "lsq")
        askewq.quantize(model, 1)
        with pytest.raises(RecipeError, match=r"lsqq.*did you mean lsq"):
            rivals.Follower(model, "lsqq")
        other = small()
        askewq.quantize(other, 5)
        with pytest.raises(
            RecipeError, match="luq trains 1, ternary, 2, 3, 4 bit, not bits = 5; give other"
        ):
            rivals.Follower(other, "luq")
        with pytest.raises(RecipeError, match="lsq has no strength"):
            rivals.Follower(model, "lsq", 3.0)
        with pytest.raises(RecipeError, match="lsq does not round gradients"):
            rivals.Follower(model, "lsq", gradient_bits=4)

    @pytest.mark.parametrize(
        ("method", "strength", "allowed"),
        [
            ("mirror-descent", 1.0, "from 100 to 1e"),
            ("mirror-descent", -1.0, "from 100 to 1e"),
            ("binaryrelax", 0.01, "from 1 to 1e"),
            ("binaryrelax", 1e300, "from 1 to 1e"),
            ("binaryrelax", math.nan, "from 1 to 1e"),
            ("proxquant", 0.0, "from 0 to 0.5"),
            ("proxquant", math.inf, "from 0 to 0.5"),
        ],
    )
    def test_a_strength_that_does_not_end_on_the_grid_is_refused(self, method, strength, allowed):
        """A course that opens, never closes, or leaves the numbers is no schedule."""
        model = small()
        askewq.quantize(model, 1)
        with pytest.raises(RecipeError, match=f"{allowed}.*left out, it is the"):
            rivals.Follower(model, method, strength)


class TestFinetune:
    @pytest.mark.parametrize("method", [*RIVALS, "askewsgd-paper"])
    def test_every_method_trains_packs_and_reloads(self, tmp_path, method):
        """The same command with another --method gives an artifact that reloads exactly."""
        bits = 2 if method in ANY_BITS else 1
        metrics = finetune("own", tmp_path, method=method, bits=bits, max_steps=6)
        assert metrics["method"] == method
        assert metrics["reloaded"] == metrics["snapped"]
        resolved = config.build(recipe_files.read_yaml(tmp_path / "recipe.yaml"))
        assert (resolved.closing is None) == (method in RIVALS)
        card = (tmp_path / "README.md").read_text()
        assert f"with the method `{method}`" in card
        assert ("Leconte" in card) == method.startswith("askewsgd")

    def test_methods_differ(self, tmp_path):
        """No method is another one under a second name."""
        bytes_of = {}
        for method in [*RIVALS, "askewsgd", "askewsgd-paper"]:
            finetune("own", tmp_path / method, method=method, bits=1, max_steps=12, lr=0.05)
            bytes_of[method] = (tmp_path / method / "model.safetensors").read_bytes()
        assert len(set(bytes_of.values())) == len(bytes_of)

    @pytest.mark.parametrize("method", ["adaste", "mirror-descent"])
    def test_bits_that_a_method_cannot_do(self, tmp_path, method):
        """Binary methods refuse other widths before anything is written."""
        with pytest.raises(RecipeError, match=f"{method} trains 1 bit, not bits = 2"):
            finetune("own", tmp_path / "out", method=method, bits=2)
        assert not (tmp_path / "out").exists()

    def test_a_learned_scale_survives_a_resumed_run(self, tmp_path, monkeypatch):
        """LSQ stopped at a checkpoint and resumed gives the bytes of an uninterrupted run."""
        arguments = {"method": "lsq", "max_steps": 6, "save_every": 2}
        finetune("own", tmp_path / "whole", **arguments)
        with builders.power_cut(monkeypatch, 4), pytest.raises(builders.PowerCutError):
            finetune("own", tmp_path / "cut", **arguments)
        finetune("own", tmp_path / "cut", **arguments, resume=True)
        packed = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
        assert packed[0] == packed[1]


@pytest.mark.parametrize(
    ("method", "steps", "strength"),
    [
        ("proxquant", 600, 0.003),
        ("proxquant", 3000, 0.0006),  # the pulls of a run add up to the same
        ("proxquant", 1, 0.5),  # the longest that ends on the grid
        ("binaryrelax", 3000, 500.0),
        ("lsq", 3000, None),
    ],
)
def test_the_strength_that_a_run_of_so_many_steps_has(method, steps, strength):
    """It is the method's own, and where it adds up over the steps in inverse proportion to them."""
    expected = strength if strength is None else pytest.approx(strength)
    assert methods.strength_for(method, steps) == expected


def test_a_run_has_the_strength_of_its_steps(monkeypatch, tmp_path):
    """By default, and not in its recipe, so that a run of other steps chooses its own."""
    given = []
    follower = rivals.Follower

    def follow(model, method, strength, gradient_bits):
        given.append(strength)
        return follower(model, method, strength, gradient_bits)

    monkeypatch.setattr(choices, "Follower", follow)
    builders.finetune("own", tmp_path / "a", method="proxquant", max_steps=6)
    builders.finetune("own", tmp_path / "b", method="proxquant", max_steps=6, strength=0.1)
    assert given == [pytest.approx(0.3), 0.1]
    stored = yaml.safe_load((tmp_path / "a" / "recipe.yaml").read_text())
    assert stored.get("strength") is None


@pytest.mark.parametrize("method", sorted(RIVALS))
def test_a_model_that_is_compiled_as_a_whole(method):
    """The method's part of the forward pass is one graph, also as its coefficient changes."""
    bits = 1 if method in ("adaste", "mirror-descent") else 2
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    askewq.quantize(model, bits, include=("*",))
    follower = rivals.Follower(model, method)
    torch._dynamo.reset()
    whole = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(4, 6)
    for progress in (0.2, 0.5, 0.8, 1.0):
        follower.anneal(progress)
        torch.testing.assert_close(whole(x), model(x), rtol=0, atol=0)
