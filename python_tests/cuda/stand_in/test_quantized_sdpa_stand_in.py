"""The CUDA wheel in MLX's own CUDA library, on the stand-in for a driver.

What of the host is right or wrong shows here: the graph's edges, what lives until the
stream has used it, streams, what NVRTC makes of the text. Kernels run on the emulated
GPU, so that shapes are small.
"""

import os
import subprocess
import sys
import threading
import time

import mlx.core as mx
import numpy as np
import pytest
from stand_in_plugin import op

DIM = 64
N_Q, N_KV = 8, 2


def inputs(kv_len, q_len=1, batch=1):
    """q and its keyword arguments, evaluated, in 4 bits."""
    q = mx.random.normal((batch, N_Q, q_len, DIM)).astype(mx.bfloat16)
    kv = mx.random.normal((2, batch, N_KV, kv_len, DIM)).astype(mx.bfloat16)
    operands = (*mx.quantize(kv[0], bits=4), *mx.quantize(kv[1], bits=4))
    mx.eval(q, operands)
    return q, operands


def attend(q, operands, stream=mx.gpu):
    fused = {"force_fused": True} if stream != mx.cpu else {}
    return op(q, *operands, scale=DIM**-0.5, bits=4, stream=stream, **fused)


def check(out, expected):
    out, expected = (np.array(x.astype(mx.float32)) for x in (out, expected))
    np.testing.assert_allclose(out, expected, atol=2e-2)


@pytest.mark.parametrize("q_len", (1, 3, 40))
@pytest.mark.parametrize("kv_len", (5, 700))
def test_one_call(q_len, kv_len):
    given = inputs(kv_len, q_len)
    check(attend(*given), attend(*given, mx.cpu))


@pytest.mark.parametrize("q_len", (1, 40))
def test_calls_of_one_evaluation(q_len):
    """Of some each result is the next one's query."""
    given = [inputs(kv_len, q_len) for kv_len in (300, 700)]
    alone = [attend(*each) for _ in range(4) for each in given]
    chained = expected = given[0][0]
    for _ in range(6):
        chained = attend(chained, given[1][1])
        expected = attend(expected, given[1][1], mx.cpu)
    mx.eval(alone, chained)
    check(chained, expected)
    for i, out in enumerate(alone):
        check(out, attend(*given[i % 2], mx.cpu))


def test_more_calls_than_a_graph_takes():
    given = inputs(20)
    outs = [attend(*given) for _ in range(150)]
    mx.eval(outs)
    for out in outs:
        assert mx.array_equal(out, outs[0])
    check(outs[0], attend(*given, mx.cpu))


@pytest.fixture
def no_cache():
    """Memory that MLX has no use for is given back at once."""
    limit = mx.set_cache_limit(0)
    yield
    mx.set_cache_limit(limit)


@pytest.mark.parametrize("q_len", (3, 40))
def test_memory_lives_until_it_was_used(q_len, no_cache):
    q, operands = inputs(600, q_len)
    expected = attend(q, operands, mx.cpu)
    outs = []
    for _ in range(6):
        # Copies, which nobody else holds.
        copies = [mx.contiguous(x + 0) for x in operands]
        mx.eval(copies)
        outs.append(attend(q, copies))
        mx.async_eval(outs[-1])
        del copies
    for out in outs:
        check(out, expected)


def test_streams():
    given = inputs(600, 3)
    streams = [mx.gpu, mx.new_stream(mx.gpu), mx.new_stream(mx.gpu)]
    outs = [attend(*given, streams[i % 3]) for i in range(9)]
    mx.eval(outs)
    for out in outs:
        check(out, attend(*given, mx.cpu))


def test_threads():
    given = inputs(300)
    expected = attend(*given, mx.cpu)
    mx.eval(expected)
    faults = []

    def work():
        stream = mx.new_stream(mx.gpu)
        for _ in range(4):
            out = attend(*given, stream)
            mx.eval(out)
            try:
                check(out, expected)
            except AssertionError as fault:
                faults.append(fault)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def test_threads_that_end_leave_no_memory():
    given = inputs(600)
    expected = attend(*given, mx.cpu)
    mx.eval(expected)
    outs = []

    def run_thread():
        def work():
            outs.append(attend(*given, mx.new_stream(mx.gpu)))
            mx.eval(outs[-1])

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    run_thread()
    most = mx.get_active_memory() + (1 << 20)
    for _ in range(8):
        run_thread()
    for out in outs:
        check(out, expected)
    # What a call needs is given back soon after it.
    deadline = time.monotonic() + 60
    while mx.get_active_memory() > most and time.monotonic() < deadline:
        time.sleep(0.1)
    assert mx.get_active_memory() <= most


def test_compiled_and_mapped():
    q, operands = inputs(200, batch=2)
    expected = attend(q, operands, mx.cpu)
    check(mx.compile(lambda q: attend(q, operands))(q), expected)


def test_outputs_that_are_not_used():
    q, operands = inputs(200)
    out, lse = op(q, *operands, scale=DIM**-0.5, bits=4, return_lse=True, stream=mx.gpu)
    del lse
    check(out, attend(q, operands, mx.cpu))


def test_code_is_kept_and_found_again(tmp_path):
    """The second process takes what the first compiled, unless it was damaged."""
    script = """
import stand_in_plugin
import test_quantized_sdpa_stand_in as tests
given = tests.inputs(33)
tests.check(tests.attend(*given), tests.attend(*given, tests.mx.cpu))
"""
    folder = tmp_path / "new"
    environment = {**os.environ, "MLX_QUANTIZED_SDPA_CACHE": str(folder)}

    def run():
        subprocess.run([sys.executable, "-c", script], env=environment, check=True)
        (file,) = folder.iterdir()
        return file, file.stat().st_mtime_ns

    file, written = run()
    assert file.suffix == ".cubin"
    assert run() == (file, written)
    code = file.read_bytes()
    for damaged in (b"", code[:20], code[:-1], code[:-1] + bytes([code[-1] ^ 1])):
        file.write_bytes(damaged)
        run()
        assert file.read_bytes() == code
