"""`import askewq` is enough for transformers, in either order, and imports nothing for it."""

import subprocess
import sys

import pytest
from builders import finished

LOAD = "model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])"
IMPORTS = "from transformers import AutoModelForSequenceClassification"


def run(program: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh process."""
    command = [sys.executable, "-c", program, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    "lines",
    [
        ("import askewq", IMPORTS),
        (IMPORTS, "import askewq"),
        ("import transformers", "import askewq", IMPORTS),
        ("import askewq", "import askewq.registration as r", "r.register_with_transformers()",
         IMPORTS),
    ],
    ids=["before", "after", "after the lazy package", "twice"],
)  # fmt: skip
def test_either_order(lines):
    """Whichever is imported first, an Auto class loads the artifact with packed layers."""
    show = "print(type(model).__name__, any('Packed' in type(m).__name__ for m in model.modules()))"
    done = run("\n".join(["import sys", *lines, LOAD, show]), finished("bert")[0])
    assert done.stdout.strip() == "BertForSequenceClassification True", done.stderr


def test_nothing_is_imported_for_it():
    """The import of askewq brings neither transformers nor torch, and one finder at most."""
    program = """
import sys
before = len(sys.meta_path)
import askewq
print(sorted({"torch", "transformers", "huggingface_hub"} & set(sys.modules)))
print(len(sys.meta_path) - before)
import transformers.models.auto.configuration_auto
print(len(sys.meta_path) - before)
print("askewq.hf_loading" in sys.modules)
"""
    assert run(program).stdout.split("\n")[:4] == ["[]", "1", "0", "False"]


@pytest.mark.parametrize("kind", ["own", "timm", "bert", "llama", "vit"])
def test_without_askewq_nothing_is_made_up(kind):
    """In a process without askewq every way in ends with an error, none with random weights."""
    program = """
import sys
import transformers
names = ["AutoConfig", "AutoModel", "AutoModelForSequenceClassification", "AutoModelForCausalLM",
         "AutoModelForImageClassification", "BertForSequenceClassification", "BertModel",
         "LlamaForCausalLM", "ViTForImageClassification", "ResNetForImageClassification"]
for name in names:
    try:
        getattr(transformers, name).from_pretrained(sys.argv[1])
    except ValueError as error:
        print(name, "refused", "askewq" in str(error) or "quant_method" in str(error))
    else:
        print(name, "LOADED")
assert "askewq" not in sys.modules
"""
    done = run(program, finished(kind)[0])
    lines = done.stdout.strip().split("\n")
    assert len(lines) == 10, done.stderr
    assert all(line.endswith("refused True") for line in lines), done.stdout
