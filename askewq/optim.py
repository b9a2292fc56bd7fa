"""AskewSGD and AskewAdamW: torch's optimizers under the annealed interval constraint.

The base update (momentum, preconditioning and weight decay included) is computed as torch does.
Under lazy closing the forward pass sees the projection of the weights on the intervals; under the
others, an update that would leave the constraint set is replaced by the paper's drift. Update and
constraint are one pass over memory (`kernels`). Parameters that are not on a grid are left to
torch's own step.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from askewq import constraint, kernels, methods, sharding
from askewq.anneal import Closing, check_progress
from askewq.errors import ModelError, RecipeError
from askewq.grid import NO_SCALE, Grid
from askewq.kernels import DISTANCE_BINS, Interval, adamw_, compiled, distance_bins, sgd_
from askewq.layers import (
    QuantizedWeight,
    check_rule,
    follow_,
    quantized_layers,
    quantized_modules,
)
from askewq.level_groups import in_units, level_groups
from askewq.vocabulary import Pull

# Below this many quantized weights the eager step costs less than compiling (10 to 20 s) saves.
COMPILE_FROM = 1_000_000
# A kernel, its numbers and its flags.
_Call = tuple[Callable[..., None], dict[str, float], dict[str, bool]]
# The strength of a pull where it is left open.
PULLS: dict[Pull, dict[str, float]] = {
    "decoupled": {"alpha": 0.5, "clip": 0.1},
    "coupled": {"alpha": 5.0, "clip": 5.0},
}
# What torch's load_state_dict fills in where an older torch did not have it (2.7).
_FILLED_IN = {"decoupled_weight_decay"}
# Options of a parameter group that only torch's own step would heed.
_TORCHS_OWN = ("maximize", "dampening", "amsgrad")
# What a parameter group says of the intervals, so that a state is not loaded into others.
_FOR_ALL = ("closing", "pull", "alpha", "clip")


class _Skewed(torch.optim.Optimizer):
    """What AskewSGD and AskewAdamW share: the interval, its annealing, and the split of the step.

    A subclass also derives from the torch optimizer whose update it skews, and says in `_update`
    how that update is made together with the constraint.
    """

    closing: Closing

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to train; see torch.optim.Optimizer.

        Raises:
            RecipeError: the group has an option of torch's that is not made for quantized weights,
                or one of the pull, or the optimizer makes its groups itself (`level_lr`).
        """
        if hasattr(self, "closing") and any(group["in_levels"] for group in self.param_groups):
            raise RecipeError(
                "with level_lr the parameter groups are made once, of all parameters, each with a "
                "unit of its own: build the optimizer once the model is whole, and freeze and "
                "unfreeze with requires_grad_."
            )
        if param_group.get("decoupled_weight_decay") is False:
            raise RecipeError(
                "a parameter group has decoupled_weight_decay = False, but the weight decay of the "
                "quantized weights is decoupled, AdamW's; leave it out."
            )
        for name in _TORCHS_OWN:
            if param_group.get(name):
                raise RecipeError(
                    f"a parameter group has {name} = {param_group[name]}, which torch's step knows "
                    "and that of the quantized weights does not; leave it out."
                )
        super().add_param_group(param_group)
        if hasattr(self, "closing"):
            self._check_pulls()

    def _check_pulls(self) -> None:
        """Check that no parameter group has intervals of its own."""
        for group in self.param_groups:
            for name in _FOR_ALL:
                if group[name] != self.defaults[name]:
                    raise RecipeError(
                        f"a parameter group has {name} = {group[name]}, which is the same for all "
                        f"groups, {self.defaults[name]}; pass {name} to the optimizer itself."
                    )

    def _constrain(
        self,
        model: nn.Module,
        closing: Closing,
        alpha: float | None,
        clip: float | None,
        pull: Pull | None,
        compile: bool | None,
    ) -> None:
        if closing.kind == "lazy" and (alpha, clip, pull) != (None, None, None):
            raise RecipeError(
                f"alpha = {alpha}, clip = {clip} and pull = {pull} decide nothing with "
                "closing = 'lazy', which pulls no weight; leave them out, or pass closing = "
                "askewq.Closing('staggered') or 'single'."
            )
        pull = pull or "decoupled"
        if pull not in PULLS:
            raise RecipeError(f"pull = {pull!r} is unknown; use 'decoupled' or 'coupled'.")
        alpha = PULLS[pull]["alpha"] if alpha is None else alpha
        clip = PULLS[pull]["clip"] if clip is None else clip
        if not (alpha > 0 and clip > 0):
            raise RecipeError(f"alpha = {alpha} and clip = {clip} must both be above 0.")
        if pull == "decoupled" and alpha > 1:
            raise RecipeError(
                f"alpha = {alpha} is a share of a Newton step toward the interval, at most 1, when "
                "the pull is decoupled; the paper's alpha, times lr, goes with pull = 'coupled'."
            )
        self._layers = list(quantized_layers(model).values())
        if not self._layers:
            raise ModelError(
                "the model has no quantized layer; call askewq.quantize(model, bits=2) before "
                "building the optimizer."
            )
        own = {"closing": str(closing), "pull": pull, "alpha": alpha, "clip": clip}
        own |= {"progress": 0.0, "updates": 0, "in_levels": False}
        self.defaults.update(own)
        for group in self.param_groups:
            group.update({**own, **group})
        self._check_pulls()
        self._decoupled = pull == "decoupled"
        self.closing = closing
        self._modules = quantized_modules(model)
        weights = sum(layer.latent.numel() for layer in self._layers)
        self._compile = weights >= COMPILE_FROM if compile is None else compile
        lazy = kernels.LAZY if self._compile else methods.LAZY
        self._rule = lazy if closing.kind == "lazy" else None
        follow_(model, self._rule)
        self._resting: list[QuantizedWeight] = []
        for layer in self._layers:
            layer.settle_()
            if closing.kind != "lazy" and not layer.latent.requires_grad:
                layer.snap_()  # no step will close it
                self._resting.append(layer)
        self.anneal(0.0)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs; made together with its model, it trains the model's copy."""
        own = ("closing", "_layers", "_modules", "_resting", "_rule", "_decoupled", "_compile")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def anneal(self, progress: float) -> None:
        """Set the intervals for the next step.

        Args:
            progress: share of all steps taken once it is made, 0 to 1.

        Raises:
            RecipeError: it is no share, such as a number of steps.
        """
        check_progress(progress)
        for group in self.param_groups:
            group["progress"] = float(progress)
        for module in self._modules:
            module.strength = self.closing.radius(progress)
            module.untouched = id(module) if self.closing.closure(progress) == 0 else None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave; the intervals are those of its progress.

        Raises:
            RecipeError: another optimizer gave it, or one with another closing or pull.
        """
        wanted = self.defaults.keys() - _FILLED_IN
        if missing := [k for g in state_dict["param_groups"] for k in wanted - g.keys()]:
            raise RecipeError(
                f"the state is not that of {type(self).__name__}: its parameter groups have no "
                f"{', '.join(sorted({*missing}))}; load what the state_dict() of one gave."
            )
        for group in state_dict["param_groups"]:
            for name in _FOR_ALL:
                if group[name] != self.defaults[name]:
                    raise RecipeError(
                        f"the state is that of an optimizer with {name} = {group[name]}, and this "
                        f"one has {self.defaults[name]}; build it with the same {name}."
                    )
        super().load_state_dict(state_dict)
        self.anneal(min(self._progress, 1.0))

    @property
    def _progress(self) -> float:
        return float(self.param_groups[0]["progress"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one update; call `anneal` with the current progress before it.

        Raises:
            ModelError: the model follows another method by now, or was snapped under lazy closing;
                under staggered closing, a layer that was frozen at first is not any more.
        """
        check_rule(self._modules, self._rule)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        layers = {id(layer.latent): layer for layer in self._layers}
        updated = []
        for group in self.param_groups:
            for weight in group["params"]:
                if id(weight) in layers and weight.grad is not None:
                    self._update_layer(weight, layers[id(weight)], group)
                    updated.append((weight, weight.grad))
            group["updates"] += 1
        if self.closing.kind != "lazy" and self.closing.closure(self._progress) == 1:
            reached = {id(weight) for weight, _ in updated}
            for layer in self._layers:
                if id(layer.latent) not in reached:
                    layer.snap_()  # no update closes it
        for weight, _ in updated:
            weight.grad = None  # torch's own step passes over parameters without a gradient
        # torch wraps every step with the optimizer's hooks; ours is wrapped, so its must not be.
        theirs = inspect.unwrap(super().step.__func__)  # type: ignore[attr-defined]  # a bound method
        with in_units(self.param_groups):
            theirs(self)
        for weight, grad in updated:
            weight.grad = grad
        return loss

    def _update_layer(
        self, weight: nn.Parameter, layer: QuantizedWeight, group: dict[str, Any]
    ) -> None:
        layer.check_precision()
        if self.closing.kind == "staggered" and any(layer is rests for rests in self._resting):
            raise ModelError(
                f"a weight of shape {tuple(weight.shape)} was frozen when the optimizer was made, "
                "so that staggered closing put it on its levels for good; unfreeze it before, or "
                "use lazy or single closing."
            )
        assert weight.grad is not None  # noqa: S101  # `step` has checked
        scale, grad = layer.row_scale(), layer.rows(weight.grad)
        buffers = self._buffers(weight, group)
        with _as_rows(layer, weight.detach(), *buffers) as (rows, *buffer_rows):
            interval = self._interval(weight, rows, scale, layer.grid, group)
            kernel, numbers, flags = self._kernel(weight, group)
            given = rows, grad, buffer_rows, scale, interval, _knobs(rows, **numbers)
            self._run(kernel, *given, closing=self.closing.kind, **flags)

    def _interval(
        self, weight: Tensor, rows: Tensor, scale: Tensor, grid: Grid, group: dict[str, Any]
    ) -> Interval:
        """Return the constraint of one layer for this step; `rows` may be a shard of `weight`."""
        progress = group["progress"]
        rate = 1.0 if self._decoupled else float(group["lr"])
        number = functools.partial(torch.tensor, dtype=rows.dtype)
        interval = Interval(
            first=number(grid.first),
            step=number(grid.step),
            last=number(float(grid.last)),
            eps=number(self.closing.eps(progress)),
            pull=number(rate * group["alpha"]),
            clip=number(rate * group["clip"]),
            within=torch.full((), -1.0, dtype=rows.dtype, device=rows.device),
        )
        share = self.closing.closed_share(progress)
        if share >= 1:
            interval.within.fill_(torch.inf)
        elif share > 0 and group["updates"] % self.closing.period == 0:
            bins = self._run(distance_bins, rows, scale, interval)
            # A row or group of zeros has no distances, in units of what is hardly a scale.
            bins = bins.masked_fill(scale <= NO_SCALE, DISTANCE_BINS)
            counts = torch.bincount(bins.view(-1), minlength=DISTANCE_BINS + 1)[:DISTANCE_BINS]
            closed = sharding.add_up_(counts, weight).cumsum(0)
            edge = torch.searchsorted(closed, (share * closed[-1:].double()).long())
            # The last bin also holds what lies beyond the grid, at any distance.
            distance = torch.where(
                edge[0] < DISTANCE_BINS - 1, (edge[0] + 1) / DISTANCE_BINS / 2, torch.inf
            )
            interval.within.copy_(distance)
        return interval

    def _buffers(self, weight: nn.Parameter, group: dict[str, Any]) -> list[Tensor]:
        """Return the state of a weight that has its shape, made on first use."""
        raise NotImplementedError

    def _kernel(self, weight: nn.Parameter, group: dict[str, Any]) -> _Call:
        """Return the kernel of the weight's next update, its numbers and its flags."""
        raise NotImplementedError

    def _run(self, function: Callable[..., Any], *args: Any, **flags: Any) -> Any:
        """Call a kernel compiled if possible, else eagerly."""
        if self._compile:
            function = compiled(function, args[0].device.type)
        return function(*args, **flags)

    def shown(self, progress: float) -> dict[str, float]:
        """Return what the progress bar shows: the radius of the open intervals."""
        return {"radius": self.closing.radius(progress)}

    def feasible_share(self) -> float:
        """Return the share of quantized weights inside their interval (else: on a level)."""
        shares = [self._inside(layer) for layer in self._layers]
        return sum(shares) / sum(layer.latent.numel() for layer in self._layers)

    def _inside(self, layer: QuantizedWeight) -> int:
        """Return how many weights of a layer are inside, in all processes together."""
        weight, scale, grid = layer.seen_rows().detach(), layer.row_scale(), layer.grid
        if not weight.numel():  # an empty shard
            feasible = weight.bool()
        elif self.closing.kind != "single":
            feasible = weight == grid.snap(weight, scale)
        else:
            eps = self.closing.eps(self._progress)
            psi, _ = constraint.slack(grid.coordinate(weight, scale), grid.last, eps)
            feasible = psi >= 0
        return int(sharding.add_up_(feasible.sum(), layer.latent))


class AskewSGD(_Skewed, torch.optim.SGD):
    r"""SGD with momentum under the annealed interval constraint.

    .. code-block:: text

        buf   <- momentum * buf + grad + weight_decay * w
        v     <- -lr * buf                                (what torch.optim.SGD would add)

    Lazy closing: w + v limited to the range of the grid; what a layer multiplies by is the point
    of the intervals nearest to w. Staggered and single closing, where layers multiply by w itself:

    .. code-block:: text

        w     <- level                                    where eps_i = 0 (closed)
        w     <- w + v                                    where psi > 0, or v * psi' >= -pull * psi
        w     <- w + clip(-pull * psi / psi', clip)       elsewhere

    with w, v and clip in level spacings there (`constraint`).

    With every weight inside the grid and eps = 1 this is torch.optim.SGD. Not for models without
    low-bit layers, nor for weights below float32.

    Args:
        model: a model with quantization-aware layers (`askewq.quantize`).
        lr, momentum, weight_decay, nesterov: as in torch.optim.SGD.
        params: parameters or parameter groups to train; all of the model's by default. The
            intervals of all quantized weights are this optimizer's in any case: one for a model.
        closing: the schedule of the intervals.
        alpha: strength of the pull on infeasible weights: the share of a Newton step made in one
            update (decoupled, in (0, 1]), or the paper's alpha, multiplied by lr (coupled). 0.5 by
            default, 5 coupled; it, clip and pull do not go with lazy closing.
        clip: the longest pull in one update, in level spacings; multiplied by lr if coupled (the
            paper's M). 0.1 by default, 5 coupled.
        pull: "decoupled" from the learning rate (default), or "coupled" to it as in the paper.
        compile: compile the step; by default from 1,000,000 quantized weights on.

    Raises:
        ModelError: a model without quantized layers.
        RecipeError: options that do not go together, or a parameter group with one of its own.
        ValueError: lr, momentum or weight_decay that torch refuses.

    Example:
        >>> askewq.quantize(model, bits=2)
        >>> optimizer = askewq.AskewSGD(model, lr=0.01, momentum=0.9)
        >>> for step, (x, y) in enumerate(batches):
        ...     loss(model(x), y).backward()
        ...     optimizer.anneal((step + 1) / len(batches))
        ...     optimizer.step()
        ...     optimizer.zero_grad()

    Source: Algorithm 1 of arXiv 2211.03741, applied to the final update.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        params: Iterable[Any] | None = None,
        closing: Closing = Closing(),  # noqa: B008  # frozen
        alpha: float | None = None,
        clip: float | None = None,
        pull: Pull | None = None,
        compile: bool | None = None,
    ) -> None:
        _check(model, closing)
        super().__init__(
            model.parameters() if params is None else params,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            nesterov=nesterov,
        )
        self._constrain(model, closing, alpha, clip, pull, compile)

    def _buffers(self, weight: nn.Parameter, group: dict[str, Any]) -> list[Tensor]:
        if not group["momentum"]:
            return []
        buffer = self.state[weight].get("momentum_buffer")
        if buffer is None:
            buffer = torch.zeros_like(weight, memory_format=torch.contiguous_format)
            self.state[weight]["momentum_buffer"] = buffer
        return [buffer]

    def _kernel(self, weight: nn.Parameter, group: dict[str, Any]) -> _Call:
        numbers = {name: group[name] for name in ("lr", "momentum", "weight_decay")}
        return sgd_, numbers, {"nesterov": bool(group["nesterov"])}


class AskewAdamW(_Skewed, torch.optim.AdamW):
    """AdamW under the annealed interval constraint; see `AskewSGD` for what is added to torch's.

    Args:
        model: a model with quantization-aware layers (`askewq.quantize`).
        lr, betas, eps, weight_decay: as in torch.optim.AdamW (eps is the denominator's).
        level_lr: lr of the quantized weights, in level spacings: an update is about that long,
            whatever the scale of its row. The other parameters of two dimensions and more then
            move by about lr times their root mean square at the start, each in a parameter group
            that keeps it as its `unit`; those of fewer by lr. None: lr, in the weights' own units.
        params, closing, alpha, clip, pull, compile: as in AskewSGD.

    Raises:
        ModelError, RecipeError, ValueError: as AskewSGD, and level_lr with params or not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        *,
        level_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        params: Iterable[Any] | None = None,
        closing: Closing = Closing(),  # noqa: B008  # frozen
        alpha: float | None = None,
        clip: float | None = None,
        pull: Pull | None = None,
        compile: bool | None = None,
    ) -> None:
        _check(model, closing)
        if level_lr is not None:
            if not 0 <= level_lr < math.inf:
                raise RecipeError(f"level_lr = {level_lr} must be a finite number from 0.")
            if params is not None:
                raise RecipeError("level_lr makes the parameter groups itself; leave params out.")
            params = level_groups(model, level_lr)
        super().__init__(
            model.parameters() if params is None else params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
        )
        self._constrain(model, closing, alpha, clip, pull, compile)

    def _buffers(self, weight: nn.Parameter, group: dict[str, Any]) -> list[Tensor]:
        state = self.state[weight]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        return [state["exp_avg"], state["exp_avg_sq"]]

    def _kernel(self, weight: nn.Parameter, group: dict[str, Any]) -> _Call:
        state = self.state[weight]
        state["step"] += 1
        step = state["step"].item()
        beta1, beta2 = group["betas"]
        numbers = {
            "mix1": 1 - beta1,
            "beta2": beta2,
            "mix2": 1 - beta2,
            "bias2_sqrt": (1 - beta2**step) ** 0.5,
            "eps": group["eps"],
            "keep": 1 - group["lr"] * group["weight_decay"],
            "step_size": group["lr"] / (1 - beta1**step),
        }
        return adamw_, numbers, {"in_levels": group["in_levels"]}


@contextmanager
def _as_rows(layer: QuantizedWeight, *tensors: Tensor) -> Iterator[list[Tensor]]:
    """Within the block, update tensors of a weight's shape as rows: views, or written back."""
    rows = [layer.rows(tensor) for tensor in tensors]
    yield rows
    for tensor, part in zip(map(sharding.local, tensors), rows, strict=True):
        if part.data_ptr() != tensor.data_ptr():  # a copy
            tensor.copy_(layer.from_rows(part))


def _check(model: nn.Module, closing: Closing) -> None:
    """Check what an optimizer is made of."""
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"the first argument is a {type(model).__name__}: pass the quantized model itself, "
            "whose parameters are trained unless params names others."
        )
    if not isinstance(closing, Closing):
        raise RecipeError(
            f"closing = {closing!r} is a {type(closing).__name__}; pass an askewq.Closing, such as "
            "askewq.Closing('staggered')."
        )


def _knobs(like: Tensor, **numbers: float) -> dict[str, Tensor]:
    """Return hyperparameters as 0-d CPU tensors of the weights' dtype."""
    return {name: torch.tensor(float(n), dtype=like.dtype) for name, n in numbers.items()}
