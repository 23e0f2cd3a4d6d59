# SPDX-License-Identifier: Apache-2.0
"""The guide's code runs, in order, and gives what it says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"


def run(text: str, name: str = "guide") -> dict:
    """Executes a program; `# -> value` is what str() of the expression on its line must be."""
    values: dict = {"__name__": name}
    lines = text.split("\n")
    for statement in ast.parse(text).body:
        _, arrow, expected = lines[statement.end_lineno - 1].partition("# -> ")
        part = ast.get_source_segment(text, statement)
        if arrow:
            assert isinstance(statement, ast.Expr), (
                f"{part}: not an expression, {expected} expected"
            )
            assert str(eval(part, values)) == expected.strip(), part
        else:
            exec(compile(ast.Module([statement], []), name, "exec"), values)
    return values


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(), re.M | re.S)


def test_the_guide(capsys):
    program = "\n".join(blocks())
    assert program.count("# -> ") > 10
    run(program)
    shown = capsys.readouterr().out
    assert "forward f32 subm3 4->8" in shown and "picked" in shown
    assert "x is " in shown and "expected" in shown


def test_every_block_of_code_is_one_that_is_run():
    kinds = re.findall(r"^```(\w*)$", GUIDE.read_text(), re.M)
    assert kinds[::2] == ["python"] * len(blocks())


def test_a_wrong_claim_is_found():
    with pytest.raises(AssertionError):
        run("1 + 1  # -> 3")
    with pytest.raises(ZeroDivisionError):
        run("1 / 0")
