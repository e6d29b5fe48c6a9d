"""A prompt cache's file when the disk is full, the process is killed, bytes change."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_quantized_sdpa as qs
import pytest
from mlx_quantized_sdpa.cache import PackedKVCache
from mlx_quantized_sdpa.persistence import load_prompt_cache, save_prompt_cache

# Saves another cache than is in the file; no byte of a file behind `limit` can be
# written. The signal of that is ignored, as on a full disk, or ends the process.
SAVE = """
import resource, signal, sys
from test_kv_cache_file_faults import filled
from mlx_quantized_sdpa.persistence import save_prompt_cache

path, limit, ends = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "killed"
cache = [filled(300, seed=1)]
signal.signal(signal.SIGXFSZ, signal.SIG_DFL if ends else signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
save_prompt_cache(path, cache)
"""
# Ends without a word between the last byte and the file's name.
KILLED_BEFORE_ITS_NAME = """
import os, signal, sys
from test_kv_cache_file_faults import filled
from mlx_quantized_sdpa.persistence import save_prompt_cache

os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
save_prompt_cache(sys.argv[1], [filled(300, seed=1)])
"""


def filled(length, seed=0):
    mx.random.seed(seed)
    cache = PackedKVCache("k8v4")
    cache.update_and_fetch(*mx.random.normal((2, 1, 2, length, 64)))
    return cache


def arrays_of(cache):
    return [x.tolist() for x in cache.used_arrays()]


@pytest.fixture(autouse=True)
def switched_off_again():
    yield
    qs.disable()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prompt.safetensors"
    save_prompt_cache(path, [filled(40)])
    return path


def child(script, *arguments):
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


def size_of_the_new_file(tmp_path):
    path = tmp_path / "whole.safetensors"
    save_prompt_cache(path, [filled(300, seed=1)])
    size = path.stat().st_size
    path.unlink()
    return size


@pytest.mark.parametrize("part", (0.0, 0.01, 0.5, 1.0))
@pytest.mark.parametrize("how", ("full", "killed"))
def test_the_old_file_survives_whole(file, tmp_path, how, part):
    before = file.read_bytes()
    limit = int(part * (size_of_the_new_file(tmp_path) - 1))
    done = child(SAVE, file, limit, how)
    if how == "killed":
        assert done.returncode == -signal.SIGXFSZ, done.stderr
    else:
        assert done.returncode == 1, done.stderr
        assert "Error" in done.stderr.splitlines()[-1]
        # Nothing of the new one stays.
        assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert file.read_bytes() == before
    (cache,) = load_prompt_cache(file)
    assert arrays_of(cache) == arrays_of(filled(40))
    save_prompt_cache(file, [filled(300, seed=1)])
    assert arrays_of(load_prompt_cache(file)[0]) == arrays_of(filled(300, seed=1))


def test_killed_before_the_new_file_has_its_name(file):
    before = file.read_bytes()
    assert child(KILLED_BEFORE_ITS_NAME, file).returncode == -signal.SIGKILL
    assert file.read_bytes() == before


def refused(file):
    with pytest.raises(ValueError, match=r"^\[load_prompt_cache\] .* must be "):
        load_prompt_cache(file)


def test_every_bit_of_the_length_and_many_others(file):
    """Bits of the header's length, of the header, and of the arrays."""
    whole = file.read_bytes()
    places = [*range(8), *range(8, len(whole), len(whole) // 150), len(whole) - 1]
    for place in places:
        for bit in range(8) if place < 8 else (place % 8,):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            file.write_bytes(damaged)
            refused(file)


def test_cut_at_many_places(file):
    whole = file.read_bytes()
    for length in [*range(16), *range(16, len(whole), len(whole) // 100)]:
        file.write_bytes(whole[:length])
        refused(file)


def test_bytes_behind_the_last_array(file):
    """They are no part of any array; the file is as good as before."""
    whole = file.read_bytes()
    file.write_bytes(whole + b"more")
    assert arrays_of(load_prompt_cache(file)[0]) == arrays_of(filled(40))
