"""Polishing: the codes stay as they are, and scales, biases and norms train on.

A weight is level times scale at every step, so what is trained is what is packed.
"""

from typing import Any

import torch
from torch import Tensor, nn

from askewq.errors import ModelError
from askewq.grid import Grid, shortened
from askewq.layers import QuantizedWeight, follow_, quantized_layers, uncompiled
from askewq.methods import Rule


def _scaled(weight: Tensor, scale: Tensor, _: Grid, __: float) -> Tensor:
    """Return the weight, to the bit; its gradient goes to the scale alone."""
    return weight.detach() * (scale / scale.detach())


POLISH = Rule(_scaled, learns_scale=True)


class Polisher:
    """Holds the codes of a snapped model while AdamW trains what has fewer than two dimensions.

    That are biases, the weights of norms, and the scales, of which a step of AdamW changes a share:
    with lr = 0.001, a scale by about a thousandth. Weights that stay float rest, too, and so do the
    scales of frozen ones.

    Args:
        model: a model whose quantized weights are snapped (`layers.snap_`); wrap it in
            DistributedDataParallel afterwards, which has to know the scales.
        lr: of AdamW; in scales, a share.

    Raises:
        ModelError: weights between the levels, no quantized layer, nothing that requires a
            gradient, or DistributedDataParallel.

    Attributes:
        optimizer: to make the steps with; each takes the codes along.

    Example:
        >>> polisher = Polisher(model, lr=1e-3)
        >>> loss(model(x), y).backward()  # for every batch
        >>> polisher.optimizer.step()
        >>> polisher.optimizer.zero_grad()
        >>> polisher.finish_()
    """

    def __init__(self, model: nn.Module, lr: float) -> None:
        self._layers = list(quantized_layers(model).values())
        _check(model, self._layers)
        self._model = model
        self._rested = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
        frozen = [not layer.latent.requires_grad for layer in self._layers]
        for parameter in self._rested:
            parameter.requires_grad_(False)
        follow_(model, POLISH)
        for layer, rests in zip(self._layers, frozen, strict=True):
            layer.weight_scale.requires_grad_(not rests)
        self._before: list[tuple[Tensor, Tensor]] = []
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr, weight_decay=0.0)
        self._hook()

    def _hook(self) -> None:
        self.optimizer.register_step_pre_hook(self._begin)
        self.optimizer.register_step_post_hook(self._rescale)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become a copy, made together with the model: torch copies no hooks."""
        self.__dict__.update(state)
        self._hook()

    def _begin(self, optimizer: Any, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Prepare the layers for a step; a closure has its turn before, with scales as they are."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._remember()
            return None
        with torch.enable_grad():
            loss = closure()
        self._remember()
        return (optimizer, lambda: loss), {}

    @torch.no_grad()
    def _remember(self) -> None:
        self._before = [
            (layer.codes(), layer.weight_scale.detach().clone()) for layer in self._layers
        ]
        for layer in self._layers:  # what is added to a large one would be lost in its digits
            layer.weight_scale.zero_()

    @torch.no_grad()
    def _rescale(self, *_: Any) -> None:
        for layer, (codes, before) in zip(self._layers, self._before, strict=True):
            layer.rescale_(codes, before * (1 + layer.weight_scale.clamp(-0.5, 1.0)))
        self._before = []

    @torch.no_grad()
    def finish_(self) -> None:
        """Round the scales to as many digits as fitted ones have, and end the polishing."""
        for layer in self._layers:
            scale = layer.weight_scale.detach()
            layer.rescale_(layer.codes(), shortened(scale.double()).to(scale.dtype))
        follow_(self._model, None)
        torch.clear_autocast_cache()  # it knows the weights by their Parameters
        for parameter in self._rested:
            parameter.requires_grad_(True)


def _check(model: nn.Module, layers: list[QuantizedWeight]) -> None:
    if isinstance(uncompiled(model), nn.parallel.DistributedDataParallel):
        raise ModelError(
            "the model is in DistributedDataParallel, which does not know the scales that are "
            "trained now; polish model.module, and wrap it afterwards."
        )
    if not layers:
        raise ModelError("the model has no quantized layer, and so nothing to polish.")
    trained = [layer.latent for layer in layers] + [p for p in model.parameters() if p.dim() < 2]
    if not any(parameter.requires_grad for parameter in trained):
        raise ModelError("nothing of the model requires a gradient, so nothing would be polished.")
    if not all(layer.is_snapped() for layer in layers):
        raise ModelError(
            "the model has weights between the levels, whose codes are not settled; call "
            "askewq.snap_(model) first."
        )
