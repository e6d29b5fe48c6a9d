#!/usr/bin/env bash
# To be sourced, with folder= and kernels= set: what compiles kernels for the
# emulated GPU. Their text stays in $kernels.
# shellcheck disable=SC2154

emulator_tests=$PWD/python_tests/cuda
flags="-std=c++20 -fPIC -O1 -w -I$emulator_tests/include -I$PWD/overlay"
rm -rf "$kernels"
# What all kernels have in common is compiled once.
common=$folder/common/mlx/backend/cuda
mkdir -p "$kernels" "$common"
for header in quantized_sdpa_{decode,prefill_wgmma}.cuh; do
  # shellcheck disable=SC2086
  ${CXX:-g++} $flags -x c++-header "overlay/mlx/backend/cuda/$header" \
    -o "$common/$header.gch"
done
export QUANTIZED_SDPA_EMULATOR_FOLDER=$kernels
export QUANTIZED_SDPA_EMULATOR="${CXX:-g++} -I$folder/common $flags -shared \
  $emulator_tests/"
