#!/usr/bin/env bash
# Runs the CUDA launch and kernels on an emulated GPU, in a folder of its own:
# scripts/emulate_cuda.sh [pytest arguments]
# The text of every kernel that ran stays in build/cuda-emulated/kernels.
# Expects the installed package and its build tools in the active environment.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=$PWD/build/cuda-emulated
package=$folder/site/mlx_quantized_sdpa
kernels=$folder/kernels

rm -rf "$kernels"
mkdir -p "$package" "$kernels"
find python/mlx_quantized_sdpa -name '*.py' -exec cp {} "$package" \;
(cd / && python -c '
import mlx_quantized_sdpa._versions as versions
print(open(versions.__file__).read())') >"$package/_versions.py"
cmake -S . -B "$folder/cmake" -G Ninja -DCMAKE_BUILD_TYPE=Release \
  -DPython_EXECUTABLE="$(command -v python)" \
  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$package" \
  -DQUANTIZED_SDPA_EMULATE_CUDA=ON >"$folder/configure.log"
cmake --build "$folder/cmake"

export QUANTIZED_SDPA_EMULATOR_FOLDER=$kernels
export QUANTIZED_SDPA_EMULATOR="${CXX:-g++} -std=c++20 -fPIC -O1 -shared -w \
  -I$PWD/python_tests/cuda/include -I$PWD/overlay $PWD/python_tests/cuda/"
export PYTHONPATH=$folder/site:$PWD/python_tests
exec python -m pytest -p no:cacheprovider -p mlx_quantized_sdpa \
  "${@:-python_tests/cuda}"
