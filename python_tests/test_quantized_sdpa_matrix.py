"""The broad matrix: random cases over everything at once, plan thresholds, memory."""

import os
import subprocess
import sys
from itertools import product

import mlx.core as mx
import numpy as np
from quantized_sdpa_reference import (
    FORMATS,
    LAYOUTS,
    MXFP4,
    MXFP8,
    TURBO4,
    affine,
    make_case,
    random_mask,
    to_pages,
)
from test_fast_quantized_sdpa import (
    DTYPES,
    FORCE_FALLBACK,
    MLXTestRunner,
    QuantizedSDPATestCase,
    equal,
)

HEAD_DIMS = (32, 48, 64, 80, 96, 128, 192, 256, 512)


def pick(rng, values):
    return values[int(rng.integers(len(values)))]


def random_formats(rng):
    """Head dims of K and V, and a format that fits each."""
    D = pick(rng, HEAD_DIMS)
    D_v = D if rng.random() < 0.7 else pick(rng, HEAD_DIMS)
    k, v = (pick(rng, [f for f in FORMATS if f.fits(d)]) for d in (D, D_v))
    return {"D": D, "D_v": D_v, "k": k, "v": v if rng.random() < 0.5 or D_v != D else k}


def random_shape(rng):
    N_kv = pick(rng, (1, 2, 3))
    return {
        "B": pick(rng, (1, 1, 2, 3)),
        "N_q": N_kv * pick(rng, (1, 2, 3, 4, 7, 8, 16)),
        "N_kv": N_kv,
        "T_q": pick(rng, (1, 1, 1, 2, 3, 4, 8, 9, 17, 33, 65)),
        "T_kv": int(2 ** rng.uniform(0, 9.5)),
    }


def random_options(rng, shape, dtype):
    B, N, T_q, T_kv = (shape[n] for n in ("B", "N_q", "T_q", "T_kv"))
    options = {"causal": rng.random() < 0.5}
    if options["causal"] and rng.random() < 0.4:
        options["window_size"] = int(rng.integers(1, T_kv + 5))
    if rng.random() < 0.4:
        full = (B, N, T_q, T_kv)
        kept = [n if rng.random() < 0.6 else 1 for n in full][int(rng.integers(4)) :]
        kind = pick(rng, ("bool", "additive", "bias"))
        options["mask"] = random_mask(rng, kind, kept, dtype)
    if rng.random() < 0.3:
        sinks = rng.standard_normal(N).astype(np.float32)
        options["sinks"] = mx.array(sinks).astype(dtype)
    if rng.random() < 0.3:
        options["softcap"] = float(rng.uniform(0.5, 30))
    for name in ("lengths", "left_padding"):
        if rng.random() < 0.3:
            values = rng.integers(0, T_kv + 1, B).astype(np.int32)
            options[name] = mx.array(values)
    return options


def random_case(seed, rng=None, shape=None):
    """A valid call; rng makes the choices, seed the data."""
    rng = rng or np.random.default_rng(seed)
    shape, dtype = shape or random_shape(rng), pick(rng, DTYPES)
    paged = rng.random() < 0.2
    if paged:
        block = pick(rng, (1, 4, 16, 32))
        shape["T_kv"] = -(-shape["T_kv"] // block) * block
    layout = pick(rng, LAYOUTS)
    case = make_case(
        **shape,
        **random_formats(rng),
        **random_options(rng, shape, dtype),
        dtype=dtype,
        scale_dtype=pick(rng, DTYPES),
        layout=None if paged else layout,
        sharpness=pick(rng, (0.5, 2.0, 5.0)),
        seed=seed,
    )
    return to_pages(case, block, seed=seed).map_kv(layout) if paged else case


class TestRandomCases(QuantizedSDPATestCase):
    seeds = range(250)

    def test_random_cases(self):
        for seed in self.seeds:
            self.check_with_lse(random_case(seed), seed=seed)

    def test_random_batch_rows_alone(self):
        for seed in self.seeds[::8]:
            case = random_case(seed)
            with self.subTest(seed=seed):
                whole = self.run_op(case)
                for b in range(case.q.shape[0]):
                    alone = self.run_op(case.row(b))
                    self.assertTrue(equal(whole[b : b + 1], alone))


class TestRandomCasesFallback(TestRandomCases):
    fused = False
    seeds = range(1000, 1080)


class TestPlanThresholds(QuantizedSDPATestCase):
    """One either side of each number in plan_cpu; rows are heads of a group x T_q."""

    def test_rows(self):
        rows = (1, 3, 4, 5, 95, 96, 97, 127, 128, 129, 191, 192, 193, 289)
        for n, fmt, dtype in product(rows, (affine(4), TURBO4), DTYPES):
            for group, T_q in {(1, n), (n, 1)}:
                case = make_case(
                    N_q=group,
                    N_kv=1,
                    T_q=T_q,
                    T_kv=90,
                    k=fmt,
                    dtype=dtype,
                    causal=True,
                )
                self.check(case, group=group, T_q=T_q, format=fmt, dtype=dtype)

    def test_integer_rows(self):
        """Three and four rows read K's codes directly, more rows decode them first."""
        formats = (affine(8, 32), affine(8), affine(4, 128), affine(4), MXFP4)
        for fmt, n, D in product(formats, (3, 4, 5, 8), (32, 64, 128, 256, 288)):
            if D % fmt.group_size == 0:
                for T_kv in (1, 7, 64, 130):
                    sizes = dict(D=D, T_kv=T_kv)
                    case = make_case(N_q=n, N_kv=1, k=fmt, dtype=mx.bfloat16, **sizes)
                    self.check(case, rows=n, format=fmt, **sizes)

    def test_keys(self):
        keys = (511, 512, 513, 575, 577, 1024, 1025, 2049, 8191, 8192, 8193, 16449)
        for T_kv, T_q in product(keys, (1, 9)):
            case = make_case(N_q=2, N_kv=1, T_q=T_q, T_kv=T_kv, causal=True)
            self.check_with_lse(case, T_kv=T_kv, T_q=T_q)

    def test_split_ragged_keys(self):
        lengths = mx.array([2100, 513, 512, 1, 0])
        padding = mx.array([600, 512, 0, 0, 0])
        for T_q, fmt in product((1, 9), (affine(8), MXFP8)):
            case = make_case(
                B=5,
                T_q=T_q,
                T_kv=2100,
                k=fmt,
                causal=True,
                lengths=lengths,
                left_padding=padding,
            )
            self.check_with_lse(case, T_q=T_q, format=fmt)
            windowed = case.having(window_size=530)
            self.check_with_lse(windowed, T_q=T_q, format=fmt, window=530)

    def test_split_pages(self):
        for block, T_q in product((16, 48, 256), (1, 9)):
            lengths = mx.array([1500, 700])
            case = make_case(
                B=2, T_q=T_q, T_kv=1536, lengths=lengths, causal=True, layout=None
            )
            self.check_with_lse(to_pages(case, block), block=block, T_q=T_q)


# Prints by how many bytes the process grew over what a small call needs.
GROWTH = """
import resource, sys
import mlx.core as mx
from quantized_sdpa_reference import make_case, to_pages

T_q = {T_q}

def peak():
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts the parent's into ru_maxrss.
    with open("/proc/self/status") as status:
        (kilobytes,) = (x.split()[1] for x in status if x.startswith("VmHWM:"))
    return 1024 * int(kilobytes)

for T_kv in (64, 16384):
    case = make_case(N_q=8, N_kv=1, T_q=T_q, T_kv=T_kv, causal=True, layout=None)
    if {one_page}:
        case = to_pages(case, T_kv)
    mx.eval(case.args)
    before = peak()
    mx.eval(case.run(force_fused={fused}))
print(peak() - before)
"""


class TestMemory(QuantizedSDPATestCase):
    def test_no_score_matrix(self):
        runs = [(True, 1), (True, 512), (False, 128)]
        for (fused, T_q), one_page in product(runs, (False, True)):
            scores = 4 * 8 * T_q * 16384
            dense_cache = 4 * 2 * 64 * 16384
            script = GROWTH.format(T_q=T_q, fused=fused, one_page=one_page)
            env = {} if fused else {FORCE_FALLBACK: "1"}
            # A sanitizer keeps what is freed for a while.
            options = os.environ.get("ASAN_OPTIONS", "")
            env["ASAN_OPTIONS"] = f"{options}:quarantine_size_mb=1"
            growth = int(run_python("-c", script, **env))
            with self.subTest(fused=fused, T_q=T_q, one_page=one_page):
                self.assertLess(growth, max(scores, dense_cache) / 2)

    def test_partial_results_of_a_large_batch(self):
        """They take turns in memory, which changes no result."""
        B, T_kv, D_v = 48, 4096, 512
        kv = [mx.random.normal((1, 1, T_kv, D)) for D in (64, D_v)]
        cache = [x for operand in kv for x in mx.quantize(operand)]
        q = mx.random.normal((B, 32, 1, 64)).astype(mx.bfloat16)
        many = [mx.broadcast_to(x, (B, *x.shape[1:])) for x in cache]
        mx.eval(q, cache, many)

        def run(q, cache):
            out = mx.fast.quantized_scaled_dot_product_attention(
                q, *cache, scale=0.1, force_fused=True, stream=mx.cpu
            )
            mx.eval(out)
            return out

        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        out = run(q, many)
        growth = mx.get_peak_memory() - before - out.nbytes
        # Keys come in eight pieces of 512, whatever the threads.
        self.assertLess(growth, 0.75 * 8 * B * 32 * (D_v + 2) * 4)
        for row in range(B):
            alone = run(q[row : row + 1], cache)
            self.assertTrue(equal(out[row : row + 1], alone), row)


SOME_CASES = """
from quantized_sdpa_reference import check_lse, check_output
from test_quantized_sdpa_matrix import random_case

for seed in {seeds}:
    case = random_case(seed)
    out, lse = case.run(force_fused=True, return_lse=True)
    expected, expected_lse = case.reference()
    check_output(out, expected)
    check_lse(lse, expected_lse, case.q.dtype)
"""


def runs_here(target):
    try:
        run_python("-c", SOME_CASES.format(seeds=[0]), MLX_QUANTIZED_SDPA_TARGET=target)
    except AssertionError as error:
        if "must name an instruction set of this machine" in str(error):
            return False
        raise
    return True


class TestEnvironment(QuantizedSDPATestCase):
    """What is read once in a process: the instruction set and the threads."""

    def test_every_instruction_set(self):
        targets = ("portable", "avx2", "avx512", "neon")
        targets = [target for target in targets if runs_here(target)]
        self.assertTrue(targets)
        for target in targets:
            env = {"MLX_QUANTIZED_SDPA_TARGET": target}
            with self.subTest(target=target):
                run_python("-m", "unittest", "test_kv_codec.TestKVCodec", **env)
                run_python("-c", SOME_CASES.format(seeds=range(2000, 2040)), **env)

    def test_numbers_of_threads(self):
        for threads in ("1", "2", "7"):
            env = {"MLX_QUANTIZED_SDPA_THREADS": threads}
            with self.subTest(threads=threads):
                run_python("-c", SOME_CASES.format(seeds=range(2040, 2060)), **env)


def run_python(*args, **env):
    """Output of Python with these arguments; raises where it fails."""
    here = os.path.dirname(os.path.abspath(__file__))
    path = os.pathsep.join([here, *sys.path])
    result = subprocess.run(
        [sys.executable, *args],
        env={**os.environ, **env, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if result.returncode != 0:
        raise AssertionError(result.stderr[-4000:])
    return result.stdout


if __name__ == "__main__":
    MLXTestRunner()
