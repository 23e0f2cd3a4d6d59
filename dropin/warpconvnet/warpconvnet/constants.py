# SPDX-License-Identifier: Apache-2.0
"""The environment's defaults: read at import, kept here, and looked up here at every call."""

from __future__ import annotations

import os as _os

from ._search import names_of as _names_of

_Names = str | list[str]


def _algorithms(variable: str, default: _Names = "auto", depthwise: bool = False) -> _Names:
    """A name, or the names of a list "[a,b]"; unset and "[]" are the default."""
    text = _os.environ.get(variable)
    if text is None or text.replace(" ", "") == "[]":
        return default
    names: object = text.strip()
    if text.strip().startswith("[") and text.strip().endswith("]"):
        names = [name.strip() for name in text.strip()[1:-1].split(",")]
    _names_of(names, variable, depthwise)
    return [name.lower() for name in names] if isinstance(names, list) else text.strip().lower()


def _folder() -> str:
    for variable in (
        "WARPCONVNET_BENCHMARK_CACHE_DIR_OVERRIDE",
        "WARPCONVNET_BENCHMARK_CACHE_DIR",
    ):
        if _os.environ.get(variable):
            return _os.path.expanduser(_os.environ[variable])
    return _os.path.expanduser("~/.cache/warpconvnet")


WARPCONVNET_FWD_ALGO_MODE = _algorithms("WARPCONVNET_FWD_ALGO_MODE")
WARPCONVNET_BWD_ALGO_MODE = _algorithms("WARPCONVNET_BWD_ALGO_MODE")
WARPCONVNET_DGRAD_ALGO_MODE = _algorithms("WARPCONVNET_DGRAD_ALGO_MODE", default=[])
WARPCONVNET_WGRAD_ALGO_MODE = _algorithms("WARPCONVNET_WGRAD_ALGO_MODE", default=[])
WARPCONVNET_DEPTHWISE_CONV_FWD_ALGO_MODE = _algorithms(
    "WARPCONVNET_DEPTHWISE_CONV_FWD_ALGO_MODE", depthwise=True
)
WARPCONVNET_DEPTHWISE_CONV_BWD_ALGO_MODE = _algorithms(
    "WARPCONVNET_DEPTHWISE_CONV_BWD_ALGO_MODE", depthwise=True
)
WARPCONVNET_BENCHMARK_CACHE_DIR = _folder()
WARPCONVNET_BENCHMARK_CACHE_DIR_OVERRIDE = _os.environ.get(
    "WARPCONVNET_BENCHMARK_CACHE_DIR_OVERRIDE"
)
