# SPDX-License-Identifier: Apache-2.0
"""Functions and global variables of a C++ file, told by its braces: enough for limits, no parser.

It relies on the formatted style of this tree; macros that open a scope are taken for functions.
"""

import dataclasses
import re

TOKEN = re.compile(
    r"""//[^\n]* | /\*.*?\*/                             # comments
      | R"(?P<delimiter>[^()\s]*)\(.*?\)(?P=delimiter)"  # raw strings
      | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])+'        # strings, characters
      | ^[ \t]*\#(?:\\\n|[^\n])*                         # preprocessor lines""",
    re.X | re.S | re.M,
)
SCOPE = re.compile(
    r"(?:inline\s+)?namespace\b|extern\s*$|(?:template\s*<.*>\s*)?(?:class|struct|union|enum)\b"
)
QUALIFIER = re.compile(r"\b(decltype|noexcept|requires|alignas|explicit|__attribute__|sizeof)\s*$")
NOT_A_VARIABLE = re.compile(
    r"(using|typedef|template|extern|class|struct|enum|union|friend|static_assert|namespace|return|public|private"
    r"|protected|concept|requires|operator|goto|break|continue)\b"
)
READ_ONLY = re.compile(r"\b(const|constexpr|consteval)\b")


@dataclasses.dataclass
class Function:
    name: str
    line: int
    lines: int
    parameters: int


def blank(text: str) -> str:
    """The text with comments, literals and preprocessor lines blanked; same length, same lines."""

    def spaces(match: re.Match) -> str:
        # A digit separator as in 1'000 starts no character.
        if match[0][0] == "'" and match.start() and text[match.start() - 1].isalnum():
            return match[0]
        return re.sub(r"[^\n]", " ", match[0])

    return TOKEN.sub(spaces, text)


def parameter_list(header: str) -> tuple[str, str] | None:
    """Name and parameter text of the function whose head this is."""
    depth = 0
    for position, letter in enumerate(header):
        if letter == "(" and depth == 0:
            before = header[:position].rstrip()
            name = re.search(r"(operator\s*\S+|~?[\w:]+|\])$", before)
            if name and not QUALIFIER.search(before):
                end = matching(header, position)
                return name[1].removeprefix("::").replace("]", "lambda"), header[position + 1 : end]
        depth += letter in "([{"
        depth -= letter in ")]}"
    return None


def matching(text: str, position: int) -> int:
    depth = 0
    for end in range(position, len(text)):
        depth += text[end] in "([{"
        depth -= text[end] in ")]}"
        if depth == 0:
            return end
    return len(text)


def count_parameters(parameters: str) -> int:
    flat, depth = "", 0
    for letter in parameters.replace("->", "  ").replace(">=", "  ").replace("<=", "  "):
        depth += letter in "([{<"
        depth -= letter in ")]}>"
        flat += letter if depth == 0 else " "
    return flat.count(",") + 1 if flat.strip() not in ("", "void") else 0


class Outline:
    def __init__(self, text: str):
        self.functions: list[Function] = []
        self.mutable_globals: list[tuple[int, str]] = []
        self.text = blank(text)
        self.scan(0, len(self.text), is_type=False)

    def line(self, position: int) -> int:
        return self.text.count("\n", 0, position) + 1

    def scan(self, start: int, end: int, is_type: bool) -> None:
        """Statements of a file, a namespace or a type between two positions."""
        begin = position = start
        while position < end:
            letter = self.text[position]
            if letter == "(":
                position = matching(self.text, position)
            elif letter == ";":
                self.statement(begin, position, is_type)
                begin = position + 1
            elif letter == "{":
                close = matching(self.text, position)
                if self.block(begin, position, close):
                    begin = close + 1
                position = close
            elif letter == ":" and re.fullmatch(
                r"\s*(public|private|protected)\s*", self.text[begin:position]
            ):
                begin = position + 1
            position += 1

    def block(self, begin: int, opening: int, close: int) -> bool:
        """Takes in a braced block; says whether the statement ends with it."""
        header = self.text[begin:opening].strip()
        start = opening - len(self.text[begin:opening].lstrip())
        if SCOPE.match(header) and not re.search(r"\)\s*(const|noexcept|override|->.*)*$", header):
            self.scan(opening + 1, close, is_type="namespace" not in header)
            return "namespace" in header or header.startswith("extern")
        found = parameter_list(header)
        if found is None or re.search(r"=\s*[\w:<>, ]*$", header) or header.endswith((",", "(")):
            return False  # an initialiser
        # A member initialiser with braces, "f() : a_{1} {": the body follows.
        if re.search(r"\)\s*(noexcept\s*)?:", header) and re.search(r"[:,]\s*\w+$", header):
            return False
        name, parameters = found
        lines = self.line(close) - self.line(start) + 1
        self.functions.append(Function(name, self.line(start), lines, count_parameters(parameters)))
        self.statics(opening, close)
        return self.text[close + 1 : close + 2] != ";"

    def statement(self, begin: int, end: int, is_type: bool) -> None:
        statement = self.text[begin:end].strip()
        start = end - len(self.text[begin:end].lstrip())
        statement = re.sub(r"^(\[\[.*?\]\]\s*)+", "", statement)
        if not statement or "}" in statement.split("=")[0] and "(" in statement.split("{")[0]:
            return
        initialiser = re.search(r"=(?!=)|\{", statement)
        declarator = statement[: initialiser.start()] if initialiser else statement
        if "(" in declarator:
            found = parameter_list(statement)
            if found and not statement.startswith(("using", "typedef")):
                self.functions.append(
                    Function(found[0], self.line(start), 1, count_parameters(found[1]))
                )
            return
        if re.search(r"\boperator\W*$", declarator):
            return  # "T& T::operator=(T&&) = default;", cut at its first "="
        wanted = "static" in declarator.split() if is_type else not NOT_A_VARIABLE.match(statement)
        if (
            wanted
            and not READ_ONLY.search(declarator)
            and re.match(r"[\w:<>,\s*&\[\].]+\s\**&?\w+", declarator)
        ):
            self.mutable_globals.append((self.line(start), declarator.split()[-1]))

    def statics(self, opening: int, close: int) -> None:
        """Variables in a function's body that outlive a call."""
        for match in re.finditer(
            r"(?<![\w:])(?:static|thread_local)\s[^;(={]*", self.text[opening:close]
        ):
            if not READ_ONLY.search(match[0]):
                self.mutable_globals.append(
                    (self.line(opening + match.start()), match[0].split()[-1])
                )
