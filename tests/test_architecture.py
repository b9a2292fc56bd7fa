"""The floors of docs/architecture.md: which file may import which.

The imports of every file are read from its source, those inside functions included, so that a
lazy import cannot hide a dependency.
"""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import askewq

PACKAGE = Path(askewq.__file__).parent

# A file imports from floors below, or from its own floor as long as no cycle arises.
FLOORS = [
    ("errors", "vocabulary", "constraint", "anneal", "text", "wording"),
    (
        *("config", "contradictions", "recipe_files", "grid", "kinds", "pack", "methods", "mixed"),
        *("disk", "digest", "trust", "signals", "divergence", "sharding", "plan_table"),
    ),
    (
        "layers",
        "activations",
        "kernels",
        "optim",
        "level_groups",
        "rivals",
        "manifest",
        "patterns",
        "probe",
    ),
    ("wrap", "checkpoint", "packed", "refine", "polish"),
    (
        *("preprocessing", "spec", "timm_models", "hf_models", "own_models", "models"),
        *(
            "columns",
            "sources",
            "data",
            "batches",
            "tasks",
            "sentence_files",
            "embeddings",
            "hidden_states",
            "distill",
            "described",
            "artifact",
            "samples",
            "evaluate",
            "target",
            "sensitivity",
        ),
        *("processes", "streams", "terminal"),
    ),
    (
        *(
            "report",
            "card",
            "training_state",
            "snapshots",
            "output",
            "choices",
            "hub",
            "registration",
            "hf_loading",
        ),
        *("export", "export_dense", "export_compressed_tensors"),
        *(
            "export_onnx",
            "onnx_inputs",
            "onnx_weights",
            "export_gguf",
            "gguf_types",
            "gguf_tokenizer",
        ),
    ),
    ("loop", "train", "demo", "inspection", "trial", "launch", "planning", "flags"),
    ("cli",),
    ("__main__",),
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
# Floors 0 to 3 serve anyone who brings torch alone.
TORCH_ONLY = 3
ALLOWED = {"torch", "safetensors"}
ALLOWED_MORE = {"config": {"pydantic"}, "recipe_files": {"yaml"}}


def sources() -> dict[str, str]:
    """Return the source of every file of the package but __init__.py, by module name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts != ("__init__",):
            found[".".join(part for part in parts if part != "__init__")] = path.read_text("utf-8")
    return found


def public_names() -> dict[str, tuple[str, str]]:
    """Return the file and the name there of every public name, as declared to type checkers."""
    declared = {}
    for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("askewq."):
            for alias in filter(lambda alias: alias.asname, node.names):
                declared[alias.asname] = node.module.removeprefix("askewq."), alias.name
    return declared


def floor_of(module: str) -> int | None:
    """Return the floor of a module; the files of a folder live where the folder does."""
    return FLOOR_OF.get(module.split(".")[0])


def imports(source: str, package: str = "") -> Iterator[tuple[str, str]]:
    """Yield ``(module, name)`` for everything that a file imports; name is "" for a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = ["askewq", *filter(None, package.split("."))]
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, *filter(None, [base])])
            yield from ((base, alias.name) for alias in node.names)


def own_imports(module: str, files: dict[str, str]) -> set[str]:
    """Return the modules of the package that a file imports, as names without ``askewq.``."""
    is_folder = any(name.startswith(module + ".") for name in files)
    package = module if is_folder else module.rpartition(".")[0]
    found = set()
    for base, name in imports(files[module], package):
        head, _, rest = base.partition(".")
        if head != "askewq":
            continue
        if name and f"{rest}.{name}".lstrip(".") in files:
            found.add(f"{rest}.{name}".lstrip("."))
        elif rest:
            found.add(rest)
        elif name in public_names():  # the file that it lives in
            found.add(public_names()[name][0])
        elif name != "__version__":
            found.add("the whole package")
    return found


def without_a_floor(files: dict[str, str]) -> list[str]:
    """Return the files that no floor lists."""
    return sorted(module for module in files if floor_of(module) is None)


def upward(files: dict[str, str]) -> list[str]:
    """Return every import from a higher floor, or from none, as ``'a imports b'``."""
    return sorted(
        f"{module} imports {other}"
        for module in files
        for other in own_imports(module, files)
        if (floor := floor_of(other)) is None or floor > (floor_of(module) or 0)
    )


def cycle(files: dict[str, str]) -> list[str]:
    """Return the modules along one import cycle, or an empty list."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done or module not in files:
            return []
        for other in sorted(own_imports(module, files)):
            if found := visit(other, [*path, module]):
                return found
        done.add(module)
        return []

    return next(filter(None, (visit(module, []) for module in sorted(files))), [])


class ModuleLevel(ast.NodeTransformer):
    """Removes what does not run on import: function bodies and ``if TYPE_CHECKING`` blocks."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.Pass:
        return ast.Pass()

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.Pass:
        return ast.Pass()

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            return node.orelse
        return node


def heavy(files: dict[str, str]) -> list[str]:
    """Return the imports at module level on floors 0 to 3 beyond torch and safetensors."""
    found = []
    for module, source in files.items():
        if (floor_of(module) or 0) > TORCH_ONLY:
            continue
        allowed = {"askewq"} | ALLOWED | ALLOWED_MORE.get(module, set()) | sys.stdlib_module_names
        tree = ModuleLevel().visit(ast.parse(source))
        tops = {base.partition(".")[0] for base, _ in imports(ast.unparse(tree))}
        found += [f"{module} imports {top}" for top in sorted(tops - {""} - allowed)]
    return sorted(found)


def test_every_file_has_a_floor():
    """A new file must be given its floor, here and in docs/architecture.md."""
    assert without_a_floor(sources()) == []


def test_no_file_imports_from_above():
    """Imports go down, or sideways on one floor."""
    assert upward(sources()) == []


def test_no_import_cycle():
    """No file imports itself by a detour."""
    assert cycle(sources()) == []


def test_the_lower_floors_need_torch_alone():
    """Optimizer, layers, walker and file format import nothing beyond torch and safetensors."""
    assert heavy(sources()) == []


def test_the_lower_floors_work_without_the_heavy_libraries():
    """With timm, transformers and the like out of reach the optimizer still trains."""
    program = """
import sys
for name in ("timm", "transformers", "datasets", "accelerate", "pydantic", "PIL", "rich"):
    sys.modules[name] = None
import torch, askewq, askewq.checkpoint
model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
askewq.quantize(model, bits=2)
optimizer = askewq.AskewSGD(model, lr=0.1)
model(torch.ones(2, 4)).sum().backward()
optimizer.step()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_package_itself_imports_nothing():
    """`import askewq` does not wait for torch; the names come on first use."""
    program = "import askewq, sys; print(sorted({'torch', 'timm', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_public_names():
    """What type checkers are told about each public name is what `import askewq` gives."""
    assert sorted(askewq.__all__) == sorted([*public_names(), "__version__"])
    for name, (home, original) in public_names().items():
        module = importlib.import_module(f"askewq.{home}")
        assert getattr(askewq, name) is getattr(module, original), name
    with pytest.raises(AttributeError, match="module 'askewq' has no attribute 'quantise'"):
        getattr(askewq, "quantise")  # noqa: B009  # as misspelled by a user


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"grid": "from askewq import layers", "layers": ""}, ["grid imports layers"]),
        ({"grid": "import askewq.layers", "layers": ""}, ["grid imports layers"]),
        ({"grid": "from . import layers", "layers": ""}, ["grid imports layers"]),
        ({"grid": "from .layers import snap_", "layers": ""}, ["grid imports layers"]),
        ({"grid": "def f():\n  from askewq.layers import snap_", "layers": ""},
         ["grid imports layers"]),
        ({"grid": "from askewq import quantize"}, ["grid imports wrap"]),
        ({"grid": "import askewq"}, ["grid imports the whole package"]),
        ({"wrap": "from askewq.export import onnx", "export": "", "export.onnx": ""},
         ["wrap imports export.onnx"]),
        ({"export.onnx": "from .. import cli", "export": "", "cli": ""},
         ["export.onnx imports cli"]),
        ({"grid": "from askewq.unheard import x"}, ["grid imports unheard"]),
        ({"layers": "from askewq import __version__, grid", "grid": "import torch"}, []),
    ],
)  # fmt: skip
def test_the_check_finds_imports_from_above(files, expected):
    """The rule itself can fail: every way to write an import from above is found."""
    assert upward(files) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"grid": "from askewq import pack", "pack": "from askewq.grid import x"},
         ["grid", "pack", "grid"]),
        ({"data": "def f():\n  import askewq.tasks", "tasks": "import askewq.models",
          "models": "import askewq.data"}, ["data", "tasks", "models", "data"]),
        ({"anneal": "from askewq import constraint, errors", "constraint": "", "errors": ""}, []),
    ],
)  # fmt: skip
def test_the_check_finds_cycles(files, expected):
    """The rule itself can fail: a cycle is reported with its stations."""
    assert cycle(files) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"optim": "import torch, timm.layers"}, ["optim imports timm"]),
        ({"optim": "from numpy import array"}, ["optim imports numpy"]),
        ({"optim": "if True:\n  import numpy"}, ["optim imports numpy"]),
        ({"optim": "class A:\n  import numpy"}, ["optim imports numpy"]),
        ({"grid": "import yaml"}, ["grid imports yaml"]),
        ({"config": "import pydantic, math", "recipe_files": "import yaml"}, []),
        ({"config": "import yaml"}, ["config imports yaml"]),
        ({"optim": "def f():\n  import timm"}, []),
        ({"optim": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  import timm"}, []),
        ({"models": "import timm"}, []),
    ],
)  # fmt: skip
def test_the_check_finds_heavy_imports(files, expected):
    """The rule itself can fail: what runs on import is found, what does not is passed over."""
    assert heavy(files) == expected


def test_the_check_names_files_without_a_floor():
    """The rule itself can fail: unknown files are named, files in a known folder are known."""
    assert without_a_floor({"grid": "", "helpers": "", "export.gguf": ""}) == ["helpers"]
