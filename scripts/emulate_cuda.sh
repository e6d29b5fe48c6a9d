#!/usr/bin/env bash
# Runs the CUDA launch and kernels on an emulated GPU, in a folder of its own:
# scripts/emulate_cuda.sh [pytest arguments]
# The text of every kernel that ran stays in build/cuda-emulated/kernels.
# Expects the installed package and its build tools in the active environment.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=$PWD/build/cuda-emulated
kernels=$folder/kernels

scripts/build_apart.sh "$folder" -DCMAKE_BUILD_TYPE=Release \
  -DQUANTIZED_SDPA_EMULATE_CUDA=ON
# shellcheck source=scripts/emulator.sh
source scripts/emulator.sh
export PYTHONPATH=$folder/site:$PWD/python_tests
exec python -m pytest -p no:cacheprovider -p mlx_quantized_sdpa \
  --ignore python_tests/cuda/stand_in "${@:-python_tests/cuda}"
