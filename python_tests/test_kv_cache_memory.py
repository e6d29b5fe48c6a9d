"""Every call of MLX that a cache makes fails in turn: it is then as before."""

import contextlib
from unittest import mock

import mlx.core as mx
import mlx_quantized_sdpa as qs
import pytest
import soak
from mlx_quantized_sdpa.paged import PagedKVCache

# All that makes an array.
CALLS = (
    "broadcast_to",
    "concatenate",
    "contiguous",
    "eval",
    "full",
    "hadamard_transform",
    "pad",
    "quantize",
    "take_along_axis",
    "zeros",
)


class Failing:
    """Within it the n-th of those calls raises."""

    def __init__(self, n):
        self.left = n

    def wrap(self, own):
        def call(*arguments, **keywords):
            self.left -= 1
            if self.left == 0:
                raise MemoryError("planted")
            return own(*arguments, **keywords)

        return call

    @contextlib.contextmanager
    def planted(self):
        with contextlib.ExitStack() as stack:
            for name in CALLS:
                changed = self.wrap(getattr(mx, name))
                stack.enter_context(mock.patch.object(mx, name, changed))
            yield


def growing(folder):
    life = soak.Growing(0, folder)
    life.append(life.fresh(255))
    return life


def grown(folder):
    life = soak.Growing(0, folder)
    life.append(life.fresh(256))
    return life


def recent(folder):
    life = soak.Recent(0, folder)
    for count in (40, 7):
        life.append(life.fresh(count))
    return life


def rotating(folder):
    life = soak.Rotating(0, folder)
    life.append(life.fresh(70))
    return life


def batch(folder):
    life = soak.Batch(0, folder)
    for length in (5, 30, 12):
        life.admit(life.fresh(length))
    return life


def paged(folder):
    """Two sequences that share a block which both are about to write."""
    life = soak.Paged(0, folder)
    row = life.fresh(12)
    life.admit(row)
    life.join(PagedKVCache(life.pool, [life.cache.tables[0].fork()]), row)
    return life


def first_of_a_pool(folder):
    life = soak.Paged(0, folder)
    life.cache, life.rows = PagedKVCache(life.pool), [[]]
    return life


def rows_of(life):
    return life.rows if hasattr(life, "rows") else [life.row]


def blocks_held(life):
    pool = getattr(life, "pool", None)
    return None if pool is None else pool.allocator.n_free


@pytest.fixture
def switched_on():
    with qs.enabled():
        yield


@pytest.mark.usefixtures("switched_on")
@pytest.mark.parametrize("count", (1, 20))
@pytest.mark.parametrize(
    "make",
    (growing, grown, recent, rotating, batch, paged, first_of_a_pool),
    ids=lambda make: make.__name__,
)
def test_a_step_that_fails_changes_nothing(make, count, tmp_path):
    n, failed = 1, True
    while failed:
        life = make(tmp_path)
        new = [life.fresh(count) for _ in rows_of(life)]
        tokens = life.tokens.of(new)
        mx.eval(tokens)
        free = blocks_held(life)
        failing = Failing(n)
        with failing.planted():
            try:
                life.cache.update_and_fetch(*tokens)
            except MemoryError:
                assert blocks_held(life) == free
        failed = failing.left <= 0
        if failed:
            rows = [row + more for row, more in zip(rows_of(life), new)]
            life.row = rows[0]
            # The next step is as if there had been none before.
            if make is rotating:
                room = life.window - 1
                rows = [life.dropped(rows[0][:-count], len(rows[0]) - count - room)]
                rows[0] += new[0]
            life.attend(life.cache, rows, new)
            life.check()
        n += 1
    assert n > 2, "no call was made"
