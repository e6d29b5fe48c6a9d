"""Calls from many threads, other processes and at the interpreter's end.

After a fork MLX itself cannot evaluate in the child, so that is not tested.
"""

import multiprocessing
import os
import threading

import mlx.core as mx
from quantized_sdpa_reference import MXFP4, TURBO3, affine, make_case
from test_fast_quantized_sdpa import MLXTestRunner, QuantizedSDPATestCase, equal
from test_quantized_sdpa_matrix import run_python

THREADS = 8
# Of each thread; more by the environment.
CALLS = int(os.environ.get("QUANTIZED_SDPA_CALLS", "40"))

LEAVE_WORK = """
import mlx.core as mx
from quantized_sdpa_reference import make_case

case = make_case(N_q=8, T_q=64, T_kv=3000, D=128)
mx.eval(case.args)
mx.async_eval([case.run(force_fused=True) for _ in range(8)])
"""


def some_cases():
    """Cases of each CPU kernel, with and without a split of the keys."""
    shapes = (
        {"T_q": 1, "T_kv": 2000},
        {"T_q": 1, "T_kv": 2000, "dtype": mx.float16, "k": affine(8), "N_q": 8},
        {"T_q": 40, "T_kv": 90, "k": TURBO3},
        {"T_q": 9, "T_kv": 600, "dtype": mx.bfloat16, "k": MXFP4},
    )
    cases = [make_case(seed=i, **shape) for i, shape in enumerate(shapes)]
    mx.eval([[x for x in case.args if x is not None] for case in cases])
    return cases


def largest_of_a_call():
    out = some_cases()[0].run(force_fused=True)
    return out.abs().max().item()


class TestThreads(QuantizedSDPATestCase):
    def test_threads_with_streams_of_their_own(self):
        cases = some_cases()
        wanted = [self.run_op(case) for case in cases]
        mx.eval(wanted)
        device = mx.default_device()
        wrong = []

        def work(first):
            stream = mx.new_stream(device)
            for i in range(CALLS):
                at = (first + i) % len(cases)
                out = cases[at].run(force_fused=True, stream=stream)
                with mx.stream(stream):
                    if not equal(out, wanted[at]):
                        wrong.append((first, i))

        threads = [threading.Thread(target=work, args=(n,)) for n in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(wrong, [])

    def test_a_spawned_process(self):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            self.assertEqual(pool.apply(largest_of_a_call), largest_of_a_call())

    def test_the_interpreter_ends_with_work_in_flight(self):
        for _ in range(3):
            self.assertEqual(run_python("-c", LEAVE_WORK), "")


if __name__ == "__main__":
    MLXTestRunner()
