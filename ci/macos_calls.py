"""Proves, on a Mac: the kernels compile when first asked for, and are right.

python macos_calls.py 1 70: calls of each format with so many queries, compared with
the CPU's results. More than 8 need a GPU with simdgroup matrices.
"""

import itertools
import sys

import mlx.core as mx
from mlx_quantized_sdpa import turbo_quantize

FORMATS = [("affine", bits) for bits in (1, 2, 3, 4, 5, 6, 8)]
FORMATS += [("mxfp4", 4), ("mxfp8", 8), ("nvfp4", 4)]
FORMATS += [(f"turbo{bits}", bits) for bits in (2, 3, 4)]


def quantize(x, mode, bits):
    if mode.startswith("turbo"):
        return [*turbo_quantize(x, bits=bits), None]
    packed = list(mx.quantize(x, bits=bits, mode=mode, stream=mx.cpu))
    return packed + [None] * (3 - len(packed))


def main(q_lengths: list[int]) -> int:
    failures = 0
    print(mx.device_info(mx.gpu))
    for (mode, bits), q_len, dim in itertools.product(FORMATS, q_lengths, (64, 128)):
        q = mx.random.normal((1, 8, q_len, dim)).astype(mx.float16)
        k, v = (mx.random.normal((1, 2, 333, dim)) for _ in "kv")
        packed = [*quantize(k, mode, bits), *quantize(v, mode, bits)]
        mx.eval(q, packed)
        options = dict(scale=dim**-0.5, mode=mode, bits=bits, causal=True)
        cpu, gpu = (
            mx.fast.quantized_scaled_dot_product_attention(
                q, *packed, **options, force_fused=True, stream=device
            )
            for device in (mx.cpu, mx.gpu)
        )
        error = mx.abs(cpu - gpu).max().item()
        failures += not error < 5e-3
        print(f"{mode} {bits} bit, {q_len} queries of {dim}: differs by {error:.1e}")
    return failures


if __name__ == "__main__":
    sys.exit(main([int(word) for word in sys.argv[1:]]))
