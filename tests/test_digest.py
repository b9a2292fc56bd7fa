"""Digests: every bit of an artifact counts, and the definition is that of docs/format.md."""

import hashlib
import json

import builders
import pytest
import torch
from builders import copy_of, edit_config, finished, manifest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import askewq
from askewq import artifact, checkpoint, digest
from askewq.errors import FormatError


def by_the_page(path) -> str:
    """Compute the digest of a packed file from docs/format.md alone."""
    with safe_open(path, "pt") as file:
        text = file.metadata()["askewq"]
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    found = hashlib.sha256()
    found.update(text.replace(json.loads(text)["digest"], "0" * 64).encode() + b"\n")
    for name in sorted(header.keys() - {"__metadata__"}):
        entry = header[name]
        first, last = entry["data_offsets"]
        line = json.dumps([name, entry["dtype"], entry["shape"]], separators=(",", ":"))
        found.update(line.encode() + b"\n" + content[8 + length + first : 8 + length + last])
    return found.hexdigest()


@pytest.mark.parametrize("kind", ["own", "timm", "llama"])
def test_the_digest_is_the_one_that_the_page_defines(kind):
    """A reader that follows docs/format.md gets the digest that the writer wrote."""
    path = finished(kind)[0] / "model.safetensors"
    assert manifest(path)["digest"] == by_the_page(path)


def test_it_does_not_depend_on_the_layout(tmp_path):
    """The same content written by another program, with entries of its own, is accepted."""
    folder = copy_of("own", tmp_path)
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = dict(reversed(load_file(path).items()))
    save_file(tensors, path, {**metadata, "format": "pt"})
    assert checkpoint.read(path).digest == metadata["askewq"].split('"digest":"')[1][:64]


def test_every_flipped_bit_is_found(tmp_path):
    """A bit flipped anywhere in the file is refused, or changes nothing that is read."""
    folder = copy_of("own", tmp_path)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    expected = checkpoint.read(path).dense_state()
    refused = 0
    for position in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        try:
            state = checkpoint.read(path).dense_state()
        except FormatError:
            refused += 1
            continue
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
    assert refused > len(content) // 7 - 20


@pytest.mark.parametrize("claimed", [None, 3, "", "0" * 63, "g" * 64, "0" * 64, ["a"]])
def test_digests_that_are_none(claimed):
    """A digest of another type, length or content is refused."""
    tensors = {"a": torch.zeros(2)}
    with pytest.raises(FormatError, match="digest"):
        digest.check_seal(json.dumps({"digest": claimed}), claimed, tensors)


def test_a_type_that_the_format_lacks():
    """A tensor of a type without a name in the format is named."""
    with pytest.raises(FormatError, match="complex128"):
        digest.of_weights("", {"a": torch.zeros(2, dtype=torch.complex128)})


class TestConfig:
    @pytest.mark.parametrize(
        "change",
        [
            {"labels": ["green", "blue", "red"]},
            {"name": "another"},
            {"preprocessing": {"mean": [0.5]}},
            {"arguments": {"model_name": "test_vit"}},
        ],
        ids=str,
    )
    def test_a_change_is_found(self, tmp_path, change):
        """A config.json that says something else than it did when it was written is refused."""
        folder = copy_of("timm", tmp_path)
        edit_config(folder, seal=False, **change)
        with pytest.raises(FormatError, match=r"config\.json does not have the digest"):
            askewq.load(folder)

    def test_version_1_has_none(self, tmp_path):
        """A config.json of version 1 is read without a digest, one of version 2 is not."""
        folder = copy_of("timm", tmp_path)
        edit_config(folder, digest=None, askewq_version=1)
        assert artifact.read_spec(folder)[0].labels == ("blue", "green", "red")
        edit_config(folder, seal=False, askewq_version=2)
        with pytest.raises(FormatError, match="lacks digest"):
            artifact.read_spec(folder)

    def test_white_space_does_not_count(self, tmp_path):
        """The same values, indented otherwise, are the same config."""
        folder = copy_of("timm", tmp_path)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()), indent=7, sort_keys=True))
        askewq.load(folder)


class TestVerify:
    @pytest.mark.parametrize("kind", ["own", "timm", "bert"])
    def test_says_what_was_checked(self, kind):
        """`inspect --verify` names the digest, and whether the weights fit the network."""
        folder, _ = finished(kind)
        outcome = builders.command("inspect", folder, "--verify")
        assert (outcome.code, outcome.err) == (0, "")
        assert manifest(folder / "model.safetensors")["digest"] in outcome.out
        assert ("they fit the network" in outcome.out) == (kind != "own")
        assert ("the tokenizer beside them" in outcome.out) == (kind == "bert")

    @pytest.mark.parametrize(
        ("kind", "file", "reason"),
        [
            ("bert", "tokenizer.json", "tokenizer"),
            ("llama", "generation_config.json", "generation_config.json cannot be read"),
        ],
    )
    def test_refuses_damaged_files_beside_the_weights(self, tmp_path, kind, file, reason):
        """The weights are whole, and the artifact cannot be used."""
        folder = copy_of(kind, tmp_path)
        (folder / file).write_text("{")
        outcome = builders.command("inspect", folder, "--verify")
        assert outcome.code == 2
        assert reason in outcome.err

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
    def test_refuses_damage(self, tmp_path, name):
        """A changed byte in either file is an error with exit code 2."""
        folder = copy_of("timm", tmp_path)
        content = bytearray((folder / name).read_bytes())
        content[content.index(b"test_resnet") if name == "config.json" else -5] ^= 1
        (folder / name).write_bytes(content)
        outcome = builders.command("inspect", folder, "--verify")
        assert outcome.code == 2
        assert "digest" in outcome.err

    def test_refuses_version_1(self, tmp_path):
        """What has no digest is not said to be verified."""
        folder = copy_of("timm", tmp_path)
        edit_config(folder, digest=None, askewq_version=1)
        outcome = builders.command("inspect", folder, "--verify")
        assert outcome.code == 2
        assert "not verified" in outcome.err

    def test_refuses_what_is_no_artifact(self):
        """The name of a model has nothing to verify."""
        assert builders.command("inspect", "resnet18", "--verify").code == 2
