"""Encoders without labels: an input's embedding, and how near it is to a teacher's.

The teacher's embeddings stand in the place of labels, so that the loop, the evaluation and the
comparison to the bit know nothing of this task.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from askewq.errors import ModelError

_MODE = "pooling_mode_"
# What transformers.utils.hub.cached_file is told so that it returns None where there is no file.
_MISSING = (
    "_raise_exceptions_for_gated_repo",
    "_raise_exceptions_for_missing_entries",
    "_raise_exceptions_for_connection_errors",
)


def of(made: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the embeddings in what an encoder of transformers returned: [batch, width].

    An image's is the encoder's own `pooler_output`, [batch, width] or [batch, width, 1, 1]; a
    text's the mean over its tokens, as sentence-transformers takes it.

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
    return pool(made.last_hidden_state, inputs["attention_mask"])


def pooling_doubt(name: str) -> tuple[str, ...]:
    """Return the doubt about an encoder of texts whose files want another embedding than the mean.

    Args:
        name: its folder, or its id on the Hub.

    Source: the files of sentence-transformers, modules.json and 1_Pooling/config.json.
    """
    modules, pooling = _read(name, "modules.json", []), _read(name, "1_Pooling/config.json", {})
    named = [str(module.get("type")) for module in modules if isinstance(module, dict)]
    kinds = [name.rpartition(".")[2] for name in named]
    modes = [key for key, value in pooling.items() if key.startswith(_MODE) and value is True]
    modes = [key.removeprefix(_MODE) for key in modes] or [str(pooling.get("pooling_mode", "mean"))]
    wants = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    wants += [mode for mode in modes if mode not in ("mean", "mean_tokens")]
    if not wants:
        return ()
    return (
        f"the embeddings of {name!r} are not the mean over a text's tokens, by the files that "
        f"sentence-transformers reads ({', '.join(wants)}); askewq trains and judges the mean, and "
        "an artifact has none of these files",
    )


def _read(name: str, file: str, nothing: Any) -> Any:
    """Return the content of a JSON file of a model, `nothing` where it has none."""
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(name, file, **dict.fromkeys(_MISSING, False))
        content = json.loads(Path(found).read_text("utf-8")) if found else nothing
    except (OSError, ValueError):
        return nothing
    return content if isinstance(content, type(nothing)) else nothing


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
