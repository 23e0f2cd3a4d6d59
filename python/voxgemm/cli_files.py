# SPDX-License-Identifier: Apache-2.0
"""Files that a command writes its results to; - is stdout."""

from __future__ import annotations

import os
import sys


def check_writable(*paths: str | None) -> None:
    """Before the work, not after it. A file that this makes is removed again."""
    for path in paths:
        if path is None or path == "-":
            continue
        there = os.path.exists(path)
        with open(path, "ab"):
            pass
        if not there:
            os.remove(path)


def write(path: str | None, text: str, mode: str = "w") -> None:
    if path == "-":
        sys.stdout.write(text)
    elif path:
        with open(path, mode, encoding="utf-8") as file:
            file.write(text)
