"""Empty modules for what a library imports and does not need where it is measured."""

import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from typing import Any


def stand_in() -> None:
    """Empty modules for what MultiVae imports and does not need here, where they are not installed."""
    absent = [name for name in ("torchvision", "nltk") if importlib.util.find_spec(name) is None]
    if absent:
        sys.meta_path.append(Empty(absent))


class _Anything(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class _Nothing(metaclass=_Anything):
    """Stands for any class or function of an empty module."""

    def __init__(self, *values: Any, **keywords: Any) -> None: ...


class _Module(types.ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing


class Empty(MetaPathFinder, Loader):
    """Empty packages of these names; last in the path, so that installed ones come first."""

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = packages

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        found = fullname.partition(".")[0] in self.packages
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if found else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass
