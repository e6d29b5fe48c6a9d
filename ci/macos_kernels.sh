#!/usr/bin/env bash
# Proves, on a Mac: Apple's compiler takes the kernels in the versions of the Metal
# language that are named, such as metal3.1, with the flags of MLX's own build.
set -euo pipefail
cd "$(dirname "$0")/.."

include=$(build/venv/bin/python -c 'import mlx.core, os
print(os.path.join(os.path.dirname(mlx.core.__file__), "include"))')
for standard in "$@"; do
  xcrun -sdk macosx metal -x metal "-std=$standard" -Wall -Wextra -Werror \
    -fno-fast-math -Wno-c++17-extensions -Wno-c++20-extensions -Wmetal-addr-spaces \
    -Ioverlay -isystem "$include" -o /dev/null \
    -c overlay/mlx/backend/metal/kernels/quantized_sdpa.metal
  echo "the kernels compile as $standard"
done
