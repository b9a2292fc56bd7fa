"""Distillation: a teacher's outputs take part of the labels' loss, its hidden states add to it."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from askewq import hidden_states, models, tasks
from askewq.config import Recipe
from askewq.errors import ModelError
from askewq.hf_models import load_tokenizer
from askewq.own_models import load_weights
from askewq.preprocessing import (
    ImagePreprocessing,
    Preprocessing,
    ProcessorPreprocessing,
    TextPreprocessing,
)
from askewq.spec import LoadedModel, ModelSpec, renamed
from askewq.timm_models import is_published
from askewq.vocabulary import EMBEDDING_TASKS

# The name of the network before it is quantized.
SELF = "self"


@dataclass(frozen=True, slots=True)
class Teacher:
    """A network and how it is called."""

    model: nn.Module
    spec: ModelSpec
    doubts: tuple[str, ...] = ()  # what is for the user to judge

    @torch.no_grad()
    def outputs(self, batch: dict[str, Tensor], *, hidden_states: bool = False) -> tasks.Outputs:
        """Return what it makes of a batch, in evaluation mode."""
        return tasks.outputs_of(self.model.eval(), self.spec, batch, hidden_states=hidden_states)


def labelled(
    batch: dict[str, Tensor], spec: ModelSpec, taught: tasks.Outputs | None
) -> dict[str, Tensor]:
    """Return a batch with labels: where data have none, they are a teacher's embeddings."""
    if spec.task not in EMBEDDING_TASKS or taught is None:
        return batch
    return {**batch, "labels": taught.logits}


def load_teacher(
    recipe: Recipe, student: LoadedModel, columns: tuple[str, ...] = ()
) -> Teacher | None:
    """Return the teacher that a recipe names; None where the student's own start teaches.

    Args:
        columns: of the data set that the student reads.

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
    if source == "transformers" and recipe.teacher_weights is not None:
        raise ModelError(
            "--teacher-weights goes with timm models and modules of your own; for a Hugging Face "
            "teacher pass the folder that holds config.json and the weights as --teacher."
        )
    loaded = models.load(
        recipe.teacher,
        spec.task,
        () if source == "transformers" else spec.labels,
        source=source,
        weights=recipe.teacher_weights,
        tokenizer=_borrowed_tokenizer(recipe),
        image_size=_side(student.preprocessing) if source == "timm" else None,
        trust_remote_code=recipe.trust_remote_code,
    )
    if loaded.notes:
        raise ModelError(
            f"the teacher {recipe.teacher!r} was not trained for this: {'; '.join(loaded.notes)}. "
            "Fine-tune it to the data set first, and pass "
            + ("its folder as --teacher." if source == "transformers" else "its --teacher-weights.")
        )
    if source != "module" and not _same_inputs(loaded.preprocessing, student.preprocessing):
        raise ModelError(
            f"the teacher {recipe.teacher!r} normalises images, or splits texts, in another way "
            f"than {spec.name!r}; both see one batch, so it would teach nonsense. Pass another."
        )
    if len(columns) > 1 and _segments(loaded.preprocessing) > _segments(student.preprocessing):
        raise ModelError(
            f"the teacher {recipe.teacher!r} is told which of two texts a token is of "
            f"(token_type_ids), which {spec.name!r} and its tokenizer leave out; both see one "
            "batch. Pass another --teacher, or read one of the --text-columns."
        )
    classes = getattr(getattr(loaded.model, "config", None), "id2label", None) or {}
    names = tuple(str(name) for _, name in sorted(classes.items()))  # a file may have 10 before 2
    names = names or loaded.spec.labels  # of timm, in the order of its head
    theirs, ours = ([label.casefold() for label in labels] for labels in (names, spec.labels))
    if recipe.distill and theirs != ours and sorted(theirs) == sorted(ours):
        raise ModelError(
            f"the teacher {recipe.teacher!r} has the labels in another order ({', '.join(names)}; "
            f"here {', '.join(spec.labels)}); pass another --teacher."
        )
    doubts = renamed(loaded.spec.name, names, spec.labels) if recipe.distill else ()
    return Teacher(loaded.model, loaded.spec, (*loaded.doubts, *doubts))


def _borrowed_tokenizer(recipe: Recipe) -> str | None:
    """Return the tokenizer for a teacher that has none of its own; one of its own is compared."""
    if recipe.tokenizer is None or recipe.teacher is None:
        return None
    with suppress(ModelError):
        load_tokenizer(recipe.teacher, recipe.trust_remote_code, None)
        return None
    return recipe.tokenizer


def _side(preprocessing: Preprocessing) -> int | None:
    """Return the side of the images that a network is given, where they are square."""
    size = preprocessing.size if isinstance(preprocessing, ImagePreprocessing) else None
    return size[0] if size and size[0] == size[1] else None


def _same_inputs(teacher: Preprocessing, student: Preprocessing) -> bool:
    """Tell whether an input prepared for one means the same to the other."""
    if isinstance(teacher, ImagePreprocessing) and isinstance(student, ImagePreprocessing):
        return (teacher.mean, teacher.std) == (student.mean, student.std)
    if isinstance(teacher, TextPreprocessing) and isinstance(student, TextPreprocessing):
        return bool(teacher.tokenizer.get_vocab() == student.tokenizer.get_vocab())
    if isinstance(teacher, ProcessorPreprocessing) and isinstance(student, ProcessorPreprocessing):
        return bool(teacher.processor.to_dict() == student.processor.to_dict())
    return False


def _segments(preprocessing: Preprocessing) -> bool:
    """Tell whether a tokenizer says which of two texts a token is of."""
    if not isinstance(preprocessing, TextPreprocessing):
        return False
    return "token_type_ids" in preprocessing.tokenizer.model_input_names


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
    shape = taught(teacher, batch).logits.shape
    if teacher.spec.task in EMBEDDING_TASKS:
        check_width(shape, logits)
    elif recipe.distill and shape != logits.shape:
        raise ModelError(
            f"the teacher's outputs are {list(shape)} and the model's {list(logits.shape)}; a "
            "teacher must have the same classes or tokens: pass another --teacher, or fine-tune it "
            "to the data set first."
        )
    if recipe.distill_hidden:
        theirs = hidden_states.read(teacher.model, teacher.spec, batch, "teacher")
        hidden_states.check_same(ours, theirs)


def check_width(taught: torch.Size, embedding: Tensor) -> None:
    """Check that embeddings, of which the teacher's have the shape `taught`, can be compared.

    Raises:
        ModelError: of another width.
    """
    if taught != embedding.shape:
        raise ModelError(
            f"the teacher's embeddings have {taught[-1]} numbers and the model's "
            f"{embedding.shape[-1]}; pass a --teacher of that width, or none: the model itself "
            "before it is quantized."
        )


def taught(
    teacher: Teacher, batch: dict[str, Tensor], *, hidden_states: bool = False
) -> tasks.Outputs:
    """Return what a teacher makes of a batch that was prepared for another network.

    Raises:
        ModelError: it fails.
    """
    advice = "It must take the same images or tokens; pass another --teacher."
    with tasks.calling(batch, "the teacher fails", advice):
        return teacher.outputs(batch, hidden_states=hidden_states)


def _check_original(spec: ModelSpec) -> None:
    """Check that the name in an artifact, a stranger's perhaps, is one to load a network by.

    Raises:
        ModelError: it would run a file, or have timm read a repository that nobody vouches for.
    """
    source = models.find_source(spec.name)
    if "module" in (spec.source, source):
        raise ModelError("a module of somebody's own runs only where you name it.")
    if source == "timm" and not is_published(spec.name):
        raise ModelError("it is none of timm's own names, and is read only where you name it.")


def load_reference(
    loaded: LoadedModel, teacher: str | None, teacher_weights: Path | None, recipe: Recipe
) -> Teacher:
    """Return the full-precision network whose embeddings an artifact's are compared with.

    Args:
        loaded: the artifact.
        teacher, teacher_weights: as those of a recipe; by default the model it was made from.

    Raises:
        ModelError: it cannot be loaded, or prepares its inputs in another way.
    """
    original = teacher is None and teacher_weights is None
    name = loaded.spec.name if original else teacher
    named = {"teacher": name, "teacher_weights": teacher_weights, "task": loaded.spec.task}
    if isinstance(loaded.preprocessing, TextPreprocessing):
        named["tokenizer"] = recipe.model  # the artifact's, for a teacher that has none
    try:
        if original:
            _check_original(loaded.spec)
        found = load_teacher(recipe.model_copy(update=named), loaded)
    except ModelError as error:
        if not original:
            raise
        raise ModelError(
            f"similarity is to the full-precision model, and the artifact names {name!r}, which "
            f"cannot be used: {error}\nPass --teacher MODEL (an id, a folder or "
            "path/to/file.py:factory), or --teacher-weights with the weights that it started from."
        ) from error
    if found is None:
        raise ModelError("--teacher self is of a run; pass an id or a folder, or leave it out.")
    return found


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
