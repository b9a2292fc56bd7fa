"""The GGUF format, for llama.cpp: language models of an architecture that it knows.

Every weight is written in the smallest type of gguf_types.py that holds its grid. GGUF keeps
scales in fp16, so what a file gives back is measured by dequantizing it with the gguf package
before anything is written, and refused where it is not the artifact's to the bit.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from askewq.gguf_tokenizer import add_tokenizer, vocabulary
from askewq.gguf_types import LARGEST, BlockType, choose, encode
from askewq.manifest import PackedWeight
from askewq.spec import LoadedModel
from askewq.target import ExportSource, Options, Target, rounded_inputs

FILE = "model.gguf"
# llama.cpp's names of the architectures of transformers that are written correctly here.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# Relative difference of logits: rope frequencies are rounded once more; scales rounded to fp16.
BOUND, LOSSY_BOUND = 1e-5, 2e-2


@dataclass(frozen=True, slots=True)
class Written:
    """How one weight is written: its type (None: float32), and the largest error of a weight."""

    kind: BlockType | None
    error: float = 0.0


def refusals(source: ExportSource, options: Options) -> list[str]:
    """Return why the model, or some of its weights, cannot be written."""
    if refused := rounded_inputs(source, "gguf"):
        return refused
    if unknown := _unknown_model(source):
        return [unknown]
    unplaced = [key for key, name in _names(source).items() if not name]
    if unplaced:
        return [f"GGUF has no place for {', '.join(unplaced)} in {_architecture(source.loaded)!r}"]
    if options.dense_rest:
        return []
    weights = source.artifact.weights
    measured = {name: _measure(weight) for name, weight in weights.items()}
    homeless: dict[str, list[str]] = defaultdict(list)
    for name, written in measured.items():
        if written.kind is None:
            homeless[_describe(weights[name])].append(name)
    found = [
        f"no GGUF type holds {what}: {_listed(names)}; pass --dense-rest to write them as float32"
        for what, names in homeless.items()
    ]
    rounded = {name: written.error for name, written in measured.items() if written.error > 0}
    if rounded and not options.allow_lossy:
        worst = max(rounded, key=lambda name: rounded[name])
        found.append(
            "fp16, in which GGUF keeps scales, does not hold those of "
            f"{_listed(list(rounded))}: a weight would be off by up to {rounded[worst]:.3g} "
            f"({worst}). Pass --allow-lossy to round the scales, or --dense-rest to write these "
            "weights as float32"
        )
    return found


def _listed(names: list[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def notes(source: ExportSource, options: Options) -> list[str]:
    """Return the type of every weight with its measured error, and what is not carried."""
    kinds: dict[str, list[float]] = defaultdict(list)
    for written in plan(source, options).values():
        kinds[written.kind.name if written.kind else "F32"].append(written.error)
    found = [
        f"{len(errors)} weights as {name}, "
        + (f"largest error of a weight {max(errors):.3g}" if any(errors) else "equal to the bit")
        for name, errors in kinds.items()
    ]
    found.append("everything else is float32")
    if vocabulary(source.loaded) is None:
        found.append(
            "llama.cpp has no such tokenizer as this model's: the file takes and gives token ids; "
            "tokenizer.json lies beside it"
        )
    return [*found, "the file is read back with the gguf package: llama.cpp itself is not run"]


def plan(source: ExportSource, options: Options) -> dict[str, Written]:
    """Return how each quantized weight is written."""
    planned = {}
    for name, weight in source.artifact.weights.items():
        written = _measure(weight)
        lossy = written.error > 0 and not options.allow_lossy
        planned[name] = Written(None) if lossy else written
    return planned


def _measure(weight: PackedWeight) -> Written:
    """Write a weight, read it with the gguf package, and return its type and largest error."""
    import gguf

    kind = choose(weight)
    if kind is None:
        return Written(None)
    blocks = encode(weight, kind, torch.arange(weight.shape[0]))
    read = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind.name])
    error = (torch.from_numpy(read) - weight.dense()).abs().max()
    return Written(kind, float(error))


def _describe(weight: PackedWeight) -> str:
    grid = weight.grid
    half = ", half-integer" if grid.first % 1 else ""
    run = math.prod(weight.channels[1:]) // weight.scale.shape[1]
    large = f", scales above {LARGEST:.0f}" if float(weight.scale.max()) > LARGEST else ""
    return (
        f"bits = {grid.bits}{half} in {len(weight.shape)}-D with a scale for {run} in a row{large}"
    )


def _settings(loaded: LoadedModel) -> dict[str, Any]:
    config: Any = loaded.model.config
    return config.to_dict()  # type: ignore[no-any-return]


def _architecture(loaded: LoadedModel) -> str:
    return ARCHITECTURES[_settings(loaded)["model_type"]]


def _unknown_model(source: ExportSource) -> str:
    """Return why llama.cpp could not compute this model, or an empty string."""
    loaded = source.loaded
    known = f"GGUF is written for causal language models of {', '.join(ARCHITECTURES)}"
    if loaded.spec.source != "transformers" or loaded.spec.task != "causal-lm":
        return f"{source.title!r} is a model for {loaded.spec.task}; {known}"
    settings = _settings(loaded)
    kind = settings["model_type"]
    if kind not in ARCHITECTURES:
        return f"{source.title!r} is a {kind}; {known}"
    if settings["hidden_act"] not in ("silu", "swish"):  # two names of one
        return f"the activation {settings['hidden_act']!r}: llama.cpp computes silu in a {kind}"
    window = settings.get("sliding_window")
    if window is not None and window < settings["max_position_embeddings"]:
        return f"attention in a window of {window}: llama.cpp's {kind} attends to all tokens"
    if kind == "qwen3" and settings.get("attention_bias"):
        return "attention with biases, which llama.cpp's qwen3 does not have"
    rope = _rope(settings)
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        return f"rope scaling of type {rope['rope_type']!r}; default, linear and llama3 are written"
    if rope["rope_type"] == "llama3" and _architecture(loaded) != "llama":
        return f"rope scaling of type 'llama3', which llama.cpp's {kind} does not have"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"rope on a part of a head, which llama.cpp's {kind} does not have"
    return ""


def _rope(settings: dict[str, Any]) -> dict[str, Any]:
    """Return rope parameters as transformers 5 has them; 4 had them in two places."""
    scaling = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return {"rope_theta": settings.get("rope_theta"), **scaling, "rope_type": kind}


def _names(source: ExportSource) -> dict[str, str]:
    """Return GGUF's name of every key that is stored, of tied ones the first; "": it has none."""
    import gguf

    loaded = source.loaded
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    layers = _settings(loaded)["num_hidden_layers"]
    names = gguf.get_tensor_name_map(kinds[_architecture(loaded)], layers)
    keys = [key for key in loaded.model.state_dict() if key not in source.artifact.shared]
    return {key: names.get_name(key, try_suffixes=(".weight", ".bias")) or "" for key in keys}


def _rows(loaded: LoadedModel, key: str, count: int) -> Tensor:
    """Return the order in which llama.cpp wants the rows of a weight or bias.

    Its llama rotates neighbouring rows of queries and keys, transformers rows half a head apart.
    """
    order = torch.arange(count)
    settings = _settings(loaded)
    heads = {
        "q_proj": settings["num_attention_heads"],
        "k_proj": settings["num_key_value_heads"],
    }
    projection = key.split(".")[-2]
    if _architecture(loaded) != "llama" or projection not in heads:
        return order
    return order.reshape(heads[projection], 2, -1).transpose(1, 2).reshape(-1)


def write(source: ExportSource, options: Options, folder: Path) -> None:
    """Write model.gguf, and the tokenizer's own files beside it."""
    import gguf

    loaded, artifact = source.loaded, source.artifact
    writer = gguf.GGUFWriter(folder / FILE, _architecture(loaded))
    planned = plan(source, options)
    _add_settings(writer, loaded, source.title)
    writer.add_file_type(_file_type(source, planned))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_tokenizer(writer, loaded)
    if (factors := _rope_factors(loaded)) is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    state = loaded.model.state_dict()
    for key, name in _names(source).items():
        rows = _rows(loaded, key, len(state[key]))
        kind = planned[key].kind if key in planned else None
        if kind is None:
            writer.add_tensor(name, state[key].float()[rows].numpy())
        else:
            blocks = encode(artifact.weights[key], kind, rows).numpy()
            stored = gguf.GGMLQuantizationType[kind.name]
            writer.add_tensor(name, blocks, raw_dtype=stored)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    loaded.preprocessing.save(folder)


def _add_settings(writer: Any, loaded: LoadedModel, name: str) -> None:
    """Add what llama.cpp builds the network from."""
    import gguf

    settings = _settings(loaded)
    heads = settings["num_attention_heads"]
    head = settings.get("head_dim") or settings["hidden_size"] // heads
    rope = _rope(settings)
    writer.add_name(name)
    writer.add_vocab_size(settings["vocab_size"])
    writer.add_context_length(settings["max_position_embeddings"])
    writer.add_embedding_length(settings["hidden_size"])
    writer.add_block_count(settings["num_hidden_layers"])
    writer.add_feed_forward_length(settings["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(settings["num_key_value_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(settings["rms_norm_eps"])
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _rope_factors(loaded: LoadedModel) -> Tensor | None:
    """Return what Llama 3's scaling divides each rope frequency by, float32 [head / 2]."""
    settings = _settings(loaded)
    rope = _rope(settings)
    if rope["rope_type"] != "llama3":
        return None
    model: Any = loaded.model
    scaled = model.model.rotary_emb.inv_freq.double()
    exponents = torch.arange(len(scaled), dtype=torch.float64) / len(scaled)
    return (float(rope["rope_theta"]) ** -exponents / scaled).float()


def _file_type(source: ExportSource, planned: dict[str, Written]) -> int:
    """Return the file type of the type that holds most weights."""
    import gguf

    counts: dict[str, int] = defaultdict(int)
    for name, written in planned.items():
        if written.kind is not None:
            counts[written.kind.name] += math.prod(source.artifact.weights[name].shape)
    if not counts:
        return int(gguf.LlamaFileType.ALL_F32)
    name = max(counts, key=lambda key: counts[key])
    small = {"Q3_K": "Q3_K_S", "Q4_K": "Q4_K_S", "Q5_K": "Q5_K_S"}  # all their layers in one type
    return int(gguf.LlamaFileType[f"MOSTLY_{small.get(name, name)}"])


def read_back(folder: "str", inputs: "dict[str, Tensor]") -> "Tensor":
    """Return the logits of transformers' network, built and filled from the file alone.

    gguf's reader and its dequantization give the weights. This verifies what is in the file, the
    order of rows and the settings included; it does not verify llama.cpp's kernels.
    """
    from pathlib import Path

    import gguf
    import torch
    import transformers

    reader = gguf.GGUFReader(str(Path(folder) / "model.gguf"))
    arch = reader.fields["general.architecture"].contents()
    tensors = {
        tensor.name: torch.from_numpy(
            gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()
        )
        for tensor in reader.tensors
    }

    def setting(key: str, default: float | None = None) -> "Any":
        field = reader.fields.get(f"{arch}.{key}")
        return default if field is None else field.contents()

    heads, kv_heads = setting("attention.head_count"), setting("attention.head_count_kv")
    layers = setting("block_count")
    classes = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    config = getattr(transformers, f"{classes[arch]}Config")(
        vocab_size=setting("vocab_size"),
        max_position_embeddings=setting("context_length"),
        hidden_size=setting("embedding_length"),
        intermediate_size=setting("feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=setting("attention.key_length"),
        rms_norm_eps=setting("attention.layer_norm_rms_epsilon"),
        rope_theta=setting("rope.freq_base"),
        attention_bias="blk.0.attn_q.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        tie_word_embeddings="output.weight" not in tensors,
    )
    model = getattr(transformers, f"{classes[arch]}ForCausalLM")(config).float().eval()
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[arch], layers)
    state = model.state_dict()
    for key, target in state.items():
        tied = config.tie_word_embeddings and key == "lm_head.weight"
        source = "model.embed_tokens.weight" if tied else key
        value = tensors[str(names.get_name(source, try_suffixes=(".weight", ".bias")))]
        for projection, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if arch == "llama" and f".{projection}." in key:
                rows = torch.arange(len(value)).reshape(count, -1, 2).transpose(1, 2).reshape(-1)
                value = value[rows]
        target.copy_(value)
    divisor = tensors.get("rope_freqs.weight", setting("rope.scaling.factor", 1.0))
    model.model.rotary_emb.inv_freq /= divisor
    with torch.no_grad():
        return model(**inputs).logits


TARGET = Target(
    name="gguf",
    needs=("gguf",),
    extra="gguf",
    bound=lambda options: LOSSY_BOUND if options.allow_lossy else BOUND,
    refusals=refusals,
    notes=notes,
    write=write,
    read_back=read_back,
)
