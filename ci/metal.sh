#!/usr/bin/env bash
# Proves: the Metal kernels, as text, are accepted by a strict front end and give
# right results without races on a CPU executor; the executor agrees with Apple's
# compiler on MLX's own kernels.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! python3 python_tests/metal/rig/toolchain.py; then
  apt-get update
  apt-get install -y --no-install-recommends clang-19 llvm-19 libclang-rt-19-dev
fi
make test-metal
