"""Counted, not claimed: what the kernels read, and how."""

import counting
import pytest

WORKS = [*counting.DECODE, *counting.PREFILL]


def name(work):
    return f"{work.kernel}-{work.k}-{work.v}-{work.rows}-{work.keys}".replace(" ", "_")


@pytest.mark.parametrize("work", WORKS, ids=name)
def test_codes_are_read_once_a_kv_head(work):
    found = counting.run(work)
    assert found.codes_read == found.codes_stored
    assert found.narrowest >= 4
    if work.kernel == "steel":
        assert found.mma == counting.least_mma(work)
        _, tile, _ = counting.plan(work)
        tiles = -(-work.keys // tile) * counting.N_KV
        codebooks = sum(counting.FORMATS[x][0] == "turbo" for x in (work.k, work.v))
        assert found.barriers == 2 * tiles + (codebooks > 0) * counting.N_KV
    else:
        groups = counting.N_KV * work.n_splits
        assert found.barriers <= 6 * groups
        assert found.mma == 0


def test_each_64_rows_read_once():
    work = counting.MORE_ROWS
    found = counting.run(work)
    assert found.codes_read == work.rows // 64 * found.codes_stored
    assert found.mma == counting.least_mma(work)


def test_codes_read_for_each_query_head_are_noticed():
    work = counting.DECODE[0]
    found = counting.run(work, rows=1)
    assert found.codes_read == work.rows * found.codes_stored


def test_dense_kernels_read_once_a_query_head():
    work = counting.DECODE[0]
    found = counting.run_stock(work)
    assert found.codes_read == work.rows * found.codes_stored
