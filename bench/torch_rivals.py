"""PyTorch's and FlashInfer's attention on a CUDA device, where they are installed."""

import statistics
import time

# More than the last-level cache of any GPU.
COLD_BYTES = 600e6
# Tokens a block of a paged cache.
PAGE = 64
WORKSPACE_BYTES = 512 << 20


def synchronized_seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def lines(shape, n, rounds):
    """(rival, format, microseconds, bytes of the cache) of each that runs here."""
    try:
        import torch
    except ImportError:
        return
    if not torch.cuda.is_available():
        return
    for ready in (sdpa_calls, flashinfer_calls):
        for rival, fmt, call, caches in ready(torch, shape):
            try:
                us = median_us(torch, call, caches, n, rounds)
            except (RuntimeError, ValueError) as error:
                print(f"  {rival} {fmt}: {str(error).splitlines()[0]}")
                continue
            size = sum(x.numel() * x.element_size() for x in caches[0])
            yield rival, fmt, us, size


def median_us(torch, call, caches, n, rounds):
    def run():
        for i in range(n):
            call(*caches[i % len(caches)])
        torch.cuda.synchronize()

    run()
    times = [synchronized_seconds(run) for _ in range(rounds)]
    return statistics.median(times) / n * 1e6


def random_caches(torch, size, n_arrays, dtype):
    """Enough copies that none is still in the last-level cache."""

    def array():
        x = torch.randn(size, device="cuda", dtype=torch.bfloat16)
        return x.to(dtype)

    first = [array() for _ in range(n_arrays)]
    each = sum(x.numel() * x.element_size() for x in first)
    copies = int(COLD_BYTES / each)
    return [first] + [[array() for _ in range(n_arrays)] for _ in range(copies)]


def sdpa_calls(torch, shape):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    size = (shape.batch, shape.kv_heads, shape.kv_len, shape.head_dim)
    caches = random_caches(torch, size, 2, torch.bfloat16)
    q_size = (shape.batch, shape.q_heads, shape.q_len, shape.head_dim)
    q = torch.randn(q_size, device="cuda", dtype=torch.bfloat16)
    attend = torch.nn.functional.scaled_dot_product_attention

    def call(k, v):
        attend(q, k, v, enable_gqa=True)

    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
        # Timed within: choosing a backend takes longer than a short call.
        with sdpa_kernel(getattr(SDPBackend, name)):
            yield f"torch_{name.lower()}", "dense", call, caches


def flashinfer_calls(torch, shape):
    """Decode over whole pages of a bfloat16 and an fp8 cache."""
    try:
        import flashinfer
    except ImportError:
        return
    if shape.q_len > 1 or shape.kv_len % PAGE:
        return
    pages = shape.kv_len // PAGE
    n = shape.batch * pages
    on = {"dtype": torch.int32, "device": "cuda"}
    places = (
        torch.arange(0, n + 1, pages, **on),
        torch.arange(n, **on),
        torch.full((shape.batch,), PAGE, **on),
    )
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    q_size = (shape.batch, shape.q_heads, shape.head_dim)
    q = torch.randn(q_size, device="cuda", dtype=torch.bfloat16)
    size = (n, 2, shape.kv_heads, PAGE, shape.head_dim)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        caches = random_caches(torch, size, 1, dtype)
        for tensor_cores in (True, False):
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                workspace, "HND", use_tensor_cores=tensor_cores
            )
            wrapper.plan(
                *places,
                shape.q_heads,
                shape.kv_heads,
                shape.head_dim,
                PAGE,
                q_data_type=torch.bfloat16,
                kv_data_type=dtype,
            )

            def call(kv, wrapper=wrapper):
                wrapper.run(q, kv)

            rival = "flashinfer" + ("_tensor_cores" if tensor_cores else "")
            yield rival, str(dtype).removeprefix("torch."), call, caches
