#!/usr/bin/env bash
# Proves: the README's test command passes.
set -euo pipefail
cd "$(dirname "$0")/.."

make test
