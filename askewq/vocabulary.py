"""The words that settings are made of, for files that must not wait for torch."""

from typing import Literal

# In an artifact's config.json, where transformers looks for the kind of network.
MODEL_TYPE = "askewq"

Bits = Literal[1, 2, 3, 4, 5, 6, 7, 8, "ternary"]
ActBits = Literal[1, 2, 3, 4, 5, 6, 7, 8, "none"]
GridKind = Literal["auto", "integer", "half-integer"]
GroupSize = int | Literal["channel", "tensor"]
Closing = Literal["lazy", "staggered", "single"]
Method = Literal[
    "askewsgd",
    "askewsgd-paper",
    "binaryconnect",
    "lsq",
    "proxquant",
    "binaryrelax",
    "luq",
    "adaste",
    "mirror-descent",
    "projected-gradient",
]
Pull = Literal["decoupled", "coupled"]
Task = Literal[
    "image-classification",
    "text-classification",
    "causal-lm",
    "feature-extraction",
    "image-feature-extraction",
]
IMAGE_TASKS: tuple[Task, ...] = ("image-classification", "image-feature-extraction")
# Tasks without labels: an encoder's outputs are embeddings, and a teacher's stand for labels.
EMBEDDING_TASKS: tuple[Task, ...] = ("feature-extraction", "image-feature-extraction")
# How the states of a text's tokens become its embedding, as sentence-transformers calls it.
Pooling = Literal["mean", "cls", "lasttoken"]
Augmentation = Literal["none", "crop", "flip", "crop-flip"]
DenseType = Literal["fp32", "fp16", "bf16"]
Estimate = Literal["measured", "estimated"]
