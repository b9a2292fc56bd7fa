"""Distillation: part of the labels' loss gives way to the distance from a teacher's outputs."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from askewq import models, tasks
from askewq.config import Recipe
from askewq.errors import ModelError
from askewq.own_models import load_weights
from askewq.preprocessing import (
    ImagePreprocessing,
    Preprocessing,
    ProcessorPreprocessing,
    TextPreprocessing,
)
from askewq.spec import LoadedModel, ModelSpec

# The name of the network before it is quantized.
SELF = "self"


@dataclass(frozen=True, slots=True)
class Teacher:
    """A network and how it is called."""

    model: nn.Module
    spec: ModelSpec

    @torch.no_grad()
    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Return its logits for a batch, in evaluation mode."""
        return tasks.logits_and_labels(self.model.eval(), self.spec, batch)[0]


def load_teacher(recipe: Recipe, student: LoadedModel) -> Teacher | None:
    """Return the teacher that a recipe names; None where the student's own start teaches.

    Raises:
        ModelError: a teacher that cannot be loaded, has no trained head for the student's classes,
            or prepares its inputs in another way.
    """
    spec = student.spec
    if recipe.teacher in (None, SELF):
        if recipe.teacher_weights is None:
            return None
        model = models.build(spec)
        load_weights(model, recipe.teacher_weights)
        return Teacher(model, spec)
    source = models.find_source(recipe.teacher)
    loaded = models.load(
        recipe.teacher,
        spec.task,
        () if source == "transformers" else spec.labels,
        source=source,
        weights=recipe.teacher_weights,
        tokenizer=recipe.tokenizer,
        trust_remote_code=recipe.trust_remote_code,
    )
    if loaded.notes:
        raise ModelError(
            f"the teacher {recipe.teacher!r} was not trained for this: {'; '.join(loaded.notes)}. "
            "Fine-tune it to the data set first, and pass its --teacher-weights."
        )
    if source != "module" and not _same_inputs(loaded.preprocessing, student.preprocessing):
        raise ModelError(
            f"the teacher {recipe.teacher!r} normalises images, or splits texts, in another way "
            f"than {spec.name!r}; both see one batch, so it would teach nonsense. Pass another."
        )
    classes = getattr(getattr(loaded.model, "config", None), "id2label", None) or {}
    names = tuple(classes.values())
    if set(names) == set(spec.labels) and names != spec.labels:
        raise ModelError(
            f"the teacher {recipe.teacher!r} has the labels in another order ({', '.join(names)}; "
            f"here {', '.join(spec.labels)}); pass another --teacher."
        )
    return Teacher(loaded.model, loaded.spec)


def _same_inputs(teacher: Preprocessing, student: Preprocessing) -> bool:
    """Tell whether an input prepared for one means the same to the other."""
    if isinstance(teacher, ImagePreprocessing) and isinstance(student, ImagePreprocessing):
        return (teacher.mean, teacher.std) == (student.mean, student.std)
    if isinstance(teacher, TextPreprocessing) and isinstance(student, TextPreprocessing):
        return bool(teacher.tokenizer.get_vocab() == student.tokenizer.get_vocab())
    if isinstance(teacher, ProcessorPreprocessing) and isinstance(student, ProcessorPreprocessing):
        return bool(teacher.processor.to_dict() == student.processor.to_dict())
    return False


def check_teacher(teacher: Teacher, batch: dict[str, Tensor], logits: Tensor) -> None:
    """Check on a first batch that the teacher's outputs fit the student's.

    Raises:
        ModelError: the teacher fails on the student's inputs, or has outputs of another shape.
    """
    try:
        shape = teacher.logits(batch).shape
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(
            f"the teacher fails on the model's own inputs: {type(error).__name__}: {error}\nIt "
            "must take the same images or tokens; pass another --teacher."
        ) from error
    if shape != logits.shape:
        raise ModelError(
            f"the teacher's outputs are {list(shape)} and the model's {list(logits.shape)}; a "
            "teacher must have the same classes or tokens: pass another --teacher, or fine-tune it "
            "to the data set first."
        )


def distance(logits: Tensor, taught: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return T^2 times the mean divergence KL(teacher || student) at temperature T.

    Args:
        logits, taught: of student and teacher, [batch, ..., classes].
        labels: [batch, ...]; rows labelled -100 do not count.

    Source: Hinton, Vinyals, Dean 2015 (arXiv 1503.02531), section 2.
    """
    rows = labels.reshape(-1) != tasks.IGNORED
    student = logits.reshape(-1, logits.shape[-1]).float()[rows] / temperature
    teacher = taught.reshape(-1, taught.shape[-1]).float()[rows] / temperature
    divergence = nn.functional.kl_div(
        student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True
    )
    return temperature**2 * divergence
