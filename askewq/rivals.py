"""Training with another method than AskewSGD, beside any optimizer of torch."""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from askewq import sharding
from askewq.anneal import check_progress
from askewq.errors import ModelError, RecipeError, near
from askewq.kinds import leaves_of
from askewq.layers import (
    QuantizedWeight,
    check_rule,
    follow_,
    quantized_layers,
    quantized_modules,
    uncompiled,
)
from askewq.methods import RIVALS, check_bits, check_strength, quantize_gradient
from askewq.vocabulary import Method


class Follower:
    """Lets the quantized layers of a model follow a method while an optimizer trains them.

    Args:
        model: a model with quantization-aware layers (`askewq.quantize`).
        method: one of `methods.RIVALS`.
        strength: the final value of the method's coefficient; by default its own, which for
            proxquant is that of 600 steps: of other runs `methods.strength_for` gives it.
        gradient_bits: width of the layers' neural gradients (luq); None: full precision.

    Raises:
        RecipeError: an unknown method, or a setting that it does not have.
        ModelError: no quantized layer.

    Example:
        >>> follower = Follower(model, "lsq")
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)  # after the follower
        >>> follower.attach(optimizer)
        >>> follower.anneal((step + 1) / steps)  # before every step
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        strength: float | None = None,
        gradient_bits: int | None = None,
    ) -> None:
        if method not in RIVALS:
            known = ", ".join(RIVALS)
            raise RecipeError(f"method = {method!r} is unknown{near(method, RIVALS)}; use {known}.")
        self._rule = RIVALS[method]
        check_strength(method, strength)
        if gradient_bits is not None and method != "luq":
            raise RecipeError(f"method = {method} does not round gradients; use luq for that.")
        if gradient_bits is not None and not 2 <= gradient_bits <= 7:
            raise RecipeError(f"gradient_bits = {gradient_bits} must be 2 to 7.")
        self._final = (self._rule.strength if strength is None else strength) or 0.0
        self._layers = list(quantized_layers(model).values())
        if not self._layers:
            raise ModelError(
                "the model has no quantized layer; call askewq.quantize(model, bits=2) first."
            )
        if self._rule.learns_scale and isinstance(
            uncompiled(model), nn.parallel.DistributedDataParallel
        ):
            raise ModelError(
                f"the model is in DistributedDataParallel, which does not know the scales that "
                f"{method} learns; make the Follower of model.module, and wrap it afterwards."
            )
        for layer in self._layers:
            check_bits(method, layer.grid.bits)
            layer.check_precision()
        self._modules = quantized_modules(model)
        self._attached: list[torch.optim.Optimizer] = []
        if gradient_bits is not None:
            check_gradients(weight.owner for weight in self._modules)
        follow_(model, self._rule)
        if gradient_bits is not None:
            _round_gradients(self._modules, gradient_bits)
        self.anneal(0.0)
        self._settle()

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Let every step of the optimizer end with the method's own part.

        A step raises ModelError where the model was snapped, or follows another method, or was
        cast below float32.

        Raises:
            RecipeError: the optimizer does not have the scales that the method learns.
        """
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if self._rule.learns_scale and not all(
            id(layer.weight_scale) in trained
            for layer in self._layers
            if layer.weight_scale.requires_grad
        ):
            raise RecipeError(
                "the method learns the scales, and the optimizer does not have them: the Follower "
                "made them parameters of the model; build the optimizer after it."
            )
        self._attached.append(optimizer)
        self._hook(optimizer)

    def _hook(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_step_pre_hook(self._check)
        optimizer.register_step_post_hook(self._settle)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become a copy, made together with model and optimizer: torch copies no hooks."""
        self.__dict__.update(state)
        for optimizer in self._attached:
            self._hook(optimizer)

    def _check(self, *_: Any) -> None:
        check_rule(self._modules, self._rule)
        for layer in self._layers:
            layer.check_precision()

    def _settle(self, *_: Any) -> None:
        for layer in self._layers:
            layer.settle_()
        scales = {id(layer.latent): layer.weight_scale for layer in self._layers}
        for module in self._modules:  # after a cast, layers of one weight have a scale each
            if module.weight_scale is not scales[id(module.latent)]:
                module.weight_scale.detach().copy_(scales[id(module.latent)])

    def anneal(self, progress: float) -> None:
        """Set the method's coefficient for the next step, and the forward passes after it.

        A loop that goes on from a checkpoint calls it once with the progress that it had reached,
        before its first forward pass: a Follower has no state that could be stored.

        Args:
            progress: share of all steps taken once it is made, 0 to 1.

        Raises:
            RecipeError: it is no share, such as a number of steps.
        """
        check_progress(progress)
        waits = self._rule.annealed and progress == 0
        for module in self._modules:
            module.strength = self._rule.course(self._final, min(progress, 1.0))
            module.untouched = id(module) if waits else None

    def shown(self, progress: float) -> dict[str, float]:
        """Return what the progress bar shows: the method's coefficient, if it has one."""
        if self._rule.strength is None:
            return {}
        return {"strength": self._rule.course(self._final, progress)}

    @torch.no_grad()
    def feasible_share(self) -> float:
        """Return the share of quantized weights that the forward pass sees on a level."""
        inside = total = 0
        for layer in self._layers:
            seen = layer.seen_rows()
            level = layer.grid.snap(seen, layer.row_scale()) if seen.numel() else seen
            inside += int(sharding.add_up_((seen == level).sum(), layer.latent))
            total += layer.latent.numel()
        return inside / total


def check_gradients(layers: Iterable[nn.Module]) -> None:
    """Check that the gradients of some layers' outputs are those of one product with a weight.

    Raises:
        ModelError: a layer with several weights, or one whose weight another layer multiplies by.
    """
    for layer in layers:
        leaves = leaves_of(layer)
        if leaves == ["weight"] and not isinstance(layer, NonDynamicallyQuantizableLinear):
            continue
        has = "never sees its input, for MultiheadAttention reads its weight"
        if leaves != ["weight"]:
            has = f"has several weights, {leaves[0]} among them"
        raise ModelError(
            f"gradient_bits rounds the gradients of a layer's output, but {type(layer).__name__} "
            f"{has}; exclude the attention's or experts' layers, or leave gradient_bits out."
        )


def _round_gradients(weights: list[QuantizedWeight], bits: int) -> None:
    """Let layers round the gradients that reach their outputs, until they follow another rule."""
    hook = functools.partial(quantize_gradient, bits)
    for weight in weights:
        weight.gradient_hook = weight.owner.register_forward_hook(hook)
