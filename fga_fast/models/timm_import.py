"""Imports timm, even if torchvision is missing or does not match the installed torch.

timm imports torchvision for FrozenBatchNorm2d and image transforms, which no vision transformer uses. torchvision must
match the exact build of torch: with a CPU or nightly build it may be missing, or fail with "operator torchvision::nms
does not exist". We then import timm with stand-ins for torchvision's names. They leave sys.modules right after the
import, and raise an error if they are called.
"""

from __future__ import annotations

import importlib
import logging
import sys
import threading
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

logger = logging.getLogger(__name__)

_lock = threading.Lock()


class _StandInType(type):
    """Metaclass of the stand-ins for torchvision's classes: they can be subclassed and have every attribute."""

    def __getattr__(cls, name: str) -> _StandInType:
        if name.startswith("__"):
            raise AttributeError(name)  # a stand-in must not seem to support any protocol
        return _StandInType(f"{cls.__name__}.{name}", (), {})

    def __call__(cls, *args: object, **kwargs: object) -> object:
        raise ImportError(f"{cls.__name__} needs torchvision, which is missing or does not fit the installed torch")


class _StandInModule(ModuleType):
    __getattr__ = _StandInType.__getattr__


class _StandIns(MetaPathFinder, Loader):
    """Finds torchvision and all its submodules, and makes empty modules that have every attribute."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if _package(fullname) == "torchvision" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandInModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run: the module makes each name on first use."""


def _package(module: str) -> str:
    return module.partition(".")[0]


def _forget(package: str) -> None:
    for name in [name for name in sys.modules if _package(name) == package]:
        del sys.modules[name]


def _torchvision_fault() -> str:
    """Why the import of torchvision fails; "" if it works."""
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError) as error:  # a build for another torch may raise any of these
        _forget("torchvision")
        return f"{type(error).__name__}: {error}"
    return ""


def import_timm() -> ModuleType:
    """The module timm, imported on the first call.

    Raises:
        ImportError: timm is not installed, or its import fails for another reason than torchvision.
    """
    with _lock:
        if "timm" in sys.modules:
            return sys.modules["timm"]
        if find_spec("timm") is None:
            raise ImportError("timm is not installed; install it with: pip install 'fga_fast[models]'")
        fault = _torchvision_fault()
        if not fault:
            return importlib.import_module("timm")
        logger.info("importing timm without torchvision (%s)", fault)
        stand_ins = _StandIns()
        sys.meta_path.insert(0, stand_ins)
        try:
            return importlib.import_module("timm")
        except ImportError:
            _forget("timm")  # do not leave it half imported
            raise
        finally:
            sys.meta_path.remove(stand_ins)
            _forget("torchvision")
