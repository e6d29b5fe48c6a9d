#!/usr/bin/env bash
# Proves: each instruction set's kernels leave their object by one symbol only. An
# inline function that escapes could be the one that an older processor then runs.
set -euo pipefail
cd "$(dirname "$0")/.."

make wheel
objects=$(find build/temp.* -path '*quantized_sdpa_kernels_*' -name '*.o')
if [[ -z $objects ]]; then
  echo "no kernel objects found" >&2
  exit 1
fi
for object in $objects; do
  symbols=$(nm --demangle --defined-only --extern-only "$object" | cut -d' ' -f3-)
  echo "$symbols"
  [[ $symbols =~ ^mlx::core::quantized_sdpa::cpu_kernels_[a-z0-9]+\(\)$ ]]
done
