"""Prompt caches in files: checked when read, and written whole or not at all."""

import hashlib
import importlib
import json
import os
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from .cache import STATE_VERSION, PackedCache
from .conversion import cache_types
from .paged import PagedKVCache

_MARK = "mlx_quantized_sdpa"
_CHECKSUM = f"{_MARK}.checksum"
_NAME = "load_prompt_cache"
# Words that are summed at a time, so that their copies take little memory.
_WORDS = 1 << 22


def save_prompt_cache(
    file_name: str | Path,
    cache: list[Any],
    metadata: dict[str, str] | None = None,
    model: Any = None,
) -> None:
    """Save the caches of a model's layers; the file changes only once all is written.

    Args:
        file_name (str): ``.safetensors`` is added where it does not end so.
        cache (list): Caches, quantized or of mlx-lm.
        metadata (dict, optional): Texts to save with them.
        model (Module, optional): Whose caches they are, so that a load that names
          another model is refused.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If a cache has a state that cannot be saved.
    """
    arrays: dict[str, mx.array] = {}
    layers = [_describe(c, f"{i}", arrays) for i, c in enumerate(cache)]
    described = {
        "version": STATE_VERSION,
        "layers": layers,
        "metadata": dict(metadata or {}),
        "model": None if model is None else fingerprint(model),
    }
    # A file must have an array.
    arrays = arrays or {"empty": mx.zeros((1,))}
    text = json.dumps(described)
    texts = {_MARK: text, _CHECKSUM: checksum(text, arrays)}
    path = Path(file_name)
    if path.suffix != ".safetensors":
        # As mx.save_safetensors calls it, and the only name that mx.load takes.
        path = path.with_name(f"{path.name}.safetensors")
    write_whole(path, arrays, texts)


def load_prompt_cache(
    file_name: str | Path, return_metadata: bool = False, model: Any = None
) -> Any:
    """Load what :func:`save_prompt_cache` saved, after checking every byte of it.

    It switches on the fused attention that reads the caches, as :func:`.enable` does.

    Args:
        file_name (str): The file.
        return_metadata (bool): Whether to return the texts saved with it, too.
        model (Module, optional): The model that the caches must be of, where the file
          was saved with one.

    Returns:
        list or tuple(list, dict): The caches, and the texts if asked for.

    Raises:
        ImportError: If mlx-lm is not there, or not as this module knows it.
        ValueError: If the file is damaged, of another version or of another model.
    """
    from .hook import switch_on

    arrays, described = _read(file_name)
    if model is not None and described["model"] not in (None, fingerprint(model)):
        _refuse(file_name, "be of this model", "a file of another model")
    cache = [
        _build(layer, f"{i}", arrays) for i, layer in enumerate(described["layers"])
    ]
    switch_on()
    return (cache, described["metadata"]) if return_metadata else cache


def write_whole(
    path: Path,
    arrays: dict[str, mx.array],
    texts: dict[str, str],
    lasting: bool = True,
) -> None:
    """Write a safetensors file; a reader sees what was there before, or all of it.

    Args:
        path (Path): The file.
        arrays (dict): What it holds.
        texts (dict): Its metadata.
        lasting (bool): Whether it must be there after the machine has lost its power;
          that takes time.

    Raises:
        OSError: If it cannot be written.
    """
    draft = path.with_name(f".{path.stem}.{os.getpid()}.safetensors")
    try:
        try:
            mx.save_safetensors(str(draft), arrays, texts)
        except RuntimeError as error:
            raise OSError(str(error)) from error
        if lasting:
            with open(draft, "rb") as file:
                os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def checksum(text: str, arrays: dict[str, mx.array]) -> str:
    """Of a text, and of the names, shapes, types and bytes of arrays."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
        if array.size:
            digest.update(_bytes(mx.contiguous(array).reshape(-1).view(mx.uint8)))
    return digest.hexdigest()


def is_ours(file_name: str | Path) -> bool:
    """Whether a file was written by :func:`save_prompt_cache`, be it damaged or not."""
    with open(file_name, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return f'"{_MARK}"'.encode() in file.read(min(length, 1 << 24))


def fingerprint(model: Any) -> str:
    """A text that tells a model's weights from others': the name, shape and type of
    each array and sums over its words, each times a number of its own. It takes one
    pass over the weights where they are, and is no guard against forgery."""
    digest = hashlib.sha256()
    leaves: Any = tree_flatten(model.parameters())
    for name, array in leaves:
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
        if array.size:
            digest.update(_bytes(_sums(array)))
    return digest.hexdigest()


def _sums(array: mx.array) -> mx.array:
    flat = mx.contiguous(array).reshape(-1)
    words = flat.view(mx.uint32 if flat.nbytes % 4 == 0 else mx.uint8)
    odd = 2 * mx.arange(min(words.size, _WORDS), dtype=mx.uint64) + 1
    sums = []
    for begin in range(0, words.size, _WORDS):
        part = words[begin : begin + _WORDS]
        sums.append((part.astype(mx.uint64) * odd[: part.size]).sum())
        mx.eval(sums[-1])
    return mx.stack(sums)


def _read(file_name: str | Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """The arrays of a file and what describes them, as they were written."""
    # mx.load says of a missing file only that it cannot be read.
    os.stat(file_name)
    try:
        loaded: Any = mx.load(str(file_name), return_metadata=True)
        arrays: dict[str, mx.array] = loaded[0]
        texts: dict[str, str] = loaded[1]
        # A file that is too short shows only when its arrays are read.
        mx.eval(arrays)
        described = json.loads(texts[_MARK])
        version, kept = described["version"], texts[_CHECKSUM]
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"[{_NAME}] {file_name} must be a whole file of quantized caches; got one "
            f"that cannot be read: {error}."
        ) from None
    if version != STATE_VERSION:
        _refuse(file_name, f"be of version {STATE_VERSION}", version)
    if kept != checksum(texts[_MARK], arrays):
        _refuse(file_name, "be whole", "a checksum that does not fit its contents")
    return arrays, described


def _refuse(file_name: str | Path, required: str, got: Any) -> None:
    raise ValueError(f"[{_NAME}] {file_name} must {required}; got {got}.")


def _bytes(array: mx.array) -> memoryview:
    # MLX's stub leaves the buffer protocol out for older Pythons.
    return memoryview(cast(Any, array))


def _describe(cache: Any, name: str, arrays: dict[str, mx.array]) -> dict[str, Any]:
    """What a cache is beside its arrays, which are put where their names say."""
    kind = type(cache)
    described: dict[str, Any] = {"class": kind.__name__, "module": kind.__module__}
    _class(described, "save_prompt_cache")
    if described["class"] == "CacheList":
        members = enumerate(cache.caches)
        each = [_describe(c, f"{name}.{i}", arrays) for i, c in members]
        return {**described, "members": each}
    if isinstance(cache, PackedCache):
        own = cache.used_arrays()
        arrays.update({f"{name}.{i}": array for i, array in enumerate(own)})
        return {**described, "arrays": len(own), "text": cache.meta_state}
    if isinstance(cache, PagedKVCache):
        parts: list[list[mx.array]] = [list(x) for x in cache.state[:2]]
        own = parts[0] + parts[1]
        arrays.update({f"{name}.{i}": array for i, array in enumerate(own)})
        counts = [len(x) for x in parts]
        return {**described, "blocks": counts, "text": cache.meta_state}
    leaves: list[list[Any]] = []
    state: Any = tree_flatten(cache.state)
    for path, leaf in state:
        if isinstance(leaf, mx.array):
            arrays[f"{name}.{path}"] = leaf
            leaves.append([path, "array", None])
        elif leaf is None or isinstance(leaf, str | int | float):
            leaves.append([path, "value", leaf])
        else:
            raise ValueError(
                "[save_prompt_cache] a cache's state must be arrays, numbers and "
                f"texts; got {type(leaf).__name__} in a {described['class']}."
            )
    return {**described, "state": leaves, "meta": getattr(cache, "meta_state", None)}


def _build(described: dict[str, Any], name: str, arrays: dict[str, mx.array]) -> Any:
    kind = _class(described, _NAME)
    if "members" in described:
        members = enumerate(described["members"])
        return kind(*(_build(c, f"{name}.{i}", arrays) for i, c in members))
    if "blocks" in described:
        n_k, n_v = described["blocks"]
        own = [arrays[f"{name}.{i}"] for i in range(n_k + n_v)]
        return kind.from_state((own[:n_k], own[n_k:]), described["text"])
    if "text" in described:
        own = [arrays[f"{name}.{i}"] for i in range(described["arrays"])]
        return kind.from_state(own, described["text"])
    # Of mlx-lm's own the state is another one since 0.32.
    if (described["meta"] is not None) != hasattr(kind, "meta_state"):
        eras = ["0.32 or newer", "older than 0.32"]
        wanted, found = reversed(eras) if hasattr(kind, "meta_state") else eras
        raise ValueError(
            f"[{_NAME}] {kind.__name__} must be saved by an mlx-lm that is {wanted}, "
            f"as here; got one of an mlx-lm that was {found}."
        )
    leaves = [
        (path, arrays[f"{name}.{path}"] if what == "array" else value)
        for path, what, value in described["state"]
    ]
    made = kind.__new__(kind)
    made.state = tree_unflatten(leaves) if leaves else []
    if described["meta"] is not None:
        made.meta_state = described["meta"]
    return made


def _class(described: dict[str, Any], function: str) -> Any:
    name, module = described["class"], described["module"]
    for kind in (*cache_types(), PagedKVCache):
        if kind.__name__ == name:
            return kind
    if module in ("mlx_lm.models.cache", "mlx_vlm.models.cache") and "Cache" in name:
        return getattr(importlib.import_module(module), name)
    raise ValueError(
        f"[{function}] caches must be of known classes; got {module}.{name}."
    )
