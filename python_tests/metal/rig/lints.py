"""What Metal refuses or MLX cannot hand to it, and Clang does not mind.

Each check yields complaints about a text of kernels.
"""

import re
from collections.abc import Iterator
from pathlib import Path

COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
# Words of C++ that MSL lacks.
FORBIDDEN = (
    "double",
    "goto",
    "new",
    "delete",
    "virtual",
    "dynamic_cast",
    "typeid",
    "try",
    "catch",
    "throw",
    "thread_local",
    "std",
)
METAL_NAME = re.compile(r"\bmetal::(?:\w+::)*(\w+)")
ATTRIBUTE = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
FUNCTION = re.compile(
    r"\b(?P<name>\w+)\s*\((?P<parameters>[^(){};]*)\)\s*(?:const\s+)?"
    r"(?:thread\s+)?\{"
)
NOT_A_FUNCTION = {"if", "for", "while", "switch", "return"}


def without_comments(text: str) -> str:
    return COMMENT.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)


def line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def ascii_only(text: str) -> Iterator[str]:
    """MLX makes an NSString of the source with the ASCII encoding."""
    for found in re.finditer(r"[^\x00-\x7f]", text):
        yield f"{line_of(text, found.start())}: {found[0]!r} is not ASCII"


def forbidden_words(text: str) -> Iterator[str]:
    text = without_comments(text)
    for found in re.finditer(rf"\b({'|'.join(FORBIDDEN)})\b", text):
        yield f"{line_of(text, found.start())}: MSL has no {found[1]}"


def known_names(text: str, headers: Path) -> Iterator[str]:
    """Names of Metal's library and attributes that MLX's kernels use too.

    Apple's compiler has accepted those, for every version of MSL that MLX supports.
    """
    attested = "\n".join(path.read_text() for path in headers.rglob("*.h"))
    words = set(re.findall(r"\w+", without_comments(attested)))
    text = without_comments(text)
    for found in METAL_NAME.finditer(text):
        if found[1] not in words:
            yield f"{line_of(text, found.start())}: no kernel of MLX uses {found[0]}"
    for found in ATTRIBUTE.finditer(text):
        for word in re.findall(r"[a-z]\w+(?=\(|\s*(?:,|$))", found[1].strip()):
            if word not in words and not re.search(rf"\b{word}\b.*\[\[", text):
                yield f"{line_of(text, found.start())}: no kernel of MLX has {word}"


def body_of(text: str, opening: int) -> str:
    depth, position = 1, opening
    while depth and position < len(text):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        position += 1
    return text[opening:position]


def recursion(text: str) -> Iterator[str]:
    text = without_comments(text)
    for found in FUNCTION.finditer(text):
        name = found["name"]
        if name in NOT_A_FUNCTION:
            continue
        call = rf"(?<![\w:.]){name}\s*(?:<[^;{{}}]*>)?\("
        if re.search(call, body_of(text, found.end())):
            yield f"{line_of(text, found.start())}: {name} calls itself"


def mutable_globals(text: str) -> Iterator[str]:
    """Statics in functions, and what is declared outside without `constant`."""
    text = without_comments(text)
    static = r"^\s*static\s+(?!constant|constexpr)[^;({]*[;=]"
    for found in re.finditer(static, text, re.M):
        if "METAL_FUNC" not in found[0]:
            yield f"{line_of(text, found.start())}: static memory must be constant"
    outside = r"^(?!constant|using|typedef|static)\w+\s+\w+\s*="
    for found in re.finditer(outside, text, re.M):
        yield f"{line_of(text, found.start())}: a global must be constant"


def address_spaces(ast: str) -> Iterator[str]:
    """Pointers and references without an address space: errors up to MSL 4.0.

    ast is Clang's dump of the text in the strict_generic regime.
    """
    named = re.compile(
        r"(?:Parm)?VarDecl 0x\w+ <[^>]*> \S+ (?:used |referenced )?"
        r"(?!used |referenced )(\w+) "
        r"'([^']*__generic[^']*)'"
    )
    for found in sorted(set(named.findall(ast))):
        yield f"{found[0]}: {found[1]} has no address space"


def bfloat_conversions(warnings: str) -> Iterator[str]:
    """Implicit conversions to bfloat, which MSL has not, from Clang's warnings."""
    for line in warnings.splitlines():
        if "implicit" in line and re.search(r"to '[^']*\bbfloat", line):
            yield line
