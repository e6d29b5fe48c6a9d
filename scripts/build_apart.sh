#!/usr/bin/env bash
# Builds the package with another extension, apart from the installed one:
# scripts/build_apart.sh FOLDER [cmake arguments]
# FOLDER/site is then for PYTHONPATH. Expects the installed package and its build
# tools in the active environment.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=$1
shift
package=$folder/site/mlx_quantized_sdpa

mkdir -p "$package"
cp -R python/mlx_quantized_sdpa/. "$package"
(cd / && python -c '
import mlx_quantized_sdpa._versions as versions
print(open(versions.__file__).read())') >"$package/_versions.py"
cmake -S . -B "$folder/cmake" -G Ninja \
  -DPython_EXECUTABLE="$(command -v python)" \
  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$package" "$@" >"$folder/configure.log"
cmake --build "$folder/cmake"
