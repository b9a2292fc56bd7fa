"""What a person looks at: the plan's table, the progress bar, the result."""

import math
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from tqdm import tqdm

from askewq.checkpoint import Artifact
from askewq.config import Recipe
from askewq.evaluate import Evaluation
from askewq.grid import Grid
from askewq.manifest import PackedInput
from askewq.plan_table import PER_CHANNEL, Plan, PlannedLayer
from askewq.sensitivity import Sensitivity
from askewq.spec import ModelSpec
from askewq.terminal import console, note, row, say
from askewq.training_state import LOW_BIT
from askewq.vocabulary import ActBits, Bits
from askewq.wording import bits_name, size_text, width_name


def print_start(
    notes: Sequence[str], plan: Plan, recipe: Recipe, steps: int, batch_size: int
) -> None:
    """Say what the run will do.

    Args:
        batch_size: of the batches that the training split makes.
    """
    for text in notes:
        note(text)
    if batch_size < recipe.batch_size:
        note(
            f"the training split makes batches of {batch_size}, not of {recipe.batch_size}: it has "
            "no more samples a process"
        )
    print_coverage(plan)
    if recipe.act_bits != "none":
        say(f"inputs of these layers: {bits_name(recipe.act_bits)}")
    say(
        f"training: {steps} steps of {batch_size * recipe.grad_accumulation} samples a "
        f"process, {recipe.optimizer} lr {recipe.lr:g}"
        + (f", level_lr {recipe.level_lr:g}" if recipe.level_lr is not None else "")
        + f", {recipe.method}"
        + (f", {recipe.closing} closing" if recipe.closing else "")
        + (f"; then {recipe.polish_steps} to polish" if recipe.polish_steps else ""),
    )


def print_coverage(plan: Plan) -> None:
    """Say what share of the parameters gets a grid, and which big layers do not."""
    share = plan.quantized_parameters / plan.total_parameters
    say(
        f"plan: {len(plan.quantized)} layers, {plan.quantized_parameters:,} of "
        f"{plan.total_parameters:,} parameters ({share:.1%}) at "
        f"{plan.bits_per_weight:.2f} bits a weight; packed about {size_text(plan.predicted_bytes)}",
    )
    for layer in plan.layers:
        if layer.grid is None and layer.note != "no weight matrix":
            say(f"  float: {layer.label or '(model)'} ({layer.kind}): {layer.note}")
        elif layer.grid is not None and layer.note.startswith(PER_CHANNEL):
            say(f"  {layer.label} ({layer.kind}): {layer.note}")


def print_inputs(plan: Plan, signed: dict[str, bool], act_bits: ActBits) -> None:
    """Say what the calibration decided, and which layers it did not reach."""
    say(
        f"inputs: {len(signed)} layers at {bits_name(act_bits)}, {sum(signed.values())} of them "
        "signed, the others never negative in calibration"
    )
    for layer in plan.layers:
        if layer.act_bits != "none" and not signed.keys() & set(layer.names):
            note(
                f"{layer.names[0]} was not called in calibration, or with zeros alone: its input "
                "is not rounded"
            )


def print_plan(plan: Plan) -> None:
    """Print every layer with parameters, its grid or the reason why it stays float."""
    table = Table(box=None, pad_edge=False)
    rounds = any(layer.act_bits != "none" for layer in plan.layers)
    for column in ("layer", "class", "shape", "grid", *["input"] * rounds, "note"):
        table.add_column(column, overflow="fold")
    for layer in plan.layers:
        grid = _describe(layer.grid, layer) if layer.grid else "float"
        shape = "x".join(map(str, layer.shape))
        given = "float" if layer.act_bits == "none" else bits_name(layer.act_bits)
        cells = [layer.label or "(model)", layer.kind, shape, grid, *[given] * rounds]
        row(table, *cells, layer.note)
    console.print(table)
    print_coverage(plan)


def print_sensitivity(found: Sensitivity, widths: Sequence[Bits]) -> None:
    """Print what rounding costs every layer, and the width that it got."""
    table = Table(box=None, pad_edge=False)
    for column in ("layer", "weights", "bits", *(f"loss at {bits}" for bits in found.widths)):
        table.add_column(column, overflow="fold")
    rows = zip(found.layers, widths, found.increase.tolist(), strict=True)
    for layer, bits, increases in rows:
        costs = (f"{increase:+.4f}" for increase in increases)
        row(table, layer.label, f"{layer.weights:,}", str(bits), *costs)
    console.print(table)


def _describe(grid: Grid, layer: PlannedLayer) -> str:
    levels = f"{grid.first:g}..{grid.highest:g}"
    size = layer.group_size
    per = f"group {size}" if isinstance(size, int) else size
    return f"{bits_name(grid.bits)} {levels} per {per}"


def print_artifact(spec: ModelSpec, packed: Artifact) -> None:
    """Print what an artifact holds."""
    table = Table(box=None, pad_edge=False)
    rounds = bool(packed.inputs)
    for column in ("weight", "shape", "bits", "scales", *["input"] * rounds, "bytes"):
        table.add_column(column, overflow="fold")
    count = size = 0
    for name, weight in packed.weights.items():
        shape, scales = ("x".join(map(str, s)) for s in (weight.shape, weight.scale.shape))
        names = [name, *(other for other, source in packed.shared.items() if source == name)]
        users = (packed.inputs.get(each.rpartition(".")[0]) for each in names)
        given = next(filter(None, users), None)
        cells = [name, shape, str(weight.grid.bits), scales, *[_input(given)] * rounds]
        row(table, *cells, f"{weight.codes.nbytes:,}")
        count += math.prod(weight.shape)
        size += weight.codes.nbytes + weight.scale.nbytes
    console.print(table)
    rest = sum(tensor.nbytes for tensor in packed.tensors.values())
    say(
        f"{spec.name} ({spec.source}, {spec.task}): {len(packed.weights)} packed weights with "
        f"{count:,} parameters in {size_text(size)} ({8 * size / max(count, 1):.2f} bits a "
        f"weight); everything else {size_text(rest)}",
    )


def _input(rounded: PackedInput | None) -> str:
    if rounded is None:
        return "float"
    return f"{bits_name(rounded.grid.bits)} {'signed' if rounded.grid.first < 0 else 'unsigned'}"


@contextmanager
def progress_bar(phase: str, done: int, total: int, shown: bool) -> Iterator[Any]:
    """Show a bar on standard error: position, time left, and what `advance` is given."""
    interval = 0.1 if sys.stderr.isatty() else 30.0
    with tqdm(
        desc=phase, initial=done, total=total, disable=not shown, mininterval=interval
    ) as bar:
        yield bar


def advance(bar: Any, shown: dict[str, float]) -> None:
    """Move the bar by a step."""
    bar.set_postfix({key: f"{value:.3g}" for key, value in shown.items()}, refresh=False)
    bar.update()


def print_evaluation(phase: str, step: int, result: Evaluation) -> None:
    """Print an evaluation in the course of training; low-bit weights are snapped for it."""
    how = "snapped" if phase == LOW_BIT else phase
    say(f"step {step}: {result.metric} {result.value:.2f} ({how})")


def print_result(metrics: dict[str, Any], out: Path) -> None:
    """Print the short table at the end of a run."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column(metrics["metric"], justify="right")
    table.add_column("size", justify="right")
    sizes = metrics["bytes"]
    polished = f", polished in {metrics['polish_steps']} steps" if metrics["polish_steps"] else ""
    rows = (
        ("full precision", "full_precision", size_text(sizes["full_precision"])),
        (f"rounded to {width_name(metrics)}, no training", "rounded", ""),
        (f"{metrics['method']}, before the snap", "relaxed", ""),
        (f"{metrics['method']}, snapped{polished}", "snapped", ""),
        ("reloaded from the packed file", "reloaded", size_text(sizes["packed"])),
    )
    for name, key, size in rows:
        row(table, name, f"{metrics[key]:.2f}", size)
    console.print(table)
    say(
        f"{metrics['bits_per_weight']:.2f} bits a weight on {metrics['parameters']['share']:.1%} "
        f"of the parameters; the reloaded logits equal the evaluated ones to the bit.",
        f"written to {out}/ (model.safetensors, config.json, metrics.json, recipe.yaml, README.md)",
    )


def print_export_notes(notes: Sequence[str], to: str) -> None:
    """Say what an export writes otherwise than the artifact has it."""
    say(*(f"{to}: {text}" for text in notes))


def print_export(result: dict[str, Any], output: Path) -> None:
    """Print what an export weighs and how far its logits are from the artifact's."""
    say(
        f"read back in a fresh process, {result['samples']} samples: largest difference of a "
        f"logit {result['max_difference']:.3g}, relative {result['relative_difference']:.3g} "
        f"(allowed {result['bound']:g})",
        f"written to {output}/ ({size_text(sum(result['files'].values()))})",
    )


def peak_memory() -> int:
    """Return the peak memory of this process in bytes: the GPU's where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
