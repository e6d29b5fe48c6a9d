"""Plants faults in the sources and runs the tests that must notice them.

A fault in Python, or in a CUDA kernel that the emulated GPU compiles as it runs, needs
no build. Of one in C++ the translation units that see it are compiled again, the CPU
kernels for one instruction set alone, and linked with all the others as they were.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PACKAGE = "mlx_quantized_sdpa"
# A fault may make a loop endless.
PATIENCE = 240
FAILED = 1


@dataclass(frozen=True)
class Fault:
    """A piece of text and what takes its place.

    Attributes:
        what (str): Its name.
        file (str): Where it is; of a folder, in whichever file has it.
        find (str): Must be there exactly once.
        replace (str): What takes its place.
        test (str): Which test must fail, from this folder on.
        where (str): Looked for only from this text on to the end of that function.
    """

    what: str
    file: str
    find: str
    replace: str
    test: str
    where: str = ""

    @property
    def emulated(self):
        """Whether the test runs on the emulated GPU."""
        return self.test.startswith("cuda/")

    def is_built(self, emulated):
        """Whether its test takes the extension of that build."""
        return self.emulated == emulated and (emulated or not self.in_python)

    @property
    def in_python(self):
        return self.file.startswith("python/")

    def plant(self, root=ROOT):
        """(path of the file below `root`, its text with the fault in it)."""
        found = []
        for path in _sources(root / self.file):
            text = path.read_text()
            for begin, end in _scopes(path, text, self.where):
                count = text.count(self.find, begin, end)
                found += [(path, text, begin)] * count
        if len(found) != 1:
            raise ValueError(f"{self.what}: the text is there {len(found)} times")
        path, text, begin = found[0]
        changed = text[:begin] + text[begin:].replace(self.find, self.replace, 1)
        return path.relative_to(root), changed


def _sources(path):
    return sorted(path.glob("*.py")) if path.is_dir() else [path]


def _scopes(path, text, where):
    """Where the function lies that begins with `where`; all of the text without it."""
    if not where:
        return [(0, len(text))]
    scopes = []
    for match in re.finditer(re.escape(where), text):
        begin = match.start()
        if path.suffix == ".py":
            indent = begin - text.rfind("\n", 0, begin) - 1
            end = re.compile(rf"\n {{0,{indent}}}[^\s)]").search(text, begin)
        else:
            end = re.compile(r"\n}").search(text, begin)
        scopes.append((begin, end.start() if end else len(text)))
    return scopes


def _run(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode != 0:
        raise RuntimeError(f"{command}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


class Build:
    """An extension built from the sources as they are, to be built in part again."""

    def __init__(self, folder, emulated):
        self.folder = Path(folder).resolve()
        self.emulated = emulated

    @property
    def site(self):
        return self.folder / "site"

    @cached_property
    def extension(self):
        (found,) = (self.site / PACKAGE).glob("_ext.*.so")
        return found

    def make(self):
        """Configure and build what is not built yet."""
        _run(
            [
                "cmake",
                *("-S", ROOT, "-B", self.folder / "cmake", "-G", "Ninja"),
                "-DCMAKE_BUILD_TYPE=Debug",
                "-DCMAKE_CXX_FLAGS_DEBUG=-O1",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={self.site / PACKAGE}",
                f"-DQUANTIZED_SDPA_EMULATE_CUDA={'ON' if self.emulated else 'OFF'}",
            ]
        )
        _run(["cmake", "--build", self.folder / "cmake", "--target", "_ext", "-j2"])

    @cached_property
    def _link(self):
        """The command that links the extension, as a list."""
        ninja = ["ninja", "-C", self.folder / "cmake", "-t", "commands", "-s"]
        text = _run([*ninja, self.extension])
        (link,) = [part for part in text.split(" && ") if " -shared " in part]
        return shlex.split(link)

    @cached_property
    def _compiles(self):
        """{object: its command} of what the extension is linked of."""
        database = self.folder / "cmake" / "compile_commands.json"
        each = [shlex.split(x["command"]) for x in json.loads(database.read_text())]
        commands = {command[command.index("-o") + 1]: command for command in each}
        return {name: commands[name] for name in self._link if name in commands}

    @cached_property
    def _depends(self):
        """{object: the files that it was compiled from}."""
        text = _run(["ninja", "-C", self.folder / "cmake", "-t", "deps"])
        found = {}
        for part in text.strip().split("\n\n"):
            head, *files = part.splitlines()
            found[head.split(":")[0]] = {file.strip() for file in files}
        return found

    def is_compiled_from(self, changed):
        """Kernels that the emulated GPU compiles as it runs are no part of it."""
        path = str(ROOT / changed)
        if any(path in self._depends[name] for name in self._compiles):
            return True
        if not self.emulated or changed.suffix not in (".h", ".cuh"):
            raise RuntimeError(f"nothing is compiled from {changed}")
        return False

    def remake(self, changed, target, overlay, to):
        """The extension at `to`, with the file `changed` taken from `overlay`."""
        link = list(self._link)
        for name, command in self._compiles.items():
            kernels = re.search(r"quantized_sdpa_kernels_(\w+)\.dir", name)
            if str(ROOT / changed) not in self._depends[name] or (
                kernels and kernels[1] != target
            ):
                continue
            made = str(to.parent / name.replace("/", "-"))
            command = [
                part.replace(str(ROOT / "overlay"), str(overlay)) for part in command
            ]
            command[command.index("-o") + 1] = made
            for flag in ("-MD", "-MMD"):
                if flag in command:
                    command.remove(flag)
            if "-MF" in command:
                at = command.index("-MT")
                del command[at : at + 4]
            _run(command, cwd=self.folder / "cmake")
            link[link.index(name)] = made
        link[link.index("-o") + 1] = str(to)
        _run(link, cwd=self.folder / "cmake")


def cpu_target():
    """The instruction set that the CPU kernels are compiled for."""
    if platform.machine() in ("aarch64", "arm64"):
        return "neon"
    flags = Path("/proc/cpuinfo")
    has = flags.exists() and " avx2 " in flags.read_text()
    return "avx2" if has else "portable"


def installed_package():
    """The folder of the package that is installed."""
    command = f"import {PACKAGE}; print({PACKAGE}.__file__)"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return Path(_run([sys.executable, "-c", command], cwd="/", env=env)).parent


class Workshop:
    """Where faults are planted.

    Args:
        folder (path): For builds; ``None`` where only faults in Python come.
    """

    def __init__(self, folder=None):
        self.builds = {}
        self.installed = installed_package()
        if folder is not None:
            self.builds = {
                emulated: Build(Path(folder) / name, emulated)
                for emulated, name in ((False, "cpu"), (True, "cuda"))
            }

    def attempt(self, fault):
        """How the fault is noticed: "failed", "crashed", "hung"; "" where it is not.

        Raises:
            RuntimeError: If it cannot be compiled, or its test not be run.
        """
        with tempfile.TemporaryDirectory(dir=self._scratch()) as name:
            return self._attempt(fault, Path(name))

    def failing(self, faults):
        """What pytest says of their tests that fail where no fault is planted."""
        said = ""
        for emulated in (False, True):
            tests = sorted({f.test for f in faults if f.emulated == emulated})
            if tests:
                with tempfile.TemporaryDirectory(dir=self._scratch()) as name:
                    site, overlay = Path(name) / "site", ROOT / "overlay"
                    self._lay_out(site / PACKAGE)
                    self._extension(emulated, site, all(f.in_python for f in faults))
                    env = self._environment(emulated, site, overlay, Path(name))
                    done = _pytest(tests, env, patience=None)
                    said += done.stdout if done.returncode else ""
        return said

    def _scratch(self):
        return self.builds[False].folder.parent if self.builds else None

    def _extension(self, emulated, site, installed):
        """Where the extension as it is, or as installed, lies in the package."""
        build = None if installed else self.builds.get(emulated)
        extension = build.extension if build else next(self.installed.glob("_ext.*.so"))
        made = site / PACKAGE / extension.name
        made.symlink_to(extension)
        return made

    def _attempt(self, fault, folder):
        site = folder / "site"
        changed, text = fault.plant()
        overlay = ROOT / "overlay"
        if changed.parts[0] == "overlay":
            overlay = folder / "overlay"
            shutil.copytree(ROOT / "overlay", overlay)
            (folder / changed).write_text(text)
        self._lay_out(site / PACKAGE, changed, text)
        made = self._extension(fault.emulated, site, fault.in_python)
        build = self.builds.get(fault.emulated)
        if changed.parts[0] == "overlay" and build.is_compiled_from(changed):
            made.unlink()
            build.remake(changed, cpu_target(), overlay, made)
        env = self._environment(fault.emulated, site, overlay, folder)
        return _outcome(fault.test, env)

    def _lay_out(self, package, changed=None, text=""):
        """The package's Python files, perhaps one of them changed."""
        package.mkdir(parents=True)
        own = ROOT / "python" / PACKAGE
        for path in own.rglob("*.py"):
            to = package / path.relative_to(own)
            to.parent.mkdir(exist_ok=True)
            if changed == path.relative_to(ROOT):
                to.write_text(text)
            else:
                to.symlink_to(path)
        (package / "_versions.py").symlink_to(self.installed / "_versions.py")

    def _environment(self, emulated, site, overlay, folder):
        path = [site, HERE]
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        if emulated:
            kernels = folder / "kernels"
            kernels.mkdir()
            env["QUANTIZED_SDPA_EMULATOR_FOLDER"] = str(kernels)
            env["QUANTIZED_SDPA_EMULATOR"] = (
                f"{os.environ.get('CXX', 'g++')} -std=c++20 -fPIC -O1 -shared -w "
                f"-I{HERE}/cuda/include -I{overlay} {HERE}/cuda/"
            )
        else:
            env["MLX_QUANTIZED_SDPA_TARGET"] = cpu_target()
        return env


def _pytest(tests, env, patience):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, "-p", PACKAGE, "-x", *(str(HERE / test) for test in tests)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=patience,
    )


def _outcome(test, env):
    try:
        done = _pytest([test], env, PATIENCE)
    except subprocess.TimeoutExpired:
        return "hung"
    if "kernel does not compile" in done.stdout:
        raise RuntimeError(f"{test}: the fault does not compile")
    if done.returncode in (0, FAILED):
        return "failed" if done.returncode else ""
    if done.returncode < 0:
        return "crashed"
    raise RuntimeError(f"{test} cannot be run:\n{done.stdout[-3000:]}{done.stderr}")


def timed(workshop, fault):
    """(how it is noticed, seconds)."""
    start = time.monotonic()
    return workshop.attempt(fault), round(time.monotonic() - start, 1)
