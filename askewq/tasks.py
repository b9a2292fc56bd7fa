"""What a task asks of a model: logits and labels out of a batch, and the metric that is reported.

Classes and tokens share one loss, cross entropy over rows of logits; a label of -100 does not
count. Without labels the logits are embeddings, and a teacher's stand for labels (embeddings.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from askewq import embeddings, processes
from askewq.errors import CALLING, ModelError
from askewq.spec import ModelSpec, first_line
from askewq.vocabulary import EMBEDDING_TASKS, IMAGE_TASKS, Task

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Scores:
    """Sums over each sample's rows, all of shape [batch], so that they can be gathered exactly."""

    loss: Tensor
    correct: Tensor
    count: Tensor


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a model makes of a batch.

    Attributes:
        logits: [batch, ..., classes], or embeddings [batch, width].
        hidden: where they were asked for, the hidden states, from the embeddings' to the last
            layer's: [batch, tokens, width], or [batch, channels, height, width]; else none.
    """

    logits: Tensor
    hidden: tuple[Tensor, ...] = ()


@contextmanager
def calling(batch: dict[str, Tensor], what: str, advice: str = "") -> Iterator[None]:
    """Within the block, networks are called with a batch: what they raise is a ModelError.

    Args:
        what: the network, and when: ``"the model fails in training"``.
        advice: what to do.

    Raises:
        ModelError: the network fails; the message names the batch's shapes.
    """
    try:
        yield
    except CALLING as error:
        if processes.lost_another(error):
            raise
        shapes = {key: list(tensor.shape) for key, tensor in batch.items()}
        raise ModelError(
            f"{what} on a batch of {shapes}: {type(error).__name__}: {error}\n{advice}".rstrip()
        ) from error


def metric_of(task: Task) -> str:
    """Return the metric's name: accuracy or similarity (percent), or perplexity."""
    if task in EMBEDDING_TASKS:
        return "similarity"
    return "perplexity" if task == "causal-lm" else "accuracy"


def keeps_last(task: Task) -> bool:
    """Tell whether the last layer is a head, or has no part in the task, and so stays float.

    A network that gives images' embeddings has neither: its last layer is one like the others.
    """
    return task != "image-feature-extraction"


def logits_and_labels(
    model: nn.Module, spec: ModelSpec, batch: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Run the model on a batch.

    Returns:
        Logits [batch, ..., classes] and labels [batch, ...]; for a language model the logits at
        each position and the token that follows.
    """
    return aligned(logits_of(model, spec, batch), spec, batch)


def aligned(logits: Tensor, spec: ModelSpec, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return all logits of a batch, or those that have a label, and the labels."""
    labels = batch["labels"]
    return (logits[:, :-1], labels[:, 1:]) if spec.task == "causal-lm" else (logits, labels)


def logits_of(model: nn.Module, spec: ModelSpec, inputs: dict[str, Tensor]) -> Tensor:
    """Return the model's logits [batch, ..., classes], or embeddings, for named inputs."""
    return outputs_of(model, spec, inputs).logits


def outputs_of(
    model: nn.Module, spec: ModelSpec, inputs: dict[str, Tensor], *, hidden_states: bool = False
) -> Outputs:
    """Run the model on named inputs; `labels` among them are not shown to it.

    Args:
        hidden_states: return them, too; of transformers' models alone.
    """
    if spec.task in IMAGE_TASKS and spec.source != "transformers":
        return Outputs(cast(Tensor, model(inputs["pixel_values"])))
    inputs = {key: tensor for key, tensor in inputs.items() if key != "labels"}
    more = {"output_hidden_states": True} if hidden_states else {}
    made = model(**inputs, **more)
    hidden = tuple(made.get("hidden_states") or ()) if hidden_states else ()
    if spec.task in EMBEDDING_TASKS:
        return Outputs(embeddings.of(made, inputs, spec.pooling), hidden)
    return Outputs(cast(Tensor, made.logits), hidden)


def score(logits: Tensor, labels: Tensor) -> Scores:
    """Return per-sample sums of loss, correct rows and counted rows, float32.

    Embeddings have one row a sample, as correct as it is similar to the teacher's.
    """
    if labels.is_floating_point():
        similar = embeddings.similarity(logits, labels)
        return Scores(loss=1 - similar, correct=similar, count=torch.ones_like(similar))
    rows, flat = logits.reshape(-1, logits.shape[-1]).float(), labels.reshape(-1)
    loss = nn.functional.cross_entropy(rows, flat, reduction="none", ignore_index=IGNORED)
    correct = (rows.argmax(dim=1) == flat).float()
    per_sample = (len(labels), -1)
    return Scores(
        loss=loss.view(per_sample).sum(1),
        correct=correct.view(per_sample).sum(1),
        count=(flat != IGNORED).float().view(per_sample).sum(1),
    )


def check_logits(logits: Tensor, spec: ModelSpec) -> None:
    """Check the shape of the first logits, or embeddings, of a run.

    Raises:
        ModelError: no matrix, or another number of classes than the data has labels.
    """
    if spec.task == "causal-lm":
        return
    unlabelled = spec.task in EMBEDDING_TASKS
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        shape = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        wanted = "embeddings [batch, width]" if unlabelled else "logits [batch, classes]"
        raise ModelError(f"the model must return {wanted}; it returned {shape}.")
    if not unlabelled and logits.shape[1] != len(spec.labels):
        raise ModelError(
            f"the model has {logits.shape[1]} outputs and the data set {len(spec.labels)} labels "
            f"({', '.join(spec.labels[:8])}{', ...' if len(spec.labels) > 8 else ''}); give the "
            "model a head of that size, or choose another --label-column."
        )


@torch.no_grad()
def check_causal(
    model: nn.Module, spec: ModelSpec, batch: dict[str, Tensor], logits: Tensor
) -> None:
    """Check that a language model does not see the token that it has to predict.

    Args:
        logits: its own, of that batch.

    Raises:
        ModelError: they change with a later token.
    """
    if spec.task != "causal-lm":
        return
    ids = batch["input_ids"]
    other = torch.where(ids < ids.max(), ids + 1, (ids - 1).clamp_min(0))
    changed = torch.cat([ids[:, :-1], other[:, -1:]], 1)
    again = logits_of(model, spec, {**batch, "input_ids": changed})
    if (again - logits)[:, :-1].abs().max() > 1e-4 * logits.abs().max():
        raise ModelError(
            f"{spec.name!r} sees the tokens that it has to predict: its logits change with later "
            "ones, so that its perplexity would mean nothing. --task causal-lm is for decoders; "
            "pass another --task, or another model."
        )


@torch.no_grad()
def check_length(
    model: nn.Module, spec: ModelSpec, batch: dict[str, Tensor], length: int, who: str = "model"
) -> None:
    """Check that a model takes texts as long as they may come: it may know fewer positions.

    Args:
        batch: of texts that it takes.
        length: tokens of the longest text.
        who: what the model is to the run.

    Raises:
        ModelError: it does not.
    """
    ids = batch["input_ids"]
    if ids.shape[1] >= length:
        return
    mask = batch.get("attention_mask", torch.ones_like(ids))
    longest = mask.sum(1).argmax()
    row = ids[longest][mask[longest] > 0]  # no padding, which may have no position
    row = row if len(row) else ids[0, :1]
    body = row[:-1] if len(row) > 1 else row
    # A text of a sequence-to-sequence model ends with its last token, and needs one.
    long = torch.cat([body.repeat(length // len(body) + 1)[: length - 1], row[-1:]]).view(1, -1)
    try:
        logits_of(model, spec, {"input_ids": long, "attention_mask": torch.ones_like(long)})
    except CALLING as error:
        raise ModelError(
            f"the {who} fails on a text of {length} tokens ({type(error).__name__}: "
            f"{first_line(error)}); pass a smaller --max-length."
        ) from error
