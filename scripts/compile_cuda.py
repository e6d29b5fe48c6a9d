"""Compile kernels by NVRTC, without a GPU, and hold their registers to limits:
python scripts/compile_cuda.py FOLDER ARCHITECTURE...

FOLDER has the texts that scripts/emulate_cuda.sh left. Needs nvidia-cuda-nvrtc.
"""

import ctypes
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "cmake"))
HEADER = "mlx/backend/cuda/quantized_sdpa_{}.cuh"
# Of the stack, for a thread: more would be read in the loop over keys.
MOST_SPILLED = 64
TYPES = """\
#pragma once
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
using int32_t = int;
using int64_t = long long;
"""


def load_nvrtc():
    import nvidia

    for folder in nvidia.__path__:
        for builtins in Path(folder).glob("**/libnvrtc-builtins.so.*"):
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(str(builtins.with_name("libnvrtc.so.13")))
    raise SystemExit("nvidia-cuda-nvrtc must be installed.")


def strings(*values):
    return (ctypes.c_char_p * len(values))(*(value.encode() for value in values))


def compile_kernel(nvrtc, text, architecture):
    """(registers and spilled bytes of a thread, machine code).

    Raises RuntimeError with the log.
    """
    program = ctypes.c_void_p()
    names, headers = strings("cstdint", "cstring", "math.h"), strings(TYPES, "", "")
    nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), text.encode(), b"quantized_sdpa.cu", 3, headers, names
    )
    options = strings(
        f"--gpu-architecture={architecture}",
        "--std=c++20",
        "--device-as-default-execution-space",
        "--ptxas-options=-v",
    )
    error = nvrtc.nvrtcCompileProgram(program, len(options), options)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    log = log.value.decode()
    if error:
        raise RuntimeError(log)
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    code = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, code)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    spilled = int(re.search(r"(\d+) bytes spill stores", log)[1])
    return registers, spilled, code.raw


def main():
    from flatten_metal import flatten

    folder, *architectures = sys.argv[1:]
    nvrtc = load_nvrtc()
    decode, prefill = (
        flatten(ROOT / "overlay", HEADER.format(name))
        for name in ("decode", "prefill_wgmma")
    )
    texts = sorted({path.read_text() for path in Path(folder).glob("*.cpp")})
    if not texts:
        raise SystemExit(f"{folder} holds no kernels.")
    failed = False
    for architecture in architectures:
        with ThreadPoolExecutor(2) as pool:
            found = list(
                pool.map(
                    lambda text, architecture=architecture: compile_kernel(
                        nvrtc,
                        (prefill if "prefill" in text else decode) + text,
                        architecture,
                    ),
                    texts,
                )
            )
        registers, spills, _ = zip(*found)
        print(
            f"{architecture}: {len(texts)} kernels, at most {max(registers)} "
            f"registers, {max(spills)} bytes spilled",
            flush=True,
        )
        failed = failed or max(spills) > MOST_SPILLED
    return failed


if __name__ == "__main__":
    sys.exit(main())
