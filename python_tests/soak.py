"""Long random lives of caches, beside lists of the tokens that they must hold.

A token is a number; its K and V, and those that remain of them after quantizing, stand
in tables. So what attention must answer is known at any time from the lists alone.
"""

import contextlib
import copy
import gc
import random
import sys
import tempfile
from pathlib import Path
from unittest import mock

import mlx.core as mx
import mlx_quantized_sdpa as qs
from mlx_quantized_sdpa.blocks import PoolExhausted
from mlx_quantized_sdpa.cache import (
    PackedKVCache,
    PackedRotatingKVCache,
    has_meta_state,
)
from mlx_quantized_sdpa.paged import BatchPagedKVCache, BlockPool, PagedKVCache
from mlx_quantized_sdpa.persistence import load_prompt_cache, save_prompt_cache
from mlx_quantized_sdpa.spec import CacheSpec

HEADS, KV_HEADS, DIM = 4, 2, 64
SCALE = DIM**-0.5
TOKENS = 1 << 10
# Of outputs of size about one; a wrong or missing token moves them by 1e-2 and more.
TOLERANCE = 2e-3
# Sequences of a batch.
ROWS = 5


class Tokens:
    """K and V of every token, as they are and as a format keeps them."""

    def __init__(self, spec):
        parsed = CacheSpec.parse(spec)
        mx.random.seed(7)
        shape = (KV_HEADS, TOKENS, DIM)
        self.raw = [mx.random.normal(shape) for _ in "kv"]
        formats = [x.for_head_dim(DIM) for x in (parsed.k, parsed.v)]
        self.kept = [
            made.dequantize(made.quantize(x[None]), mx.float32)[0]
            for made, x in zip(formats, self.raw)
        ]
        self.queries = mx.random.normal((HEADS, TOKENS, DIM))
        mx.eval(self.raw, self.kept, self.queries)

    def of(self, rows):
        """K and V ``[B, N_kv, T, D]`` of equally many tokens a row."""
        numbers = mx.array(rows)
        return [mx.take(x, numbers, axis=1).swapaxes(0, 1) for x in self.raw]

    def queries_of(self, rows):
        return mx.take(self.queries, mx.array(rows), axis=1).swapaxes(0, 1)


def visible(count, total, window):
    """Which of `total` tokens the `count` newest see."""
    key, query = mx.arange(total), mx.arange(total - count, total)[:, None]
    mask = key <= query
    return mask if window is None else mask & (key > query - window)


class Life:
    """A cache and the numbers of the tokens that it must hold."""

    spec = "q8"
    window = None

    def __init__(self, seed, folder):
        self.rng = random.Random(seed)
        self.file = Path(folder) / f"{type(self).__name__}.safetensors"
        self.tokens = Tokens(self.spec)
        self.newest = None
        self.start()

    def start(self):
        raise NotImplementedError

    def fresh(self, count):
        return [self.rng.randrange(TOKENS) for _ in range(count)]

    def attend(self, cache, rows, new):
        """Append a row of new tokens to each sequence; `rows` hold them already."""
        count = len(new[0])
        mask = cache.make_mask(count)
        keys, _ = cache.update_and_fetch(*self.tokens.of(new))
        q = self.tokens.queries_of(new)
        out = keys.reading.attend(q, SCALE, mask)
        mx.eval(out)
        self.newest = q, out, [list(row) for row in rows], count

    def check(self):
        """The newest answer is that of dense attention over the lists."""
        q, out, rows, count = self.newest
        for b, row in enumerate(rows):
            numbers = mx.array(row)
            k, v = (mx.take(x, numbers, axis=1)[None] for x in self.tokens.kept)
            wanted = mx.fast.scaled_dot_product_attention(
                q[b : b + 1],
                *(k, v),
                scale=SCALE,
                mask=visible(count, len(row), self.window),
            )
            error = mx.abs(out[b : b + 1] - wanted).max().item()
            # Not the other way round: NaN is wrong too.
            assert error <= TOLERANCE, f"{type(self).__name__}, row {b}: off by {error}"

    def idle(self):
        """Give back all that the sequences hold."""
        self.newest = None
        self.start()


class Growing(Life):
    spec = "k8v4"
    longest = 600

    def start(self):
        self.cache, self.row = self.make(), []

    def make(self):
        return PackedKVCache(self.spec)

    def step(self):
        act = self.rng.random()
        if len(self.row) > self.longest:
            self.start()
        elif act < 0.03:
            self.trim(self.rng.randint(1, 30))
        elif act < 0.04:
            self.cache = copy.deepcopy(self.cache)
        elif act < 0.045 and self.row:
            save_prompt_cache(self.file, [self.cache])
            (self.cache,) = load_prompt_cache(self.file)
        count = self.rng.randint(2, 60) if act > 0.97 else 1
        self.append(self.fresh(count))

    def trim(self, count):
        count = self.cache.trim(count)
        self.row = self.row[: len(self.row) - count]

    def append(self, new):
        self.row += new
        self.attend(self.cache, [self.row], [new])


class Recent(Growing):
    spec = "k8v4+recent16"

    def check(self):
        """As the others, with the dense tokens of the tail as they came."""
        kept, tail = self.tokens.kept, self.cache.tail
        spoilt = [mx.array(x) for x in kept]
        numbers = mx.array(self.row)
        quantized = len(self.row) - (tail[0].shape[2] if tail else 0)
        # A number may stand for both kinds of token: then nothing is known of it.
        if set(self.row[:quantized]) & set(self.row[quantized:]):
            return
        for x, raw in zip(spoilt, self.tokens.raw):
            x[:, numbers[quantized:]] = raw[:, numbers[quantized:]]
        self.tokens.kept = spoilt
        try:
            super().check()
        finally:
            self.tokens.kept = kept


class Rotating(Growing):
    spec = "turbo4"
    window, keep = 40, 4

    def make(self):
        self.seen = 0
        return PackedRotatingKVCache(self.spec, self.window, self.keep)

    def trim(self, count):
        if self.cache.is_trimmable():
            count = self.cache.trim(count)
            self.row = self.row[: len(self.row) - count]
            self.seen -= count

    def append(self, new):
        # Several tokens come behind as many as their first one sees.
        room = self.window - 1
        self.row = self.dropped(self.row, len(self.row) - room) + new
        self.seen += len(new)
        self.attend(self.cache, [self.row], [new])

    def dropped(self, row, count):
        return row if count <= 0 else row[: self.keep] + row[self.keep + count :]

    def step(self):
        super().step()
        if self.seen > 10 * self.window:
            self.start()


class Batch(Life):
    """Sequences that are admitted, forked, evicted and trimmed together."""

    spec = "mxfp8"
    longest = 400

    def start(self):
        self.cache, self.rows = None, []

    def single(self):
        return PackedKVCache(self.spec)

    def step(self):
        act = self.rng.random()
        if not self.rows or (act < 0.02 and len(self.rows) < ROWS):
            self.admit(self.fresh(self.rng.randint(1, 40)))
        elif act < 0.03 and len(self.rows) < ROWS:
            self.fork(self.rng.randrange(len(self.rows)))
        elif act < 0.05 and len(self.rows) > 1:
            self.evict()
        elif act < 0.06:
            self.trim(self.rng.randint(1, 5))
        elif act < 0.065:
            self.restore()
        self.keep([i for i, row in enumerate(self.rows) if len(row) < self.longest])
        if self.rows:
            new = [self.fresh(1) for _ in self.rows]
            self.rows = [row + more for row, more in zip(self.rows, new)]
            self.append(new)

    def append(self, new):
        self.attend(self.cache, self.rows, new)

    def admit(self, row):
        cache = self.single()
        for begin in range(0, len(row), 16):
            cache.update_and_fetch(*self.tokens.of([row[begin : begin + 16]]))
        self.join(cache, row)

    def join(self, cache, row):
        more = cache.merge([cache])
        if self.cache is None:
            self.cache = more
        else:
            self.cache.extend(more)
        self.rows.append(list(row))

    def fork(self, index):
        self.join(self.cache.extract(index), self.rows[index])

    def evict(self):
        count = self.rng.randint(1, len(self.rows) - 1)
        self.keep(self.rng.sample(range(len(self.rows)), count))

    def keep(self, chosen):
        if not chosen:
            self.start()
        elif chosen != list(range(len(self.rows))):
            self.cache.filter(chosen)
            self.rows = [self.rows[i] for i in chosen]

    def trim(self, count):
        count = min(count, *map(len, self.rows), min(map(len, self.rows)) - 1)
        if count > 0 and self.cache.is_trimmable():
            self.cache.trim(count)
            self.rows = [row[: len(row) - count] for row in self.rows]

    def restore(self):
        save_prompt_cache(self.file, [self.cache])
        (self.cache,) = load_prompt_cache(self.file)


class BatchOfNewest(Batch):
    spec = "q8"
    window = 24
    longest = 200

    def single(self):
        return PackedRotatingKVCache(self.spec, self.window)

    def append(self, new):
        self.attend(self.cache, [row[-self.window :] for row in self.rows], new)


class Paged(Batch):
    """As a batch, in a pool too small for all of them at their longest."""

    spec = "k8v4"
    block, blocks = 8, 40

    def __init__(self, seed, folder):
        parsed = CacheSpec.parse(self.spec)
        self.pool = BlockPool((parsed.k, parsed.v), self.blocks, self.block)
        self.refused = 0
        super().__init__(seed, folder)

    def single(self):
        return PagedKVCache(self.pool)

    def attempt(self, act):
        """`act`, after evicting as many as it takes."""
        while True:
            free = self.pool.allocator.n_free
            try:
                return act()
            except PoolExhausted:
                self.refused += 1
            assert self.pool.allocator.n_free == free, "a refused call took blocks"
            if not self.rows:
                return None
            longest = max(range(len(self.rows)), key=lambda i: len(self.rows[i]))
            self.keep([i for i in range(len(self.rows)) if i != longest])

    def admit(self, row):
        self.attempt(lambda: super(Paged, self).admit(row))

    def fork(self, index):
        """A beginning of a sequence, of any length."""
        length = self.rng.randint(1, len(self.rows[index]))
        table = self.cache.tables[index].fork(length)
        self.join(PagedKVCache(self.pool, [table]), self.rows[index][:length])

    def append(self, new):
        before = [row[:-1] for row in self.rows]

        def act():
            if not self.rows:
                return
            rows = [row + [self.rng.randrange(TOKENS)] for row in self.rows]
            new = [row[-1:] for row in rows]
            self.attend(self.cache, rows, new)
            self.rows = rows

        self.rows = before
        self.attempt(act)

    def restore(self):
        """One sequence leaves the pool and comes back from its state."""
        index = self.rng.randrange(len(self.rows))
        row, saved = self.rows[index], self.cache.extract(index)
        state = [saved.state, *([saved.meta_state] if has_meta_state() else [])]
        loaded = PagedKVCache.from_state(*state)
        left = [i for i in range(len(self.rows)) if i != index]
        del saved, state
        self.keep(left)
        more = BatchPagedKVCache(self.pool, [])
        self.attempt(lambda: more.extend(BatchPagedKVCache.merge([loaded])))
        if not more.tables:
            return
        if self.cache is None:
            self.cache = more
        else:
            self.cache.extend(more)
        self.rows.append(row)

    def idle(self):
        super().idle()
        gc.collect()
        # What waits to be written holds its values.
        mx.eval(self.pool.parts)
        free = self.pool.allocator.n_free
        assert free == self.blocks, f"{self.blocks - free} blocks are still held"


LIVES = (Growing, Recent, Rotating, Batch, BatchOfNewest, Paged)


@contextlib.contextmanager
def exact_memory():
    """MLX gives a larger buffer out again where it has one, and counts that size."""
    limit = mx.set_cache_limit(0)
    try:
        yield
    finally:
        mx.set_cache_limit(limit)


@contextlib.contextmanager
def short_prefixes(keys=1):
    """Beginnings are read once for several sequences from so many keys on."""
    name = "_LEAST_SHARED_KEYS"
    with contextlib.ExitStack() as stack:
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").startswith("mlx_quantized_sdpa"):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, keys))
        yield


class Soak:
    """The lives by turns of `every` steps each, and memory counted after each turn.

    Args:
        folder (path): Where caches are saved.
        every (int): Steps of a life in a turn.
        seed (int): Of the first life; the next has the next.
        lives (sequence): Their classes.
        check_every (int): Steps between answers that are compared.

    Attributes:
        counts (dict): Steps of each life so far.
        checks (int): Answers compared so far.
        flat (int): Bytes in use once all sequences are gone.
    """

    def __init__(self, folder, every=1000, seed=0, lives=LIVES, check_every=1000):
        self.every = every
        self.check_every = check_every
        self.lives = [kind(seed + i, folder) for i, kind in enumerate(lives)]
        self.counts = {kind.__name__: 0 for kind in lives}
        self.checks = 0
        self.flat = None

    @property
    def steps(self):
        return sum(self.counts.values())

    @property
    def refused(self):
        """Calls that a full pool refused and that worked after an eviction."""
        return sum(getattr(life, "refused", 0) for life in self.lives)

    def turn(self):
        """`every` steps of each life.

        Raises:
            AssertionError: If an answer is wrong, or the bytes or blocks in use once
              all sequences are gone are not those of the first time.
        """
        for life in self.lives:
            for step in range(1, self.every + 1):
                life.step()
                if step % self.check_every == 0 and life.newest is not None:
                    life.check()
                    self.checks += 1
            self.counts[type(life).__name__] += self.every
        for life in self.lives:
            life.idle()
        gc.collect()
        mx.synchronize()
        active = mx.get_active_memory()
        self.flat = active if self.flat is None else self.flat
        assert active == self.flat, f"{active - self.flat} bytes more are in use"


def run(steps, every=1000, report=lambda soak: None, **options):
    """A Soak of at least so many steps, told to `report` after each turn."""
    with (
        tempfile.TemporaryDirectory() as folder,
        exact_memory(),
        short_prefixes(),
        qs.enabled(),
    ):
        soak = Soak(folder, every, **options)
        while soak.steps < steps:
            soak.turn()
            report(soak)
    return soak
