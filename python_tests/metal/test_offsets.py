"""Caches of more than 2 ** 31 elements: no offset passes through 32 bits.

A kernel of the test reads one key whose strides add up to far more; the arrays are
moved back by as much, so that only the right offset lands in them.
"""

import os
import subprocess
import sys
from pathlib import Path

import counting
import kernel_text
import numpy as np
import pytest

from rig import executor, library

KERNEL = """
kernel void read_far_key(
    const device uint32_t* codes [[buffer(0)]],
    const device half* scales [[buffer(1)]],
    const device half* biases [[buffer(2)]],
    const constant mlx::core::quantized_sdpa::MetalParams& params [[buffer(3)]],
    const constant int64_t& far [[buffer(4)]],
    device float* out [[buffer(5)]],
    uint lane [[thread_index_in_simdgroup]]) {
  using namespace mlx::core::quantized_sdpa;
  using Operand = KVOperand<mlx::core::kv::Affine<4, 64>, half, half, 64>;
  uint3 group = uint3(0, 3, 0);
  KVHead<Operand> x = make_kv_head<Operand>(
      codes - far, scales - far, biases - far, nullptr, nullptr, group, params.k);
  x.batch = 5;
  KeyPlace place = find_key(x, 7, params);
  CodeSegment<Operand, 64> segment;
  load_codes(segment, x, place, 0, params.k);
  if (lane == 0) {
    for (int i = 0; i < 64; ++i) {
      out[i] = code_value(segment, i, x) * load_scale(x, place, 0, params.k) +
          load_bias(x, place, 0, params.k);
    }
  }
}
"""


# What passes through 32 bits, planted.
NARROW = {
    "codes": (
        "x.codes + place.block * params.codes[0] + place.row * params.codes[2];",
        "x.codes + int(place.block * params.codes[0] + place.row * params.codes[2]);",
    ),
    "head": (
        "x.scales = scales + group.y * params.scales[1];",
        "x.scales = scales + int(group.y * params.scales[1]);",
    ),
    "biases": ("return float(x.biases[at]);", "return float(x.biases[int(at)]);"),
}


def read_far_key(planted=None):
    """Values of the key that the kernel reads, and those that it must find."""
    kernels = kernel_text.kernels()
    if planted:
        assert kernels.count(NARROW[planted][0]) == 1
        kernels = kernels.replace(*NARROW[planted])
    text = library.Text(kernels + KERNEL, ())
    compiled = executor.Library(library.compile_library(text, "plain"))
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 1 << 32, 8, np.uint32)
    steps = (1 << 33, 1 << 32, (1 << 31) + 8, 1)
    far = 5 * steps[0] + 3 * steps[1] + 7 * steps[2]
    # Of codes, scales and biases of K; of each, of V and of the rest, nothing more.
    params = np.zeros(2 * 13 + 4 + 4 + 5 + 5, np.int64)
    params[:12] = 3 * steps
    out = np.zeros(64, np.float32)
    compiled.launch(
        "read_far_key",
        {
            0: codes,
            1: np.float16([0.5]),
            2: np.float16([-2]),
            3: params,
            4: np.int64([far]),
            5: out,
        },
        groups=(1, 1, 1),
        threads=(32, 1, 1),
        constants=dict.fromkeys(counting.FEATURES, False),
    )
    values = codes[:, None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
    return out, values.reshape(-1) * 0.5 - 2


def test_offsets_have_64_bits():
    np.testing.assert_array_equal(*read_far_key())


@pytest.mark.parametrize("planted", NARROW)
def test_offsets_of_32_bits_are_noticed(planted):
    """In a process of its own, as the wrong address may be nobody's."""
    code = f"import conftest, test_offsets as t; a, b = t.read_far_key({planted!r})"
    run = subprocess.run(
        [sys.executable, "-c", code + "; print('RIGHT' if all(a == b) else 'WRONG')"],
        cwd=Path(__file__).parent,
        env=os.environ,
        capture_output=True,
        text=True,
    )
    # What fails otherwise, such as a text that does not compile, ends with 1.
    assert run.returncode < 0 or "WRONG" in run.stdout, run.stdout + run.stderr
