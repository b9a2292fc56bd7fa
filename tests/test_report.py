"""What a person looks at: the plan, the table of results, the model card."""

import re
from pathlib import Path

import builders
import pytest
import torch
import yaml
from builders import finished

from askewq import checkpoint, config, recipe_files, report, text, wrap
from askewq.card import model_card
from askewq.spec import LoadedModel, ModelSpec


@pytest.fixture
def printed(capsys):
    """Return what was printed on standard output, spaces between columns made single."""

    def read():
        captured = capsys.readouterr()
        assert captured.err == ""
        return "\n".join(" ".join(line.split()) for line in captured.out.splitlines())

    return read


METRICS = {
    "metric": "accuracy",
    "method": "askewsgd",
    "bits": 2,
    "full_precision": 93.125,
    "rounded": 10.0,
    "relaxed": 92.5,
    "polish_steps": 0,
    "snapped": 92.4,
    "reloaded": 92.4,
    "parameters": {"total": 1_000_000, "quantized": 900_000, "share": 0.9},
    "bytes": {"full_precision": 4_000_000, "packed": 650_000},
    "bits_per_weight": 2.125,
}


def test_the_table_of_results(printed, tmp_path):
    """Five rows: full precision, rounding, relaxed, snapped, reloaded; and both sizes."""
    report.print_result(METRICS, tmp_path)
    shown = printed()
    for row in (
        "full precision 93.12 4.00 MB",
        "rounded to 2 bits, no training 10.00",
        "askewsgd, before the snap 92.50",
        "askewsgd, snapped 92.40",
        "reloaded from the packed file 92.40 0.65 MB",
    ):
        assert row in shown.splitlines()
    assert "2.12 bits a weight on 90.0% of the parameters" in shown
    assert str(tmp_path) in shown
    report.print_result({**METRICS, "polish_steps": 7}, tmp_path)
    assert "askewsgd, snapped, polished in 7 steps 92.40" in printed().splitlines()


@pytest.mark.parametrize(
    ("count", "shown"), [(999, "1.0 kB"), (12_345, "12.3 kB"), (123_456, "0.12 MB")]
)
def test_sizes(printed, tmp_path, count, shown):
    """Small files are given in kB, others in MB."""
    report.print_result({**METRICS, "bytes": {"full_precision": 1, "packed": count}}, tmp_path)
    assert f"reloaded from the packed file 92.40 {shown}" in printed()


def test_the_plan(printed):
    """Each layer has a row; float layers have a reason; the shares and the size are summed up."""
    network = builders.own_network("small")
    plan = wrap.plan(network, "ternary", group_size=4, exclude=["6"])
    report.print_plan(plan)
    lines = printed().splitlines()
    assert "0 Conv2d 8x3x3x3 float first layer, kept in full precision" in lines
    assert "2 Conv2d 8x8x3x3 ternary -1..1 per group 4" in lines
    assert "6 Linear 16x32 float excluded by '6'" in lines
    total = sum(p.numel() for p in network.parameters())
    (summary,) = [line for line in lines if line.startswith("plan:")]
    assert f"1 layers, 576 of {total:,} parameters" in summary


def test_names_with_brackets_are_printed_as_they_are(printed):
    """Markup in a user's names is not interpreted."""
    network = torch.nn.Sequential()
    for name in ("[red]a", "[bold]b", "[link]c"):
        network.add_module(name, torch.nn.Linear(3, 3))
    report.print_plan(wrap.plan(network, 2))
    shown = printed()
    assert all(name in shown for name in ("[red]a", "[bold]b", "[link]c"))


@pytest.mark.parametrize("kind", ["own", "llama"])
def test_an_artifact(printed, capsys, kind):
    """Each packed weight has a row with its shape, bits, scales and bytes."""
    folder, metrics = finished(kind)
    capsys.readouterr()  # what the run itself said, if it was made just now
    from askewq import artifact

    spec, _ = artifact.read_spec(folder)
    packed = checkpoint.read(folder / "model.safetensors")
    report.print_artifact(spec, packed)
    lines = printed().splitlines()
    for name, weight in packed.weights.items():
        shape, scales = ("x".join(map(str, s)) for s in (weight.shape, weight.scale.shape))
        assert f"{name} {shape} 2 {scales} {weight.codes.nbytes:,}" in lines
    assert f"{metrics['parameters']['quantized']:,} parameters" in lines[-1]


class TestModelCard:
    @pytest.mark.parametrize("kind", ["own", "timm", "bert", "llama", "vit"])
    def test_says_how_to_load_what_it_measures_and_how_it_was_made(self, kind):
        """README.md has the call, the three figures, the data set and the whole recipe."""
        folder, metrics = finished(kind)
        card = (folder / "README.md").read_text(encoding="utf-8")
        for name, key in (
            ("full precision", "full_precision"),
            ("rounded, no training", "rounded"),
            ("this model", "reloaded"),
        ):
            assert f"| {name} | {metrics[key]:.2f} |" in card
        (recipe,) = re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)
        stored = recipe_files.read_yaml(folder / "recipe.yaml")
        shown = yaml.safe_load(recipe)
        for key in ("model", "dataset", "output"):  # where they lie here is nobody's business
            assert shown.pop(key) == Path(stored.pop(key)).name
        assert shown == stored
        assert str(builders.ROOT) not in card
        dataset = text.markdown(Path(builders.SETTINGS[kind]()["dataset"]).name)
        assert f"{metrics['metric']} on {dataset} |" in card
        assert ("askewq.load(folder, model=factory())" in card) == (kind == "own")
        assert f"The {metrics['metric']} is that of the reloaded file." in card
        assert card.startswith("---\nlibrary_name: askewq\n")

    @pytest.mark.parametrize("kind", ["own", "timm", "bert"])
    def test_front_matter_is_yaml(self, kind):
        """The header that the Hub reads is YAML; a module of the user's own has no base model."""
        folder, _ = finished(kind)
        header = (folder / "README.md").read_text(encoding="utf-8").split("---\n")[1]
        content = yaml.safe_load(header)
        assert content["library_name"] == "askewq"
        assert "askewq" in content["tags"]
        assert "base_model" not in content  # random weights of timm's, and folders of ours
        assert content["pipeline_tag"] in ("image-classification", "text-classification")
        assert "datasets" not in content
        (entry,) = content["model-index"]
        (result,) = entry["results"]
        (figure,) = result["metrics"]
        metrics = finished(kind)[1]
        assert figure == {"type": "accuracy", "value": round(metrics["reloaded"], 4)}
        assert str(builders.ROOT) not in header

    @pytest.mark.parametrize(
        ("more", "base"),
        [
            ({}, "timm/resnet18.a1_in1k"),
            ({"pretrained": False}, None),
            ({"weights": "mine.safetensors"}, None),
        ],
    )
    def test_the_base_model_is_where_the_weights_are_from(self, more, base):
        """By timm's own id on the Hub; other weights than those are of no model there."""
        recipe = config.build({"model": "resnet18", "dataset": "d", "output": "o", **more})
        spec = ModelSpec("timm", "resnet18", "image-classification", ("a",), {})
        loaded = LoadedModel(builders.own_network("small"), spec, None)
        header = yaml.safe_load(model_card(METRICS, recipe, loaded).split("---\n")[1])
        assert header.get("base_model") == base
        assert header.get("base_model_relation") == (base and "quantized")

    def test_nothing_of_a_name_is_obeyed(self):
        """Markup, HTML, fences and control characters in names are shown, not obeyed."""
        name = "x](http://e) <script>a</script> | `b`\n```\n# c\n---\n\x1b[2J"
        recipe = config.build({"model": name, "dataset": name, "output": "o"})
        spec = ModelSpec("transformers", name, "text-classification", ("a",), {})
        loaded = LoadedModel(builders.own_network("small"), spec, None)
        card = model_card(METRICS, recipe, loaded)
        _, header, body = re.split(r"^---\n", card, flags=re.MULTILINE)[:3]
        assert yaml.safe_load(header)["base_model"] == name
        page, opening, block = re.split(r"^(`{4,})yaml\n", body, flags=re.MULTILINE)
        assert block.endswith(f"\n{opening}\n")
        assert opening not in block.removesuffix(f"{opening}\n")
        assert yaml.safe_load(block.removesuffix(f"{opening}\n"))["model"] == name
        outside = re.sub(r"^```python\n.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
        assert "<" not in outside
        assert "\x1b" not in card
        assert [line for line in outside.splitlines() if line.startswith("# ")] == [
            f"# {text.markdown(name)} at 2 bits"
        ]
        assert "](" not in outside.replace("\\](", "").replace("]\\(", "")
        (row,) = [line for line in outside.splitlines() if line.startswith("| | ")]
        assert len(re.findall(r"(?<!\\)\|", row)) == 3

    @pytest.mark.parametrize("name", ["x: y", "a # b", "'quoted'", "- list"])
    def test_front_matter_of_any_name(self, name):
        """A model name with YAML's own signs in it stays one text."""
        recipe = config.build({"model": name, "dataset": "d", "output": "o"})
        spec = ModelSpec("transformers", name, "text-classification", ("a",), {})
        loaded = LoadedModel(builders.own_network("small"), spec, None)
        card = model_card(METRICS, recipe, loaded)
        assert yaml.safe_load(card.split("---\n")[1])["base_model"] == name

    def test_ids_are_those_of_the_hub_and_nothing_local(self, tmp_path, monkeypatch):
        """hf-hub: is timm's word, not a part of the id; local-dir: and ~ lead to this machine."""
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "data").mkdir()
        spec = ModelSpec("timm", "resnet18", "image-classification", ("a",), {})
        loaded = LoadedModel(builders.own_network("small"), spec, None)
        headers = []
        for name in ("hf-hub:timm/resnet18.a1_in1k", f"local-dir:{tmp_path}"):
            recipe = config.build({"model": name, "dataset": "~/data", "output": "o"})
            headers.append(yaml.safe_load(model_card(METRICS, recipe, loaded).split("---\n")[1]))
        assert headers[0]["base_model"] == "timm/resnet18.a1_in1k"
        assert "base_model" not in headers[1]
        assert all("datasets" not in header for header in headers)


def test_the_bar_counts_and_shows(capsys):
    """The bar goes to standard error and shows what it is given."""
    with report.progress_bar("phase", 2, 4, True) as bar:
        report.advance(bar, {"loss": 1.23456, "lr": 0.1})
        report.advance(bar, {"loss": 0.5, "lr": 0.1})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "phase" in captured.err
    assert "4/4" in captured.err
    assert "loss=0.5" in captured.err


def test_other_processes_show_no_bar(capsys):
    """Only the main process draws."""
    with report.progress_bar("phase", 0, 1, False) as bar:
        report.advance(bar, {"loss": 1.0})
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(
    torch.cuda.is_available() or not Path("/proc/self/status").exists(),
    reason="the kernel's own figure is for the CPU, on Linux",
)
def test_peak_memory_is_in_bytes():
    """The figure is the kernel's high-water mark of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    (kilobytes,) = re.findall(r"VmHWM:\s*(\d+) kB", status)
    assert report.peak_memory() == pytest.approx(1024 * int(kilobytes), rel=0.02)


def test_groups_that_do_not_divide_are_said(capsys):
    """Before a run, not in `askewq inspect` alone."""
    network = torch.nn.Sequential(*(torch.nn.Linear(n, n + 2) for n in (6, 8, 10, 12, 14)))
    report.print_coverage(wrap.plan(network, 2, group_size=4))
    assert "  2 (Linear): scale per channel: 4 does not divide 10\n" in capsys.readouterr().out
