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
export QUANTIZED_SDPA_EMULATOR="${CXX:-g++} -std=c++20 -fPIC -O1 -shared -w \
  -I$PWD/python_tests/cuda/include -I$PWD/overlay $PWD/python_tests/cuda/"
export PYTHONPATH=$folder/site:$PWD/python_tests
exec python -m pytest -p no:cacheprovider -p mlx_quantized_sdpa \
  "${@:-python_tests/cuda}"
