#!/usr/bin/env bash
# Proves: the NEON kernels compile without a warning, by clang, for Linux and macOS,
# and give float64 attention's results when an emulator runs them.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet ziglang==0.17.1
flags=(-std=c++20 -O3 -Wall -Wextra -Wno-sign-compare -Werror -fno-math-errno
  -ffp-contract=fast -Ioverlay)
compile() {
  "$work/venv/bin/python" -m ziglang c++ -target "$1" "${flags[@]}" "${@:2}"
}
kernels=overlay/mlx/backend/cpu/quantized_sdpa_kernels.cpp
compile aarch64-macos -DQUANTIZED_SDPA_TARGET=neon -c "$kernels" -o "$work/macos.o"
echo "the NEON kernels compile for macOS"

target=aarch64-linux-musl
compile "$target" -DQUANTIZED_SDPA_TARGET=neon -c "$kernels" -o "$work/neon.o"
compile "$target" -static ci/compare_quantized_sdpa.cpp "$work/neon.o" -o "$work/compare"
emulator=$(command -v qemu-aarch64-static qemu-aarch64 | head -n 1 || true)
if [[ $(uname -m) == aarch64 ]]; then
  emulator="env"
elif [[ -z $emulator ]]; then
  echo "qemu-aarch64 is needed to run the NEON kernels (Debian: qemu-user-static)" >&2
  exit 1
fi
"$emulator" "$work/compare"
