"""The model walker: `plan` says what happens to every layer with parameters, `apply` does it.

The plan is a pure table: training, evaluation, packing and `askewq inspect` read the same one.
"""

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from askewq.errors import ModelError, PlanError, near
from askewq.grid import Grid, channels_first, fit_scale, input_grid, make_grid, scale_shape
from askewq.kinds import Kind, kind_of, ramp
from askewq.layers import quantize_layer_, quantized_layers
from askewq.pack import packed_size
from askewq.vocabulary import ActBits, Bits, GridKind, GroupSize


@dataclass(frozen=True, slots=True)
class PlannedLayer:
    """One weight: its grid, or the reason why it stays as it is.

    Attributes:
        names: the module that owns the weight first, then those that share it.
        kind: the module's class.
        shape: of the weight; of the first parameter where the module has no `weight`.
        parameters: elements in all parameters that this module owns first.
        grid: None for a layer left in floating point.
        channel_dim: the dimension of the weight that counts output channels.
        group_size: of the scale; a layer whose rows it does not divide falls back to "channel".
        note: why it stays float, or what is special.
        act_bits: of the layer's input, which `activations.round_inputs` rounds.
    """

    names: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    parameters: int
    grid: Grid | None
    channel_dim: int
    group_size: GroupSize
    note: str
    act_bits: ActBits = "none"

    @property
    def weights(self) -> int:
        """Quantized weights of the layer."""
        return torch.Size(self.shape).numel() if self.grid else 0

    @property
    def packed_bytes(self) -> int:
        """Bytes of its codes and float32 scales."""
        if self.grid is None:
            return 0
        out, groups = scale_shape(_channels(self.shape, self.channel_dim), self.group_size)
        return packed_size(self.weights, self.grid.bits) + 4 * out * groups


@dataclass(frozen=True, slots=True)
class Plan:
    """What happens to every layer with parameters, in the order of the model."""

    layers: tuple[PlannedLayer, ...]

    @property
    def quantized(self) -> tuple[PlannedLayer, ...]:
        """The layers that get a grid."""
        return tuple(layer for layer in self.layers if layer.grid)

    @property
    def total_parameters(self) -> int:
        """All parameters of the model, shared ones counted once."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def quantized_parameters(self) -> int:
        """The parameters that get a grid."""
        return sum(layer.weights for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Packed codes and scales, in bits, over the quantized weights."""
        return 8 * sum(layer.packed_bytes for layer in self.layers) / self.quantized_parameters

    @property
    def predicted_bytes(self) -> int:
        """Size of the packed model: codes, scales, and everything else as float32."""
        rest = self.total_parameters - self.quantized_parameters
        return sum(layer.packed_bytes for layer in self.layers) + 4 * rest


def plan(
    model: nn.Module,
    bits: Bits,
    *,
    grid: GridKind = "integer",
    group_size: GroupSize = "channel",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    act_bits: ActBits = "none",
) -> Plan:
    """Return what quantizing `model` would do; the model is not touched.

    By default every Linear and Conv (transformers' Conv1D, too) gets the grid, except the first and
    the last layer with a weight matrix (embeddings count as first), which carry little of the size
    and much of the accuracy. `include` (glob patterns on module names) selects exactly the named
    layers, first, last and embeddings among them if they match; `exclude` takes layers away again.
    A weight that several layers share is quantized once, for all of them, if one is named.
    `act_bits` are those of the quantized layers' inputs; the indices of embeddings are left.

    Raises:
        RecipeError: bits, grid or group size that do not exist.
        PlanError: a pattern without a match, or nothing left to quantize, or no input to round.
    """
    chosen = make_grid(bits, grid)
    if act_bits != "none":
        input_grid(act_bits, signed=True)
    lazy = [name for name, p in model.named_parameters() if is_lazy(p)]
    if lazy:
        raise PlanError(
            f"{lazy[0]} has no shape yet ({len(lazy)} lazy parameters in all); call the model on a "
            "batch once, then plan."
        )
    if quantized := quantized_layers(model):
        raise PlanError(
            f"the model is quantized already ({next(iter(quantized))} and {len(quantized) - 1} "
            "other layers); plan the plain model."
        )
    scale_shape(torch.Size((1, group_size if isinstance(group_size, int) else 1)), group_size)
    modules = {name: m for name, m in model.named_modules() if any(True for _ in _own(m))}
    _check_patterns([*include, *exclude], list(modules))
    matrices = [name for name, module in modules.items() if _has_matrix(module)]
    ends = dict(zip(matrices[:1] + matrices[-1:], ("first", "last"), strict=False))
    users: dict[int, list[str]] = {}
    for name, module in modules.items():
        users.setdefault(id(_main(module)), []).append(name)
    layers = []
    counted: set[int] = set()
    for names in users.values():
        module = modules[names[0]]
        reason = next(filter(None, (_unsupported(modules[n]) for n in names)), "")
        kinds = [kind for n in names if (kind := kind_of(modules[n]))]
        dims = {kind.channel_dim for kind in kinds} or {0}
        if not reason and len(dims) > 1:
            reason = "shared by layers whose output channels are different dimensions of it"
        reason = reason or _unselected(names, kinds, include, exclude, ends)
        shape, size, notes = _main(module).shape, group_size, [reason]
        row = 0 if reason else _channels(shape, min(dims))[1:].numel()
        if not reason and isinstance(group_size, int) and row % group_size:
            size = "channel"
            notes.append(f"scale per channel: {group_size} does not divide {row}")
        rounds = act_bits != "none" and not reason
        if rounds and all(kind.looks_up for kind in kinds):
            rounds = False
            notes.append("its inputs are indices, which are not rounded")
        if len(names) > 1:
            notes.append(f"weight shared by {', '.join(names[1:])}")
        own = {id(p): p.numel() for name in names for p in _own(modules[name])}
        layers.append(
            PlannedLayer(
                names=tuple(names),
                kind=type(module).__name__,
                shape=tuple(shape),
                parameters=sum(n for key, n in own.items() if key not in counted),
                grid=None if reason else chosen,
                channel_dim=min(dims),
                group_size=size,
                note="; ".join(filter(None, notes)),
                act_bits=act_bits if rounds else "none",
            )
        )
        counted |= own.keys()
    result = Plan(tuple(layers))
    if not result.quantized:
        reasons = "; ".join(f"{layer.names[0]}: {layer.note}" for layer in layers[:5])
        raise PlanError(
            f"none of the model's {len(layers)} layers with parameters can be quantized "
            f"({reasons or 'it has no parameters'}); name layers with include, or exclude fewer."
        )
    if act_bits != "none" and not any(layer.act_bits != "none" for layer in layers):
        raise PlanError(
            f"act_bits = {act_bits}, but all {len(result.quantized)} quantized layers look rows up "
            "by index, so that there is no input to round; include a Linear or Conv layer, or "
            "leave act_bits out."
        )
    return result


def _channels(shape: Sequence[int], channel_dim: int) -> torch.Size:
    """Return the shape of a weight channels first."""
    return channels_first(torch.empty(tuple(shape), device="meta"), channel_dim).shape


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    return module.parameters(recurse=False)


def _main(module: nn.Module) -> nn.Parameter:
    """Return the parameter that names the layer: its weight, or whatever it has first."""
    named = dict(module.named_parameters(recurse=False))
    return named.get("weight", next(iter(named.values())))


def _has_matrix(module: nn.Module) -> bool:
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return weight is not None and weight.dim() > 1


def _unsupported(module: nn.Module) -> str:
    """Return why this module cannot be quantized, or an empty string."""
    own = dict(module.named_parameters(recurse=False))
    name, kind = type(module).__name__, kind_of(module)
    if isinstance(module, ParametrizationList) or (kind and "weight" not in own):
        return "a weight computed from other parameters"
    if kind is None:
        matrix = any(parameter.dim() > 1 for parameter in own.values())
        return f"{name} is not Linear, Conv or Embedding" if matrix else "no weight matrix"
    if not own["weight"].is_floating_point():
        return f"its weight is {own['weight'].dtype}"
    if obstacle := kind.obstacle(module):
        return obstacle
    return "" if _uses_weight_linearly(module, kind) else f"{name} transforms its weight before use"


def _uses_weight_linearly(module: nn.Module, kind: Kind) -> bool:
    """Tell whether doubling the weight doubles the output, probing forwards that are not torch's.

    Weight standardisation, for one, fails: snapped weights would not be what is multiplied. A
    power of two scales floating-point results exactly, so the comparison is for equality.
    """
    methods = ("forward", "_conv_forward")
    if all(getattr(type(module), m, None) is getattr(kind.stock, m, None) for m in methods):
        return True
    own = module.get_parameter("weight")
    x, weight = kind.sample(module), ramp(own.shape, own)
    bias = dict(module.named_parameters(recurse=False)).get("bias")
    state = {} if bias is None else {"module.bias": torch.zeros_like(bias)}
    outputs = []
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            for factor in (1, 2):
                state["module.weight"] = factor * weight
                outputs.append(torch.func.functional_call(_Bare(module), state, (x,)))
        return torch.equal(2 * outputs[0], outputs[1])
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
        return False  # a forward with other inputs: not known to be linear, so left in float
    finally:
        for child, training in modes:
            child.training = training


class _Bare(nn.Module):
    """Calls a module's forward without its hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.module.forward(x))


def _unselected(
    names: Sequence[str],
    kinds: Sequence[Kind],
    include: Sequence[str],
    exclude: Sequence[str],
    ends: dict[str, str],
) -> str:
    """Return why a layer that could be quantized is not to be, or an empty string."""
    for pattern in exclude:
        if any(fnmatch.fnmatchcase(name, pattern) for name in names):
            return f"excluded by {pattern!r}"
    if include:
        matched = any(fnmatch.fnmatchcase(n, pattern) for n in names for pattern in include)
        return "" if matched else "not included"
    if any(kind.on_request for kind in kinds):
        return "an embedding, kept in full precision unless include names it"
    end = next((ends[name] for name in names if name in ends), "")
    return f"{end} layer, kept in full precision" if end else ""


def _check_patterns(patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise PlanError(
                f"the pattern {pattern!r} matches no layer{near(pattern, names)}; patterns are "
                "globs on module names such as 'layer1.*' (askewq inspect MODEL lists the names)."
            )


def apply(model: nn.Module, plan: Plan) -> None:
    """Make the planned layers quantization-aware, in place, with scales fitted to their weights.

    Raises:
        ModelError: a weight that is not float32 (masters are trained in float32), or not finite.
    """
    scales = []
    for layer in plan.quantized:
        weight = model.get_submodule(layer.names[0]).get_parameter("weight")
        if weight.dtype not in (torch.float32, torch.float64):
            raise ModelError(
                f"{layer.names[0]}.weight is {weight.dtype}; low-bit training needs float32 master "
                "weights: call model.float() first and use bf16 through autocast."
            )
        if not torch.isfinite(weight).all():
            raise ModelError(
                f"{layer.names[0]}.weight holds NaN or infinite values; check the file."
            )
        first = channels_first(weight, layer.channel_dim)
        scales.append(fit_scale(first, cast(Grid, layer.grid), layer.group_size))
    for layer, scale in zip(plan.quantized, scales, strict=True):
        for name in layer.names:
            quantize_layer_(model.get_submodule(name), cast(Grid, layer.grid), scale)


def quantize(
    model: nn.Module,
    bits: Bits,
    *,
    grid: GridKind = "integer",
    group_size: GroupSize = "channel",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Plan:
    """Plan and apply in one call; see `plan` for the arguments. Returns the plan."""
    chosen = plan(model, bits, grid=grid, group_size=group_size, include=include, exclude=exclude)
    apply(model, chosen)
    return chosen
