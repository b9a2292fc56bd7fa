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
        ("import askewq", "import importlib.util",
         "importlib.util.find_spec('transformers.models.auto.configuration_auto')", IMPORTS),
    ],
    ids=["before", "after", "after the lazy package", "twice", "looked for before"],
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
import askewq
ours = lambda: sum(type(f).__module__.startswith("askewq") for f in sys.meta_path)
print(sorted({"torch", "transformers", "huggingface_hub"} & set(sys.modules)))
print(ours())
import transformers.models.auto.configuration_auto
print(ours())
print("askewq.hf_loading" in sys.modules)
"""
    assert run(program).stdout.split("\n")[:4] == ["[]", "1", "0", "False"]


def test_without_askewq_nothing_is_made_up():
    """In a process without askewq every way in ends with an error, none with random weights."""
    program = """
import sys
import transformers
names = ["AutoConfig", "AutoModel", "AutoModelForSequenceClassification", "AutoModelForCausalLM",
         "AutoModelForImageClassification", "BertForSequenceClassification", "BertModel",
         "LlamaForCausalLM", "ViTForImageClassification", "ResNetForImageClassification"]
for folder in sys.argv[1:]:
    for name in names:
        try:
            getattr(transformers, name).from_pretrained(folder)
        except ValueError as error:
            print(name, "refused", "askewq" in str(error) or "quant_method" in str(error))
        else:
            print(name, "LOADED")
assert "askewq" not in sys.modules
"""
    folders = [finished(kind)[0] for kind in ("own", "timm", "bert", "llama", "vit")]
    done = run(program, *folders)
    lines = done.stdout.strip().split("\n")
    assert len(lines) == 10 * len(folders), done.stderr
    assert all(line.endswith("refused True") for line in lines), done.stdout
