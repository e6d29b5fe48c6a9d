#!/usr/bin/env bash
# Proves: the op's tests run without an address, undefined-behaviour or thread error.
set -euo pipefail
cd "$(dirname "$0")/.."

make test SAN=address,undefined
make test SAN=thread
