# SPDX-License-Identifier: Apache-2.0
"""ptxas_gate.py NVCC ARGS...: compiles, and fails where the assembler spilled registers or put the
matrix instructions of a kernel one behind the other; both are silent losses of speed."""

import re
import subprocess
import sys

SPILLS = re.compile(r"[1-9]\d* bytes spill (?:stores|loads)")
SERIALISED = re.compile(r"\(C75\d\d\)")
# Kernels of the toolkit's own libraries, which are as they are.
THEIRS = re.compile(r"_ZN3cub")
CHATTER = re.compile(r"^ptxas info|^\s+\d+ bytes stack frame|^$")


def main() -> int:
    done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    kernel = ""
    faults = []
    for line in done.stdout.splitlines():
        if "Compiling entry function" in line or "Function properties for" in line:
            kernel = line.split("'")[1] if "'" in line else line.split()[-1]
        if SPILLS.search(line) or SERIALISED.search(line):
            faults += [] if THEIRS.match(kernel) else [f"{kernel}: {line.strip()}"]
        elif not CHATTER.match(line):
            print(line, file=sys.stderr)
    for fault in faults:
        print(f"ptxas_gate: {fault}", file=sys.stderr)
    return done.returncode or int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
