"""The model walker: `plan` says what happens to every layer with parameters, `apply` does it.

The plan is a pure table: training, evaluation, packing and `askewq inspect` read the same one.
"""

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from askewq import digest, patterns, probe
from askewq.activations import RoundedInput
from askewq.errors import ModelError, PlanError, RecipeError
from askewq.grid import (
    Grid,
    channels_first,
    fit_scale,
    input_grid,
    make_grid,
    mixed_grid,
    scale_shape,
)
from askewq.kinds import kind_of, leaves_of
from askewq.layers import (
    QuantizedLayer,
    QuantizedParts,
    quantize_layer_,
    quantized_layers,
    scale_name,
    uncompiled,
)
from askewq.packed import PackedTensor
from askewq.plan_table import PER_CHANNEL, Place, Plan, PlannedLayer, channels
from askewq.vocabulary import ActBits, Bits, GridKind, GroupSize


def plan(
    model: nn.Module,
    bits: Bits,
    *,
    grid: GridKind = "auto",
    group_size: GroupSize = "channel",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    bits_override: Mapping[str, Bits] | None = None,
    act_bits: ActBits = "none",
    keep_last: bool = True,
) -> Plan:
    """Return what quantizing `model` would do; the model is not touched.

    By default every layer that kinds.py lists gets the grid, except the first and the last layer
    with a weight matrix (embeddings count as first; of a timm model with several heads, each is
    the last), which carry little of the size and much of the accuracy; without `keep_last`, for
    networks without a head, only the first is excepted.
    `include` (glob patterns on module names) selects exactly the named layers, first, last and
    embeddings among them if they match; `exclude` takes layers away again. `bits_override` gives
    matching layers, out of those, other bits. A weight that several layers share is quantized once,
    for all of them, if one is named. The weights of a layer with several (attention, experts) can
    be named one by one: the layer's name, a dot, the weight's. `act_bits` are those of the inputs
    of quantized layers to which one tensor of numbers is given.

    Raises:
        RecipeError: bits, grid or group size that do not exist.
        PlanError: a pattern without a match, an override that changes nothing or contradicts
            another, nothing left to quantize, no input to round, or a group size that divides
            no row.
    """
    for key, given in (("include", include), ("exclude", exclude)):
        if given is None or isinstance(given, str):
            example = [given] if given else []
            raise RecipeError(f"{key} = {given!r} must be a list of patterns: {example!r}.")
    if bits_override and not isinstance(bits_override, Mapping):
        raise RecipeError(
            f"bits_override = {bits_override!r} must name the bits of patterns: {{'layer4.*': 4}}."
        )
    chosen = make_grid(bits, grid)
    if act_bits != "none":
        input_grid(act_bits, signed=True)
    overrides = {p: _override(p, b, grid) for p, b in (bits_override or {}).items()}
    scale_shape(torch.Size((1, group_size if isinstance(group_size, int) else 1)), group_size)
    model = uncompiled(model)
    _check_plain(model)
    modules = {name: m for name, m in model.named_modules() if any(True for _ in _own(m))}
    users: dict[int, list[Place]] = {}
    for name, module in modules.items():
        for leaf in _main(module):
            users.setdefault(id(module.get_parameter(leaf)), []).append(Place(name, leaf))
    called = [name for places in users.values() for place in places for name in place.called]
    patterns.check([*include, *exclude, *overrides], list(dict.fromkeys([*modules, *called])))
    matrices = [name for name, module in modules.items() if _has_matrix(module)]
    last = _heads(model, matrices) if keep_last else []
    ends = dict.fromkeys(matrices[:1], "first") | dict.fromkeys(last, "last")
    held: dict[int, set[Place]] = {}
    for name, module in modules.items():
        for leaf, parameter in module.named_parameters(recurse=False):
            held.setdefault(id(parameter), set()).add(Place(name, leaf))

    def planned(main: int, parameters: int) -> PlannedLayer:
        places = users[main]
        first = modules[places[0].name]
        names = [name for place in places for name in place.called]
        form, reason = _form(modules, places)
        if others := held[main] - {*places}:
            name, leaf = min(others)
            reason = reason or f"{name} holds it too, as {leaf}, and would see it unrounded"
        reason = reason or _unselected(names, form, include, exclude, ends)
        shape = first.get_parameter(places[0].leaf).shape
        size, note = (group_size, reason) if reason else _group(group_size, shape, form)
        sharing = f"weight shared by {', '.join(p.name for p in places[1:])}" if places[1:] else ""
        rounds = act_bits != "none" and not reason
        given = _unrounded([modules[place.name] for place in places]) if rounds else ""
        return PlannedLayer(
            names=tuple(place.name for place in places),
            leaves=tuple(place.leaf for place in places),
            kind=type(first).__name__,
            shape=tuple(shape),
            parameters=parameters,
            grid=None if reason else patterns.overridden(names, overrides) or chosen,
            channel_dim=form.channel_dim,
            group_size=size,
            note="; ".join(filter(None, (note, given, sharing))),
            act_bits=act_bits if rounds and not given else "none",
        )

    result = Plan(tuple(map(planned, users, _counts(modules, users))))
    _check_some(result, act_bits)
    if isinstance(group_size, int):
        _check_groups(result, group_size)
    _check_included(include, result)
    _check_overrides(overrides, result)
    return result


def _counts(modules: Mapping[str, nn.Module], users: Mapping[int, list[Place]]) -> Iterator[int]:
    """Yield the parameters of each layer; those that several have count for the first."""
    counted: set[int] = set()
    for main, places in users.items():
        owned = [p for place in places for p in _own(modules[place.name])]
        own = {id(p): p.numel() for p in owned if id(p) == main or id(p) not in users}
        yield sum(n for key, n in own.items() if key not in counted)
        counted |= own.keys()


def _heads(model: nn.Module, matrices: Sequence[str]) -> list[str]:
    """Return the last of a model's layers with a matrix; all of its heads where timm names some."""
    named: Any = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    heads = [name for name in matrices if not isinstance(named, str) and name in (named or ())]
    return heads or [*matrices[-1:]]


def _override(pattern: str, bits: Bits, kind: GridKind) -> Grid:
    """Return the grid that an override asks for.

    Raises:
        RecipeError: there is none.
    """
    try:
        return mixed_grid(bits, kind)
    except RecipeError as error:
        raise RecipeError(f"the override {pattern}={bits}: {error}") from error


def _check_plain(model: nn.Module) -> None:
    """Refuse a model that has no shapes yet, or that is quantized."""
    lazy = [name for name, p in model.named_parameters() if is_lazy(p)]
    if lazy:
        raise PlanError(
            f"{lazy[0]} has no shape yet ({len(lazy)} lazy parameters in all); call the model on a "
            "batch once, then plan."
        )
    own = nn.Module.get_extra_state
    if extra := [n for n, m in model.named_modules() if type(m).get_extra_state is not own]:
        raise PlanError(
            f"{extra[0] or 'the model'} keeps extra state beside its tensors (get_extra_state), "
            "which a packed file cannot hold; make it a buffer."
        )
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.dtype not in digest.TYPES:
            raise PlanError(
                f"{name} is {tensor.dtype}, which a packed file cannot hold; keep it in another "
                "type, or out of the state dict (register_buffer(..., persistent=False))."
            )
    if quantized := quantized_layers(model):
        raise PlanError(
            f"the model is quantized already ({next(iter(quantized))} and {len(quantized) - 1} "
            "other layers); plan the plain model."
        )
    if packed := [n for n, m in model.named_modules() if isinstance(m, PackedTensor)]:
        raise PlanError(
            f"the model keeps its weights packed ({packed[0]} and {len(packed) - 1} others), which "
            "cannot be trained; load it without packed=True, or call model.dequantize() first."
        )


def _check_some(result: Plan, act_bits: ActBits) -> None:
    """Refuse a plan without a layer to quantize, or without an input to round."""
    if not result.quantized:
        reasons = "; ".join(f"{layer.label}: {layer.note}" for layer in result.layers[:5])
        raise PlanError(
            f"none of the model's {len(result.layers)} layers with parameters can be quantized "
            f"({reasons or 'it has no parameters'}); name layers with include, or exclude fewer."
        )
    if act_bits != "none" and not any(layer.act_bits != "none" for layer in result.layers):
        raise PlanError(
            f"act_bits = {act_bits}, but none of the {len(result.quantized)} quantized layers is "
            "given one tensor of numbers that could be rounded; include a Linear or Conv layer, or "
            "leave act_bits out."
        )


def _check_groups(result: Plan, group_size: int) -> None:
    """Refuse a group size that no layer can have."""
    if all(layer.group_size != group_size for layer in result.quantized):
        sizes = {
            layer.group_size  # where an index of the channel dimension stands for several channels
            if isinstance(layer.group_size, int)
            else channels(layer.shape, layer.channel_dim)[1:].numel()
            for layer in result.quantized
        }
        rows = ", ".join(map(str, sorted(sizes)[:8]))
        raise PlanError(
            f"group_size = {group_size} divides the rows of no quantized layer, which have {rows} "
            "weights; use a divisor of theirs, or 'channel'."
        )


def _check_included(include: Sequence[str], result: Plan) -> None:
    """Refuse a pattern that names only layers that stay float, unless they are excluded again."""
    for pattern in include:
        matched = [layer for layer in result.layers if patterns.matches(layer.called, pattern)]
        floats = [layer for layer in matched if layer.grid is None]
        if len(floats) == len(matched) and not any("excluded by" in layer.note for layer in floats):
            raise PlanError(
                f"include {pattern!r}: {floats[0].label} cannot be quantized: {floats[0].note}; "
                "leave the pattern out."
            )


def _check_overrides(overrides: Mapping[str, Grid], result: Plan) -> None:
    """Refuse an override that gives no layer its bits."""
    for pattern, grid in overrides.items():
        matched = [layer for layer in result.layers if patterns.matches(layer.called, pattern)]
        if not any(layer.grid for layer in matched):
            raise PlanError(
                f"the override {pattern}={grid.bits} changes nothing, because what it matches "
                f"stays float ({matched[0].label}: {matched[0].note}); an override says how many "
                "bits a quantized layer gets, and include says which layers are quantized."
            )


class _Form(NamedTuple):
    """Where the output channels of a weight are; see `kinds.Kind`."""

    channel_dim: int = 0
    parts: int = 1
    on_request: bool = False


def _form(modules: Mapping[str, nn.Module], places: Sequence[Place]) -> tuple[_Form, str]:
    """Return the form of a weight, and why it cannot be quantized, or an empty string."""
    forms = []
    for name, leaf in places:
        if kind := kind_of(modules[name]):
            shape = modules[name].get_parameter(leaf).shape
            parts = kind.parts(modules[name], shape) if leaf in kind.leaves else 1
            forms.append(_Form(kind.channel_dim, parts, kind.on_request))
    first = min(forms, default=_Form())
    used = [(modules[name], leaf) for name, leaf in places]
    reason = next(filter(None, (probe.unsupported(*use) or _taken(*use) for use in used)), "")
    if not reason and any(form[:2] != first[:2] for form in forms):
        reason = "shared by layers whose output channels are different dimensions of it"
    return first._replace(on_request=any(form.on_request for form in forms)), reason


def _taken(module: nn.Module, leaf: str) -> str:
    """Return why quantizing a layer would replace something of its own, or an empty string."""
    names = _names_used(leaf == "weight") | {scale_name(leaf)}
    found = [name for name in sorted(names) if hasattr(module, name)]
    return f"it has an attribute {found[0]}, a name that a quantized layer uses" if found else ""


@functools.cache
def _names_used(whole: bool) -> frozenset[str]:
    """Return the attributes that a quantized layer has and no other."""
    mixins = (QuantizedLayer, RoundedInput) if whole else (QuantizedParts,)
    bases = {base for mixin in mixins for base in mixin.__mro__ if base is not nn.Module}
    names = {n for base in bases for n in (*vars(base), *inspect.get_annotations(base))}
    return frozenset(n for n in names - {*dir(nn.Module), "weight"} if not n.startswith("__"))


def _group(group_size: GroupSize, shape: Sequence[int], form: _Form) -> tuple[GroupSize, str]:
    """Return the group size of a layer's scale, and what is special about it.

    Where an index of the channel dimension stands for several channels, each of them is a group.
    """
    row = channels(shape, form.channel_dim)[1:].numel() // form.parts
    whole: GroupSize = "channel" if form.parts == 1 else row
    special = "" if form.parts == 1 else "a group is an output channel"
    if group_size == "channel":
        return whole, special
    if isinstance(group_size, int) and row % group_size:
        return whole, f"{PER_CHANNEL}: {group_size} does not divide {row}"
    return group_size, ""


def _unrounded(layers: Sequence[nn.Module]) -> str:
    """Return why the inputs of quantized layers cannot be rounded, or an empty string."""
    kinds = [kind for layer in layers if (kind := kind_of(layer))]
    if any(kind.one_input for kind in kinds):
        return ""
    what = "indices" if kinds[0].looks_up else "several"
    return f"its inputs are {what}, which are not rounded"


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    return module.parameters(recurse=False)


def _main(module: nn.Module) -> list[str]:
    """Return the parameters that stand for a layer: its weights, or whatever it has first."""
    named = dict(module.named_parameters(recurse=False))
    return leaves_of(module) or ["weight" if "weight" in named else next(iter(named))]


# The parts of a weight that a hook or a parametrization makes, such as weight_norm's.
_MADE_OF = {"weight_v", "weight_orig", "original", "original0", "original1"}


def _has_matrix(module: nn.Module) -> bool:
    weights = {"weight", *_MADE_OF, *leaves_of(module)}
    return any(p.dim() > 1 for n, p in module.named_parameters(recurse=False) if n in weights)


def _unselected(
    names: Sequence[str],
    form: _Form,
    include: Sequence[str],
    exclude: Sequence[str],
    ends: dict[str, str],
) -> str:
    """Return why a layer that could be quantized is not to be, or an empty string."""
    for pattern in exclude:
        if patterns.matches(names, pattern):
            return f"excluded by {pattern!r}"
    if include:
        matched = any(patterns.matches(names, pattern) for pattern in include)
        return "" if matched else "not included"
    if form.on_request:
        return "an embedding, kept in full precision unless include names it"
    end = next((ends[name] for name in names if name in ends), "")
    return f"{end} layer, kept in full precision" if end else ""


def apply(model: nn.Module, plan: Plan, *, fit: bool = True) -> None:
    """Make the planned layers quantization-aware, in place, with scales fitted to their weights.

    Inputs are rounded by `round_inputs`, which needs samples, whatever act_bits the plan has.

    Args:
        fit: without it the scales are 1, for whoever fills weights and scales in afterwards.

    Raises:
        PlanError: a plan of another model, or one that was applied already.
        ModelError: a weight below float32 (masters are trained in float32; float64 trains, but is
            not saved), without values, not finite, or all zeros, to which no scale can be fitted.
    """
    model = uncompiled(model)
    _check_plain(model)
    scales: list[Tensor] = []
    taken: dict[nn.Parameter, str] = {}
    for layer in plan.quantized:
        _check_there(model, layer)
        weight = model.get_submodule(layer.names[0]).get_parameter(layer.leaves[0])
        name = f"{layer.names[0]}.{layer.leaves[0]}"
        if (other := taken.setdefault(weight, name)) != name:
            raise PlanError(
                f"the plan has a weight for {other} and one for {name}, and the model one for "
                "both; plan this model."
            )
        if weight.dtype not in (torch.float32, torch.float64):
            raise ModelError(
                f"{name} is {weight.dtype}; low-bit training needs float32 master weights: call "
                "model.float() first and use bf16 through autocast."
            )
        if weight.is_meta:
            raise ModelError(
                f"{name} is on the meta device, which has no values to fit a scale to; load the "
                "weights first."
            )
        if not torch.isfinite(weight).all():
            raise ModelError(
                f"{name} holds NaN or infinite values; check the file, or exclude this layer with "
                f"--exclude {layer.names[0]!r}."
            )
        if fit and weight.numel() and not weight.any():
            raise ModelError(
                f"{name} is all zeros, to which no scale can be fitted, so that it could never "
                f"move: exclude it with --exclude {layer.names[0]!r}, or train it first."
            )
        first = channels_first(weight, layer.channel_dim)
        with torch.inference_mode(False):  # it may be trained later
            scales.append(
                fit_scale(first, cast(Grid, layer.grid), layer.group_size)
                if fit
                else weight.detach().new_ones(scale_shape(first.shape, layer.group_size))
            )
    for layer, scale in zip(plan.quantized, scales, strict=True):
        for name, leaf in zip(layer.names, layer.leaves, strict=True):
            quantize_layer_(model.get_submodule(name), cast(Grid, layer.grid), scale, leaf)


def _check_there(model: nn.Module, layer: PlannedLayer) -> None:
    """Refuse a layer that the model does not have as it was planned."""
    found: tuple[str, tuple[int, ...]] | None
    users = set()
    for name, leaf in zip(layer.names, layer.leaves, strict=True):
        try:
            module = model.get_submodule(name)
            found = type(module).__name__, tuple(module.get_parameter(leaf).shape)
            users.add(id(module.get_parameter(leaf)))
            kind = kind_of(module)
        except AttributeError:
            found = kind = None
        dim = kind and kind.channel_dim
        if found is None or (found[1], dim) != (layer.shape, layer.channel_dim):
            raise PlanError(
                f"the plan has a {layer.kind} of shape {list(layer.shape)} at {name!r}, where the "
                f"model has {f'a {found[0]} of shape {list(found[1])}' if found else 'none'}; plan "
                "this model."
            )
    if len(users) > 1:
        raise PlanError(
            f"the plan has one weight for {' and '.join(layer.names)}, and the model {len(users)}; "
            "plan this model."
        )


def quantize(
    model: nn.Module,
    bits: Bits,
    *,
    grid: GridKind = "auto",
    group_size: GroupSize = "channel",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    bits_override: Mapping[str, Bits] | None = None,
    keep_last: bool = True,
) -> Plan:
    """Plan and apply in one call; see `plan` for the arguments.

    Returns:
        The plan.

    Raises:
        RecipeError, ModelError, PlanError: as `plan` and `apply`.
    """
    chosen = plan(
        model,
        bits,
        grid=grid,
        group_size=group_size,
        include=include,
        exclude=exclude,
        bits_override=bits_override,
        keep_last=keep_last,
    )
    apply(model, chosen)
    return chosen
