"""The model walker: what it selects, what it leaves and why, and what it counts."""

import copy
import fnmatch

import pytest
import timm
import torch
import transformers
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import nn
from torch.nn.utils import parametrizations

import askewq
from askewq.errors import AskewError, ModelError, PlanError, RecipeError
from askewq.grid import fit_scale, make_grid, scale_shape
from askewq.layers import QuantizedLayer, quantized_layers, quantized_modules, snap_
from askewq.pack import packed_size
from askewq.plan_table import Plan
from askewq.wrap import apply, plan, quantize

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def mlp() -> nn.Sequential:
    """Three Linear layers with a LayerNorm between the first two."""
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(6, 2))


def alike(layers: int) -> nn.Sequential:
    """So many Linear layers of one shape."""
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))


def between(layer: nn.Module) -> nn.Sequential:
    """Put a layer between a first and a last Linear; the result is planned, never run."""
    return nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 4), nn.Linear(4, 2))


def notes(result: Plan) -> dict[str, str]:
    """Return the reason of every layer left in float, by name."""
    return {layer.names[0]: layer.note for layer in result.layers if layer.grid is None}


def names(result: Plan) -> list[str]:
    """Return the names of the quantized layers."""
    return [layer.names[0] for layer in result.quantized]


def tiny_bert() -> nn.Module:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            **TINY, vocab_size=60, intermediate_size=24, max_position_embeddings=20
        )
    )


def tiny_llama(tied: bool = True) -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **TINY,
            vocab_size=60,
            intermediate_size=24,
            max_position_embeddings=20,
            tie_word_embeddings=tied,
        )
    )


def tiny_t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    )


def tiny_vit() -> nn.Module:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**TINY, intermediate_size=24, image_size=16, patch_size=8)
    )


def test_first_and_last_stay_in_full_precision():
    """Without include every Linear and Conv but the first and the last gets the grid."""
    result = plan(mlp(), 2)
    assert names(result) == ["2"]
    assert notes(result) == {
        "0": "first layer, kept in full precision",
        "1": "no weight matrix",
        "3": "last layer, kept in full precision",
    }
    assert result.quantized[0].grid == make_grid(2)


def test_each_head_of_several_is_the_last():
    """They are those that timm names; one head is the last layer, as in every other network."""
    model = timm.create_model("levit_128s", pretrained=False)
    kept = [name for name, note in notes(plan(model, 2)).items() if note.startswith("last layer")]
    assert kept == ["head.linear", "head_dist.linear"]
    headless = plan(timm.create_model("levit_128s", num_classes=0), 2, keep_last=False)
    assert not any(note.startswith("last layer") for note in notes(headless).values())


def test_a_network_without_a_head_has_all_but_its_first_layer_quantized():
    """`quantize` passes `keep_last` on."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    quantize(model, 2, keep_last=False)
    assert list(quantized_layers(model)) == ["1", "2"]


def test_layers_come_in_the_models_order():
    """The table lists every module with parameters, in the order of the model."""
    assert [layer.names[0] for layer in plan(mlp(), 2).layers] == ["0", "1", "2", "3"]
    assert [layer.kind for layer in plan(mlp(), 2).layers] == [
        "Linear",
        "LayerNorm",
        "Linear",
        "Linear",
    ]


def test_an_embedding_counts_as_the_first_layer():
    """Behind an embedding the first Linear is quantized."""
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    result = plan(model, 2)
    assert names(result) == ["1"]
    assert notes(result)["0"] == "an embedding, kept in full precision unless include names it"


@pytest.mark.parametrize(
    "build", [mlp, lambda: timm.create_model("test_nfnet"), tiny_bert, tiny_llama]
)
def test_planning_changes_nothing(build):
    """After `plan` classes, weights, buffers, modes and random state are those of before."""
    model = build().train()
    next(model.children()).eval()
    before = copy.deepcopy(model)
    random_state = torch.get_rng_state()
    first = plan(model, 2)
    assert torch.equal(torch.get_rng_state(), random_state)
    for (name, now), then in zip(model.named_modules(), before.modules(), strict=True):
        assert type(now) is type(then), name
        assert now.training == then.training, name
    state = model.state_dict()
    assert state.keys() == before.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in before.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert plan(model, 2) == first


def test_planning_runs_no_hook():
    """A user's forward hook does not see the walker probing a layer."""
    layer = ScaledStdConv2d(4, 4, 3)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    plan(between(layer), 2)
    assert calls == []


def test_apply_follows_the_plan():
    """Exactly the planned layers become quantization-aware, with the scales that fit them."""
    model = mlp()
    result = plan(model, "ternary", group_size=4)
    weight = model[2].weight.detach().clone()
    apply(model, result)
    assert list(quantized_layers(model)) == names(result) == ["2"]
    assert model[2].grid == make_grid("ternary")
    assert torch.equal(model[2].weight, weight)
    assert torch.equal(model[2].weight_scale, fit_scale(weight, make_grid("ternary"), 4))
    assert [type(model[i]) for i in (0, 1, 3)] == [nn.Linear, nn.LayerNorm, nn.Linear]


def test_a_type_that_no_file_holds_is_refused():
    """Before training rather than after it."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model.register_buffer("phases", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(PlanError, match=r"phases is torch\.complex128.*persistent=False"):
        askewq.quantize(model, 2)
    model.register_buffer("phases", torch.zeros(2, dtype=torch.complex128), persistent=False)
    askewq.quantize(model, 2)


def test_quantize_is_plan_and_apply():
    """`quantize` returns the plan that it has applied."""
    model = mlp()
    expected = plan(model, 3, grid="half-integer", group_size="tensor", exclude=["0"])
    assert quantize(model, 3, grid="half-integer", group_size="tensor", exclude=["0"]) == expected
    assert model[2].grid == make_grid(3, "half-integer")
    assert model[2].weight_scale.shape == (1, 1)


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["*"], [], ["0", "2", "3"]),
        (["0"], [], ["0"]),
        (["[02]"], [], ["0", "2"]),
        (["0", "3"], ["3"], ["0"]),
        ([], ["0"], ["2"]),
        (["*"], ["2"], ["0", "3"]),
    ],
)
def test_include_selects_exactly_and_exclude_takes_away(include, exclude, expected):
    """Include names the layers, the ends too; exclude takes layers away from either."""
    assert names(plan(mlp(), 2, include=include, exclude=exclude)) == expected


def test_patterns_are_globs_on_module_names():
    """Patterns select what fnmatch selects, on real names, and the notes quote them."""
    model = timm.create_model("test_resnet")
    pattern = "layer[12].*.conv?"
    result = plan(model, 2, include=[pattern])
    convs = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert names(result) == [name for name in convs if fnmatch.fnmatchcase(name, pattern)]
    assert notes(result)["fc"] == "not included"
    without = plan(model, 2, exclude=["layer1.*"])
    assert not any(name.startswith("layer1.") for name in names(without))
    assert notes(without)[names(result)[0]] == "excluded by 'layer1.*'"


@pytest.mark.parametrize("where", ["include", "exclude"])
@pytest.mark.parametrize(
    ("pattern", "fragment"),
    [
        ("layer1.0.conv9", "did you mean layer1.0.conv"),
        ("layer1.0.cnov1", "'layer1.0.cnov1' matches no layer (did you mean layer1.0.conv1"),
        ("head.*", "the pattern 'head.*' matches no layer"),
        ("LAYER1.*", "globs on module names such as 'layer1.*' (askewq inspect MODEL lists"),
        ("layer1", "the pattern 'layer1' matches no layer"),
    ],
)
def test_a_pattern_without_a_match_is_an_error(where, pattern, fragment):
    """The error quotes the pattern and offers the nearest names, for include and exclude."""
    with pytest.raises(PlanError) as error:
        plan(timm.create_model("test_resnet"), 2, **{where: ["*", pattern]})
    assert fragment in str(error.value)


@pytest.mark.parametrize(
    ("settings", "fragment"),
    [
        ({"bits": 9}, "bits = 9 is not a width that askewq can train; use 1, ternary, 2"),
        ({"bits": "two"}, "bits = 'two' is not"),
        ({"bits": True}, "bits = True is not"),
        ({"bits": 1, "grid": "half-integer"}, "grid = 'half-integer' does not go with bits = 1"),
        ({"bits": 2, "grid": "log"}, "grid = 'log' is unknown"),
        ({"bits": 2, "group_size": 0}, "group_size = 0: use 'channel', 'tensor' or a positive"),
        ({"bits": 2, "group_size": -8}, "group_size = -8: use"),
        ({"bits": 2, "group_size": "rows"}, "group_size = 'rows': use"),
    ],
)
def test_settings_that_do_not_exist(settings, fragment):
    """Bits, grids and group sizes that do not exist are refused before any layer is looked at."""
    with pytest.raises(RecipeError) as error:
        plan(mlp(), **settings)
    assert fragment in str(error.value)


@pytest.mark.parametrize(
    ("build", "settings", "fragment"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 2)), {}, "0: last layer, kept in full precision"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), {}, "0: first layer, kept"),
        (mlp, {"exclude": ["*"]}, "none of the model's 4 layers with parameters can be quantized"),
        (mlp, {"include": ["1"]}, "0: not included; 1: no weight matrix; 2: not included"),
        (mlp, {"exclude": ["2"]}, "2: excluded by '2'"),
        (nn.ReLU, {}, "0 layers with parameters can be quantized (it has no parameters)"),
        (
            lambda: nn.Sequential(nn.Embedding(5, 4), nn.LSTM(4, 4)),
            {},
            "0: an embedding, kept in full precision unless include names it",
        ),
        (mlp, {"exclude": ["2"]}, "name layers with include, or exclude fewer"),
    ],
)
def test_an_empty_plan_is_an_error(build, settings, fragment):
    """When nothing is left to quantize the error gives the layers' reasons."""
    with pytest.raises(PlanError) as error:
        plan(build(), 2, **settings)
    assert fragment in str(error.value)


def test_linear_layers_that_share_a_weight():
    """Two Linear layers with one weight are one entry, counted once and quantized together."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    model[2].weight = model[1].weight
    result = plan(model, 2)
    assert [layer.names for layer in result.layers] == [("0",), ("1", "2"), ("3",)]
    assert result.layers[1].note == "weight shared by 2"
    assert result.layers[1].parameters == 16 + 4 + 4  # one weight, two biases
    assert result.quantized_parameters == 16
    assert result.total_parameters == sum(p.numel() for p in model.parameters())
    apply(model, result)
    assert isinstance(model[2], QuantizedLayer)
    assert model[1].weight is model[2].weight
    assert torch.equal(model[1].weight_scale, model[2].weight_scale)
    assert list(quantized_layers(model)) == ["1"]


def test_a_share_of_the_last_layers_weight_is_the_last_layer():
    """A weight that the last layer uses too stays float wherever it is used."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    model[3].weight = model[1].weight
    result = plan(model, 2)
    assert names(result) == ["2"]
    assert notes(result)["1"] == "last layer, kept in full precision; weight shared by 3"


def test_a_head_tied_to_an_embedding_stays_float_by_default():
    """The weight that an Embedding reads is not quantized unasked, and the table says why."""
    result = plan(tiny_llama(), 2)
    tied = next(layer for layer in result.layers if "lm_head" in layer.names)
    assert tied.names == ("model.embed_tokens", "lm_head")
    assert tied.grid is None
    assert tied.note == (
        "an embedding, kept in full precision unless include names it; weight shared by lm_head"
    )
    assert tied.parameters == 60 * 16


@pytest.mark.parametrize("include", ["*", "lm_head", "model.embed_tokens"])
def test_a_named_embedding_is_quantized_once_with_the_head_tied_to_it(include):
    """Either name selects the weight; both users see it, with one scale a row."""
    model = tiny_llama()
    result = quantize(model, 2, include=[include])
    entries = [layer for layer in result.quantized if "lm_head" in layer.names]
    assert [layer.note for layer in entries] == ["weight shared by lm_head"]
    embedding, head = model.model.embed_tokens, model.lm_head
    assert isinstance(embedding, QuantizedLayer)
    assert isinstance(head, QuantizedLayer)
    assert embedding.weight is head.weight
    assert embedding.weight_scale.shape == (60, 1)
    assert torch.equal(embedding.weight_scale, head.weight_scale)


def test_everything_but_the_head():
    """`include="*"` with an exclude is everything with the embedding, and the last layer float."""
    result = plan(tiny_llama(tied=False), 2, include=["*"], exclude=["lm_head"])
    assert "model.embed_tokens" in names(result)
    assert notes(result)["lm_head"] == "excluded by 'lm_head'"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"max_norm": 1.0}, "max_norm rescales its weight in place"),
        ({"sparse": True}, "its gradients are sparse"),
    ],
)
def test_embeddings_that_cannot_be_quantized(settings, reason):
    """A table that changes itself, or is trained row by row, stays float even when it is named."""
    model = nn.Sequential(nn.Embedding(9, 4, **settings), nn.Linear(4, 4))
    assert notes(plan(model, 2, include=["*"]))["0"] == reason


def test_embeddings_with_a_forward_of_their_own():
    """A scaled embedding is linear in its weight; one that takes other inputs is left alone."""

    class Scaled(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * 3.0

    class Normalised(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return nn.functional.normalize(super().forward(ids), dim=-1)

    model = nn.Sequential(Scaled(9, 4), Normalised(9, 4), nn.Linear(4, 4))
    result = plan(model, 2, include=["*"])
    assert names(result) == ["0", "2"]
    assert notes(result)["1"] == "Normalised transforms its weight before use"


def test_excluding_one_name_of_a_shared_weight_excludes_it():
    """A weight cannot be quantized in one place and float in another."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    model[2].weight = model[1].weight
    assert names(plan(model, 2, exclude=["2"])) == ["3"]
    assert names(plan(model, 2, include=["2", "3"])) == ["1", "3"]


def test_a_module_used_twice_is_one_layer():
    """A module that appears under two names is listed and counted once."""
    shared = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(4, 4), shared, nn.ReLU(), shared, nn.Linear(4, 2))
    result = plan(model, 2)
    assert [layer.names for layer in result.layers] == [("0",), ("1",), ("4",)]
    assert result.total_parameters == sum(p.numel() for p in model.parameters())
    apply(model, result)
    assert model[1] is model[3]
    assert isinstance(model[3], QuantizedLayer)


def test_a_shared_bias_is_counted_once():
    """Parameters other than the weight may be shared too, without being counted twice."""
    model = mlp()
    model.append(nn.Linear(2, 2))
    model[4].bias = model[3].bias
    result = plan(model, 2)
    assert result.total_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", [StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame])
@pytest.mark.parametrize("settings", [{}, {"groups": 2, "stride": 2}, {"bias": False}])
def test_weight_standardised_convolutions_stay_float(kind, settings):
    """A conv that standardises its weight multiplies by other values than the snapped ones."""
    result = plan(between(kind(4, 4, 3, **settings)), 2)
    assert notes(result)["1"] == f"{kind.__name__} transforms its weight before use"
    assert names(result) == ["2"]


@pytest.mark.parametrize(
    "parametrize",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_parametrized_layers_stay_float(parametrize, bias):
    """A weight computed from other parameters is left alone, with a reason that says so."""
    model = between(parametrize(nn.Linear(4, 4, bias=bias)))
    result = plan(model, 2)
    assert names(result) == ["2"]
    assert any(
        name.startswith("1") and "computed" in note for name, note in notes(result).items()
    ), notes(result)
    assert result.total_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_ends_that_are_parametrized_are_the_ends(norm):
    """No inner layer is taken for the first or the last one in their place."""
    inner = [nn.Linear(4, 4) for _ in range(3)]
    model = nn.Sequential(norm(nn.Linear(4, 4, bias=False)), *inner, norm(nn.Linear(4, 2)))
    assert names(plan(model, 2)) == ["1", "2", "3"]


@pytest.mark.parametrize("key", ["include", "exclude"])
def test_patterns_that_are_no_list(key):
    """Neither one pattern nor None is a list of patterns."""
    for given in ("0", None):
        with pytest.raises(RecipeError, match=f"{key} = {given!r} must be a list of patterns"):
            plan(between(nn.Linear(4, 4)), 2, **{key: given})


@pytest.mark.parametrize("kind", [ScaledStdConv2d, ScaledStdConv2dSame])
def test_a_gain_that_begins_at_zero_hides_nothing(kind):
    """The last convolution of a block of NFNet gives zeros at first, linear in anything."""
    result = plan(between(kind(4, 4, 3, gain_init=0.0)), 2)
    assert notes(result)["1"] == f"{kind.__name__} transforms its weight before use"


def test_an_output_that_is_always_zero_shows_nothing():
    """A layer that is switched off cannot be seen to be linear."""

    class Off(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0 * super().forward(x)

    assert "cannot be seen by a call" in notes(plan(between(Off(4, 4)), 2))["1"]


def test_an_own_forward_that_is_linear_in_the_weight_is_quantized():
    """A subclass with another forward is probed: a linear use of the weight passes."""

    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0.3 * super().forward(x)

    class Normalised(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight / self.weight.norm(), self.bias)

    class TwoInputs(nn.Linear):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return super().forward(x + y)

    assert names(plan(between(Scaled(4, 4)), 2)) == ["1", "2"]
    assert notes(plan(between(Normalised(4, 4)), 2))["1"] == (
        "Normalised transforms its weight before use"
    )
    assert notes(plan(between(TwoInputs(4, 4)), 2))["1"] == (
        "TwoInputs has a forward of its own, whose use of the weight cannot be seen by a call"
    )


@pytest.mark.parametrize("name", ["weight_scale", "input_scale", "strength", "grid", "latent"])
@pytest.mark.parametrize("kind", ["buffer", "attribute"])
def test_a_layer_with_an_attribute_of_that_name_stays_float(kind, name):
    """Its own scale, say, would be replaced by the grid's, and its output be another one."""

    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            if kind == "buffer":
                self.register_buffer(name, torch.ones(4))
            else:
                setattr(self, name, 2.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * getattr(self, name)

    reason = f"it has an attribute {name}, a name that a quantized layer uses"
    assert notes(plan(between(Scaled()), 2))["1"] == reason
    assert notes(plan(nn.Sequential(Scaled(), Scaled(), mlp()), 2))["1"] == reason
    attention = nn.MultiheadAttention(4, 2)
    attention.register_buffer("in_proj_weight_scale", torch.ones(4))
    planned = plan(nn.Sequential(mlp(), attention, mlp()), 2)
    assert [layer.note for layer in planned.layers if layer.leaves == ("in_proj_weight",)] == [
        "it has an attribute in_proj_weight_scale, a name that a quantized layer uses"
    ]


def test_timms_same_padding_is_quantized():
    """EfficientNet's Conv2dSame has its own forward, which is linear in the weight."""
    model = timm.create_model("tf_efficientnet_b0")
    kinds = {layer.kind for layer in plan(model, 4).quantized}
    assert "Conv2dSame" in kinds


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_weights_stays_float(shape):
    """Pruned away, or an expert of none, it leaves nothing to fit a scale to."""
    result = plan(between(nn.Linear(*shape)), 2)
    assert notes(result)["1"] == "it has no weights"
    assert names(result) == ["2"]


def test_what_is_no_linear_layer_is_named_with_its_kind():
    """Modules with another kind of weight matrix stay float, and the table names their class."""
    model = nn.Sequential(
        nn.Linear(4, 4), nn.LSTM(4, 4), nn.Bilinear(4, 4, 4), nn.BatchNorm2d(4),
        nn.Linear(4, 4), nn.Linear(4, 2),
    )  # fmt: skip
    assert notes(plan(model, 2)) == {
        "0": "first layer, kept in full precision",
        "1": "LSTM is no layer that askewq knows (docs/methods.md)",
        "2": "Bilinear is no layer that askewq knows (docs/methods.md)",
        "3": "no weight matrix",
        "5": "last layer, kept in full precision",
    }


def test_groups_that_do_not_divide_fall_back_to_channels():
    """A layer whose rows the group size does not divide gets a scale per channel, and a note."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 2)
    )
    result = plan(model, 2, group_size=8)
    assert [(layer.names[0], layer.group_size, layer.note) for layer in result.quantized] == [
        ("1", 8, ""),
        ("2", "channel", "scale per channel: 8 does not divide 9"),
    ]
    apply(model, result)
    assert model[1].weight_scale.shape == (8, 9)
    assert model[2].weight_scale.shape == (8, 1)


def test_groups_that_divide_no_row_are_refused():
    """The size would decide nothing."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 2)
    )
    with pytest.raises(
        PlanError, match=r"group_size = 7 divides the rows of no .* have 8, 72 weigh"
    ):
        plan(model, 2, group_size=7)
    assert plan(model, 2, group_size=9).quantized[0].group_size == 9
    attention = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(12, 2), nn.Linear(4, 4))
    with pytest.raises(PlanError, match=r"which have 12 weights"):
        plan(attention, 2, group_size=36)


def test_applied_without_fitting():
    """Scales of 1, of the shape that the plan says, for weights that are filled in later."""
    model = mlp()
    result = plan(model, 2)
    with torch.no_grad():
        for layer in result.quantized:
            model.get_submodule(layer.names[0]).weight.zero_()
    apply(model, result, fit=False)
    for layer in quantized_layers(model).values():
        assert torch.equal(layer.weight_scale, torch.ones(len(layer.latent), 1))


COUNTED = {
    "resnet18": lambda: timm.create_model("resnet18"),
    "vit_tiny_patch16_224": lambda: timm.create_model("vit_tiny_patch16_224"),
    "efficientnet_b0": lambda: timm.create_model("efficientnet_b0"),
    "nfnet_l0": lambda: timm.create_model("nfnet_l0"),
    "test_byobnet": lambda: timm.create_model("test_byobnet"),
    "BERT": tiny_bert,
    "Llama, tied": tiny_llama,
    "Llama, untied": lambda: tiny_llama(tied=False),
    "GPT-2": lambda: tiny_gpt2(),
    "T5": tiny_t5,
    "ViT": tiny_vit,
    "attention": lambda: between(nn.MultiheadAttention(4, 2)),
    "recurrent": lambda: between(nn.LSTM(4, 4)),
}


@pytest.mark.parametrize("build", COUNTED.values(), ids=COUNTED.keys())
def test_every_parameter_is_counted_once(build):
    """The table's parameters add up to the model's, tied and unusual ones included."""
    model = build()
    result = plan(model, 2)
    assert result.total_parameters == sum(p.numel() for p in model.parameters())
    by_name = dict(model.named_modules())
    weights = {
        id(by_name[layer.names[0]].get_parameter(layer.leaves[0])): layer.weights
        for layer in result.quantized
    }
    assert len(weights) == len(result.quantized)
    assert result.quantized_parameters == sum(weights.values())
    assert all(layer.note or layer.grid for layer in result.layers), (
        "a layer left in float needs a reason"
    )
    listed = {name for layer in result.layers for name in layer.names}
    owners = {n for n, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))}
    assert listed == owners


@pytest.mark.parametrize(
    ("build", "least"),
    [
        (lambda: timm.create_model("resnet18"), 0.95),
        (lambda: timm.create_model("vit_tiny_patch16_224"), 0.9),
        (tiny_bert, 0.6),
    ],
)
def test_most_of_a_model_is_quantized(build, least):
    """The default plan covers most parameters of the usual models."""
    result = plan(build(), 2)
    assert result.quantized_parameters / result.total_parameters > least


def tiny_gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=60, n_positions=20, n_embd=16, n_layer=1, n_head=2)
    )


@pytest.mark.parametrize(("group_size", "scales"), [("channel", 1), (4, 4), ("tensor", None)])
def test_conv1d_has_its_output_channels_last(group_size, scales):
    """The scales of GPT-2's [in, out] weights belong to outputs: those of the transposed Linear."""
    model = tiny_gpt2()
    weight = model.transformer.h[0].attn.c_attn.weight.detach().clone()
    result = quantize(model, 2, group_size=group_size)
    assert names(result) == [
        f"transformer.h.0.{name}"
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    layer = model.transformer.h[0].attn.c_attn
    assert layer.weight_scale.shape == ((1, 1) if scales is None else (48, scales))
    assert torch.equal(layer.weight_scale, fit_scale(weight.t(), make_grid(2), group_size))
    for planned in result.quantized:
        scale = model.get_submodule(planned.names[0]).weight_scale
        assert planned.packed_bytes == planned.weights // 4 + 4 * scale.numel()


def test_layers_that_disagree_about_channels_cannot_share():
    """A square weight of a Linear and a Conv1D would need scales of both dimensions."""
    model = between(nn.Linear(4, 4))
    conv = transformers.pytorch_utils.Conv1D(4, 4)
    conv.weight = model[1].weight
    result = plan(nn.Sequential(*model, conv, nn.Linear(4, 4)), 2)
    assert notes(result)["1"].startswith("shared by layers whose output channels are different")


def test_a_shared_weight_is_called_by_the_first_of_its_layers():
    """In tables, and in the recipe that `askewq plan` writes."""
    first, *_ = plan(tiny_llama(), 2, include=["*"]).quantized
    assert (first.label, first.kind) == ("model.embed_tokens", "Embedding")
    assert first.note == "weight shared by lm_head"


def test_attention_weights_outside_a_linear_layer_are_quantized():
    """The input projection of nn.MultiheadAttention is a weight like that of its output."""
    result = plan(between(nn.MultiheadAttention(4, 2)), 2)
    assert [layer.label for layer in result.quantized] == ["1.in_proj_weight", "1.out_proj", "2"]
    assert notes(result).keys() == {"0", "3"}


def test_attention_with_a_forward_of_its_own_is_named():
    """What a subclass does with the projections cannot be seen from outside."""

    class Scaled(nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    result = plan(between(Scaled(4, 2)), 2)
    assert notes(result)["1"].startswith("Scaled has a forward of its own, whose use of the weight")


@pytest.mark.parametrize("bits", [1, "ternary", 2, 3, 8])
@pytest.mark.parametrize("group_size", ["tensor", "channel", 16, 4])
def test_predicted_bytes(bits, group_size):
    """Codes at b bits, a float32 per scale and four bytes for every other parameter."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 5), nn.Linear(5, 3))
    result = plan(model, bits, group_size=group_size)
    out, groups = scale_shape(torch.Size((5, 16)), group_size)
    codes = packed_size(80, bits)
    rest = sum(p.numel() for p in model.parameters()) - 80
    assert result.layers[1].packed_bytes == codes + 4 * out * groups
    assert result.layers[0].packed_bytes == 0
    assert result.predicted_bytes == codes + 4 * out * groups + 4 * rest
    assert result.bits_per_weight == pytest.approx(8 * (codes + 4 * out * groups) / 80)


@pytest.mark.parametrize(
    ("spoil", "fragment"),
    [
        (lambda layer: layer.half(), "2.weight is torch.float16; low-bit training needs float32"),
        (lambda layer: layer.bfloat16(), "call model.float() first and use bf16 through autocast"),
        (
            lambda layer: nn.init.constant_(layer.weight, torch.nan),
            "2.weight holds NaN or infinite values; check the file",
        ),
        (
            lambda layer: nn.init.constant_(layer.weight, torch.inf),
            "2.weight holds NaN or infinite values",
        ),
    ],
)
def test_weights_that_cannot_be_trained(spoil, fragment):
    """Half-precision masters and weights that are not finite are refused, by name."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    spoil(model[2])
    with pytest.raises(ModelError) as error:
        apply(model, plan(model, 2))
    assert fragment in str(error.value)


def test_a_refused_model_is_left_as_it_was():
    """When a later layer is refused the earlier ones are not quantized either."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    model[2].half()
    with pytest.raises(ModelError):
        quantize(model, 2)
    assert list(quantized_layers(model)) == []


def test_quantizing_twice_is_refused():
    """A model that is quantized already is an error of ours, and stays usable."""
    model = mlp()
    quantize(model, 2)
    scale = model[2].weight_scale.clone()
    with pytest.raises(AskewError):
        quantize(model, 4)
    assert model[2].grid == make_grid(2)
    assert torch.equal(model[2].weight_scale, scale)


def test_float64_masters_keep_float64_scales():
    """A double-precision model is quantized with double-precision scales."""
    model = mlp().double()
    quantize(model, 2)
    assert model[2].weight_scale.dtype == torch.float64


def test_a_layer_without_a_shape_yet_is_refused_in_words():
    """A lazy layer is named, with what to do."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3), nn.Linear(3, 3))
    with pytest.raises(PlanError, match=r"1\.weight has no shape yet .* call the model on a batch"):
        plan(model, 2)


def test_overrides_give_other_bits():
    """Layers that match get the width of the override, out of those that get a grid at all."""
    model = timm.create_model("test_resnet")
    overrides = {"layer1.*": 4, "layer2.0.conv1": "ternary", "layer1.0.conv1": 4}
    result = quantize(model, 2, bits_override=overrides)
    bits = {layer.names[0]: layer.grid.bits for layer in result.quantized}
    assert {width for name, width in bits.items() if name.startswith("layer1.")} == {4}
    assert bits["layer2.0.conv1"] == "ternary"
    assert bits["layer2.0.conv2"] == 2
    assert model.layer1[0].conv1.grid == make_grid(4)
    assert (
        result.quantized_parameters
        == plan(timm.create_model("test_resnet"), 2).quantized_parameters
    )


def test_an_override_matches_any_name_of_a_shared_weight():
    """A weight has one width, whichever of its layers is named."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    model[2].weight = model[1].weight
    result = plan(model, 2, bits_override={"2": 8})
    assert [layer.grid.bits for layer in result.quantized] == [8, 2]


def test_half_integers_are_for_the_widths_that_have_them():
    """Beside them an override may ask for a width with one grid only."""
    result = plan(mlp(), 2, grid="half-integer", include=["*"], bits_override={"2": 1, "3": 4})
    grids = {layer.names[0]: layer.grid for layer in result.quantized}
    assert grids["2"] == make_grid(1)
    assert grids["3"] == make_grid(4, "half-integer")
    assert grids["0"] == make_grid(2, "half-integer")


def test_by_default_2_bits_are_half_integers():
    """And no other width is."""
    result = plan(mlp(), 2, include=["*"], bits_override={"2": 3, "3": 4})
    first = {layer.names[0]: layer.grid.first for layer in result.quantized}
    assert (first["0"], first["2"], first["3"]) == (-1.5, -4.0, -8.0)


@pytest.mark.parametrize(
    ("settings", "kind", "fragment"),
    [
        (
            {"bits_override": ["2=8"]},
            RecipeError,
            "must name the bits of patterns: {'layer4.*': 4}",
        ),
        ({"bits_override": {"4": 8}}, PlanError, "the pattern '4' matches no layer"),
        (
            {"bits_override": {"3": 8}},
            PlanError,
            "the override 3=8 changes nothing, because what it matches stays float (3: last layer, "
            "kept in full precision); an override says how many bits a quantized layer gets, and "
            "include says which layers are quantized",
        ),
        ({"bits_override": {"1": 8}}, PlanError, "(1: no weight matrix)"),
        ({"bits_override": {"2": 8}, "exclude": ["2"], "include": ["*"]}, PlanError, "excluded by"),
        (
            {"bits_override": {"2": 8, "[2]": 4}},
            PlanError,
            "the overrides 2=8 and [2]=4 contradict each other on 2",
        ),
        ({"bits_override": {"2": 9}}, RecipeError, "the override 2=9: bits = 9 is not a width"),
    ],
)
def test_overrides_that_cannot_be(settings, kind, fragment):
    """What matches nothing, changes nothing or contradicts is refused with what to do."""
    with pytest.raises(kind) as error:
        plan(mlp(), 2, **settings)
    assert fragment in str(error.value)


def test_transposed_and_plain_convolutions_cannot_share():
    """They count output channels by different dimensions of the weight."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3))
    model[1].weight = model[0].weight
    assert "different dimensions" in plan_error(model)


def plan_error(model: nn.Module) -> str:
    """Return why nothing of a model can be quantized."""
    with pytest.raises(PlanError) as error:
        plan(model, 2, include=["*"])
    return str(error.value)


def test_groups_of_a_transposed_convolution():
    """A group size divides the weights of one output channel, within its group of inputs."""
    model = nn.ModuleList([nn.ConvTranspose1d(8, 6, 2, groups=2), nn.Linear(3, 4)])
    by_size = {
        n: plan(model, 2, group_size=n, include=["*"]).quantized[0] for n in (4, 3, "tensor")
    }
    assert [(la.group_size, la.note) for la in by_size.values()] == [
        (4, ""),
        (8, "scale per channel: 3 does not divide 8"),
        ("tensor", ""),
    ]


def test_what_cannot_be_trained_says_what_to_exclude():
    """The layer with values that are not finite is named, with the flag that leaves it alone."""
    model = mlp()
    nn.init.constant_(model[2].weight, torch.nan)
    with pytest.raises(ModelError, match="exclude this layer with --exclude '2'"):
        quantize(model, 2)


def test_extra_state_is_refused_before_training():
    """A packed file holds tensors alone."""

    class Counting(nn.Linear):
        def get_extra_state(self):
            return {"calls": 3}

    model = nn.Sequential(nn.Linear(4, 4), Counting(4, 4), nn.Linear(4, 4))
    with pytest.raises(PlanError, match="1 keeps extra state beside its tensors"):
        plan(model, 2)


@pytest.mark.parametrize("key", ["include", "exclude"])
def test_a_text_is_no_list_of_patterns(key):
    """Each of its characters would be one."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(30)))
    with pytest.raises(RecipeError, match=f"{key} = '24' must be a list of patterns"):
        plan(model, 2, **{key: "24"})


def test_a_pattern_that_names_only_what_stays_float():
    """It is refused, with the reason; one that is excluded again, or names others too, is not."""
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "lstm": nn.LSTM(4, 4), "b": nn.Linear(4, 4)})
    with pytest.raises(PlanError, match="include 'lstm': lstm cannot be quantized: LSTM is no lay"):
        plan(model, 2, include=["a", "lstm"])
    assert len(plan(model, 2, include=["*"]).quantized) == 2
    assert len(plan(model, 2, include=["a", "b"], exclude=["b"]).quantized) == 1


def test_a_weight_that_another_module_holds_stays_float():
    """Its forward would see the weight as it was before any interval."""

    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1))
            self.lin = nn.Linear(4, 4)
            self.w = self.lin.weight

        def forward(self, x):
            return nn.functional.linear(x, self.w) * self.gain

    model = nn.Sequential(nn.Linear(4, 4), Gain(), nn.Linear(4, 4), nn.Linear(4, 4))
    found = {layer.label: layer for layer in plan(model, 2).layers}
    assert found["1.lin"].grid is None
    assert found["1.lin"].note == "1 holds it too, as w, and would see it unrounded"
    assert found["2"].grid is not None


class TestApply:
    def test_zeros_have_no_scale(self):
        """A layer that begins at zero would stay there."""
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
        nn.init.zeros_(model[1].weight)
        with pytest.raises(ModelError, match=r"1\.weight is all zeros.*--exclude '1'"):
            quantize(model, 2)
        assert not quantized_layers(model)

    def test_twice(self):
        """As a notebook's cell that is run again."""
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
        chosen = plan(model, 2)
        apply(model, chosen)
        with pytest.raises(PlanError, match="quantized already"):
            apply(model, chosen)

    def test_packed_weights(self, tmp_path):
        """They are codes, and what would be saved of the rest could not be read."""
        model = mlp()
        quantize(model, 2)
        snap_(model)
        askewq.save(model, tmp_path)
        loaded = askewq.load(tmp_path, model=mlp(), packed=True)
        with pytest.raises(PlanError, match=r"packed.*without packed=True"):
            quantize(loaded, 8, include=["*"])

    def test_a_model_without_values(self):
        """It can be planned, and not be fitted to."""
        with torch.device("meta"):
            model = mlp()
        assert plan(model, 2).quantized
        with pytest.raises(ModelError, match=r"weight is on the meta device"):
            quantize(model, 2)

    def test_inference_mode_does_not_last(self):
        """What is quantized in it is trained outside."""
        model = mlp()
        with torch.inference_mode():
            quantize(model, 2)
        assert not any(layer.weight_scale.is_inference() for layer in quantized_modules(model))

    def test_a_tie_that_the_model_does_not_have(self):
        """One scale would be given to two weights."""
        tied, untied = (nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))) for _ in range(2))
        tied[2].weight = tied[1].weight
        with pytest.raises(PlanError, match="one weight for 1 and 2, and the model 2"):
            apply(untied, plan(tied, 2))
        assert not quantized_layers(untied)

    @pytest.mark.parametrize(
        ("other", "words"),
        [
            (nn.Sequential(nn.Linear(4, 4)), "at '1', where the model has none"),
            (nn.Sequential(*(nn.Linear(5, 4) for _ in range(3))), r"a Linear of shape \[4, 5\]"),
            (nn.Sequential(nn.ReLU(), nn.ReLU()), "at '1', where the model has none"),
        ],
        ids=["shorter", "another shape", "no weight"],
    )
    def test_the_plan_of_another_model(self, other, words):
        """Nothing of it is touched."""
        chosen = plan(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), 2)
        with pytest.raises(PlanError, match=words):
            apply(other, chosen)
        assert not quantized_layers(other)

    def test_channels_along_another_dimension(self):
        """The scales would be fitted to the wrong rows."""
        chosen = plan(between(nn.Conv2d(4, 4, 3)), 2)
        with pytest.raises(PlanError, match="where the model has a ConvTranspose2d of shape"):
            apply(between(nn.ConvTranspose2d(4, 4, 3)), chosen)

    def test_a_weight_that_the_model_shares(self):
        """It cannot have two grids."""
        chosen = plan(alike(4), 2, bits_override={"2": 8})
        tied = alike(4)
        tied[2].weight = tied[1].weight
        with pytest.raises(PlanError, match=r"a weight for 1\.weight and one for 2\.weight"):
            apply(tied, chosen)


def test_a_forward_of_the_object():
    """One that is put in the place of the class's counts as one of its own."""
    model = alike(4)
    for index, gain in ((1, 1.0), (2, None)):
        layer = model[index]
        layer.forward = lambda x, layer=layer, gain=gain: nn.functional.linear(
            x, layer.weight * (gain or 1 / layer.weight.std()), layer.bias
        )
    chosen = plan(model, 2)
    assert [layer.names for layer in chosen.quantized] == [("1",)]
    (refused,) = (layer for layer in chosen.layers if layer.names == ("2",))
    assert refused.note == "Linear transforms its weight before use"


def test_a_graph_of_torch_fx_keeps_the_layers():
    """As torchvision's feature extractors make one."""
    model = alike(4)
    quantize(model, 2)
    traced = torch.fx.symbolic_trace(model)
    assert quantized_layers(traced).keys() == quantized_layers(model).keys()
    x = torch.randn(3, 4)
    with torch.no_grad():
        before = model(x)
        snap_(traced)
        assert torch.equal(traced(x), model(x))
        assert not torch.equal(traced(x), before)


def test_planning_merges_no_adapter():
    """Some layers add theirs to the weight in eval() and take it away in train()."""

    class Adapted(nn.Linear):
        def train(self, mode=True):
            if mode != self.training:
                self.weight.data += -1 if mode else 1
            return super().train(mode)

        def forward(self, x):
            return nn.functional.linear(x, self.weight)

    model = nn.Sequential(nn.Linear(4, 4), Adapted(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    before = model[1].weight.detach().clone()
    plan(model, 2)
    assert torch.equal(model[1].weight, before)
    assert model[1].training


def test_a_forward_that_asserts():
    """What a stranger's layer asks of its input does not end the plan."""

    class Sequences(nn.Linear):
        def forward(self, x):
            assert x.dim() == 3
            return super().forward(x)

    model = nn.Sequential(nn.Linear(4, 4), Sequences(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    assert "2" in {layer.label for layer in plan(model, 2).quantized}


def test_a_network_whose_timm_configuration_is_none():
    """As of a module that was taken out of timm's: its head is the last layer."""
    model = mlp()
    model.pretrained_cfg = None
    assert grids_of(plan(model, 2)) == grids_of(plan(mlp(), 2))


def grids_of(result):
    return {layer.label: layer.grid for layer in result.layers}
