"""`import askewq` makes transformers know artifacts, without importing transformers.

transformers has no entry points for plug-ins, so something has to happen when it and askewq are
both imported, in whatever order. Imported after transformers, askewq registers at once; imported
before, it waits for the one module of transformers that holds the register, and steps aside.
Only a name and this small class are registered: what they stand for is loaded on first use.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from askewq.vocabulary import MODEL_TYPE

REGISTER = "transformers.models.auto.configuration_auto"


class ArtifactConfig:
    """What transformers finds under the model type of an artifact: the way to its own config."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, content: dict[str, Any], **kwargs: Any) -> Any:
        """Return the config of the network that an artifact's config.json describes."""
        from askewq.hf_loading import config_from

        return config_from(content, **kwargs)


def register_with_transformers() -> None:
    """Register artifacts with transformers now, or as soon as it is imported."""
    if REGISTER in sys.modules:
        _register(sys.modules[REGISTER])
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _register(module: ModuleType) -> None:
    module.AutoConfig.register(MODEL_TYPE, ArtifactConfig, exist_ok=True)


class _Waiting(MetaPathFinder):
    """Finds one module as it would be found anyway, and registers after its import."""

    _asks = False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != REGISTER or self._asks:
            return None
        self._asks = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asks = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
