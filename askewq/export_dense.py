"""Export to ordinary safetensors: snapped weights, for timm, transformers or load_state_dict.

In fp32 every tensor is, bit for bit, the artifact's; in fp16 and bf16 it is that, rounded once.
"""

import copy
import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from askewq import sentence_files
from askewq.preprocessing import ImagePreprocessing
from askewq.spec import CONFIG
from askewq.target import ExportSource, Options, Target, rounded_inputs
from askewq.text import markdown
from askewq.vocabulary import DenseType

WEIGHTS = "model.safetensors"
DTYPES: dict[DenseType, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
# Relative difference of logits. On networks of a few layers it is at most 2.3e-3 in fp16 and 1.1e-2
# in bf16 (test_resnet, 2 bits); deeper ones need room.
BOUNDS: dict[DenseType, float] = {"fp32": 0.0, "fp16": 2e-2, "bf16": 1e-1}
# What timm needs to know of a network, beside its arguments, to load weights into it.
_TIMM_FACTS = ("classifier", "first_conv", "fixed_input_size")


def _bound(options: Options) -> float:
    return BOUNDS[options.dtype]


def _refusals(source: ExportSource, options: Options) -> list[str]:
    """Name rounded inputs, and the tensors with values beyond the type's range."""
    dtype = DTYPES[options.dtype]
    refused = rounded_inputs(source, "dense")
    if options.dtype == "fp32":
        return refused
    return refused + [
        f"{name} holds values up to {float(tensor.abs().max()):.3g}, beyond the range of "
        f"{options.dtype} ({torch.finfo(dtype).max:.3g}); use --dtype fp32."
        for name, tensor in source.artifact.dense_state().items()
        if tensor.is_floating_point() and bool(_overflows(tensor, dtype).any())
    ]


def _overflows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).isinf() & ~tensor.isinf()


def _notes(source: ExportSource, options: Options) -> list[str]:
    notes = []
    if options.dtype != "fp32":
        notes.append(f"every floating-point value is rounded to {options.dtype}.")
    if source.loaded.spec.source != "transformers":
        notes += [
            f"{name} is stored again, though it is {first}: load_state_dict asks for every name."
            for name, first in source.artifact.shared.items()
        ]
    return notes


def _write(source: ExportSource, options: Options, folder: Path) -> None:
    loaded, dtype = source.loaded, DTYPES[options.dtype]
    if loaded.spec.source == "transformers":
        # save_pretrained writes the weights' type into config.json; the artifact's own network
        # must stay as it is.
        model = cast(Any, loaded.model if options.dtype == "fp32" else copy.deepcopy(loaded.model))
        model.to(dtype).save_pretrained(folder)
        loaded.preprocessing.save(folder)
        sentence_files.write(loaded.beside, folder)
    else:
        save_file(_state(source, dtype), folder / WEIGHTS, {"format": "pt"})
    if loaded.spec.source == "timm":
        text = json.dumps(_timm_config(source), indent=2, ensure_ascii=False)
        (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_readme(source, options), encoding="utf-8")


def _state(source: ExportSource, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the dense state; every name has memory of its own, as safetensors demands."""
    state = source.artifact.dense_state()
    cast_ = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    return {k: v.clone() if k in source.artifact.shared else v for k, v in cast_.items()}


def _timm_config(source: ExportSource) -> dict[str, Any]:
    """Return a config.json as timm reads it from a folder or the Hub."""
    loaded = source.loaded
    arguments = dict(loaded.spec.arguments)
    architecture = str(arguments.pop("model_name")).split(".")[0]
    network = cast(Any, loaded.model)
    images = cast(ImagePreprocessing, loaded.preprocessing)
    known = {key: network.pretrained_cfg.get(key) for key in _TIMM_FACTS}
    input_size = (len(images.mean), *images.size) if images.size else None
    facts = {
        **{key: value for key, value in known.items() if value is not None},
        "num_classes": network.num_classes,
        "input_size": input_size or network.pretrained_cfg["input_size"],
        "mean": images.mean,
        "std": images.std,
        "crop_pct": images.crop_pct,
        "crop_mode": images.crop_mode,
        "interpolation": images.interpolation,
    }
    return {
        "architecture": architecture,
        "num_classes": network.num_classes,
        "label_names": loaded.spec.labels,
        "model_args": arguments,
        "pretrained_cfg": facts,
    }


def _readme(source: ExportSource, options: Options) -> str:
    spec = source.loaded.spec
    names = ", ".join(map(markdown, spec.labels))
    labels = f"\nLabels, in the order of the logits: {names}.\n" if names else ""
    return f"""# {markdown(source.title)}, snapped weights in {options.dtype}

Written by `askewq export --to dense`; askewq is not needed to load it.

```python
{_LOADING[spec.source](source)}
```
{labels}{_input(source)}
export.json holds the measured difference from the packed artifact.
"""


def _input(source: ExportSource) -> str:
    images = source.loaded.preprocessing
    if not isinstance(images, ImagePreprocessing):
        return ""
    size = f"{images.size[0]} x {images.size[1]}" if images.size else "any size"
    return (
        f"\nInput: {size}, values in 0..1 minus {list(images.mean)}, over {list(images.std)} "
        f"({images.interpolation}, crop {images.crop_pct:g} {images.crop_mode}).\n"
    )


def _load_with_timm(source: ExportSource) -> str:
    arguments = dict(source.loaded.spec.arguments)
    words = [repr(str(arguments.pop("model_name")).split(".")[0])]
    words += [f"checkpoint_path='{WEIGHTS}'"]
    words += [f"{key}={value!r}" for key, value in arguments.items()]
    return (
        f"import timm\nmodel = timm.create_model({', '.join(words)}).eval()\n"
        "# or, from its config.json: timm.create_model('local-dir:FOLDER', pretrained=True)"
    )


def _load_with_transformers(source: ExportSource) -> str:
    name = type(source.loaded.model).__name__
    return f"from transformers import {name}\nmodel = {name}.from_pretrained('FOLDER')"


def _load_with_torch(source: ExportSource) -> str:
    return (
        f"from safetensors.torch import load_file\nmodel = ...  # your own network\n"
        f"model.load_state_dict(load_file('{WEIGHTS}'))\nmodel.eval()"
    )


_LOADING = {
    "timm": _load_with_timm,
    "transformers": _load_with_transformers,
    "module": _load_with_torch,
}


def read_back(folder: str, inputs: dict[str, Tensor]) -> Tensor:
    """Return the logits (or embeddings) of the folder's network, by its own library.

    It computes in float32 whatever the type of the file, so that the difference is the file's.
    """
    import importlib.util
    import json
    import os
    import sys
    from pathlib import Path

    import torch
    from safetensors.torch import load_file

    path = Path(folder)
    config = path / "config.json"
    facts = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if "architectures" in facts:
        import transformers

        kind = getattr(transformers, facts["architectures"][0])
        model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        if info["missing_keys"] or info["unexpected_keys"]:
            raise KeyError(f"missing or unexpected keys: {info}")
    elif "architecture" in facts:
        import timm

        weights = str(path / "model.safetensors")
        arguments = facts["model_args"]
        model = timm.create_model(facts["architecture"], checkpoint_path=weights, **arguments)
    else:
        file, _, name = os.environ["ASKEWQ_FACTORY"].rpartition(":")
        sys.path.insert(0, str(Path(file).resolve().parent))
        spec = importlib.util.spec_from_file_location("own_module", file)
        if spec is None or spec.loader is None:
            raise ImportError(f"there is no module {file!r}")
        own = sys.modules["own_module"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(own)
        model = getattr(own, name)().float()
        model.load_state_dict(load_file(path / "model.safetensors"))
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # memory of a file is not aligned as torch's is
    model.eval()
    if "architectures" not in facts:
        return model(inputs["pixel_values"])
    made = model(**inputs)
    if "logits" in made:
        return made.logits
    if "pixel_values" in inputs:
        return made.pooler_output.flatten(1)
    return made.last_hidden_state  # pooled where it is compared


TARGET = Target(
    name="dense",
    needs=(),
    extra="",
    bound=_bound,
    refusals=_refusals,
    notes=_notes,
    write=_write,
    read_back=read_back,
)
