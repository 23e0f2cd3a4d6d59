# SPDX-License-Identifier: Apache-2.0
"""Kernel maps and sets that came from coordinates, kept as long as these live unchanged."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any, NamedTuple

from torch import Tensor


class IntSearchCacheKey(NamedTuple):
    """Which sets, by identity and version, and what of them."""

    sets: tuple[tuple[int, int], ...]
    what: Hashable

    @classmethod
    def of(cls, what: Hashable, *sets: Tensor) -> IntSearchCacheKey:
        return cls(tuple((id(rows), rows._version) for rows in sets), what)


class IntSearchCache:
    """One for all Voxels that came from one another; what came of a set dies with it."""

    def __init__(self) -> None:
        self._found: dict[IntSearchCacheKey, tuple[tuple[weakref.ref, ...], Any]] = {}

    def __len__(self) -> int:
        return len(self._found)

    def get(self, what: Hashable, *sets: Tensor) -> Any:
        entry = self._found.get(IntSearchCacheKey.of(what, *sets))
        if entry is None or any(r() is not s for r, s in zip(entry[0], sets, strict=True)):
            return None
        return entry[1]

    def put(self, value: Any, what: Hashable, *sets: Tensor) -> Any:
        key, here = IntSearchCacheKey.of(what, *sets), weakref.ref(self)

        def forget(_: weakref.ref) -> None:
            cache = here()
            if cache is not None:
                cache._found.pop(key, None)

        # Versions before this one cannot come back.
        stale = [k for k in self._found if k.what == what and k != key and _same(k, key)]
        for old in stale:
            del self._found[old]
        self._found[key] = (tuple(weakref.ref(rows, forget) for rows in sets), value)
        return value

    def __getstate__(self) -> dict[str, Any]:
        """Nothing of it outlives a copy: sets are known by identity."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._found = {}


def _same(a: IntSearchCacheKey, b: IntSearchCacheKey) -> bool:
    return [number for number, _ in a.sets] == [number for number, _ in b.sets]
