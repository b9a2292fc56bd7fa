"""Encoders without labels: an input's embedding, and how near it is to a teacher's.

The teacher's embeddings stand in the place of labels, so that the loop, the evaluation and the
comparison to the bit know nothing of this task.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from askewq.errors import ModelError
from askewq.vocabulary import Pooling


def of(made: Any, inputs: Mapping[str, Tensor], pooling: Pooling) -> Tensor:
    """Return the embeddings in what an encoder of transformers returned: [batch, width].

    An image's is the encoder's own `pooler_output`, [batch, width] or [batch, width, 1, 1]; a
    text's is pooled from the last layer's states.

    Raises:
        ModelError: an encoder of images that pools nothing.
    """
    if "pixel_values" in inputs:
        pooled: Tensor | None = getattr(made, "pooler_output", None)
        if pooled is None:
            raise ModelError(
                "the encoder returns no pooler_output, which is an image's embedding; use another "
                "one, timm's of the same name, or a module of your own that returns [batch, width]."
            )
        return pooled.flatten(1)
    return pool(made.last_hidden_state, inputs["attention_mask"], pooling)


def pool(states: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """Return the embedding of each text: [batch, width].

    Args:
        states: the last layer's, [batch, tokens, width].
        mask: [batch, tokens]; where it is 0 a token is padding.
        pooling: the mean over a text's tokens, or the state of its first or its last one.

    Source: Reimers and Gurevych 2019 (arXiv 1908.10084), section 3, strategies MEAN and CLS; the
        last token for decoders, as sentence-transformers has it.
    """
    if pooling == "mean":
        counted = mask.unsqueeze(-1).to(states.dtype)
        return (states * counted).sum(1) / counted.sum(1)
    counts = mask.to(torch.int32)  # of int64 ONNX has no argmax in every runtime
    place = counts.argmax(1)  # the first of the largest
    if pooling == "lasttoken":
        place = mask.shape[1] - 1 - counts.flip(1).argmax(1)
    places = place[:, None, None].expand(-1, 1, states.shape[-1])
    return states.gather(1, places).squeeze(1)


def similarity(embeddings: Tensor, taught: Tensor) -> Tensor:
    """Return the cosine of the angle between each embedding and the teacher's, float32 [batch].

    Taken in float64, so that equal embeddings have a cosine of 1 and not a little more.
    """
    ours, theirs = embeddings.double(), taught.double()
    return nn.functional.cosine_similarity(ours, theirs, dim=-1).float()
