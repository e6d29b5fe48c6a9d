"""Function transformations, export, streams and threads."""

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path

import mlx.core as mx
import numpy as np
from quantized_sdpa_reference import (
    MXFP8,
    NVFP4,
    TURBO3,
    TURBO4,
    Case,
    affine,
    check_lse,
    check_output,
    make_case,
    nmse,
    random_mask,
    to_numpy,
    to_pages,
)
from test_fast_quantized_sdpa import (
    FORCE_FALLBACK,
    MLXTestRunner,
    QuantizedSDPATestCase,
    equal,
)
from test_quantized_sdpa_errors import to_pattern

FORMATS = (affine(4), affine(3, 32), MXFP8, NVFP4, TURBO4)


def features(B=2, N=4, T_q=3, T_kv=20):
    """Keyword sets that reach every branch of the op, by name."""
    rng = np.random.default_rng(11)
    lengths = mx.array([T_kv, T_kv - 7])
    return {
        "plain": {},
        "causal": {"causal": True},
        "bool mask": {"mask": random_mask(rng, "bool", (T_q, T_kv))},
        "additive mask": {"mask": random_mask(rng, "additive", (B, 1, T_q, T_kv))},
        "sinks": {"sinks": mx.array(rng.standard_normal(N).astype(np.float32))},
        "softcap": {"softcap": 3.0},
        "window": {"causal": True, "window_size": 5},
        "ragged": {"lengths": lengths, "left_padding": mx.array([2, 0])},
    }


def small_case(fmt=None, v=None, T_q=3, T_kv=20, **kwargs):
    return make_case(B=2, T_q=T_q, T_kv=T_kv, k=fmt or affine(4), v=v, **kwargs)


def make_call(q, kv, kwargs):
    """A case from flat arguments."""
    return Case(q, tuple(kv[:3]), tuple(kv[3:]), kwargs)


def arrays_of(case):
    return [x for x in case.args if x is not None]


def with_arrays(case, arrays):
    """The case with these arrays in place of arrays_of(case)."""
    rest = iter(arrays)
    args = [None if x is None else next(rest) for x in case.args]
    return make_call(args[0], args[1:], case.kwargs)


def arrays_and_keywords(case):
    """All arrays of a case, those of its keywords last."""
    keywords = [x for x in case.kwargs.values() if isinstance(x, mx.array)]
    return [*arrays_of(case), *keywords]


def shapeless(case, **changes):
    """The op compiled once, traced with this case, as a function of other cases."""

    def f(*arrays):
        rest = iter(arrays[len(arrays_of(case)) :])
        kwargs = {
            name: next(rest) if isinstance(x, mx.array) else x
            for name, x in case.kwargs.items()
        }
        return with_arrays(replace(case, kwargs=kwargs), arrays).run(**changes)

    compiled = mx.compile(f, shapeless=True)
    mx.eval(compiled(*arrays_and_keywords(case)))
    return lambda other: compiled(*arrays_and_keywords(other))


def whole_mask(B=1, N=4, T_q=1, T_kv=64, kind="bool"):
    return random_mask(np.random.default_rng(8), kind, (B, N, T_q, T_kv))


def paged_case(**kwargs):
    return to_pages(small_case(causal=True, layout=None, **kwargs), 8)


def refused_masks():
    """Of each a case to trace with, one to call with, the words."""
    words = "mask, in a graph for all shapes, must have shape [B, N_q, T_q, T_kv] ="
    mask, one_head = whole_mask(), whole_mask(1, 1)
    plain = make_case(T_kv=64, layout=None)
    got = "got shape [1, 4, 1, 64]"
    return [
        (
            plain.having(mask=mask),
            make_case(T_q=5, T_kv=64, mask=mask),
            f"{words} [1, 4, 5, 64]; {got}",
        ),
        (
            plain.having(mask=mask),
            make_case(T_kv=640, mask=mask),
            f"{words} [1, 4, 1, 640]; {got}",
        ),
        (
            plain.having(mask=one_head),
            make_case(T_q=5, T_kv=64, mask=one_head),
            f"{words} [1, 4, 5, 64]; {got}",
        ),
    ]


def refused_formats():
    plain, narrow = make_case(layout=None), affine(4, 32)
    table = [
        (
            make_case(k=TURBO4, v=affine(4)),
            make_case(D=128, k=TURBO4, v=affine(4)),
            "the head dim of k must be the group size 64; got 128",
        ),
        (
            make_case(k=affine(4), v=TURBO3),
            make_case(k=affine(4), v=TURBO3, D_v=128),
            "the head dim of v must be the group size 64; got 128",
        ),
        (
            plain,
            make_case(D=32, k=narrow),
            "the head dim of k must be a multiple of the group size 64; got 32",
        ),
        (
            plain,
            replace(plain, q=make_case(D=128).q),
            "k must hold the head dim 128 of q in 4 bits a value, .*; got 8 words",
        ),
        (
            make_case(k=narrow),
            make_case(k=narrow, D=2080),
            "a graph for all shapes needs a fused kernel for each call; got a .*",
        ),
        (
            make_case(k=TURBO4, k_codebook=mx.arange(16.0)),
            make_case(k=TURBO4, k_codebook=mx.arange(8.0)),
            "k_codebook must have shape [2 ** bits] = [16]; got shape [8]",
        ),
    ]
    for i, name in enumerate(("scales", "biases"), 1):
        k = [x[:, :, 1:] if i == j else x for j, x in enumerate(plain.k)]
        words = f"k_{name} must have shape .*; got shape [1, 2, 64, 1]"
        table.append((plain, replace(plain, k=tuple(k)), words))
    return table


def refused_rows():
    plain, pages = make_case(T_kv=64, layout=None), paged_case()
    table = [
        (
            plain,
            make_case(T_kv=64, N_q=5),
            "the heads of q must be a multiple of the heads of k; got 5 and 2",
        ),
        (
            plain,
            replace(plain, v=make_case(T_kv=63).v),
            "v must have the batch, heads and length of k, [1, 2, 64]; got [1, 2, 63]",
        ),
        (
            plain,
            replace(plain, q=make_case(B=2).q),
            "k must have the batch size of q, 2; got 1",
        ),
        (
            make_case(sinks=mx.zeros(4)),
            make_case(N_q=8, sinks=mx.zeros(4)),
            "sinks must have shape [N_q] = [8]; got shape [4]",
        ),
        (
            pages,
            pages.having(block_table=pages.kwargs["block_table"][:1]),
            "block_table must have shape [B, max_blocks] with B = 2; got shape [1, 3]",
        ),
        (
            pages,
            pages.map_kv(lambda x: x[:0]),
            "block_table must point into a pool with blocks; got shape [0, 2, 8, 8]",
        ),
    ]
    for name, rows in (("lengths", [20, 3]), ("left_padding", [0, 2])):
        case = small_case(layout=None, **{name: mx.array(rows)})
        words = f"{name} must have shape [B] = [2]; got shape [1]"
        table.append((case, case.having(**{name: mx.array(rows[:1])}), words))
    return table


def refused_shapes():
    return refused_masks() + refused_formats() + refused_rows()


def slope(f, x, direction, step=1e-4):
    """Derivative of f at x along direction, f in float64."""
    return (f(x + step * direction) - f(x - step * direction)) / (2 * step)


def with_argument(case, name, x):
    """The case with another q or another keyword."""
    return replace(case, q=x) if name == "q" else case.having(**{name: x})


def weighted_sums(case, name, with_lse):
    """A scalar of the outputs as a function of one argument: the op's, the oracle's."""
    rng = np.random.default_rng(0)
    out, lse = case.reference()
    out_weights = rng.standard_normal(out.shape)
    lse_weights = rng.standard_normal(lse.shape) * with_lse

    def by_op(x):
        out, lse = with_argument(case, name, x).run(return_lse=True)
        total = (out * mx.array(out_weights, mx.float32)).sum()
        if not with_lse:
            return total
        lse = mx.where(lse == -mx.inf, 0.0, lse)
        return total + (lse * mx.array(lse_weights, mx.float32)).sum()

    def by_oracle(x):
        out, lse = with_argument(case, name, x).reference()
        lse = np.where(np.isneginf(lse), 0.0, lse)
        return np.sum(out * out_weights) + np.sum(lse * lse_weights)

    return by_op, by_oracle


class TestGradients(QuantizedSDPATestCase):
    """Against finite differences of the float64 oracle."""

    def check_gradient(self, case, name, with_lse=False):
        by_op, by_oracle = weighted_sums(case, name, with_lse)
        x = case.q if name == "q" else case.kwargs[name]
        gradient = mx.grad(by_op)(x)
        self.assertEqual((gradient.dtype, gradient.shape), (x.dtype, x.shape))
        x, gradient = to_numpy(x), to_numpy(gradient)
        self.assertTrue(np.isfinite(gradient).all())
        self.assertTrue(gradient.any())
        # An infinite mask or sink cannot be moved.
        movable = np.isfinite(x)
        self.check_along_a_direction(by_oracle, x, gradient, movable)
        self.check_coordinates(by_oracle, x, gradient, movable)

    def check_along_a_direction(self, f, x, gradient, movable):
        rng = np.random.default_rng(1)
        direction = np.where(movable, rng.standard_normal(x.shape), 0.0)
        error = np.sum(gradient * direction) - slope(f, x, direction)
        size = np.linalg.norm(gradient) * np.linalg.norm(direction)
        self.assertLessEqual(abs(error), 1e-5 * size)

    def check_coordinates(self, f, x, gradient, movable):
        places = np.flatnonzero(movable)
        places = places[:: max(1, len(places) // 40)]
        units = [np.eye(1, x.size, i).reshape(x.shape) for i in places]
        slopes = np.array([slope(f, x, unit) for unit in units])
        self.assertLessEqual(nmse(gradient.flatten()[places], slopes), 1e-9)

    def test_q(self):
        for (name, kwargs), with_lse in product(features().items(), (False, True)):
            with self.subTest(feature=name, with_lse=with_lse):
                self.check_gradient(small_case(**kwargs), "q", with_lse)

    def test_q_of_every_format(self):
        for fmt in FORMATS:
            with self.subTest(format=str(fmt)):
                self.check_gradient(small_case(fmt, causal=True), "q")
        with self.subTest(format="mixed, D != D_v"):
            self.check_gradient(small_case(affine(8), TURBO3, D=128, D_v=64), "q")

    def test_q_of_a_paged_cache(self):
        case = small_case(causal=True, lengths=mx.array([20, 9]), layout=None)
        self.check_gradient(to_pages(case, 8), "q", with_lse=True)

    def test_mask(self):
        rng = np.random.default_rng(2)
        for shape in ((20,), (3, 20), (2, 1, 3, 20), (2, 4, 3, 20)):
            for kind, with_lse in product(("bias", "additive"), (False, True)):
                mask = random_mask(rng, kind, shape)
                with self.subTest(shape=shape, kind=kind, with_lse=with_lse):
                    self.check_gradient(small_case(mask=mask), "mask", with_lse)

    def test_mask_that_shifts_only_the_lse(self):
        mask = mx.arange(4.0).reshape(4, 1, 1)
        self.check_gradient(small_case(mask=mask), "mask", with_lse=True)

    def test_sinks(self):
        sinks = mx.array([0.5, -1.0, 2.0, 3.0])
        for T_q, with_lse in product((1, 3), (False, True)):
            case = small_case(T_q=T_q, sinks=sinks, causal=True)
            with self.subTest(T_q=T_q, with_lse=with_lse):
                self.check_gradient(case, "sinks", with_lse)

    def test_rows_without_keys(self):
        case = small_case(T_q=9, lengths=mx.array([4, 0]), causal=True)
        for with_lse in (False, True):
            with self.subTest(with_lse=with_lse):
                self.check_gradient(case, "q", with_lse)

    def test_half_precision(self):
        for dtype, bound in ((mx.float16, 1e-5), (mx.bfloat16, 1e-3)):
            case = small_case(dtype=dtype, causal=True)

            def f(q, case=case):
                return replace(case, q=q).run().astype(mx.float32).sum()

            gradient = mx.grad(f)(case.q)
            expected = mx.grad(f)(case.q.astype(mx.float32))
            with self.subTest(dtype=str(dtype)):
                self.assertEqual(gradient.dtype, dtype)
                error = nmse(to_numpy(gradient), to_numpy(expected))
                self.assertLessEqual(error, bound)

    def test_several_arguments_at_once(self):
        sinks = mx.array([0.5, -1.0, 2.0, 3.0])
        mask = random_mask(np.random.default_rng(3), "bias", (3, 20))
        case = small_case(sinks=sinks, mask=mask)

        def f(q, mask, sinks):
            return replace(case, q=q).run(mask=mask, sinks=sinks).square().sum()

        together = mx.grad(f, argnums=(0, 1, 2))(case.q, mask, sinks)
        for i, gradient in enumerate(together):
            alone = mx.grad(f, argnums=i)(case.q, mask, sinks)
            self.assertTrue(mx.any(alone != 0).item())
            self.assertTrue(mx.allclose(gradient, alone, rtol=1e-5, atol=1e-7).item())

    def test_jvp(self):
        rng = np.random.default_rng(4)
        sinks = mx.array([0.5, -1.0, 2.0, 3.0])
        mask = random_mask(rng, "bias", (2, 1, 3, 20))
        case = small_case(sinks=sinks, mask=mask)
        for name in ("q", "mask", "sinks"):
            x = case.q if name == "q" else case.kwargs[name]
            tangent = rng.standard_normal(x.shape)

            def by_op(x, name=name):
                return with_argument(case, name, x).run(return_lse=True)

            _, got = mx.jvp(by_op, [x], [mx.array(tangent, mx.float32)])
            for i, output in enumerate(("out", "lse")):

                def by_oracle(x, name=name, i=i):
                    return with_argument(case, name, x).reference()[i]

                expected = slope(by_oracle, to_numpy(x), tangent)
                with self.subTest(argument=name, output=output):
                    self.assertLessEqual(nmse(to_numpy(got[i]), expected), 1e-9)

    def test_jvp_over_several_chunks(self):
        """It is the transpose of vjp, which finite differences check."""
        case = small_case(T_kv=2100, causal=True)
        rng = np.random.default_rng(5)

        def f(q):
            return replace(case, q=q).run()

        move, weights = (
            mx.array(rng.standard_normal(x.shape), mx.float32)
            for x in (case.q, f(case.q))
        )
        _, (moved,) = mx.jvp(f, [case.q], [move])
        _, (gradient,) = mx.vjp(f, [case.q], [weights])
        forward, backward = (moved * weights).sum(), (gradient * move).sum()
        self.assertTrue(mx.allclose(forward, backward, rtol=1e-4).item())

    def test_vjp(self):
        case = small_case(causal=True)
        rng = np.random.default_rng(5)
        cotangent = mx.array(rng.standard_normal((2, 4, 3, 64)), mx.float32)
        outs, grads = mx.vjp(lambda q: replace(case, q=q).run(), [case.q], [cotangent])
        check_output(outs[0], case.reference()[0])
        by_grad = mx.grad(lambda q: (replace(case, q=q).run() * cotangent).sum())
        self.assertTrue(mx.allclose(grads[0], by_grad(case.q), rtol=1e-5).item())

    def test_checkpoint(self):
        case = small_case(causal=True)

        def f(q):
            return replace(case, q=q * 2).run().square().sum()

        expected = mx.grad(f)(case.q)
        got = mx.grad(lambda q: mx.checkpoint(f)(q))(case.q)
        self.assertTrue(mx.any(expected != 0).item())
        self.assertTrue(mx.allclose(got, expected, rtol=1e-5).item())

    def test_value_and_grad_under_compile(self):
        case = small_case()
        f = mx.value_and_grad(lambda q: replace(case, q=q).run().square().sum())
        value, gradient = f(case.q)
        compiled_value, compiled_gradient = mx.compile(f)(case.q)
        self.assertTrue(mx.allclose(value, compiled_value, rtol=1e-5).item())
        self.assertTrue(mx.allclose(gradient, compiled_gradient, rtol=1e-4).item())


class TestCompile(QuantizedSDPATestCase):
    def test_every_feature(self):
        for name, kwargs in features().items():
            case = small_case(**kwargs)

            def f(q, *kv, kwargs=case.kwargs):
                return make_call(q, kv, kwargs).run(force_fused=True, return_lse=True)

            with self.subTest(feature=name):
                pairs = zip(f(*case.args), mx.compile(f)(*case.args), strict=True)
                for expected, got in pairs:
                    self.assertTrue(equal(expected, got))

    def test_among_other_ops(self):
        case = small_case(causal=True)

        def f(q):
            return mx.tanh(replace(case, q=mx.exp(q) - 1).run(force_fused=True)) * 2

        check = mx.compile(f)(case.q)
        self.assertLessEqual(nmse(to_numpy(check), to_numpy(f(case.q))), 1e-10)

    def test_shapeless(self):
        calls = []

        def f(q, *kv):
            calls.append(q.shape)
            kwargs = small_case(T_kv=1, causal=True).kwargs
            return make_call(q, kv, kwargs).run(force_fused=True)

        compiled = mx.compile(f, shapeless=True)
        for T_q, T_kv in ((1, 20), (1, 21), (5, 64), (40, 300)):
            case = small_case(T_q=T_q, T_kv=T_kv, causal=True)
            with self.subTest(T_q=T_q, T_kv=T_kv):
                check_output(compiled(*case.args), case.reference()[0])
        self.assertEqual(len(calls), 1)

    def test_shapeless_keywords(self):
        """With a whole mask, a row of each keyword and pages, in other shapes."""

        def masked(T_q, T_kv, kind):
            return small_case(
                T_q=T_q,
                T_kv=T_kv,
                causal=True,
                mask=whole_mask(2, 4, T_q, T_kv, kind),
                sinks=mx.array([0.5, -1.0, 2.0, 3.0]),
                lengths=mx.array([T_kv, T_kv // 2]),
                left_padding=mx.array([2, 0]),
            )

        for kind in ("bool", "additive"):
            f = shapeless(masked(1, 20, kind), force_fused=True)
            for T_q, T_kv in ((1, 20), (5, 64), (40, 300), (1, 7)):
                case = masked(T_q, T_kv, kind)
                with self.subTest(T_q=T_q, T_kv=T_kv, kind=kind):
                    check_output(f(case), case.reference()[0])
        f = shapeless(paged_case(), force_fused=True)
        for T_q, T_kv in ((1, 20), (5, 64), (40, 300), (1, 7)):
            case = paged_case(T_q=T_q, T_kv=T_kv)
            with self.subTest(T_q=T_q, T_kv=T_kv, paged=True):
                check_output(f(case), case.reference()[0])

    def test_shapeless_refuses_what_the_op_would(self):
        for traced, called, words in refused_shapes():
            with self.subTest(words=words):
                f = shapeless(traced, force_fused=True)
                with self.assertRaisesRegex(ValueError, to_pattern(words)):
                    f(called)
                check_output(f(traced), traced.reference()[0])

    def test_shapeless_fallback_refuses_other_shapes(self):
        os.environ[FORCE_FALLBACK] = "1"
        self.addCleanup(os.environ.pop, FORCE_FALLBACK)
        pages = paged_case()
        cases = [(traced, called) for traced, called, _ in refused_shapes()]
        cases += [
            (small_case(), small_case(T_kv=21)),
            (small_case(), small_case(T_q=4)),
            (pages, pages.map_kv(lambda x: x[:2])),
            (pages, paged_case(T_kv=40)),
        ]
        for i, (traced, called) in enumerate(cases):
            with self.subTest(i=i):
                f = shapeless(traced)
                check_output(f(traced), traced.reference()[0])
                with self.assertRaises(ValueError):
                    f(called)

    def test_shapeless_vmap_refuses_another_batch(self):
        def call(B, n):
            case = make_case(B=B, layout=None)
            return [mx.stack([x] * n) for x in arrays_of(case)]

        case = make_case()

        def f(*arrays):
            return with_arrays(case, arrays).run(force_fused=True)

        compiled = mx.compile(mx.vmap(f), shapeless=True)
        mx.eval(compiled(*call(2, 3)))
        for B, n in ((2, 2), (2, 4), (1, 3), (3, 3)):
            with self.subTest(B=B, n=n):
                with self.assertRaises(ValueError):
                    compiled(*call(B, n))

    def test_of_vmap(self):
        case = small_case(causal=True)
        q = mx.stack([case.q, -case.q, 2 * case.q])

        def f(q):
            return replace(case, q=q).run(force_fused=True)

        out = mx.compile(mx.vmap(f))(q)
        check_output(out, to_numpy(mx.stack([f(x) for x in q])))


class TestVmap(QuantizedSDPATestCase):
    """Against a loop over the mapped axis."""

    def check_vmap(self, f, args, in_axes, out_axes=0):
        pairs = list(zip(args, in_axes, strict=True))
        size = next(x.shape[axis] for x, axis in pairs if axis is not None)
        looped = [
            f(*(x if axis is None else mx.take(x, i, axis) for x, axis in pairs))
            for i in range(size)
        ]
        mapped = mx.vmap(f, in_axes=in_axes, out_axes=out_axes)(*args)
        expected = mx.stack(looped, axis=out_axes)
        self.assertEqual(mapped.dtype, expected.dtype)
        check_output(mapped, to_numpy(expected))

    def call(self, case, *names, **changes):
        """f(q, *kv, *values of names)."""

        def f(q, *rest):
            kv, given = rest[: len(case.k) * 2], rest[len(case.k) * 2 :]
            kwargs = {**case.kwargs, **dict(zip(names, given, strict=True))}
            return make_call(q, kv, kwargs).run(force_fused=self.fused, **changes)

        return f

    def stacked(self, n=3, **kwargs):
        cases = [small_case(seed=i, **kwargs) for i in range(n)]
        columns = zip(*(case.args for case in cases), strict=True)
        return cases[0], [mx.stack(x) for x in columns]

    def test_q_only(self):
        for (name, kwargs), axis in product(features().items(), (0, 2, 4)):
            case, args = self.stacked(**kwargs)
            args = [mx.moveaxis(args[0], 0, axis), *case.args[1:]]
            with self.subTest(feature=name, axis=axis):
                in_axes = (axis, *[None] * 6)
                self.check_vmap(self.call(case), args, in_axes)

    def test_everything(self):
        for name, kwargs in features().items():
            case, args = self.stacked(**kwargs)
            with self.subTest(feature=name):
                self.check_vmap(self.call(case), args, (0,) * 7, out_axes=1)

    def test_every_format(self):
        for fmt in FORMATS:
            cases = [small_case(fmt, causal=True, seed=i) for i in range(3)]
            columns = zip(*(arrays_of(case) for case in cases), strict=True)
            args = [mx.stack(x) for x in columns]

            def f(*arrays, case=cases[0]):
                return with_arrays(case, arrays).run(force_fused=self.fused)

            with self.subTest(format=str(fmt)):
                self.check_vmap(f, args, (0,) * len(args))

    def test_one_operand(self):
        case, args = self.stacked(causal=True)
        for mapped in ((1, 2, 3), (4, 5, 6), (0, 1, 2, 3), (2,)):
            in_axes = tuple(0 if i in mapped else None for i in range(7))
            given = [
                a if i in mapped else c
                for i, (a, c) in enumerate(zip(args, case.args, strict=True))
            ]
            with self.subTest(mapped=mapped):
                self.check_vmap(self.call(case), given, in_axes)

    def test_other_axes(self):
        case, args = self.stacked(causal=True)
        axes = (1, 2, 3, 4, 0, 1, 2)
        args = [mx.moveaxis(x, 0, a) for x, a in zip(args, axes, strict=True)]
        self.check_vmap(self.call(case), args, axes, out_axes=2)

    def test_keywords(self):
        rng = np.random.default_rng(6)
        mapped = {
            "mask": [
                random_mask(rng, kind, shape)
                for kind in ("bool", "additive")
                for shape in ((3, 20), (3, 3, 20), (3, 2, 1, 1, 20), (3, 2, 4, 3, 20))
            ],
            "sinks": [mx.array(rng.standard_normal((3, 4)), mx.float32)],
            "lengths": [mx.array([[20, 3], [1, 5], [0, 20]])],
            "left_padding": [mx.array([[0, 3], [1, 5], [0, 19]])],
        }
        case = small_case(causal=True)
        for name, values in mapped.items():
            for value, q_axis in product(values, (None, 0)):
                q = case.q
                if q_axis is not None:
                    q = mx.stack([q, -q, 2 * q])
                args = (q, *case.args[1:], value)
                with self.subTest(name=name, shape=value.shape, q_axis=q_axis):
                    in_axes = (q_axis, *[None] * 6, 0)
                    self.check_vmap(self.call(case, name), args, in_axes)

    def test_paged_cache(self):
        case = small_case(causal=True, lengths=mx.array([20, 9]), layout=None)
        pages = to_pages(case, 8)
        q = mx.stack([case.q, 2 * case.q])
        args = (q, *pages.args[1:])
        self.check_vmap(self.call(pages), args, (0, *[None] * 6))
        table = pages.kwargs["block_table"]
        args = (q, *pages.args[1:], mx.stack([table, table[:, ::-1]]))
        in_axes = (0, *[None] * 6, 0)
        self.check_vmap(self.call(pages, "block_table"), args, in_axes)

    def test_nested(self):
        rng = np.random.default_rng(7)
        case, args = self.stacked(causal=True)
        sinks = mx.array(rng.standard_normal((2, 4)), mx.float32)
        f = self.call(case, "sinks")
        inner = mx.vmap(f, in_axes=(None,) * 7 + (0,))
        out = mx.vmap(inner, in_axes=(0,) * 7 + (None,))(*args, sinks)
        expected = mx.stack(
            [mx.stack([f(*(x[i] for x in args), s) for s in sinks]) for i in range(3)]
        )
        check_output(out, to_numpy(expected))

    def test_both_outputs(self):
        case, args = self.stacked(causal=True)
        f = self.call(case, return_lse=True)
        out, lse = mx.vmap(f)(*args)
        for i in range(3):
            expected = f(*(x[i] for x in args))
            check_output(out[i], to_numpy(expected[0]))
            check_lse(lse[i], to_numpy(expected[1]))

    def test_of_gradient(self):
        for T_kv in (20, 1100):
            case, args = self.stacked(T_kv=T_kv, causal=True)
            f = mx.grad(lambda *a, case=case: self.call(case)(*a).square().sum())
            out = mx.vmap(f)(*args)
            expected = mx.stack([f(*(x[i] for x in args)) for i in range(3)])
            with self.subTest(T_kv=T_kv):
                self.assertLessEqual(nmse(to_numpy(out), to_numpy(expected)), 1e-10)

    def test_several_chunks(self):
        case, args = self.stacked(T_kv=2100, causal=True)
        self.check_vmap(self.call(case), args, (0,) * 7)
        self.check_vmap(self.call(case), [args[0], *case.args[1:]], (0, *[None] * 6))

    def test_nothing(self):
        case = small_case(causal=True)
        none = mx.zeros((0, *case.q.shape), case.q.dtype)
        out = mx.vmap(lambda q: self.call(case)(q, *case.args[1:]))(none)
        self.assertEqual(out.shape, (0, *case.run().shape))


class TestVmapFallback(TestVmap):
    fused = False


class TestExport(QuantizedSDPATestCase):
    def round_trip(self, f, *args):
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "attention.mlxfn")
            mx.export_function(path, f, *args)
            return mx.import_function(path)(*args)

    def test_every_feature(self):
        for name, kwargs in features().items():
            case = small_case(**kwargs)
            arrays = {n: x for n, x in case.kwargs.items() if isinstance(x, mx.array)}
            constants = {n: x for n, x in case.kwargs.items() if n not in arrays}

            def f(q, *rest, names=tuple(arrays), constants=constants):
                given = dict(zip(names, rest[6:], strict=True))
                return make_call(q, rest[:6], {**constants, **given}).run(
                    return_lse=True
                )

            with self.subTest(feature=name):
                out, lse = self.round_trip(f, *case.args, *arrays.values())
                expected, expected_lse = case.reference()
                check_output(out, expected)
                check_lse(lse, expected_lse)

    def test_every_format(self):
        for fmt in FORMATS:
            case = small_case(fmt, causal=True)

            def f(*arrays, case=case):
                return with_arrays(case, arrays).run()

            with self.subTest(format=str(fmt)):
                (out,) = self.round_trip(f, *arrays_of(case))
                check_output(out, case.reference()[0])

    def test_paged_cache(self):
        case = small_case(causal=True, lengths=mx.array([20, 9]), layout=None)
        pages = to_pages(case, 8)
        (out,) = self.round_trip(
            lambda q, *kv: make_call(q, kv, pages.kwargs).run(), *pages.args
        )
        check_output(out, case.reference()[0])

    def test_other_shapes_than_those_of_the_trace_are_refused(self):
        """The exported graph masks by the lengths that it was traced with."""
        case = small_case(T_q=1, causal=True, layout=None)
        mx.eval(case.args)

        def f(q):
            return replace(case, q=q).run()

        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "attention.mlxfn")
            mx.export_function(path, f, case.q, shapeless=True)
            found = mx.import_function(path)
            check_output(found(case.q)[0], case.reference()[0])
            with self.assertRaises(ValueError):
                found(mx.repeat(case.q, 5, axis=2))

    def test_a_use_without_export_stays_fused(self):
        case = small_case()
        self.round_trip(lambda q, *kv: make_call(q, kv, case.kwargs).run(), *case.args)
        check_output(case.run(force_fused=True), case.reference()[0])


class TestStreamsAndThreads(QuantizedSDPATestCase):
    def cases(self):
        return [
            make_case(N_q=8, T_q=T_q, T_kv=T_kv, k=fmt, causal=True, seed=i)
            for i, (T_q, T_kv, fmt) in enumerate(
                product((1, 9, 40), (65, 600), (affine(4), MXFP8))
            )
        ]

    def test_forms_of_stream(self):
        case = small_case(causal=True)
        expected = case.run()
        check_output(expected, case.reference()[0])
        device = mx.default_device()
        for stream in (
            None,
            device,
            device.type,
            mx.default_stream(device),
            mx.new_stream(device),
        ):
            with self.subTest(stream=str(stream)):
                out = case.run(stream=stream, force_fused=True)
                self.assertTrue(equal(out, expected))
        with mx.stream(mx.new_stream(device)):
            self.assertTrue(equal(case.run(), expected))

    def test_wrong_stream(self):
        with self.assertRaises((TypeError, ValueError)):
            small_case().run(stream="cpu")

    def test_several_streams_at_once(self):
        cases = self.cases()
        expected = [case.run(force_fused=True) for case in cases]
        mx.eval(expected)
        streams = [mx.new_stream(mx.default_device()) for _ in range(4)]
        for _ in range(3):
            outs = [
                case.run(stream=streams[i % 4], force_fused=True)
                for i, case in enumerate(cases)
            ]
            mx.eval(outs)
            for out, want in zip(outs, expected, strict=True):
                self.assertTrue(equal(out, want))

    def test_async_eval(self):
        cases = self.cases()
        expected = [case.run() for case in cases]
        mx.eval(expected)
        outs = [case.run(force_fused=True) for case in cases]
        mx.async_eval(outs)
        for out, want in zip(outs, expected, strict=True):
            self.assertTrue(equal(out, want))

    def test_threads(self):
        cases = self.cases()
        mx.eval([case.args for case in cases])
        expected = [case.run() for case in cases]
        mx.eval(expected)

        def work(_):
            with mx.stream(mx.new_stream(mx.default_device())):
                outs = [case.run(force_fused=True) for case in cases]
                mx.eval(outs)
            return outs

        with ThreadPoolExecutor(4) as pool:
            for outs in pool.map(work, range(8)):
                for out, want in zip(outs, expected, strict=True):
                    self.assertTrue(equal(out, want))


class TestInputsAreLeftAlone(QuantizedSDPATestCase):
    def test_inputs_and_their_surroundings(self):
        for fused, (name, kwargs) in product((True, False), features().items()):
            case = small_case(layout=None, **kwargs)
            whole = [case.q, *(x for x in kwargs.values() if isinstance(x, mx.array))]

            def inside(x, whole=whole):
                whole.append(mx.concatenate([x, x, x], 2))
                return whole[-1][:, :, 20:40]

            case = case.map_kv(inside)
            mx.eval(whole)
            before = [bytes(memoryview(x)) for x in whole]
            mx.eval(case.run(force_fused=fused), case.run(return_lse=True))
            with self.subTest(feature=name, fused=fused):
                self.assertEqual(before, [bytes(memoryview(x)) for x in whole])

    def test_donated_query(self):
        case = small_case(causal=True)
        expected = case.reference()[0]
        again = mx.exp(mx.log(mx.abs(case.q))) * mx.sign(case.q)
        check_output(replace(case, q=again).run(force_fused=True), expected)


if __name__ == "__main__":
    MLXTestRunner()
