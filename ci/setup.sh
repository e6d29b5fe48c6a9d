#!/usr/bin/env bash
# What the build needs from the system: a C++20 compiler, make, git and Python with
# its headers and venv; doctest for the C++ tests. Installs what is not there.
set -euo pipefail

missing=()
for program in git g++ make; do
  command -v "$program" >/dev/null || missing+=("$program")
done
[[ $(uname -m) == aarch64 ]] || command -v qemu-aarch64-static >/dev/null ||
  missing+=(qemu-user-static)
python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
python3 - <<'PYTHON' 2>/dev/null || missing+=(python3-dev)
import os, sysconfig

assert os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h"))
PYTHON
[[ -e /usr/include/doctest/doctest.h ]] || missing+=(doctest-dev)
if ((${#missing[@]})); then
  apt-get update
  apt-get install -y --no-install-recommends "${missing[@]}"
fi
