"""Hidden states of transformers' models: how far a student's are from its teacher's.

Only what the student was shown counts: a padded token has states, too, and they mean nothing.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from askewq.errors import CALLING, ModelError
from askewq.spec import ModelSpec, first_line
from askewq.tasks import outputs_of

KEY = "distill_hidden"


def distance(
    student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None
) -> Tensor:
    """Return the mean over layers of the squared difference over the teacher's mean square.

    So every layer counts alike, whatever the size of its states; one that is 0 everywhere in the
    teacher counts nothing.

    Args:
        student, teacher: of each layer, [batch, tokens, width] or [batch, channels, ...].
        mask: [batch, tokens]; where it is 0 nothing counts.

    Source: TinyBERT, Jiao et al. 2020 (arXiv 1909.10351), section 3; the division is ours.
    """
    layers = []
    for ours, theirs in zip(student, teacher, strict=True):
        ours, theirs = ours.float(), theirs.float()
        if mask is not None:
            ours, theirs = ours[mask != 0], theirs[mask != 0]
        size = theirs.square().mean()
        difference = (ours - theirs).square().mean()
        layers.append(difference / size.where(size > 0, math.inf))
    return torch.stack(layers).mean()


def read(
    model: nn.Module, spec: ModelSpec, batch: dict[str, Tensor], who: str
) -> tuple[Tensor, ...]:
    """Return the hidden states that a model gives for a batch, without gradients.

    Args:
        who: "model" or "teacher", as messages call it.

    Raises:
        ModelError: it gives none, or not one a token.
    """
    if spec.source != "transformers":
        raise ModelError(
            f"{KEY}: the {who} {spec.name!r} is from {spec.source}, and only transformers' models "
            f"tell their hidden states; leave {KEY} out, or use distill."
        )
    try:
        with torch.no_grad():
            found = outputs_of(model.eval(), spec, batch, hidden_states=True).hidden
    except CALLING as error:
        raise ModelError(
            f"{KEY}: the {who} {spec.name!r} fails when it is asked for its hidden states: "
            f"{type(error).__name__}: {first_line(error)}; leave {KEY} out."
        ) from error
    if not found:
        raise ModelError(
            f"{KEY}: the {who} {spec.name!r} returns no hidden states; leave {KEY} out."
        )
    mask = batch.get("attention_mask")
    for state in found:
        if mask is not None and state.shape[:2] != mask.shape:
            raise ModelError(
                f"{KEY}: the {who} {spec.name!r} has hidden states of {list(state.shape)} for "
                f"{list(mask.shape)} tokens, so that padded ones cannot be told apart; leave "
                f"{KEY} out."
            )
    return found


def check_same(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    """Check that the hidden states of two models can be compared layer by layer.

    Raises:
        ModelError: another number of layers, or another width.
    """
    advice = (
        "the teacher must be the model itself (--teacher self, the default) or one of its size; "
        f"leave {KEY} out to teach by the outputs alone."
    )
    if len(student) != len(teacher):
        raise ModelError(
            f"{KEY}: the teacher has {len(teacher)} hidden states and the model {len(student)} "
            f"(one a layer, and the embeddings'); {advice}"
        )
    for i, (ours, theirs) in enumerate(zip(student, teacher, strict=True)):
        if ours.shape != theirs.shape:
            raise ModelError(
                f"{KEY}: hidden state {i} has the shape {list(theirs.shape)} in the teacher and "
                f"{list(ours.shape)} in the model (texts: batch, tokens, width); {advice}"
            )
