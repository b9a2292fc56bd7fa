"""Layers that keep the packed codes and unpack them on use: `askewq.load(folder, packed=True)`.

A layer becomes packed by a change of class, as in layers.py: its Parameter `weight`, or each of its
weights, gives way to a submodule of the same name that holds the codes and the scale under the
names that they have in the file, and to a property that unpacks them, so that every subclass keeps
its own forward. The weight that a forward pass sees is that of the dense load, to the bit, in every
type and on every device; like a frozen one it asks for no gradients, by which torch chooses how it
multiplies a batch that is not contiguous.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from askewq.checkpoint import (
    Artifact,
    attach_inputs_,
    check_fit,
    input_scales,
    inputs_of,
    shared_names,
)
from askewq.errors import FormatError
from askewq.grid import Grid
from askewq.kinds import leaves_of
from askewq.layers import uncompiled
from askewq.manifest import PackedWeight
from askewq.mixed import Mixin, mix_, unmix_
from askewq.pack import unpack_rows

_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Slot(NamedTuple):
    """Where a weight is: a layer, and the weight's name there."""

    layer: nn.Module
    leaf: str

    @property
    def parameter(self) -> nn.Parameter:
        """The Parameter that is there before anything is packed."""
        return self.layer.get_parameter(self.leaf)


class PackedTensor(nn.Module):
    """A weight as codes and scale; calling it unpacks. Layers that share a weight share this.

    Attributes:
        codes: buffer, uint8, 1-D.
        scale: buffer, float32 [out, groups]; a cast of the model leaves it as it is.
        grid: the levels, in units of the scale.
        shape: of the weight.
        channel_dim: the dimension of it that counts output channels.
        dtype: of the weight that it unpacks to, rounded once from float32.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scale", weight.scale)
        self.grid: Grid = weight.grid
        self.shape = weight.shape
        self.channel_dim = weight.channel_dim
        self.dtype = torch.float32
        self.channels_last = False  # no torch.memory_format: torch.save cannot pickle one

    def content(self) -> PackedWeight:
        """Return the codes and the scale with what they mean."""
        return PackedWeight(self.grid, self.shape, self.codes, self.scale, self.channel_dim)

    @torch.no_grad()
    def forward(self) -> Tensor:
        """Return the dense weight."""
        dense = self.content().dense().to(self.dtype)
        if not self.channels_last:  # as it is, or as the layer of its kind has it
            return dense
        # `contiguous` would leave the strides of a kernel of one pixel as they are.
        return torch.empty_like(dense, memory_format=_LAST[dense.dim()]).copy_(dense)

    @torch.no_grad()
    def rows(self, indices: Tensor) -> Tensor:
        """Return rows of a matrix [rows, columns] as [*indices, columns]; only they are unpacked.

        Raises:
            IndexError: an index that is no row.
        """
        count, columns = self.shape
        rows = indices.reshape(-1).long()
        # torch's own look-up refuses what is no row, and gives no gradient here.
        scale = nn.functional.embedding(rows, self.scale.expand(count, -1))
        codes = unpack_rows(self.codes, self.grid.bits, columns, rows)
        values = self.grid.values(codes, scale) if len(rows) else scale.new_empty(0)
        return values.to(self.dtype).view(*indices.shape, columns)

    def extra_repr(self) -> str:
        """Return what printing the model says of this weight."""
        return f"{list(self.shape)}, bits={self.grid.bits}, {self.codes.nbytes:,} bytes of codes"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedTensor":
        """Move the codes and the scale; a cast concerns the dense weight alone."""
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        small = torch.empty((2,) * len(self.shape), dtype=self.dtype, device=scale.device)
        if self.channels_last:
            small = small.contiguous(memory_format=_LAST[small.dim()])
        self.take_after(fn(small))
        return self

    def take_after(self, weight: Tensor) -> None:
        """Give the dense weight the type and the memory format of another one."""
        self.dtype = weight.dtype
        self.channels_last = False
        if weight.dim() in _LAST:
            first = torch.empty(weight.shape, device="meta")
            last = torch.empty_like(first, memory_format=_LAST[weight.dim()])
            self.channels_last = first.stride() != weight.stride() == last.stride()


class PackedLayer(Mixin):
    """Mixin of a layer whose weights are unpacked whenever they are read."""

    prefix = "Packed"

    def read(self, leaf: str) -> Tensor:
        """Return the dense snapped weight, made anew; it cannot be trained."""
        return cast(Tensor, cast(PackedTensor, self._modules[leaf])())

    @property
    def packed(self) -> PackedTensor:
        """The codes and the scale of the weight called `weight`."""
        return cast(PackedTensor, self._modules["weight"])

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse to replace a weight, which nn.Module would do by dropping the codes."""
        if name in self.leaves:
            raise AttributeError(
                "a packed weight cannot be assigned; load the artifact without packed=True."
            )
        super().__setattr__(name, value)


class PackedEmbedding(PackedLayer):
    """Mixin of an nn.Embedding, which unpacks the rows that it looks up and no others."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of the dense weight that the indices name."""
        return self.packed.rows(input)


def attach_(slot: Slot, packed: PackedTensor) -> None:
    """Let a packed weight take the place of a Parameter, in place.

    Until `seal_` the attribute is the `PackedTensor` itself, for a loader to fill by name.
    """
    del slot.layer._parameters[slot.leaf]
    slot.layer._modules[slot.leaf] = packed


def attached(layer: nn.Module) -> tuple[str, ...]:
    """Return the names of a layer's packed weights."""
    return tuple(leaf for leaf, m in layer._modules.items() if isinstance(m, PackedTensor))


def seal_(layer: nn.Module) -> None:
    """Let a layer unpack its attached weights from now on, in place."""
    leaves = attached(layer)
    looks_up = type(layer).forward is nn.Embedding.forward
    by_row = all(cast(PackedTensor, layer._modules[leaf]).channel_dim == 0 for leaf in leaves)
    mix_(layer, PackedEmbedding if looks_up and by_row else PackedLayer, leaves)


def unpack_(model: nn.Module) -> None:
    """Give the packed layers of a model their classes and dense Parameters back, in place.

    A weight that layers share is one Parameter again.
    """
    dense = {m: nn.Parameter(m()) for m in model.modules() if isinstance(m, PackedTensor)}
    for layer in [m for m in model.modules() if isinstance(m, PackedLayer)]:
        unmix_(layer, PackedLayer)
        for leaf in attached(layer):
            packed = cast(PackedTensor, layer._modules.pop(leaf))
            layer.register_parameter(leaf, dense[packed])


def load_packed_into(model: nn.Module, artifact: Artifact) -> None:
    """Fill a plain model, in place, and keep the artifact's weights packed in it.

    Raises:
        FormatError: as `checkpoint.check_fit`, or a packed weight that is no layer's (`slot_of`).
    """
    model = uncompiled(model)
    check_fit(model, artifact)
    packed = {name: PackedTensor(weight) for name, weight in artifact.weights.items()}
    packed |= {n: packed[source] for n, source in artifact.shared.items() if source in packed}
    slots = {slot_of(model, name): weight for name, weight in packed.items()}
    for slot, weight in slots.items():  # one for a layer of two names, too
        weight.to(slot.parameter.device)
        weight.take_after(slot.parameter)
        attach_(slot, weight)
    for layer in dict.fromkeys(slot.layer for slot in slots):
        seal_(layer)
    target = model.state_dict()
    with torch.no_grad():
        for name, tensor in artifact.tensors.items():
            target[name].copy_(tensor)
        for name, source in artifact.shared.items():
            if name not in packed:
                target[name].copy_(artifact.tensors[source])
    attach_inputs_(model, artifact)


def slot_of(model: nn.Module, name: str) -> Slot:
    """Return where a Parameter is that may stay packed: `weight`, or a weight that kinds.py names.

    Raises:
        FormatError: there is none.
    """
    path, _, leaf = name.rpartition(".")
    layer = model.get_submodule(path)
    known = leaf == "weight" or leaf in leaves_of(layer)
    if not known or layer._parameters.get(leaf) is None:
        raise FormatError(
            f"{name!r} of {type(layer).__name__} cannot stay packed: only a layer's parameter "
            "'weight' can, and those of attention and experts; load the artifact without "
            "packed=True."
        )
    return Slot(layer, leaf)


def artifact_of(model: nn.Module) -> Artifact:
    """Return the content of the file for a model whose packed layers came from one."""
    first: dict[int, str] = {}
    shared: dict[str, str] = {}
    weights: dict[str, PackedWeight] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedTensor):
            source = first.setdefault(id(module), name)
            if source == name:
                weights[name] = module.content()
            else:
                shared[name] = source
    inside = {f"{name}.{leaf}" for name in (*weights, *shared) for leaf in ("codes", "scale")}
    inside |= input_scales(model)
    shared |= {name: source for name, source in shared_names(model).items() if name not in inside}
    state = model.state_dict()
    tensors = {n: t for n, t in state.items() if n not in inside and n not in shared}
    return Artifact(weights, tensors, shared, inputs=inputs_of(model))
