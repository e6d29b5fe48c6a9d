#!/usr/bin/env bash
# Runs tests on an extension built with sanitizers, in a folder of its own, or a
# script that is named first:
# scripts/sanitize.sh address,undefined [pytest arguments]
# scripts/sanitize.sh address,undefined scripts/fuzz.py --calls 10000
# Expects the installed package and its build tools in the active environment.
set -euo pipefail
cd "$(dirname "$0")/.."

sanitizers=$1
shift
folder=$PWD/build/san-${sanitizers//,/-}

scripts/build_apart.sh "$folder" -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  -DQUANTIZED_SDPA_SANITIZE="$sanitizers"

runtime=libasan.so
if [[ $sanitizers == *thread* ]]; then
  runtime=libtsan.so
fi
# Python itself is not instrumented: the runtime must come first, with the C++
# library whose throw it wraps. The interpreter's own leaks are none of ours.
library() {
  "${CXX:-g++}" -print-file-name="$1"
}
LD_PRELOAD="$(library "$runtime") $(library libstdc++.so)"
export LD_PRELOAD
export ASAN_OPTIONS=detect_leaks=0
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
# What a worker of the tests says at its end nobody reads, so the first race ends it.
export TSAN_OPTIONS=ignore_noninstrumented_modules=1:halt_on_error=1
export PYTHONPATH=$folder/site
if [[ ${1-} == scripts/*.py ]]; then
  exec python "$@"
fi
exec python -m pytest -p no:cacheprovider "$@"
