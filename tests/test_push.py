"""`askewq push`: exactly these files in one commit, and clear refusals. No network: a fake Hub."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from builders import command, copy_of, finished

import askewq
from askewq import artifact, hub
from askewq.errors import FormatError, HubError


@dataclass
class FakeHub:
    """Records what a real Hub would be sent."""

    fails: Exception | None = None
    made: list[tuple] = field(default_factory=list)
    commits: list[dict] = field(default_factory=list)

    def create_repo(self, repo, *, private, exist_ok):
        if self.fails is not None:
            raise self.fails
        self.made.append((repo, private, exist_ok))
        return SimpleNamespace(repo_id=f"me/{repo}" if "/" not in repo else repo)

    def upload_folder(
        self, *, repo_id, folder_path, allow_patterns, delete_patterns, commit_message
    ):
        from huggingface_hub.utils import filter_repo_objects

        self.deleted = delete_patterns

        every = [str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*")]
        sent = sorted(filter_repo_objects(every, allow_patterns=allow_patterns))
        self.commits.append({"repo": repo_id, "files": sent, "message": commit_message})
        return SimpleNamespace(commit_url=f"hub/{repo_id}/commit/1")


@pytest.fixture
def fake(monkeypatch):
    """Put a fake Hub in the place of the client's two calls."""
    made, client = FakeHub(), huggingface_hub.HfApi
    monkeypatch.setattr(client, "create_repo", lambda _, *args, **kw: made.create_repo(*args, **kw))
    monkeypatch.setattr(client, "upload_folder", lambda _, **kw: made.upload_folder(**kw))
    return made


FILES = {
    "timm": ["README.md", "config.json", "metrics.json", "model.safetensors", "recipe.yaml"],
    "bert": [
        *("README.md", "config.json", "metrics.json", "model.safetensors", "recipe.yaml"),
        *("tokenizer.json", "tokenizer_config.json"),
    ],
}


@pytest.mark.parametrize("kind", FILES)
def test_one_commit_with_exactly_these_files(fake, tmp_path, kind):
    """Weights, config, preprocessing, figures, recipe and card; no checkpoint, log or remnant."""
    folder = copy_of(kind, tmp_path)
    for name in ("checkpoints/step-00000001/optimizer.bin", "logs/events.out", "a.partial", ".x"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("left over")
    for name in ("customers.json", "notes.md", "token.txt"):  # a user's
        (folder / name).write_text("private")
    (folder / "logs" / "metrics.json").write_text("{}")
    (folder / "checkpoints" / "teacher.safetensors").write_text("left over")
    lines = hub.push(folder, "me/model", private=True)
    assert fake.made == [("me/model", True, True)]
    (commit,) = fake.commits
    assert commit["files"] == FILES[kind]
    assert commit["message"] in lines[-2]
    assert lines[-1].endswith("of this machine")
    assert str(finished(kind)[0]) in lines[-1]  # the recipe's output
    assert lines[0] == "pushed to hub/me/model/commit/1:"


def test_weights_in_several_files(fake, tmp_path):
    """Their index goes with them, and what is loaded is no weight of an earlier push."""
    from huggingface_hub.utils import filter_repo_objects
    from transformers import AutoModelForSequenceClassification

    folder = copy_of("bert", tmp_path)
    before = askewq.load(folder).state_dict()
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="4KB")
    hub.push(folder, "me/model")
    (commit,) = fake.commits
    assert "model.safetensors.index.json" in commit["files"]
    assert sum(name.startswith("model-0") for name in commit["files"]) > 1
    there = ["model.safetensors", "model-00001-of-00009.safetensors", "a.md", *commit["files"]]
    gone = {*filter_repo_objects(there, allow_patterns=fake.deleted)}
    assert {"model.safetensors", "model-00001-of-00009.safetensors"} <= gone
    assert not {"a.md", "config.json", "tokenizer.json"} & gone
    for name in {*(p.name for p in folder.iterdir() if p.is_file())} - {*commit["files"]}:
        (folder / name).unlink()
    after = askewq.load(folder).state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_message_has_the_figures(fake):
    """The commit message names the model, its bits and both figures."""
    folder, metrics = finished("timm")
    hub.push(folder, "model")
    (commit,) = fake.commits
    assert commit["repo"] == "me/model"
    assert commit["message"] == (
        f"test_resnet at 2 bits: accuracy {metrics['reloaded']:.2f} "
        f"(full precision {metrics['full_precision']:.2f})"
    )


def test_the_message_names_no_folder_of_this_machine(fake):
    """Of a local model it has the name, as the card has."""
    for kind, name in (("bert", "bert"), ("own", "nets.py:small")):
        folder, metrics = finished(kind)
        assert metrics["model"].startswith("/")
        hub.push(folder, "model")
        assert fake.commits[-1]["message"].startswith(f"{name} at 2 bits: accuracy")


def test_a_dry_run_sends_nothing_and_prints_what_a_push_sends(fake):
    """`--dry-run` needs no network and prints the very files and message of the push."""
    folder, _ = finished("bert")
    done = command("push", folder, "me/model", "--dry-run")
    assert done.code == 0, done.err
    assert (fake.made, fake.commits) == ([], [])
    hub.push(folder, "me/model")
    (commit,) = fake.commits
    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines[1:-2]] == commit["files"]
    assert lines[-2].endswith(f"commit message: {commit['message']}")


def test_names_of_the_hub_are_no_paths(fake, tmp_path):
    """What the recipe names of this machine is said, and nothing where that is nothing."""
    folder = copy_of("timm", tmp_path)
    recipe = {"model": "test_resnet", "dataset": "owner/set", "output": str(tmp_path / "out")}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    last = hub.push(folder, "me/model", dry_run=True)[-1]
    assert last == f"recipe.yaml and the files beside it name {tmp_path / 'out'} of this machine"
    for damage in (
        (folder / "recipe.yaml").write_text,
        lambda _: (folder / "recipe.yaml").unlink(),
    ):
        damage("")
        assert "commit message" in hub.push(folder, "me/model", dry_run=True)[-1]


class TestBadInput:
    @pytest.mark.parametrize("repo", ["a/b/c", "", "me/na me", "me/--x", "https://hub/me/model"])
    def test_names(self, fake, repo):
        """A name that no repository has is refused before anything is sent."""
        with pytest.raises(HubError, match="pass owner/name"):
            hub.push(finished("timm")[0], repo)
        assert not fake.made

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
    def test_no_artifact(self, fake, tmp_path, name):
        """A folder without weights or config is refused by name."""
        folder = copy_of("timm", tmp_path)
        (folder / name).unlink()
        with pytest.raises(FormatError, match=name):
            hub.push(folder, "me/model")
        assert not fake.made

    @pytest.mark.parametrize("name", ["metrics.json", "README.md"])
    def test_no_figures(self, fake, tmp_path, name):
        """Without figures or card nothing is pushed."""
        folder = copy_of("timm", tmp_path)
        (folder / name).unlink()
        with pytest.raises(FormatError, match=name):
            hub.push(folder, "me/model")

    @pytest.mark.parametrize("text", ["{", "[]", json.dumps({"model": "m"})])
    def test_damaged_figures(self, fake, tmp_path, text):
        """Figures that cannot be read are refused with their path."""
        folder = copy_of("timm", tmp_path)
        (folder / "metrics.json").write_text(text)
        with pytest.raises(FormatError, match=r"metrics\.json is damaged"):
            hub.push(folder, "me/model")

    @pytest.mark.parametrize("error", [PermissionError("403 Forbidden"), OSError("no route")])
    def test_what_the_hub_refuses(self, fake, error):
        """No permission and no network: the reason, and what to do; exit code 2."""
        fake.fails = error
        done = command("push", finished("timm")[0], "me/model")
        assert done.code == 2
        assert str(error) in done.err
        assert "hf auth login" in done.err
        assert "--dry-run" in done.err

    def test_the_real_client_offline(self):
        """The real client, which the tests keep offline, ends in the same error."""
        with pytest.raises(HubError, match="did not take 'me/model'"):
            hub.push(finished("timm")[0], "me/model")


def test_a_vocabulary_of_any_name(fake, tmp_path, monkeypatch):
    """The files that a tokenizer writes are pushed, whatever they are called."""
    folder = copy_of("bert", tmp_path)
    kind = type(artifact.load_artifact(folder).preprocessing.tokenizer)
    monkeypatch.setattr(kind, "vocab_files_names", {"merges_file": "bpe[1].codes"})
    (folder / "bpe[1].codes").write_text("a b")
    (folder / "other.codes").write_text("mine")
    template = "additional_chat_templates/tool_use.jinja"
    for name in (template, "additional_chat_templates/x.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{{ messages }}")
    hub.push(folder, "me/model")
    assert fake.commits[0]["files"] == sorted([*FILES["bert"], "bpe[1].codes", template])
