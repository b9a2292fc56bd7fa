"""askewq plan: the recipe that it writes, the budgets that it keeps, and what it refuses."""

import json
import math
import re
import shlex
import shutil
from importlib.util import find_spec

import builders
import pytest
import torch
import yaml
from builders import command, files
from safetensors.torch import save_file

from askewq import checkpoint, config, planning, sensitivity, wrap
from askewq.errors import RecipeError


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of the own module, as if it had been trained."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "own.safetensors"
    save_file(builders.own_network("small").state_dict(), path)
    return path


@pytest.fixture
def words(weights, tmp_path):
    """The flags of a plan for the own module."""
    settings = builders.SETTINGS["own"]()
    flags = [w for key in ("model", "dataset") for w in (f"--{key}", settings[key])]
    return [*flags, "--weights", weights, "--samples", 24, "--output", tmp_path / "plan"]


def bits_of(artifact):
    """Return the bits of every packed weight."""
    return {
        name.removesuffix(".weight"): weight.grid.bits
        for name, weight in checkpoint.read(artifact / "model.safetensors").weights.items()
    }


@pytest.mark.parametrize(
    ("estimate", "grid"), [("measured", "half-integer"), ("estimated", "integer")]
)
def test_the_recipe_trains_what_was_planned(words, tmp_path, estimate, grid):
    """The artifact has the bits that the plan chose, within the budget."""
    flags = ["--average-bits", 3, "--sensitivity", estimate, "--grid", grid, "--include", "*"]
    outcome = command("plan", *words, *flags)
    assert outcome.code == 0, outcome.err
    folder = tmp_path / "plan"
    assert files(folder) == {"recipe.yaml", "sensitivity.json", "sensitivity.png"}
    figures = json.loads((folder / "sensitivity.json").read_text())
    chosen = {name: layer["bits"] for name, layer in figures["layers"].items()}
    out = tmp_path / "out"
    run = ["--recipe", folder / "recipe.yaml", "--max-steps", 2, "--batch-size", 8]
    outcome = command("finetune", *run, "--output", out)
    assert outcome.code == 0, outcome.err
    assert bits_of(out) == chosen
    card = (out / "README.md").read_text()
    assert ("at mixed bits\n" in card) == (len(set(chosen.values())) > 1)
    assert ("- mixed-bits\n" in card) == (len(set(chosen.values())) > 1)
    codes = [w.codes.nbytes for w in checkpoint.read(out / "model.safetensors").weights.values()]
    total = sum(layer["weights"] for layer in figures["layers"].values())
    assert 8 * sum(codes) <= 3 * total
    assert sum(codes) == sum(
        layer["code_bytes"][str(layer["bits"])] for layer in figures["layers"].values()
    )


@pytest.mark.parametrize("bits", [1.7, 8])
def test_what_was_found_is_what_is_assigned(words, tmp_path, bits):
    """The widths are the best ones for the figures that are written."""
    assert command("plan", *words, "--average-bits", bits).code == 0
    figures = json.loads((tmp_path / "plan" / "sensitivity.json").read_text())
    layers = list(figures["layers"].values())
    found = sensitivity.Sensitivity(
        (None,) * len(layers),
        planning.CANDIDATES,
        torch.tensor([list(x["increase"].values()) for x in layers], dtype=torch.float64),
        torch.tensor([list(x["code_bytes"].values()) for x in layers]),
    )
    budget = int(sum(layer["weights"] for layer in layers) * bits / 8)
    assert [layer["bits"] for layer in layers] == list(sensitivity.assign(found, budget))


@pytest.mark.parametrize("kind", ["own", "vit", "llama"])
def test_what_is_beside_codes_is_not_underestimated(kind):
    """Scales, buffers, float layers and the header; on larger models the header counts little."""
    folder, _ = builders.finished(kind)
    packed = checkpoint.read(folder / "model.safetensors").weights.values()
    actual = (folder / "model.safetensors").stat().st_size - sum(w.codes.nbytes for w in packed)
    model = builders.untrained(kind).model
    include = builders.SETTINGS[kind]().get("include", [])
    bound = planning.bytes_beside_codes(model, wrap.plan(model, 2, include=include))
    assert actual <= bound < actual + 100 + 120 * len(model.state_dict())


def test_what_is_beside_codes_with_rounded_inputs(tmp_path):
    """Their scales and entries count, too."""
    builders.finetune("llama", tmp_path, act_bits=4)
    stored = checkpoint.read(tmp_path / "model.safetensors")
    codes = sum(w.codes.nbytes for w in stored.weights.values())
    actual = (tmp_path / "model.safetensors").stat().st_size - codes
    model = builders.untrained("llama").model
    assert stored.inputs
    bounds = [
        planning.bytes_beside_codes(model, wrap.plan(model, 2, act_bits=act_bits))
        for act_bits in ("none", 4)
    ]
    assert bounds[1] - bounds[0] > 150 * len(stored.inputs)
    assert actual <= bounds[1] < actual + 100 + 200 * len(model.state_dict())


def test_the_artifact_is_no_larger_than_the_size(words, tmp_path):
    """As a user runs it."""
    assert command("plan", *words, "--size", "4 kB").code == 0
    out = tmp_path / "out"
    run = ["--recipe", tmp_path / "plan" / "recipe.yaml", "--max-steps", 1, "--batch-size", 8]
    assert command("finetune", *run, "--output", out).code == 0
    assert (out / "model.safetensors").stat().st_size <= 4_000


def test_the_same_command_finds_the_same(words, tmp_path):
    """The samples are drawn from the seed."""
    texts = []
    for name in ("one", "two"):
        again = [*words[:-1], tmp_path / name]
        assert command("plan", *again, "--average-bits", 2).code == 0
        texts.append((tmp_path / name / "sensitivity.json").read_text())
    assert texts[0] == texts[1]


def flags_of(kind):
    """Return the flags of a short run."""
    settings = builders.SETTINGS[kind]()
    settings.pop("pretrained", None)
    return [w for k, v in settings.items() for w in (f"--{k.replace('_', '-')}", v)]


def test_a_language_model(tmp_path):
    """Any task has a loss."""
    words = [*flags_of("llama"), "--average-bits", 4, "--output", tmp_path / "plan"]
    outcome = command("plan", *words, "--sensitivity", "estimated")
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("kind", ["bert-pairs", "timm"])
def test_a_model_that_was_not_trained_for_the_data(tmp_path, kind):
    """A head that is new, or random weights, have no sensitivity."""
    more = ["--no-pretrained"] if kind == "timm" else []
    words = [*flags_of(kind), *more, "--average-bits", 4, "--output", tmp_path / "plan"]
    outcome = command("plan", *words)
    assert outcome.code == 2
    assert "was not trained for this data" in outcome.err
    assert "--weights" in outcome.err


BAD = {
    "no budget": ([], "--average-bits .* or --size"),
    "two budgets": (["--average-bits", 2, "--size", "1MB"], "one budget"),
    "a budget of nothing": (["--average-bits", 0], "above 0"),
    "an average that is too low": (["--average-bits", 0.9], "the least is 1\\."),
    "a size that is too small": (["--size", "1kB"], "cannot be met.* [0-9]+kB can"),
    "no unit": (["--size", "10"], "a number and a unit"),
    "an unknown unit": (["--size", "10XB"], "kB, MB, GB"),
    "one candidate": (["--average-bits", 2, "--candidates", 2], "two widths"),
    "an unknown candidate": (["--average-bits", 2, "--candidates", 2, 9], "candidates"),
    "bits of another method": (
        ["--average-bits", 2, "--method", "adaste"],
        "adaste trains 1 bit, not the candidate ternary; give others",
    ),
    "no samples": (["--average-bits", 2, "--batch-size", 0], "batch_size"),
    "nothing matches": (["--average-bits", 2, "--include", "nothing"], "matches no layer"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(words, tmp_path, name):
    """One clear message, exit code 2, and nothing is written."""
    flags, pattern = BAD[name]
    outcome = command("plan", *words, *flags)
    assert outcome.code == 2
    assert re.search(pattern, outcome.err), outcome.err
    assert not (tmp_path / "plan").exists()
    assert not list(tmp_path.glob("*.partial*"))


def test_the_nearest_budget_can_be_met(words):
    """What the message names is accepted."""
    outcome = command("plan", *words, "--size", "1kB")
    nearest = re.search(r"cannot be met: .* ([0-9]+kB) can\.", outcome.err)[1]
    assert command("plan", *words, "--size", nearest).code == 0


def test_the_next_command_can_be_pasted(words, tmp_path):
    """Whatever the folder is called."""
    place = words.index("--output") + 1
    folder = tmp_path / "my plan"
    outcome = command("plan", *words[:place], folder, *words[place + 1 :], "--average-bits", 2)
    *_, last = outcome.out.strip().splitlines()
    assert shlex.split(last) == [
        *("askewq", "finetune", "--recipe", str(folder / "recipe.yaml")),
        *("--output", str(folder / "run")),
    ]


def test_an_output_that_is_there(words, tmp_path):
    """Nothing is replaced; an empty folder is used."""
    folder = tmp_path / "plan"
    folder.mkdir()
    (folder / "mine").write_text("x")
    outcome = command("plan", *words, "--average-bits", 2)
    assert (outcome.code, files(folder)) == (2, {"mine"})
    place = words.index("--output") + 1
    for no_folder in (folder / "mine" / "plan", tmp_path / ("a" * 300)):
        outcome = command("plan", *words[:place], no_folder, *words[place + 1 :], "--size", "1MB")
        assert (outcome.code, outcome.out) == (2, "")
        assert "name another" in outcome.err
    (folder / "mine").unlink()
    assert command("plan", *words, "--average-bits", 2).code == 0


def test_an_override_is_what_a_plan_finds(words, tmp_path):
    """A recipe with overrides is refused rather than overruled."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"bits_override": ["*=3"]}))
    outcome = command("plan", *words, "--average-bits", 2, "--recipe", recipe)
    assert outcome.code == 2
    assert "bits_override" in outcome.err


def test_a_stream_has_no_random_part(words, tmp_path):
    """A recipe that streams is refused by name."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"streaming": True, "max_steps": 5}))
    outcome = command("plan", *words, "--average-bits", 2, "--recipe", recipe)
    assert outcome.code == 2
    assert "streaming does not go with a plan" in outcome.err


def test_weights_of_one_layer_get_widths_of_their_own():
    """Attention has several under one name."""
    model = torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2, kdim=4, vdim=4))
    uniform = wrap.plan(model, 8, include=["*"])
    widths = (1, 2, 3, "ternary")
    result = planning.with_widths(uniform, widths, "half-integer")
    assert tuple(layer.grid.bits for layer in result.quantized) == widths
    overrides = {layer.label: bits for layer, bits in zip(uniform.quantized, widths, strict=True)}
    made = wrap.plan(model, 4, grid="half-integer", include=["*"], bits_override=overrides)
    assert made.layers == result.layers


def test_missing_libraries_are_named(words, tmp_path, monkeypatch):
    """With the extra that brings them."""
    monkeypatch.setattr(
        planning, "find_spec", lambda name: None if name == "scipy" else find_spec(name)
    )
    recipe = config.build({"model": "m", "dataset": "d", "output": str(tmp_path / "plan")})
    with pytest.raises(
        RecipeError, match=r"scipy cannot be imported: pip install 'askewq\[plan\]'"
    ):
        planning.plan(recipe, {}, planning.Settings(average_bits=2))


@pytest.mark.parametrize(
    ("grid", "widths", "bits", "overrides"),
    [
        ("integer", (1, 1, 4), 1, ["c=4"]),
        ("auto", (1, 1, 4), 1, ["c=4"]),
        ("half-integer", (1, 1, 4), 4, ["a=1", "b=1"]),  # 1 bit has no half-integers
        ("half-integer", ("ternary", 1, 1), 1, ["a=ternary"]),
    ],
)
def test_most_layers_need_no_override(grid, widths, bits, overrides):
    """The recipe's own width is that of most layers, out of those that its grid goes with."""
    model = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in "abc"})
    layers = wrap.plan(model, 8, include=["*"]).quantized
    found = sensitivity.Sensitivity(layers, (1, "ternary", 4), torch.zeros(3, 3), torch.zeros(3, 3))
    recipe = config.build({"model": "m", "dataset": "d", "output": "o", "grid": grid, "bits": 2})
    asked = planning.Settings(average_bits=2)
    given = {"model", "dataset", "output", "grid"}
    content = yaml.safe_load(planning.recipe_text(recipe, given, asked, found, widths))
    assert content.pop("bits_override") == overrides
    kept = {} if set(widths) <= {1, "ternary"} and grid == "half-integer" else {"grid": grid}
    assert content == {"model": "m", "dataset": "d", "bits": bits, **kept}
    config.build({**content, "bits_override": overrides, "output": "o"})


def test_samples(words):
    """At least one."""
    words[words.index("--samples") + 1] = 0
    outcome = command("plan", *words, "--average-bits", 2)
    assert (outcome.code, "at least 1" in outcome.err) == (2, True)


def test_fewer_samples_than_asked_for(words, tmp_path):
    """sensitivity.json says how many there were."""
    words[words.index("--samples") + 1] = 1000
    assert command("plan", *words, "--average-bits", 2).code == 0
    assert json.loads((tmp_path / "plan" / "sensitivity.json").read_text())["samples"] == 48


def test_samples_of_a_corpus(tmp_path):
    """They are blocks of it, not its lines."""
    settings = builders.SETTINGS["llama"]()
    flags = [w for key in ("model", "dataset") for w in (f"--{key}", settings[key])]
    flags += ["--max-length", 16, "--samples", 7, "--output", tmp_path / "plan"]
    assert command("plan", *flags, "--average-bits", 3).code == 0
    assert json.loads((tmp_path / "plan" / "sensitivity.json").read_text())["samples"] == 7


def test_the_split_that_has_no_labels(words, tmp_path):
    """It is the one for training, of which the calibration samples are."""
    data = tmp_path / "data"
    data.mkdir()
    builders.write_images(data / "train.parquet", [(p, -1) for p, _ in builders.pictures(6)])
    builders.write_images(data / "test.parquet", builders.pictures(6))
    words[words.index("--dataset") + 1] = data
    outcome = command("plan", *words, "--average-bits", 3)
    assert outcome.code == 2
    assert "the split for --train-split has no labels" in outcome.err


def test_an_increase_that_is_not_finite(words, tmp_path, monkeypatch):
    """It is null in sensitivity.json, and that width is not chosen."""
    original = planning.sensitivity.measured

    def measured(*arguments):
        found = original(*arguments)
        found.increase[0, 0] = math.inf
        return found

    monkeypatch.setattr(planning.sensitivity, "measured", measured)
    assert command("plan", *words, "--average-bits", 3).code == 0

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / "plan" / "sensitivity.json").read_text()
    layers = json.loads(text, parse_constant=refuse)["layers"]
    assert [None in layer["increase"].values() for layer in layers.values()].count(True) == 1


def test_classes_of_other_names(tmp_path):
    """Which is taken for which is said, as before a run."""
    folder = shutil.copytree(builders.bert(), tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": "POSITIVE", "1": "NEGATIVE"}
    (folder / "config.json").write_text(json.dumps(config))
    words = flags_of("bert")
    words[words.index("--model") + 1] = folder
    output = ["--average-bits", 4, "--output", tmp_path / "plan"]
    outcome = command("plan", *words, *output, "--sensitivity", "estimated")
    assert outcome.code == 0, outcome.err
    assert "trained for the classes POSITIVE, NEGATIVE, and is taken to mean" in outcome.out


def test_the_folder_that_one_is_in(words, tmp_path, monkeypatch):
    """An output of . works, if it is empty."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert command("plan", *words[:-1], ".", "--average-bits", 2).code == 0
    assert "recipe.yaml" in files(tmp_path / "here")


@pytest.mark.parametrize("estimate", ["measured", "estimated"])
def test_the_last_samples_count(words, tmp_path, monkeypatch, estimate):
    """Where they do not fill a batch, too: as many are shown as sensitivity.json says."""
    shown = []
    original = planning.logits_and_labels

    def counted(model, spec, batch):
        shown.append(len(batch["labels"]))
        return original(model, spec, batch)

    monkeypatch.setattr(planning, "logits_and_labels", counted)
    flags = ["--average-bits", 3, "--sensitivity", estimate, "--batch-size", 10]
    assert command("plan", *words, *flags).code == 0
    assert json.loads((tmp_path / "plan" / "sensitivity.json").read_text())["samples"] == 24
    assert shown[:3] == [10, 10, 4]
