"""Bad input: shapes and dtypes raise at once, values are clamped or checked."""

import os
import re
from itertools import product

import mlx.core as mx
import numpy as np
from quantized_sdpa_reference import check_lse, check_output, make_case, to_pages
from test_fast_quantized_sdpa import (
    FORCE_FALLBACK,
    MLXTestRunner,
    QuantizedSDPATestCase,
)

CHECK = "MLX_QUANTIZED_SDPA_CHECK"
PREFIX = "[quantized_scaled_dot_product_attention] "
B, N_Q, N_KV, T_Q, T_KV, D = 2, 4, 2, 3, 16, 64
ROWS = (B, N_KV, T_KV)
NO_FLOAT = "must be float16, bfloat16 or float32; got dtype"


def zeros(*shape, dtype=mx.float32):
    return mx.zeros(shape, dtype)


def codes(*shape):
    return zeros(*shape, dtype=mx.uint32)


def ints(*values):
    return mx.array(values, mx.int32)


def valid_call():
    """Affine in 4 bits and groups of 64."""
    return {
        "q": zeros(B, N_Q, T_Q, D),
        **{x: codes(*ROWS, D // 8) for x in "kv"},
        **{f"{x}_scales": zeros(*ROWS, 1) for x in "kv"},
        **{f"{x}_biases": zeros(*ROWS, 1) for x in "kv"},
        "scale": 1.0,
    }


def format_changes(x, mode, bits, group_size, dtype):
    """Changes that give operand x another valid format."""
    return {
        x: codes(*ROWS, D * bits // 32),
        f"{x}_scales": zeros(*ROWS, D // group_size, dtype=dtype),
        f"{x}_biases": None,
        f"{x}_mode": mode,
    }


def bad_queries():
    return [
        ({"q": zeros(N_Q, T_Q, D)}, "q must have rank 4; got rank 3, shape [4, 3, 64]"),
        ({"q": zeros(1, B, N_Q, T_Q, D)}, "q must have rank 4; got rank 5.*"),
        (
            {"q": zeros(B, N_Q, T_Q, D, dtype=mx.int32)},
            "q must be float16, bfloat16 or float32; got dtype int32",
        ),
        ({"q": zeros(B, N_Q, T_Q, 0)}, "q must have a head dim above 0; got shape.*"),
        (
            {"q": zeros(B, 3, T_Q, D)},
            "the heads of q must be a multiple of the heads of k; got 3 and 2",
        ),
        (
            {"q": zeros(1, N_Q, T_Q, D)},
            "k must have the batch size of q, 1; got 2",
        ),
        (
            {"q": zeros(B, N_Q, T_Q, 2 * D)},
            "k must hold the head dim 128 of q in 4 bits a value, "
            "a last axis of D * bits / 32; got 8 words",
        ),
    ]


def turbo2(x):
    return format_changes(x, "turbo2", 2, D, mx.float32)


def mxfp8(x):
    return format_changes(x, "mxfp8", 8, 32, mx.uint8)


def nvfp4(x):
    return format_changes(x, "nvfp4", 4, 16, mx.uint8)


def bad_codes(x):
    """For x = "k" or "v"; so the next ones."""
    return [
        (
            {x: codes(*ROWS[1:], 8)},
            f"{x} must have rank 4; got rank 3, shape [2, 16, 8]",
        ),
        ({x: zeros(*ROWS, D)}, f"{x} must be uint32 codes; got dtype float32"),
        (
            {x: zeros(*ROWS, 8, dtype=mx.int32)},
            f"{x} must be uint32 codes; got dtype int32",
        ),
    ]


def bad_scales(x):
    name = f"{x}_scales"
    shape = f"{name} must have shape [B, N_kv, T_kv, D / group_size] ="
    one = zeros(*ROWS, 1)
    return [
        ({name: zeros(*ROWS)}, f"{shape} [2, 2, 16, 1]; got shape [2, 2, 16]"),
        ({name: zeros(*ROWS, 2)}, f"{shape} [2, 2, 16, 1]; got shape [2, 2, 16, 2]"),
        ({name: one[:1]}, f"{shape} [2, 2, 16, 1]; got shape [1, 2, 16, 1]"),
        ({name: one[:, :, 1:]}, f"{shape} [2, 2, 16, 1]; got shape [2, 2, 15, 1]"),
        ({name: one.astype(mx.uint8)}, f"{name} {NO_FLOAT} uint8"),
        ({name: one.astype(mx.int32)}, f"{name} {NO_FLOAT} int32"),
        (
            {**mxfp8(x), name: zeros(*ROWS, 2)},
            f"{name} must be uint8 for mxfp8.*; got dtype float32",
        ),
        (
            {**nvfp4(x), name: zeros(*ROWS, 2, dtype=mx.uint8)},
            f"{shape} [2, 2, 16, 4]; got shape [2, 2, 16, 2]",
        ),
        ({**turbo2(x), name: one.astype(mx.uint8)}, f"{name} {NO_FLOAT} uint8"),
        (
            {**turbo2(x), name: zeros(B, N_KV, 1)},
            f"{name} must have shape .*; got shape [2, 2, 1]",
        ),
    ]


def bad_biases(x):
    name = f"{x}_biases"
    missing = f"{name} must be given for mode affine; got None"
    return [
        ({name: None, f"{x}_mode": "affine"}, missing),
        ({name: None, "mode": "affine"}, missing),
        ({name: zeros(*ROWS, 1, dtype=mx.uint8)}, f"{name} {NO_FLOAT} uint8"),
        (
            {name: zeros(*ROWS, 2)},
            f"{name} must have shape of the scales = [2, 2, 16, 1]; "
            "got shape [2, 2, 16, 2]",
        ),
        (
            {**nvfp4(x), name: zeros(*ROWS, 4)},
            f"{name} must be None for mode nvfp4; "
            "got an array of shape [2, 2, 16, 4]",
        ),
        (
            {**turbo2(x), name: zeros(*ROWS, 1)},
            f"{name} must be None for mode turbo2; "
            "got an array of shape [2, 2, 16, 1]",
        ),
    ]


def bad_formats(x):
    mode, bits, group = f"{x}_mode", f"{x}_bits", f"{x}_group_size"
    modes = "affine, mxfp4, mxfp8, nvfp4, turbo2, turbo3, turbo4"
    affine_bits = f"{bits} must be 1, 2, 3, 4, 5, 6 or 8 for mode affine; got"
    return [
        ({mode: "q4_0"}, f"{mode} must be one of {modes}; got 'q4_0'"),
        ({mode: ""}, f"{mode} must be one of {modes}; got ''"),
        ({bits: 7}, f"{affine_bits} 7"),
        ({bits: 0}, f"{affine_bits} 0"),
        ({bits: -4}, f"{affine_bits} -4"),
        ({group: 16}, f"{group} must be 32, 64 or 128 for mode affine; got 16"),
        (
            {group: 128},
            f"the head dim of {x} must be a multiple of the group size 128; got 64",
        ),
        ({**mxfp8(x), bits: 4}, f"{bits} must be 8 for mode mxfp8; got 4"),
        ({**mxfp8(x), group: 64}, f"{group} must be 32 for mode mxfp8; got 64"),
        ({**nvfp4(x), group: 32}, f"{group} must be 16 for mode nvfp4; got 32"),
        ({**turbo2(x), bits: 3}, f"{bits} must be 2 for mode turbo2; got 3"),
        ({**turbo2(x), group: 32}, f"{group} must be 64 for mode turbo2; got 32"),
    ]


def bad_codebooks(x):
    name = f"{x}_codebook"
    shape = f"{name} must have shape [2 ** bits] = [4]; got shape"
    ascend = f"{name} must ascend; got"
    tables = [
        (mx.arange(8.0), f"{shape} [8]"),
        (mx.arange(4.0)[None], f"{shape} [1, 4]"),
        (mx.arange(4), f"{name} must be float32; got dtype int32"),
        (mx.zeros(4, mx.float16), f"{name} must be float32; got dtype float16"),
        (mx.array([0.0, 2.0, 1.0, 3.0]), f"{ascend} 2 before 1 at 2"),
        (mx.array([0.0, 1.0, 1.0, 3.0]), f"{ascend} 1 before 1 at 2"),
        (mx.arange(4.0)[::-1], f"{ascend} 3 before 2 at 1"),
        (mx.array([0.0, mx.nan, 2.0, 3.0]), f"{ascend} 0 before nan at 1"),
    ]
    words = f"{name} must come with a turbo mode; got mode affine"
    return [({name: mx.arange(16.0)}, words)] + [
        ({**turbo2(x), name: table}, words) for table, words in tables
    ]


def bad_widths():
    return [
        (
            {"k": codes(B, N_KV, T_KV, 7)},
            "k must hold the head dim 64 of q in 4 bits a value, "
            "a last axis of D * bits / 32; got 7 words",
        ),
        (
            {"k_bits": 8},
            "k must hold the head dim 64 of q in 8 bits a value, .*; got 8 words",
        ),
        (
            {"q": zeros(B, N_Q, T_Q, 65)},
            "k must hold the head dim 65 of q in 4 bits a value, .*; got 8 words",
        ),
        ({"k": codes(B, N_KV, T_KV, 0)}, "k must hold the head dim 64 .*; got 0 words"),
        (
            {"v": codes(B, N_KV, T_KV, 0)},
            "v must hold whole values of 4 bits in its last axis; got 0 words",
        ),
        (
            {"v_bits": 3},
            "v must hold whole values of 3 bits in its last axis; got 8 words",
        ),
        (
            {"v": codes(B, N_KV, T_KV, 10)},
            "the head dim of v must be a multiple of the group size 64; got 80",
        ),
    ]


def bad_pairs():
    """K and V each valid, yet not together."""
    table = []
    for shape in ((1, 2, 16), (2, 1, 16), (2, 2, 15)):
        v = {"v": codes(*shape, 8), "v_scales": zeros(*shape, 1)}
        words = (
            f"v must have the batch, heads and length of k, [2, 2, 16]; "
            f"got [{shape[0]}, {shape[1]}, {shape[2]}]"
        )
        table.append(({**v, "v_biases": zeros(*shape, 1)}, words))
    empty = {x: codes(B, 0, T_KV, 8) for x in "kv"}
    for x in "kv":
        empty[f"{x}_scales"] = empty[f"{x}_biases"] = zeros(B, 0, T_KV, 1)
    words = "the heads of q must be a multiple of the heads of k; got 4 and 0"
    return [*table, (empty, words)]


def bad_masks():
    words = "mask must broadcast to [B, N_q, T_q, T_kv] = [2, 4, 3, 16]; got shape"
    shapes = {
        (15,): "[15]",
        (2, 16): "[2, 16]",
        (3, 1, 16): "[3, 1, 16]",
        (2, 2, 3, 16): "[2, 2, 3, 16]",
        (4, 1, 3, 16): "[4, 1, 3, 16]",
        (1, 2, 4, 3, 16): "[1, 2, 4, 3, 16]",
        (0,): "[0]",
    }
    table = [
        ({"mask": zeros(*shape, dtype=dtype)}, f"{words} {text}")
        for (shape, text), dtype in product(shapes.items(), (mx.bool_, mx.float32))
    ]
    for dtype in (mx.int32, mx.uint8, mx.complex64):
        name = str(dtype).split(".")[-1]
        table.append(
            (
                {"mask": zeros(3, 16, dtype=dtype)},
                "mask must be bool, float16, bfloat16 or float32; got dtype " + name,
            )
        )
    for text in ("Causal", "", "full"):
        words = f"mask must be None, 'causal' or an array; got '{text}'"
        table.append(({"mask": text}, words))
    return table


def bad_rows():
    table = []
    for name in ("lengths", "left_padding"):
        words = f"{name} must have shape [B] = [2]; got shape"
        table += [
            ({name: mx.array([3.0, 4.0])}, f"{name} must be int32; got dtype float32"),
            (
                {name: mx.array([3, 4], mx.uint32)},
                f"{name} must be int32; got dtype uint32",
            ),
            (
                {name: mx.array([3, 4], mx.int64)},
                f"{name} must be int32; got dtype int64",
            ),
            ({name: ints(3)}, f"{words} [1]"),
            ({name: ints(3, 4, 5)}, f"{words} [3]"),
            ({name: ints(3, 4)[None]}, f"{words} [1, 2]"),
            ({name: mx.array(3)}, f"{words} []"),
        ]
    table += [
        ({"sinks": zeros(3)}, "sinks must have shape [N_q] = [4]; got shape [3]"),
        ({"sinks": zeros(N_KV)}, "sinks must have shape [N_q] = [4]; got shape [2]"),
        ({"sinks": zeros(1, 4)}, "sinks must have shape [N_q] = [4]; got shape [1, 4]"),
        (
            {"sinks": ints(1, 2, 3, 4)},
            "sinks must be float16, bfloat16 or float32; got dtype int32",
        ),
    ]
    return table


def bad_block_tables():
    lengths = {"lengths": ints(3, 4)}
    table = zeros(B, 2, dtype=mx.int32)
    words = "block_table must have shape [B, max_blocks] with B = 2; got shape"
    empty = {x: codes(0, N_KV, T_KV, 8) for x in "kv"}
    for x in "kv":
        empty[f"{x}_scales"] = empty[f"{x}_biases"] = zeros(0, N_KV, T_KV, 1)
    return [
        ({"block_table": table}, "block_table must come with lengths; got None"),
        (
            {**lengths, "block_table": table.astype(mx.uint32)},
            "block_table must be int32; got dtype uint32",
        ),
        ({**lengths, "block_table": table[0]}, f"{words} [2]"),
        ({**lengths, "block_table": table[:1]}, f"{words} [1, 2]"),
        ({**lengths, "block_table": table[None]}, f"{words} [1, 2, 2]"),
        (
            {**lengths, **empty, "block_table": table},
            "block_table must point into a pool with blocks; got shape [0, 2, 16, 8]",
        ),
        (
            {**lengths, "block_table": zeros(B, 2**28, dtype=mx.int32)},
            "block_table must .*; got .*",
        ),
        (
            {**lengths, "block_table": table, "mask": zeros(16)},
            "mask must broadcast to [B, N_q, T_q, T_kv] = [2, 4, 3, 32]; "
            "got shape [16]",
        ),
    ]


def bad_scalars():
    table = [
        ({"scale": mx.inf}, "scale must be finite; got inf"),
        ({"scale": -mx.inf}, "scale must be finite; got -inf"),
        ({"scale": mx.nan}, "scale must be finite; got nan"),
        ({"scale": 1e39}, "scale must be finite; got inf"),
        (
            {"window_size": 4},
            "window_size must come with a causal mask; got no causal mask",
        ),
        (
            {"window_size": 4, "mask": zeros(16)},
            "window_size must come with a causal mask; got no causal mask",
        ),
    ]
    for size in (0, -1):
        words = f"window_size must be above 0; got {size}"
        table.append(({"window_size": size, "causal": True}, words))
    for cap, text in ((0.0, "0"), (-2.0, "-2"), (mx.inf, "inf"), (mx.nan, "nan")):
        words = f"softcap must be finite and above 0; got {text}"
        table.append(({"softcap": cap}, words))
    return table


def to_pattern(words):
    """The whole message; words are literal but for `.*`."""
    body = ".*".join(map(re.escape, words.split(".*")))
    return f"^{re.escape(PREFIX)}{body}\\.$"


class TestErrors(QuantizedSDPATestCase):
    def check(self, table):
        op = mx.fast.quantized_scaled_dot_product_attention
        for changes, words in table:
            with self.subTest(words=words):
                with self.assertRaisesRegex(ValueError, to_pattern(words)):
                    op(**{**valid_call(), **changes})

    def test_the_call_is_valid_without_changes(self):
        op = mx.fast.quantized_scaled_dot_product_attention
        for x in "kv":
            for changes in ({}, mxfp8(x), nvfp4(x), turbo2(x)):
                out = op(**{**valid_call(), **changes})
                self.assertEqual(out.shape, (B, N_Q, T_Q, D))

    def test_queries(self):
        self.check(bad_queries())

    def test_keys_and_values(self):
        for x in "kv":
            self.check(bad_codes(x) + bad_scales(x) + bad_biases(x))
            self.check(bad_formats(x) + bad_codebooks(x))

    def test_widths(self):
        self.check(bad_widths())

    def test_pairs(self):
        self.check(bad_pairs())

    def test_masks(self):
        self.check(bad_masks())

    def test_rows(self):
        self.check(bad_rows())

    def test_block_tables(self):
        self.check(bad_block_tables())

    def test_scalars(self):
        self.check(bad_scalars())

    def test_the_other_call_form(self):
        op = mx.fast.quantized_scaled_dot_product_attention
        call = valid_call()
        five = [call[n] for n in ("q", "k", "k_scales", "v", "v_scales")]
        seven = [call[n] for n in list(call)[:-1]]
        with self.assertRaisesRegex(ValueError, to_pattern("k_scales must be uint8.*")):
            op(*five, scale=1.0)
        words = to_pattern("k_biases must be given for mode affine; got None")
        with self.assertRaisesRegex(ValueError, words):
            op(*five, scale=1.0, mode="affine")
        for args, kwargs in (
            (seven[:4], {"scale": 1.0}),
            (seven[:6], {"scale": 1.0}),
            (seven + seven[:1], {"scale": 1.0}),
            (seven, {}),
            (seven, {"scale": 1.0, "gropu_size": 64}),
            (seven, {"scale": "big"}),
            (seven, {"scale": 1.0, "sinks": "none"}),
            ([None, *seven[1:]], {"scale": 1.0}),
        ):
            with self.subTest(args=len(args), kwargs=str(kwargs)):
                with self.assertRaises(TypeError):
                    op(*args, **kwargs)

    def test_nothing_runs_before_the_error(self):
        op = mx.fast.quantized_scaled_dot_product_attention
        q = mx.exp(zeros(B, N_Q, T_Q, D))
        call = {**valid_call(), "q": q, "sinks": zeros(3)}
        before = mx.get_active_memory()
        with self.assertRaises(ValueError):
            op(**call)
        self.assertEqual(mx.get_active_memory(), before)

    def test_no_kernel(self):
        os.environ[FORCE_FALLBACK] = "1"
        self.addCleanup(os.environ.pop, FORCE_FALLBACK)
        words = f"force_fused needs a fused kernel for the call; got {FORCE_FALLBACK}.*"
        self.check([({"force_fused": True}, words)])
        op = mx.fast.quantized_scaled_dot_product_attention
        self.assertEqual(op(**valid_call()).shape, (B, N_Q, T_Q, D))

    def test_no_kernel_for_the_head_dim(self):
        changes = {"q": zeros(B, N_Q, T_Q, 2080), "force_fused": True}
        for x in "kv":
            changes[x] = codes(B, N_KV, T_KV, 260)
            scales = zeros(B, N_KV, T_KV, 65)
            changes |= {f"{x}_scales": scales, f"{x}_biases": scales}
        changes["group_size"] = 32
        self.check(
            [(changes, "force_fused needs a fused kernel for the call; got a .*")]
        )


HOSTILE = (-(2**31), -1000, -1, 0, 1, 7, 40, 41, 1000, 2**31 - 1)


class TestHostileValues(QuantizedSDPATestCase):
    """Values known only at run time are clamped: to [0, T_kv], [0, length], pool."""

    def check_both_paths(self, case, **axes):
        for fallback in (False, True):
            with self.subTest(fallback=fallback, **axes):
                if fallback:
                    os.environ[FORCE_FALLBACK] = "1"
                try:
                    out, lse = case.run(force_fused=not fallback, return_lse=True)
                    mx.eval(out, lse)
                finally:
                    os.environ.pop(FORCE_FALLBACK, None)
                expected, expected_lse = case.reference()
                check_output(out, expected)
                check_lse(lse, expected_lse)

    def test_lengths_and_left_padding(self):
        pairs = np.array(list(product(HOSTILE, repeat=2)), np.int32)
        for T_q, causal in product((1, 9), (False, True)):
            case = make_case(B=len(pairs), T_q=T_q, T_kv=40, causal=causal)
            lengths, padding = (mx.array(x) for x in pairs.T)
            self.check_both_paths(
                case.having(lengths=lengths, left_padding=padding),
                T_q=T_q,
                causal=causal,
            )
            for name, values in (("lengths", lengths), ("left_padding", padding)):
                given = case.having(**{name: values})
                self.check_both_paths(given, T_q=T_q, causal=causal, given=name)

    def test_window_over_hostile_lengths(self):
        lengths = mx.array(HOSTILE, mx.int32)
        for T_q, window in product((1, 9), (1, 5, 2**31 - 1)):
            case = make_case(B=len(HOSTILE), T_q=T_q, T_kv=40)
            case = case.having(lengths=lengths, causal=True, window_size=window)
            self.check_both_paths(case, T_q=T_q, window=window)

    def test_block_table(self):
        rng = np.random.default_rng(0)
        for T_q, seed in product((1, 9), range(3)):
            case = make_case(B=3, T_q=T_q, T_kv=40, causal=True, layout=None)
            pages = to_pages(case, 8, spare_blocks=0)
            table = rng.choice(np.array(HOSTILE, np.int32), (3, 5))
            lengths = mx.array(rng.choice(np.array(HOSTILE, np.int32), 3))
            pages = pages.having(block_table=mx.array(table), lengths=lengths)
            self.check_both_paths(pages, T_q=T_q, seed=seed)

    def test_random_shapes(self):
        rng = np.random.default_rng(1)
        for seed in range(20):
            T_q, T_kv = (int(rng.integers(1, n)) for n in (40, 300))
            case = make_case(B=4, T_q=T_q, T_kv=T_kv, causal=bool(seed % 2), seed=seed)
            low, high = -2 * T_kv, 3 * T_kv
            values = {
                name: mx.array(rng.integers(low, high, 4).astype(np.int32))
                for name in ("lengths", "left_padding")
            }
            self.check_both_paths(case.having(**values), seed=seed)

    def test_views_of_hostile_values(self):
        case = make_case(B=3, T_kv=40, layout=None)
        table = mx.array([[-9, 1, 99, 3], [0, 2**30, 2, -4], [4, 4, -1, 5]])
        padded = mx.array([7, 99, -7, 99, 31, 99])
        pages = to_pages(case, 10).having(
            block_table=mx.contiguous(table.T).T,
            lengths=padded[::2],
            left_padding=mx.broadcast_to(mx.array(2), (3,)),
        )
        self.check_both_paths(pages)


class TestCheckedValues(QuantizedSDPATestCase):
    """With MLX_QUANTIZED_SDPA_CHECK=1 bad values raise before anything runs."""

    def setUp(self):
        super().setUp()
        os.environ[CHECK] = "1"
        self.addCleanup(os.environ.pop, CHECK, None)
        self.case = make_case(B=2, T_kv=40, layout=None)
        self.pages = to_pages(self.case, 8, spare_blocks=0)

    def check(self, case, words):
        with self.subTest(words=words):
            with self.assertRaisesRegex(ValueError, to_pattern(words)):
                case.run()
            os.environ[CHECK] = "0"
            mx.eval(case.run())
            os.environ[CHECK] = "1"

    def test_good_values(self):
        case = self.case.having(lengths=ints(40, 0), left_padding=ints(0, 40))
        for good in (case, self.pages):
            check_output(good.run(), good.reference()[0])

    def test_bad_values(self):
        for name in ("lengths", "left_padding"):
            words = f"{name} must lie between 0 and 40; got"
            self.check(self.case.having(**{name: ints(3, 41)}), f"{words} 41 at 1")
            self.check(self.case.having(**{name: ints(-1, 3)}), f"{words} -1 at 0")

    def test_bad_blocks(self):
        table = np.array(self.pages.kwargs["block_table"])
        for value in (-1, 10):
            table[1, 2] = value
            words = f"block_table must lie between 0 and 9; got {value} at 7"
            self.check(self.pages.having(block_table=mx.array(table)), words)

    def test_values_that_are_not_known_yet(self):
        case = self.case

        def f(lengths):
            return case.run(lengths=lengths)

        out = mx.compile(f)(ints(99, -3))
        check_output(out, case.reference(lengths=ints(99, -3))[0])


if __name__ == "__main__":
    MLXTestRunner()
