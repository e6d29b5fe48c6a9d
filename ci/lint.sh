#!/usr/bin/env bash
# Proves: formatting, linters and the repository's own checks are clean.
set -euo pipefail
cd "$(dirname "$0")/.."

make lint
