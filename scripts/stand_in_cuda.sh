#!/usr/bin/env bash
# Runs the CUDA wheel in MLX's own CUDA library, on a stand-in for the driver:
# scripts/stand_in_cuda.sh [pytest arguments]
# Expects the wheel in dist/ and its build tools in the active environment.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=$PWD/build/cuda-stand-in
tests=$PWD/python_tests/cuda
kernels=$folder/kernels
rm -rf "${folder:?}"/{lib,cache}

# NVRTC stays apart, so that MLX finds the stand-in's first.
python -m venv "$folder/venv"
install=("$folder/venv/bin/pip" install --quiet --disable-pip-version-check)
"${install[@]}" --no-deps mlx==0.32.4 mlx-cuda-13==0.32.4
"${install[@]}" --no-deps --force-reinstall dist/mlx_quantized_sdpa-*.whl
"${install[@]}" hypothesis==6.168.5 numpy pytest==9.2.0
"${install[@]}" --no-deps --upgrade --target "$folder/nvrtc" \
  nvidia-cuda-nvrtc==13.0.88
site=$("$folder/venv/bin/python" -c 'import sysconfig
print(sysconfig.get_paths()["purelib"])')
python "$tests/stand_in/libraries.py" "$site/mlx/lib/libmlx.so" "$folder/lib" \
  "$folder/nvrtc/nvidia/cu13/include"

# shellcheck source=scripts/emulator.sh
source scripts/emulator.sh
export QUANTIZED_SDPA_NVRTC=$folder/nvrtc/nvidia/cu13/lib/libnvrtc.so.13
export LD_LIBRARY_PATH=$folder/lib:$folder/nvrtc/nvidia/cu13/lib
export MLX_QUANTIZED_SDPA_CACHE=$folder/cache
export PYTHONPATH=$tests/stand_in:$PWD/python_tests
exec "$folder/venv/bin/pytest" -p no:cacheprovider \
  -p stand_in_plugin "${@:-$tests/stand_in}"
