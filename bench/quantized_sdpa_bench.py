"""Compare quantized_scaled_dot_product_attention with what it replaces.

python quantized_sdpa_bench.py --shape 32,8,1,32768,128 --bits 4
"""

import argparse
import statistics
import time

import mlx.core as mx

N_warmup = 2
N_iter_bench = 10
N_iter_func = 4

# fmt: off
SHAPES = (
    # q_heads, kv_heads, q_len, kv_len, head_dim
    (32, 8,   1,  4096, 128),
    (32, 8,   1, 32768, 128),
    (32, 4,   1, 32768, 128),
    (32, 8,   8,  4096, 128),
    (32, 8, 512,  4096, 128),
)
# fmt: on


def parse_shape(text):
    shape = tuple(int(x) for x in text.split(","))
    if len(shape) != 5 or shape[0] % shape[1]:
        raise argparse.ArgumentTypeError("q_heads,kv_heads,q_len,kv_len,head_dim")
    return shape


def dense_sdpa(args):
    q, k, v = args["q"], args["k"], args["v"]
    return mx.fast.scaled_dot_product_attention(
        q, k, v, scale=args["scale"], mask=args["mask"]
    )


def dequantize_sdpa(args):
    k, v = (mx.dequantize(*args[x], **args["format"]) for x in ("qk", "qv"))
    return mx.fast.scaled_dot_product_attention(
        args["q"], k, v, scale=args["scale"], mask=args["mask"]
    )


def quantized_matmuls(args):
    q, qk, qv = args["q"], args["qk"], args["qv"]
    _, n_kv_heads, kv_len, _ = args["k"].shape
    B, n_q_heads, q_len, D = q.shape
    q = (q * args["scale"]).reshape(B, n_kv_heads, -1, q_len, D)
    qk, qv = ([x[:, :, None] for x in packed] for packed in (qk, qv))
    scores = mx.quantized_matmul(q, *qk, transpose=True, **args["format"])
    if args["mask"] == "causal":
        rows = mx.arange(kv_len - q_len, kv_len)[:, None]
        visible = rows >= mx.arange(kv_len)
        scores = mx.where(visible, scores, mx.finfo(scores.dtype).min)
    scores = mx.softmax(scores, axis=-1, precise=True)
    out = mx.quantized_matmul(scores, *qv, transpose=False, **args["format"])
    return out.reshape(B, n_q_heads, q_len, D)


def fused(args):
    packed = {side: args[f"q{side}"] for side in ("k", "v")}
    biases = {f"{s}_biases": x[2] for s, x in packed.items() if len(x) == 3}
    codes = (x for packed_side in packed.values() for x in packed_side[:2])
    return mx.fast.quantized_scaled_dot_product_attention(
        args["q"],
        *codes,
        **biases,
        scale=args["scale"],
        mask=args["mask"],
        **args["format"],
        force_fused=True,
    )


PATHS = {
    "fused": fused,
    "dense sdpa": dense_sdpa,
    "dequantize + sdpa": dequantize_sdpa,
    "quantized_matmul": quantized_matmuls,
}


def make_args(shape, dtype, quantization):
    n_q_heads, n_kv_heads, q_len, kv_len, D = shape
    mx.random.seed(0)
    q = mx.random.normal((1, n_q_heads, q_len, D)).astype(dtype)
    k, v = (mx.random.normal((1, n_kv_heads, kv_len, D)).astype(dtype) for _ in "kv")
    args = {"q": q, "k": k, "v": v, "scale": D**-0.5}
    args["qk"], args["qv"] = (mx.quantize(x, **quantization) for x in (k, v))
    args["mask"] = "causal" if q_len > 1 else None
    args["format"] = quantization
    mx.eval(q, k, v, *args["qk"], *args["qv"])
    return args


def bench(path, args):
    """Median milliseconds of one call; calls are evaluated together."""
    times = []
    for i in range(N_warmup + N_iter_bench):
        start = time.perf_counter_ns()
        mx.eval([path(args) for _ in range(N_iter_func)])
        if i >= N_warmup:
            times.append((time.perf_counter_ns() - start) * 1e-6 / N_iter_func)
    return statistics.median(times)


def bench_shape(shape, dtype, quantization, names):
    args = make_args(shape, dtype, quantization)
    expected = dequantize_sdpa(args).astype(mx.float32)
    size = mx.square(expected).mean()
    row = []
    for name in names:
        if name != "dense sdpa":
            found = PATHS[name](args).astype(mx.float32)
            error = (mx.square(found - expected).mean() / size).item()
            if not error < 0.05:
                raise SystemExit(f"{name} is wrong on {shape}: NMSE {error:.1e}")
        row.append(bench(PATHS[name], args))
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shape",
        action="append",
        type=parse_shape,
        metavar="HQ,HKV,TQ,TKV,D",
        help="may be repeated",
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--mode", default="affine")
    parser.add_argument("--bits", type=int)
    parser.add_argument("--group-size", type=int)
    parser.add_argument("--paths", nargs="+", default=list(PATHS), choices=list(PATHS))
    args = parser.parse_args()
    quantization = {"mode": args.mode, "bits": args.bits, "group_size": args.group_size}
    dtype = getattr(mx, args.dtype)

    print(f"{args.dtype}, {quantization}, ms a call")
    print(f"{'Hq, Hkv, Tq, Tkv, D':>24}", *(f"{name:>18}" for name in args.paths))
    for shape in args.shape or SHAPES:
        times = bench_shape(shape, dtype, quantization, args.paths)
        label = ", ".join(str(x) for x in shape)
        print(f"{label:>24}", *(f"{x:18.3f}" for x in times))


if __name__ == "__main__":
    main()
