"""Functions end before a reader loses the thread: 60 lines, kernels 120.

C++ is measured by its braces, which suits code that clang-format has laid out.
"""

import ast
import re
from collections.abc import Iterator

import lint_common

LIMIT = 60
KERNEL_LIMIT = 120
KERNEL_FILE = re.compile(r"_kernels\.cpp$|\.cuh?$|\.metal$|metal/kernels/")

NOT_CODE = re.compile(
    r'//[^\n]*|/\*.*?\*/|R"(\w*)\(.*?\)\1"|"(?:\\.|[^"\\\n])*"'
    r"|'(?:\\.|[^'\\\n])'|^[ \t]*#(?:\\\n|[^\n])*",
    re.DOTALL | re.MULTILINE,
)
SCOPE = re.compile(r"\b(namespace|class|struct|union|enum|extern)\b[^()]*$")


def cxx_functions(text: str) -> Iterator[tuple[int, int]]:
    """First and last line of each outermost braced block with a parameter list."""
    text = NOT_CODE.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
    depth = 0
    header_start = 0
    begin = None
    for position, character in enumerate(text):
        if begin is None and character in ";{}":
            header = text[header_start:position]
            header_start = position + 1
            if character == "{" and "(" in header and not SCOPE.search(header):
                begin = position - len(header.lstrip())
                depth = 0
        if begin is not None:
            depth += {"{": 1, "}": -1}.get(character, 0)
            if depth == 0 and character == "}":
                yield text.count("\n", 0, begin) + 1, text.count("\n", 0, position) + 1
                begin = None
                header_start = position + 1


def python_functions(text: str) -> Iterator[tuple[int, int]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node, clean=False)
            body = node.body[1 if docstring is not None else 0 :]
            if body:
                yield body[0].lineno, node.end_lineno or body[0].lineno


def check(name: str, text: str) -> Iterator[str]:
    if lint_common.is_cxx(name):
        spans = cxx_functions(text)
        limit = KERNEL_LIMIT if KERNEL_FILE.search(name) else LIMIT
    elif name.endswith(".py"):
        spans = python_functions(text)
        limit = LIMIT
    else:
        return
    for first, last in spans:
        length = last - first + 1
        if length > limit:
            yield f"{first}: a function of {length} lines; at most {limit}"


if __name__ == "__main__":
    lint_common.run(check)
