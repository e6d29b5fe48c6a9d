"""Count what the decode loop executes for 16 keys, for every format, as a table:
python scripts/count_cuda.py [ARCHITECTURE]

Head dim 128, one query for 4 heads, K and V alike, whole tiles. The path through the
loop over tiles is the shortest one that multiplies and copies: no new level, no mask,
not the end. Needs nvidia-cuda-nvrtc and nvidia-cuda-nvdisasm, but no GPU.
"""

import heapq
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from compile_cuda import HEADER, ROOT, compile_kernel, load_nvrtc
from flatten_metal import flatten

DIM, TILE_KEYS, COUNTED_KEYS = 128, 32, 16
# Of one H200: bytes a second, multiprocessors, cycles a second; four schedulers.
BANDWIDTH, MULTIPROCESSORS, CLOCK, SCHEDULERS = 4.2e12, 132, 1.9e9, 4
# One a scheduler in two cycles; of other instructions one a cycle.
HALF_RATE = set(
    "BMSK FLO FMNMX FSEL FSETP IABS IADD3 IMNMX ISETP LEA LOP3 MOV PLOP3 POPC PRMT SEL "
    "SGXT SHF VIADD VIADDMNMX VIMNMX VOTE".split()
)
# By mode: the type of scales and biases, its bytes, values a scale, biases.
STORED = {
    "Affine": ("bf16", 2, 64, True),
    "Mxfp4": ("e8m0", 1, 32, False),
    "Mxfp8": ("e8m0", 1, 32, False),
    "Nvfp4": ("e4m3", 1, 16, False),
    "Turbo": ("bf16", 2, DIM, False),
}
CODEC = re.compile(r"X\((\w+), (\w+), (\d), ([\w:<>]+)\)")
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
LABEL = re.compile(r"(\.L_x_\d+):")
# What ends a block, perhaps for some threads only.
LEAVES = ("BRA", "EXIT", "RET")


def instance(codec, mode):
    """The text of a kernel, as quantized_sdpa.cpp makes it."""
    scale, _, group, _ = STORED[mode]
    each = "".join(
        f"using {x.upper()}Codec = {codec};\n"
        f"static constexpr Scalar {x}_scale_type = Scalar::{scale};\n"
        f"static constexpr Scalar {x}_bias_type = Scalar::{scale};\n"
        f"static constexpr int {x}_dim = {DIM}, {x}_group = {group}, {x}_chunk = 16,\n"
        f"    {x}_scale_chunk = 0, {x}_bias_chunk = 0;\n"
        f"static constexpr bool {x}_dense = true;\n"
        for x in "kv"
    )
    return f"""
using namespace mlx::core::quantized_sdpa;
struct Instance {{
{each}static constexpr Scalar q_type = Scalar::bf16;
static constexpr int warps = 8, stages = 3, tile_keys = {TILE_KEYS}, row_tiles = 1;
static constexpr bool dense_scales = true, has_mask = false, has_softcap = false;
static constexpr Paging paging = Paging::none;
}};
extern "C" __global__ void __launch_bounds__(Traits<Instance>::threads, 1)
quantized_sdpa(const __grid_constant__ CudaParams p) {{ decode<Instance>(p); }}
"""


def disassemble(code):
    import nvidia

    folders = [Path(folder) for folder in nvidia.__path__]
    tools = [path for folder in folders for path in folder.glob("**/bin/nvdisasm")]
    if not tools:
        raise SystemExit("nvidia-cuda-nvdisasm must be installed.")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [tools[0], "-c", file.name]
        return subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout


def blocks_of(text):
    """{name: [(predicate, opcode, rest)]} of the basic blocks, in their order."""
    blocks, current = {"": []}, ""
    for line in text.splitlines():
        if label := LABEL.match(line):
            current = label[1]
            blocks[current] = []
        elif found := INSTRUCTION.match(line):
            if blocks[current] and blocks[current][-1][1].split(".")[0] in LEAVES:
                current = f"{len(blocks)}"
                blocks[current] = []
            blocks[current].append(found.groups(default=""))
    return blocks


def successors(blocks):
    names = list(blocks)
    following = dict(zip(names, names[1:]))
    found = {}
    for name, block in blocks.items():
        predicate, opcode, rest = block[-1] if block else ("", "", "")
        leaves = opcode.split(".")[0] in LEAVES
        # Others than all threads go on.
        some = predicate or ".DIV" in opcode or re.match(r"\s*!?U?P", rest)
        target = re.search(r"\.L_x_\d+", rest) if opcode.startswith("BRA") else None
        found[name] = [target[0]] if target else []
        if name in following and (some or not leaves):
            found[name].append(following[name])
    return found


def has(block, prefix):
    return sum(opcode.startswith(prefix) for _, opcode, _ in block)


def loops_over_tiles(blocks, after):
    """{first block: all blocks} of the innermost loops that multiply."""
    order = {name: i for i, name in enumerate(blocks)}
    before = {name: [x for x in blocks if name in after[x]] for name in blocks}
    loops = {}
    for last in blocks:
        for first in after[last]:
            if order[first] <= order[last]:
                body, left = {first}, [last]
                while left:
                    name = left.pop()
                    if name not in body:
                        body.add(name)
                        left += before[name]
                if first not in loops or len(body) < len(loops[first]):
                    loops[first] = body
    kept, known = {}, set()
    for first, body in sorted(loops.items(), key=lambda loop: len(loop[1])):
        products = {name for name in body if has(blocks[name], "HMMA")}
        if products and not products & known:
            kept[first] = body
            known |= products
    return kept


def shortest_way(blocks, after, first, body):
    """Opcodes on the shortest way around a loop that copies a tile."""
    ways, seen = [(0, first, False, ())], set()
    while ways:
        n, name, copies, path = heapq.heappop(ways)
        if (name, copies) in seen:
            continue
        seen.add((name, copies))
        path += (name,)
        copies = copies or has(blocks[name], "LDGSTS") > 0
        n += len(blocks[name])
        for other in after[name]:
            if other == first and copies:
                return [x[1].split(".")[0] for at in path for x in blocks[at]]
            if other != first and other in body:
                heapq.heappush(ways, (n, other, copies, path))
    return []


def usual_path(blocks):
    """Opcodes of the loop over tiles; the longest, where the compiler made several."""
    after = successors(blocks)
    loops = loops_over_tiles(blocks, after)
    ways = [shortest_way(blocks, after, *loop) for loop in loops.items()]
    return max(ways, key=len)


def slots(bits, mode):
    """Of all schedulers, while the bytes of the keys come."""
    _, size, group, has_bias = STORED[mode]
    row = DIM * bits // 8 + DIM // group * size * (2 if has_bias else 1)
    seconds = 2 * row * COUNTED_KEYS / (BANDWIDTH / MULTIPROCESSORS)
    return seconds * CLOCK * SCHEDULERS


def main():
    architecture = sys.argv[1] if len(sys.argv) > 1 else "sm_90a"
    nvrtc = load_nvrtc()
    kernels = flatten(ROOT / "overlay", HEADER.format("decode"))
    codecs = (ROOT / "overlay/mlx/backend/common/kv_codec.h").read_text()
    print("| format | instructions | at half rate | LDS | registers | slots |")
    print("|---|---|---|---|---|---|")
    for name, mode, bits, codec in CODEC.findall(codecs):
        text = kernels + instance(codec, mode)
        registers, _, code = compile_kernel(nvrtc, text, architecture)
        path = Counter(usual_path(blocks_of(disassemble(code))))
        share = COUNTED_KEYS / TILE_KEYS
        counts = (
            path.total(),
            sum(n for opcode, n in path.items() if opcode in HALF_RATE),
            path["LDS"],
        )
        shown = " | ".join(f"{n * share:.0f}" for n in counts)
        print(f"| {name} | {shown} | {registers} | {slots(int(bits), mode):.0f} |")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
