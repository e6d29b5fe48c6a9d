#!/usr/bin/env bash
# Proves (`make check` without the lint): every new file belongs to one well-formed patch and, where MLX's source is
# within reach, that the series applies to the pinned commit and refreshes unchanged.
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ -z ${MLX_SRC:-} && ! -e mlx/.git ]]; then
  GIT_TERMINAL_PROMPT=0 timeout 60 git submodule --quiet update --init mlx || true
fi
if [[ -n ${MLX_SRC:-} || -e mlx/.git ]]; then
  PYTHONPATH=scripts python3 -m series check
else
  PYTHONPATH=scripts python3 -m series check-files
  echo "MLX's source is out of reach: the series was not applied" >&2
fi
