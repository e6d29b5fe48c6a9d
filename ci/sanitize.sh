#!/usr/bin/env bash
# Proves: the op's tests run without an address or undefined-behaviour error, and calls
# from many threads without a race.
set -euo pipefail
cd "$(dirname "$0")/.."

make test SAN=address,undefined
make test SAN=thread SAN_TESTS=python_tests/test_quantized_sdpa_threads.py
