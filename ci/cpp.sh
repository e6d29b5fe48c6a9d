#!/usr/bin/env bash
# Proves: the C++ tests of codecs, plan and errors pass; MLX's tree has them too.
set -euo pipefail
cd "$(dirname "$0")/.."

make test-cpp
