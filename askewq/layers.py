"""Quantization-aware layers: the original module with a grid and a scale, and its own forward.

A layer becomes quantization-aware by a change of class to a subclass of its own: same object,
same Parameter, same state-dict keys (plus ``weight_scale``), same hooks and the same forward, so
that every subclass of a layer in kinds.py that uses its weight linearly keeps working. The forward
pass sees the Parameter itself, or what a rule (`follow_`) makes of it: AskewSGD's lazy closing, or
another method; after the snap, the snapped weight.

A layer whose one weight is called `weight` is a `QuantizedWeight` itself; one with weights of other
names (attention, experts) holds a `QuantizedPart` for each.
"""

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.hooks import RemovableHandle

from askewq import sharding
from askewq.errors import DivergenceError, ModelError
from askewq.grid import Grid, channels_back, channels_first
from askewq.kinds import channel_dim
from askewq.methods import Rule
from askewq.mixed import Mixin, mix_, unmix_


class QuantizedWeight:
    """A weight that belongs on a grid.

    Attributes:
        owner: the module that has it.
        leaf: its name there.
        grid: the levels, in units of the scale.
        weight_scale: buffer [out, groups], written in place only; a Parameter where it is learned.
        channel_dim: the dimension of the weight that counts output channels.
        rule: how the forward pass sees the weight; None: as it is.
        strength: the present coefficient of that rule.
        untouched: its own id where what trains it has not begun to anneal it; a copy has another
            id, and nobody anneals it.
        seen: the weight that the forward pass sees, where it was made beforehand (`prepared`).
        gradient_hook: what rounds the gradients of the layer's output, where its method does.
    """

    owner: nn.Module
    leaf: str
    grid: Grid
    weight_scale: Tensor
    channel_dim: int
    rule: Rule | None = None
    strength: float = 0.0
    untouched: int | None = None
    seen: Tensor | None = None
    gradient_hook: RemovableHandle | None = None

    @property
    def latent(self) -> nn.Parameter:
        """The trained Parameter."""
        parameter = self.owner._parameters.get(self.leaf)
        if parameter is None:
            raise ModelError(
                f"the Parameter {self.leaf!r} of a quantized layer was taken away; prune and "
                "parametrize before askewq.quantize, which leaves such layers in float."
            )
        return parameter

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
        # Output channels are another dimension than the one that is cut: shards cut across rows.
        others = [n for i, n in enumerate(self.latent.shape) if i != self.channel_dim]
        each = scale.repeat_interleave(math.prod(others) // scale.shape[1], 1)
        return each.view(len(scale), *others)[:, start:stop].reshape(len(scale), -1)

    def from_rows(self, rows: Tensor) -> Tensor:
        """Return rows, [rows, columns], in the weight's shape; contiguous."""
        shape = channels_first(sharding.local(self.latent), self.channel_dim).shape
        return channels_back(rows.reshape(shape), self.channel_dim)

    def check_precision(self) -> None:
        """Check that the trained Parameter holds small updates.

        Raises:
            ModelError: it is below float32.
        """
        if self.latent.dtype not in (torch.float32, torch.float64):
            raise ModelError(
                f"a quantized weight became {self.latent.dtype}; keep the model in float32 and use "
                "bf16 through autocast."
            )

    def codes(self) -> Tensor:
        """Return the code of the level nearest to each weight, uint8, channels first.

        Raises:
            DivergenceError: a weight that is NaN or infinite has no nearest level.
            ModelError: a cast to bfloat16, whose 8 bits do not tell more than 64 levels apart:
                weight, scale and quotient are rounded; to float16, of scales that are too small.
        """
        weight = self.latent.detach()
        if weight.dtype == torch.bfloat16 and self.grid.size > 64:
            raise ModelError(
                f"a weight on {self.grid.size} levels became bfloat16, which does not tell them "
                "apart: keep the model in float32 and use bf16 through autocast, or cast what was "
                "loaded from an artifact."
            )
        scale = self.weight_scale.detach()
        rows = channels_first(weight, self.channel_dim)
        if weight.dtype == torch.float16:
            used = (rows.flatten(1) != 0).any(1, keepdim=True)  # zeros need no scale
            if ((scale < 2.0**-14) & used).any():
                raise ModelError(
                    "a scale became a float16 below 2^-14, where that has fewer digits: keep the "
                    "model in float32, or cast what was loaded from an artifact."
                )
        if not torch.isfinite(weight).all():
            raise DivergenceError(
                f"a weight of shape {tuple(weight.shape)} holds NaN or infinite values and cannot "
                "be rounded; go back to an earlier checkpoint and train with a smaller lr."
            )
        return self.grid.codes(rows, scale)

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
    def is_snapped(self) -> bool:
        """Tell whether every weight is on a level, and the forward pass sees it there."""
        rows = self.rows(self.latent)
        return self.rule is None and torch.equal(rows, self.grid.snap(rows, self.row_scale()))

    @torch.no_grad()
    def rescale_(self, codes: Tensor, scale: Tensor) -> None:
        """Put the weight on the levels of these codes, in place, with another scale."""
        self.weight_scale.copy_(scale)
        channels_first(self.latent, self.channel_dim).copy_(self.grid.values(codes, scale))

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


# The key of a module's metadata in a state dict under which its grids are.
_GRIDS = "askewq_grids"


class _Quantized(Mixin):
    """What the mixins of quantized layers share."""

    prefix = "Quantized"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Give the module's tensors to a state dict, and its grids to the metadata beside them."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if metadata := getattr(destination, "_metadata", None):
            metadata[prefix[:-1]][_GRIDS] = self._grids()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *more: Any
    ) -> None:
        """Take the module's tensors from a state dict, unless they were on other grids."""
        stored = local_metadata.get(_GRIDS, self._grids())
        if stored != self._grids():
            *_, errors = more
            errors.append(
                f"{prefix[:-1]!r} was trained on the levels {stored} and is on {self._grids()} "
                "(bits, the lowest level and the spacing); quantize the model as it was."
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *more)

    def _grids(self) -> dict[str, list[Any]]:
        """Return what tells the grids of the weights apart, by name, as plain values."""
        grids = {weight.leaf: weight.grid for _, weight in _weights_of(self, "")}
        return {leaf: [grid.bits, grid.first, grid.step] for leaf, grid in grids.items()}

    def _replicate_for_data_parallel(self) -> Any:
        """Refuse torch.nn.DataParallel, which puts a tensor in the place of every weight.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            "torch.nn.DataParallel copies no quantized layer; use DistributedDataParallel, one "
            "process for each GPU."
        )


class QuantizedLayer(QuantizedWeight, _Quantized):
    """Mixin of a layer with one weight on a grid, called `weight`."""

    leaf = "weight"

    @property
    def owner(self) -> nn.Module:  # type: ignore[override]  # read only here
        """The layer itself."""
        return self


class QuantizedPart(QuantizedWeight):
    """One of the weights of a layer that calls none `weight`; its scale is a buffer there."""

    def __init__(self, owner: nn.Module, leaf: str) -> None:
        self.owner = owner
        self.leaf = leaf

    @property
    def weight_scale(self) -> Tensor:  # type: ignore[override]  # read only here
        """The scale, as the layer holds it."""
        return cast(Tensor, getattr(self.owner, scale_name(self.leaf)))


class QuantizedParts(_Quantized):
    """Mixin of a layer with weights of other names on grids.

    Attributes:
        parts: those weights by name.
    """

    parts: dict[str, QuantizedPart]

    def read(self, leaf: str) -> Tensor:
        """Return the weight that the forward pass sees."""
        return self.parts[leaf].weight


def scale_name(leaf: str) -> str:
    """Return the name of the buffer that holds a weight's scale."""
    return f"{leaf}_scale"


def quantize_layer_(layer: nn.Module, grid: Grid, scale: Tensor, leaf: str = "weight") -> None:
    """Make a weight of a layer quantization-aware, in place; `scale` is [out, groups].

    Raises:
        ModelError: a layer of no kind that askewq knows (kinds.py).
    """
    dim = channel_dim(layer)
    layer.register_buffer(scale_name(leaf), scale)
    weight: Any = layer
    if leaf == "weight":
        mix_(layer, QuantizedLayer)
    else:
        parts = {}
        if isinstance(layer, QuantizedParts):  # by another of its weights
            parts = layer.parts
            unmix_(layer, QuantizedParts)
        weight = parts[leaf] = QuantizedPart(layer, leaf)
        layer.parts = parts  # type: ignore[assignment]  # a plain attribute
        mix_(layer, QuantizedParts, tuple(parts))
    weight.channel_dim, weight.grid = dim, grid


def uncompiled(model: nn.Module) -> nn.Module:
    """Return a network itself, also where torch.compile has wrapped it.

    Raises:
        ModelError: it is none.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"{model!r:.60} is no network; pass the torch.nn.Module itself.")
    return cast(nn.Module, model._modules.get("_orig_mod", model))


def unwrapped(model: nn.Module) -> nn.Module:
    """Return a network itself, also in torch.compile, DistributedDataParallel or an average."""
    inner = uncompiled(model)
    if isinstance(inner, nn.parallel.DistributedDataParallel | AveragedModel):
        return uncompiled(inner.module)
    return inner


def _weights_of(module: nn.Module, name: str) -> Iterator[tuple[str, QuantizedWeight]]:
    if isinstance(module, QuantizedLayer):
        yield name, module
    elif isinstance(module, QuantizedParts):
        yield from ((f"{name}.{leaf}".lstrip("."), part) for leaf, part in module.parts.items())


def quantized_modules(model: nn.Module) -> list[QuantizedWeight]:
    """Return the quantized weight of every layer, shared ones once for each layer."""
    modules = uncompiled(model).modules()
    return [weight for module in modules for _, weight in _weights_of(module, "")]


def quantized_layers(model: nn.Module) -> dict[str, QuantizedWeight]:
    """Return the quantized weights, of those that layers share the first, by the layer's name.

    A weight that is not called `weight` has its own name behind the layer's.
    """
    found: dict[int, tuple[str, QuantizedWeight]] = {}
    for path, module in uncompiled(model).named_modules():
        for name, weight in _weights_of(module, path):
            found.setdefault(id(weight.latent), (name, weight))
    return dict(found.values())


def follow_(model: nn.Module, rule: Rule | None) -> None:
    """Let all quantized layers follow a rule from now on; None: weights are seen as they are."""
    learns = rule is not None and rule.learns_scale
    scales: dict[int, Tensor] = {}  # layers that share a weight share its scale
    for module in quantized_modules(model):
        module.rule, module.untouched = rule, None
        if module.gradient_hook is not None:
            module.gradient_hook.remove()
            module.gradient_hook = None
        scale = module.weight_scale.detach()
        if learns:  # with its weight
            scale = nn.Parameter(scale, module.latent.requires_grad)
        scale = scales.setdefault(id(module.latent), scale)
        name = scale_name(module.leaf)
        delattr(module.owner, name)
        if isinstance(scale, nn.Parameter):
            module.owner.register_parameter(name, scale)
        else:
            module.owner.register_buffer(name, scale)


def check_rule(modules: Iterable[QuantizedWeight], rule: Rule | None) -> None:
    """Check that weights still follow the rule of what trains them.

    Raises:
        ModelError: they were snapped, or follow another method.
    """
    if any(module.rule != rule for module in modules):
        raise ModelError(
            "the model was snapped for good, or follows another method by now, so that this "
            "optimizer cannot go on; look at the model inside askewq.snapped(model), or make a new "
            "optimizer to train on."
        )


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
    """Move every quantized weight of the model to its nearest level, in place, for good.

    Warns where what trains the model is to be annealed and never was, for then this is plain
    rounding. A model without quantized layers stays as it is.

    Raises:
        DivergenceError: a weight that is NaN or infinite; the layers before it are snapped.
    """
    if any(module.untouched == id(module) for module in quantized_modules(model)):
        warnings.warn(
            "the intervals of this model never began to close, or its method to act, so that its "
            "weights are rounded as they are; call anneal(progress), of the AskewSGD optimizer or "
            "of the Follower, before every optimizer.step().",
            stacklevel=2,
        )
    for layer in quantized_layers(model).values():
        layer.snap_()
    follow_(model, None)
    torch.clear_autocast_cache()  # it knows the weights by their Parameters


@contextmanager
def snapped(model: nn.Module) -> Iterator[None]:
    """Within the block the quantized weights sit on their levels; after it they are as before.

    Raises:
        DivergenceError: a weight that is NaN or infinite; all are as before.
    """
    layers, modules = quantized_layers(model).values(), quantized_modules(model)
    relaxed = [layer.latent.detach().clone() for layer in layers]
    rules = [module.rule for module in modules]
    torch.clear_autocast_cache()  # as `snap_`
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
        torch.clear_autocast_cache()
