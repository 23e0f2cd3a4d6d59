#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks the rules of the tree that a compiler does not: check_rules.py [ROOT].

Sizes, names in paths, the three macros, who includes whom, globals, environment variables, paths
that documents name, licence lines. CONTRIBUTING.md says what each rule is for.
"""

import ast
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import cpp_outline  # noqa: E402

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 80
MAX_PARAMETERS = 5
MAX_ENVIRONMENT_VARIABLES = 4
MAX_FILE_BYTES = 1_000_000

BANNED_WORDS = {"utils", "helpers", "common", "misc", "detail", "legacy", "v2"}
MACROS = {"VOXGEMM_EXPORT", "VOXGEMM_HOST_DEVICE", "VOXGEMM_VERSION"}
CPP = {".h", ".cpp", ".cuh", ".cu"}
SCRIPTS = {".py", ".sh", ".cmake"}
SCRIPT_NAMES = {"CMakeLists.txt", "Makefile"}

# A folder and the folders whose files it may include besides its own.
MAY_INCLUDE = {
    "include/voxgemm": set(),
    "src/core": {"include/voxgemm"},
    "src/conv": {"include/voxgemm", "src/core"},
    "src/tune": {"include/voxgemm", "src/core", "src/conv"},
    "src/cpu": {"include/voxgemm", "src/core", "src/conv"},
    "src/cuda": {"include/voxgemm", "src/core", "src/conv"},
    "src/no_cuda": {"include/voxgemm", "src/core", "src/conv"},
    "torch": {"include/voxgemm"},
    "apps": {"include/voxgemm"},
    "examples": {"include/voxgemm"},
}
# A drop-in has the paths, parameters and assignable names of what it stands for.
DROPIN = "dropin/"
# The one list of every family of kernels.
REGISTRY = "src/conv/registry.cpp"
CUDA_HEADER = re.compile(r"(cuda|cub/|thrust/|cooperative_groups|nv/|mma\.h|driver_types).*")
TORCH_HEADER = re.compile(r"(torch|ATen|c10)/.*")
ENVIRONMENT_FILE = "src/core/environment.cpp"
ENVIRONMENT_VARIABLE = re.compile(r"""["'](VOXGEMM_[A-Z_]+)["']""")
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")
TOP_FOLDERS = (
    "include",
    "src",
    "torch",
    "python",
    "dropin",
    "apps",
    "bench",
    "examples",
    "tests",
    "tools",
    "docs",
    "cmake",
    "abi",
    ".ci",
)
OPEN_END = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|XX" r"X)\b(?!\s*\(?#\d+)")


class Tree:
    """The files that are tracked or may be added, and what was found in them."""

    def __init__(self, root: pathlib.Path):
        self.root = root
        self.found: list[str] = []
        listed = subprocess.run(
            [
                "git",
                "-c",
                "safe.directory=*",
                "-C",
                root,
                "ls-files",
                "-co",
                "--exclude-standard",
                "-z",
            ],
            capture_output=True,
            text=True,
        )
        if listed.returncode == 0:
            names = listed.stdout.split("\0")
        else:
            names = [path.relative_to(root).as_posix() for path in root.rglob("*")]
        self.files = sorted(name for name in names if name and (root / name).is_file())

    def text(self, name: str) -> str:
        return (self.root / name).read_text(encoding="utf-8", errors="replace")

    def having(self, *suffixes: str) -> Iterator[str]:
        return (name for name in self.files if pathlib.PurePath(name).suffix in suffixes)

    def report(self, name: str, line: int, sentence: str) -> None:
        self.found.append(f"{name}:{line}: {sentence}")


def line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def check_paths_and_sizes(tree: Tree) -> None:
    for name in tree.files:
        words = set(re.split(r"[/_.\-]", name.lower()))
        for word in sorted(words & BANNED_WORDS if not name.startswith(DROPIN) else ()):
            tree.report(
                name, 1, f"the path has the word '{word}', which says nothing about the content"
            )
        size = (tree.root / name).stat().st_size
        if size > MAX_FILE_BYTES:
            tree.report(name, 1, f"has {size} bytes, at most {MAX_FILE_BYTES} are allowed")
    for name in tree.having(*CPP, *SCRIPTS):
        lines = tree.text(name).count("\n")
        if lines > MAX_FILE_LINES:
            tree.report(name, lines, f"has {lines} lines, at most {MAX_FILE_LINES} are allowed")


def check_licence_and_open_ends(tree: Tree) -> None:
    for name in tree.files:
        path = pathlib.PurePath(name)
        if path.suffix not in CPP | SCRIPTS and path.name not in SCRIPT_NAMES:
            continue
        text = tree.text(name)
        mark = "//" if path.suffix in CPP else "#"
        if f"{mark} SPDX-License-Identifier: Apache-2.0" not in text.splitlines()[:2]:
            tree.report(name, 1, f"lacks '{mark} SPDX-License-Identifier: Apache-2.0' at its top")
        for match in OPEN_END.finditer(text):
            tree.report(name, line_of(text, match.start()), f"{match[0]} without an issue number")


def owner(name: str) -> str:
    """The row of MAY_INCLUDE that a path belongs to, or ''."""
    return next((folder for folder in MAY_INCLUDE if name.startswith(folder + "/")), "")


def include_target(tree: Tree, name: str, included: str) -> str:
    """The file of this tree that a quoted include means, or ''."""
    beside = (pathlib.PurePosixPath(name).parent / included).as_posix()
    known = set(tree.files)
    return next(
        (
            c
            for c in (beside, f"include/{included}", f"src/{included}", f"tests/{included}")
            if c in known
        ),
        "",
    )


def check_include(tree: Tree, name: str, line: int, bracket: str, included: str) -> None:
    folder = owner(name)
    if CUDA_HEADER.fullmatch(included) and bracket == "<" and folder not in ("src/cuda", "torch"):
        tree.report(name, line, f"<{included}> is CUDA's; only src/cuda and torch include CUDA")
    if TORCH_HEADER.fullmatch(included) and bracket == "<" and folder != "torch":
        tree.report(name, line, f"<{included}> is torch's; only torch/ includes torch")
    if not folder:
        return
    if bracket == "<":
        if folder == "include/voxgemm" and ("/" in included or "." in included):
            tree.report(name, line, f"<{included}> is not of the C++ standard library")
        return
    target = include_target(tree, name, included)
    if not target:
        tree.report(name, line, f'"{included}" is no file of this tree')
    elif name == REGISTRY and target.endswith("/kernels.h"):
        return
    elif owner(target) not in MAY_INCLUDE[folder] | {folder}:
        tree.report(name, line, f"{folder} must not include {target}")


def check_includes(tree: Tree) -> None:
    torch_users = set()
    for name in tree.having(*CPP):
        for number, text in enumerate(tree.text(name).splitlines(), 1):
            match = re.match(r'\s*#\s*include\s*([<"])([^>"]+)[>"]', text)
            if match:
                check_include(tree, name, number, *match.groups())
                if match[1] == "<" and TORCH_HEADER.fullmatch(match[2]) and owner(name) == "torch":
                    torch_users.add(name)
    if len(torch_users) > 1:
        tree.report(
            sorted(torch_users)[1],
            1,
            "torch's headers are included by one file of torch/ only, "
            f"here by {', '.join(sorted(torch_users))}",
        )


def check_cpp(tree: Tree) -> None:
    for name in tree.having(*CPP):
        text = tree.text(name)
        if name.endswith((".h", ".cuh")) and "#pragma once" not in text:
            tree.report(name, 1, "a header without #pragma once")
        for match in re.finditer(r"^\s*#\s*define\s+(\w+)", text, re.M):
            if match[1] not in MACROS:
                tree.report(
                    name,
                    line_of(text, match.start(1)),
                    f"macro {match[1]}; the only macros are {', '.join(sorted(MACROS))}",
                )
        outline = cpp_outline.Outline(text)
        boxed = set(re.findall(r"TORCH_BOX\(\s*(?:&Guarded<)?&?\s*([\w:]+)", text))
        for function in outline.functions:
            if function.lines > MAX_FUNCTION_LINES:
                tree.report(
                    name,
                    function.line,
                    f"{function.name} has {function.lines} lines, "
                    f"at most {MAX_FUNCTION_LINES} are allowed",
                )
            # The parameters of an operator are its schema's.
            if function.parameters > MAX_PARAMETERS and function.name not in boxed:
                tree.report(
                    name,
                    function.line,
                    f"{function.name} has {function.parameters} parameters, "
                    f"at most {MAX_PARAMETERS} are allowed: use a struct",
                )
        for line, variable in outline.mutable_globals:
            tree.report(name, line, f"'{variable}' is a global that can be written")


def check_python_function(
    tree: Tree, name: str, function: ast.FunctionDef | ast.AsyncFunctionDef
) -> None:
    lines = function.end_lineno - function.lineno + 1
    if lines > MAX_FUNCTION_LINES:
        tree.report(
            name,
            function.lineno,
            f"{function.name} has {lines} lines, at most {MAX_FUNCTION_LINES} are allowed",
        )
    # Parameters with a default are named by the caller or left out; those of an operator's autograd
    # function (first parameter ctx) and fake are the operator's schema; pytest fills a test's.
    arguments = function.args
    required = [a.arg for a in arguments.posonlyargs + arguments.args]
    required = required[: len(required) - len(arguments.defaults)]
    decorators = " ".join(ast.unparse(d) for d in function.decorator_list)
    if required[:1] == ["ctx"] or "fake" in decorators or function.name.startswith("test_"):
        return
    if name.startswith(DROPIN):
        return
    count = len(required) - (required[:1] in (["self"], ["cls"]))
    if count > MAX_PARAMETERS:
        tree.report(
            name,
            function.lineno,
            f"{function.name} has {count} parameters without a default, "
            f"at most {MAX_PARAMETERS} are allowed",
        )


def check_python(tree: Tree) -> None:
    for name in tree.having(".py"):
        module = ast.parse(tree.text(name), name)
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                check_python_function(tree, name, node)
            elif isinstance(node, ast.Global) and not name.startswith(DROPIN):
                tree.report(
                    name,
                    node.lineno,
                    f"global {', '.join(node.names)}: a global that can be written",
                )
        if name.startswith(("tests/", DROPIN)):
            continue
        for node in module.body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(
                node.value,
                ast.Dict | ast.List | ast.Set | ast.DictComp | ast.ListComp | ast.SetComp,
            ):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    variable = ast.unparse(target)
                    if variable != "__all__" and not variable.isupper():
                        tree.report(
                            name, node.lineno, f"'{variable}' is a global that can be written"
                        )


def check_environment(tree: Tree) -> None:
    variables, python_readers = set(), []
    for name in tree.files:
        product = name.startswith(("include/", "src/", "torch/", "python/"))
        if not product or pathlib.PurePath(name).suffix not in CPP | {".py"}:
            continue
        text = tree.text(name)
        variables |= set(ENVIRONMENT_VARIABLE.findall(text))
        match = re.search(r"\b(?:os\.environ|(?:secure_)?getenv)\b", text)
        if match and name.endswith(".py"):
            python_readers.append(name)
        elif match and name != ENVIRONMENT_FILE:
            tree.report(
                name,
                line_of(text, match.start()),
                f"reads the environment; only {ENVIRONMENT_FILE} does",
            )
    for name in python_readers[1:]:
        tree.report(name, 1, f"reads the environment; {python_readers[0]} does already")
    if len(variables) > MAX_ENVIRONMENT_VARIABLES:
        tree.report(
            ENVIRONMENT_FILE,
            1,
            f"{len(variables)} environment variables ({', '.join(sorted(variables))}), "
            f"at most {MAX_ENVIRONMENT_VARIABLES} are allowed",
        )


def braces(pattern: str) -> list[str]:
    """'a/{b,c}.h' -> ['a/b.h', 'a/c.h']."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    return [
        path
        for part in match[1].split(",")
        for path in braces(pattern[: match.start()] + part.strip() + pattern[match.end() :])
    ]


def check_documents(tree: Tree) -> None:
    for name in DOCUMENTS:
        if name not in tree.files:
            continue
        text = tree.text(name)
        spans = [(m.start(), m[1]) for m in re.finditer(r"`([^`\n]+)`", text)]
        spans += [(m.start(), m[1]) for m in re.finditer(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)]
        for position, span in spans:
            if not re.fullmatch(r"[\w./{},*\-]+", span):
                continue
            top = span.split("/")[0]
            is_root_file = (
                "/" not in span and span.endswith((".md", ".toml")) or span in SCRIPT_NAMES
            )
            if not is_root_file and ("/" not in span or top not in TOP_FOLDERS):
                continue
            for path in braces(span):
                if not any(tree.root.glob(path.rstrip("/"))):
                    tree.report(
                        name, line_of(text, position), f"names {path}, which does not exist"
                    )


CHECKS = (
    check_paths_and_sizes,
    check_licence_and_open_ends,
    check_includes,
    check_cpp,
    check_python,
    check_environment,
    check_documents,
)


def violations(root: pathlib.Path) -> tuple[list[str], int]:
    """What was found, and the number of files looked at."""
    tree = Tree(root)
    for check in CHECKS:
        check(tree)
    return tree.found, len(tree.files)


def main(arguments: list[str]) -> int:
    root = pathlib.Path(arguments[0]) if arguments else pathlib.Path(__file__).parent.parent
    found, files = violations(root)
    print("\n".join(found + [f"check_rules: {files} files, {len(found)} violations"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
