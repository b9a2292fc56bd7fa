"""Pretrained models from timm, Hugging Face or the user's own file, as one LoadedModel.

A ModelSpec holds all that is needed to build the same plain network again, offline. Weights are
never unpickled beyond plain tensors, and no code from the Hub runs unless it was asked for.
"""

import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, get_args

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from askewq.errors import ModelError, near
from askewq.preprocessing import (
    DEFAULT_LENGTH,
    ImagePreprocessing,
    Preprocessing,
    ProcessorPreprocessing,
    TextPreprocessing,
)
from askewq.vocabulary import Task

Source = Literal["timm", "transformers", "module"]

CONFIG = "config.json"

_ARCHITECTURE_SUFFIX: dict[str, Task] = {
    "ForImageClassification": "image-classification",
    "ForSequenceClassification": "text-classification",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
}
_AUTO_CLASS: dict[Task, str] = {
    "image-classification": "AutoModelForImageClassification",
    "text-classification": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
}


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """How to build a plain network, as plain JSON values.

    Attributes:
        source: where the class comes from.
        name: as the user gave it.
        task: what it is trained for.
        labels: class names, in the order of the logits; empty for causal-lm.
        arguments: timm: architecture and keyword arguments of create_model; transformers: the
            config; module: nothing, its file is not stored.
    """

    source: Source
    name: str
    task: Task
    labels: tuple[str, ...]
    arguments: dict[str, Any]


@dataclass(slots=True)
class LoadedModel:
    """A float32 network, how to build it again, and how its inputs are prepared."""

    model: nn.Module
    spec: ModelSpec
    preprocessing: Preprocessing
    notes: tuple[str, ...] = ()

    def rebuild(self) -> nn.Module:
        """Return a fresh plain network of the same kind, weights arbitrary."""
        return build(self.spec)


def find_source(name: str) -> Source:
    """Tell where a model of this name comes from.

    Raises:
        ModelError: a file or a folder that is not there.
    """
    import timm

    file, _, factory = name.rpartition(":")
    if file.endswith(".py") or name.endswith(".py"):
        if not Path(file).is_file() or not factory:
            raise ModelError(
                f"--model {name!r}: there is no file {file or name!r}, or no function named; a "
                "model of your own is given as path/to/file.py:factory."
            )
        return "module"
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) or timm.is_model(name.split(".")[0]):
        return "timm"
    if Path(name).is_dir() or name.startswith((".", "/", "~")):
        if not (Path(name) / CONFIG).is_file():
            raise ModelError(f"--model {name!r}: the folder has no {CONFIG} (or does not exist).")
        return "transformers"
    return "transformers"


def guess_task(name: str, source: Source, *, trust_remote_code: bool = False) -> Task:
    """Return the task of a model where it can be told safely.

    Raises:
        ModelError: a Hugging Face model without a head that says it.
    """
    if source != "transformers":
        return "image-classification"
    config = _hf_config(name, trust_remote_code)
    for architecture in config.architectures or []:
        for suffix, task in _ARCHITECTURE_SUFFIX.items():
            if architecture.endswith(suffix):
                return task
    raise ModelError(
        f"the task of {name!r} cannot be guessed from its architecture "
        f"{config.architectures or 'none'}; pass --task, one of {', '.join(get_args(Task))}."
    )


def load(
    name: str,
    task: Task,
    labels: tuple[str, ...] = (),
    *,
    source: Source | None = None,
    pretrained: bool = True,
    weights: Path | None = None,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
    image_size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    max_length: int | None = None,
) -> LoadedModel:
    """Load a model for a task with these labels, in float32.

    Args:
        labels: class names; where the pretrained head has another number of classes, a new head
            is made (timm, transformers; said in `notes`). Ignored for causal-lm.
        image_size, mean, std, max_length: override the model's own preprocessing.

    Raises:
        ModelError: unknown name, Hub out of reach, weights that do not fit.
    """
    source = source or find_source(name)
    if source == "timm":
        if task != "image-classification":
            raise ModelError(f"--task {task} does not go with the timm model {name!r}.")
        loaded = _load_timm(name, labels, pretrained and weights is None, image_size)
    elif source == "module":
        spec = ModelSpec("module", name, task, labels, {})
        loaded = LoadedModel(build(spec), spec, ImagePreprocessing())
    else:
        if weights is not None:
            raise ModelError(
                "--weights goes with timm models and modules of your own; for a Hugging Face model "
                "pass the folder that holds config.json and the weights as --model."
            )
        loaded = _load_transformers(name, task, labels, pretrained, trust_remote_code)
    if task != "image-classification":
        loaded.preprocessing = load_tokenizer(tokenizer or name, trust_remote_code, max_length)
    if isinstance(loaded.preprocessing, ImagePreprocessing):
        loaded.preprocessing = loaded.preprocessing.override(image_size, mean, std)
    elif image_size or mean or std:
        raise ModelError(
            f"--image-size, --mean and --std do not go with {name!r}, whose own tokenizer or image "
            "processor prepares its input; change the files beside the model instead."
        )
    if weights is not None:
        _load_state(loaded.model, weights)
    loaded.model.float()
    return loaded


def build(spec: ModelSpec) -> nn.Module:
    """Return the plain network of a spec with arbitrary weights, float32.

    Raises:
        ModelError: a module of the user's whose file is not there, or that fails.
    """
    if spec.source == "timm":
        import timm

        return timm.create_model(**spec.arguments, pretrained=False)
    if spec.source == "module":
        return _call_factory(spec.name)
    import transformers

    arguments = dict(spec.arguments)
    config = transformers.AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    auto = getattr(transformers, _AUTO_CLASS[spec.task])
    return auto.from_config(config).float()  # type: ignore[no-any-return]


def load_bare(
    name: str,
    source: Source,
    task: Task,
    *,
    trust_remote_code: bool = False,
    image_size: int | None = None,
) -> nn.Module:
    """Return the network of a name with arbitrary weights: no weights, tokenizer or data needed.

    Raises:
        ModelError: unknown name, or a config that the Hub should give and does not.
    """
    if source == "timm":
        return _load_timm(name, (), False, image_size).model
    if source == "module":
        return _call_factory(name)
    import transformers

    auto = getattr(transformers, _AUTO_CLASS[task])
    config = _hf_config(name, trust_remote_code)
    return auto.from_config(config, trust_remote_code=trust_remote_code)  # type: ignore[no-any-return]


def check_arguments(spec: ModelSpec) -> None:
    """Check that building a spec reads no file and no Hub: it may come from a stranger's artifact.

    Raises:
        ModelError: arguments that do more than describe a network.
    """
    if spec.source != "timm":
        return
    import timm

    name = str(spec.arguments.get("model_name"))
    loading = set(inspect.signature(timm.create_model).parameters) - {"model_name", "kwargs"}
    if not timm.is_model(name.split(".")[0]) or loading & set(spec.arguments):
        raise ModelError(f"the arguments {spec.arguments} do not only describe a timm network.")


def _load_timm(
    name: str, labels: tuple[str, ...], pretrained: bool, image_size: int | None
) -> LoadedModel:
    from timm.data.config import resolve_data_config

    arguments, cfg = _timm_arguments(name)
    notes = []
    default_classes = cfg.get("num_classes")
    if labels:
        arguments["num_classes"] = len(labels)
        if pretrained and default_classes != len(labels):
            notes.append(
                f"the head for {default_classes} classes was replaced by one for {len(labels)}"
            )
    try:
        model, arguments = _create_timm(name, arguments, pretrained, image_size)
    except (OSError, RuntimeError) as error:
        raise ModelError(_unreachable(name, error)) from error
    data = resolve_data_config({}, model=model)
    preprocessing = ImagePreprocessing(
        size=tuple(data["input_size"][1:]) if image_size is None else (image_size, image_size),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        crop_pct=data["crop_pct"],
        interpolation=data["interpolation"],
        crop_mode=data["crop_mode"],
    )
    spec = ModelSpec("timm", name, "image-classification", labels, arguments)
    return LoadedModel(model, spec, preprocessing, tuple(notes))


def _timm_arguments(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what rebuilds a timm model without the Hub, and its pretrained configuration."""
    import timm
    from timm.models import load_model_config_from_hf, parse_model_name

    source, identifier = parse_model_name(name)
    if not source:
        cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
        return {"model_name": name}, {} if cfg is None else cfg.to_dict()
    try:
        if source == "local-dir":
            content = json.loads((Path(identifier) / CONFIG).read_text(encoding="utf-8"))
            cfg = content.get("pretrained_cfg", content)
            architecture, extra = content["architecture"], content.get("model_args", {})
        else:
            cfg, architecture, extra = load_model_config_from_hf(identifier)
    except (OSError, KeyError, ValueError) as error:
        raise ModelError(_unreachable(name, error)) from error
    return {"model_name": architecture, **(extra or {})}, cfg


def _create_timm(
    name: str, arguments: dict[str, Any], pretrained: bool, image_size: int | None
) -> tuple[nn.Module, dict[str, Any]]:
    """Create a timm model, telling it the image size where its class depends on one."""
    import timm

    arguments = {**arguments, "num_classes": arguments.get("num_classes")}
    arguments = {key: value for key, value in arguments.items() if value is not None}
    if image_size is not None:
        sized = {**arguments, "img_size": image_size}
        try:
            return timm.create_model(**{**sized, "model_name": name}, pretrained=pretrained), sized
        except TypeError:
            pass  # a network that takes images of any size has no such argument
    return timm.create_model(**{**arguments, "model_name": name}, pretrained=pretrained), arguments


def _load_transformers(
    name: str,
    task: Task,
    labels: tuple[str, ...],
    pretrained: bool,
    trust_remote_code: bool,
) -> LoadedModel:
    import transformers

    config = _hf_config(name, trust_remote_code)
    notes: list[str] = []
    mismatched = False
    if labels and task != "causal-lm":
        mismatched = config.num_labels != len(labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
    auto = getattr(transformers, _AUTO_CLASS[task])
    try:
        if pretrained:
            model, info = auto.from_pretrained(
                name,
                config=config,
                dtype=torch.float32,
                ignore_mismatched_sizes=mismatched,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
            )
            new = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
            if new:
                notes.append(f"new, without pretrained weights: {', '.join(new[:6])}")
        else:
            model = auto.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise ModelError(_unreachable(name, error)) from error
    preprocessing: Preprocessing = ImagePreprocessing()
    if task == "image-classification":
        preprocessing = load_processor(name, trust_remote_code)
    spec = ModelSpec("transformers", name, task, labels, _json(model.config.to_dict()))
    return LoadedModel(model, spec, preprocessing, tuple(notes))


def load_processor(name: str, trust_remote_code: bool) -> ProcessorPreprocessing:
    """Return the image processor of a Hugging Face id or folder.

    Raises:
        ModelError: there is none.
    """
    import transformers

    try:
        return ProcessorPreprocessing(
            transformers.AutoImageProcessor.from_pretrained(
                name, trust_remote_code=trust_remote_code
            )
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"there is no image processor in {name!r} ({_first_line(error)}); put the model's "
            "preprocessor_config.json beside its weights."
        ) from error


def _json(value: dict[str, Any]) -> dict[str, Any]:
    """Return a config as plain JSON values, as it will be read back."""
    return json.loads(json.dumps(value, default=str))  # type: ignore[no-any-return]


def _hf_config(name: str, trust_remote_code: bool) -> Any:
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_unreachable(name, error)) from error


def load_tokenizer(
    name: str, trust_remote_code: bool, max_length: int | None = None
) -> TextPreprocessing:
    """Return the tokenizer of a Hugging Face id or folder, with its own limit by default.

    Raises:
        ModelError: there is none.
    """
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            name, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"there is no tokenizer in {name!r} ({_first_line(error)}); pass --tokenizer with a "
            "Hugging Face id or folder."
        ) from error
    # Where the files are missing transformers may return a tokenizer of special tokens alone.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ModelError(
            f"the tokenizer in {name!r} is empty: its files are missing; pass --tokenizer with a "
            "Hugging Face id or folder."
        )
    limit = max_length or min(tokenizer.model_max_length, DEFAULT_LENGTH)
    return TextPreprocessing(tokenizer, limit)


def _unreachable(name: str, error: Exception) -> str:
    import timm

    known = timm.is_model(name.split(".")[0])
    what = (
        "Its pretrained weights could not be fetched."
        if known
        else f"It is no timm name{near(name, timm.list_models())}, and no Hugging Face model was "
        "found under it."
    )
    return (
        f"the model {name!r} cannot be loaded: {_first_line(error)}\n{what} Pass a timm name with "
        "--no-pretrained or --weights FILE.safetensors, a local Hugging Face folder, or "
        "path/to/file.py:factory; if the Hub is out of reach, a folder works offline."
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]


def _call_factory(name: str) -> nn.Module:
    """Import path/to/file.py and return what its factory builds."""
    file, _, factory_name = name.rpartition(":")
    path = Path(file).resolve()
    spec = importlib.util.spec_from_file_location(f"askewq_user_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ModelError(f"there is no file {file!r} to take {factory_name!r} from.")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
        factory = _get_factory(vars(module), factory_name, file)
        model = factory()
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{name} failed: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent))
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} returned a {type(model).__name__}, not a torch.nn.Module.")
    return model.float()


def _get_factory(names: Mapping[str, Any], wanted: str, file: str) -> Callable[[], Any]:
    factories = [name for name, value in names.items() if callable(value) and name[0] != "_"]
    if wanted not in factories:
        raise ModelError(
            f"{file} has no function {wanted!r}{near(wanted, factories)}; it has: "
            f"{', '.join(factories) or 'none'}."
        )
    return names[wanted]  # type: ignore[no-any-return]


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict from safetensors, or from a pickle that holds nothing but tensors.

    Raises:
        ModelError: unreadable, or a pickle with anything else in it.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the weights {path} cannot be read: {_first_line(error)}") from error
    except Exception as error:  # unpickling fails in as many ways as there are damaged files
        raise ModelError(
            f"the weights {path} are a pickle that holds more than tensors, or are damaged, and "
            f"were not loaded ({_first_line(error)}); convert them to safetensors."
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ModelError(f"the weights {path} are not a mapping of names to tensors.")
    return state


def _load_state(model: nn.Module, path: Path) -> None:
    state, target = read_state(path), model.state_dict()
    missing = [key for key in target if key not in state]
    extra = [key for key in state if key not in target]
    # BatchNorm's step counter is new in old checkpoints and decides nothing in the forward pass.
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if missing or extra:
        hint = near(extra[0], missing) if extra and missing else ""
        raise ModelError(
            f"the weights {path} do not fit the model: {len(missing)} keys are missing "
            f"({', '.join(missing[:5]) or 'none'}), {len(extra)} are unknown "
            f"({', '.join(extra[:5]) or 'none'}){hint}."
        )
    for key, tensor in state.items():
        if tensor.shape != target[key].shape:
            raise ModelError(
                f"the weights {path} do not fit the model: {key!r} is {list(tensor.shape)} there "
                f"and {list(target[key].shape)} in the model (another number of labels, perhaps)."
            )
    model.load_state_dict(state, strict=False)
