"""The package whose op runs its Metal half here, and what it reports."""

import ctypes
import importlib
import json
import os
import shutil
import sys
from pathlib import Path

from . import apple, library
from .executor import symbolise
from .toolchain import BUILD, METAL, ROOT, clang, run

SITE = BUILD / "site"
PACKAGE = SITE / "mlx_quantized_sdpa"

# Before the package that is installed, whoever imports it first.
os.environ["MLX_QUANTIZED_SDPA_AUTOLOAD"] = "0"
sys.path.insert(0, str(SITE))


def build() -> Path:
    """Folder for sys.path with the package; CMake knows what is up to date."""
    build_folder = BUILD / "fake"
    PACKAGE.mkdir(parents=True, exist_ok=True)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    cmake = shutil.which("cmake", path=path)
    command = [cmake, "-S", METAL / "fake", "-B", build_folder, "-G", "Ninja"]
    command += [
        f"-DCMAKE_CXX_COMPILER={clang()}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={PACKAGE}",
        f"-DAPPLE_INCLUDE={apple.include()}",
    ]
    run(command, "CMake refused the fake Metal")
    run([cmake, "--build", build_folder], "the fake Metal does not compile")
    source = ROOT / "python" / "mlx_quantized_sdpa"
    shutil.copytree(source, PACKAGE, dirs_exist_ok=True)
    code = "import mlx.core as mx; print(mx.__version__)"
    version = run([sys.executable, "-c", code], "MLX does not load").strip()
    (PACKAGE / "_versions.py").write_text(
        f'VERSION = "test"\nBUILT_FOR_MLX = "{version}"\n'
    )
    # Who looked into the folder before it was there would not look again.
    importlib.invalidate_caches()
    return SITE


class Metal:
    """The loaded fake Metal."""

    def __init__(self, mode: str = "plain", **settings):
        """Needs build() once before, in this process or another."""
        from mlx_quantized_sdpa import _ext

        assert str(PACKAGE) in _ext.__file__, _ext.__file__
        self.loaded = ctypes.CDLL(_ext.__file__)
        self.loaded.fake_metal_complaints.restype = ctypes.c_char_p
        self.loaded.fake_metal_launches.restype = ctypes.c_char_p
        self.set(executor=library.executor())
        self.mode(mode)
        self.set(**settings)

    def set(self, **settings) -> None:
        for name, value in settings.items():
            value = int(value) if isinstance(value, bool) else value
            if not self.loaded.fake_metal_set(name.encode(), str(value).encode()):
                raise ValueError(f"fake Metal has no setting {name}.")

    def mode(self, mode: str) -> None:
        """How kernels are compiled from now on; those at hand stay as they are."""
        compiler = f"cd {METAL} && {sys.executable} -m rig.compile {mode}"
        self.set(compiler=compiler, checks=mode == "checked")

    def plant(self, number: int) -> None:
        """Plants a fault of mutations.py in kernels compiled from now on."""
        command = f"{sys.executable} -m rig.compile checked {number}"
        self.set(compiler=f"cd {METAL} && {command}", checks=True)

    def complaints(self) -> str:
        return symbolise(self.loaded.fake_metal_complaints().decode())

    def launches(self) -> list[dict]:
        lines = self.loaded.fake_metal_launches().decode().splitlines()
        return [json.loads(line) for line in lines]


if __name__ == "__main__":
    print(build())
