"""Hugging Face models: weights, config, tokenizer and image processor, from the Hub or a folder."""

import json
import math
import sys
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import nn

from askewq.errors import ModelError
from askewq.preprocessing import (
    DEFAULT_LENGTH,
    ImagePreprocessing,
    Preprocessing,
    ProcessorPreprocessing,
    TextPreprocessing,
)
from askewq.spec import LoadedModel, ModelSpec, first_line, in_order_of, renamed, unreachable
from askewq.trust import check_index
from askewq.vocabulary import EMBEDDING_TASKS, IMAGE_TASKS, MODEL_TYPE, Task

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
    "feature-extraction": "AutoModel",
    "image-feature-extraction": "AutoModel",
}
_OTHER_TOKENIZER = "pass --tokenizer with a Hugging Face id or folder"


def auto_class(task: Task) -> Any:
    """Return the class of transformers that loads models for a task."""
    import transformers

    return getattr(transformers, auto_class_name(task))


def auto_class_name(task: Task) -> str:
    """Return the name of that class."""
    return _AUTO_CLASS[task]


def guess_hf_task(name: str, trust_remote_code: bool) -> Task:
    """Return the task that a model's head says.

    Raises:
        ModelError: it has no head.
    """
    config = hf_config(name, trust_remote_code)
    for architecture in config.architectures or []:
        for suffix, task in _ARCHITECTURE_SUFFIX.items():
            if architecture.endswith(suffix):
                return task
    raise ModelError(
        f"the task of {name!r} cannot be guessed from its architecture "
        f"{config.architectures or 'none'}; pass --task, one of {', '.join(get_args(Task))}."
    )


def load_transformers(
    name: str,
    task: Task,
    labels: tuple[str, ...],
    pretrained: bool,
    trust_remote_code: bool,
) -> LoadedModel:
    """Load a Hugging Face model, with a head for these labels where there are any.

    A head that has been trained for the same labels, but for their case, in another order keeps
    its order; the labels are written as the data have them.
    Its preprocessing is the image processor; text tasks get their tokenizer by `load_tokenizer`.
    """
    if Path(name).is_dir():
        check_index(Path(name))
    config = hf_config(name, trust_remote_code)
    config.dtype = torch.float32  # as it is trained, whatever it was published in
    notes: list[str] = []
    mismatched = False
    own = tuple(str(label) for _, label in sorted((config.id2label or {}).items()))
    if labels and task != "causal-lm":
        mismatched = config.num_labels != len(labels)
        labels = in_order_of(own, labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
        if config.problem_type is not None:  # it is trained for one of these
            config.problem_type = "single_label_classification"
    auto = auto_class(task)
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
            if task == "feature-extraction":  # the embedding is made before the pooler
                new = [key for key in new if not key.startswith("pooler.")]
            if task in EMBEDDING_TASKS and new:
                raise ModelError(
                    f"{name!r} has no weights for {', '.join(new[:6])}, so that its embeddings "
                    "would be random; use a checkpoint that has them, or, where it is the pooler "
                    "of an encoder of images, timm's model of the same name."
                )
            if new:
                notes.append(f"new, without pretrained weights: {', '.join(new[:6])}")
        else:
            model = auto.from_config(config, trust_remote_code=trust_remote_code)
    except ModelError:
        raise
    except Exception as error:  # a config can be wrong in every way, and a file damaged
        raise unreachable(name, error) from error
    taken = "pixel_values" if task in IMAGE_TASKS else "input_ids"
    if task in EMBEDDING_TASKS and model.main_input_name != taken:
        raise ModelError(
            f"--task {task} is for encoders that take {taken}, and {name!r} takes "
            f"{model.main_input_name}; use another model, or another --task."
        )
    preprocessing: Preprocessing = ImagePreprocessing()
    if task in IMAGE_TASKS:
        preprocessing = load_processor(name, trust_remote_code)
    spec = ModelSpec("transformers", name, task, labels, plain_json(model.config.to_dict()))
    doubts = renamed(name, own, labels) if labels and not notes else ()
    return LoadedModel(model, spec, preprocessing, tuple(notes), doubts)


def build_transformers(spec: ModelSpec) -> nn.Module:
    """Return the network that a spec describes, weights arbitrary, float32."""
    import transformers

    arguments = dict(spec.arguments)
    config = transformers.AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    auto = auto_class(spec.task)
    return cast(nn.Module, auto.from_config(config, trust_remote_code=False).float())


def is_transformers(model: nn.Module) -> bool:
    """Tell whether a network is one of transformers, which is not imported to find out."""
    library = sys.modules.get("transformers")
    return library is not None and isinstance(model, library.PreTrainedModel)


def cast_(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast a model to a type, in place, as `from_pretrained(dtype=...)` does.

    Buffers that no file holds, such as rotary frequencies, stay as they are.
    """
    computed = [
        (module, name, module._buffers[name])
        for module in model.modules()
        for name in module._non_persistent_buffers_set
    ]
    model.to(dtype)
    for module, name, buffer in computed:
        module._buffers[name] = buffer


def load_processor(name: str, trust_remote_code: bool) -> ProcessorPreprocessing:
    """Return the image processor of a Hugging Face id or folder.

    Raises:
        ModelError: there is none.
    """
    advice = "put the model's preprocessor_config.json beside its weights"
    loaded = _part("AutoImageProcessor", "image processor", name, trust_remote_code, advice)
    return ProcessorPreprocessing(loaded)


def load_tokenizer(
    name: str, trust_remote_code: bool, max_length: int | None = None, positions: int | None = None
) -> TextPreprocessing:
    """Return the tokenizer of a Hugging Face id or folder.

    Args:
        max_length: tokens of a text; by default as many as tokenizer and model know, at most 512.
        positions: how many the model knows; None: it does not say.

    Raises:
        ModelError: there is none.
    """
    tokenizer = _part("AutoTokenizer", "tokenizer", name, trust_remote_code, _OTHER_TOKENIZER)
    # Where the files are missing transformers may return a tokenizer of special tokens alone.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ModelError(
            f"the tokenizer in {name!r} is empty: its files are missing; {_OTHER_TOKENIZER}."
        )
    limit = max_length or min(tokenizer.model_max_length, DEFAULT_LENGTH, positions or math.inf)
    return TextPreprocessing(tokenizer, limit)


def follow_padding(loaded: LoadedModel, token: int | None) -> None:
    """Tell a decoder that classifies texts which token fills batches; it judges the last other one.

    Encoders are told by the mask, and some count positions from their own padding.
    """
    import transformers

    config: Any = loaded.model.config
    kind = type(config)
    decodes = kind in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if token is not None and decodes and kind not in transformers.MODEL_FOR_MASKED_LM_MAPPING:
        config.pad_token_id = token
        loaded.spec.arguments["pad_token_id"] = token


def _part(auto: str, what: str, name: str, trust_remote_code: bool, advice: str) -> Any:
    """Return what goes with a model: its tokenizer or image processor."""
    import transformers

    try:
        return getattr(transformers, auto).from_pretrained(
            name, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # damaged files fail in every way
        raise ModelError(
            f"there is no usable {what} in {name!r} ({first_line(error)}); {advice}."
        ) from error


def plain_json(value: dict[str, Any]) -> dict[str, Any]:
    """Return a config as plain JSON values, as it will be read back."""
    return json.loads(json.dumps(value, default=str))  # type: ignore[no-any-return]


def hf_config(name: str, trust_remote_code: bool) -> Any:
    """Return the config of a Hugging Face id or folder.

    Raises:
        ModelError: there is none, or that of an artifact or of a model that is quantized.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise unreachable(name, error) from error
    if _quant_method(config) == MODEL_TYPE:
        raise ModelError(
            f"{name!r} is an artifact of askewq, the end of a run; pass the model that it was made "
            "of, or what `askewq export --to dense` makes of it."
        )
    if method := _quant_method(config):
        raise ModelError(
            f"{name!r} is quantized already, by {method}; pass the full-precision model that it "
            "was made of."
        )
    if config.model_type == "timm_wrapper":
        own = f"local-dir:{name}" if Path(name).is_dir() else f"hf-hub:{name}"
        raise ModelError(f"{name!r} is a network of timm: pass {own}, for it is loaded by timm.")
    return config


def _quant_method(config: Any) -> Any:
    """Return how the weights of a config's model are packed; None: they are not."""
    facts = getattr(config, "quantization_config", None) or {}
    return facts.get("quant_method") if isinstance(facts, dict) else facts.quant_method
