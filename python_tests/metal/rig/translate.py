"""From Metal Shading Language to what Clang compiles.

Nothing but the parts that are no C++ is rewritten, each on its own line, after the
preprocessor: arrays in threadgroup memory, function constants, named instances.
"""

import re
from dataclasses import dataclass, field

SCALARS = (
    "thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup",
    "thread_index_in_threadgroup",
    "simdgroups_per_threadgroup",
    "threads_per_simdgroup",
    "thread_execution_width",
    "thread_index_in_quadgroup",
    "quadgroup_index_in_threadgroup",
)
VECTORS = (
    "thread_position_in_grid",
    "thread_position_in_threadgroup",
    "threadgroup_position_in_grid",
    "threads_per_threadgroup",
    "threadgroups_per_grid",
    "threads_per_grid",
)

TYPE = r"(?:const\s+)?[\w:]+(?:\s*<[^;\n]*?>)?"
STATEMENT = r"(?P<lead>^[ \t]*|[;{}][ \t]*)"
THREADGROUP = re.compile(
    STATEMENT + rf"threadgroup\s+(?P<type>{TYPE})\s+(?P<name>\w+)"
    r"(?P<dims>(?:\s*\[[^;\]]*\])*)\s*;",
    re.MULTILINE,
)
CONSTANT = re.compile(
    STATEMENT + r"constant\s+(?P<type>\w+)\s+(?P<name>\w+)\s*"
    r"\[\[\s*function_constant\(\s*(?P<index>\d+)\s*\)\s*\]\]\s*;",
    re.MULTILINE,
)
INSTANCE = re.compile(
    r"template\s*\[\[\s*host_name\(\s*(?P<name>(?:\"[^\"]*\"\s*)+)\)\s*\]\]\s*"
    r"(?:\[\[\s*kernel\s*\]\]|kernel)\s*(?P<rest>[^;]*);"
)
KERNEL = re.compile(
    r"(?:\[\[\s*kernel\b(?P<attributes>[^\]]*)\]\]|\bkernel)\s+void\s+(?P<name>\w+)\s*\("
)
TEMPLATE_HEAD = re.compile(r"template\s*<[^{};]*>\s*(?:\[\[[^\]]*\]\]\s*)*$")
ARRAY_PARAMETER = re.compile(
    r"\b(constant|device|threadgroup)\s+((?:const\s+)?\w+)\s+(\w+)\[\w*\](?=\s*[,)])"
)
ATTRIBUTE = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)


class TranslationError(ValueError):
    """The text is not Metal as the rig knows it."""


@dataclass
class Parameter:
    kind: str  # "buffer", "threadgroup" or "index"
    name: str
    index: int = 0
    attribute: str = ""
    condition: str = ""  # the function constant that turns it on
    in_device: bool = False


@dataclass
class Kernel:
    name: str
    parameters: list[Parameter]
    is_template: bool


@dataclass
class Source:
    """A translated library: text for the compiler, and what the text says."""

    text: str
    kernels: dict[str, Kernel]
    instances: dict[str, str]  # name for the host: what C++ calls it
    constants: dict[str, tuple[str, int]] = field(default_factory=dict)


def split_arguments(text: str) -> list[str]:
    """Pieces between the commas that no bracket encloses."""
    pieces, depth, piece = [], 0, ""
    for character in text:
        depth += (character in "([{<") - (character in ")]}>")
        if character == "," and depth == 0:
            pieces.append(piece)
            piece = ""
        else:
            piece += character
    return [*pieces, piece] if piece.strip() else pieces


def closing(text: str, start: int) -> int:
    """Position behind the parenthesis that was opened before start."""
    depth = 1
    while depth:
        depth += {"(": 1, ")": -1}.get(text[start], 0)
        start += 1
    return start


def parse_parameter(kernel: str, text: str) -> Parameter:
    attributes = " ".join(ATTRIBUTE.findall(text))
    declared = ATTRIBUTE.sub("", text).strip()
    name = re.search(r"(\w+)\s*(?:\[\w*\])?$", declared)[1]
    condition = re.search(r"\bfunction_constant\(\s*(\w+)\s*\)", attributes)
    condition = condition[1] if condition else ""
    for kind in ("buffer", "threadgroup"):
        found = re.search(rf"\b{kind}\(\s*(\d+)\s*\)", attributes)
        if found:
            in_device = bool(re.search(r"\bdevice\b", declared))
            if kind == "buffer" and in_device == bool(
                re.search(r"\bconstant\b", declared)
            ):
                raise TranslationError(
                    f"{kernel}: buffer {name} must be in device or constant memory; "
                    f"got {declared}."
                )
            return Parameter(kind, name, int(found[1]), "", condition, in_device)
    attribute = attributes.strip()
    if attribute not in SCALARS + VECTORS:
        raise TranslationError(
            f"{kernel}: parameter {name} has no attribute that is known; "
            f"got [[{attribute}]]."
        )
    return Parameter("index", name, attribute=attribute)


def parse_kernel(text: str, found: re.Match) -> Kernel:
    end = closing(text, found.end())
    name = found["name"]
    arguments = split_arguments(text[found.end() : end - 1])
    parameters = [parse_parameter(name, part) for part in arguments]
    used = [(p.kind, p.index) for p in parameters if p.kind != "index"]
    if len(set(used)) < len(used) or any(i > 30 for _, i in used):
        raise TranslationError(f"{name}: buffers are 0 to 30, each once; got {used}.")
    is_template = bool(TEMPLATE_HEAD.search(text[: found.start()]))
    return Kernel(name, parameters, is_template)


def parse_kernels(text: str, wanted: set[str]) -> dict[str, Kernel]:
    """The kernels of those names, and all that are no templates."""
    kernels = {}
    for found in KERNEL.finditer(text):
        is_template = TEMPLATE_HEAD.search(text[: found.start()])
        if found["name"] in wanted or not is_template:
            kernels[found["name"]] = parse_kernel(text, found)
    return kernels


def without_markers(text: str) -> str:
    return re.sub(r"^#.*$", "", text, flags=re.MULTILINE)


def translate(text: str) -> Source:
    """Rewrites preprocessed Metal text."""
    original = without_markers(text)
    constants: dict[str, tuple[str, int]] = {}
    instances: dict[str, str] = {}
    arrays = 0

    def threadgroup_array(found: re.Match) -> str:
        nonlocal arrays
        arrays += 1
        name, type_ = found["name"], found["type"]
        return (
            f"{found['lead']}typedef {type_} msl_{name}_t{found['dims']}; "
            f"threadgroup msl_{name}_t& {name} = *(threadgroup msl_{name}_t*)"
            f"msl_threadgroup_memory({arrays}, sizeof(msl_{name}_t));"
        )

    def function_constant(found: re.Match) -> str:
        constants[found["name"]] = (found["type"], int(found["index"]))
        return (
            f"{found['lead']}extern constant {found['type']} {found['name']} "
            f'MSL_SYMBOL("msl_constant_{found["index"]}");'
        )

    def instance(found: re.Match) -> str:
        name = "".join(re.findall(r'"([^"]*)"', found["name"]))
        if name in instances:
            raise TranslationError(f"two instances are named {name}.")
        without_parameters = r"(\w+\s*<.*>)\s*(?:\(.*\))?\s*$"
        function = re.search(without_parameters, found["rest"], re.DOTALL)
        instances[name] = last_template_id(function[1])
        return f"template {found['rest']};"

    text = INSTANCE.sub(instance, text)
    text = CONSTANT.sub(function_constant, text)
    text = THREADGROUP.sub(threadgroup_array, text)
    text = ARRAY_PARAMETER.sub(r"\1 \2* \3", text)
    text = re.sub(r"\[\[\s*kernel\b[^\]]*\]\]", "", text)
    text = re.sub(r"\[\[\s*threadgroup\(", "[[msl_threadgroup(", text)
    wanted = {re.match(r"\w+", callee)[0] for callee in instances.values()}
    kernels = parse_kernels(original, wanted)
    for kernel in kernels.values():
        if not kernel.is_template:
            instances[kernel.name] = kernel.name
    return Source(text, kernels, instances, constants)


def last_template_id(text: str) -> str:
    """`f<A, B>` from `decltype(f<A, B>) f<A, B>`."""
    depth = 0
    for position in range(len(text) - 1, -1, -1):
        depth += (text[position] == ">") - (text[position] == "<")
        if depth == 0 and text[position] == "<":
            name = re.search(r"\w+\s*$", text[:position])
            return text[name.start() :].strip()
    raise TranslationError(f"an instance must be of a template; got {text}.")
