#!/usr/bin/env bash
# Proves: the README's test command passes, and the caches work in mlx-vlm.
set -euo pipefail
cd "$(dirname "$0")/.."

make test
make test-vlm
