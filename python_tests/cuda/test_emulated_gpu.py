"""What the emulated GPU itself notices: kernels with and without faults.

Run by scripts/emulate_cuda.sh.
"""

import os
import shlex
import subprocess

KERNELS = {
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
    "copy_to_outside": "outside of shared memory",
    "misaligned": "misaligned access to shared memory",
    "misaligned_copy": "misaligned access to global memory",
    "misaligned_global": "misaligned access to global memory",
    "outside_of_global": "outside of global memory",
    "copy_from_outside": "outside of global memory",
    "copy_beyond_its_size": "a copy of more than its size",
    "shuffle_of_some_lanes": "for some lanes only",
    "no_such_power_of_two": "that no normal float has",
    "copy_is_awaited": "",
    "copy_without_wait": "before its copy was waited for",
    "copy_without_barrier": "a race in shared memory",
    "copy_is_never_awaited": "ends before its copies came",
    "block_is_counted": "",
    "count_without_fence": "before its writes are fenced",
    "count_without_barrier": "before its writes are fenced",
    "parts_without_fence": "read without a fence",
    "count_of_another_block": "read without a fence",
    "barrier_of_another_block": "was not initialized",
    "all_arrive": "",
    "one_arrives_for_all": "a race in shared memory",
    "product": "",
    "product_without_proxy_fence": "no proxy fence",
    "product_without_register_fence": "changed after its fence",
    "product_without_wait": "tensor cores are still reading",
    "product_is_never_awaited": "ends before its products came",
    "accumulator_before_wait": "changed before its product came",
}


def compiled(source, folder):
    """A program of this folder, for the emulated GPU."""
    command = os.environ["QUANTIZED_SDPA_EMULATOR"].replace("-shared", "") + source
    program = folder / "program"
    subprocess.run([*shlex.split(command), "-o", program], check=True)
    return program


def test_faults_are_noticed(tmp_path):
    program = compiled("faulty_kernels.cpp", tmp_path)
    said = {}
    for name in KERNELS:
        done = subprocess.run([program, name], capture_output=True, text=True)
        said[name] = done.stderr if done.returncode else ""
    assert {
        name: text
        for name, text in said.items()
        if KERNELS[name] not in text or (text and not KERNELS[name])
    } == {}


def test_small_floats(tmp_path):
    subprocess.run([compiled("small_floats.cpp", tmp_path)], check=True)
