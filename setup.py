"""The parts of the build that depend on the MLX and the backend at hand."""

import os
import platform
import shutil
from importlib.metadata import distribution
from pathlib import Path

from mlx import extension
from setuptools import setup
from setuptools.command.build_py import build_py

PACKAGE = "mlx_quantized_sdpa"
OP = "quantized_scaled_dot_product_attention"
MLX = distribution("mlx")
BACKENDS = {
    "Linux": {"cpu": "mlx[cpu]", "cuda": "mlx[cuda13]"},
    "Darwin": {"metal": "mlx"},
}


def chosen_backend() -> str:
    """The backend that is asked for, else the platform's usual one."""
    backends = BACKENDS.get(platform.system(), {})
    if not backends:
        raise SystemExit(f"MLX runs on Linux and macOS; this is {platform.system()}.")
    backend = os.environ.get("QUANTIZED_SDPA_BACKEND") or next(iter(backends))
    if backend not in backends:
        raise SystemExit(f"BACKEND must be {' or '.join(backends)}; got {backend}.")
    return backend


BACKEND = chosen_backend()
# Exactly the MLX that the wheel is built for.
REQUIREMENT = f"{BACKENDS[platform.system()][BACKEND]}=={MLX.version}"
# Or pip would keep one wheel where the other is to take its place.
LOCAL_VERSION = "+cuda13" if BACKEND == "cuda" else ""


def write_stubs(folder: Path) -> None:
    """MLX's own stubs with the op added to mlx.core.fast.

    Type checkers take a partial stub package before the stubs in MLX, but only if it
    holds all of mlx.core.
    """
    core = folder / "core"
    core.mkdir(parents=True, exist_ok=True)
    (folder / "py.typed").write_text("partial\n")
    for file in MLX.files:
        if file.match("mlx/core/*.pyi"):
            shutil.copyfile(file.locate(), core / file.name)
        elif file.name == "LICENSE":
            shutil.copyfile(file.locate(), folder / "LICENSE")
    with open(core / "fast.pyi", "a") as fast:
        fast.write(f"\nfrom {PACKAGE} import {OP} as {OP}\n")


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        build_lib = Path(self.build_lib)
        (build_lib / PACKAGE / "_versions.py").write_text(
            f'VERSION = "{self.get_finalized_command("egg_info").egg_version}"\n'
            f'BUILT_FOR_MLX = "{MLX.version}"\n'
        )
        (build_lib / f"{PACKAGE}.pth").write_text(f"import {PACKAGE}_autoload\n")
        write_stubs(build_lib / "mlx-stubs")


os.environ.setdefault("CMAKE_GENERATOR", "Ninja")
Path("build").mkdir(exist_ok=True)

setup(
    install_requires=[REQUIREMENT],
    ext_modules=[extension.CMakeExtension(f"{PACKAGE}._ext", sourcedir=".")],
    cmdclass={"build_ext": extension.CMakeBuild, "build_py": BuildPy},
    options={"egg_info": {"egg_base": "build", "tag_build": LOCAL_VERSION}},
    zip_safe=False,
)
