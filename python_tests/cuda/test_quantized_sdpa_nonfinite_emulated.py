"""NaN and infinity in the CUDA kernels, on an emulated GPU."""

import mlx.core as mx
import test_quantized_sdpa_nonfinite as nonfinite
from quantized_sdpa_reference import MXFP8, affine


class TestNotFiniteEmulated(nonfinite.TestNotFinite):
    windows = (20,)
    # Decode in one and in two parts of float16, and prefill.
    shapes = (
        {"T_q": 1, "k": affine(4), "dtype": mx.float32},
        {"T_q": 3, "k": MXFP8, "dtype": mx.bfloat16},
        {"T_q": 40, "k": affine(4), "dtype": mx.bfloat16},
    )
