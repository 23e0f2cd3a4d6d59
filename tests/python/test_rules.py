# SPDX-License-Identifier: Apache-2.0
"""Each rule of tools/check_rules.py and tools/check_symbols.py sees its violation."""

import pathlib
import shutil
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tools"))
import check_rules  # noqa: E402
import check_symbols  # noqa: E402
import cpp_outline  # noqa: E402

CPP = "// SPDX-License-Identifier: Apache-2.0\n"
HEADER = CPP + "#pragma once\n"
PYTHON = "# SPDX-License-Identifier: Apache-2.0\n"
OPEN_END = "TO" + "DO"


def found_in(root: pathlib.Path, files: dict[str, str]) -> list[str]:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return check_rules.violations(root)[0]


def lines(count: int) -> str:
    return "  x();\n" * count


VIOLATIONS = {
    "file too long": ("src/core/a.cpp", CPP + "\n" * 600, "has 601 lines"),
    "file too large": ("docs/a.txt", "x" * 1_000_001, "has 1000001 bytes"),
    "path word": ("src/core/string_utils.cpp", CPP, "the word 'utils'"),
    "path folder": ("src/detail/a.cpp", CPP, "the word 'detail'"),
    "no licence line": ("src/core/a.cpp", "int f();\n", "lacks '// SPDX"),
    "no licence line, Python": ("python/voxgemm/a.py", "x = 1\n", "lacks '# SPDX"),
    "open end": ("src/core/a.cpp", CPP + f"// {OPEN_END}: later\n", "without an issue number"),
    "function too long": ("src/core/a.cpp", f"{CPP}int f() {{\n{lines(79)}}}\n", "f has 81 lines"),
    "method too long": (
        "src/core/a.cpp",
        f"{CPP}namespace a {{\nclass B {{\n void f() const {{\n{lines(79)}}}\n}};\n}}\n",
        "f has 81 lines",
    ),
    "parameters": (
        "src/core/a.cpp",
        CPP + "int f(int a, int b, int c, int d, int e, int g);\n",
        "f has 6 parameters",
    ),
    "parameters of a definition": (
        "src/core/a.cpp",
        CPP + "int A::f(int a, int b, M<int, 2> c, int d, int e, int g) { return a; }\n",
        "A::f has 6 parameters",
    ),
    "macro": ("src/core/a.cpp", CPP + "#define VOXGEMM_MAX(a, b) a\n", "macro VOXGEMM_MAX"),
    "no pragma once": ("src/core/a.h", CPP, "without #pragma once"),
    "global": (
        "src/core/a.cpp",
        CPP + "namespace v {\nint counter = 0;\n}\n",
        "'counter' is a global",
    ),
    "global object": ("src/core/a.cpp", CPP + "std::map<int, int> cache;\n", "'cache' is a global"),
    "static in a function": (
        "src/core/a.cpp",
        CPP + "int f() {\n  static int calls = 0;\n  return ++calls;\n}\n",
        "'calls' is a global",
    ),
    "static member": (
        "src/core/a.h",
        HEADER + "struct A {\n  static inline int calls = 0;\n};\n",
        "'calls' is a global",
    ),
    "thread_local": (
        "src/core/a.cpp",
        CPP + "thread_local std::vector<int> scratch;\n",
        "'scratch' is a global",
    ),
    "upwards": (
        "src/core/a.cpp",
        CPP + '#include "voxgemm/b.h"\n#include "conv/b.h"\n',
        "src/core must not include src/conv/b.h",
    ),
    "across": (
        "src/cpu/a.cpp",
        CPP + '#include "cuda/b.h"\n',
        "src/cpu must not include src/cuda/b.h",
    ),
    "torch into src": (
        "torch/a.cpp",
        CPP + '#include "core/b.h"\n',
        "torch must not include src/core/b.h",
    ),
    "public into src": (
        "include/voxgemm/a.h",
        HEADER + '#include "core/b.h"\n',
        "must not include src/core/b.h",
    ),
    "public foreign": (
        "include/voxgemm/a.h",
        HEADER + "#include <omp.h>\n",
        "not of the C++ standard library",
    ),
    "CUDA header": ("src/core/a.cpp", CPP + "#include <cuda_runtime.h>\n", "is CUDA's"),
    "torch header": ("src/core/a.cpp", CPP + "#include <torch/library.h>\n", "is torch's"),
    "missing header": (
        "src/core/a.cpp",
        CPP + '#include "core/gone.h"\n',
        "is no file of this tree",
    ),
    "environment": (
        "src/core/a.cpp",
        CPP + 'auto x() { return std::getenv("A"); }\n',
        "reads the environment",
    ),
    "Python function": (
        "python/voxgemm/a.py",
        PYTHON + "def f():\n" + "    x()\n" * 80,
        "f has 81 lines",
    ),
    "Python parameters": (
        "python/voxgemm/a.py",
        PYTHON + "def f(a, b, c, d, e, g): pass\n",
        "f has 6 parameters",
    ),
    "Python global": ("python/voxgemm/a.py", PYTHON + "cache = {}\n", "'cache' is a global"),
    "Python global statement": (
        "python/voxgemm/a.py",
        PYTHON + "def f():\n    global state\n    state = 1\n",
        "global state",
    ),
    "document": ("README.md", "See `src/core/gone.cpp`.\n", "names src/core/gone.cpp"),
    "document link": ("README.md", "See [this](docs/gone.md).\n", "names docs/gone.md"),
    "document braces": ("README.md", "See `src/{core,gone}/b.h`.\n", "names src/gone/b.h"),
}
BESIDE = {
    "src/core/b.h": HEADER,
    "src/conv/b.h": HEADER,
    "src/cuda/b.h": HEADER,
    "include/voxgemm/b.h": HEADER,
}


@pytest.mark.parametrize("rule", VIOLATIONS)
def test_rule_sees_its_violation(rule, tmp_path):
    name, text, sentence = VIOLATIONS[rule]
    found = found_in(tmp_path, BESIDE | {name: text})
    assert len(found) == 1, found
    assert found[0].startswith(name + ":")
    assert sentence in found[0]


def test_one_file_of_torch_and_one_of_python(tmp_path):
    found = found_in(
        tmp_path,
        {
            "torch/a.cpp": CPP + "#include <torch/csrc/stable/library.h>\n",
            "torch/b.cpp": CPP + "#include <torch/csrc/stable/library.h>\n",
            "python/voxgemm/a.py": PYTHON + "import os\nx = os.environ['VOXGEMM_A']\n",
            "python/voxgemm/b.py": PYTHON + "import os\nx = os.getenv('VOXGEMM_B')\n",
            "src/core/environment.cpp": CPP
            + 'auto f() { return getenv("VOXGEMM_C") || getenv("VOXGEMM_D"); }\n'
            + 'auto g() { return getenv("VOXGEMM_E"); }\n',
        },
    )
    assert [line.split(":")[0] for line in found] == [
        "torch/b.cpp",
        "python/voxgemm/b.py",
        "src/core/environment.cpp",
    ]
    assert "5 environment variables" in found[2]


def test_what_is_allowed_passes(tmp_path):
    body = """
#include <vector>
#include "voxgemm/b.h"
namespace voxgemm {
const int limit = 3;
constexpr std::array tiles = {Tile{.rows = 64}, Tile{.rows = 128}};
struct Args {
  int a = 0;
  std::function<void(int)> run;
  static Args make();
  static constexpr int most = 4;
};
T& Args::operator=(T&&) noexcept = default;
A::A(int a) : a_(a), b_{a} {
  static const int once = f();
  const auto x = static_cast<int>(a);
}
const char* text = "static int x; // {";
}
""".replace("const char* text", "constexpr const char* text")
    assert not found_in(
        tmp_path,
        BESIDE
        | {
            "src/core/a.cpp": CPP + body,
            "src/core/c.cpp": CPP + f"// {OPEN_END}(#12): later\n",
            "torch/ops.cpp": CPP
            + "T op(T a, T b, T c, T d, T e, T f);\nauto x() { return TORCH_BOX(&op); }\n",
            "README.md": "`make test`, `src/core/*.h`, `src/{core,conv}/b.h`, `out.json`, `a/b`\n",
        },
    )


def test_outline_measures():
    functions = cpp_outline.Outline(
        "A::A(int a, F<int, 3> b) : a_(a), b_{b} {\n\n}\nint f() { return 1; }\n"
    ).functions
    assert [(f.name, f.line, f.lines, f.parameters) for f in functions] == [
        ("A::A", 1, 3, 2),
        ("f", 4, 1, 0),
    ]


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a compiler")
def test_symbol_gate_sees_violations(tmp_path):
    source = tmp_path / "a.cpp"
    source.write_text("""
namespace at { void leak(); }
extern "C" { void aoti_torch_old(); void aoti_torch_new(); void PyErr_Clear();
__attribute__((visibility("default"))) void given() {
  at::leak(); aoti_torch_old(); aoti_torch_new(); PyErr_Clear(); } }
extern const char* const place = __FILE__;
""")
    symbols = tmp_path / "libtorch_cpu.txt"
    symbols.write_text("aoti_torch_old\n")
    library = tmp_path / "liba.so"
    subprocess.run(
        ["c++", "-shared", "-fPIC", "-fvisibility=hidden", "-Wl,-rpath,/x", "-o", library, source],
        check=True,
    )
    found = "\n".join(check_symbols.library_violations(library, tmp_path, [symbols]))
    for sentence in (
        "needs aoti_torch_new, which the oldest torch lacks",
        "needs _ZN2at4leakEv",
        "needs PyErr_Clear",
        "exports given",
        "does not load libtorch_cpu.so",
        "has a RUNPATH",
        "holds the build path",
    ):
        assert sentence in found
    assert "aoti_torch_old" not in found


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a compiler")
@pytest.mark.parametrize("tag", ["RPATH", "RUNPATH"])
def test_symbol_gate_sees_what_is_loaded(tag, tmp_path):
    """Every library beside torch's and the system's, and either way of saying where to look."""
    source = tmp_path / "a.cpp"
    source.write_text("extern int x;\nint y = 1;\n")
    for name, options in (
        ("libtorch_cpu.so", ["-fvisibility=hidden"]),
        ("libc10.so", ["-fvisibility=hidden"]),
        (
            "liba.so",
            [
                *("-fvisibility=hidden", "-L", str(tmp_path), "-Wl,--no-as-needed"),
                *("-ltorch_cpu", "-lc10", "-Wl,-rpath,/x"),
                "-Wl,--disable-new-dtags" if tag == "RPATH" else "-Wl,--enable-new-dtags",
            ],
        ),
    ):
        command = ["c++", "-shared", "-fPIC", "-o", str(tmp_path / name), str(source), *options]
        subprocess.run(command, check=True)
    symbols = tmp_path / "libtorch_cpu.txt"
    symbols.write_text("")
    found = check_symbols.library_violations(tmp_path / "liba.so", tmp_path / "s", [symbols])
    assert found == ["loads libc10.so", f"has a {tag}"]


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a compiler")
def test_symbol_gate_sees_weak_symbols(tmp_path):
    source = tmp_path / "a.cpp"
    source.write_text("""
namespace voxgemm::cpu::v4 { template <class T> [[gnu::noinline]] T own(T x) { return x + 1; } }
template <class T> [[gnu::noinline]] T shared(T x) { return x + 2; }
int f(int x) { return voxgemm::cpu::v4::own(x) + shared(x); }
""")
    subprocess.run(["c++", "-c", "-o", tmp_path / "a.o", source], check=True)
    found = check_symbols.object_violations("v4", [tmp_path / "a.o"])
    assert found == ["a.o: weak symbol int shared<int>(int)"]
