"""The parts of the build that depend on the MLX and the backend at hand."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

from mlx import extension
from setuptools import setup
from setuptools.command.build_py import build_py

MLX_VERSION = version("mlx")
AUTOLOAD = "mlx_quantized_sdpa_autoload"
BACKENDS = {
    "Linux": {"cpu": "mlx[cpu]", "cuda": "mlx[cuda13]"},
    "Darwin": {"metal": "mlx"},
}


def mlx_requirement() -> str:
    """The MLX that the wheel depends on: exactly the one it is built for."""
    backends = BACKENDS.get(platform.system(), {})
    if not backends:
        raise SystemExit(f"No wheel for {platform.system()}: MLX needs Linux or macOS.")
    backend = os.environ.get("QUANTIZED_SDPA_BACKEND") or next(iter(backends))
    if backend not in backends:
        raise SystemExit(f"BACKEND must be one of {', '.join(backends)}; got {backend}.")
    return f"{backends[backend]}=={MLX_VERSION}"


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        build_lib = Path(self.build_lib)
        (build_lib / "mlx_quantized_sdpa" / "_versions.py").write_text(
            f'VERSION = "{self.distribution.get_version()}"\n'
            f'BUILT_FOR_MLX = "{MLX_VERSION}"\n'
        )
        (build_lib / f"{AUTOLOAD}.pth").write_text(f"import {AUTOLOAD}\n")


os.environ.setdefault("CMAKE_GENERATOR", "Ninja")
Path("build").mkdir(exist_ok=True)

setup(
    install_requires=[mlx_requirement()],
    ext_modules=[extension.CMakeExtension("mlx_quantized_sdpa._ext", sourcedir=".")],
    cmdclass={"build_ext": extension.CMakeBuild, "build_py": BuildPy},
    options={"egg_info": {"egg_base": "build"}},
    zip_safe=False,
)
