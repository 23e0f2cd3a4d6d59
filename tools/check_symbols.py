#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks what built files ask for and give away.

check_symbols.py library LIB SOURCE_DIR LIST...   a library of the PyTorch layer; LIST: a file of
                                                  the symbols that the oldest torch exports
check_symbols.py objects ISA OBJECT...            object files of one instruction set
"""

import pathlib
import re
import subprocess
import sys

SHIM = re.compile(r"(aoti_torch_|torch_)\w+")
# C++ names of torch (namespaces at, c10, torch, also inside other names), Python's C interface.
FORBIDDEN = re.compile(r"_Z\w*?(?:N|NK|St)?(?:2at|3c10|5torch)\d|_?Py[A-Z_]\w*")
SYSTEM_LIBRARIES = {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6"}
LOADER = re.compile(r"ld-linux.*\.so\.\d")


def run(*command) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def dynamic_symbols(library: pathlib.Path) -> tuple[set[str], set[str]]:
    """Names it needs that no listed system library versions, and names it exports."""
    needed, exported = set(), set()
    for line in run("nm", "-D", library).splitlines():
        *_, kind, name = line.split()
        if kind in "Uvw":
            # "name@GLIBC_2.34" is the system's. Weak unversioned names are optional hooks.
            if "@" not in name and kind == "U":
                needed.add(name)
        else:
            exported.add(name)
    return needed, exported


def library_violations(
    library: pathlib.Path, source: pathlib.Path, lists: list[pathlib.Path]
) -> list[str]:
    allowed = {name for path in lists for name in path.read_text().split()}
    needed, exported = dynamic_symbols(library)
    found = [f"needs {name}, which the oldest torch lacks" for name in sorted(needed - allowed)]
    found += [
        f"needs {name}, which is not of the stable interface"
        for name in sorted(needed & allowed)
        if not SHIM.fullmatch(name)
    ]
    all_undefined = run("nm", "-D", "-u", library).split()
    found += [f"needs {name}" for name in sorted(set(all_undefined)) if FORBIDDEN.match(name)]
    found += [f"exports {name}" for name in sorted(exported)]

    dynamic = run("readelf", "-d", "-W", library)
    torch_libraries = {path.stem + ".so" for path in lists}
    loaded = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    found += [f"does not load {name}" for name in sorted(torch_libraries - loaded)]
    found += [
        f"loads {name}"
        for name in sorted(loaded - torch_libraries - SYSTEM_LIBRARIES)
        if not LOADER.fullmatch(name)
    ]
    found += [f"has a {tag}" for tag in ("RPATH", "RUNPATH") if f"({tag})" in dynamic]
    if str(source.resolve()).encode() + b"/" in library.read_bytes():
        found.append(f"holds the build path {source.resolve()}/")
    return found


def object_violations(isa: str, objects: list[pathlib.Path]) -> list[str]:
    """Weak symbols outside the instruction set's own namespace: the linker keeps any one copy."""
    own = f"{len(isa)}{isa}"
    found = []
    for path in objects:
        for line in run("nm", "--defined-only", path).splitlines():
            *_, kind, name = line.split()
            if kind in "WVu" and f"3cpu{own}" not in name:
                found.append(f"{path.name}: weak symbol {run('c++filt', name).strip()}")
    return found


def main(arguments: list[str]) -> int:
    if len(arguments) < 3 or arguments[0] not in ("library", "objects"):
        print(__doc__, file=sys.stderr)
        return 2
    kind, first, *rest = arguments
    paths = [pathlib.Path(name) for name in rest]
    if kind == "library":
        found = library_violations(pathlib.Path(first), paths[0], paths[1:])
    else:
        found = object_violations(first, paths)
    for violation in found:
        print(f"{first}: {violation}")
    print(f"check_symbols: {first}: {len(found)} violations")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
