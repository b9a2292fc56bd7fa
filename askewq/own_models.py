"""A user's own network and weights: path/to/file.py:factory, and state dicts in files."""

import importlib.util
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.parameter import is_lazy

from askewq.errors import ModelError, near
from askewq.spec import first_line


def call_factory(name: str) -> nn.Module:
    """Import path/to/file.py and return what its factory builds.

    Raises:
        ModelError: no such file or function, one that fails or returns no module, or a buffer
            that cannot be loaded into.
    """
    file, _, factory_name = name.rpartition(":")
    if not file:
        raise ModelError(f"{name!r} names no file: a model of your own is path/to/file.py:factory.")
    path = Path(file).resolve()
    # Known to Python by a name of its own, as dataclasses and pickle want it.
    unique = f"askewq_user_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    spec = importlib.util.spec_from_file_location(unique, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ModelError(f"there is no file {file!r} to take {factory_name!r} from.")
    module = sys.modules[unique] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
        factory = _get_factory(vars(module), factory_name, file)
        model = factory()
    except ModelError:
        raise
    except SystemExit as end:
        raise ModelError(
            f"{name} ended Python ({end.code}) while it was read; what a script does when it is "
            'run belongs under if __name__ == "__main__".'
        ) from end
    except Exception as error:
        raise ModelError(f"{name} failed: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent))
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} returned a {type(model).__name__}, not a torch.nn.Module.")
    for key, buffer in model.named_buffers():
        if not is_lazy(buffer) and buffer.numel() and 0 in _strides(buffer):
            raise ModelError(
                f"the buffer {key!r} of {name} was expanded, so that several of its numbers are "
                "one, and nothing can be loaded into it; register its .clone()."
            )
    return model.float()


def _strides(tensor: torch.Tensor) -> list[int]:
    """Return how far apart the numbers of a tensor are in each dimension of several."""
    return [stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]


def _get_factory(names: Mapping[str, Any], wanted: str, file: str) -> Callable[[], Any]:
    factories = [name for name, value in names.items() if callable(value) and name[0] != "_"]
    if wanted not in factories:
        raise ModelError(
            f"{file} has no function {wanted!r}{near(wanted, factories)}; it has: "
            f"{', '.join(factories) or 'none'}."
        )
    return names[wanted]  # type: ignore[no-any-return]


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict from safetensors, or from a pickle that holds nothing but tensors.

    Raises:
        ModelError: unreadable, or a pickle with anything else in it.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the weights {path} cannot be read: {first_line(error)}") from error
    except Exception as error:  # unpickling fails in as many ways as there are damaged files
        raise ModelError(
            f"the weights {path} are a pickle that holds more than tensors, or are damaged, and "
            f"were not loaded ({first_line(error)}); convert them to safetensors."
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    named = isinstance(state, dict) and all(isinstance(key, str) for key in state)
    if not named or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelError(f"the weights {path} are not a mapping of names to tensors.")
    return state


def _cut_off(model: nn.Module) -> tuple[str, ...]:
    """Return how the keys begin of a head that a timm network was made without.

    timm names the classifier, beside which a norm or a layer may have gone as well.
    """
    if getattr(model, "num_classes", None) != 0:
        return ()
    heads: Any = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    names = [heads] if isinstance(heads, str) else heads
    return tuple(f"{name.split('.')[0]}." for name in names)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict from a file into a model, in place.

    Raises:
        ModelError: other keys or shapes than the model's.
    """
    state, target = read_state(path), model.state_dict()
    head = _cut_off(model)
    state = {k: tensor for k, tensor in state.items() if k in target or not k.startswith(head)}
    missing = [key for key in target if key not in state]
    extra = [key for key in state if key not in target]
    # BatchNorm's step counter is new in old checkpoints and decides nothing in the forward pass.
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    # A file may have a tensor of several names under one of them.
    named = dict(model.named_parameters(remove_duplicate=False))
    present = {id(tensor) for key, tensor in named.items() if key in state}
    missing = [key for key in missing if id(named.get(key)) not in present]
    if missing or extra:
        hint = near(extra[0], missing) if extra and missing else ""
        raise ModelError(
            f"the weights {path} do not fit the model: {len(missing)} keys are missing "
            f"({', '.join(missing[:5]) or 'none'}), {len(extra)} are unknown "
            f"({', '.join(extra[:5]) or 'none'}){hint}."
        )
    for key, tensor in state.items():
        if tensor.is_floating_point() != target[key].is_floating_point():
            raise ModelError(
                f"the weights {path} do not fit the model: {key!r} is {tensor.dtype} there and "
                f"{target[key].dtype} in the model; whole numbers may be codes without a scale."
            )
        if tensor.shape != target[key].shape:
            raise ModelError(
                f"the weights {path} do not fit the model: {key!r} is {list(tensor.shape)} there "
                f"and {list(target[key].shape)} in the model (another number of labels, perhaps)."
            )
    model.load_state_dict(state, strict=False)
