"""Exports of networks that round their inputs: onnxruntime and transformers agree, or a refusal."""

import json
from dataclasses import replace

import builders
import onnx
import onnxruntime
import pytest
import torch
from builders import command, finetune
from torch import nn

import askewq
from askewq import checkpoint, export_compressed_tensors, export_onnx
from askewq.activations import attach_
from askewq.checkpoint import inputs_of
from askewq.export import _open
from askewq.grid import input_grid
from askewq.manifest import PackedInput
from askewq.onnx_inputs import fill_inputs, type_name
from askewq.samples import expected_of, sample_inputs
from askewq.target import ExportSource, Options


def opened(kind, folder, bits, act_bits, include=()) -> ExportSource:
    """Return an artifact of a tiny untrained network whose scales come from its sample inputs."""

    def quantize(model):
        askewq.quantize(model, bits, include=include)
        inputs = sample_inputs(loaded)
        images = {"own", "timm", "timm-vit"}
        run = (lambda: model(*inputs.values())) if kind in images else (lambda: model(**inputs))
        askewq.round_inputs(model, act_bits, run)

    loaded = builders.untrained(kind)
    return _open(builders.packed(loaded, folder / "artifact", quantize), None)


def difference(source: ExportSource, folder) -> list[float]:
    """Return how far each sample's logits in onnxruntime are from ours, of the largest."""
    folder.mkdir()
    export_onnx.TARGET.write(source, Options(), folder)
    inputs, expected = expected_of(source.loaded)
    logits = export_onnx.TARGET.read_back(str(folder), inputs)
    apart = (logits - expected).abs().flatten(1).amax(1) / expected.abs().max()
    return sorted(apart.tolist())


def fill(model) -> None:
    """Give the layers of a network a scale that suits standard normal inputs."""
    for layer in askewq.activations.rounded_layers(model).values():
        layer.input_scale.fill_(0.37)


class TestONNX:
    @pytest.mark.parametrize("act_bits", range(1, 9))
    @pytest.mark.parametrize("signed", [True, False])
    def test_the_nodes_round_as_we_do(self, act_bits, signed):
        """Halves included, every value is rounded to the very bits."""
        grid, scale = input_grid(act_bits, signed=signed), torch.tensor(0.375)
        rounded = PackedInput(grid, scale)
        kinds = onnx.TensorProto
        values = [onnx.helper.make_tensor_value_info(n, kinds.FLOAT, ["n"]) for n in ("x", "y")]
        node = onnx.helper.make_node("RoundInput", ["x"], ["y"], domain="askewq", layer="a")
        graph = onnx.helper.make_graph([node], "g", values[:1], values[1:])
        opsets = [onnx.helper.make_opsetid("", 25), onnx.helper.make_opsetid("askewq", 1)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=13)
        fill_inputs(model, {"a": rounded})
        onnx.checker.check_model(model, full_check=True)
        assert [entry.domain for entry in model.opset_import] == [""]
        halves = torch.arange(-300, 300) * 0.1875
        x = torch.cat([halves, 40 * torch.randn(2000), torch.tensor([0.0, -0.0])])
        session = onnxruntime.InferenceSession(model.SerializeToString())
        y = torch.from_numpy(session.run(["y"], {"x": x.numpy()})[0])
        assert torch.equal(y, askewq.activations.round_to(x, scale, grid))

    @pytest.mark.parametrize(
        ("kind", "bits", "act_bits"),
        [("timm", 4, 4), ("timm", 2, 4), ("timm", 1, 1), ("timm-vit", 4, 4), ("bert", 4, 4)],
    )
    def test_networks_agree(self, tmp_path, kind, bits, act_bits):
        """W4/A4 and others; an input half-way between levels may tip in one sample of four."""
        apart = difference(opened(kind, tmp_path, bits, act_bits), tmp_path / "out")
        assert apart[2] < 1e-5
        assert apart[3] < export_onnx.BOUND_OF_INPUTS

    @pytest.mark.parametrize("act_bits", [1, 2, 3, 8])
    def test_every_width(self, tmp_path, act_bits):
        """The other widths, in a network with inputs of either sign."""
        apart = difference(opened("gpt2", tmp_path, 2, act_bits, ["*"]), tmp_path / "out")
        assert apart[2] < 1e-5
        assert apart[3] < export_onnx.BOUND_OF_INPUTS

    def test_types(self):
        """The smallest type that holds the levels."""
        names = {
            (bits, signed): type_name(PackedInput(input_grid(bits, signed=signed), torch.ones(())))
            for bits in range(1, 9)
            for signed in (True, False)
        }
        assert [names[b, True] for b in range(1, 9)] == ["INT2"] * 2 + ["INT4"] * 2 + ["INT8"] * 4
        assert all(names[b, False] == "U" + names[b, True] for b in range(1, 9))

    @pytest.mark.parametrize("act_bits", [2, 3, 4])
    def test_behind_a_clip(self, tmp_path, act_bits):
        """Onnxruntime fails on Clip before narrow integers; ReLU6 is one."""
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU6(), nn.Linear(8, 3))
        full = builders.untrained("own")
        full = replace(
            full, model=model.eval(), preprocessing=replace(full.preprocessing, size=(4, 4))
        )
        askewq.quantize(model, 2, include=["3"])
        attach_(model, act_bits, {"3": False})
        fill(model)
        askewq.snap_(model)
        stored = checkpoint.artifact_of(model)
        plain = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU6(), nn.Linear(8, 3)).eval()
        checkpoint.load_into(plain, stored)
        source = ExportSource(tmp_path, replace(full, model=plain), stored)
        assert difference(source, tmp_path / "out")[-1] < 1e-5

    @pytest.mark.parametrize("act_bits", [2, 3, 4])
    def test_signed_levels_behind_a_relu(self, tmp_path, act_bits):
        """Onnxruntime drops Relu before narrow signed integers; a layer that is called twice."""

        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.twice, self.last = (
                    nn.Linear(48, 8),
                    nn.Linear(8, 8),
                    nn.Linear(8, 3),
                )

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.last(self.twice(self.twice(self.first(x.flatten(1)).relu())))

        torch.manual_seed(0)
        model, full = Twice().eval(), builders.untrained("own")
        full = replace(full, model=model, preprocessing=replace(full.preprocessing, size=(4, 4)))
        askewq.quantize(model, 2, include=["twice"])
        attach_(model, act_bits, {"twice": True})
        fill(model)
        askewq.snap_(model)
        stored = checkpoint.artifact_of(model)
        plain = Twice().eval()
        checkpoint.load_into(plain, stored)
        source = ExportSource(tmp_path, replace(full, model=plain), stored)
        assert difference(source, tmp_path / "out")[-1] < 1e-5

    def test_the_command(self, tmp_path):
        """W4/A4 after training: types and the bound are in export.json, notes are printed."""
        finetune("timm", tmp_path / "run", bits=4, act_bits=4)
        out = tmp_path / "out"
        done = command("export", tmp_path / "run", "--to", "onnx", "--output", out)
        assert done.code == 0, done.err
        assert "inputs of 14 layers: 4 bits, in UINT4" in done.out
        facts = json.loads((out / "export.json").read_text())
        assert facts["relative_difference"] <= facts["bound"] == export_onnx.BOUND_OF_INPUTS
        model = onnx.load(out / "model.onnx")
        kinds = [node.op_type for node in model.graph.node]
        assert kinds.count("QuantizeLinear") == 14
        assert kinds.count("DequantizeLinear") == 28
        assert not any(node.domain == "askewq" for node in model.graph.node)

    def test_a_torch_that_cannot(self, tmp_path, monkeypatch):
        """Before 2.8 there are no torch.onnx.ops: refused, with the version that has them."""
        source = opened("timm-vit", tmp_path, 4, 4)
        assert export_onnx.TARGET.refusals(source, Options()) == []
        monkeypatch.delattr(torch.onnx, "ops")
        (refusal,) = export_onnx.TARGET.refusals(source, Options())
        assert "upgrade to torch 2.8" in refusal

    def test_the_network_rounds_again_afterwards(self, tmp_path):
        """The exporter's marks are gone after it."""
        source = opened("timm", tmp_path, 4, 4)
        _, before = expected_of(source.loaded)
        difference(source, tmp_path / "out")
        assert torch.equal(expected_of(source.loaded)[1], before)


class TestCompressedTensors:
    @pytest.mark.parametrize("act_bits", range(2, 9))
    @pytest.mark.parametrize("kind", ["llama", "bert"])
    def test_logits_are_equal_to_the_bit(self, tmp_path, kind, act_bits):
        """Signed inputs are its static, symmetric input_activations of one scale a tensor."""
        source = opened(kind, tmp_path, 4, act_bits)
        target = export_compressed_tensors.TARGET
        assert target.refusals(source, Options()) == []
        (tmp_path / "out").mkdir()
        target.write(source, Options(), tmp_path / "out")
        inputs, expected = expected_of(source.loaded)
        assert torch.equal(target.read_back(str(tmp_path / "out"), inputs), expected)
        config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        [group] = config["config_groups"].values()
        assert group["input_activations"] == {
            "num_bits": act_bits,
            "type": "int",
            "symmetric": True,
            "strategy": "tensor",
            "dynamic": False,
        }

    def test_what_it_cannot_say(self, tmp_path):
        """Signs, levels without a sign, and layers that it does not pack, by name."""
        target = export_compressed_tensors.TARGET
        first, *_, last = target.refusals(opened("bert", tmp_path, 2, 1), Options())
        assert "is rounded to its sign" in first
        assert "--to onnx" in last
        assert "--act-bits none" in last
        source = opened("bert", tmp_path / "unsigned", 2, 4)
        name = next(iter(source.artifact.inputs))
        source.artifact.inputs[name] = PackedInput(input_grid(4, signed=False), torch.ones(()))
        [reason, _] = target.refusals(source, Options(dense_rest=True))
        assert reason.startswith(f"the input of {name} is rounded to 0 .. 15")
        source = opened("gpt2", tmp_path / "gpt2", 2, 4)
        reasons = target.refusals(source, Options(dense_rest=True))
        assert "is a Conv1D" in reasons[0]


class TestRefusals:
    @pytest.mark.parametrize(("kind", "to"), [("timm", "dense"), ("llama", "gguf")])
    def test_formats_of_weights_alone(self, tmp_path, kind, to):
        """What was wrong, what was given, what is allowed, what to do; nothing is written."""
        opened(kind, tmp_path, 2, 4)
        done = command("export", tmp_path / "artifact", "--to", to, "--output", tmp_path / "out")
        assert done.code == 2
        for words in ("rounds the inputs of 14 layers", "4 bits", f"--to {to} holds weights alone"):
            assert words in done.err
        assert "--to onnx" in done.err
        assert "--act-bits none" in done.err
        assert not (tmp_path / "out").exists()

    def test_a_saved_network_says_all(self, tmp_path):
        """What an exporter asks of an artifact are the layers' own grids and scales."""
        source = opened("timm", tmp_path, 2, 4)
        assert inputs_of(source.loaded.model).keys() == source.artifact.inputs.keys()
