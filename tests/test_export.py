"""`askewq export`: what is refused, that nothing half-written stays, that it verifies itself."""

import errno
import json
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import builders
import onnx
import pytest
import torch
import transformers
from builders import command, files
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import askewq
from askewq import disk, export_dense, export_onnx
from askewq import export as formats
from askewq.artifact import load_artifact
from askewq.errors import AskewError, ExportError, ModelError, VerificationError
from askewq.export import TARGETS, check_settings, export, find_target
from askewq.preprocessing import ProcessorPreprocessing
from askewq.samples import sample_inputs
from askewq.spec import LoadedModel, ModelSpec
from askewq.target import Options
from askewq.tasks import logits_of

KINDS = ["own", "tied", "timm", "timm-vit", "bert", "llama", "gpt2", "vit"]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """An artifact of a user's own module, whose reader needs torch alone."""
    folder = tmp_path_factory.mktemp("own") / "artifact"
    return builders.packed(builders.untrained("own"), folder, lambda m: askewq.quantize(m, 2))


@pytest.fixture(scope="module")
def timm(tmp_path_factory):
    """An artifact of a timm network."""
    folder = tmp_path_factory.mktemp("timm") / "artifact"
    return builders.packed(builders.untrained("timm"), folder, lambda m: askewq.quantize(m, 2))


def run(folder, output, *flags, to="dense"):
    """Run `askewq export` on an artifact of the user's own module."""
    words = ("export", folder, "--to", to, "--output", output, "--model", builders.own("small"))
    return command(*words, *flags)


def use(monkeypatch, **changes):
    """Let every format be `dense` with something else instead of its parts."""
    target = replace(export_dense.TARGET, **changes)
    monkeypatch.setattr(formats, "find_target", lambda to: target)


def refused(outcome, code, *words):
    """Check for one clear message and an exit code."""
    assert outcome.code == code, outcome.err
    assert outcome.err.startswith("askewq: ")
    assert "Traceback (most recent call last)" not in outcome.err.split("The loader says")[0]
    for word in words:
        assert word in outcome.err


class TestExport:
    def test_writes_reads_back_and_reports(self, own, tmp_path):
        """The command prints the difference, writes export.json, and leaves nothing else."""
        output = tmp_path / "new" / "out"
        outcome = run(own, output)
        assert outcome.code == 0, outcome.err
        assert "largest difference of a logit 0, relative 0 (allowed 0)" in outcome.out
        assert files(tmp_path) == {
            f"new/out/{name}" for name in ("README.md", "export.json", "model.safetensors")
        }
        written = json.loads((output / "export.json").read_text())
        assert written == {
            "format": "dense",
            "askewq": askewq.__version__,
            "max_difference": 0.0,
            "relative_difference": 0.0,
            "bound": 0.0,
            "samples": 4,
            "libraries": written["libraries"],
            "files": {
                name: (output / name).stat().st_size for name in ("README.md", "model.safetensors")
            },
            "notes": [],
        }
        assert written["libraries"]["torch"] == version("torch")
        assert written["libraries"].keys() == {"torch", "safetensors"}

    def test_it_is_on_the_disk_before_it_appears(self, own, tmp_path, monkeypatch):
        """Every file is synced before the folder has its name, and the name after that."""
        synced = []
        monkeypatch.setattr(disk, "sync", lambda path: synced.append((path, output.exists())))
        output = tmp_path / "out"
        export(own, "dense", output, factory=builders.own("small"))
        before = {path.name for path, appeared in synced if not appeared}
        assert files(output) <= before
        assert (tmp_path, True) in synced

    def test_an_empty_folder_may_be_there(self, own, tmp_path):
        """An empty output folder is used; the result is returned, too."""
        (tmp_path / "out").mkdir()
        result = export(own, "dense", tmp_path / "out", factory=builders.own("small"))
        assert json.loads((tmp_path / "out" / "export.json").read_text()) == result

    def test_notes_come_before_anything_is_written(self, own, tmp_path, monkeypatch, capsys):
        """What is written otherwise is said first: it is there even when writing fails."""

        def fail(source, options, folder):
            raise OSError(errno.ENOSPC, "No space left on device")

        use(monkeypatch, notes=lambda source, options: ["a is written as b."], write=fail)
        outcome = run(own, tmp_path / "out")
        assert outcome.code == 2
        assert "dense: a is written as b." in outcome.out


class TestRefuses:
    @pytest.mark.parametrize(
        ("to", "flags", "words"),
        [
            ("tflite", [], ["'tflite'", "dense, compressed-tensors, onnx, gguf"]),
            ("onx", [], ["did you mean onnx?"]),
            ("onnx", ["--dtype", "fp16"], ["--dtype decides nothing for --to onnx", "with dense"]),
            ("onnx", ["--dtype", "fp32"], ["--dtype decides nothing for --to onnx"]),
            ("dense", ["--dense-rest"], ["--dense-rest decides nothing", "compressed-tensors"]),
            ("dense", ["--allow-lossy"], ["--allow-lossy decides nothing", "gguf"]),
            ("dense", ["--dtype", "fp8"], ["fp8", "bf16"]),
            ("dense", ["--overwrite"], ["--overwrite"]),
        ],
        ids=str,
    )
    def test_formats_and_settings(self, tmp_path, to, flags, words):
        """They are refused before the artifact is looked at."""
        refused(run(tmp_path / "nowhere", tmp_path / "out", *flags, to=to), 2, *words)
        assert list(tmp_path.iterdir()) == []

    def test_settings_in_python(self, own, tmp_path):
        """An option that differs from its default is refused in the same words."""
        with pytest.raises(ExportError, match="--dtype decides nothing for --to gguf"):
            export(own, "gguf", tmp_path / "out", Options(dtype="bf16"))
        check_settings("gguf", ["allow_lossy"])

    def test_a_missing_library(self, own, tmp_path, monkeypatch):
        """The extra that brings it is named."""
        use(monkeypatch, name="onnx", needs=("torch", "no_such_library"), extra="onnx")
        words = "torch, no_such_library, and no_such_library cannot", "pip install 'askewq[onnx]'"
        refused(run(own, tmp_path / "out"), 2, *words)
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_holds_something(self, own, tmp_path):
        """An earlier output stays as it was."""
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a").write_text("mine")
        refused(run(own, tmp_path / "out"), 2, "is not empty", "another folder")
        assert files(tmp_path) == {"out/a"}
        refused(run(own, tmp_path / "out" / "a"), 2, "is no folder; name another one")
        refused(run(own, tmp_path / "out" / "a" / "b"), 2, "is no folder; name another one")
        refused(run(own, tmp_path / (300 * "x")), 2, "too long; name another folder")
        assert (tmp_path / "out" / "a").read_text() == "mine"

    def test_the_artifact_itself_is_no_output(self, own):
        """The artifact's own folder is not empty, and is left alone."""
        before = files(own)
        refused(run(own, own), 2, "is not empty")
        assert files(own) == before

    @pytest.mark.parametrize(
        ("damage", "words"),
        [
            ("newer", ["askewq_version 4", "newer askewq"]),
            ("newer file", ["format version 4", "upgrade"]),
            ("truncated", ["model.safetensors", "not a readable"]),
            ("no weights", ["model.safetensors"]),
            ("no artifact", ["not an askewq artifact"]),
        ],
    )
    def test_artifacts_that_cannot_be_read(self, own, tmp_path, damage, words):
        """The reader's own message comes through, and nothing is written."""
        folder = tmp_path / "copy"
        shutil.copytree(own, folder)
        weights, config = folder / "model.safetensors", folder / "config.json"
        if damage == "newer":
            config.write_text(config.read_text().replace('_version": 2', '_version": 4'))
        elif damage == "newer file":
            manifest = builders.manifest(weights) | {"version": 4}
            save_file(load_file(weights), weights, {"askewq": json.dumps(manifest)})
        elif damage == "truncated":
            weights.write_bytes(weights.read_bytes()[:-1])
        elif damage == "no weights":
            weights.unlink()
        else:
            config.unlink()
        before = files(tmp_path)
        refused(run(folder, tmp_path / "out"), 2, *words)
        assert files(tmp_path) == before
        assert not (tmp_path / "out").exists()

    def test_an_empty_folder_behind_a_link(self, own, tmp_path):
        """The folder that the link names is filled, and the link stays."""
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real")
        export(own, "dense", tmp_path / "link", factory=builders.own("small"))
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real" / "export.json").is_file()

    def test_a_file_of_ones_own_that_imports_askewq(self, own, tmp_path):
        """As that of a training loop does."""
        file = Path(builders.own("small").rpartition(":")[0])
        (tmp_path / "nets.py").write_text("import askewq\n" + file.read_text())
        export(own, "dense", tmp_path / "out", factory=f"{tmp_path / 'nets.py'}:small")

    def test_an_image_size_that_the_artifact_says(self, timm, tmp_path):
        """It is not overruled, and texts have none."""
        for folder in (timm, builders.finished("bert")[0]):
            with pytest.raises(ExportError, match="preprocessing says no size; leave it out"):
                export(folder, "dense", tmp_path / "out", image_size=16)

    def test_an_image_size_that_it_does_not_say(self, tmp_path):
        """The samples have it."""
        folder, _ = builders.finished("own")
        outcome = run(folder, tmp_path / "out", "--image-size", 20, to="onnx")
        assert outcome.code == 0, outcome.err
        graph = onnx.load(tmp_path / "out" / "model.onnx").graph
        assert [d.dim_value for d in graph.input[0].type.tensor_type.shape.dim][1:] == [3, 20, 20]
        refused(run(folder, tmp_path / "no", "--image-size", 0), 2, "--image-size 0")

    @pytest.mark.parametrize("shortest", [None, 32])
    def test_a_processor_that_says_no_size(self, tmp_path, shortest):
        """The file is for the size that is told, or for none."""
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}
        config = transformers.ResNetConfig(**sizes, layer_type="basic", num_labels=3)
        size = {"size": {"shortest_edge": shortest}} if shortest else {"do_resize": False}
        processor = transformers.CLIPImageProcessor(**size, do_center_crop=False)
        model = transformers.ResNetForImageClassification(config).eval()
        spec = ModelSpec(
            "transformers", "resnet", "image-classification", ("a", "b", "c"), config.to_dict()
        )
        loaded = LoadedModel(model, spec, ProcessorPreprocessing(processor))
        folder = builders.packed(loaded, tmp_path / "out", lambda m: askewq.quantize(m, bits=2))

        def to_onnx(name, *flags):
            return command("export", folder, "--to", "onnx", "--output", tmp_path / name, *flags)

        refused(to_onnx("a"), 2, "say which with --image-size")
        outcome = to_onnx("b", "--image-size", 32)
        assert outcome.code == 0, outcome.err
        graph = onnx.load(tmp_path / "b" / "model.onnx").graph
        assert [d.dim_value for d in graph.input[0].type.tensor_type.shape.dim][1:] == [3, 32, 32]
        if shortest:
            refused(to_onnx("c", "--image-size", 48), 2, "makes 32 x 32")

    def test_own_modules(self, own, timm, tmp_path):
        """An own module must be passed in; another artifact takes none."""
        with pytest.raises(ModelError, match=r"--model path/to/file\.py:factory"):
            export(own, "dense", tmp_path / "out")
        with pytest.raises(ModelError, match="--model goes with an artifact of a module of your"):
            export(timm, "dense", tmp_path / "out", factory=builders.own("small"))
        assert list(tmp_path.iterdir()) == []

    def test_what_the_format_cannot_hold(self, own, tmp_path, monkeypatch):
        """All reasons are in one message, and nothing is written."""
        use(monkeypatch, refusals=lambda source, options: ["a is too wide.", "b is too long."])
        refused(run(own, tmp_path / "out"), 2, "\n- a is too wide.\n- b is too long.")
        assert list(tmp_path.iterdir()) == []


def read_rubbish(folder, inputs):
    raise ValueError("rubbish in the file")


def read_with_askewq(folder, inputs):
    import askewq

    return askewq.load(folder)


def read_two_samples(folder, inputs):
    import torch

    return torch.zeros(2, 3)


def read_nan(folder, inputs):
    import torch

    return torch.full((4, 3), float("nan"))


def die(folder, inputs):
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


class TestVerifies:
    @pytest.mark.parametrize(
        ("read_back", "words"),
        [
            (read_rubbish, ["could not be read back", "ValueError: rubbish in the file"]),
            (read_two_samples, ["shape [2, 3] where the artifact gives [4, 3]"]),
            (read_nan, ["differ by up to nan"]),
            (die, ["could not be read back", "exit code -9"]),
        ],
    )
    def test_a_reader_that_fails(self, own, tmp_path, monkeypatch, read_back, words):
        """A loader that fails or gives something else: exit code 1, no output."""
        use(monkeypatch, read_back=read_back)
        (tmp_path / "out").mkdir()
        refused(run(own, tmp_path / "out"), 1, "the output was deleted", *words)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert files(tmp_path) == set()

    def test_a_reader_that_needs_askewq(self, timm, tmp_path, monkeypatch):
        """Who serves an export has no askewq."""
        use(monkeypatch, read_back=read_with_askewq)
        outcome = command("export", timm, "--to", "dense", "--output", tmp_path / "out")
        refused(outcome, 1, "could not be read back", "import of askewq halted")
        assert files(tmp_path) == set()

    def test_wrong_weights(self, own, tmp_path, monkeypatch):
        """One weight in the last place is enough where logits must be equal to the bit."""

        def write_another(source, options, folder):
            export_dense.TARGET.write(source, options, folder)
            state = load_file(folder / "model.safetensors")
            state["8.bias"][0] = state["8.bias"][0].nextafter(torch.tensor(9.0))
            save_file(state, folder / "model.safetensors")

        use(monkeypatch, write=write_another)
        refused(run(own, tmp_path / "new" / "out"), 1, "does not give the artifact's logits")
        assert list(tmp_path.iterdir()) == []

    def test_logits_that_say_nothing_are_noted(self, own, tmp_path, monkeypatch):
        """Where those of all samples are one within the bound, whatever the layers compute."""
        use(monkeypatch, bound=lambda options: 2.0)
        outcome = run(own, tmp_path / "out")
        assert outcome.code == 0, outcome.err
        assert "the random inputs all have the same logits" in outcome.out
        (note,) = json.loads((tmp_path / "out" / "export.json").read_text())["notes"]
        assert "compare on data of yours" in note

    def test_the_bound_is_the_targets(self, own, tmp_path, monkeypatch):
        """A difference within the bound is accepted, printed and stored."""

        def write_another(source, options, folder):
            export_dense.TARGET.write(source, options, folder)
            state = load_file(folder / "model.safetensors")
            state["8.bias"] += 1e-3
            save_file(state, folder / "model.safetensors")

        use(monkeypatch, write=write_another, bound=lambda options: 0.5)
        outcome = run(own, tmp_path / "out")
        assert outcome.code == 0, outcome.err
        written = json.loads((tmp_path / "out" / "export.json").read_text())
        assert written["max_difference"] == pytest.approx(1e-3, rel=1e-2)
        assert 0 < written["relative_difference"] < 0.5 == written["bound"]
        assert f"logit {written['max_difference']:.3g}, relative" in outcome.out

    @pytest.mark.parametrize(
        ("logits", "expected", "bound", "relative"),
        [
            ([1.0, -4.0], [1.0, -4.0], 0.0, 0.0),
            ([1.5, -4.0], [1.0, -4.0], 0.125, 0.125),
            ([1.5, -4.0], [1.0, -4.0], 0.1249, None),
            ([0.0, 0.0], [0.0, 0.0], 0.0, 0.0),
            ([0.0, 1e-9], [0.0, 0.0], 1.0, None),
            ([float("inf"), 1.0], [1.0, 1.0], 1.0, None),
            ([float("nan"), 1.0], [float("nan"), 1.0], 1.0, None),
        ],
    )
    def test_the_comparison(self, logits, expected, bound, relative):
        """Differences count relative to the largest logit; NaN is over every bound."""
        given = torch.tensor(logits), torch.tensor(expected)
        if relative is None:
            with pytest.raises(VerificationError):
                formats._compare(*given, bound, "dense")
        else:
            assert formats._compare(*given, bound, "dense")["relative_difference"] == relative


class TestLeavesNothing:
    @pytest.mark.parametrize("error", [OSError, SafetensorError, KeyboardInterrupt, ValueError])
    def test_a_disk_that_fills_up(self, own, tmp_path, monkeypatch, error):
        """Whatever a library raises midway, the half-written folder goes and the parents too."""

        def fill(tensors, path, metadata):
            path.write_bytes(b"half")
            raise error("No space left on device")

        monkeypatch.setattr(export_dense, "save_file", fill)
        (tmp_path / "there").mkdir()
        for output in (tmp_path / "new" / "er" / "out", tmp_path / "there"):
            outcome = run(own, output)
            if error is KeyboardInterrupt:
                assert outcome.code == 130
            else:
                refused(outcome, 2, "left nothing behind", "No space left on device")
            assert [path.name for path in tmp_path.iterdir()] == ["there"]
            assert files(tmp_path) == set()

    def test_a_disk_that_fills_up_at_the_end(self, own, tmp_path, monkeypatch):
        """The verified folder appears only with its export.json."""
        original = json.dumps

        def fill(content, **kwargs):
            if "libraries" in content:  # export.json
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(content, **kwargs)

        monkeypatch.setattr(formats.json, "dumps", fill)
        refused(run(own, tmp_path / "out"), 2, "No space left on device")
        assert list(tmp_path.iterdir()) == []

    def test_an_output_that_fills_up_meanwhile(self, own, tmp_path, monkeypatch):
        """What someone else put there in the meantime is not replaced."""
        output = tmp_path / "out"

        def write(source, options, folder):
            export_dense.TARGET.write(source, options, folder)
            output.mkdir()
            (output / "theirs").write_text("theirs")

        use(monkeypatch, write=write)
        refused(run(own, output), 2, "left nothing behind")
        assert files(tmp_path) == {"out/theirs"}

    def test_a_folder_that_may_not_be_written(self, own, tmp_path):
        """A parent that is a file is said so."""
        (tmp_path / "file").write_text("")
        refused(run(own, tmp_path / "file" / "out"), 2, "file is no folder; name another one")
        assert files(tmp_path) == {"file"}


class TestSampleInputs:
    @pytest.mark.parametrize("kind", KINDS)
    def test_fit_the_model(self, kind):
        """Four samples that differ, the same every time, and the model takes them."""
        loaded = builders.untrained(kind)
        loaded.model.eval()
        inputs, again = sample_inputs(loaded), sample_inputs(loaded)
        assert all(torch.equal(inputs[key], again[key]) for key in inputs)
        with torch.no_grad():
            logits = logits_of(loaded.model, loaded.spec, inputs)
        assert len(logits) == 4
        assert len({tuple(row.tolist()) for row in logits.flatten(1)}) == 4
        if kind in ("bert", "llama", "gpt2"):
            assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (4, 32)
            assert inputs["attention_mask"].sum(1).tolist() == [32, 28, 24, 20]
            assert ("token_type_ids" in inputs) == (kind == "bert")
            assert 0 <= inputs["input_ids"].min() <= inputs["input_ids"].max() < 14
        else:
            assert inputs["pixel_values"].dtype == torch.float32

    def test_a_module_that_takes_no_usual_size(self):
        """The message says what the module says, and where the size belongs."""

        class Shy(torch.nn.Module):
            def forward(self, x, mask):
                return x

        loaded = builders.untrained("tied")
        loaded.preprocessing = replace(loaded.preprocessing, size=None)
        loaded.model = Shy()
        with pytest.raises(ExportError, match=r"no image size.*TypeError: .*mask.*--image-size"):
            sample_inputs(loaded)

    def test_a_size_that_the_module_has_no_index_for(self):
        """Whatever a module raises for a size, the next one is tried."""

        class Placed(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.places = torch.nn.Embedding(32, 3)

            def forward(self, x):
                return x.mean(2).transpose(1, 2).add(self.places(torch.arange(x.shape[3]))).mean(1)

        loaded = builders.untrained("tied")
        loaded.preprocessing = replace(loaded.preprocessing, size=None)
        loaded.model = Placed()
        assert sample_inputs(loaded)["pixel_values"].shape[2:] == (32, 32)

    @pytest.mark.parametrize("size", [16, [16, 16]])
    def test_a_processor_that_does_not_resize(self, size):
        """Pictures have the size that the network's config says."""
        loaded = builders.untrained("vit")
        loaded.preprocessing.processor.do_resize = False
        loaded.model.config.image_size = size
        for inputs in (sample_inputs(loaded), export_onnx.example(loaded)):
            assert inputs["pixel_values"].shape[2:] == (16, 16)
            assert logits_of(loaded.model, loaded.spec, inputs).isfinite().all()

    def test_a_model_that_does_not_say_how_many_tokens_it_knows(self, monkeypatch):
        """It gets those of its tokenizer."""
        loaded = builders.untrained("bert")
        known = len(loaded.preprocessing.tokenizer)

        def none(self):
            raise NotImplementedError

        monkeypatch.setattr(type(loaded.model), "get_input_embeddings", none)
        assert 0 < sample_inputs(loaded)["input_ids"].max() < known


def test_every_format_has_a_name_and_known_options():
    """The table's names are the targets' own, and its options are those that a user can give."""
    options = set(Options.__dataclass_fields__)
    assert set().union(*(settings for _, settings in TARGETS.values())) == options
    for name in TARGETS:
        assert find_target(name).name == name


def test_exit_codes():
    """A failed verification ends with 1, everything else with 2."""
    assert (VerificationError.exit_code, ExportError.exit_code, AskewError.exit_code) == (1, 2, 2)


def test_an_artifact_is_not_changed(own, tmp_path):
    """Exporting, refused or not, leaves the artifact's files as they were."""
    before = {path: path.read_bytes() for path in own.iterdir()}
    export(own, "dense", tmp_path / "out", Options(dtype="bf16"), builders.own("small"))
    assert {path: path.read_bytes() for path in own.iterdir()} == before
    assert load_artifact(own, factory=builders.own("small")).spec.source == "module"
