"""Rivals by name. A module is imported only when one of its rivals is asked for."""

from importlib import import_module

MODULES = {
    "read_bandwidth": "probes",
    "fma_peak": "probes",
    "fused": "mlx_fused",
    "mlx_add": "mlx_stock",
    "mlx_sdpa": "mlx_stock",
    "mlx_lm_quantized": "mlx_stock",
    "mlx_quantized_matmul": "mlx_stock",
    "mlx_dequantize_sdpa": "mlx_stock",
    "torch_sdpa": "torch_sdpa",
    "onnxruntime_gqa": "ort_gqa",
    "llama_cpp": "llama_cpp",
}
STOCK = tuple(
    name
    for name, module in MODULES.items()
    if module == "mlx_stock" and name != "mlx_add"
)


def prepare(entry, inputs, threads, cold):
    """Ready an entry for timing; ``Absent`` where its library is missing."""
    module = import_module(f"rivals.{MODULES[entry.rival]}")
    return module.RIVALS[entry.rival](entry, inputs, threads, cold)
