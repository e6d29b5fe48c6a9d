"""MLX's wheel for macOS: Apple's compiled kernels and the headers of metal-cpp.

Fetched from the package index when first needed, never part of the repository.
"""

import functools
import importlib.metadata
import sys
import tempfile
import zipfile
from pathlib import Path

from .toolchain import BUILD, Missing, run


@functools.cache
def wheel() -> Path:
    """Folder of the wheel's contents, for the version of MLX at hand."""
    version = importlib.metadata.version("mlx")
    folder = BUILD / f"mlx-metal-{version}"
    if (folder / "mlx").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as draft:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--platform", "macosx_14_0_arm64"]
        try:
            run(
                [*command, "--dest", draft, f"mlx-metal=={version}"],
                "pip cannot download the wheel",
            )
        except RuntimeError as error:
            raise Missing(
                f"This test needs mlx-metal {version}, MLX's wheel for macOS, from "
                f"the Python package index: {error}"
            ) from None
        (downloaded,) = Path(draft).glob("*.whl")
        zipfile.ZipFile(downloaded).extractall(Path(draft) / "contents")
        (Path(draft) / "contents").rename(folder)
    return folder


def include() -> Path:
    return wheel() / "mlx" / "include"


def metallib() -> Path:
    return wheel() / "mlx" / "lib" / "mlx.metallib"
