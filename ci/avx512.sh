#!/usr/bin/env bash
# Proves: the AVX-512 kernels give float64 attention's results, their instructions
# written in C++, so that no machine with AVX-512 is needed.
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ $(uname -m) != x86_64 ]]; then
  echo "the AVX-512 kernels are for x86-64"
  exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
flags=(-std=c++20 -O1 -Wall -Wno-psabi -Wno-unused-function -Werror -mavx2 -mfma
  -mf16c -fno-math-errno -ffp-contract=fast -Ioverlay)
g++ "${flags[@]}" -include ci/quantized_sdpa_avx512.h -DQUANTIZED_SDPA_TARGET=avx512 \
  -c overlay/mlx/backend/cpu/quantized_sdpa_kernels.cpp -o "$work/avx512.o"
g++ "${flags[@]}" -DCOMPARED_KERNELS=cpu_kernels_avx512 \
  ci/compare_quantized_sdpa.cpp "$work/avx512.o" -o "$work/compare"
"$work/compare"
