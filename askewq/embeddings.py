"""Encoders without labels: a text's embedding, and how near it is to a teacher's.

The teacher's embeddings stand in the place of labels, so that the loop, the evaluation and the
comparison to the bit know nothing of this task.
"""

from torch import Tensor, nn

from askewq.vocabulary import Task

TASK: Task = "feature-extraction"


def pool(states: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the hidden states of each text over its tokens: [batch, width].

    Args:
        states: the last layer's, [batch, tokens, width].
        mask: [batch, tokens]; where it is 0 a token is padding.

    Source: Reimers and Gurevych 2019 (arXiv 1908.10084), the MEAN strategy of section 3.
    """
    counted = mask.unsqueeze(-1).to(states.dtype)
    return (states * counted).sum(1) / counted.sum(1)


def similarity(embeddings: Tensor, taught: Tensor) -> Tensor:
    """Return the cosine of the angle between each embedding and the teacher's, float32 [batch].

    Taken in float64, so that equal embeddings have a cosine of 1 and not a little more.
    """
    ours, theirs = embeddings.double(), taught.double()
    return nn.functional.cosine_similarity(ours, theirs, dim=-1).float()
