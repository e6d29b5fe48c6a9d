#!/usr/bin/env bash
# Proves: the README's test command passes, and no file compiles with a warning.
set -euo pipefail
cd "$(dirname "$0")/.."

CMAKE_ARGS="-DCMAKE_COMPILE_WARNING_AS_ERROR=ON" make test
