"""Export to compressed-tensors' `pack-quantized`, which transformers and vLLM load.

Codes and scales go over as they are, never rounded again: what its loader unpacks is, bit for bit,
the artifact's weight.
"""

import copy
import re
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from askewq import sentence_files
from askewq.grid import Grid
from askewq.manifest import PackedInput, PackedWeight
from askewq.mixed import original_class
from askewq.pack import pack, unpack
from askewq.target import ExportSource, Options, Target
from askewq.text import markdown
from askewq.wording import bits_name

WEIGHTS = "model.safetensors"
WIDEST = 8
# Codes that fill whole 32-bit words at every width.
BLOCK = 32
# Before 0.17 compressed-tensors packs 4 and 8 bits only, before 0.18 it pads 3, 5, 6 and 7 bits.
NEEDED_VERSION = (0, 18)


@dataclass(frozen=True, slots=True)
class Coding:
    """How a grid is written: signed integers of `bits`, `factor` times the grid's levels."""

    bits: int
    factor: int


def coding(grid: Grid) -> Coding:
    """Return the narrowest signed integers that hold a grid exactly.

    Half-integers are doubled, and their scale halved; both are exact.
    """
    factor = 1 if grid.first % 1 == 0 else 2
    first, last = int(grid.first * factor), int(grid.highest * factor)
    bits = 1
    while not -(2 ** (bits - 1)) <= first <= last < 2 ** (bits - 1):
        bits += 1
    return Coding(bits, factor)


def packed_tensors(weight: PackedWeight) -> dict[str, Tensor]:
    """Return the tensors of a weight [out, in] as the format names them.

    Returns:
        ``weight_packed`` int32 [out, words], each row by itself, the first code in the lowest bits;
        ``weight_scale`` float32 [out, groups]; ``weight_shape`` int64 [2].
    """
    grid, code = weight.grid, coding(weight.grid)
    rows, columns = weight.shape
    codes = unpack(weight.codes, grid.bits, rows * columns).reshape(rows, columns)
    offset = grid.first * code.factor + 2 ** (code.bits - 1)
    unsigned = (codes.to(torch.int16) * int(grid.step * code.factor) + int(offset)).to(torch.uint8)
    padded = nn.functional.pad(unsigned, (0, -columns % BLOCK))
    words = pack(padded, cast(Any, code.bits)).view(torch.int32).reshape(rows, -1)
    return {
        "weight_packed": words[:, : -(-columns * code.bits // 32)].contiguous(),
        "weight_scale": (weight.scale / code.factor).expand(rows, -1).contiguous(),
        "weight_shape": torch.tensor([rows, columns]),
    }


def _module(weight: str) -> str:
    return weight.rpartition(".")[0]


def _reason(source: ExportSource, name: str, weight: PackedWeight) -> str:
    """Return why the format cannot hold a weight, or an empty string."""
    layer, code = source.loaded.model.get_submodule(_module(name)), coding(weight.grid)
    if not isinstance(layer, nn.Linear):
        # The format holds Embedding too, but transformers (5.23) fails to initialise a packed one.
        kind = original_class(layer).__name__
        article = "an" if kind[0] in "AEIOU" else "a"
        return f"is {article} {kind}, and transformers unpacks Linear only"
    if shared := [other for other, first in source.artifact.shared.items() if first == name]:
        return f"is shared with {', '.join(map(_module, shared))}, and only dense weights can be"
    if code.bits > WIDEST:
        return f"needs {code.bits} bits for its half-integers, and the format holds {WIDEST}"
    if not torch.equal(weight.scale / code.factor * code.factor, weight.scale):
        return "has scales so small that half of one is no float32 number"
    return ""


def _left_dense(source: ExportSource) -> dict[str, str]:
    """Return the quantized weights that the format cannot hold, each with the reason."""
    reasons = {name: _reason(source, name, w) for name, w in source.artifact.weights.items()}
    return {name: reason for name, reason in reasons.items() if reason}


def _packed(source: ExportSource) -> dict[str, PackedWeight]:
    """Return the quantized weights that the format holds."""
    dense = _left_dense(source)
    return {name: w for name, w in source.artifact.weights.items() if name not in dense}


def _unwritable_inputs(source: ExportSource) -> list[str]:
    """Return why rounded inputs cannot be written; a float input in their place would be wrong."""
    dense, found = _left_dense(source), []
    for name, rounded in source.artifact.inputs.items():
        weight = f"{name}.weight"
        stored = source.artifact.shared.get(weight, weight)  # a tied head's is the embedding's
        if reason := _reason_of_input(rounded, dense.get(stored, "")):
            found.append(f"the input of {name} {reason}.")
    if found:
        found.append("use --to onnx, fine-tune with --act-bits none, or --exclude these layers.")
    return found


def _reason_of_input(rounded: PackedInput, left_dense: str) -> str:
    grid = rounded.grid
    if left_dense:
        return f"is rounded, but the layer cannot be packed: it {left_dense}"
    if grid.first == 0:
        return f"is rounded to 0 .. {grid.last}, and the format's integers have a sign"
    return "is rounded to its sign, and the format has no such levels" if grid.step == 2 else ""


def _refusals(source: ExportSource, options: Options) -> list[str]:
    spec = source.loaded.spec
    if spec.source != "transformers":
        return [
            f"{source.title} is from {spec.source}, and only transformers loads this format; use "
            "--to dense or --to onnx."
        ]
    installed = version("compressed-tensors")
    if tuple(int(part) for part in re.findall(r"\d+", installed)[:2]) < NEEDED_VERSION:
        return [
            f"compressed-tensors {installed} is installed, and 2- to 8-bit weights need "
            f"{'.'.join(map(str, NEEDED_VERSION))}: pip install 'askewq[compressed-tensors]'."
        ]
    if unwritable := _unwritable_inputs(source):
        return unwritable
    dense = [f"{_module(name)} {reason}." for name, reason in _left_dense(source).items()]
    if not _packed(source):
        return [*dense, "nothing is left to be packed: use --to dense or --to onnx."]
    if dense and not options.dense_rest:
        return [*dense, "--dense-rest writes these as ordinary weights."]
    return []


def _notes(source: ExportSource, options: Options) -> list[str]:
    notes = [
        f"{_module(name)} {reason}: it is written dense in float32."
        for name, reason in _left_dense(source).items()
    ]
    packed = _packed(source).values()
    for grid, count in Counter(weight.grid for weight in packed).items():
        code = coding(grid)
        if grid.storage_bits != code.bits:
            kind = f"{bits_name(grid.bits)}{', half-integer' if code.factor == 2 else ''}"
            notes.append(
                f"{kind} ({_layers(count)}): written in {code.bits} bits, the narrowest integers "
                "that hold the levels exactly."
            )
    repeated = sum(weight.scale.shape[0] < weight.shape[0] for weight in packed)
    if repeated:
        notes.append(f"one scale for a whole weight ({_layers(repeated)}): repeated per channel.")
    return notes


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def _write(source: ExportSource, options: Options, folder: Path) -> None:
    model, artifact = cast(Any, source.loaded.model), source.artifact
    tensors = dict(artifact.tensors)
    tensors |= {name: artifact.weights[name].dense() for name in _left_dense(source)}
    for name, weight in _packed(source).items():
        for leaf, tensor in packed_tensors(weight).items():
            tensors[f"{_module(name)}.{leaf}"] = tensor
    for name, rounded in artifact.inputs.items():
        tensors[f"{name}.input_scale"] = rounded.scale.reshape(1)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    model_config = copy.deepcopy(model.config)
    model_config.architectures = [type(model).__name__]
    model_config.dtype = torch.float32
    model_config.quantization_config = _quantization_config(source)
    model_config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    source.loaded.preprocessing.save(folder)
    sentence_files.write(source.loaded.beside, folder)
    (folder / "README.md").write_text(_readme(source), encoding="utf-8")


def _quantization_config(source: ExportSource) -> dict[str, Any]:
    """Return the format's own description: one group of modules for each kind of weight."""
    model, packed = source.loaded.model, _packed(source)
    prefix = str(getattr(model, "base_model_prefix", ""))
    groups: dict[tuple[int, int | None, int | None], list[str]] = {}
    for name, weight in packed.items():
        count = weight.scale.shape[1]
        size = weight.shape[1] // count if count > 1 else None
        rounded = source.artifact.inputs.get(_module(name))
        key = coding(weight.grid).bits, size, coding(rounded.grid).bits if rounded else None
        groups.setdefault(key, []).append(_pattern(_module(name), prefix))
    ignored = [
        _pattern(name, prefix)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and f"{name}.weight" not in packed
    ]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ignored,
        "config_groups": {
            f"group_{i}": _group(*kind, targets) for i, (kind, targets) in enumerate(groups.items())
        },
    }


def _group(bits: int, size: int | None, act_bits: int | None, targets: list[str]) -> dict[str, Any]:
    kind = {"type": "int", "symmetric": True, "dynamic": False}
    strategy = "channel" if size is None else "group"
    return {
        "targets": targets,
        "format": "pack-quantized",
        "input_activations": {"num_bits": act_bits, "strategy": "tensor", **kind}
        if act_bits
        else None,
        "output_activations": None,
        "weights": {"num_bits": bits, "strategy": strategy, "group_size": size, **kind},
    }


def _pattern(module: str, prefix: str) -> str:
    """Return a target that names a module in the model and in its base model (AutoModel)."""
    base = module.removeprefix(f"{prefix}.")
    if base == module or not prefix:
        return module
    return rf"re:^({re.escape(prefix)}\.)?{re.escape(base)}$"


def _readme(source: ExportSource) -> str:
    name = type(source.loaded.model).__name__
    return f"""# {markdown(source.title)}, weights packed by compressed-tensors

Written by `askewq export --to compressed-tensors`; askewq is not needed to load it, but
compressed-tensors {".".join(map(str, NEEDED_VERSION))} or newer is.

```python
from transformers import {name}
model = {name}.from_pretrained("FOLDER")
```

The weights stay packed until the first forward pass. export.json holds the measured difference
from the packed artifact, and what is written otherwise than it has it.
"""


def read_back(folder: str, inputs: dict[str, Tensor]) -> Tensor:
    """Return its logits, or embeddings, by transformers with compressed-tensors."""
    import json
    from pathlib import Path

    import transformers

    facts = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    kind = getattr(transformers, facts["architectures"][0])
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"]:
        raise KeyError(f"missing or unexpected keys: {info}")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # memory of a file is not aligned as torch's is
    model.eval()
    made = model(**inputs)
    if "logits" in made:
        return made.logits
    if "pixel_values" in inputs:
        return made.pooler_output.flatten(1)
    return made.last_hidden_state  # pooled where it is compared


TARGET = Target(
    name="compressed-tensors",
    needs=("compressed_tensors",),
    extra="compressed-tensors",
    bound=lambda options: 0.0,
    refusals=_refusals,
    notes=_notes,
    write=_write,
    read_back=read_back,
)
