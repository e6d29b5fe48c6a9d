"""Finished blocks of a paged cache by their tokens, in memory and in files.

Sequences that begin with the same tokens begin with the same blocks. Blocks that no
sequence holds stay until the pool needs them; with a folder they are then saved, and
found again by this process or a later one.
"""

import contextlib
import hashlib
import json
import logging
import os
import time
import weakref
from array import array
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from .blocks import BlockAllocator, PoolExhausted
from .paged import PagedKVCache, PagedPool
from .persistence import checksum, write_whole
from .spec import Parts

# No block takes so long to write.
DRAFT_SECONDS = 3600

# Of the files; another one is refused.
FILE_VERSION = 1

# The contents of one block in every layer: parts of K and of V, [1, N_kv, size, ...].
Contents = list[tuple[Parts, Parts]]

_log = logging.getLogger(__name__)


class BlockFileError(RuntimeError):
    """A block's file cannot be used; the message says why. Nothing was loaded."""


class PrefixCache:
    """Beginnings of sequences to begin others with, by their tokens.

    It has the methods of mlx-lm's ``LRUPromptCache``, whose place it takes in
    ``mlx_lm.server``. Only whole blocks are kept, each once however many sequences
    have it.

    Args:
        pool (PagedPool): Every layer of the model must have its blocks there.
        folder (path, optional): Blocks are saved there when the pool needs their
          place, and by :meth:`flush`.
        max_file_bytes (int, optional): Of the folder; the files not used for longest
          go first. Default: no limit.
    """

    def __init__(
        self,
        pool: PagedPool,
        folder: str | Path | None = None,
        max_file_bytes: int | None = None,
    ):
        self.pool = pool
        self.files = None if folder is None else BlockFiles(folder, max_file_bytes)
        # Blocks of every layer by what leads to them; the one used longest ago first.
        # A block comes after those that continue it.
        self._blocks: OrderedDict[str, dict[int, int]] = OrderedDict()
        self._descriptions: dict[str, str] = {}
        self._watched: set[int] = set()

    def __len__(self) -> int:
        """Blocks in memory."""
        return len(self._blocks)

    def __del__(self) -> None:
        for blocks in self._blocks.values():
            self._release(blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of these blocks."""
        return len(self) * self.pool.nbytes // self.pool.n_blocks

    def fetch_nearest_cache(
        self, model: Any, tokens: Sequence[int]
    ) -> tuple[list[PagedKVCache] | None, list[int]]:
        """A cache that holds the longest known beginning of ``tokens``.

        Args:
            model (Any): Names the model; its text is part of the blocks' names, with
              a folder the weights are, too.
            tokens (sequence of int): At least the last one is left over.

        Returns:
            tuple(list or None, list): A cache for each layer, or ``None``, and the
            tokens that it does not hold.
        """
        tokens = list(tokens)
        if not self.pool.layers:
            return None, tokens
        found: dict[str, dict[int, int]] = {}
        try:
            for key in self._keys(model, tokens[:-1]):
                if key not in self._blocks and not self._load(key, model):
                    break
                # Held from here on: the next one to load may need blocks.
                self._share(self._blocks[key])
                found[key] = self._blocks[key]
            if not found:
                return None, tokens
            self._touch(list(found))
            return self._caches(list(found.values())), tokens[self._length(found) :]
        finally:
            for blocks in found.values():
                self._release(blocks)

    def insert_cache(
        self,
        model: Any,
        tokens: Sequence[int],
        prompt_cache: Sequence[Any],
        *,
        cache_type: str = "assistant",
    ) -> None:
        """Keep the whole blocks of ``prompt_cache``, which holds ``tokens``.

        Args:
            model (Any): Names the model.
            tokens (sequence of int): From the first one on.
            prompt_cache (sequence): A cache for each layer, of one sequence.
            cache_type (str): Has no effect; every block is kept by its last use.

        Raises:
            ValueError: If a layer's cache is not one of this pool.
        """
        layers = self._layers_of(prompt_cache)
        length = min(len(tokens), *(cache.offset for cache in prompt_cache))
        keys = list(self._keys(model, tokens[:length]))
        for position, key in enumerate(keys):
            if key in self._blocks:
                continue
            blocks = {
                index: cache.tables[0].blocks[position]
                for index, cache in zip(layers, prompt_cache)
            }
            self._keep(key, blocks, model)
        self._touch(keys)

    def flush(self) -> None:
        """Save every block that is not in a file yet.

        Raises:
            OSError: If a file cannot be written; the others are whole.
        """
        for key in self._blocks:
            self._save(key)

    def trim_to(
        self, *, n_sequences: int | None = None, n_bytes: int | None = None
    ) -> None:
        """Drop the blocks used longest ago until so many bytes, or none, are left."""
        if n_sequences == 0:
            n_bytes = 0
        while n_bytes is not None and self._blocks and self.nbytes > max(0, n_bytes):
            self._evict(next(iter(self._blocks)))

    def stats_by_type(self) -> dict[str, dict[str, int]]:
        """As mlx-lm's server logs it; blocks stand for sequences."""
        return {"blocks": {"n_sequences": len(self), "n_bytes": self.nbytes}}

    def _caches(self, found: list[dict[int, int]]) -> list[PagedKVCache]:
        """A cache for each layer, over these blocks."""
        caches = []
        for index, layer in sorted(self.pool.layers.items()):
            table = layer.new_table()
            table.adopt([blocks[index] for blocks in found], self._length(found))
            caches.append(PagedKVCache(layer, [table]))
        return caches

    def _length(self, found: Collection[Any]) -> int:
        return len(found) * self.pool.block_size

    def _layers_of(self, prompt_cache: Sequence[Any]) -> list[int]:
        pools = {id(layer): index for index, layer in self.pool.layers.items()}
        layers = [pools.get(id(getattr(cache, "pool", None))) for cache in prompt_cache]
        single = all(len(getattr(c, "tables", ())) == 1 for c in prompt_cache)
        if None in layers or sorted(layers) != sorted(self.pool.layers) or not single:  # type: ignore[type-var]
            names = sorted({type(cache).__name__ for cache in prompt_cache})
            raise ValueError(
                "[PrefixCache] a PagedKVCache of one sequence in this pool is required "
                f"for every layer; got {', '.join(names)}."
            )
        for index in set(self.pool.layers) - self._watched:
            self._watch(index)
        return layers  # type: ignore[return-value]

    def _watch(self, index: int) -> None:
        """Gives blocks back when the layer has none left."""
        allocator = self.pool.layers[index].allocator
        # The pool must not keep this object, and its blocks, alive.
        this = weakref.ref(self)

        def reclaim(count: int) -> None:
            if (alive := this()) is not None:
                alive._reclaim(allocator, index, count)

        allocator.add_reclaimer(reclaim)
        self._watched.add(index)

    def _reclaim(self, allocator: BlockAllocator, index: int, count: int) -> None:
        wanted = allocator.n_free + count
        for key, blocks in list(self._blocks.items()):
            if allocator.n_free >= wanted:
                return
            # Others hold the rest: dropping those would free nothing.
            if allocator.references(blocks[index]) == 1:
                try:
                    self._save(key)
                except OSError as error:
                    _log.warning("a block was dropped unsaved: %s", str(error))
                self._evict(key)

    def _keep(self, key: str, blocks: dict[int, int], model: Any) -> None:
        self._share(blocks)
        self._blocks[key] = blocks
        self._descriptions[key] = self._description(model)

    def _share(self, blocks: dict[int, int]) -> None:
        for index, block in blocks.items():
            self.pool.layers[index].allocator.share([block])

    def _evict(self, key: str) -> None:
        self._descriptions.pop(key)
        self._release(self._blocks.pop(key))

    def _release(self, blocks: dict[int, int]) -> None:
        for index, block in blocks.items():
            self.pool.layers[index].allocator.release([block])

    def _touch(self, keys: Sequence[str]) -> None:
        for key in reversed(keys):
            self._blocks.move_to_end(key)

    def _save(self, key: str) -> None:
        if self.files is None or key in self.files:
            return
        blocks = self._blocks[key]
        layers = [self.pool.layers[index] for index in sorted(blocks)]
        contents = [
            layer.read([blocks[index]]) for index, layer in zip(sorted(blocks), layers)
        ]
        self.files.save(key, self._descriptions[key], contents)

    def _load(self, key: str, model: Any) -> bool:
        """Whether the block was found in a file and brought into the pool."""
        if self.files is None or key not in self.files:
            return False
        layers = dict(sorted(self.pool.layers.items()))
        tables = []
        try:
            contents = self.files.load(key, self._description(model))
            for index in set(layers) - self._watched:
                self._watch(index)
            for layer, parts in zip(layers.values(), contents, strict=True):
                tables.append(layer.fill(parts, self.pool.block_size))
        except (BlockFileError, PoolExhausted, ValueError) as error:
            _log.warning("the block %s is not loaded: %s", key, str(error))
            return False
        blocks = {index: t.blocks[0] for index, t in zip(layers, tables)}
        self._keep(key, blocks, model)
        return True

    def _description(self, model: Any) -> str:
        """All that blocks depend on but their tokens."""
        return json.dumps(
            {
                "version": FILE_VERSION,
                "model": str(model),
                # A name may stand for other weights when a file is read.
                "weights": None if self.files is None else self.pool.fingerprint(),
                "spec": str(self.pool.spec),
                "block_size": self.pool.block_size,
                "layers": len(self.pool.layers),
            }
        )

    def _keys(self, model: Any, tokens: Sequence[int]) -> Iterator[str]:
        """A name for each whole block, of its tokens and all those before."""
        digest = hashlib.sha256(self._description(model).encode()).digest()
        size = self.pool.block_size
        for end in range(size, len(tokens) + 1, size):
            block = array("q", tokens[end - size : end]).tobytes()
            digest = hashlib.sha256(digest + block).digest()
            yield digest.hex()


class BlockFiles:
    """Blocks in a folder, one file each, whole or not there.

    Args:
        folder (path): Is made if it is not there.
        max_bytes (int, optional): The files not used for longest go beyond it.
    """

    def __init__(self, folder: str | Path, max_bytes: int | None = None):
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_drafts()

    def path(self, key: str) -> Path:
        """Where the block is, or would be."""
        return self.folder / f"{key}.safetensors"

    def __contains__(self, key: str) -> bool:
        return self.path(key).exists()

    def save(self, key: str, description: str, contents: Contents) -> None:
        """Write a block; a reader sees the whole file or none.

        Args:
            key (str): Its name.
            description (str): What :meth:`load` must ask for.
            contents (list): Of each layer.

        Raises:
            OSError: If it cannot be written.
        """
        arrays = {
            f"{layer}.{operand}.{index}": part
            for layer, pair in enumerate(contents)
            for operand, parts in zip("kv", pair)
            for index, part in enumerate(parts)
        }
        digest = checksum(description, arrays)
        metadata = {"description": description, "digest": digest}
        # A block that is lost or cut short is computed anew.
        write_whole(self.path(key), arrays, metadata, lasting=False)
        self._shrink(key)

    def load(self, key: str, description: str) -> Contents:
        """The contents of a block.

        Raises:
            BlockFileError: If the file is not there, damaged, of another version or of
              another cache than ``description`` says.
        """
        path = self.path(key)
        try:
            loaded: Any = mx.load(str(path), return_metadata=True)
            arrays, metadata = loaded
            mx.eval(arrays)
        except (RuntimeError, ValueError, OSError) as error:
            raise BlockFileError(
                f"[BlockFiles] {path} must be a whole safetensors file; got: {error}"
            ) from error
        found = metadata.get("description")
        if found != description:
            raise BlockFileError(
                f"[BlockFiles] {path} must be of {description}; got {found}."
            )
        if metadata.get("digest") != checksum(description, arrays):
            raise BlockFileError(
                f"[BlockFiles] the contents of {path} must have the digest "
                f"{metadata.get('digest')}; got another: the file is damaged."
            )
        os.utime(path)
        return _by_layer(arrays)

    def _remove_drafts(self) -> None:
        """Of processes that ended while they wrote; others' are not as old."""
        for path in self.folder.glob(".*.safetensors"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < time.time() - DRAFT_SECONDS:
                    path.unlink()

    def _shrink(self, newest: str) -> None:
        if self.max_bytes is None:
            return
        files = [(path, path.stat()) for path in self.folder.glob("[!.]*.safetensors")]
        total = sum(stat.st_size for _, stat in files)
        for path, stat in sorted(files, key=lambda file: file[1].st_mtime_ns):
            if total <= self.max_bytes:
                return
            if path != self.path(newest):
                path.unlink(missing_ok=True)
                total -= stat.st_size


def _by_layer(arrays: dict[str, mx.array]) -> Contents:
    contents: dict[int, dict[str, list[mx.array]]] = {}
    for name in sorted(arrays, key=lambda name: name.split(".")):
        layer, operand, _ = name.split(".")
        operands = contents.setdefault(int(layer), {"k": [], "v": []})
        operands[operand].append(arrays[name])
    return [
        (tuple(pair["k"]), tuple(pair["v"])) for _, pair in sorted(contents.items())
    ]
