"""Makes EfficientNet-Lite known to transformers as soon as transformers is there, without importing it first.

Whoever imports METR can load detectors that carry the backbone; whoever does not use transformers does not wait for it.
"""

import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# As soon as the one is imported, the other is imported and registers itself; no sooner, for transformers imports in
# circles.
_REGISTRARS = {
    "transformers.models.auto.configuration_auto": "metr.registered_config",
    "transformers.models.auto.modeling_auto": "metr.models.backbones.efficientnet_lite",
}


class _Follower(MetaPathFinder):
    """Finds what everybody would find, and has it followed by its registrar."""

    def find_spec(
        self, fullname: str, path: Iterable[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """None, but for the modules that are waited for."""
        if fullname not in _REGISTRARS:
            return None
        spec = PathFinder.find_spec(fullname, None if path is None else [*path], target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            import_module(_REGISTRARS[fullname])

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register_backbone() -> None:
    """Registers now what can be, and the rest when transformers is imported; more than once does nothing."""
    for name, registrar in _REGISTRARS.items():
        if name in sys.modules:
            import_module(registrar)
    if not any(isinstance(finder, _Follower) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Follower())
