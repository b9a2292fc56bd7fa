"""Distillation: part of the labels' loss gives way to the distance from a teacher's outputs."""

import torch
from torch import Tensor, nn

from askewq import models, tasks
from askewq.config import Recipe
from askewq.errors import ModelError
from askewq.own_models import load_weights
from askewq.spec import ModelSpec


def load_teacher(recipe: Recipe, spec: ModelSpec) -> nn.Module | None:
    """Return the teacher that a recipe names; None where the student's own start teaches.

    Args:
        spec: of the student, whose task the teacher must have.

    Raises:
        ModelError: a teacher that cannot be loaded.
    """
    if recipe.teacher is not None:
        return models.load(
            recipe.teacher,
            spec.task,
            weights=recipe.teacher_weights,
            tokenizer=recipe.tokenizer,
            trust_remote_code=recipe.trust_remote_code,
        ).model
    if recipe.teacher_weights is None:
        return None
    teacher = models.build(spec)
    load_weights(teacher, recipe.teacher_weights)
    return teacher


def check_teacher(
    teacher: nn.Module, spec: ModelSpec, batch: dict[str, Tensor], logits: Tensor
) -> None:
    """Check on a first batch that the teacher's outputs fit the student's.

    Raises:
        ModelError: the teacher fails on the student's inputs, or has outputs of another shape.
    """
    try:
        taught = teacher_logits(teacher, spec, batch)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(
            f"the teacher fails on the model's own inputs: {type(error).__name__}: {error}\nIt "
            "must take the same images or tokens; pass another --teacher."
        ) from error
    if taught.shape != logits.shape:
        raise ModelError(
            f"the teacher's outputs are {list(taught.shape)} and the model's {list(logits.shape)}; "
            "a teacher must have the same classes or tokens: pass another --teacher, or fine-tune "
            "it to the data set first."
        )


@torch.no_grad()
def teacher_logits(teacher: nn.Module, spec: ModelSpec, batch: dict[str, Tensor]) -> Tensor:
    """Return the teacher's logits for a batch, in evaluation mode."""
    return tasks.logits_and_labels(teacher.eval(), spec, batch)[0]


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
