#!/usr/bin/env bash
# Proves, without a GPU: the CUDA launch and kernels give right results on an
# emulated one; every kernel that ran there compiles for real ones without spills;
# the wheel builds, MLX's CUDA library has all that it needs, and in that library
# it gives right results on a stand-in for the driver.
set -euo pipefail
cd "$(dirname "$0")/.."

make test-cuda
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet nvidia-cuda-nvrtc==13.0.88
compile=("$work/venv/bin/python" scripts/compile_cuda.py)
"${compile[@]}" build/cuda-emulated/kernels sm_90a
# Of the other architectures, one kernel in ten.
mkdir "$work/some"
find build/cuda-emulated/kernels -name '*0.cpp' -exec cp {} "$work/some" \;
"${compile[@]}" "$work/some" sm_80 sm_89 sm_100 sm_120

make test-cuda-wheel
site=$(echo build/cuda-stand-in/venv/lib/python*/site-packages)
# Symbols are given back as they are named in the object.
nm -D --undefined-only "$site"/mlx_quantized_sdpa/_ext*.so |
  awk '$2 ~ /^_ZN?K?[A-Z]*3mlx/ { print $2 }' | sort -u >"$work/needed"
nm -D --defined-only "$site/mlx/lib/libmlx.so" | awk '{ print $3 }' |
  sort -u >"$work/given"
missing=$(comm -23 "$work/needed" "$work/given")
if [[ -n $missing ]]; then
  echo "MLX's CUDA library lacks: $missing" >&2
  exit 1
fi
echo "the CUDA wheel finds all $(wc -l <"$work/needed") symbols that it needs"
