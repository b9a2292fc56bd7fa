"""Quantization-aware layers: the original module with a grid and a scale, and its own forward.

A layer becomes quantization-aware by a change of class to a subclass of its own: same object,
same Parameter, same state-dict keys (plus ``weight_scale``), same hooks and the same forward, so
that every subclass of a layer in kinds.py that uses its weight linearly keeps working. The forward
pass sees the Parameter itself, or what a rule (`follow_`) makes of it: AskewSGD's lazy closing, or
another method; after the snap, the snapped weight.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from askewq import sharding
from askewq.errors import DivergenceError
from askewq.grid import Grid, channels_back, channels_first
from askewq.kinds import channel_dim
from askewq.methods import Rule
from askewq.mixed import Mixin, mix_


class QuantizedLayer(Mixin):
    """Mixin of a layer whose weight belongs on a grid.

    Attributes:
        grid: the levels, in units of the scale.
        weight_scale: buffer [out, groups], written in place only; a Parameter where it is learned.
        channel_dim: the dimension of the weight that counts output channels.
        rule: how the forward pass sees the weight; None: as it is.
        strength: the present coefficient of that rule.
        seen: the weight that the forward pass sees, where it was made beforehand (`prepared`).
    """

    prefix = "Quantized"
    grid: Grid
    weight_scale: Tensor
    channel_dim: int
    rule: Rule | None = None
    strength: float = 0.0
    seen: Tensor | None = None

    @property
    def latent(self) -> nn.Parameter:
        """The trained Parameter."""
        return cast(nn.Parameter, self._parameters["weight"])

    @property
    def weight(self) -> Tensor:
        """The weight that the forward pass sees."""
        if self.seen is not None:
            return self.seen
        if self.rule is None or self.rule.view is None or sharding.is_sharded(self.latent):
            return self.latent  # sharded: FSDP2 asks; a forward pass has it gathered
        return self.from_rows(self.seen_rows())

    def seen_rows(self) -> Tensor:
        """Return the weight that the forward pass sees, as `rows`; of a shard, this part."""
        rows = self.rows(self.latent)
        if self.rule is None or self.rule.view is None or not rows.numel():
            return rows
        return self.rule.view(rows, self.row_scale(), self.grid, self.strength)

    def rows(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the weight's shape as rows that share a scale, [rows, columns].

        Contiguous; a view where the rows lie in memory like that, else a copy. Of a tensor that is
        spread over processes, this process' part.
        """
        first = channels_first(sharding.local(tensor), self.channel_dim)
        height = self._height()
        return first.reshape(height, first.numel() // max(1, height)).contiguous()

    def _height(self) -> int:
        """Return the number of rows."""
        if not sharding.is_sharded(self.latent) or self.weight_scale.numel() == 1:
            return self.weight_scale.numel()
        out, groups = self.weight_scale.shape
        if self.channel_dim:
            return out
        start, stop = sharding.span(self.latent)
        return (stop - start) * groups

    def row_scale(self) -> Tensor:
        """Return the scale of each of the `rows`, [rows, 1].

        Where a weight is cut across its groups, [rows, columns]: the scale of each element.
        """
        scale = sharding.whole(self.weight_scale)
        if not sharding.is_sharded(self.latent) or scale.numel() == 1:
            return scale.view(-1, 1)
        start, stop = sharding.span(self.latent)
        if self.channel_dim == 0:
            return scale[start:stop].reshape(-1, 1)
        if scale.shape[1] == 1:
            return scale
        # A transposed weight, [in, out]: its shards are cut across the rows.
        return scale.repeat_interleave(self.latent.shape[0] // scale.shape[1], 1)[:, start:stop]

    def from_rows(self, rows: Tensor) -> Tensor:
        """Return rows, [rows, columns], in the weight's shape; contiguous."""
        shape = channels_first(sharding.local(self.latent), self.channel_dim).shape
        return channels_back(rows.reshape(shape), self.channel_dim)

    def codes(self) -> Tensor:
        """Return the code of the level nearest to each weight, uint8, channels first.

        Raises:
            DivergenceError: a weight that is NaN or infinite has no nearest level.
        """
        weight = self.latent.detach()
        if not torch.isfinite(weight).all():
            raise DivergenceError(
                f"a weight of shape {tuple(weight.shape)} holds NaN or infinite values and cannot "
                "be rounded; go back to an earlier checkpoint and train with a smaller lr."
            )
        return self.grid.codes(channels_first(weight, self.channel_dim), self.weight_scale.detach())

    @torch.no_grad()
    def snap_(self) -> None:
        """Move every weight to its nearest level, in place."""
        if sharding.is_sharded(self.latent):
            if (rows := self.rows(self.latent)).numel():
                self._write_(self.grid.snap(rows, self.row_scale()))
            return
        values = self.grid.values(self.codes(), self.weight_scale)
        channels_first(self.latent, self.channel_dim).copy_(values)

    @torch.no_grad()
    def settle_(self) -> None:
        """Do to the weight what the layer's method does after an update, in place."""
        if self.rule is None:
            return
        if self.rule.learns_scale:
            scale = sharding.local(self.weight_scale)
            scale.clamp_(min=torch.finfo(scale.dtype).tiny)
        if self.rule.rescale is not None:
            first = channels_first(sharding.whole(self.latent), self.channel_dim)
            scale = self.weight_scale.view(-1, 1)
            scale.copy_(self.rule.rescale(first.reshape(len(scale), -1).contiguous(), self.grid))
        if self.rule.settle is not None and (rows := self.rows(self.latent)).numel():
            self._write_(self.rule.settle(rows, self.row_scale(), self.grid, self.strength))

    def _write_(self, rows: Tensor) -> None:
        sharding.local(self.latent).copy_(self.from_rows(rows))


def quantize_layer_(layer: nn.Module, grid: Grid, scale: Tensor) -> None:
    """Make a layer quantization-aware, in place; `scale` is [out, groups].

    Raises:
        ModelError: a layer of no kind that askewq knows (kinds.py).
    """
    layer.channel_dim = channel_dim(layer)  # type: ignore[assignment]  # a plain attribute
    layer.register_buffer("weight_scale", scale)
    mix_(layer, QuantizedLayer)
    layer.grid = grid  # type: ignore[assignment]  # the same


def quantized_modules(model: nn.Module) -> list[QuantizedLayer]:
    """Return every quantization-aware layer, those that share a weight included."""
    return [module for module in model.modules() if isinstance(module, QuantizedLayer)]


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Return the quantization-aware layers by name; of layers that share a weight, the first."""
    found: dict[int, tuple[str, QuantizedLayer]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            found.setdefault(id(module.latent), (name, module))
    return dict(found.values())


def follow_(model: nn.Module, rule: Rule | None) -> None:
    """Let all quantized layers follow a rule from now on; None: weights are seen as they are."""
    learns = rule is not None and rule.learns_scale
    scales: dict[int, Tensor] = {}  # layers that share a weight share its scale
    for module in quantized_modules(model):
        module.rule = rule
        scale = module.weight_scale.detach()
        scale = scales.setdefault(id(module.latent), nn.Parameter(scale) if learns else scale)
        del module.weight_scale
        if isinstance(scale, nn.Parameter):
            module.register_parameter("weight_scale", scale)
        else:
            module.register_buffer("weight_scale", scale)


@contextmanager
def prepared(model: nn.Module) -> Iterator[None]:
    """Within the block every layer uses the weight that it saw at the beginning.

    A compiled network takes these weights as inputs: what a rule does, and a coefficient that
    changes at every step, are then no part of it, so nothing is compiled twice.
    """
    made = []
    for module in quantized_modules(model):
        if (weight := module.weight) is not module.latent:
            module.seen = weight
            made.append(module)
    try:
        with warnings.catch_warnings():
            # The compiler looks at the .grad of its inputs, these weights among them.
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            yield
    finally:
        for module in made:
            module.seen = None


def snap_(model: nn.Module) -> None:
    """Move every quantized weight of the model to its nearest level, in place, for good."""
    for layer in quantized_layers(model).values():
        layer.snap_()
    follow_(model, None)


@contextmanager
def snapped(model: nn.Module) -> Iterator[None]:
    """Within the block the quantized weights sit on their levels; after it they are as before."""
    layers, modules = quantized_layers(model).values(), quantized_modules(model)
    relaxed = [layer.latent.detach().clone() for layer in layers]
    rules = [module.rule for module in modules]
    try:
        for layer in layers:
            layer.snap_()
        for module in modules:
            module.rule = None
        yield
    finally:
        with torch.no_grad():
            for layer, weight in zip(layers, relaxed, strict=True):
                layer.latent.copy_(weight)
        for module, rule in zip(modules, rules, strict=True):
            module.rule = rule
