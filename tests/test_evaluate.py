"""The evaluation loop: what it counts, what it compares, and that it changes nothing."""

import math

import builders
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from askewq import checkpoint, layers, models, processes, wrap
from askewq import evaluate as evaluation
from askewq.batches import loaders
from askewq.data import open_data
from askewq.errors import DivergenceError, ExactnessError, ModelError
from askewq.evaluate import evaluate


class Evaluator:
    """A model, its data and an accelerator, as a run has them."""

    def __init__(self, kind, tmp_path, precision="no", **changes):
        builders.new_process()
        self.recipe = builders.recipe(kind, tmp_path, **changes)
        source = models.find_source(self.recipe.model)
        task = models.guess_task(self.recipe.model, source)
        data = open_data(self.recipe, task)
        torch.manual_seed(11)
        self.loaded = models.load(
            self.recipe.model,
            task,
            data.labels,
            pretrained=self.recipe.pretrained,
            image_size=self.recipe.image_size,
        )
        self.accelerator = Accelerator(mixed_precision=precision, cpu=True)
        _, loader = loaders(self.recipe, data, self.loaded.preprocessing)
        self.loader = self.accelerator.prepare(loader)

    def __call__(self, *others, model=None):
        parts = self.loaded.spec, self.loaded.preprocessing, self.loader, self.accelerator
        return evaluate([model or self.loaded.model, *others], *parts)


@pytest.fixture(autouse=True)
def _fresh():
    """Leave no precision behind for other tests."""
    yield
    builders.new_process()


@pytest.mark.parametrize("kind", ["own", "timm", "vit", "bert-pairs"])
def test_accuracy_and_loss_are_those_of_a_plain_loop(tmp_path, kind):
    """Accuracy in percent and mean loss equal a loop over single samples."""
    evaluator = Evaluator(kind, tmp_path, max_eval_samples=10)
    result = evaluator()
    loaded = evaluator.loaded
    losses, hits = [], []
    loaded.model.eval()
    for batch in evaluator.loader:
        pixels = batch.get("pixel_values")
        for i, label in enumerate(batch["labels"]):
            with torch.no_grad():
                if pixels is None:
                    inputs = {k: v[i : i + 1] for k, v in batch.items() if k != "labels"}
                    logits = loaded.model(**inputs).logits[0]
                else:
                    one = loaded.preprocessing.batch(pixels[i : i + 1])
                    made = loaded.model(one)
                    logits = getattr(made, "logits", made)[0]
            losses.append(float(nn.functional.cross_entropy(logits, label)))
            hits.append(int(logits.argmax()) == int(label))
    assert result.samples == len(hits) == 10
    assert result.metric == "accuracy"
    assert result.value == pytest.approx(100 * sum(hits) / len(hits))
    assert result.loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_perplexity_is_the_exponential_of_the_mean_loss(tmp_path):
    """A language model's perplexity counts every predicted token once."""
    evaluator = Evaluator("llama", tmp_path)
    result = evaluator()
    total = count = 0
    for batch in evaluator.loader:
        tokens = batch["input_ids"]
        with torch.no_grad():
            logits = evaluator.loaded.model(input_ids=tokens).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        total += float(loss) * tokens[:, 1:].numel()
        count += tokens[:, 1:].numel()
    assert result.metric == "perplexity"
    assert result.loss == pytest.approx(total / count, rel=1e-5)
    assert result.value == pytest.approx(math.exp(total / count), rel=1e-5)


@pytest.mark.parametrize("kind", ["own", "timm", "llama"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_evaluating_within_snapped_equals_evaluating_after_the_snap(tmp_path, kind, precision):
    """The evaluation in the course of training is, to the bit, that of the snapped weights."""
    evaluator = Evaluator(kind, tmp_path, precision)
    model = evaluator.loaded.model
    wrap.quantize(model, "ternary")
    relaxed = evaluator()
    with layers.snapped(model):
        within = evaluator()
    assert evaluator() == relaxed
    layers.snap_(model)
    after = evaluator()
    assert after == within
    assert after.loss != relaxed.loss


def test_equal_models_pass(tmp_path):
    """A copy with the same weights gives the same logits, and the first model is scored."""
    evaluator = Evaluator("own", tmp_path)
    twin = builders.own_network("small")
    twin.load_state_dict(evaluator.loaded.model.state_dict())
    assert evaluator(twin) == evaluator()


@pytest.mark.parametrize("name", ["0.weight", "6.weight", "8.bias"])
def test_one_changed_weight_is_found(tmp_path, name):
    """A model that differs by one rounding step in one layer is not called equal."""
    evaluator = Evaluator("own", tmp_path)
    twin = builders.own_network("small")
    twin.load_state_dict(evaluator.loaded.model.state_dict())
    with torch.no_grad():
        weight = twin.get_parameter(name)
        weight.copy_(weight.nextafter(torch.tensor(math.inf)))
    with pytest.raises(ExactnessError, match="must be equal to the bit"):
        evaluator(twin)


def test_training_mode_is_restored(tmp_path):
    """Each model is evaluated without dropout and left in the mode it was in."""
    evaluator = Evaluator("own", tmp_path, model=builders.own("with_dropout"))
    model = evaluator.loaded.model
    model.train()
    assert evaluator() == evaluator()
    assert model.training
    model.eval()
    evaluator()
    assert not model.training


def test_batch_norm_statistics_are_not_touched(tmp_path):
    """Evaluation leaves every parameter and buffer as it was."""
    evaluator = Evaluator("timm", tmp_path)
    before = {k: v.clone() for k, v in evaluator.loaded.model.state_dict().items()}
    evaluator()
    after = evaluator.loaded.model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_logits_of_another_width_are_refused(tmp_path):
    """A head that does not fit the labels is an error of the model."""
    evaluator = Evaluator("own", tmp_path)
    with pytest.raises(ModelError, match="10 outputs"):
        evaluator(model=builders.own_network("ten_classes"))


class TestArtifacts:
    @pytest.mark.parametrize("kind", ["timm", "timm-vit", "bert", "bert-pairs", "llama", "vit"])
    def test_gives_the_metric_of_the_run(self, kind):
        """Evaluating the folder gives the metric that the run reported as reloaded.

        The command repeats the data set alone, as the README does: what else the metric depends
        on, such as the length of texts, the artifact knows.
        """
        folder, metrics = builders.finished(kind)
        dataset = builders.SETTINGS[kind]()["dataset"]
        recipe = builders.config.build({"model": "", "output": "o", "dataset": dataset})
        result = evaluation.evaluate_artifact(folder, recipe)
        assert result.metric == metrics["metric"]
        assert result.value == pytest.approx(metrics["reloaded"], rel=1e-6)

    def test_logits_that_are_not_finite(self, tmp_path, monkeypatch):
        """There is no accuracy of them."""
        folder = builders.copy_of("own", tmp_path)
        content = checkpoint.read(folder / "model.safetensors")
        name = next(key for key, value in content.tensors.items() if value.is_floating_point())
        content.tensors[name].fill_(math.nan)
        recipe = builders.recipe("own", folder)
        monkeypatch.setattr(checkpoint, "read", lambda _: content)
        with pytest.raises(DivergenceError, match=r"the loss of .* is nan"):
            evaluation.evaluate_artifact(folder, recipe, factory=builders.own("small"))

    def test_after_a_run_of_another_precision(self):
        """In one process Accelerate would keep the run's."""
        folder, metrics = builders.finished("timm")
        processes.plain_accelerator("bf16")
        recipe = builders.recipe("timm", folder, mixed_precision="no")
        result = evaluation.evaluate_artifact(folder, recipe)
        assert result.value == pytest.approx(metrics["reloaded"], rel=1e-6)

    @pytest.mark.parametrize("batch_size", [1, 7, 1000])
    def test_own_module_at_any_batch_size(self, batch_size):
        """The user's own network is passed in; the batch size decides nothing."""
        folder, metrics = builders.finished("own")
        recipe = builders.recipe("own", folder, batch_size=batch_size)
        result = evaluation.evaluate_artifact(folder, recipe, factory=builders.own("small"))
        assert result.value == metrics["reloaded"]
        assert result.samples == 24

    def test_other_networks_have_none(self):
        """A factory that would not be called is refused, like an option that decides nothing."""
        folder, dataset = builders.finished("timm")[0], builders.image_folder()
        found = builders.command("eval", folder, "--dataset", dataset, "--model", "no.py:thing")
        assert found.code == 2
        assert "--model goes with an artifact of a module of your own" in found.err

    def test_own_module_needs_its_factory(self):
        """Without the user's code an own module is refused; no code is run from the artifact."""
        folder, _ = builders.finished("own")
        with pytest.raises(ModelError, match=r"--model path/to/file\.py:factory"):
            evaluation.evaluate_artifact(folder, builders.recipe("own", folder))


def test_a_later_batch_that_the_network_cannot_take(tmp_path):
    """It is an error in words, and names the batch."""
    evaluator = Evaluator("own", tmp_path)
    whole = evaluator.loaded.model

    class Picky(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return whole(x) if self.calls < 2 else whole(x.flatten())

    with pytest.raises(ModelError, match=r"fails in evaluation on a batch of .*pixel_values"):
        evaluator(model=Picky())
