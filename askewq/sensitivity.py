"""What rounding costs each layer, and the best use of a budget of bytes.

Two estimates of the loss that rounding one weight adds while all others stay as they are:

- `measured`: it is rounded, and the loss on calibration samples is read off.
- `estimated`: half of the sum of F d^2, with d what rounding changes and F the diagonal of the
  empirical Fisher information, the mean square of the gradients; one backward pass for all weights
  and widths. Source: Theis, Korshunova, Tejani, Huszar 2018 (arXiv 1801.05787), section 3.

`assign` takes the increases as additive, and finds the assignment with the smallest sum exactly.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from askewq.errors import ModelError, PlanError
from askewq.grid import channels_back, channels_first, fit_scale, mixed_grid
from askewq.pack import packed_size
from askewq.plan_table import Plan, PlannedLayer
from askewq.vocabulary import Bits, GridKind


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What rounding one weight does to the loss.

    Attributes:
        layers: those of the plan that get a grid.
        widths: the candidates.
        increase: of the mean loss, float64 [layers, widths].
        code_bytes: what the codes take, int64 [layers, widths].
    """

    layers: tuple[PlannedLayer, ...]
    widths: tuple[Bits, ...]
    increase: Tensor
    code_bytes: Tensor


@torch.no_grad()
def measured(
    model: nn.Module,
    plan: Plan,
    widths: Sequence[Bits],
    kind: GridKind,
    loss: Callable[[], float],
) -> Sensitivity:
    """Round one weight at a time and read the loss off; the model is unchanged afterwards.

    Args:
        plan: of any width; its layers and the groups that share a scale are what counts.
        kind: of grid, where a width has several.
        loss: of the model on the calibration samples.

    Raises:
        ModelError: a loss that is not finite before anything is rounded.
    """
    base = _finite(loss())

    def increase(weight: Tensor, rounded: Tensor) -> float:
        before = weight.clone()
        weight.copy_(rounded)
        try:
            return loss() - base
        finally:
            weight.copy_(before)

    return _sensitivity(model, plan, widths, kind, increase)


def estimated(
    model: nn.Module,
    plan: Plan,
    widths: Sequence[Bits],
    kind: GridKind,
    losses: Iterable[tuple[Tensor, int]],
) -> Sensitivity:
    """Estimate the same from gradients, without rounding anything.

    Args:
        plan, widths, kind: as for `measured`.
        losses: the mean loss of every calibration batch, with a graph, and its number of samples;
            n times the squared gradient of a mean of n estimates the mean square of gradients.
    """
    weights = [_weight(model, layer) for layer in plan.quantized]
    for weight in weights:
        weight.requires_grad_(True)  # a frozen one is rounded as well
    fisher = {weight: torch.zeros_like(weight) for weight in weights}
    total = 0
    for loss, count in losses:
        _finite(loss.item())
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        for weight, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:  # else the loss does not depend on it
                fisher[weight].add_(gradient.square(), alpha=count**2)
        total += count

    def increase(weight: nn.Parameter, rounded: Tensor) -> float:
        change = (rounded - weight).double().square()
        return float((fisher[weight].double() * change).sum()) / total / 2

    with torch.no_grad():
        return _sensitivity(model, plan, widths, kind, increase)


def _finite(loss: float) -> float:
    """Return a loss of the model as it is.

    Raises:
        ModelError: it is NaN or infinite.
    """
    if not math.isfinite(loss):
        raise ModelError(
            f"the model's loss on the calibration samples is {loss} before anything is rounded; "
            "check its weights and the data."
        )
    return loss


def _sensitivity(
    model: nn.Module,
    plan: Plan,
    widths: Sequence[Bits],
    kind: GridKind,
    increase: Callable[[nn.Parameter, Tensor], float],
) -> Sensitivity:
    layers = plan.quantized
    rows = [
        [
            increase(_weight(model, layer), rounded)
            for rounded in _rounded(model, layer, widths, kind)
        ]
        for layer in layers
    ]
    sizes = [[packed_size(layer.weights, bits) for bits in widths] for layer in layers]
    return Sensitivity(
        layers, tuple(widths), torch.tensor(rows, dtype=torch.float64), torch.tensor(sizes)
    )


def _weight(model: nn.Module, layer: PlannedLayer) -> nn.Parameter:
    return model.get_submodule(layer.names[0]).get_parameter(layer.leaves[0])


def _rounded(
    model: nn.Module, layer: PlannedLayer, widths: Sequence[Bits], kind: GridKind
) -> Iterator[Tensor]:
    """Yield the weight at every width, in its own shape."""
    first = channels_first(_weight(model, layer).detach().clone(), layer.channel_dim)
    for bits in widths:
        grid = mixed_grid(bits, kind)
        scale = fit_scale(first, grid, layer.group_size)
        yield channels_back(grid.values(grid.codes(first, scale), scale), layer.channel_dim)


def assign(sensitivity: Sensitivity, budget: int) -> tuple[Bits, ...]:
    """Return the width of every layer: the smallest sum of increases within so many bytes of codes.

    What rounding gains (a negative increase) counts as nothing: on a few samples it is noise. What
    is not finite counts as more than everything that is. scipy's integer program (HiGHS) finds the
    optimum.

    Raises:
        PlanError: a budget below the smallest assignment.
    """
    from scipy.optimize import LinearConstraint, milp

    layers, widths = sensitivity.increase.shape
    least = int(sensitivity.code_bytes.min(1).values.sum())
    if budget < least:
        raise PlanError(
            f"a budget of {budget:,} bytes of codes cannot be met: with the widths "
            f"{', '.join(map(str, sensitivity.widths))} they take {least:,} bytes at least."
        )
    increase = sensitivity.increase.clamp(min=0)
    finite = increase.isfinite()
    largest = float(increase.where(finite, 0.0).max()) or 1.0
    # The solver's tolerances are absolute, and increases may be small.
    costs = (increase / largest).where(finite, layers + 1.0).flatten().numpy() * 1e6
    one_each = torch.eye(layers, dtype=torch.float64).repeat_interleave(widths, 1).numpy()
    sizes = sensitivity.code_bytes.flatten().double().numpy()
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(sizes, ub=budget)]
    options = {"mip_rel_gap": 0}
    while True:
        found = milp(costs, integrality=1, bounds=(0, 1), constraints=constraints, options=options)
        if not found.success:
            raise PlanError(f"the assignment was not found: {found.message}")
        chosen = torch.from_numpy(found.x).view(layers, widths).argmax(1)
        if int(sensitivity.code_bytes.gather(1, chosen[:, None]).sum()) <= budget:
            return tuple(sensitivity.widths[i] for i in chosen.tolist())
        # A byte or two in millions are within the solver's tolerance: anything but this one.
        ones = nn.functional.one_hot(chosen, widths).flatten().double().numpy()
        constraints.append(LinearConstraint(ones, ub=layers - 1))
