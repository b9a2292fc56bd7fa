"""One evaluation loop, for every model, metric and number of processes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from askewq import artifact, config, distill, processes, recipe_files
from askewq.batches import loaders, prepare_batch
from askewq.config import Recipe
from askewq.data import open_eval
from askewq.distill import Teacher
from askewq.errors import DivergenceError, ExactnessError, RecipeError
from askewq.preprocessing import Preprocessing
from askewq.spec import ModelSpec
from askewq.tasks import calling, check_logits, logits_and_labels, metric_of, score
from askewq.vocabulary import EMBEDDING_TASKS


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The task's metric, as `tasks.metric_of` names it, the mean loss, the sample count.

    Attributes:
        notes: what is out of the ordinary about the samples.
    """

    metric: str
    value: float
    loss: float
    samples: int
    notes: tuple[str, ...] = ()


def evaluate(
    models: nn.Module | Sequence[nn.Module],
    spec: ModelSpec,
    preprocessing: Preprocessing,
    loader: Any,
    accelerator: Any,
    teacher: Teacher | None = None,
) -> Evaluation:
    """Evaluate a model; further models must give the very same logits on every batch.

    Args:
        models: one model, or several that are claimed to be equal; the first is scored.
        loader: prepared by the accelerator; in several processes no sample counts twice.
        teacher: whose embeddings stand for labels, in a task without them; no other asks it.

    Raises:
        signals.Stop: a signal came, to any of the processes.
        ExactnessError: logits of another model that differ from the first one's in any bit.
        ModelError: a batch that the network cannot take, logits that do not fit the labels.
    """
    first, *others = [models] if isinstance(models, nn.Module) else models
    modes = [(model, model.training) for model in (first, *others)]
    for model, _ in modes:
        model.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    samples = 0
    with torch.no_grad(), accelerator.autocast():
        for raw in loader:
            processes.check_signals(accelerator)
            batch = prepare_batch(raw, preprocessing)
            if teacher is not None and spec.task in EMBEDDING_TASKS:
                batch = distill.labelled(batch, spec, distill.taught(teacher, batch))
            with calling(batch, "the model fails in evaluation"):
                logits, labels = logits_and_labels(first, spec, batch)
            check_logits(logits, spec)
            if spec.task in EMBEDDING_TASKS:
                distill.check_width(labels.shape, logits)
            for other in others:
                _require_equal(logits, logits_and_labels(other, spec, batch)[0])
            scores = score(logits, labels)
            gathered = accelerator.gather_for_metrics((scores.loss, scores.correct, scores.count))
            sums += torch.stack([part.double().sum().cpu() for part in gathered])
            samples += len(gathered[0])
    for model, training in modes:
        model.train(training)
    loss, correct, count = sums.tolist()
    metric = metric_of(spec.task)
    mean = loss / count
    value = math.exp(min(mean, 700.0)) if metric == "perplexity" else 100 * correct / count
    return Evaluation(metric, value, mean, samples)


def evaluate_artifact(
    folder: Path,
    recipe: Recipe,
    *,
    factory: str | None = None,
    teacher: str | None = None,
    teacher_weights: Path | None = None,
) -> Evaluation:
    """Evaluate an artifact on the evaluation split of a recipe's data set.

    Args:
        recipe: its data settings, batch size and mixed precision are used; columns that it does
            not name are those of the run, where the data set has them.
        factory: of a module of the user's own, see `artifact.load_artifact`.
        teacher, teacher_weights: of a task without labels, see `distill.load_reference`.

    Raises:
        AskewError: a damaged artifact; data that lack what its task needs; no network to compare
            embeddings with, or one that decides nothing; a loss that is not finite.
    """
    loaded = artifact.load_artifact(folder, factory=factory)
    path = folder / recipe_files.RECIPE
    settings = recipe_files.read_yaml(path) if path.is_file() else {}
    reference = None
    if loaded.spec.task in EMBEDDING_TASKS:
        if teacher is None and teacher_weights is None:
            _check_start(path, settings)
        reference = distill.load_reference(loaded, teacher, teacher_weights, recipe)
    elif teacher is not None or teacher_weights is not None:
        raise RecipeError(
            "--teacher and --teacher-weights go with artifacts for "
            f"{' or '.join(EMBEDDING_TASKS)}; {folder} is for {loaded.spec.task}: leave them out."
        )
    config.check(recipe.model_copy(update={"task": loaded.spec.task}))
    data = open_eval(recipe, loaded.spec.task, loaded.spec.labels, settings)
    accelerator = processes.plain_accelerator(recipe.mixed_precision)
    loader = accelerator.prepare(loaders(recipe, data, loaded.preprocessing)[1])
    model = loaded.model.to(accelerator.device)
    if reference is not None:
        reference.model.to(accelerator.device)
    result = evaluate(model, loaded.spec, loaded.preprocessing, loader, accelerator, reference)
    if not math.isfinite(result.loss):
        raise DivergenceError(
            f"the loss of {folder} on these samples is {result.loss}: the network's logits are not "
            "finite. Its weights are damaged, or of a run that diverged."
        )
    return replace(result, notes=data.notes)


def _check_start(path: Path, settings: Mapping[str, Any]) -> None:
    """Check that a run learned from the weights that are published under its model's name.

    Raises:
        RecipeError: its recipe, which lies at `path` beside the artifact, says otherwise.
    """
    named = {key: settings.get(key) for key in ("teacher", "teacher_weights")}
    taught = [
        f"--{key.replace('_', '-')} {name}"
        for key, name in named.items()
        if name not in (None, distill.SELF)
    ]
    if taught:
        raise RecipeError(
            f"{path} says that another network taught the run; pass {' '.join(taught)}, or another "
            "network to compare with."
        )
    if settings.get("weights") or settings.get("pretrained") is False:
        raise RecipeError(
            f"{path} says that the run did not start from the weights that are published as "
            f"{settings.get('model')!r}, so that similarity to those would mean nothing; pass "
            "--teacher-weights with the weights that it started from, or --teacher."
        )


def _require_equal(logits: Tensor, other: Tensor) -> None:
    logits, other = logits.float(), other.float()
    if torch.equal(logits, other):
        return
    if not logits.isfinite().all():
        raise DivergenceError(
            "the evaluated model's logits are NaN or infinite; train with a smaller lr."
        )
    difference = (logits - other).abs().max().item()
    raise ExactnessError(
        f"the reloaded artifact's logits differ from the evaluated model's by up to "
        f"{difference:g}; they must be equal to the bit. This is a bug in askewq: please report "
        "the model and the recipe."
    )
