#!/usr/bin/env bash
# Proves: the NEON kernels compile without a warning, by clang, for Linux and macOS.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet ziglang==0.17.1
for target in aarch64-linux-gnu aarch64-macos; do
  "$work/venv/bin/python" -m ziglang c++ -target "$target" -std=c++20 -O3 -fPIC \
    -Wall -Wextra -Wno-sign-compare -Werror -fno-math-errno -ffp-contract=fast \
    -DQUANTIZED_SDPA_TARGET=neon -Ioverlay \
    -c overlay/mlx/backend/cpu/quantized_sdpa_kernels.cpp -o "$work/kernels.o"
  echo "the NEON kernels compile for $target"
done
