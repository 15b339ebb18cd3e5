"""Work that waits for an import: importing `mlp_fusion` costs next to nothing, and torch and transformers no more.

`import mlp_fusion` has to change a few methods of transformers (see `store.hosts`), whose modules take seconds to
import. A finder in front of Python's own waits for them to be imported by whoever needs them.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

Action = Callable[[ModuleType], None]


class _Loader(importlib.abc.Loader):
    """Another loader, and what follows once it has run."""

    def __init__(self, loader: importlib.abc.Loader, action: Action) -> None:
        self.loader, self.action = loader, action

    def __getattr__(self, name: str) -> Any:
        """Whatever else loaders are asked for: sources, resources, file names."""
        return getattr(self.loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module is left as if it had been imported without any of this.
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.action(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds what the finders behind it find, for the modules that `wanted` picks."""

    def __init__(self, wanted: Callable[[str], bool], action: Action) -> None:
        self.wanted, self.action = wanted, action

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not self.wanted(name):
            return None
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :]
        specs = (finder.find_spec(name, path, target) for finder in behind if hasattr(finder, "find_spec"))
        spec = next((found for found in specs if found is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.action)  # type: ignore[arg-type]
        return spec


def on_demand(package: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__` that imports its public names when they are asked for.

    Args:
        package: the module's name.
        places: public name -> the module below `package` that holds it.
    """

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{places[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return get


def when_imported(wanted: Callable[[str], bool], action: Action) -> None:
    """Call `action(module)` after every module whose name is `wanted` has been imported; now, for those that are."""
    sys.meta_path.insert(0, _Finder(wanted, action))
    for name, module in list(sys.modules.items()):
        if wanted(name):
            action(module)
