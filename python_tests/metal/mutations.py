"""Faults planted in the kernels' text, each with the cases that must notice it.

A fault is a piece of text, which must be there exactly once, and what takes its
place; `where` narrows the piece down to what follows it. A case stands by its name in
cases.py; the first that fails is enough.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    what: str
    find: str
    replace: str
    cases: tuple[str, ...]
    where: str = ""

    def apply(self, text: str) -> str:
        start = text.index(self.where) if self.where else 0
        head, tail = text[:start], text[start:]
        count = tail.count(self.find)
        if count == 0 or (count > 1 and not self.where):
            raise ValueError(f"{self.what}: the text is there {count} times")
        return head + tail.replace(self.find, self.replace, 1)


BARRIER = "metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);"
NO_MEMORY = "metal::threadgroup_barrier(metal::mem_flags::mem_none);"
VECTOR = "void quantized_sdpa_vector("
STEEL = "quantized_sdpa_steel("
MERGE = "void quantized_sdpa_merge("
COMBINE = "METAL_FUNC void combine_simdgroups("
STEEL_LOOP = "for (int tile = span.begin; tile < span.end; tile += n_keys)"


def vector(*names):
    return tuple(f"vector, {name}" for name in names)


def steel(*names):
    return tuple(f"steel, {name}" for name in names)


MUTATIONS = [
    # Barriers
    Mutation(
        "vector: no barrier after the codebook",
        BARRIER,
        "",
        vector("codebook of K", "codebook of V"),
        VECTOR,
    ),
    Mutation(
        "vector: no barrier after the states",
        BARRIER,
        "",
        vector("plain"),
        COMBINE,
    ),
    Mutation(
        "vector: a barrier that orders no memory",
        BARRIER,
        NO_MEMORY,
        vector("plain"),
        "bool writes = lane < uint(Layout::lanes)",
    ),
    Mutation(
        "vector: a barrier that one simdgroup misses",
        BARRIER,
        "if (simdgroup != 1) {" + BARRIER + "}",
        vector("plain"),
        COMBINE,
    ),
    Mutation(
        "steel: no barrier after the codebook",
        BARRIER,
        "",
        steel("codebook of K", "codebook of V"),
        STEEL,
    ),
    Mutation(
        "steel: no barrier before a tile is read",
        BARRIER,
        "",
        steel("plain"),
        STEEL_LOOP,
    ),
    Mutation(
        "steel: no barrier before the next tile is written",
        BARRIER,
        "",
        steel("many rows", "ragged rows"),
        "add_matrices<T, K, V, n_keys>(held, weights, v_tile, place);",
    ),
    Mutation(
        "steel: a barrier that orders no memory",
        BARRIER,
        NO_MEMORY,
        steel("plain"),
        STEEL_LOOP,
    ),
    Mutation(
        "steel: a barrier inside the condition",
        "if (tile < end_seen && tile + n_keys > first_seen) {",
        "if (tile < end_seen && tile + n_keys > first_seen) {" + BARRIER,
        steel("many rows", "causal window"),
    ),
    Mutation("merge: no barrier", BARRIER, "", vector("splits"), MERGE),
    # Bounds and tails
    Mutation(
        "vector: the keys behind the last",
        "bool exists = key < end;",
        "bool exists = key <= end;",
        vector("plain", "codes with gaps"),
    ),
    Mutation(
        "vector: a visible key too many",
        "bool visible = key >= held.spans[r].begin && key < held.spans[r].end;",
        "bool visible = key >= held.spans[r].begin && key <= held.spans[r].end;",
        vector("causal window", "lengths and padding", "splits"),
    ),
    Mutation(
        "vector: rows behind the last are written",
        "int n_values = metal::min(rows, n_rows - first_row) * V::dim;",
        "int n_values = rows * V::dim;",
        vector("plain", "groups of 3 heads"),
    ),
    Mutation(
        "vector: rows behind the last are read",
        "bool exists = first_row + r < n_rows && first < Operand::dim;",
        "bool exists = first < Operand::dim;",
        vector("causal, softcap"),
    ),
    Mutation(
        "steel: the keys behind the last",
        "if (first_key + key < end) {",
        "if (first_key + key <= end) {",
        steel("plain", "codes with gaps"),
        "CodeSegment<Operand, Layout::piece> segment = {{0}};",
    ),
    Mutation(
        "steel: a visible key too many",
        "bool visible = key >= held.span.begin && key < held.span.end;",
        "bool visible = key >= held.span.begin && key <= held.span.end;",
        steel("many rows", "causal window"),
    ),
    Mutation(
        "steel: rows behind the last are written",
        "if (row < n_rows) {",
        "if (row <= n_rows) {",
        steel("plain", "ragged rows"),
    ),
    Mutation(
        "steel: rows behind the last are read",
        "bool exists = row < n_rows;",
        "bool exists = true;",
        steel("plain", "ragged rows"),
    ),
    Mutation(
        "steel: a threadgroup array that is short",
        "threadgroup KCode k_tile_codes[n_keys * KLayout::stride];",
        "threadgroup KCode k_tile_codes[n_keys * KLayout::stride - 20];",
        steel("plain"),
    ),
    Mutation(
        "vector: a threadgroup array that is short",
        "threadgroup float total[rows * V::dim];",
        "threadgroup float total[rows * V::dim - 1];",
        vector("plain"),
    ),
    Mutation(
        "merge: a threadgroup array that is short",
        "threadgroup float gathered[n_simdgroups * dim];",
        "threadgroup float gathered[(n_simdgroups - 1) * dim];",
        vector("splits"),
    ),
    # Indices and strides
    Mutation(
        "the sequence stride of the codes",
        "x.codes + place.block * params.codes[0] + place.row * params.codes[2];",
        "x.codes + place.block * params.codes[0] + place.row * Operand::dim * "
        "Operand::Codec::bits / 32;",
        vector("token-major"),
    ),
    Mutation(
        "biases by the head stride of the scales",
        "x.biases = biases + group.y * params.biases[1];",
        "x.biases = biases + group.y * params.scales[1];",
        vector("each array in its own layout"),
    ),
    Mutation(
        "the sequence stride of the scales",
        "place.row * params.scales[2] +",
        "place.row * params.codes[2] +",
        vector("plain", "token-major"),
    ),
    Mutation(
        "the first sequence of the batch for all",
        "x.codes + place.block * params.codes[0] + place.row * params.codes[2];",
        "x.codes + place.row * params.codes[2];",
        vector("token-major"),
    ),
    Mutation(
        "vector: V by the strides of K",
        "load_key(held, x, tile + key, end, lane, params, params.v);",
        "load_key(held, x, tile + key, end, lane, params, params.k);",
        vector("each array in its own layout"),
    ),
    Mutation(
        "vector: a scale for each 32 values",
        "int group = first / Operand::group_size + i;",
        "int group = first / 32 + i;",
        vector("plain"),
    ),
    Mutation(
        "scales as if they had the type of q",
        "return Operand::Codec::decode_scale(x.scales[at]);",
        "return Operand::Codec::decode_scale("
        "reinterpret_cast<const device half*>(x.scales)[at]);",
        vector("scales of another type"),
    ),
    Mutation(
        "biases as if they had the type of q",
        "return float(x.biases[at]);",
        "return float(reinterpret_cast<const device half*>(x.biases)[at]);",
        vector("scales of another type"),
    ),
    Mutation(
        "vector: a head dim that fills all lanes",
        "bool writes = lane < uint(Layout::lanes) && first < Operand::dim;",
        "bool writes = lane < uint(Layout::lanes);",
        vector("dim 80"),
    ),
    Mutation(
        "codes with gaps read as if dense",
        "return has_code_gaps ? codes[i * params.codes[3]] : codes[i];",
        "return codes[i];",
        vector("codes with gaps"),
    ),
    Mutation(
        "the wrong head of the group",
        "place.head = kv_head * heads + row - place.position * heads;",
        "place.head = kv_head + row - place.position * heads;",
        vector("plain"),
    ),
    Mutation(
        "vector: the lane that owns a key",
        "return key % Layout::keys * Layout::lanes + key / Layout::keys;",
        "return key;",
        vector("plain", "groups of 3 heads"),
    ),
    Mutation(
        "the last code of a pack that crosses a word",
        "if (shift + bits > 32) {",
        "if (shift + bits > 40) {",
        vector("causal window", "one row"),
    ),
    Mutation(
        "the word of the first code",
        "int word = first / 32 * Codec::bits + first % 32 * Codec::bits / 32;",
        "int word = first / 32 * Codec::bits;",
        vector("plain", "groups of 3 heads"),
    ),
    Mutation(
        "vector: the lane that loaded a shared word",
        "ushort owner = lane - piece + word % Layout::lanes;",
        "ushort owner = word % Layout::lanes;",
        vector("shared words"),
    ),
    Mutation(
        "vector: a shared word of the first load for all",
        "crossed[j] = word / Layout::lanes == i ? other : crossed[j];",
        "crossed[j] = i == 0 ? other : crossed[j];",
        vector("shared words of 8 rows"),
    ),
    Mutation(
        "vector: codes that cross shared words",
        "uint64_t pair = uint64_t(crossed[j + 1]) << 32 | crossed[j];",
        "uint64_t pair = crossed[j];",
        vector("shared words"),
    ),
    Mutation(
        "a key of a page, one row on",
        "place.row = key - slot * params.block_size;",
        "place.row = key - slot * params.block_size + 1;",
        vector("pages"),
    ),
    Mutation(
        "steel: the stride of a tile's column",
        "(j * 8 + place.column) * Layout::stride + i * 8 + place.row;",
        "(j * 8 + place.column) * (Layout::stride - 1) + i * 8 + place.row;",
        steel("plain"),
    ),
    Mutation(
        "steel: the row of a lane",
        "place.row = lane / 16 * 4 + lane / 2 % 4;",
        "place.row = lane / 8 * 2 + lane / 2 % 4;",
        steel("plain"),
    ),
    Mutation(
        "the partial result of another split",
        "return (head * n_rows + row) * params.n_splits + split;",
        "return (head * n_rows + row) * params.n_splits;",
        vector("splits"),
    ),
    # Signs, scales, softmax
    Mutation(
        "a scale left out",
        "float score = dot * params.scale;",
        "float score = dot;",
        vector("plain"),
    ),
    Mutation(
        "the cap without its factor",
        "score = params.softcap * metal::precise::tanh(score / params.softcap);",
        "score = metal::precise::tanh(score / params.softcap);",
        vector("causal, softcap"),
    ),
    Mutation(
        "a sign in the softmax",
        "return x == -KV_INFINITY ? 0.0f : KV_EXP(x - max);",
        "return x == -KV_INFINITY ? 0.0f : KV_EXP(max - x);",
        vector("plain"),
    ),
    Mutation(
        "an empty piece that is not a number",
        "return x == -KV_INFINITY ? 0.0f : KV_EXP(x - max);",
        "return KV_EXP(x - max);",
        vector("empty rows"),
    ),
    Mutation(
        "a sum that is not scaled with the maximum",
        "state.sum *= factor;",
        "",
        vector("splits", "groups of 3 heads"),
    ),
    Mutation(
        "vector: what was gathered is not scaled",
        "acc.values[r][c] *= factor;",
        "",
        vector("splits", "groups of 3 heads"),
    ),
    Mutation(
        "steel: what was gathered is not scaled",
        "held.acc[i] *= factor;",
        "",
        steel("many rows", "ragged rows"),
    ),
    Mutation(
        "steel: biases gathered are not scaled",
        "held.biases[g] *= factor;",
        "",
        steel("many rows", "ragged rows"),
    ),
    Mutation(
        "a sink that gives no probability",
        "sink.sum = 1;",
        "sink.sum = 0;",
        vector("splits with sinks"),
    ),
    Mutation(
        "steel: a row's maximum over half its lanes",
        "return metal::max(x, metal::simd_shuffle_xor(x, ushort(8)));",
        "return metal::max(x, metal::simd_shuffle_xor(x, ushort(4)));",
        steel("plain"),
    ),
    Mutation(
        "vector: partial results in half precision",
        "partials[at * V::dim + d] = total[i];",
        "partials[at * V::dim + d] = float(half(total[i]));",
        vector("splits of large equal keys"),
    ),
    Mutation(
        "steel: partial results in half precision",
        "target.partials[to] = held.acc[i][0];",
        "target.partials[to] = float(half(held.acc[i][0]));",
        steel("splits of large equal keys"),
    ),
    Mutation(
        "a code of 6 bits that loses the last",
        "return float(extract<bits_>(pack, i));",
        "return float(extract<bits_>(pack, i) & (bits_ == 6 ? 62u : 255u));",
        vector("causal window"),
        "struct Affine",
    ),
    Mutation(
        "a log-sum-exp without the maximum",
        "state.max + KV_LOG(state.sum)",
        "KV_LOG(state.sum)",
        vector("plain"),
    ),
    Mutation(
        "steel: float32 values without their bias",
        "Code(Layout::has_values ? scale * code + bias : code);",
        "Code(Layout::has_values ? scale * code : code);",
        steel("plain"),
    ),
    Mutation(
        "steel: float32 values by the scale of the first group",
        "int group = first / Operand::group_size;",
        "int group = 0;",
        steel("dim 256"),
    ),
    Mutation(
        "a bias that is left out",
        "return float(x.biases[at]);",
        "return 0;",
        vector("plain"),
    ),
    # Masks
    Mutation(
        "causal aligned to the first key",
        "int own = existing.end - rule.q_len + position;",
        "int own = position;",
        vector("causal window"),
    ),
    Mutation(
        "a window that is one key wider",
        "keys.begin = own + 1 - rule.window_size;",
        "keys.begin = own - rule.window_size;",
        vector("causal window"),
    ),
    Mutation(
        "a bool mask inverted",
        "score = mask[at] != 0 ? score : -INFINITY;",
        "score = mask[at] == 0 ? score : -INFINITY;",
        vector("bool mask"),
    ),
    Mutation(
        "the mask of another head",
        "return batch * params.mask[0] + row.head * params.mask[1] +",
        "return batch * params.mask[0] +",
        vector("float mask"),
    ),
    Mutation(
        "left padding ignored",
        "padding = left_padding[batch * params.left_padding];",
        "padding = 0;",
        vector("lengths and padding"),
    ),
    Mutation(
        "the lengths of the first sequence for all",
        "length = lengths[batch * params.lengths];",
        "length = lengths[0];",
        vector("lengths and padding"),
    ),
    Mutation(
        "steel: a tile skipped that a row can see",
        "if (tile < end_seen && tile + n_keys > first_seen) {",
        "if (tile < end_seen - n_keys && tile + n_keys > first_seen) {",
        steel("plain"),
    ),
]
