"""pytest -p stand_in_plugin: MLX's own CUDA library on the stand-in for a driver.

Arrays are made by the CPU and the op runs on the GPU's stream: only kernels of ours
can run there. Run by scripts/stand_in_cuda.sh, which says where libraries are found.
"""

import ctypes
import mmap
import re
import sysconfig
from pathlib import Path

from libraries import runtime_of, symbols

# MLX's own kernels that the stand-in knows.
EVENT_KERNEL = re.compile(r"_ZN3mlx4core2cu\d+event_(signal|wait)_kernelE\w+")
# jmp to the address that follows.
JUMP = bytes.fromhex("ff2500000000")


def base_of(library):
    """Where the library's first byte is in memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(library)):
            return int(line.split("-")[0], 16)
    raise LookupError(library)


def replace(address, function):
    """Let whoever calls the code at ``address`` come to ``function``."""
    target = ctypes.cast(function, ctypes.c_void_p).value
    code = JUMP + target.to_bytes(8, "little")
    page = address // mmap.PAGESIZE * mmap.PAGESIZE
    protect = ctypes.CDLL(None).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    everything = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    if protect(page, 2 * mmap.PAGESIZE, everything) != 0:
        raise OSError(f"the code at {address:#x} cannot be changed")
    ctypes.memmove(address, code, len(code))


def load():
    """Load MLX's CUDA library with its runtime replaced."""
    driver = ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
    library = Path(sysconfig.get_paths()["purelib"]) / "mlx/lib/libmlx.so"
    ctypes.CDLL(library)
    base = base_of(library)
    for x in runtime_of(library):
        replace(base + x.offset, getattr(driver, x.name))
    kernels = {
        found[1]: ctypes.c_void_p(base + x.offset)
        for x in symbols(library)
        if (found := EVENT_KERNEL.fullmatch(x.name))
    }
    driver.stand_in_set_event_kernels(kernels["signal"], kernels["wait"])


load()

import mlx.core as mx  # noqa: E402
import mlx_quantized_sdpa  # noqa: E402, F401

mx.set_default_device(mx.cpu)
op = mx.fast.quantized_scaled_dot_product_attention


def op_on_gpu(*args, stream=mx.gpu, **options):
    """The op with all that it reads there already, and what it gives there too."""
    mx.eval([x for x in (*args, *options.values()) if isinstance(x, mx.array)])
    out = op(*args, stream=stream, **options)
    mx.eval(out)
    return out


mx.fast.quantized_scaled_dot_product_attention = op_on_gpu
