"""Ask the plan which calls run fused: bench/results/fused.json.

Needs the installed package; the plan knows every backend, whatever is at hand here.
"""

import json
from pathlib import Path

from mlx_quantized_sdpa import _ext

RESULTS = Path(__file__).resolve().parent / "results"
# What the backend must be told about the device.
BACKENDS = {
    "CPU": ("cpu", {}),
    "CUDA 8.0": ("cuda", dict(compute_capability=80, shared_bytes=166912)),
    "CUDA 9.0": ("cuda", dict(compute_capability=90, shared_bytes=232448)),
    "Metal": ("metal", {}),
}
AFFINE = [("affine", bits, 32) for bits in (1, 2, 3, 4, 5, 6, 8)]
# None: one scale a row.
TURBO = [("turbo", bits, None) for bits in (2, 3, 4)]
FORMATS = [*AFFINE, ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16), *TURBO]
LARGEST = 1088


def is_fused(backend, k_dim, v_dim, mode, bits, group_size):
    name, device = BACKENDS[backend]
    problem = _ext._problem(
        k_dim=k_dim,
        v_dim=v_dim,
        k_format=(mode, bits, group_size or k_dim),
        v_format=(mode, bits, group_size or v_dim),
    )
    return not _ext._unsupported_reason(problem, name, **device)


def fused_dims(backend, mode, bits, group_size):
    """Head dims, K's and V's alike, in ranges of even steps."""
    step = group_size or 8
    dims = range(step, LARGEST, step)
    # Rows of codes are whole words.
    stored = [d for d in dims if d * bits % 32 == 0]
    fused = [d for d in stored if is_fused(backend, d, d, mode, bits, group_size)]
    steps = {b - a for a, b in zip(fused, fused[1:])}
    if len(steps) > 1:
        raise SystemExit(f"{backend}, {mode}: no even steps between {fused}")
    return {"first": fused[0], "last": fused[-1], "step": steps.pop()}


def fused_rows():
    return [
        {
            "backend": backend,
            "format": mode if mode[-1].isdigit() else f"{mode}{bits}",
            "dims": fused_dims(backend, mode, bits, group_size),
            "mla": is_fused(backend, 576, 512, mode, bits, group_size),
        }
        for backend in BACKENDS
        for mode, bits, group_size in FORMATS
    ]


def main():
    path = RESULTS / "fused.json"
    lines = ",\n".join(map(json.dumps, fused_rows()))
    path.write_text(f"[\n{lines}\n]\n")
    print(path)


if __name__ == "__main__":
    main()
