#!/usr/bin/env bash
# Proves: the extension compiles for arm64 macOS 14 and links strictly against MLX's
# own library, with MLX's ABI tag; a wheel for macOS holds it.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! compgen -c ld64.lld >/dev/null; then
  apt-get update
  apt-get install -y --no-install-recommends lld-19
fi
make wheel-macos
