"""What every model of the zoo goes through: wrap, three training steps, snap, pack, reload."""

import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from hugging_face import HUGGING_FACE
from timm_networks import TIMM
from torch import Tensor, nn

import askewq
from askewq import checkpoint
from askewq.errors import PlanError
from askewq.kinds import kind_of
from askewq.packed import load_packed_into
from askewq.plan_table import Plan, PlannedLayer

# Above so many parameters the grid is {-1, +1}, whose scale takes no search.
TWO_BITS_UP_TO = 3_000_000
STEPS = 3


class Member(Protocol):
    """A model of the zoo."""

    def build(self) -> nn.Module:
        """Return it with random weights."""

    def inputs(self) -> dict[str, Tensor]:
        """Return a batch."""


ZOO: dict[str, Member] = {f"timm {name}": member for name, member in TIMM.items()}
ZOO |= {f"transformers {name}": member for name, member in HUGGING_FACE.items()}


@dataclass(frozen=True)
class Journey:
    """What became of a model.

    Attributes:
        bits: of its grid.
        parameters: of the model.
        quantized, coverable: weights on a grid, and all of the layers that kinds.py knows.
        exceptions: layers of those kinds that stayed float: (name, class, weights, reason).
        others: the classes of other modules that have matrices; they stay float.
        failures: what did not hold; empty: all did.
    """

    bits: int
    parameters: int
    quantized: int
    coverable: int
    exceptions: tuple[tuple[str, str, int, str], ...]
    others: tuple[str, ...]
    failures: tuple[str, ...]


def travel(member: Member, seed: int = 0) -> Journey:
    """Take a model from its random weights to the packed file and back."""
    torch.manual_seed(seed)
    model = member.build().eval()
    inputs = member.inputs()
    parameters = sum(p.numel() for p in model.parameters())
    bits = 2 if parameters <= TWO_BITS_UP_TO else 1
    modules = dict(model.named_modules())
    before = answer(model, inputs)
    try:
        plan = askewq.quantize(model, bits, include=["*"])
    except PlanError as error:
        return Journey(bits, parameters, 0, 0, (), (), (str(error),))
    failures = [] if same(answer(model, inputs), before) else ["wrapped: another output"]
    failures += train(model, inputs)
    askewq.snap_(model)
    snapped = answer(model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(model, Path(folder) / "model.safetensors")
        artifact = checkpoint.read(Path(folder) / "model.safetensors")
    plain = member.build().eval()
    checkpoint.load_into(plain, artifact)
    if not same(answer(plain, inputs), snapped):
        failures.append("reloaded: another output")
    packed = member.build().eval()
    load_packed_into(packed, artifact)
    # torch multiplies a batch that is not contiguous otherwise where weights ask for gradients.
    for model in (plain, packed):
        model.requires_grad_(False)
    if not same(answer(packed, inputs), answer(plain, inputs)):
        failures.append("packed: another output")
    return _judge(bits, modules, plan, failures)


def _judge(bits: int, modules: dict[str, nn.Module], plan: Plan, failures: list[str]) -> Journey:
    left = [layer for layer in plan.layers if layer.grid is None and len(layer.shape) > 1]
    known = [layer for layer in left if _coverable(modules[layer.names[0]], layer)]
    others = {layer.kind for layer in left if layer not in known}
    return Journey(
        bits=bits,
        parameters=plan.total_parameters,
        quantized=plan.quantized_parameters,
        coverable=plan.quantized_parameters + sum(_size(layer) for layer in known),
        exceptions=tuple((la.names[0], la.kind, _size(la), la.note) for la in known),
        others=tuple(sorted(others)),
        failures=tuple(failures),
    )


def _coverable(module: nn.Module, layer: PlannedLayer) -> bool:
    return kind_of(module) is not None or "computed" in layer.note


def _size(layer: PlannedLayer) -> int:
    """Return the weights of a layer; of a weight computed from others, those."""
    return layer.parameters if "computed" in layer.note else torch.Size(layer.shape).numel()


def train(model: nn.Module, inputs: dict[str, Tensor]) -> list[str]:
    """Make three steps; return what went wrong."""
    optimizer = askewq.AskewAdamW(model, lr=1e-3, compile=False)
    before = [layer.latent.detach().clone() for layer in optimizer._layers]
    model.train()
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = sum(part.square().mean() for part in outputs(model, inputs))
        if not torch.isfinite(loss):
            return [f"training: the loss of step {step + 1} is {loss.item()}"]
        loss.backward()
        optimizer.anneal((step + 1) / STEPS)
        optimizer.step()
    model.eval()
    moved = [not torch.equal(a, la.latent) for a, la in zip(before, optimizer._layers, strict=True)]
    return [] if any(moved) else ["training: no weight moved"]


@torch.no_grad()
def answer(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Return all floating-point outputs of a model, from the same random numbers every time."""
    torch.manual_seed(0)
    return outputs(model, inputs)


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Return all floating-point outputs of a model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(_tensors(model(**inputs)))


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Tell whether two answers are equal to the bit."""
    return len(one) == len(other) > 0 and all(map(torch.equal, one, other))
