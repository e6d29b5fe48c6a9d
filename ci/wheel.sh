#!/usr/bin/env bash
# Proves: the sources compile without a warning; the wheel alone gives a fresh
# environment the op, and leaves none of it behind when it goes.
set -euo pipefail
cd "$(dirname "$0")/.."

CMAKE_ARGS="-DCMAKE_COMPILE_WARNING_AS_ERROR=ON" make wheel
wheel=$(ls "$PWD"/dist/mlx_quantized_sdpa-*.whl)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet "$wheel"
venv/bin/python -W error - <<'PYTHON'
import mlx.core as mx

q = mx.random.normal((1, 8, 1, 64))
kv = mx.random.normal((1, 2, 100, 64))
packed = mx.quantize(kv, bits=8)
found = mx.fast.quantized_scaled_dot_product_attention(
    q, *packed, *packed, scale=0.125, bits=8
)
dense = mx.dequantize(*packed, bits=8)
wanted = mx.fast.scaled_dot_product_attention(q, dense, dense, scale=0.125)
assert mx.allclose(found, wanted, atol=1e-5), "the installed op is wrong"
PYTHON
venv/bin/pip uninstall --quiet --yes mlx-quantized-sdpa
venv/bin/python -W error -c '
import mlx.core as mx
assert not hasattr(mx.fast, "quantized_scaled_dot_product_attention")'
left=$(find venv/lib -iname '*quantized*sdpa*' -o -name 'mlx-stubs')
if [[ -n $left ]]; then
  echo "left behind by pip uninstall: $left" >&2
  exit 1
fi
echo "the wheel installs, works and uninstalls: $(basename "$wheel")"
