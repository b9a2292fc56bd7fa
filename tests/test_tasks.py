"""Losses and metrics: sums over samples against slow loops, and logits that do not fit."""

import math
from types import SimpleNamespace

import pytest
import torch
from builders import own_network
from torch import nn

from askewq.errors import ModelError
from askewq.spec import ModelSpec
from askewq.tasks import (
    IGNORED,
    check_length,
    check_logits,
    logits_and_labels,
    metric_of,
    score,
)

IMAGES, TEXTS, LM = "image-classification", "text-classification", "causal-lm"


def spec(task, source="transformers", labels=("a", "b", "c")):
    """Return a spec of a task."""
    return ModelSpec(source, "m", task, () if task == LM else labels, {})


def slow_score(logits, labels):
    """Return loss, correct and count of every sample, one row at a time in Python floats."""
    sums = []
    for rows, wanted in zip(logits.tolist(), labels.tolist(), strict=True):
        if not isinstance(wanted, list):
            rows, wanted = [rows], [wanted]
        loss = correct = count = 0.0
        for row, label in zip(rows, wanted, strict=True):
            if label == IGNORED:
                continue
            loss += math.log(sum(math.exp(x) for x in row)) - row[label]
            correct += row.index(max(row)) == label
            count += 1
        sums.append((loss, correct, count))
    return torch.tensor(sums).T


@pytest.mark.parametrize("shape", [(5, 3), (4, 6, 3)], ids=["classes", "tokens"])
def test_score_is_the_slow_loop(shape):
    """Loss, correct rows and counted rows of each sample are those of the plain definition."""
    logits = torch.randn(shape)
    labels = torch.randint(0, 3, shape[:-1])
    labels[0] = IGNORED if len(shape) == 2 else torch.tensor([IGNORED] * 3 + [0] * 3)
    got = score(logits, labels)
    torch.testing.assert_close(
        torch.stack([got.loss, got.correct, got.count]), slow_score(logits, labels)
    )


def test_score_of_half_precision_logits_is_float32():
    """Sums are taken in float32, whatever autocast gave."""
    got = score(torch.randn(4, 3).bfloat16(), torch.zeros(4, dtype=torch.long))
    assert {got.loss.dtype, got.correct.dtype, got.count.dtype} == {torch.float32}


def test_score_has_a_gradient():
    """The loss that is evaluated is the one that is trained."""
    logits = torch.randn(4, 3, requires_grad=True)
    labels = torch.tensor([0, 1, 2, IGNORED])
    scores = score(logits, labels)
    (scores.loss.sum() / scores.count.sum()).backward()
    plain = logits.detach().requires_grad_()
    nn.functional.cross_entropy(plain, labels).backward()
    torch.testing.assert_close(logits.grad, plain.grad)


@pytest.mark.parametrize(
    ("task", "metric"), [(IMAGES, "accuracy"), (TEXTS, "accuracy"), (LM, "perplexity")]
)
def test_metric(task, metric):
    """Classification reports accuracy, a language model perplexity."""
    assert metric_of(task) == metric


def test_plain_networks_take_the_images_alone():
    """A timm model or a user's own gets pixels and returns logits."""
    network, pixels = own_network("small"), torch.randn(2, 3, 16, 16)
    batch = {"pixel_values": pixels, "labels": torch.tensor([0, 1])}
    logits, labels = logits_and_labels(network, spec(IMAGES, "module"), batch)
    assert torch.equal(logits, network(pixels))
    assert labels is batch["labels"]


def echo(**inputs):
    """Stand for a Hugging Face model: return what it was given."""
    return SimpleNamespace(logits=inputs)


def test_hugging_face_models_get_every_input_but_the_labels():
    """The model computes no loss of its own, and sees masks and token types."""
    batch = {"input_ids": torch.ones(1), "attention_mask": torch.ones(1), "labels": torch.ones(1)}
    logits, _ = logits_and_labels(echo, spec(TEXTS), batch)
    assert logits.keys() == {"input_ids", "attention_mask"}


def test_language_models_predict_the_next_token():
    """The logits at each position meet the token that follows."""
    tokens = torch.tensor([[3, 1, 2, 0]])
    model = lambda input_ids: SimpleNamespace(  # noqa: E731
        logits=nn.functional.one_hot(input_ids.roll(-1, 1), 4).float() * 100
    )
    logits, labels = logits_and_labels(model, spec(LM), {"input_ids": tokens, "labels": tokens})
    assert labels.tolist() == [[1, 2, 0]]
    assert score(logits, labels).correct.tolist() == [3.0]


@pytest.mark.parametrize(
    ("logits", "words"),
    [
        (torch.randn(2, 10), ["10 outputs", "3 labels", "a, b, c", "--label-column"]),
        (torch.randn(2, 3, 4), ["[2, 3, 4]", "[batch, classes]"]),
        ((torch.randn(2, 3),), ["tuple", "[batch, classes]"]),
    ],
    ids=["classes", "dimensions", "type"],
)
def test_logits_that_do_not_fit(logits, words):
    """Another number of classes, another shape and no tensor at all are told apart."""
    with pytest.raises(ModelError) as caught:
        check_logits(logits, spec(IMAGES))
    assert all(word in str(caught.value) for word in words)


def test_many_labels_are_abbreviated():
    """A message about a thousand classes stays readable."""
    names = tuple(f"label{i}" for i in range(1000))
    with pytest.raises(ModelError) as caught:
        check_logits(torch.randn(2, 3), spec(IMAGES, labels=names))
    assert "..." in str(caught.value)
    assert len(str(caught.value)) < 400


def test_logits_that_fit_pass():
    """Fitting logits raise nothing; a language model's vocabulary is not compared to labels."""
    check_logits(torch.randn(2, 3), spec(IMAGES))
    check_logits(torch.randn(2, 7, 50), spec(LM))


@pytest.mark.parametrize(
    ("rows", "tried"),
    [
        ([[0, 0, 0, 0], [2, 4, 5, 3]], [2, 4, 5, 2, 4, 5, 3]),
        ([[0, 0, 0, 0], [0, 0, 7, 3]], [7, 7, 7, 7, 7, 7, 3]),  # padded before the text
        ([[0, 0, 0, 0]], [0] * 7),  # a text of no tokens, and nothing else to try
    ],
)
def test_a_long_text_is_made_of_the_longest_one(rows, tried):
    """Its tokens repeated, its last one last, and no padding where there is anything else."""
    seen = []

    def model(input_ids, attention_mask):
        seen.append((input_ids.tolist(), attention_mask.tolist()))
        return SimpleNamespace(logits=torch.zeros(1, 3))

    ids = torch.tensor(rows)
    check_length(model, spec(TEXTS), {"input_ids": ids, "attention_mask": (ids > 0).long()}, 7)
    assert seen == [([tried], [[1] * 7])]
