# SPDX-License-Identifier: Apache-2.0
"""Tuners whose answers are kept in a file, and that file.

A file is JSON: {device name or "*": {"module.attribute": {key: value}}}. voxgemm's own choices need
no tuning: its launchers are tuners without configurations, which measure nothing.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pkgutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Config = dict[str, Any]


class PersistentCacheAutoTuner:
    """kernel(*args, **kwargs, **config) with the fastest of several configs, measured once per key.

    configs, or config_fn(*args, **kwargs), are what may be chosen from; key names arguments, or
    key_fn(*args, **kwargs) gives the key. Without configs the kernel runs as it is called, unless
    the cache knows something for the key.
    """

    def __init__(
        self,
        kernel: Callable[..., Any],
        configs: Sequence[Config] | None = None,
        key: Sequence[str] | None = None,
        config_fn: Callable[..., Sequence[Config]] | None = None,
        key_fn: Callable[..., Any] | None = None,
        warmup: int = 3,
        runs: int = 10,
        verbose: bool = False,
    ):
        self.kernel = kernel
        self.configs = configs
        self.key = key
        self.config_fn = config_fn
        self.key_fn = key_fn
        self.warmup = warmup
        self.runs = runs
        self.verbose = verbose or os.environ.get("FLEX_GEMM_AUTOTUNER_VERBOSE", "0") == "1"
        self.cache: dict[str, Config] = {}
        self.__name__ = getattr(kernel, "__name__", type(kernel).__name__)
        self.__doc__ = kernel.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.configs and self.config_fn is None:
            return self.kernel(*args, **kwargs)
        key = str(self._key(args, kwargs))
        if key not in self.cache:
            configs = list(self.configs or self.config_fn(*args, **kwargs))
            if len(configs) > 1 and _may_not_measure():
                return self.kernel(*args, **kwargs, **configs[0])
            self.cache[key] = self._fastest(configs, args, kwargs)
            if self.verbose:
                print(f"{self.__name__}: {self.cache[key]} for {key}")
            if _settings().AUTOSAVE_AUTOTUNE_CACHE:
                save_autotune_cache()
        return self.kernel(*args, **kwargs, **self.cache[key])

    def _key(self, args: tuple[Any, ...], kwargs: Config) -> Any:
        if self.key_fn is not None:
            return self.key_fn(*args, **kwargs)
        bound = inspect.signature(self.kernel).bind_partial(*args, **kwargs).arguments
        if self.key is not None:
            return tuple(bound[name] for name in self.key)
        return tuple(
            (tuple(value.shape), str(value.dtype)) if isinstance(value, torch.Tensor) else value
            for value in (*args, *kwargs.values())
            if isinstance(value, torch.Tensor | int | float | str | None)
        )

    def _fastest(self, configs: list[Config], args: tuple[Any, ...], kwargs: Config) -> Config:
        if not configs:
            raise ValueError(f"{self.__name__} has no config to choose from")
        if len(configs) == 1:
            return configs[0]
        seconds = [self._measured(config, args, kwargs) for config in configs]
        return configs[seconds.index(min(seconds))]

    def _measured(self, config: Config, args: tuple[Any, ...], kwargs: Config) -> float:
        def settle() -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        for _ in range(self.warmup):
            self.kernel(*args, **kwargs, **config)
        settle()
        begin = time.perf_counter()
        for _ in range(self.runs):
            self.kernel(*args, **kwargs, **config)
        settle()
        return (time.perf_counter() - begin) / max(self.runs, 1)


class TritonPersistentCacheAutotuner(PersistentCacheAutoTuner):
    """For isinstance: nothing here is one."""


def autotune(
    configs: Sequence[Config] | None = None,
    key: Sequence[str] | None = None,
    config_fn: Callable[..., Sequence[Config]] | None = None,
    key_fn: Callable[..., Any] | None = None,
    warmup: int = 3,
    runs: int = 10,
    verbose: bool = False,
) -> Callable[[Callable[..., Any]], PersistentCacheAutoTuner]:
    """Decorates a kernel with a PersistentCacheAutoTuner."""

    def decorate(kernel: Callable[..., Any]) -> PersistentCacheAutoTuner:
        return PersistentCacheAutoTuner(
            kernel, configs, key, config_fn, key_fn, warmup, runs, verbose
        )

    return decorate


def triton_autotune(*args: Any, **kwargs: Any) -> Callable[[Callable[..., Any]], Any]:
    """triton.autotune, for a program's own Triton kernels; needs Triton."""
    import triton

    return triton.autotune(*args, **kwargs)


def _may_not_measure() -> bool:
    if torch.compiler.is_compiling() or torch.are_deterministic_algorithms_enabled():
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _settings() -> Any:
    return sys.modules[__name__.partition(".")[0]]


def walk_package(package_name: str, fn: Callable[[str], None]) -> None:
    """fn(full name) of every module in a package, however deep."""
    package = importlib.import_module(package_name)
    for _, name, is_package in pkgutil.iter_modules(getattr(package, "__path__", ())):
        full_name = f"{package_name}.{name}"
        if is_package:
            walk_package(full_name, fn)
        else:
            fn(full_name)


def _tuners() -> dict[str, PersistentCacheAutoTuner]:
    found = {}

    def collect(module_name: str) -> None:
        for name, value in vars(importlib.import_module(module_name)).items():
            if isinstance(value, PersistentCacheAutoTuner):
                found[f"{module_name}.{name}"] = value

    walk_package(__name__.partition(".")[0], collect)
    return found


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def get_autotune_cache() -> dict[str, dict[str, dict[str, Any]]]:
    """{device: {"module.attribute": {key: config}}} of every tuner in this process."""
    return {_device_name(): {name: dict(tuner.cache) for name, tuner in _tuners().items()}}


def _read(path: str) -> dict[str, Any]:
    """{} where there is no file; a file that cannot be used is said once."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        if isinstance(content, dict):
            return content
        problem: object = f"it holds a {type(content).__name__}, expected an object"
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        problem = error
    warnings.warn(f"flex_gemm: no tuning is read from {path}: {problem}", stacklevel=3)
    return {}


def _path(path: str | os.PathLike[str] | None) -> str:
    if path is None:
        return _settings().AUTOTUNE_CACHE_PATH
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path is a {type(path).__name__}, expected a path")
    return os.fspath(path)


def save_autotune_cache(path: str | os.PathLike[str] | None = None) -> None:
    """Merges what is known into the file, key by key; other entries of the file stay."""
    path = _path(path)
    folder = os.path.dirname(path) or "."
    try:
        os.makedirs(folder, exist_ok=True)
        content = _read(path)
        for device, tuners in get_autotune_cache().items():
            known = content.get(device)
            content[device] = known if isinstance(known, dict) else {}
            for name, answers in tuners.items():
                old = content[device].get(name)
                content[device][name] = {**(old if isinstance(old, dict) else {}), **answers}
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False, encoding="utf-8") as file:
            json.dump(content, file, indent=4)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"flex_gemm: tuning stays in memory, {path}: {error}", stacklevel=2)


def load_autotune_cache(
    path_or_mapping: str | os.PathLike[str] | Mapping[str, Any] | None = None,
) -> None:
    """Takes the answers for this device, or else those for "*"; what names no tuner is left out."""
    if isinstance(path_or_mapping, Mapping):
        content: Mapping[str, Any] = path_or_mapping
    else:
        content = _read(_path(path_or_mapping))
    if not content:
        return
    answers = content.get(_device_name(), content.get("*"))
    if not isinstance(answers, Mapping):
        return
    for name, tuner in _tuners().items():
        known = answers.get(name)
        if isinstance(known, Mapping):
            tuner.cache.update(
                {key: value for key, value in known.items() if isinstance(value, Mapping)}
            )
