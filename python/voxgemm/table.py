# SPDX-License-Identifier: Apache-2.0
"""Plain-text tables for the command line."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, the first left-aligned, the others right-aligned."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[c]) for line in lines) for c in range(len(header))]
    text = []
    for line in lines:
        cells = [
            cell.ljust(width) if c == 0 else cell.rjust(width)
            for c, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        text.append("  ".join(cells).rstrip())
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)
