"""Drawn calls against the oracle: a fixed slice here, more by scripts/fuzz.py."""

import math
import unittest

import hypothesis
import mlx.core as mx
import numpy as np
from hypothesis import HealthCheck, given, settings
from quantized_sdpa_reference import (
    check_lse,
    check_output,
    operand_values,
    to_numpy,
)
from quantized_sdpa_strategies import (
    arguments_of,
    calls,
    calls_at_edges,
    damaged_calls,
    extreme_calls,
)

# The sums that make a score cancel to less than float32 holds of them.
ILL_CONDITIONED = {"huge logits", "small scales", "tiny q"}
PREFIX = "[quantized_scaled_dot_product_attention] "


def check_call(case):
    """Output and log-sum-exp are within their bounds of float64."""
    out, lse = case.run(return_lse=True)
    expected, expected_lse = case.reference()
    check_output(out, expected, case.q.dtype, case.score_nmse)
    check_lse(lse, expected_lse, case.q.dtype, case.score_nmse)


def check_extreme(named_case):
    """As check_call, where float32 can keep the bounds; finite and sane elsewhere."""
    name, case = named_case
    if name not in ILL_CONDITIONED:
        return check_call(case)
    out, lse = (to_numpy(x) for x in case.run(return_lse=True))
    _, expected_lse = case.reference()
    assert np.isfinite(out).all(), "non-finite output"
    assert np.array_equal(np.isneginf(lse), np.isneginf(expected_lse)), "-inf elsewhere"
    # A weighted mean of values and of zero, which sinks add.
    largest = np.abs(operand_values("v", case.v, case.kwargs)).max(initial=0)
    assert np.abs(out).max(initial=0) <= 1.01 * largest, "no mean of the values"


def check_nan(case):
    """NaN in a row of q reaches that row alone."""
    if case.q.size == 0:
        return
    q = np.array(case.q.astype(mx.float32))
    q[-1, -1, -1, 0] = math.nan
    spoilt = mx.array(q).astype(case.q.dtype)
    op = mx.fast.quantized_scaled_dot_product_attention
    out = to_numpy(op(spoilt, *case.args[1:], **case.kwargs))
    expected, lse = case.reference()
    row = (-1, -1, -1)
    sees = lse[row] > -math.inf
    if sees and case.kwargs.get("sinks") is None:
        assert np.isnan(out[row]).all(), "NaN in q was lost"
    out[row] = expected[row]
    check_output(mx.array(out), expected, case.q.dtype)


def check_damaged(damaged):
    """A damaged call raises the op's ValueError, or is valid and gives q's rows."""
    case, damage = damaged
    arguments = damage.apply(arguments_of(case))
    op = mx.fast.quantized_scaled_dot_product_attention
    try:
        out = op(**arguments)
    except TypeError:
        # An argument of a type that the signature does not take.
        return
    except ValueError as error:
        assert str(error).startswith(PREFIX) and "; got " in str(error), str(error)
        return
    mx.eval(out)
    assert out.shape[:3] == arguments["q"].shape[:3], f"{damage}: {out.shape}"


# Name: strategy, check, share of the drawn calls in percent.
PARTS = {
    "calls": (calls, check_call, 40),
    "edges": (calls_at_edges, check_call, 20),
    "extremes": (extreme_calls, check_extreme, 15),
    "nan": (calls, check_nan, 5),
    "damaged": (damaged_calls, check_damaged, 20),
}


def run_part(name, count, seed=None):
    """Draw `count` calls of one part, the same ones for a seed, and check each."""
    strategy, check, _ = PARTS[name]

    def run(drawn):
        check(drawn)

    run = settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=seed is None,
        suppress_health_check=list(HealthCheck),
    )(given(strategy())(run))
    (run if seed is None else hypothesis.seed(seed)(run))()


class TestFuzz(unittest.TestCase):
    def test_slice(self):
        for name, (_, _, share) in PARTS.items():
            with self.subTest(part=name):
                run_part(name, 4 * share)


if __name__ == "__main__":
    unittest.main()
