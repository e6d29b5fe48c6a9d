"""Writes the extension's stub beside it: python write_stub.py FOLDER.

It is nanobind's, with MLX's names imported and, as a signature in C++ cannot say,
the type of the result following return_lse.
"""

import importlib
import os
import re
import sys
from pathlib import Path

# The extension's signatures refer to its types, and it to libmlx.
import mlx.core  # noqa: F401
from nanobind.stubgen import StubGen

IMPORTS = """\
from typing import Literal, overload

from mlx.core import StreamOrDevice, array

"""
BOTH = "array | tuple[array, array]"
RESULTS = {
    "Literal[False] = False": "array",
    "Literal[True]": "tuple[array, array]",
    "bool": BOTH,
}


def main(folder: str) -> None:
    sys.path.insert(0, folder)
    # A build for CUDA finds its functions in another libmlx than that at hand.
    sys.setdlopenflags(os.RTLD_LAZY)
    extension = importlib.import_module("_ext")
    generator = StubGen(extension)
    generator.put(extension)
    stub = generator.get()
    signatures = re.findall(r"^def .*(?=:(?: \.\.\.)?$)", stub, re.MULTILINE)
    documentation = re.search(r'^    """.*?"""', stub, re.MULTILINE | re.DOTALL)[0]
    overloads = [
        f"\n@overload\n{typed(signature, flag, result)}:\n{documentation}\n"
        for signature in signatures
        for flag, result in RESULTS.items()
    ]
    Path(folder, "_ext.pyi").write_text(IMPORTS + "".join(overloads))


def typed(signature: str, flag: str, result: str) -> str:
    parameter = "return_lse: bool = False"
    if parameter not in signature or not signature.endswith(BOTH):
        raise SystemExit(f"write_stub.py does not know this signature: {signature}")
    signature = signature.replace(parameter, f"return_lse: {flag}")
    return signature.removesuffix(BOTH) + result


if __name__ == "__main__":
    main(sys.argv[1])
