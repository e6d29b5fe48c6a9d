#!/usr/bin/env bash
# Formatters and checks over every file that git does not ignore.
# `scripts/lint.sh fix` lets the formatters change the files instead.
set -euo pipefail
cd "$(dirname "$0")/.."

fix=${1:-}

clang_format=(clang-format --dry-run --Werror)
black=(black --quiet --check --diff)
isort=(isort --quiet --check --diff)
cmake_format=(cmake-format --check)
if [[ $fix == fix ]]; then
  clang_format=(clang-format -i)
  black=(black --quiet)
  isort=(isort --quiet)
  cmake_format=(cmake-format -i)
fi

failed=0
on_files() {
  local pattern=$1
  shift
  # shellcheck disable=SC2086 # the pattern is a list
  git ls-files -z --cached --others --exclude-standard -- $pattern |
    xargs -0r "$@" || failed=1
}

set -f
on_files '*.h *.cpp *.cu *.cuh *.metal' "${clang_format[@]}"
on_files '*.py' "${isort[@]}"
on_files '*.py' "${black[@]}"
on_files '*CMakeLists.txt *.cmake' "${cmake_format[@]}"
if [[ $fix != fix ]]; then
  on_files '*.py' ruff check --quiet
  on_files '*.sh .ci/run' shellcheck
  set +f
  for check in scripts/check_*.py; do
    python "$check" || failed=1
  done
  python bench/figures.py --check || failed=1
  pytest --quiet scripts/tests || failed=1
fi
exit "$failed"
