"""Rounded inputs of layers: a grid and a scale a layer, found by calibration, followed, frozen.

A layer rounds its input by one more change of class, above that of layers.py or packed.py, so that
``layer(x)`` does wherever the layer is: in training, evaluation, the artifact and the exporters
there is one grid and one scale. The scale is SAWB's (methods.py), of the values that are not zero.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from askewq.errors import ModelError
from askewq.grid import Grid, input_grid
from askewq.kinds import kind_of
from askewq.layers import QuantizedLayer
from askewq.methods import sawb_scale, straight
from askewq.mixed import Mixin, mix_
from askewq.vocabulary import ActBits

# Weight of a new batch in the scale, as in torch's batch norm.
MOMENTUM = 0.1


class RoundedInput(Mixin):
    """Mixin of a layer whose input is rounded.

    Attributes:
        input_grid: the levels, in units of the scale.
        input_scale: buffer, float32, 0-d, written in place only; a cast leaves it as it is.
        follows: whether the scale follows the batches that are trained on, a 0-d tensor so that a
            compiled network is not compiled again when that changes; None: it never did.
    """

    prefix = "Rounded"
    input_grid: Grid
    input_scale: Tensor
    follows: Tensor | None = None

    def _grids(self) -> dict[str, list[Any]]:
        """Return what tells the grids of the weights and of the input apart, as plain values."""
        grid = self.input_grid
        weights: dict[str, list[Any]] = super()._grids()  # type: ignore[misc]  # of the mixin below
        return {**weights, "input": [grid.bits, grid.first, grid.step]}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the layer makes of its rounded input, which is its first argument."""
        if not args:
            name = _named_input(kwargs)
            made = self.rounded(self._followed(kwargs[name]))
            return super().forward(**{**kwargs, name: made})
        return super().forward(self.rounded(self._followed(args[0])), *args[1:], **kwargs)

    def _followed(self, input: Tensor) -> Tensor:
        """Return the input, once the scale has followed it.

        Zeros alone say nothing about it, and what is not finite would not leave it again.
        """
        if self.training and self.follows is not None:
            with torch.no_grad():
                sums = moments(input, self.input_grid)
                moved = self.input_scale.lerp(scale_of(sums, self.input_grid), MOMENTUM)
                moves = self.follows & (sums[2] > 0) & moved.isfinite()
                self.input_scale.copy_(torch.where(moves, moved, self.input_scale))
        return input

    def rounded(self, input: Tensor) -> Tensor:
        """Return the input on its levels."""
        return round_to(input, self.input_scale, self.input_grid)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RoundedInput":
        """Move the scale with the layer; a cast concerns the weight alone."""
        scale = self.input_scale
        super()._apply(fn, recurse)
        if self.input_scale.dtype != scale.dtype:
            self.input_scale = scale.to(self.input_scale.device)
        return self


def _named_input(kwargs: dict[str, Any]) -> str:
    """Return by what name a layer is given its input, where it is given no other way."""
    return next(name for name, value in kwargs.items() if isinstance(value, Tensor))


def round_to(x: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Return the nearest levels times the scale, in the type of x; half-way goes to the even one.

    The gradient passes where x was rounded, that is up to half a level beyond the outermost ones,
    and not where it was cut off. The signs of 1 bit have the gradient of scale * tanh(x / scale).
    """
    units = x.detach().to(torch.promote_types(x.dtype, torch.float32)) / scale
    lowest, highest = grid.first, grid.highest
    if grid.step == 2:
        sign = torch.where(x < 0, -1.0, 1.0)
        level = torch.where(units.isnan(), units, sign)
        factor = 1 - units.tanh().square()
    else:
        level = units.round().clamp(lowest, highest)
        # 1 or 0 by arithmetic: compiled for a CPU, a mask takes several times as long as the rest.
        # What lies beyond the range does so by 2^-24 at least in float32, 2^-53 in float64.
        beyond = (units - units.clamp(lowest - 0.5, highest + 0.5)).abs()
        factor = (1 - beyond * 2.0**60).clamp_min(0).to(x.dtype)
    return straight(x, (level * scale).to(x.dtype), factor)


def moments(x: Tensor, grid: Grid | None = None) -> Tensor:
    """Return the sums of squares and of sizes, the count of what is not 0, and that of all.

    What `grid` cuts off at 0 is 0.

    Returns:
        Float32 [4].
    """
    wide = x.detach().float()
    if grid is not None and grid.first == 0:
        wide = wide.relu()
    sums = wide.square().sum(), wide.abs().sum(), (wide != 0).sum().float()
    return torch.stack([*sums, torch.full_like(sums[0], x.numel())])


def scale_of(sums: Tensor, grid: Grid) -> Tensor:
    """Return SAWB's scale of inputs with these `moments`, 0-d.

    Zeros do not count where they are on a level, which is at every scale; among signs they do.
    """
    count = sums[3] if grid.step == 2 else sums[2]
    square, size = sums[:2] / count.clamp_min(1)
    return sawb_scale(square, size, grid)


def nest_nothing_(model: nn.Module) -> None:
    """Keep torch's encoders from making nested tensors, which cannot be rounded, for their layers.

    They do so in evaluation, where a mask says what is padding.
    """
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder):
            encoder.use_nested_tensor = False


def round_input_(layer: nn.Module, grid: Grid, scale: Tensor) -> None:
    """Let a layer round its input, in place; `scale` is 0-d."""
    layer.register_buffer("input_scale", scale)
    mix_(layer, RoundedInput)
    # torch's transformer layers go round the forward of their parts that have no hook.
    layer.register_forward_pre_hook(_no_change)
    layer.input_grid = grid  # type: ignore[assignment]  # a plain attribute


def _no_change(layer: nn.Module, args: tuple[Any, ...]) -> None:
    """Leave a layer's arguments as they are."""


def rounded_layers(model: nn.Module) -> dict[str, RoundedInput]:
    """Return the layers that round their input, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, RoundedInput)}


def follow_inputs_(model: nn.Module, on: bool) -> None:
    """Let the scales of all inputs that `round_inputs` rounds follow the training, or stay."""
    for layer in rounded_layers(model).values():
        if layer.follows is None:
            layer.follows = torch.zeros_like(layer.input_scale, dtype=torch.bool)
        layer.follows.fill_(on)


def round_inputs(
    model: nn.Module,
    act_bits: ActBits,
    run: Callable[[], object],
    *,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, bool]:
    """Let the quantized layers of a model round their inputs, in place, after a calibration.

    A layer whose inputs are never negative gets the levels 0 .. 2^b - 1, every other one signed
    levels. Embeddings, which are given indices, and layers that are never called, or with zeros
    alone, from which no scale can be told, stay as they are.

    Args:
        act_bits: 1 to 8.
        run: calls the model on samples, in evaluation mode; the more there are the surer the
            signs.
        reduce: adds up a tensor over all processes.

    Returns:
        Whether the levels are signed, by the layer's name.

    Raises:
        RecipeError: bits that do not exist.
        ModelError: no quantized layer was called with numbers but 0, or they round their inputs
            already.

    Example:
        >>> askewq.quantize(model, bits=2)
        >>> askewq.round_inputs(model, 4, lambda: model(batch))
        >>> askewq.follow_inputs_(model, True)  # until the last tenth of the steps, or so
    """
    input_grid(act_bits, signed=True)
    if rounded := rounded_layers(model):
        raise ModelError(f"the model rounds its inputs already ({next(iter(rounded))}).")
    nest_nothing_(model)
    with torch.no_grad(), _watched(model) as seen:
        run()
    if seen and reduce is not None:  # all at once: processes may have called other layers first
        seen = dict(zip(seen, reduce(torch.stack([*seen.values()])), strict=True))
    for name, sums in seen.items():
        if not sums.isfinite().all():
            raise ModelError(
                f"the input of {name} holds NaN, infinite or huge values in calibration, so that "
                "it has no scale; look at the samples, or exclude the layer."
            )
    signed = {name: bool(sums[4] > 0) for name, sums in seen.items() if sums[2] > 0}
    if not signed:
        raise ModelError(
            "act_bits: no quantized layer was called with numbers but 0, so that there is no input "
            "to round; quantize a Linear or Conv layer, or leave act_bits out."
        )
    attach_(model, act_bits, signed)
    for name, layer in rounded_layers(model).items():
        layer.input_scale.copy_(scale_of(seen[name], layer.input_grid))
    return signed


def restore_forwards_(model: nn.Module, names: Iterable[str]) -> None:
    """Let layers have the forward of their class, by which an input is rounded.

    Raises:
        ModelError: one was given another, such as a hook of Accelerate's puts in its place.
    """
    for name in names:
        layer = model.get_submodule(name)
        own = vars(layer).get("forward")
        if own is None:
            continue
        if getattr(own, "__func__", None) is not type(layer).forward:
            raise ModelError(
                f"something has replaced the forward of {name}, so that its input would not be "
                "rounded: take it off (accelerate.hooks.remove_hook_from_module), round the "
                "inputs, and put it on again."
            )
        del layer.forward  # what is left of a hook that was taken off


def attach_(model: nn.Module, act_bits: ActBits, signed: dict[str, bool]) -> None:
    """Let layers round their inputs, in place, with scales that are filled in later."""
    nest_nothing_(model)
    restore_forwards_(model, signed)
    for name, sign in signed.items():
        layer = cast(QuantizedLayer, model.get_submodule(name))
        with torch.inference_mode(False):  # it may be trained later
            scale = torch.ones((), dtype=torch.float32, device=layer.weight_scale.device)
        round_input_(layer, input_grid(act_bits, signed=sign), scale)


@contextmanager
def _watched(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Within the block, in evaluation mode, gather the moments of the layers' inputs, by name.

    Layers that are not called have zeros, so that all are there, in the order of the model.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLayer) and takes_numbers(module)
    }
    seen = {name: torch.zeros(5, device=m.weight_scale.device) for name, m in layers.items()}
    modes = [(module, module.training) for module in model.modules()]

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs[_named_input(kwargs)]
            sums = torch.cat([moments(x), (x < 0).sum().float().view(1)])
            seen[name] += sums

        return hook

    hooks = [
        module.register_forward_pre_hook(watch(name), with_kwargs=True)
        for name, module in layers.items()
    ]
    model.eval()
    try:
        yield seen
    finally:
        for module, training in modes:
            module.training = training
        for hook in hooks:
            hook.remove()


def takes_numbers(layer: nn.Module) -> bool:
    """Tell whether one tensor of numbers goes into a layer."""
    kind = kind_of(layer)
    return kind is not None and kind.one_input
