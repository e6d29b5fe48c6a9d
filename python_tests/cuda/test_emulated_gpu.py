"""What the emulated GPU itself notices: kernels with and without faults.

Run by scripts/emulate_cuda.sh.
"""

import os
import shlex
import subprocess

import pytest

KERNELS = {
    "faulty_kernels.cpp": {
        "barrier_orders": "",
        "read_without_barrier": "a race in shared memory",
        "write_without_barrier": "a race in shared memory",
        "warp_barrier_orders_a_warp": "",
        "warp_barrier_for_a_block": "a race in shared memory",
        "shuffle_for_a_barrier": "a race in shared memory",
        "divergent_lanes": "threads meet at different instructions",
        "barrier_without_all": "threads wait for others that do not come",
        "unseen_write": "behind the emulator's back",
        "read_of_an_atomic": "a race in shared memory",
        "outside": "outside of shared memory",
        "misaligned": "misaligned access to shared memory",
        "all_arrive": "",
        "one_arrives_for_all": "a race in shared memory",
        "product": "",
        "product_without_proxy_fence": "no proxy fence",
        "product_without_register_fence": "changed after its fence",
        "product_without_wait": "tensor cores are still reading",
        "accumulator_before_wait": "changed before its product came",
    },
    "faulty_copies.cpp": {
        "copy_is_awaited": "",
        "copy_without_wait": "before its copy was waited for",
        "copy_without_barrier": "a race in shared memory",
        "block_is_counted": "",
        "count_without_fence": "before its writes are fenced",
        "count_without_barrier": "before its writes are fenced",
        "parts_without_fence": "read without a fence",
    },
}


@pytest.mark.parametrize("source", KERNELS)
def test_faults_are_noticed(source, tmp_path):
    command = os.environ["QUANTIZED_SDPA_EMULATOR"].replace("-shared", "") + source
    program = tmp_path / "kernels"
    subprocess.run([*shlex.split(command), "-o", program], check=True)
    said = {}
    for name in KERNELS[source]:
        done = subprocess.run([program, name], capture_output=True, text=True)
        said[name] = done.stderr if done.returncode else ""
    expected = KERNELS[source]
    assert {
        name: text
        for name, text in said.items()
        if expected[name] not in text or (text and not expected[name])
    } == {}
