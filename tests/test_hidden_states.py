"""Distillation of hidden states: its loss against the formula, who may teach, what it changes."""

import builders
import pytest
import torch
from builders import finetune

from askewq import distill, hidden_states, loop, tasks
from askewq.errors import ModelError, RecipeError
from askewq.tasks import outputs_of

ALONE = {"distill_hidden": 1.0, "max_steps": 4, "lr": 0.05}


def slow_distance(student, teacher, mask=None):
    """Return the distance by loops over single numbers, in float64."""
    parts = []
    for ours, theirs in zip(student, teacher, strict=True):
        difference = size = 0.0
        for i in range(ours.shape[0]):
            for j in range(ours.shape[1]):
                if mask is not None and mask[i, j] == 0:
                    continue
                for a, b in zip(ours[i, j].flatten(), theirs[i, j].flatten(), strict=True):
                    difference += (float(a) - float(b)) ** 2
                    size += float(b) ** 2
        parts.append(difference / size)
    return sum(parts) / len(parts)


def states(*shape, layers=3):
    """Return random hidden states, larger from layer to layer."""
    return [10**i * torch.randn(shape) for i in range(layers)]


MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])


@pytest.mark.parametrize(
    ("shape", "mask"),
    [((2, 5, 4), None), ((2, 5, 4), MASK), ((2, 3, 4, 4), None)],
    ids=["tokens", "padded", "images"],
)
def test_the_distance_is_the_slow_loop(shape, mask):
    """Squared differences over the teacher's squares, of each layer by itself, then their mean."""
    student, teacher = states(*shape), states(*shape)
    found = hidden_states.distance(student, teacher, mask)
    assert found.item() == pytest.approx(slow_distance(student, teacher, mask), rel=1e-5)
    assert hidden_states.distance(teacher, teacher, mask).item() == 0


def test_padded_tokens_do_not_count():
    """What stands where the mask is 0, NaN even, changes neither the distance nor a gradient."""
    student, teacher = states(2, 5, 4), states(2, 5, 4)
    wanted = hidden_states.distance(student, teacher, MASK)
    for pair in zip(student, teacher, strict=True):
        for state in pair:
            state[MASK == 0] = float("nan")
    student = [state.requires_grad_() for state in student]
    found = hidden_states.distance(student, teacher, MASK)
    assert found.item() == wanted.item()
    found.backward()
    for state in student:
        assert (state.grad[MASK == 0] == 0).all()
        assert (state.grad[MASK == 1] != 0).all()


def test_half_precision_and_layers_of_zeros():
    """bf16 states are compared in float32; a teacher's layer of zeros gives no NaN."""
    student, teacher = states(2, 5, 4), states(2, 5, 4)
    rounded = [[state.bfloat16() for state in part] for part in (student, teacher)]
    found = hidden_states.distance(*rounded)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(slow_distance(*rounded), rel=1e-5)
    student = [state.requires_grad_() for state in student]
    nothing = hidden_states.distance(student, [torch.zeros_like(state) for state in student])
    nothing.backward()
    assert nothing.item() == 0
    assert all((state.grad == 0).all() for state in student)


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "vit"])
def test_the_gradient_reaches_the_student_alone(kind, tmp_path, monkeypatch):
    """In a run the student's states have a gradient, the teacher's none; evaluation asks not."""
    seen, asked, total = [], [], distill.total

    def watched(loss, student, teacher, *others):
        made = total(loss, student, teacher, *others)
        seen.append((len(student.hidden), [state.requires_grad for state in student.hidden]))
        assert not any(state.requires_grad for state in teacher.hidden)
        assert made.requires_grad
        return made

    def counted(model, spec, inputs, *, hidden_states=False):
        asked.append((torch.is_grad_enabled(), hidden_states))
        return outputs_of(model, spec, inputs, hidden_states=hidden_states)

    monkeypatch.setattr(distill, "total", watched)
    for module in (tasks, loop):
        monkeypatch.setattr(module, "outputs_of", counted)
    finetune(kind, tmp_path / "out", **{**ALONE, "max_steps": 2})
    assert [count for count, _ in seen] == [3, 3]  # the embeddings' and two layers'
    assert all(flag for _, flags in seen for flag in flags)
    # Of all forward passes only those of the two steps ask, of the student and of its teacher.
    assert asked.count((True, True)) == 2
    assert asked.count((False, True)) == 2
    assert asked.count((False, False)) > 2


def test_it_goes_alone_or_with_the_outputs(tmp_path):
    """Either share changes the result, together another one; a weight of 0 is none."""
    digests = {}
    for name, more in (
        ("none", {"distill_hidden": 0.0}),
        ("states", {}),
        ("outputs", {"distill_hidden": 0.0, "distill": 0.5}),
        ("both", {"distill": 0.5}),
        ("more", {"distill_hidden": 5.0}),
    ):
        finetune("bert", tmp_path / name, **{**ALONE, **more})
        digests[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert len(set(digests.values())) == len(digests)


@pytest.mark.parametrize(
    "more",
    [{"act_bits": 4}, {"mixed_precision": "bf16"}, {"grad_accumulation": 2}, {"method": "lsq"}],
    ids=str,
)
def test_it_goes_with(tmp_path, more):
    """Rounded inputs, bf16, accumulation and other methods: the run ends, other than without."""
    without = {**ALONE, "distill_hidden": 0.0}
    for name, given in (("with", ALONE), ("without", without)):
        finetune("bert", tmp_path / name, **{**given, **more})
    packed = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("with", "without")]
    assert packed[0] != packed[1]


def test_compiled_as_uncompiled(tmp_path):
    """A compiled network tells the same hidden states."""
    found = {}
    for compiled in (False, True):
        out = tmp_path / str(compiled)
        found[compiled] = finetune("bert", out, **ALONE, compile=compiled)
    assert found[True]["snapped"] == found[False]["snapped"]


@pytest.mark.parametrize("distill", [0.0, 0.5])
def test_a_run_resumed_gives_the_same_bytes(tmp_path, monkeypatch, distill):
    """The teacher of a resumed run is that of its start."""
    more = {**ALONE, "distill": distill, "full_precision_steps": 2, "save_every": 2}
    finetune("bert", tmp_path / "whole", **more)
    with builders.power_cut(monkeypatch, 4), pytest.raises(builders.PowerCutError):
        finetune("bert", tmp_path / "cut", **more)
    finetune("bert", tmp_path / "cut", **more, resume=True)
    packed = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert packed[0] == packed[1]


def other_bert(folder, **changes):
    """Write a BERT of another size with the same tokenizer and labels; return its folder."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(builders.bert())
    for key, value in {"id2label": {0: "neg", 1: "pos"}, **changes}.items():
        setattr(config, key, value)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(builders.bert()).save_pretrained(folder)
    return str(folder)


def test_another_teacher_of_its_size_teaches(tmp_path):
    """A model of the same layers and width; with hidden states alone its labels do not matter."""
    teacher = other_bert(tmp_path / "t", id2label={0: "pos", 1: "neg"})
    finetune("bert", tmp_path / "out", **ALONE, teacher=teacher)
    assert not (tmp_path / "out" / "checkpoints" / "teacher.safetensors").exists()
    with pytest.raises(ModelError, match="labels in another order"):
        finetune("bert", tmp_path / "both", **ALONE, distill=0.5, teacher=teacher)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 3}, "teacher has 4 hidden states and the model 3"),
        ({"hidden_size": 32}, r"\[8, \d+, 32\] in the teacher and \[8, \d+, 16\] in the model"),
    ],
    ids=["layers", "width"],
)
def test_teachers_of_another_size(tmp_path, changes, words):
    """Numbers of layers and widths are said, and what to do; nothing is written."""
    teacher = other_bert(tmp_path / "t", **changes)
    with pytest.raises(ModelError, match=f"{words}.*--teacher self.*of its size"):
        finetune("bert", tmp_path / "out", **ALONE, teacher=teacher)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "source"), [("timm", "timm"), ("own", "module")])
def test_networks_that_do_not_tell_their_states(tmp_path, kind, source):
    """Those of timm and a user's own have none by name: refused with what to do instead."""
    with pytest.raises(ModelError, match=f"is from {source}.*leave distill_hidden out"):
        finetune(kind, tmp_path / "out", distill_hidden=1.0)
    assert not (tmp_path / "out").exists()


def test_a_model_that_returns_none(tmp_path, monkeypatch):
    """A network of transformers without hidden states is named."""

    def none(model, spec, inputs, *, hidden_states=False):
        return tasks.Outputs(outputs_of(model, spec, inputs).logits)

    monkeypatch.setattr(hidden_states, "outputs_of", none)
    with pytest.raises(ModelError, match="returns no hidden states"):
        finetune("bert", tmp_path / "out", distill_hidden=1.0)
    assert not (tmp_path / "out").exists()


def test_states_that_are_not_one_a_token(tmp_path, monkeypatch):
    """Where tokens are pooled on the way the mask says nothing of them: refused."""

    def pooled(model, spec, inputs, *, hidden_states=False):
        made = outputs_of(model, spec, inputs, hidden_states=hidden_states)
        return tasks.Outputs(made.logits, tuple(state[:, ::2] for state in made.hidden))

    monkeypatch.setattr(hidden_states, "outputs_of", pooled)
    with pytest.raises(ModelError, match="padded ones cannot be told apart"):
        finetune("bert", tmp_path / "out", distill_hidden=1.0)


def test_settings_that_go_with_it():
    """A teacher goes with either share, the temperature with that of the outputs alone."""
    base = builders.settings("bert", "out")
    builders.config.build({**base, "distill_hidden": 1.0, "teacher": "self"})
    with pytest.raises(RecipeError, match="temperature goes with distill"):
        builders.config.build({**base, "distill_hidden": 1.0, "temperature": 3.0})
    with pytest.raises(RecipeError, match="teacher goes with distill or distill_hidden"):
        builders.config.build({**base, "teacher": "self"})
    with pytest.raises(RecipeError, match="distill_hidden"):
        builders.config.build({**base, "distill_hidden": -1.0})
