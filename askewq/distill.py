"""Distillation: a teacher's outputs take part of the labels' loss, its hidden states add to it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from askewq import hidden_states, models, tasks
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
    def outputs(self, batch: dict[str, Tensor], *, hidden_states: bool = False) -> tasks.Outputs:
        """Return what it makes of a batch, in evaluation mode."""
        return tasks.outputs_of(self.model.eval(), self.spec, batch, hidden_states=hidden_states)


def wanted(recipe: Recipe) -> bool:
    """Tell whether a recipe has a teacher, be it the network itself."""
    return recipe.distill > 0 or recipe.distill_hidden > 0


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
    if recipe.distill and set(names) == set(spec.labels) and names != spec.labels:
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


def check(
    recipe: Recipe,
    student: LoadedModel,
    teacher: Teacher | None,
    batch: dict[str, Tensor],
    logits: Tensor,
) -> None:
    """Check on a first batch that the teacher's outputs and hidden states fit the student's.

    Args:
        teacher: None where the student's own start teaches.
        logits: the student's, of that batch.

    Raises:
        ModelError: a model without hidden states where they are asked for; a teacher that fails
            on the student's inputs, or whose outputs or hidden states have another shape.
    """
    ours: tuple[Tensor, ...] = ()
    if recipe.distill_hidden:
        ours = hidden_states.read(student.model, student.spec, batch, "model")
    if teacher is None:
        return
    shape = _try(teacher, batch).logits.shape
    if recipe.distill and shape != logits.shape:
        raise ModelError(
            f"the teacher's outputs are {list(shape)} and the model's {list(logits.shape)}; a "
            "teacher must have the same classes or tokens: pass another --teacher, or fine-tune it "
            "to the data set first."
        )
    if recipe.distill_hidden:
        theirs = hidden_states.read(teacher.model, teacher.spec, batch, "teacher")
        hidden_states.check_same(ours, theirs)


def _try(teacher: Teacher, batch: dict[str, Tensor]) -> tasks.Outputs:
    try:
        return teacher.outputs(batch)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(
            f"the teacher fails on the model's own inputs: {type(error).__name__}: {error}\nIt "
            "must take the same images or tokens; pass another --teacher."
        ) from error


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


def total(
    loss: Tensor,
    student: tasks.Outputs,
    teacher: tasks.Outputs,
    spec: ModelSpec,
    batch: dict[str, Tensor],
    recipe: Recipe,
) -> Tensor:
    """Return the loss of a batch with what the teacher gives to it.

    Args:
        loss: the labels'.
        student, teacher: what they made of the batch, hidden states included if they count.
    """
    if recipe.distill:
        logits, labels = tasks.aligned(student.logits, spec, batch)
        taught, _ = tasks.aligned(teacher.logits, spec, batch)
        by_logits = distance(logits, taught, labels, recipe.temperature)
        loss = torch.lerp(loss, by_logits, recipe.distill)
    if recipe.distill_hidden:
        mask = batch.get("attention_mask")
        by_states = hidden_states.distance(student.hidden, teacher.hidden, mask)
        loss = loss + recipe.distill_hidden * by_states
    return loss
