"""Stands in for packages that SGLang imports and a machine without a GPU does not have.

SGLang's modules import Triton, its own CUDA kernels, torchvision and a few more at their top, whether they will be used
or not. Here an absent one becomes an inert module: it can be imported, decorated with and subclassed, and whoever calls
one of its kernels gets an error that names it. A package that is installed always wins.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import logging
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

log = logging.getLogger(__name__)

_CANDIDATES = ("triton", "torchvision", "torchaudio", "IPython", "sgl_kernel")
# SGLang asks `find_spec("torchvision")` and then imports it regardless of the answer; for all others the probe decides.
_SEEN_BY_PROBES = frozenset({"torchvision"})


def install() -> tuple[str, ...]:
    """Make `import sglang` possible on this machine. To be called before it; returns what is stood in for."""
    absent = tuple(name for name in _CANDIDATES if importlib.util.find_spec(name) is None)
    if not absent:
        return ()
    sys.meta_path.append(_Finder(frozenset(absent)))
    _hide_from_probes(frozenset(absent))
    # SGLang takes its CPU paths only when told so; without this its rotary embedding reaches for vLLM's kernels.
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    _ignore_page_locking()
    _allow_models_registered_twice()
    log.info("no %s on this machine: inert stand-ins take their place", ", ".join(absent))
    return absent


class _InertType(type):
    """Classes of an absent package: usable as a base, as an annotation, and as an enumeration."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _InertBase(metaclass=_InertType):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Holds what SGLang's module level builds, `tl.constexpr(1)` for one, without meaning anything.
        self.args = args


class _InertModule(types.ModuleType):
    """A module, a function and a decorator at once; which of them shows in how it is used."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__file__ = __file__
        self.__version__ = "0.0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        qualified = f"{self.__name__}.{name}"
        value: Any = sys.modules.get(qualified)
        if value is None:
            value = _InertType(name, (_InertBase,), {"__module__": self.__name__}) if name[0].isupper() else _new(qualified)
        setattr(self, name, value)
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.__name__.startswith("sgl_kernel."):
            raise NotImplementedError(f"{self.__name__} is a CUDA kernel and this machine has no GPU")
        bare_decorator = len(args) == 1 and callable(args[0]) and not kwargs
        return args[0] if bare_decorator else _unchanged

    def __getitem__(self, key: Any) -> Any:
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __bool__(self) -> bool:
        return False


def _unchanged(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _new(name: str) -> _InertModule:
    module = _InertModule(name)
    module.__spec__ = _spec(name)
    return module


def _spec(name: str) -> importlib.machinery.ModuleSpec:
    return importlib.machinery.ModuleSpec(name, _Loader(), is_package=True)


class _Loader(importlib.abc.Loader):
    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _InertModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ == "triton":
            # Used as plain arithmetic outside of kernels.
            vars(module).update(__version__="3.0.0", cdiv=lambda a, b: -(-a // b), next_power_of_2=_next_power_of_2)
        elif module.__name__ == "triton.language":
            vars(module)["constexpr"] = _InertType("constexpr", (_InertBase,), {})


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 0 else 1


class _Finder(importlib.abc.MetaPathFinder):
    """Last on the path, so that only what nobody else finds ends here."""

    def __init__(self, absent: frozenset[str]) -> None:
        self._absent = absent

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return _spec(fullname) if fullname.partition(".")[0] in self._absent else None


def _hide_from_probes(absent: frozenset[str]) -> None:
    """`find_spec("triton") is not None` must stay false, or callers would believe the stand-in."""
    find_spec = importlib.util.find_spec
    hidden = absent - _SEEN_BY_PROBES

    def honest(name: str, package: str | None = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] in hidden:
            return None
        return find_spec(name, package)

    importlib.util.find_spec = honest


def _ignore_page_locking() -> None:
    """Without an accelerator there is no page-locked memory: `pin_memory` then means nothing instead of failing."""
    import torch
    from torch.utils._device import _device_constructors

    if torch.accelerator.is_available():
        return
    # torch remembers the original constructors at first use; fill that before they are wrapped, or
    # `with torch.device(...)` silently stops working.
    _device_constructors()

    def without_pinning(constructor: Callable[..., Any]) -> Callable[..., Any]:
        def construct(*args: Any, **kwargs: Any) -> Any:
            kwargs.pop("pin_memory", None)
            return constructor(*args, **kwargs)

        construct.__name__ = constructor.__name__
        return construct

    for name in ("tensor", "empty", "zeros", "ones", "arange", "full", "empty_like", "zeros_like"):
        setattr(torch, name, without_pinning(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self


def _allow_models_registered_twice() -> None:
    """transformers newer than SGLang's pin already knows some of the model names that SGLang registers."""
    from transformers.models.auto import auto_factory, configuration_auto

    for mapping in (configuration_auto._LazyConfigMapping, auto_factory._LazyAutoMapping):

        def register(self: Any, key: Any, value: Any, exist_ok: bool = False, *, once: Any = mapping.register) -> Any:
            return once(self, key, value, exist_ok=True)

        mapping.register = register
