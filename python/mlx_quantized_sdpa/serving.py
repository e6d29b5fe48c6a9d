"""Continuous batching over one pool of blocks, in mlx-lm's generator and its server."""

import contextlib
import copy
import functools
import inspect
import itertools
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
from mlx_lm import server
from mlx_lm.generate import BatchGenerator, GenerationBatch
from mlx_lm.models import cache as lm_cache
from mlx_lm.models.cache import (
    LRUPromptCache,
    can_trim_prompt_cache,
    trim_prompt_cache,
)

from . import hook
from .blocks import BlockAllocator, BlockTable, PoolExhausted, blocks_for
from .paged import BatchPagedKVCache, BlockPool, PagedKVCache, PagedPool
from .prefix_cache import PrefixCache

_log = logging.getLogger(__name__)

# Before mlx-lm 0.32 a batch has state machines, and its matchers are plain states.
_STATES = "state_machines" in inspect.signature(BatchGenerator.insert).parameters
_STOPS = "state_machines" if _STATES else "stop_sequences"
_MATCHERS = "_matcher_states" if _STATES else "_matchers"

# What mlx-lm's insert_segments takes after the segments, in its order.
_INSERTED = (
    "max_tokens",
    "caches",
    "all_tokens",
    "samplers",
    "logits_processors",
    _STOPS,
)


class PagedBatchGenerator(BatchGenerator):
    """mlx-lm's ``BatchGenerator`` that never runs out of blocks in a step.

    A request waits until the pool has blocks for its whole prompt beside those of the
    requests before it. Where the running ones then need more than there are, the newest
    gives its blocks back and is computed anew later; its text goes on where it was:
    however many come, the oldest goes on. One that runs alone and finds no more blocks
    ends there with the reason ``"length"``. The cache in a response is there until the
    next step.

    Args:
        model (nn.Module): The model.
        pool (PagedPool): The blocks.
        **arguments: As mlx-lm's class takes them.
    """

    def __init__(self, model: Any, *, pool: PagedPool, **arguments: Any):
        super().__init__(model, **arguments)
        self.pool = pool
        # From here on the pool knows which layers have blocks.
        pool.make_prompt_cache(model)
        # Of preempted sequences: how much of a stop sequence they have written.
        self._stopping: dict[int, Any] = {}
        self._returned: list[Any] = []

    def insert_segments(self, segments: Any, *rest: Any, **keywords: Any) -> list[int]:
        """As mlx-lm's method; a cache that holds tokens must come with them.

        Raises:
            PoolExhausted: If a prompt needs more blocks than the whole pool has.
            ValueError: If ``all_tokens`` are not those of the caches, or a cache from a
              file has other formats than the pool.
        """
        keywords |= dict(zip(_INSERTED, rest))
        caches = keywords.get("caches") or [None] * len(segments)
        known = keywords.get("all_tokens") or [[]] * len(segments)
        for segment, cache, tokens in zip(segments, caches, known):
            held = _held(cache or ())
            # Without them its text could not be computed anew.
            if held != len(tokens) and held:
                raise ValueError(
                    "[PagedBatchGenerator] all_tokens must have the tokens that each "
                    f"cache holds; got {len(tokens)} for {held}."
                )
            check_fits(self.pool, held + sum(map(len, segment)))
            for layer, theirs in self._foreign(cache or ()):
                layer.take_formats(theirs.pool)
        keywords["caches"] = [
            self.pool.make_prompt_cache(self.model) if cache is None else cache
            for cache in caches
        ]
        uids: list[int] = super().insert_segments(segments, **keywords)
        return uids

    def remove(self, uids: Any, *rest: Any, **keywords: Any) -> Any:
        """As mlx-lm's method."""
        uids = list(uids)
        for uid in uids:
            self._stopping.pop(uid, None)
        parent: Any = super()
        return parent.remove(uids, *rest, **keywords)

    def _make_batch(self, n: int) -> Any:
        admitted = 0
        alone = not len(self._prompt_batch) and not len(self._generation_batch)
        for first in range(1, n + 1):
            needed = functools.partial(self._needed_with, first)
            if alone and first == 1 and not self._has(needed):
                self._forget_beginnings(1)
            if not self._has(needed):
                break
            admitted = first
        for index in range(admitted):
            cache = self._unprocessed_sequences[index][3]
            for layer, theirs in self._foreign(cache):
                theirs.move_to(layer)
        return super()._make_batch(admitted)

    def _foreign(self, caches: Iterable[Any]) -> list[tuple[BlockPool, PagedKVCache]]:
        """Layers of the pool, and what is to be brought there from elsewhere."""
        return [
            (self.pool.layers[index], cache)
            for index, cache in enumerate(caches)
            if isinstance(cache, PagedKVCache)
            and cache.offset
            and cache.pool is not self.pool.layers.get(index)
        ]

    def _needed_with(self, first: int) -> int:
        """Blocks for the next tokens and all prompts, with the first that wait."""
        needed = self._needed(whole=True)
        for _, segments, _, cache, *_ in itertools.islice(
            self._unprocessed_sequences, first
        ):
            needed += _needed(_row(cache, 0), sum(map(len, segments)), self.pool)
        return needed

    def _forget_beginnings(self, first: int) -> bool:
        """Those that wait, from ``first`` on, give back the blocks they began with.

        Returns:
            bool: Whether any had begun.
        """
        found = False
        for index in range(first, len(self._unprocessed_sequences)):
            uid, segments, count, _, known, *rest = self._unprocessed_sequences[index]
            if known:
                found = True
                segments = [[*known, *segments[0]], *segments[1:]]
                if len(segments) == 1:
                    segments = [segments[0][:-1], segments[0][-1:]]
                cache = self.pool.make_prompt_cache(self.model)
                waiting = (uid, segments, count, cache, [], *rest)
                self._unprocessed_sequences[index] = waiting
        return found

    def _next(self) -> Any:
        for each in self._returned:
            if (response := each()) is not None:
                response.prompt_cache = None
        finished = self._make_room()
        own: Any = super()
        prompts, generated = own._next()
        generated = finished + generated
        self._returned = [weakref.ref(response) for response in generated]
        if not prompts and not generated and self._unprocessed_sequences:
            self._require_for_next()
        for index, uid in enumerate(self._generation_batch.uids):
            if uid in self._stopping:
                matchers = getattr(self._generation_batch, _MATCHERS)
                matchers[index] = self._stopping.pop(uid)
        return prompts, generated

    def _require_for_next(self) -> None:
        """Nothing runs, and nothing could begin: others hold the blocks."""
        _, segments, _, cache, *_ = self._unprocessed_sequences[0]
        count = sum(map(len, segments))
        self.pool.require(_needed(_row(cache, 0), count, self.pool))

    def _make_room(self) -> list[Any]:
        """Preempts until the next step fits; responses of what had to end."""
        while not self._has(self._needed):
            if len(self._prompt_batch) + len(self._generation_batch) > 1:
                self._preempt()
            elif self._forget_beginnings(0):
                continue
            elif len(self._generation_batch):
                return [self._end()]
            else:
                self.pool.require(self._needed())
        return []

    def _has(self, needed: Callable[[], int]) -> bool:
        """Whether there are as many blocks as ``needed`` says."""
        while True:
            count = needed()
            try:
                self.pool.require(count)
                return True
            except PoolExhausted:
                # What was given back meanwhile may have been shared with them.
                if needed() == count:
                    return False

    def _needed(self, whole: bool = False) -> int:
        """Blocks that the next step takes at most, or ``whole`` prompts at work do."""
        generation, prompt = self._generation_batch, self._prompt_batch
        needed = sum(
            _needed(_row(generation.prompt_cache, row), 1, self.pool)
            for row in range(len(generation))
        )
        for row, (segments, *_) in enumerate(self._currently_processing):
            count = min(len(segments[0]), self.prefill_step_size)
            if whole:
                count = sum(map(len, segments))
            needed += _needed(_row(prompt.prompt_cache, row), count, self.pool)
        return needed

    def _preempt(self) -> None:
        """The newest sequence goes back to the queue, with all it has so far."""
        prompts, texts = self._prompt_batch.uids, self._generation_batch.uids
        # Ids are given in the order of the requests.
        newest = max([*prompts, *texts])
        if newest in prompts:
            waiting = self._preempt_prompt(prompts.index(newest))
        else:
            waiting = self._preempt_generation(texts.index(newest))
        _log.info("request %d waits for blocks", waiting[0])
        self._unprocessed_sequences.appendleft(waiting)

    def _preempt_prompt(self, row: int) -> tuple[Any, ...]:
        batch = self._prompt_batch
        segments = self._currently_processing.pop(row)[0]
        done = batch.tokens[row]
        if done:
            joined = [[*done, *segments[0]], *segments[1:]]
            # The last token alone begins the generation.
            segments = joined if len(segments) > 1 else [joined[0][:-1], joined[0][-1:]]
        waiting = self._waiting(batch, row, segments, batch.max_tokens[row])
        batch.filter([i for i in range(len(batch)) if i != row])
        return waiting

    def _preempt_generation(self, row: int) -> tuple[Any, ...]:
        batch = self._generation_batch
        tokens = batch.tokens[row]
        left = batch.max_tokens[row] - batch._num_tokens[row]
        self._stopping[batch.uids[row]] = getattr(batch, _MATCHERS)[row]
        waiting = self._waiting(batch, row, [tokens[:-1], tokens[-1:]], left)
        batch.filter([i for i in range(len(batch)) if i != row])
        return waiting

    def _waiting(
        self, batch: Any, row: int, segments: list[list[int]], max_tokens: int
    ) -> tuple[Any, ...]:
        return (
            batch.uids[row],
            [segment for segment in segments if segment],
            max_tokens,
            self.pool.make_prompt_cache(self.model),
            [],
            batch.samplers[row],
            batch.logits_processors[row],
            getattr(batch, _STOPS)[row],
        )

    def _end(self) -> Any:
        """Ends the only sequence with the token that it has chosen last."""
        batch = self._generation_batch
        token = batch._next_tokens[0].item()
        stops, found = _advance(batch, 0, token)
        response = GenerationBatch.Response(
            uid=batch.uids[0],
            token=token,
            logprobs=batch._next_logprobs[0],
            finish_reason="stop" if stops else "length",
            prompt_cache=batch.extract_cache(0),
            all_tokens=batch.tokens[0],
            **found,
        )
        batch.filter([])
        return response


def _advance(batch: Any, row: int, token: int) -> tuple[bool, dict[str, Any]]:
    """Whether a token ends the text, and what else mlx-lm's response says of it."""
    matcher = getattr(batch, _MATCHERS)[row]
    if not _STATES:
        return matcher.advance(token), {}
    _, sequence, state = batch.state_machines[row].match(matcher, token)
    found = {"current_state": state, "match_sequence": sequence}
    return sequence is not None and state is None, found


def check_fits(pool: PagedPool, tokens: int) -> None:
    """Refuse a prompt that the pool cannot hold even if it is empty.

    Raises:
        PoolExhausted: If it cannot.
    """
    if not pool.layers:
        return
    # One more: the first token of the answer.
    wanted = blocks_for(tokens + 1, pool.block_size)
    if wanted > pool.n_blocks:
        raise PoolExhausted(
            f"[paged cache] a prompt of at most {pool.n_blocks * pool.block_size - 1} "
            f"tokens is required; got {tokens}. Make a larger pool."
        )


def _held(caches: Iterable[Any]) -> int:
    """Tokens that the layers with blocks hold, of one sequence."""
    return next((c.offset for c in caches if isinstance(c, PagedKVCache)), 0)


def _row(caches: list[Any], row: int) -> BlockTable | None:
    """The blocks of one sequence in the first layer that has any."""
    for cache in caches:
        if isinstance(cache, PagedKVCache | BatchPagedKVCache) and cache.tables:
            return cache.tables[row]
    return None


def _needed(table: BlockTable | None, count: int, pool: PagedPool) -> int:
    """Blocks for ``count`` more tokens, and to part with others at the last block."""
    if table is None:
        return blocks_for(count, pool.block_size)
    own = [layer.allocator for layer in pool.layers.values()]
    if own and not any(table.allocator is each for each in own):
        # Loaded from a file: all of it must find a place.
        return blocks_for(table.length + count, pool.block_size)
    new = blocks_for(table.length + count, table.block_size) - len(table.blocks)
    shared = table.room and table.allocator.references(table.blocks[-1]) > 1
    return new + bool(shared)


class KnownPrompts(LRUPromptCache):
    """mlx-lm's prompt cache, that always leaves a token for the next request.

    Of a prompt that it holds to its last token mlx-lm's leaves none, at which the
    server's only thread ends. After speculative decoding the caches may lack the last
    token, and the draft's another one: mlx-lm's would begin behind what is missing.
    """

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> Any:
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if cache is None or rest:
            return cache, rest
        if not can_trim_prompt_cache(cache):
            return None, tokens
        trim_prompt_cache(cache, 1)
        return cache, tokens[-1:]

    def insert_cache(
        self, model: Any, tokens: list[int], prompt_cache: list[Any], **others: Any
    ) -> None:
        # Its own: speculative decoding that ends late still trims what it was given.
        prompt_cache = copy.deepcopy(prompt_cache)
        length = _align(prompt_cache, len(tokens))
        if length:
            super().insert_cache(model, tokens[:length], prompt_cache, **others)


def _align(caches: list[Any], length: int) -> int:
    """Trims every layer to the tokens that all have, at most ``length``.

    Returns:
        int: How many those are, or 0 where a layer cannot be trimmed.
    """
    offsets = [getattr(cache, "offset", None) for cache in caches]
    # A layer without any is not in use.
    used = [offset for offset in offsets if isinstance(offset, int) and offset]
    length = min([length, *used])
    if all(offset == length for offset in used):
        return length
    if None in offsets or not can_trim_prompt_cache(caches):
        return 0
    for cache, offset in zip(caches, offsets):
        cache.trim((offset or length) - length)
    return length


class _WholeCaches(KnownPrompts):
    """Known prompts by whole caches, of which some layers have blocks.

    Those used longest ago give their blocks back when the pool has none left.
    """

    def watch(self, pool: PagedPool) -> None:
        """Give way to what needs blocks of ``pool``."""
        for layer in pool.layers.values():
            # The pool must not keep this object, and its caches, alive.
            reclaim = functools.partial(_drop, weakref.ref(self), layer.allocator)
            layer.allocator.add_reclaimer(reclaim)


def _drop(
    known: "weakref.ref[_WholeCaches]", allocator: BlockAllocator, count: int
) -> None:
    wanted, this = allocator.n_free + count, known()
    while this is not None and len(this) and allocator.n_free < wanted:
        this.trim_to(n_sequences=len(this) - 1)


@contextlib.contextmanager
def growing_server() -> Iterator[None]:
    """Within it, ``mlx_lm.server`` survives prompts that it knows to the end.

    A model whose caches cannot be as they are wanted is refused when it is loaded.
    """
    provider = server.ModelProvider
    own: Callable[..., None] = provider._load

    def load(this: Any, *arguments: Any, **keywords: Any) -> None:
        own(this, *arguments, **keywords)
        _require_caches(this, lm_cache.make_prompt_cache)

    with (
        mock.patch.object(server, "LRUPromptCache", KnownPrompts),
        mock.patch.object(provider, "_load", load),
    ):
        yield


def _require_caches(provider: Any, make: Callable[[Any], list[Any]]) -> None:
    """Refuse the models that a server has loaded if their caches hold no token.

    In a request the error would end the server's only thread.

    Raises:
        ValueError: As the cache does.
    """
    for model in (provider.model, provider.draft_model):
        if model is not None:
            try:
                # Nothing is computed: what formats cannot hold shows before.
                model(mx.array([[0]]), cache=make(model))
            except ValueError:
                provider.reset()
                raise


@contextlib.contextmanager
def paged_server(
    make_pool: Callable[[], PagedPool],
    folder: str | Path | None = None,
    max_file_bytes: int | None = None,
) -> Iterator[None]:
    """Within it, ``mlx_lm.server`` keeps every cache in a pool of blocks.

    Each model that the server loads has a pool of its own, until another is loaded.
    Prompts share the blocks of the beginnings that they have in common. Of a model
    with other layers, and with a draft model, whose caches are beside the pool, whole
    caches are known instead, as many as the server keeps without a pool.

    A request that is not batched, such as one with a seed, runs alone. Its answer is
    at most as long as fits.

    Args:
        make_pool (callable): Makes a pool.
        folder (path, optional): Where blocks are saved that the pool needs for others;
          see :class:`.PrefixCache`.
        max_file_bytes (int, optional): Of the folder. Default: no limit.
    """
    state = _Server(make_pool, folder, max_file_bytes)
    generator, provider = server.ResponseGenerator, server.ModelProvider
    with contextlib.ExitStack() as stack:
        for owner, name, ours in (
            (server, "BatchGenerator", state.make_generator),
            (server, "LRUPromptCache", state.limited),
            (server, "make_prompt_cache", state.make_prompt_cache),
            (generator, "_tokenize", state.tokenize(generator._tokenize)),
            (generator, "_serve_single", state.serve_single(generator._serve_single)),
            (provider, "_load", state.load(provider._load)),
        ):
            stack.enter_context(mock.patch.object(owner, name, ours))
        yield


class _ServerGenerator(PagedBatchGenerator):
    """Takes the caches over: the server's loop holds on to the last one it had."""

    def insert_segments(self, segments: Any, *rest: Any, **keywords: Any) -> list[int]:
        keywords |= dict(zip(_INSERTED, rest))
        given = keywords.get("caches")
        keywords["caches"] = copy.deepcopy(given)
        for cache in given or ():
            _give_back(cache or ())
        return super().insert_segments(segments, **keywords)


class _Server:
    """The server's prompt cache, of whichever model it serves."""

    def __init__(
        self,
        make_pool: Callable[[], PagedPool],
        folder: str | Path | None,
        max_file_bytes: int | None = None,
    ):
        self.make_pool = make_pool
        self.folder, self.max_file_bytes = folder, max_file_bytes
        # Of the caches that are known as a whole.
        self.limits: tuple[Any, ...] = ()
        # The caches of the request that is served alone.
        self.lent: list[Any] | None = None
        self.forget()

    def forget(self) -> None:
        """Holds nothing any more of the model that was served."""
        self.model: Callable[[], Any] = lambda: None
        self.pool: PagedPool | None = None
        self.prefixes: PrefixCache | None = None
        self.whole = _WholeCaches(*self.limits)

    def limited(self, *limits: Any) -> "_Server":
        """Stands for mlx-lm's class of prompt caches."""
        self.limits = limits
        self.whole = _WholeCaches(*limits)
        return self

    def serve(self, model: Any) -> PagedPool:
        """The pool of the model, which is made when it is first asked for."""
        if self.pool is None or self.model() is not model:
            self.forget()
            self.model, self.pool = weakref.ref(model), self.make_pool()
            self.prefixes = PrefixCache(self.pool, self.folder, self.max_file_bytes)
            self.pool.make_prompt_cache(model)
            self.whole.watch(self.pool)
        return self.pool

    def make_prompt_cache(
        self, model: Any, max_kv_size: int | None = None
    ) -> list[Any]:
        """A cache in the pool, or of a draft model one beside it."""
        served = self.model()
        if served is None or served is model:
            return self._lend(self.serve(model).make_prompt_cache(model))
        assert self.pool is not None
        return hook.make_prompt_cache(model, self.pool.spec)

    def make_generator(self, model: Any, **arguments: Any) -> PagedBatchGenerator:
        return _ServerGenerator(model, pool=self.serve(model), **arguments)

    def load(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """The server's own, for which the model before and its pool are gone."""

        def make(model: Any) -> list[Any]:
            assert self.pool is not None
            return hook.make_prompt_cache(model, self.pool.spec)

        def load(provider: Any, *arguments: Any, **keywords: Any) -> None:
            self.forget()
            own(provider, *arguments, **keywords)
            if provider.model is not None:
                self.serve(provider.model)
            _require_caches(provider, make)

        return load

    def tokenize(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """The server's own, that refuses what will never fit while it still can."""

        def checked(generator: Any, tokenizer: Any, request: Any, args: Any) -> Any:
            found = own(generator, tokenizer, request, args)
            pool, count = self.serve(generator.model_provider.model), len(found[0])
            check_fits(pool, count)
            if self.lent is not None and pool.layers:
                most = pool.n_blocks * pool.block_size - count
                args.max_tokens = min(args.max_tokens, most)
            return found

        return checked

    def serve_single(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """The server's own, after which no cache of the request holds blocks.

        An error that it hands on would keep them.
        """

        def served(generator: Any, *arguments: Any) -> Any:
            self.lent = []
            try:
                return own(generator, *arguments)
            finally:
                _give_back(self.lent)
                self.lent = None

        return served

    def _lend(self, cache: list[Any]) -> list[Any]:
        if self.lent is not None:
            self.lent += cache
        return cache

    # What the server asks of its prompt cache.
    def _known(self) -> list[Any]:
        return [self.whole] if self.prefixes is None else [self.prefixes, self.whole]

    def __len__(self) -> int:
        return sum(map(len, self._known()))

    @property
    def nbytes(self) -> int:
        return sum(known.nbytes for known in self._known())

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> Any:
        for known in self._known():
            cache, rest = known.fetch_nearest_cache(model, tokens)
            if cache is not None:
                return self._lend(cache), rest
        return None, tokens

    def insert_cache(self, model: Any, tokens: Any, cache: Any, **others: Any) -> None:
        """Keeps what it can of ``cache``, which holds no blocks afterwards."""
        if self.prefixes is not None and _all_paged(cache):
            self.prefixes.insert_cache(model, tokens, cache, **others)
        else:
            kept = [c.copy() if isinstance(c, PagedKVCache) else c for c in cache]
            self.whole.insert_cache(model, tokens, kept, **others)
        _give_back(cache)

    def trim_to(self, **limits: Any) -> None:
        for known in self._known():
            known.trim_to(**limits)

    def stats_by_type(self) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = {}
        for known in self._known():
            found |= known.stats_by_type()
        return found


def _give_back(cache: Iterable[Any]) -> None:
    """Empty what holds blocks, so that who still has it does not hold them."""
    for layer in cache:
        if isinstance(layer, PagedKVCache):
            layer.trim(layer.offset)


def _all_paged(cache: list[Any]) -> bool:
    return all(isinstance(layer, PagedKVCache) for layer in cache)
