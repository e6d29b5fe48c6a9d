#!/usr/bin/env bash
# Runs the CUDA launch and kernels on an emulated GPU, in a folder of its own:
# scripts/emulate_cuda.sh [pytest arguments]
# The text of every kernel that ran stays in build/cuda-emulated/kernels.
# Expects the installed package and its build tools in the active environment.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=$PWD/build/cuda-emulated
kernels=$folder/kernels

rm -rf "$kernels"
mkdir -p "$kernels"
scripts/build_apart.sh "$folder" -DCMAKE_BUILD_TYPE=Release \
  -DQUANTIZED_SDPA_EMULATE_CUDA=ON

export QUANTIZED_SDPA_EMULATOR_FOLDER=$kernels
# What all kernels have in common is compiled once.
flags="-std=c++20 -fPIC -O1 -w -I$PWD/python_tests/cuda/include -I$PWD/overlay"
common=$folder/common/mlx/backend/cuda
mkdir -p "$common"
for header in quantized_sdpa_{decode,prefill_wgmma}.cuh; do
  # shellcheck disable=SC2086
  ${CXX:-g++} $flags -x c++-header "overlay/mlx/backend/cuda/$header" \
    -o "$common/$header.gch"
done
export QUANTIZED_SDPA_EMULATOR="${CXX:-g++} -I$folder/common $flags -shared \
  $PWD/python_tests/cuda/"
export PYTHONPATH=$folder/site:$PWD/python_tests
exec python -m pytest -p no:cacheprovider -p mlx_quantized_sdpa \
  "${@:-python_tests/cuda}"
