"""`askewq plan`: which layer gets how many bits, within a budget, as a recipe to fine-tune with.

The folder that it writes holds `recipe.yaml`, which names the bits of every layer;
`sensitivity.json`, what was found; and `sensitivity.png`, a picture of it.
"""

import glob
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from shlex import quote
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from askewq import config, disk, report, sensitivity, terminal, wrap
from askewq.batches import in_order, prepare_batch
from askewq.config import Recipe
from askewq.data import OpenData
from askewq.errors import ModelError, OutputError, PlanError, RecipeError
from askewq.grid import mixed_grid
from askewq.methods import check_bits
from askewq.pack import packed_size
from askewq.plan_table import Plan
from askewq.processes import plain_accelerator
from askewq.recipe_files import RECIPE
from askewq.sensitivity import Sensitivity
from askewq.spec import LoadedModel
from askewq.tasks import calling, logits_and_labels, score
from askewq.train import load
from askewq.vocabulary import EMBEDDING_TASKS, Bits, Estimate, GridKind

FIGURES, PICTURE = "sensitivity.json", "sensitivity.png"
CANDIDATES: tuple[Bits, ...] = (1, "ternary", 2, 3, 4, 8)
_UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True, slots=True)
class Settings:
    """What `askewq plan` is asked for, beside the recipe.

    Attributes:
        average_bits: of the codes of the quantized weights; ternary counts 1.6.
        size: of the artifact's weights file, such as "10MB"; one of the two is given.
        candidates: the widths that a layer may get.
        estimate: how the sensitivities are found: measured or estimated, see sensitivity.py.
        samples: of the training split, to find them with.
    """

    average_bits: float | None = None
    size: str | None = None
    candidates: tuple[Bits, ...] = CANDIDATES
    estimate: Estimate = "measured"
    samples: int = 1024


def plan(recipe: Recipe, given: Collection[str], settings: Settings) -> Plan:
    """Find the best bits for every layer, and write them as a recipe into `recipe.output`.

    Args:
        recipe: model, data and granularity; its bits do not matter.
        given: the keys that the user set, which the new recipe repeats.

    Returns:
        The plan with the bits that were found.

    Raises:
        AskewError: before anything is written: settings that cannot be used, a budget that cannot
            be met (with the nearest one that can), a model that was not trained for the data.
    """
    _check(recipe, settings)
    samples = min(settings.samples, recipe.max_train_samples or settings.samples)
    some = {"max_train_samples": samples, "max_eval_samples": samples}
    calibration = recipe.model_copy(update=some)
    loaded, data = _open(calibration)
    for text in (*data.notes, *loaded.doubts):
        terminal.note(text)
    loader = in_order(calibration, data, data.train, loaded.preprocessing, "--train-split")
    settings = replace(settings, samples=len(loader.dataset))  # type: ignore[arg-type]  # sized
    uniform = wrap.plan(
        loaded.model,
        8,
        grid=recipe.grid,
        group_size=recipe.group_size,
        include=recipe.include,
        exclude=recipe.exclude,
        act_bits=recipe.act_bits,
    )
    budget = code_budget(loaded.model, uniform, settings)
    found = _find(calibration, settings, loaded, loader, uniform)
    widths = sensitivity.assign(found, budget)
    result = with_widths(uniform, widths, recipe.grid)
    _write(recipe, given, settings, found, widths)
    report.print_sensitivity(found, widths)
    report.print_coverage(result)
    terminal.say(
        f"written to {recipe.output}/ ({RECIPE}, {FIGURES}, {PICTURE}); the next command:",
        f"askewq finetune --recipe {quote(str(recipe.output / RECIPE))} "
        f"--output {quote(str(recipe.output / 'run'))}",
    )
    return result


def with_widths(uniform: Plan, widths: Sequence[Bits], kind: GridKind) -> Plan:
    """Return a plan with these bits for its quantized layers, in their order."""
    grids = iter([mixed_grid(bits, kind) for bits in widths])
    return Plan(
        tuple(replace(layer, grid=next(grids)) if layer.grid else layer for layer in uniform.layers)
    )


def _check(recipe: Recipe, settings: Settings) -> None:
    """Refuse what cannot be used, before the model is loaded."""
    if (settings.average_bits is None) == (settings.size is None):
        raise RecipeError("give one budget: --average-bits (such as 2.5) or --size (such as 10MB).")
    if settings.average_bits is not None and not 0 < settings.average_bits < math.inf:
        raise RecipeError(f"--average-bits must be above 0, not {settings.average_bits:g}.")
    if settings.size is not None:
        bytes_of(settings.size)
    if settings.samples < 1:
        raise RecipeError(f"--samples must be at least 1, not {settings.samples}.")
    if len(set(settings.candidates)) < 2:
        raise RecipeError("--candidates must name two widths at least, to choose between.")
    for bits in settings.candidates:
        check_bits(recipe.method, bits, f"the candidate {bits}")
    if recipe.streaming:
        raise RecipeError(
            "streaming does not go with a plan, which measures on a random part of the data: leave "
            "it out here, and pass --streaming to finetune."
        )
    if recipe.task in EMBEDDING_TASKS:
        raise RecipeError(
            f"askewq plan measures the loss of labels, and task = {recipe.task} has none: name "
            "the bits yourself, --bits-override."
        )
    if recipe.bits_override:
        raise RecipeError("bits_override is what a plan finds: leave it out, or exclude the layer.")
    if missing := [name for name in ("scipy", "matplotlib") if find_spec(name) is None]:
        raise RecipeError(
            f"askewq plan needs scipy and matplotlib, and {' and '.join(missing)} cannot be "
            "imported: pip install 'askewq[plan]'."
        )
    out = recipe.output
    disk.check_place(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(
            f"--output {out} exists, and a plan replaces nothing; name another folder."
        )


def bytes_of(size: str) -> int:
    """Return the bytes of a size such as 10MB.

    Raises:
        RecipeError: it is none.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]+)", size)
    if not found or found[2] not in _UNITS:
        raise RecipeError(
            f"--size {size!r} must be a number and a unit, such as 10MB; the units are "
            f"{', '.join(_UNITS)}."
        )
    return int(float(found[1]) * _UNITS[found[2]])


def _open(recipe: Recipe) -> tuple[LoadedModel, OpenData]:
    """Return the model and the calibration samples.

    Raises:
        ModelError: layers that are new to the data.
    """
    from accelerate.utils import set_seed

    set_seed(recipe.seed)
    loaded, data = load(recipe)
    new = [*loaded.notes]
    if not recipe.pretrained and recipe.weights is None:
        new.append("its weights are random")
    if new:
        raise ModelError(
            f"{recipe.model!r} was not trained for this data: {'; '.join(new)}. What "
            "rounding costs shows only in a trained model: fine-tune it first, and pass that, "
            "--weights (timm, your own module) or their folder as --model (Hugging Face)."
        )
    return loaded, data


def code_budget(model: nn.Module, uniform: Plan, settings: Settings) -> int:
    """Return how many bytes the codes may take.

    Raises:
        PlanError: fewer than they take at least; the message names the nearest budget.
    """
    counts = [layer.weights for layer in uniform.quantized]
    least = sum(min(packed_size(n, bits) for bits in settings.candidates) for n in counts)
    if settings.average_bits is not None:
        budget = int(sum(counts) * settings.average_bits / 8)
        asked = f"an average of {settings.average_bits:g} bits"
        nearest = f"the least is {math.ceil(1e4 * 8 * least / sum(counts)) / 1e4:g}"
    else:
        rest = bytes_beside_codes(model, uniform)
        budget = bytes_of(settings.size or "") - rest
        asked = f"a size of {settings.size}"
        nearest = f"{math.ceil((rest + least) / 1e3)}kB can"
    if budget < least:
        raise PlanError(
            f"{asked} cannot be met: with the candidates "
            f"{', '.join(map(str, settings.candidates))} {nearest}. Allow narrower "
            "candidates, or quantize more layers (--include)."
        )
    return budget


def bytes_beside_codes(model: nn.Module, uniform: Plan) -> int:
    """Return what a packed file holds beside codes, at most: it must fit, so names count, too."""
    codes = sum(
        packed_size(layer.weights, layer.grid.bits) for layer in uniform.quantized if layer.grid
    )
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state = model.state_dict()
    buffers = sum(tensor.nbytes for name, tensor in state.items() if name not in parameters)
    # In the header every tensor has its name, type, shape and place; a packed one has two of these,
    # and its entry in the manifest.
    header = 400 + sum(len(name) + 96 for name in state)
    packed = sum(2 * len(layer.label) + 272 for layer in uniform.quantized)
    # A rounded input has a scale, its name twice in the header, and an entry.
    inputs = [layer.label for layer in uniform.quantized if layer.act_bits != "none"]
    packed += sum(3 * len(label) + 200 for label in inputs)
    return uniform.predicted_bytes - codes + buffers + header + packed


def _find(
    recipe: Recipe,
    settings: Settings,
    loaded: LoadedModel,
    loader: DataLoader[Any],
    uniform: Plan,
) -> Sensitivity:
    """Find the sensitivity of every layer on the calibration samples."""
    accelerator = plain_accelerator(recipe.mixed_precision)
    model = loaded.model.to(accelerator.device).eval()
    raw = list(accelerator.prepare(loader))

    def losses() -> Iterator[tuple[Tensor, int]]:
        for batch in raw:
            inputs = prepare_batch(batch, loaded.preprocessing)
            with calling(inputs, "the model fails"), accelerator.autocast():
                logits, labels = logits_and_labels(model, loaded.spec, inputs)
            scores = score(logits, labels)
            yield scores.loss.sum() / scores.count.sum(), len(scores.loss)

    if settings.estimate == "estimated":
        found = sensitivity.estimated(model, uniform, settings.candidates, recipe.grid, losses())
    else:
        rounds = 1 + len(uniform.quantized) * len(settings.candidates)
        with tqdm(total=rounds, desc="rounding one layer at a time") as bar:

            def loss() -> float:
                bar.update()
                values = torch.tensor(
                    [(float(mean) * n, n) for mean, n in losses()], dtype=torch.float64
                )
                total, count = values.sum(0).tolist()
                return float(total / count)

            found = sensitivity.measured(model, uniform, settings.candidates, recipe.grid, loss)
    return found


def _write(
    recipe: Recipe,
    given: Collection[str],
    settings: Settings,
    found: Sensitivity,
    widths: tuple[Bits, ...],
) -> None:
    """Write the folder; it appears whole or not at all."""
    out = recipe.output.absolute()  # "." has no name
    advice = "Make room and run the command again."
    with disk.room_for(10**6, out.parent, advice), disk.appearing_folder(out) as partial:
        text = recipe_text(recipe, given, settings, found, widths)
        (partial / RECIPE).write_text(text, encoding="utf-8")
        (partial / FIGURES).write_text(json.dumps(_figures(settings, found, widths), indent=2))
        draw(found, widths).savefig(partial / PICTURE, dpi=150)


def recipe_text(
    recipe: Recipe,
    given: Collection[str],
    settings: Settings,
    found: Sensitivity,
    widths: tuple[Bits, ...],
) -> str:
    """Return the recipe: what the user set, the width of most layers, and that of the others."""
    # Half-integers are refused beside a width that has only one grid, but for overrides.
    able = [b for b in widths if recipe.grid != "half-integer" or b not in (1, "ternary")]
    most = Counter(able or widths).most_common(1)[0][0]
    others = [
        f"{glob.escape(layer.label)}={bits}"
        for layer, bits in zip(found.layers, widths, strict=True)
        if bits != most
    ]
    values = recipe.model_dump(mode="json")
    content = {key: values[key] for key in config.Recipe.model_fields if key in given}
    content = {key: v for key, v in content.items() if key not in ("bits", "output")}
    content |= {"bits": most, "bits_override": others}
    if not able:
        content.pop("grid")
    asked = settings.size or f"{settings.average_bits:g} bits a weight"
    return (
        f"# Bits by layer for {asked}, from {settings.estimate} sensitivities (askewq plan).\n"
        + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    )


def _figures(settings: Settings, found: Sensitivity, widths: tuple[Bits, ...]) -> dict[str, Any]:
    rows = zip(
        found.layers, widths, found.increase.tolist(), found.code_bytes.tolist(), strict=True
    )
    return {
        "average_bits": settings.average_bits,
        "size": settings.size,
        "estimate": settings.estimate,
        "samples": settings.samples,
        "layers": {
            layer.label: {
                "weights": layer.weights,
                "bits": bits,
                "increase": {
                    str(w): x if math.isfinite(x) else None  # JSON has no other word
                    for w, x in zip(found.widths, increases, strict=True)
                },
                "code_bytes": {str(w): x for w, x in zip(found.widths, sizes, strict=True)},
            }
            for layer, bits, increases, sizes in rows
        },
    }


def draw(found: Sensitivity, widths: tuple[Bits, ...]) -> Any:
    """Return a figure: what every layer costs at every width, against its bytes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    floor = 1e-5  # what rounding gains is noise; the logarithm needs a number above 0
    for i, layer in enumerate(found.layers):
        x, y = found.code_bytes[i].tolist(), found.increase[i].clamp(min=floor).tolist()
        (line,) = axes.plot(x, y, marker=".", linewidth=0.8, alpha=0.7)
        j = found.widths.index(widths[i])
        axes.plot(x[j], y[j], marker="o", color=line.get_color())
        axes.annotate(f"{layer.label} {widths[i]}", (x[j], y[j]), fontsize=6)
    axes.set(xscale="log", yscale="log", xlabel="bytes of codes", ylabel="increase of the loss")
    axes.set_title("One layer rounded, the others as they are; circles: the bits that were chosen")
    return figure
