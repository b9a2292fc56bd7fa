"""Digests of an artifact: the bytes that were written, or an error. docs/format.md, "Digests".

A digest finds what happens by accident: a flipped bit, a half copied file, a label edited by hand.
Who changes a file on purpose can compute it anew.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from askewq.errors import FormatError

# Stands in the manifest where its digest will be, when the digest is computed.
UNSEALED = "0" * 64

_entry_text = json.JSONEncoder(separators=(",", ":")).encode

# The names of types in the header of a safetensors file.
TYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def of_weights(manifest: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the digest of a packed file.

    Args:
        manifest: its text, with `UNSEALED` in the place of the digest.
        tensors: all of the file's.

    Raises:
        FormatError: a tensor of a type that the format does not have.
    """
    digest = hashlib.sha256(manifest.encode() + b"\n")
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        if tensor.dtype not in TYPES:
            raise FormatError(f"{name!r} is {tensor.dtype}, which the format does not have.")
        entry = [name, TYPES[tensor.dtype], list(tensor.shape)]
        digest.update(_entry_text(entry).encode() + b"\n")
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # a buffer
    return digest.hexdigest()


def seal(manifest: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the text of a manifest with the digest of itself and all tensors in it."""
    text = json.dumps({**manifest, "digest": UNSEALED}, sort_keys=True, separators=(",", ":"))
    return text.replace(UNSEALED, of_weights(text, tensors))


def check_seal(manifest: str, claimed: Any, tensors: Mapping[str, Tensor]) -> None:
    """Check the digest of a packed file.

    Args:
        manifest: its text.
        claimed: the digest in it.
        tensors: all of the file's.

    Raises:
        FormatError: another digest, or none.
    """
    if not isinstance(claimed, str) or len(claimed) != 64 or manifest.count(claimed) != 1:
        raise FormatError(f"the manifest's digest {claimed!r} is none.")
    found = of_weights(manifest.replace(claimed, UNSEALED), tensors)
    if found != claimed:
        raise FormatError(
            f"its content does not have the digest that it was written with ({found[:12]}..., not "
            f"{claimed[:12]}...): the file was damaged or changed. Copy or make it again."
        )


def of_config(content: Mapping[str, Any]) -> str:
    """Return the digest of a config.json: of everything in it that decides what is loaded."""
    text = json.dumps(dict(content), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
