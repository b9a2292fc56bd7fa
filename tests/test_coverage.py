"""Layers of every kind in whole models: wrapped, trained, snapped, packed and reloaded."""

import copy
import pickle

import builders
import pytest
import torch
import transformers
from builders import finetune
from conftest import GRIDS, grid_name
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

import askewq
from askewq import checkpoint, models
from askewq.errors import ModelError
from askewq.grid import fit_scale, make_grid
from askewq.layers import QuantizedParts, prepared, quantized_layers, snap_, snapped
from askewq.methods import RIVALS
from askewq.packed import load_packed_into
from askewq.rivals import Follower

EXPERTS = {
    **{"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4},
    **{"max_position_embeddings": 32, "head_dim": 8},
}


class Attention(nn.Module):
    """Attention of torch: with one input projection, and with three."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.three = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)

    def forward(self, x):
        x = self.one(x)
        return self.three(x, x[..., :6].contiguous(), x[..., :4].contiguous())[0]


class Transposed(nn.Module):
    """Transposed convolutions of one to three dimensions, whole, grouped and depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.ConvTranspose1d(4, 6, 3, groups=2)
        self.depthwise = nn.ConvTranspose2d(6, 6, 3, groups=6, stride=2)
        self.whole = nn.ConvTranspose3d(6, 5, 2)

    def forward(self, x):
        x = self.depthwise(self.grouped(x).unsqueeze(-1))
        return self.whole(x.unsqueeze(-1))


class Reused(nn.Module):
    """A layer called twice, and one whose weight is read by the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(8, 8)
        self.read = nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        x = self.twice(self.twice(x).relu())
        x = nn.functional.linear(x, self.read.weight, self.read.bias)
        return sum(expert(x) for expert in self.experts) @ self.read.weight.t()


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**EXPERTS))


def gpt_oss() -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    return transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**EXPERTS, rope_parameters=rope)
    )


def tokens() -> torch.Tensor:
    return torch.randint(0, 40, (2, 7))


MODELS = {
    "attention": (Attention, lambda: torch.randn(2, 5, 8)),
    "transposed": (Transposed, lambda: torch.randn(2, 4, 5)),
    "reused": (Reused, lambda: torch.randn(3, 8)),
    "mixtral": (mixtral, tokens),
    "gpt-oss": (gpt_oss, tokens),
}
every_model = pytest.mark.parametrize(("build", "make"), MODELS.values(), ids=MODELS.keys())


def call(model, x):
    """Return the model's output."""
    output = model(x)
    return output if isinstance(output, torch.Tensor) else output.logits


def trained(model, x, steps=3, optimizer=None, follower=None):
    """Make a few steps; return the model."""
    optimizer = optimizer or askewq.AskewAdamW(model, lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        call(model, x).square().mean().backward()
        (follower or optimizer).anneal((step + 1) / steps)
        optimizer.step()
    return model


def artifact_of(model, folder):
    """Return what the file of a model holds."""
    checkpoint.save(model, folder / "file")
    return checkpoint.read(folder / "file")


@every_model
@pytest.mark.parametrize("grid", [GRIDS[0], GRIDS[1], make_grid(3, "half-integer")], ids=grid_name)
def test_there_and_back(build, make, grid, tmp_path):
    """Wrapping, packing and reloading change no bit; copies and pickles are as the model."""
    model, x = build().eval(), make()
    before, keys = call(model, x), list(model.state_dict())
    kind = "half-integer" if grid.first % 1 else "integer"
    plan = askewq.quantize(model, grid.bits, grid=kind, include=["*"])
    assert torch.equal(call(model, x), before)
    assert [key for key in model.state_dict() if not key.endswith("_scale")] == keys
    trained(model, x)
    snap_(model)
    with torch.no_grad():
        expected = call(model, x)
        assert not torch.equal(expected, before)
        assert torch.equal(call(copy.deepcopy(model), x), expected)
        assert torch.equal(call(pickle.loads(pickle.dumps(model)), x), expected)
    artifact = artifact_of(model, tmp_path)
    assert len(artifact.weights) == len(plan.quantized)
    plain, packed = build().eval(), build().eval()
    checkpoint.load_into(plain, artifact)
    load_packed_into(packed, artifact)
    with torch.no_grad():
        assert torch.equal(call(plain, x), expected)
        # A frozen weight: torch multiplies a batch that is not contiguous otherwise.
        expected = call(plain.requires_grad_(False), x)
        assert torch.equal(call(packed, x), expected)
        assert torch.equal(call(copy.deepcopy(packed), x), expected)


@every_model
def test_every_matrix_is_covered(build, make):
    """Nothing but routers stays float."""
    plan = askewq.plan(build(), 2, include=["*"])
    left = {la.kind for la in plan.layers if la.grid is None and la.note != "no weight matrix"}
    assert all(kind.endswith("Router") for kind in left)


@every_model
def test_closing_ends_on_the_levels(build, make):
    """The constrained steps see every weight of a layer that has several."""
    model, x = build(), make()
    askewq.quantize(model, 2, include=["*"])
    closing = askewq.Closing("staggered")
    trained(model, x, 40, askewq.AskewSGD(model, lr=0.01, momentum=0.9, closing=closing))
    for layer in quantized_layers(model).values():
        weight = layer.rows(layer.latent.detach())
        assert torch.equal(weight, layer.grid.snap(weight, layer.weight_scale))


@pytest.mark.parametrize("method", RIVALS)
@pytest.mark.parametrize("name", ["attention", "gpt-oss"])
def test_other_methods(method, name):
    """Every rule is followed by weights of any name, and given back after a look at the levels."""
    model, x = MODELS[name][0](), MODELS[name][1]()
    askewq.quantize(model, 1, include=["*"])
    follower = Follower(model, method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    follower.attach(optimizer)
    trained(model, x, 3, optimizer, follower)
    part = next(m for m in model.modules() if isinstance(m, QuantizedParts))
    leaf = part.leaves[0]
    seen = getattr(part, leaf).detach().clone()
    with snapped(model):
        assert getattr(part, leaf) is part.parts[leaf].latent
    assert torch.equal(getattr(part, leaf), seen)


def test_scales_of_transposed_convolutions():
    """There is a scale for each output channel, those of each group among them."""
    model, grid = Transposed(), make_grid(2)
    weight = model.grouped.weight.detach().clone()  # [in, out / groups, 3]
    askewq.quantize(model, 2, include=["*"])
    channels = torch.cat([part.transpose(0, 1) for part in weight.chunk(2)])
    expected = fit_scale(channels, grid).view(2, 3).t()
    assert torch.equal(model.grouped.weight_scale, expected)
    assert model.depthwise.weight_scale.shape == (1, 6)
    assert model.whole.weight_scale.shape == (5, 1)


@pytest.mark.parametrize(("build", "turned"), [(mixtral, False), (gpt_oss, True)])
def test_scales_of_experts(build, turned):
    """There is a scale for each output channel of each expert, whichever order they lie in."""
    model, grid = build(), make_grid(2)
    experts = next(m for m in model.modules() if type(m).__name__.endswith("Experts"))
    weight = experts.down_proj.detach().clone()
    weight = weight.transpose(1, 2) if turned else weight  # [experts, out, in]
    plan = askewq.quantize(model, 2)
    expected = fit_scale(weight.flatten(0, 1), grid).view(weight.shape[:2])
    assert torch.equal(experts.down_proj_scale, expected.t() if turned else expected)
    entry = next(la for la in plan.quantized if la.leaves == ("down_proj",))
    assert entry.group_size == weight.shape[2]
    assert entry.note == "a group is an output channel"
    assert entry.packed_bytes == weight.numel() // 4 + 4 * expected.numel()


def test_weights_of_one_layer_are_named_one_by_one():
    """A pattern takes a layer, or one of its weights; each may have its own bits."""
    name = "model.layers.0.mlp.experts"
    model = mixtral()
    overrides = {"*.down_proj": 4, "*.gate_up_proj": 8}
    plan = askewq.quantize(model, 2, include=[f"{name}*"], bits_override=overrides)
    assert [(la.label, la.grid.bits) for la in plan.quantized] == [
        (f"{name}.gate_up_proj", 8),
        (f"{name}.down_proj", 4),
    ]
    assert list(quantized_layers(model)) == [f"{name}.gate_up_proj", f"{name}.down_proj"]
    (only,) = askewq.plan(mixtral(), 2, include=[f"{name}.down_proj"]).quantized
    assert only.label == f"{name}.down_proj"


def test_attention_that_shares_its_projection():
    """Two attention layers with one projection are one entry, and stay tied."""
    model = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)])
    model[1].in_proj_weight = model[0].in_proj_weight
    plan = askewq.quantize(model, 2, include=["*"])
    assert plan.quantized[0].note == "weight shared by 1"
    assert model[1].in_proj_weight is model[0].in_proj_weight
    assert torch.equal(model[0].in_proj_weight_scale, model[1].in_proj_weight_scale)


@pytest.mark.parametrize(
    ("included", "message"),
    [
        (("*",), "MultiheadAttention has several weights, in_proj_weight among them"),
        (("one.self_attn.out_proj",), "Linear never sees its input, for MultiheadAttention reads"),
    ],
)
def test_gradients_of_an_output_are_those_of_one_product(included, message):
    """Luq's rounded gradients have no place in attention; a run says so before it writes."""
    model = Attention()
    askewq.quantize(model, 2, include=included)
    with pytest.raises(ModelError, match=message):
        Follower(model, "luq", gradient_bits=4)


def test_gradients_are_checked_before_anything_is_written(tmp_path):
    """A run that could not round its gradients ends before its full-precision steps."""
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "class Attends(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.attention = nn.MultiheadAttention(3, 1, batch_first=True)\n"
        "    def forward(self, x):\n"
        "        x = x.flatten(2).transpose(1, 2)\n"
        "        return self.attention(x, x, x)[0].mean(1)\n"
    )
    given = {"model": f"{tmp_path / 'net.py'}:Attends", "method": "luq", "gradient_bits": 4}
    with pytest.raises(ModelError, match="several weights"):
        finetune("own", tmp_path / "out", **given, include=("*",), full_precision_steps=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("compiled_first", [True, False])
@pytest.mark.parametrize("name", ["attention", "transposed"])
def test_compiled_models(name, compiled_first, tmp_path):
    """A model may be compiled before or after: the same steps, and files with the plain names."""
    torch.manual_seed(0)
    plain, x = MODELS[name][0]().eval(), MODELS[name][1]()
    twin = copy.deepcopy(plain)
    if compiled_first:
        compiled = torch.compile(twin, backend="eager")
        compiled(x)
        plan = askewq.quantize(compiled, 2, include=["*"])
    else:
        plan = askewq.quantize(twin, 2, include=["*"])
        compiled = torch.compile(twin, backend="eager")
    assert plan == askewq.quantize(plain, 2, include=["*"])
    for model in (compiled, plain):
        optimizer = askewq.AskewSGD(model, lr=0.1)
        for step in range(3):
            with prepared(model):
                model(x).square().mean().backward()
            optimizer.anneal((step + 1) / 3)
            optimizer.step()
            optimizer.zero_grad()
        snap_(model)
    first, second = (artifact_of(model, tmp_path) for model in (compiled, plain))
    assert first.digest == second.digest
    fresh = torch.compile(MODELS[name][0]().eval(), backend="eager")
    checkpoint.load_into(fresh, first)
    assert torch.equal(fresh(x), plain(x))
    torch._dynamo.reset()


def test_channels_last(tmp_path):
    """Weights in another memory order take the same steps, and make the same file."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=4), nn.ConvTranspose2d(8, 6, 3)]
    plain = nn.Sequential(*layers).double()
    other = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for model, inputs in ((plain, x), (other, x.to(memory_format=torch.channels_last))):
        askewq.quantize(model, 2, include=["*"])
        trained(model, inputs, 5, askewq.AskewSGD(model, lr=0.1, momentum=0.9))
        snap_(model)
    assert not other[1].weight.is_contiguous()
    first, second = (artifact_of(model, tmp_path) for model in (plain, other))
    for name, weight in first.weights.items():
        assert torch.equal(second.weights[name].codes, weight.codes), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints(dtype, tmp_path):
    """A model that was saved in 16 bits is loaded, planned and trained in float32."""
    transformers.BertForSequenceClassification.from_pretrained(
        builders.bert(), dtype=dtype
    ).save_pretrained(tmp_path)
    for file in builders.bert().iterdir():
        if "token" in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    loaded = models.load(str(tmp_path), "text-classification", ("neg", "pos")).model
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    askewq.quantize(loaded, 2)
    assert {la.latent.dtype for la in quantized_layers(loaded).values()} == {torch.float32}


@pytest.mark.parametrize("spoil", [parametrizations.weight_norm, weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("build", [lambda: nn.Linear(4, 4), lambda: nn.ConvTranspose1d(4, 4, 3)])
def test_weight_norm_is_named(spoil, build):
    """A weight that is computed from two others stays float, in the old way and in the new."""
    model = nn.ModuleList([spoil(build()), nn.Linear(4, 4)])
    plan = askewq.plan(model, 2, include=["*"])
    assert {la.note for la in plan.layers if la.grid is None} <= {
        "a weight computed from other parameters",
        "no weight matrix",
    }
    assert "a weight computed from other parameters" in {la.note for la in plan.layers}


def test_a_parametrized_projection_is_named():
    """So does the projection of an attention layer."""
    layer = nn.MultiheadAttention(4, 2)
    parametrizations.spectral_norm(layer, "in_proj_weight")
    plan = askewq.plan(nn.ModuleList([layer]), 2, include=["*"])
    assert [la.label for la in plan.quantized] == ["0.out_proj"]
    notes = {la.names[0]: la.note for la in plan.layers if la.grid is None}
    assert notes["0.parametrizations.in_proj_weight"] == "a weight computed from other parameters"
