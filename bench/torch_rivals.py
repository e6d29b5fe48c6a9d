"""PyTorch's and FlashInfer's attention on a CUDA device, where they are installed."""

import contextlib
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec

# More than the last-level cache of any GPU.
COLD_BYTES = 600e6
# Tokens a block of a paged cache.
PAGE = 64
WORKSPACE_BYTES = 512 << 20


@dataclass
class Ready:
    """``call(*cache)`` for each of the caches, within ``around()``."""

    call: object
    caches: list
    around: object = contextlib.nullcontext

    @property
    def kv_bytes(self):
        return sum(x.numel() * x.element_size() for x in self.caches[0])


def rivals(shape):
    """(rival, format, a function that makes it ready) of those installed."""
    if find_spec("torch") is None:
        return
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
        yield f"torch_{name.lower()}", "dense", lambda n=name: sdpa_ready(n, shape)
    if find_spec("flashinfer") is None or shape.q_len > 1 or shape.kv_len % PAGE:
        return
    for storage in ("bfloat16", "float8_e4m3fn"):
        for tensor_cores in (True, False):
            rival = "flashinfer" + "_tensor_cores" * tensor_cores
            yield rival, storage, lambda storage=storage, tensor_cores=tensor_cores: (
                flashinfer_ready(storage, tensor_cores, shape)
            )


def cuda_torch():
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("PyTorch finds no CUDA device")
    return torch


def release():
    """Gives the memory of what is no longer held back to the device."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def loop(ready):
    """``run(n)`` that makes n calls over the caches in turn."""

    def run(n):
        with ready.around():
            for i in range(n):
                ready.call(*ready.caches[i % len(ready.caches)])

    return run


def graph_sampler(torch, ready):
    """Seconds of n calls that were captured in one CUDA graph, as MLX's are: calls
    from Python would take longer than short kernels."""
    run, graphs = loop(ready), {}

    def captured(n):
        if n not in graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run(n)
            graph.replay()
            graphs[n] = graph
        return graphs[n].replay

    run(3)
    torch.cuda.synchronize()
    return lambda n: synchronized_seconds(torch, captured(n))


def loop_sampler(torch, ready):
    run = loop(ready)
    return lambda n: synchronized_seconds(torch, lambda: run(n))


def synchronized_seconds(torch, run):
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def random_caches(torch, size, n_arrays, dtype):
    """Enough copies that none is still in the last-level cache."""

    def array():
        x = torch.randn(size, device="cuda", dtype=torch.bfloat16)
        return x.to(dtype)

    first = [array() for _ in range(n_arrays)]
    each = sum(x.numel() * x.element_size() for x in first)
    copies = int(COLD_BYTES / each)
    return [first] + [[array() for _ in range(n_arrays)] for _ in range(copies)]


def sdpa_ready(backend, shape):
    torch = cuda_torch()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    size = (shape.batch, shape.kv_heads, shape.kv_len, shape.head_dim)
    caches = random_caches(torch, size, 2, torch.bfloat16)
    q_size = (shape.batch, shape.q_heads, shape.q_len, shape.head_dim)
    q = torch.randn(q_size, device="cuda", dtype=torch.bfloat16)
    attend = torch.nn.functional.scaled_dot_product_attention
    chosen = getattr(SDPBackend, backend)
    return Ready(
        lambda k, v: attend(q, k, v, enable_gqa=True),
        caches,
        lambda: sdpa_kernel(chosen),
    )


def flashinfer_ready(storage, tensor_cores, shape):
    """Decode over whole pages."""
    torch = cuda_torch()
    import flashinfer

    dtype = getattr(torch, storage)
    pages = shape.kv_len // PAGE
    n = shape.batch * pages
    on = {"dtype": torch.int32, "device": "cuda"}
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "HND", use_tensor_cores=tensor_cores
    )
    wrapper.plan(
        torch.arange(0, n + 1, pages, **on),
        torch.arange(n, **on),
        torch.full((shape.batch,), PAGE, **on),
        shape.q_heads,
        shape.kv_heads,
        shape.head_dim,
        PAGE,
        q_data_type=torch.bfloat16,
        kv_data_type=dtype,
    )
    q_size = (shape.batch, shape.q_heads, shape.head_dim)
    q = torch.randn(q_size, device="cuda", dtype=torch.bfloat16)
    size = (n, 2, shape.kv_heads, PAGE, shape.head_dim)
    caches = random_caches(torch, size, 1, dtype)
    return Ready(lambda kv: wrapper.run(q, kv), caches)
