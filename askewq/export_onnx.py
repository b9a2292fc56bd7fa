"""The ONNX format: packed INT2, INT4 or INT8 weights with DequantizeLinear in front of each use.

Every weight that DequantizeLinear and the nodes behind it produce is, bit for bit, the artifact's.
While torch's exporter optimises the graph, the parameters are inputs of it, so that nothing can
fold, merge or copy them; afterwards they become initializers again, the quantized ones packed.
"""

import inspect
import json
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from askewq.checkpoint import Artifact
from askewq.errors import ExportError
from askewq.onnx_inputs import fill_inputs, marked, type_name, width
from askewq.onnx_weights import Storage, dequantize, multiplies, storage
from askewq.preprocessing import TextPreprocessing
from askewq.samples import picture_size, takes_any_size
from askewq.spec import LoadedModel, first_line
from askewq.target import ExportSource, Options, Target
from askewq.tasks import logits_of
from askewq.wording import bits_name

FILE = "model.onnx"
OPSET_INT2, IR_INT2 = 25, 13  # the first opset and IR version with 2-bit integers
OPSET = 21  # the first with 4-bit integers and blocks
ONE_FILE = 2**31 - 2**20  # protobuf holds less than 2 GiB; a megabyte for the graph

# Relative difference of logits. onnxruntime adds in another order than torch, so that an input that
# lies half-way between two levels to the last bit is rounded to the other one, and what follows
# from one level of one input is seen in the logits.
BOUND, BOUND_OF_INPUTS = 1e-4, 5e-2

# Of parameters in the graph: a name such as `add` alone may be that of a result, too.
PREFIX = "model."


def refusals(source: ExportSource, options: Options) -> list[str]:
    """Return what is missing; every grid and every layer can be written exactly."""
    # With a free size torch would write some layers (adaptive pooling) for that of the example.
    if takes_any_size(source.loaded):
        return [
            "the preprocessing sets no image size, and an ONNX file is for one size: say which "
            "with --image-size"
        ]
    if source.artifact.inputs and not hasattr(torch.onnx, "ops"):
        return [
            f"the artifact rounds inputs, for which torch.onnx.ops is needed, and torch is "
            f"{torch.__version__}: upgrade to torch 2.8 or newer"
        ]
    return []


def notes(source: ExportSource, options: Options) -> list[str]:
    """Return which types the weights take, and what running the file asks for."""
    kinds: dict[tuple[str, Storage], list[str]] = defaultdict(list)
    for name, weight in source.artifact.weights.items():
        half = " half-integer" if weight.grid.first % 1 else ""
        kinds[f"{bits_name(weight.grid.bits)}{half}", storage(weight)].append(name)
    how = {
        "levels": "",
        "doubled": " as twice the levels at half the scale",
        "units": " less one half, followed by Add and Mul with the scale",
    }
    found = [
        f"{kind}: {len(names)} weights in INT{kept.width}{how[kept.form]}"
        for (kind, kept), names in kinds.items()
    ]
    return [
        *found,
        *_notes_of_inputs(source.artifact),
        "everything else is float32",
        "onnxruntime needs the session config entry session.qdq_matmulnbits_accuracy_level = 0; "
        "by default it may round activations to 8 bits",
    ]


def _notes_of_inputs(artifact: Artifact) -> list[str]:
    """Return which types the rounded inputs take."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name, rounded in artifact.inputs.items():
        bits, kind = rounded.grid.bits, type_name(rounded)
        how = ", limited to their levels" if rounded.grid.size < 2 ** width(rounded) else ""
        kinds[f"{bits_name(bits)}, in {kind}{how}"].append(name)
    found = [f"inputs of {len(names)} layers: {kind}" for kind, names in kinds.items()]
    if found:
        found.append(
            "an input that lies half-way between two levels, to the last bit, may be rounded to "
            "the other one; set the session config entry session.disable_quant_qdq = 1 to have "
            "onnxruntime compute in float32 between the roundings, as training did"
        )
    return found


def write(source: ExportSource, options: Options, folder: Path) -> None:
    """Write model.onnx, preprocessing.json, and the tokenizer's or image processor's files.

    Raises:
        ExportError: a network that torch cannot export, or a weight that its graph does not use.
    """
    import onnx

    loaded, artifact = source.loaded, source.artifact
    two_bits = any(storage(weight).width == 2 for weight in artifact.weights.values())
    two_bits = two_bits or any(width(rounded) == 2 for rounded in artifact.inputs.values())
    model = fill(graph(loaded, artifact, OPSET_INT2 if two_bits else OPSET), artifact)
    values = loaded.preprocessing.save(folder)
    description = {"task": loaded.spec.task, "labels": list(loaded.spec.labels), **values}
    text = json.dumps(description, indent=2, ensure_ascii=False)
    (folder / "preprocessing.json").write_text(text + "\n", encoding="utf-8")
    onnx.helper.set_model_props(
        model, {"task": loaded.spec.task, "labels": json.dumps(loaded.spec.labels)}
    )
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    onnx.save_model(
        model,
        str(folder / FILE),
        save_as_external_data=size > ONE_FILE,
        location=f"{FILE}.data",
    )


def output_name(loaded: LoadedModel) -> str:
    """Return what the graph calls its output; a text's embedding as sentence-transformers does."""
    names = {"feature-extraction": "sentence_embedding", "image-feature-extraction": "embedding"}
    return names.get(loaded.spec.task, "logits")


class _Logits(nn.Module):
    """Calls a network with named tensors and returns its logits, or embeddings, alone."""

    def __init__(self, loaded: LoadedModel, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = loaded.model
        self.spec = loaded.spec
        self.names = names

    def forward(self, *tensors: Tensor) -> Tensor:
        return logits_of(self.model, self.spec, dict(zip(self.names, tensors, strict=True)))


def example(loaded: LoadedModel) -> dict[str, Tensor]:
    """Return named inputs of two samples that the network takes."""
    preprocessing = loaded.preprocessing
    if isinstance(preprocessing, TextPreprocessing):
        length = min(7, preprocessing.max_length)
        taken = inspect.signature(loaded.model.forward).parameters
        given = set(preprocessing.tokenizer.model_input_names) & set(taken)
        names = [n for n in ("input_ids", "attention_mask", "token_type_ids") if n in given]
        tensors = {name: torch.zeros(2, length, dtype=torch.int64) for name in names}
        if "attention_mask" in tensors:
            tensors["attention_mask"] += 1
        return tensors
    from PIL import Image

    height, width = picture_size(loaded)
    image = Image.new("RGB", (width, height))
    made: Any = preprocessing
    pixels = made.batch(torch.stack([made.image(image)] * 2))
    return {"pixel_values": pixels}


def graph(loaded: LoadedModel, artifact: Artifact, opset: int) -> Any:
    """Return a network as an onnx.ModelProto whose quantized weights are still inputs.

    They come after the network's own inputs, in their own shapes, called PREFIX and their
    state-dict name; `fill` makes initializers of them. The batch and the sequence may have any
    length; the size of images is that of the preprocessing.

    Raises:
        ExportError: a network that torch cannot export, or a weight that its graph does not hold
            to the bit.
    """
    inputs = example(loaded)
    free: dict[int, Any] = {0: torch.export.Dim.DYNAMIC}
    if isinstance(loaded.preprocessing, TextPreprocessing):
        free[1] = torch.export.Dim.DYNAMIC
    wrapped = _Logits(loaded, tuple(inputs)).eval()
    use_cache = _set_cache(loaded.model, False)
    try:
        with warnings.catch_warnings(), marked(loaded.model):
            warnings.simplefilter("ignore")  # the exporter's remarks about itself
            program = torch.onnx.export(
                wrapped,
                tuple(inputs.values()),
                dynamo=True,
                optimize=False,
                opset_version=opset,
                input_names=list(inputs),
                output_names=[output_name(loaded)],
                dynamic_shapes=(tuple(free for _ in inputs),),
                verbose=False,
            )
            kept = _hide_parameters(program, loaded.model, artifact)
            cast(Any, program).optimize()
    except ExportError:
        raise
    except Exception as error:  # tracing fails in as many ways as there are networks
        raise ExportError(
            f"torch.onnx.export cannot export {loaded.spec.name!r} "
            f"({type(error).__name__}: {first_line(error)}); use another --to."
        ) from error
    finally:
        _set_cache(loaded.model, use_cache)
    model = cast(Any, program).model
    for value in [value for value in model.graph.inputs if value.name in kept]:
        model.graph.inputs.remove(value)
        value.const_value = kept[value.name]
        model.graph.initializers.add(value)
    proto = cast(Any, program).model_proto
    _name_axes(proto, len(inputs))
    _strip(proto)
    return proto


def _set_cache(model: nn.Module, value: bool | None) -> bool | None:
    """Set whether a language model returns keys and values too; return what it was."""
    config: Any = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before is not None:
        config.use_cache = value
    return before


def _hide_parameters(program: Any, model: nn.Module, artifact: Artifact) -> dict[str, Any]:
    """Make inputs of all parameters; return the values of the float ones by their names there.

    Raises:
        ExportError: quantized weights that the graph does not hold to the bit.
    """
    values = program.model.graph.initializers
    lost = []
    for name, weight in artifact.weights.items():
        aliases = [name, *(key for key, first in artifact.shared.items() if first == name)]
        found = [values[PREFIX + alias] for alias in aliases if PREFIX + alias in values]
        dense = weight.dense()
        if not found or not all(
            torch.equal(torch.from_numpy(value.const_value.numpy().copy()), dense)
            for value in found
        ):
            lost.append(name)
            continue
        for value in found[1:]:
            value.replace_all_uses_with(found[0])
        found[0].name = PREFIX + name
    if lost:
        raise ExportError(
            f"the exported graph does not hold {', '.join(lost)} as in the artifact, so that they "
            "cannot be packed (the network transforms them or does not use them); quantize "
            "without these layers (--exclude), or use another --to."
        )
    kept = {}
    for name in model.state_dict():
        value = values.pop(PREFIX + name, None)
        if value is None or not value.uses():
            continue
        if name not in artifact.weights:
            kept[value.name] = value.const_value
        value.const_value = None
        program.model.graph.inputs.append(value)
    return kept


def _name_axes(model: Any, inputs: int) -> None:
    """Call the axes of any length batch and sequence."""
    model.graph.ClearField("value_info")  # they speak of the axes by torch's names
    for value in [*model.graph.input[:inputs], *model.graph.output]:
        axes = value.type.tensor_type.shape.dim
        for axis, name in zip(axes, ("batch", "sequence"), strict=False):
            if axis.dim_param:
                axis.dim_param = name


def _strip(model: Any) -> None:
    """Take the exporter's notes out: stack traces with the paths of this machine, mostly."""
    entries = [model, model.graph, *model.graph.node, *model.graph.initializer]
    for entry in [*entries, *model.graph.input, *model.graph.output]:
        entry.ClearField("metadata_props")
        entry.ClearField("doc_string")


def fill(model: Any, artifact: Artifact) -> Any:
    """Return `graph`'s model with the packed weights in the place of its further inputs."""
    import onnx

    filled = onnx.ModelProto()
    filled.CopyFrom(model)
    packed = {PREFIX + name: weight for name, weight in artifact.weights.items()}
    given = [value for value in filled.graph.input if value.name not in packed]
    del filled.graph.input[:]
    filled.graph.input.extend(given)
    made = []
    for name, weight in packed.items():
        kept = storage(weight)
        turned = multiplies(weight, kept.width) and _take_transposes(filled.graph, name)
        nodes, tensors = dequantize(name, weight, kept, turned)
        made += nodes
        filled.graph.initializer.extend(tensors)
        if kept.width == 2:
            filled.ir_version = max(filled.ir_version, IR_INT2)
    if any(width(rounded) == 2 for rounded in artifact.inputs.values()):
        filled.ir_version = max(filled.ir_version, IR_INT2)
    fill_inputs(filled, artifact.inputs)
    rest = list(filled.graph.node)
    del filled.graph.node[:]
    filled.graph.node.extend([*made, *rest])
    return filled


def _take_transposes(graph: Any, name: str) -> bool:
    """Remove the transpositions of a matrix where there is no other use; tell whether it was so."""
    users = [node for node in graph.node if name in node.input]
    if not all(
        node.op_type == "Transpose" and list(node.attribute[0].ints) == [1, 0] for node in users
    ):
        return False
    gone = {node.output[0] for node in users}
    for node in users:
        graph.node.remove(node)
    for node in graph.node:
        for i, used in enumerate(node.input):
            if used in gone:
                node.input[i] = name
    return True


def read_back(folder: "str", inputs: "dict[str, Tensor]") -> "Tensor":
    """Return what onnxruntime gives on the CPU, activations in float32."""
    from pathlib import Path

    import onnx
    import onnxruntime
    import torch

    path = Path(folder) / "model.onnx"
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    nodes = onnx.load(path, load_external_data=False).graph.node
    if any(node.op_type == "QuantizeLinear" for node in nodes):  # inputs are rounded
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = {taken.name: inputs[taken.name].numpy() for taken in session.get_inputs()}
    return torch.from_numpy(session.run(None, given)[0])


TARGET = Target(
    name="onnx",
    needs=("onnx", "onnxscript", "onnxruntime"),
    extra="onnx",
    bound=lambda options: BOUND,
    refusals=refusals,
    notes=notes,
    write=write,
    read_back=read_back,
    bound_of_inputs=BOUND_OF_INPUTS,
)
