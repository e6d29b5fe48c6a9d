"""Faults for planting.py, each with the test that must notice it."""

from planting import Fault

OP = "overlay/mlx/"
CPU = "overlay/mlx/backend/cpu/quantized_sdpa"
CUDA = "overlay/mlx/backend/cuda/quantized_sdpa"
CODEC = "overlay/mlx/backend/common/kv_codec.h"
SOFTMAX = "overlay/mlx/backend/common/softmax_state.h"
VISIBLE = "overlay/mlx/backend/common/visible_keys.h"
# In whichever module the function is.
CACHES = "python/mlx_quantized_sdpa"


def fused(name):
    return f"test_fast_quantized_sdpa.py::TestQuantizedSDPA::test_{name}"


def fallback(name):
    return f"test_fast_quantized_sdpa.py::TestQuantizedSDPAFallback::test_{name}"


def thresholds(name):
    return f"test_quantized_sdpa_matrix.py::TestPlanThresholds::test_{name}"


def codec(name):
    return f"test_kv_codec.py::TestKVCodec::test_{name}"


def emulated(name):
    return f"cuda/test_quantized_sdpa_emulated.py::test_{name}"


def soaked(life):
    return f"test_soak.py::test_lives[{life}]"


def prefill(name):
    return f"cuda/test_quantized_sdpa_prefill.py::test_{name}"


FORMATS_AND_SOFTMAX = [
    Fault(
        "fp4: its subnormal is half as large",
        CODEC,
        "float(magnitude) * 0.5f",
        "float(magnitude) * 0.25f",
        codec("v_of_every_code"),
    ),
    Fault(
        "e8m0: the least scale is zero",
        CODEC,
        "code == 0 ? 0x400000u : code << 23",
        "code << 23",
        codec("every_scale_byte"),
    ),
    Fault(
        "a row without keys is divided by zero",
        SOFTMAX,
        "state.sum == 0 ? 0.0f : 1.0f / state.sum",
        "1.0f / state.sum",
        fused("rows_without_keys"),
    ),
]

CPU_KERNELS = [
    Fault(
        "left padding is ignored",
        VISIBLE,
        "keys.begin = clamp_index(left_padding, 0, keys.end);",
        "keys.begin = 0;",
        fused("lengths_and_left_padding"),
    ),
    Fault(
        "the window is a key wider",
        VISIBLE,
        "keys.begin = own + 1 - rule.window_size;",
        "keys.begin = own - rule.window_size;",
        fused("window"),
    ),
    Fault(
        "ids of the block table are not clamped",
        VISIBLE,
        "return clamp_index(id, 0, n_blocks - 1);",
        "return id;",
        "test_quantized_sdpa_errors.py::TestHostileValues",
    ),
    Fault(
        "the keys of the first head for all",
        CPU + "_keys.h",
        "head * x.strides[1] +",
        "0 * head +",
        fused("head_groups"),
    ),
    Fault(
        "scales with gaps are read as if dense",
        CPU + "_keys.h",
        "int64_t start = offset + g * x.strides[3];",
        "int64_t start = offset + g;",
        fused("layouts_equal_contiguous"),
    ),
    Fault(
        "groups of scales in the wrong order",
        CPU + "_keys.h",
        "in[i * n_groups + g]",
        "in[i * n_groups + n_groups - 1 - g]",
        fused("formats"),
    ),
    Fault(
        "odd groups of scales in the place of even ones",
        CPU + "_keys.h",
        "deinterleave(in + 2 * i, even + i, odd + i);",
        "deinterleave(in + 2 * i, odd + i, even + i);",
        codec("scales_of_whole_tiles"),
    ),
    Fault(
        "e8m0: the least scale of a vector is zero",
        CPU + "_decode.h",
        "codes == splat(0u) ? splat(0x400000u) : codes << 23",
        "codes << 23",
        codec("scales_of_whole_tiles"),
    ),
    Fault(
        "soft cap by the series where it is not exact",
        CPU + "_softmax.h",
        "magnitude < splat(0.1f) ? small : large",
        "magnitude < splat(0.9f) ? small : large",
        fused("softcap"),
    ),
    Fault(
        "keys before the window are not hidden",
        CPU + "_softmax.h",
        "hide(scores, 0, kv::clamp_index(seen.begin - tile.begin, 0, n));",
        "",
        fused("window"),
    ),
    Fault(
        "a row that has seen nothing is no number",
        CPU + "_softmax.h",
        "float max = state.max == -KV_INFINITY ? 0.0f : state.max;",
        "float max = state.max;",
        fused("masks"),
    ),
    Fault(
        "the mask of the first head for all",
        CPU + "_softmax.h",
        "item.batch * m.strides[0] + head * m.strides[1]",
        "item.batch * m.strides[0] + 0 * head",
        fused("masks"),
    ),
    Fault(
        "the biases of K by the first row of q",
        CPU + "_vector.h",
        "Floats q_sum = splat(q_sums[r * k.n_groups + g]);",
        "Floats q_sum = splat(q_sums[g]);",
        fused("head_groups"),
    ),
    Fault(
        "the last values of a row are left out",
        CPU + "_vector.h",
        "for (; d < dim; d += block_codes) {",
        "for (; d < 0; d += block_codes) {",
        fused("head_dims"),
    ),
    Fault(
        "scales behind the last key stay from before",
        CPU + "_vector.h",
        "view.scales[g * tile_keys + i] = 0;",
        "",
        fused("nothing_stays_from_another_call"),
    ),
]

CPU_INTEGER_KERNELS = [
    Fault(
        "integer: the second of a pair of q is the first again",
        CPU + "_integer_round.h",
        "int32_t(uint32_t(values[first + n]) << 16);",
        "int32_t(uint32_t(values[first]) << 16);",
        fused("formats"),
    ),
    Fault(
        "integer: q is rounded where that shows",
        CPU + "_integer_round.h",
        "close &= q_errors[r] * norm <= limit;",
        "close &= limit > 0;",
        fused("outliers_of_q_where_keys_are_zero"),
    ),
    Fault(
        "integer: the zero of a format stays in its products",
        CPU + "_integer_round.h",
        "scale * splat(-format.zero)",
        "scale * splat(0.0f)",
        fused("formats"),
    ),
    Fault(
        "integer: the biases of K by a row that is not rounded",
        CPU + "_integer_round.h",
        "sum_groups(dim, args.k.group_size, rounded,",
        "sum_groups(dim, args.k.group_size, s.rows,",
        fused("formats"),
    ),
    Fault(
        "integer: the scores of a group in the place of all",
        CPU + "_integer.h",
        "if (g > 0) {",
        "if (g > k.n_groups) {",
        fused("formats"),
    ),
    Fault(
        "integer: four rows read the first group of K for all",
        CPU + "_integer.h",
        "transpose_words(k.rows + i, 4 * (g * n_words + word), words);",
        "transpose_words(k.rows + i, 4 * word, words);",
        thresholds("integer_rows"),
    ),
    Fault(
        "integer: the first group's weights for all",
        CPU + "_integer.h",
        "int group = block * wide_codes / v.group_size;",
        "int group = 0 * block;",
        fused("formats"),
    ),
    Fault(
        "integer: values stay in the order of the registers",
        CPU + "_kernels.cpp",
        "reorder_values(v_format, rows * args.v.dim, s.acc);",
        "",
        fused("formats"),
    ),
    Fault(
        "integer: what rounding takes from q counts as nothing",
        CPU + "_integer_round.h",
        "return __builtin_sqrtf(reduce_sum(squares));",
        "return 0;",
        fused("outliers_of_q_where_keys_are_zero"),
    ),
    Fault(
        "integer: the sums are not scaled with the maximum",
        CPU + "_kernels.cpp",
        "scale_row(factor, args.v.dim, s.acc + r * args.v.dim);",
        "",
        fused("key_lengths"),
        "void weigh_integer_tile(",
    ),
]

CPU_TILES_AND_PARTS = [
    Fault(
        "tile: the sums are not scaled with the maximum",
        CPU + "_kernels.cpp",
        "scale_row(factor, args.v.dim, s.acc + r * args.v.dim);",
        "",
        fused("query_lengths"),
        "void attend_tile(",
    ),
    Fault(
        "tile: the first sixteen keys for all",
        CPU + "_tile.h",
        "p.panels + column / block_codes * p.panel_size;",
        "p.panels;",
        fused("query_lengths"),
    ),
    Fault(
        "the sum of a tile in the place of all",
        CPU + "_softmax.h",
        "state.sum += reduce_sum(sum);",
        "state.sum = reduce_sum(sum);",
        fused("key_lengths"),
    ),
    Fault(
        "parts of the keys without their weights",
        CPU + "_kernels.cpp",
        "load<Floats>(other + i) * splat(factors.second));",
        "load<Floats>(other + i));",
        thresholds("keys"),
    ),
    Fault(
        "the last part of the keys is left out",
        CPU + "_kernels.cpp",
        "part < parts.n_parts",
        "part < parts.n_parts - 1",
        thresholds("keys"),
    ),
    Fault(
        "a sink does not weaken the keys",
        CPU + "_kernels.cpp",
        "scale_row(factors.first, dim, acc);",
        "",
        fused("sinks"),
    ),
    Fault(
        "log-sum-exp of another head",
        CPU + "_kernels.cpp",
        "int64_t(item.batch) * args.n_q_heads + head;",
        "int64_t(item.batch) * args.n_q_heads + item.kv_head;",
        fused("parts_merge_by_lse"),
    ),
    Fault(
        "every part of the keys to the same place",
        CPU + ".cpp",
        "part.acc += size_t(chunk) * work.n_rows * args.v.dim * split;",
        "",
        thresholds("keys"),
    ),
    Fault(
        "parts are merged before the last is there",
        CPU + ".cpp",
        "chunks_left[group].fetch_sub(1) == 1",
        "chunks_left[group].fetch_sub(1) == 2",
        thresholds("keys"),
    ),
    Fault(
        "a piece of work is taken twice or not at all",
        CPU + "_threads.h",
        "(i = next.fetch_add(1, std::memory_order_relaxed)) < n;",
        "(i = next.fetch_add(2, std::memory_order_relaxed)) < n;",
        fused("batch"),
    ),
]

THE_OP = [
    Fault(
        "plan: a kernel for head dims that it cannot read",
        OP + "quantized_sdpa_plan.cpp",
        "problem.k_dim % cpu_integer_dim_step == 0 &&",
        "",
        "test_quantized_sdpa_plan.py::TestPlan::test_kernels",
    ),
    Fault(
        "plan: head dims up to any size",
        OP + "quantized_sdpa_plan.cpp",
        "dim % step != 0 || dim > max_dim",
        "dim % step != 0",
        "test_quantized_sdpa_plan.py::TestPlan::test_unsupported_reasons",
    ),
    Fault(
        "fallback: the sum is not scaled from chunk to chunk",
        OP + "quantized_sdpa_fallback.cpp",
        "sum_ = add(multiply(sum_, decay, s_),",
        "sum_ = add(sum_,",
        fallback("query_lengths"),
    ),
    Fault(
        "fallback: a key behind the last",
        OP + "quantized_sdpa_fallback.cpp",
        "less(key, end_, s_)",
        "less_equal(key, end_, s_)",
        fallback("lengths_and_left_padding"),
    ),
    Fault(
        "fallback: the high bits of a code in two words",
        OP + "quantized_sdpa_fallback.cpp",
        "high_shift.push_back(spill > 0 ? bits - spill : 0);",
        "high_shift.push_back(0);",
        fallback("formats"),
    ),
    Fault(
        "the word for a causal mask has no effect",
        OP + "quantized_sdpa.cpp",
        'return options.causal || options.mask_mode == "causal";',
        "return options.causal;",
        fused("causal_spellings"),
    ),
    Fault(
        "a window of no keys is taken",
        OP + "quantized_sdpa.cpp",
        "options.window_size && *options.window_size <= 0",
        "options.window_size && *options.window_size < 0",
        "test_quantized_sdpa_errors.py::TestErrors",
    ),
    Fault(
        "vmap of another axis than the first",
        OP + "quantized_sdpa_primitive.cpp",
        "flatten(moveaxis(x, axis, 0, s), 0, 1, s)",
        "flatten(x, 0, 1, s)",
        "test_quantized_sdpa_transforms.py::TestVmap",
    ),
    Fault(
        "a gradient of the wrong input",
        OP + "quantized_sdpa_primitive.cpp",
        "has_gradient(primal) ? grads[j++]",
        "has_gradient(primal) ? grads[j]",
        "test_quantized_sdpa_transforms.py::TestGradients",
    ),
]

CUDA_KERNELS = [
    Fault(
        "CUDA: the biases of K are left out",
        CUDA + "_decode.cuh",
        "x += biases.at(i / 2 * T::k_groups + g) * bits_float(sums[i % 2]);",
        "",
        emulated("formats[affine-4g64]"),
    ),
    Fault(
        "CUDA: a key that the row does not see",
        CUDA + "_decode.cuh",
        "at >= int(range[1])",
        "at > int(range[1])",
        emulated("rows[3-5]"),
    ),
    Fault(
        "CUDA: the cap in other units than the scores",
        CUDA + "_keys.cuh",
        "tanhf(x / cap)",
        "tanhf(x / softcap)",
        emulated("masks_and_softcap[bool]"),
    ),
    Fault(
        "CUDA: what is held does not follow the level",
        CUDA + "_decode.cuh",
        "factor[i] = exp2_approx(level[i] - raised);",
        "factor[i] = level[i] == no_level ? 0.0f : 1.0f;",
        emulated("scores_that_rise_above_the_level"),
    ),
    Fault(
        "CUDA: the warps' sums without their weights",
        CUDA + "_merge.cuh",
        "all.sum += x.sum * kv::softmax_weight(x.max, all.max);",
        "all.sum += x.sum;",
        emulated("rows[3-5]"),
    ),
    Fault(
        "CUDA: codes of V have one sign, so that what is cut off adds up",
        CUDA + "_convert.cuh",
        "static constexpr int middle = 1 << (bits - 1);",
        "static constexpr int middle = 0;",
        emulated("sums_over_many_keys"),
    ),
    Fault(
        "CUDA: the sink in other units than the scores",
        CUDA + "_merge.cuh",
        "p.sinks.data[head * p.sinks.stride] * log2_of_e;",
        "p.sinks.data[head * p.sinks.stride];",
        emulated("window_sinks_and_lengths"),
    ),
    Fault(
        "CUDA: a block before the last adds up the parts",
        CUDA + "_merge.cuh",
        "store_shared(flag, atomicInc(counter, last) == last);",
        "store_shared(flag, atomicInc(counter, last) + 1 == last);",
        emulated("parts_of_one_group"),
    ),
    Fault(
        "CUDA: the first part of a group in the wrong place",
        CUDA + "_work.cuh",
        "s.first_slot = group == share(s.first_block) ? 0 : 1;",
        "s.first_slot = 0;",
        emulated("blocks_that_share_all_tiles[3]"),
    ),
    Fault(
        "CUDA: a tile from the first key of its block",
        CUDA + "_loader.cuh",
        "key % p_.block_size",
        "0",
        emulated("paged[64-0]"),
    ),
    Fault(
        "CUDA prefill: a query sees the key behind it",
        VISIBLE,
        "keys.end = own + 1;",
        "keys.end = own + 2;",
        prefill("causal[mma]"),
    ),
    Fault(
        "CUDA prefill: the sum is not scaled with the level",
        CUDA + "_prefill.cuh",
        "state.sum = state.sum * rescale[r] + sum;",
        "state.sum = state.sum + sum;",
        prefill("scores_that_rise_above_the_level"),
    ),
    Fault(
        "CUDA prefill: a split reads the keys of the next",
        CUDA + "_prefill.cuh",
        "return {begin, min(any.end, begin + share * keys)};",
        "return {begin, any.end};",
        prefill("split_keys"),
    ),
    Fault(
        "CUDA: a tile is read before all lanes' copies are there",
        CUDA + "_decode.cuh",
        "copy_wait<T::stages - 2>();\n    __syncwarp();",
        "copy_wait<T::stages - 2>();",
        emulated("rows[3-5]"),
    ),
    Fault(
        "CUDA: warps are added up before all have put theirs",
        CUDA + "_merge.cuh",
        "        out);\n    __syncthreads();",
        "        out);",
        emulated("rows[3-5]"),
    ),
    Fault(
        "CUDA: a block is counted before its part is visible",
        CUDA + "_merge.cuh",
        "  __threadfence();\n  __syncthreads();\n  if",
        "  __syncthreads();\n  if",
        emulated("parts_of_one_group"),
    ),
    Fault(
        "CUDA: a group waits for blocks without tiles",
        CUDA + "_work.cuh",
        "n_blocks_ = min(int64_t(gridDim.x), total_);",
        "n_blocks_ = gridDim.x;",
        emulated("more_blocks_than_tiles"),
    ),
    Fault(
        "CUDA: scales of several pages as one piece",
        CUDA + ".cpp",
        "x.dense_scales = x.paging != Paging::keys;",
        "x.dense_scales = 1;",
        emulated("paged[8-0]"),
    ),
    Fault(
        "CUDA prefill: the graph may merge before there are parts",
        CUDA + "_prefill.cpp",
        "encoder.set_output_array(out);",
        "",
        prefill("split_keys"),
    ),
    Fault(
        "CUDA prefill: V is stored over K that is still read",
        CUDA + "_prefill_mma.cuh",
        "if (__syncthreads_or(bound > power_of_two(exponent))) {",
        "if (bound > power_of_two(exponent)) {",
        prefill("causal[mma]"),
    ),
    Fault(
        "CUDA prefill: tensor cores read what was not fenced",
        CUDA + "_prefill_wgmma.cuh",
        "    fence_shared_writes();\n    arrive(barriers.full",
        "    arrive(barriers.full",
        prefill("causal[wgmma]"),
    ),
    Fault(
        "CUDA prefill: scores are read before their product came",
        CUDA + "_prefill_wgmma.cuh",
        "wgmma_wait<1>();",
        "",
        prefill("causal[wgmma]"),
    ),
    Fault(
        "CUDA prefill: V is released while it is read",
        CUDA + "_prefill_wgmma.cuh",
        """      wgmma_wait<0>();
      hold_registers(out);
      release(barriers.empty(true, last));
""",
        """      release(barriers.empty(true, last));
      wgmma_wait<0>();
      hold_registers(out);
""",
        prefill("causal[wgmma]"),
    ),
    Fault(
        "CUDA prefill: a lane releases what others still read",
        CUDA + "_prefill_wgmma.cuh",
        "  __syncwarp();\n  if (threadIdx.x % 32 == 0) {",
        "  if (threadIdx.x % 32 == 0) {",
        prefill("causal[wgmma]"),
    ),
]

THE_CACHES = [
    Fault(
        "rows are added before those that are there",
        CACHES,
        "mx.concatenate([x, rows_like(x, missing)], axis=2)",
        "mx.concatenate([rows_like(x, missing), x], axis=2)",
        soaked("Growing"),
        "def reserve(",
    ),
    Fault(
        "queries are not rotated as the keys are",
        CACHES,
        "q = rotate(q, k.split)",
        "q = q",
        "test_kv_cache_spec.py::TestStore::test_attention_is_that_over_the_stored_values",
        "def attend(",
    ),
    Fault(
        "the signs of a rotation are not undone",
        CACHES,
        "(spread * _signs(dim))",
        "(spread)",
        "test_kv_cache_spec.py::TestRotation::test_keeps_products_and_can_be_undone",
        "def unrotate(",
    ),
    Fault(
        "a matrix that is not its own inverse",
        CACHES,
        "values @ _matrix(dim).T",
        "values @ _matrix(dim)",
        "test_kv_cache_spec.py::TestRotation::test_keeps_products_and_can_be_undone",
        "def unrotate(",
    ),
    Fault(
        "recent tokens are not trimmed",
        CACHES,
        "left = self.tail[0].shape[2] - n",
        "left = self.tail[0].shape[2]",
        soaked("Recent"),
    ),
    Fault(
        "the first tokens are evicted",
        CACHES,
        "self.next = self.keep",
        "self.next = 0",
        soaked("Rotating"),
        "def _append_one(",
    ),
    Fault(
        "the oldest tokens behind the newest",
        CACHES,
        "[x[:, :, :keep], x[:, :, begin:], x[:, :, keep:begin]]",
        "[x[:, :, :keep], x[:, :, keep:begin], x[:, :, begin:]]",
        soaked("Rotating"),
    ),
    Fault(
        "a token too many is evicted",
        CACHES,
        "drop = self.used - self.max_size + 1",
        "drop = self.used - self.max_size + 2",
        soaked("Rotating"),
        "def _append_many(",
    ),
    Fault(
        "junk behind a prompt stays there",
        CACHES,
        "index = (mx.arange(used) - mx.array(shifts)[:, None]) % used",
        "index = (mx.arange(used) + mx.array(shifts)[:, None]) % used",
        "test_kv_cache_batch.py::TestProtocol::test_right_padding_goes_to_the_front",
    ),
    Fault(
        "a shorter batch is not padded when it joins",
        CACHES,
        "n + used - each.used for each",
        "n for each",
        soaked("Batch"),
    ),
    Fault(
        "evicted tokens count as there",
        CACHES,
        "kept = min(self.used, self.max_size - 1)",
        "kept = self.used",
        soaked("BatchOfNewest"),
    ),
    Fault(
        "a block that another sequence holds is written",
        CACHES,
        "if holders > 1:",
        "if holders > 2:",
        "test_blocks.py::TestTables",
    ),
    Fault(
        "a block that was copied stays held",
        CACHES,
        "table.allocator.release([source])",
        "pass",
        "test_blocks.py::TestRandomCalls",
    ),
    Fault(
        "blocks behind the last token stay held",
        CACHES,
        "self.allocator.release(self.blocks[kept:])",
        "pass",
        "test_blocks.py::TestRandomCalls",
    ),
    Fault(
        "a shared block is not copied before it is written",
        CACHES,
        "if copies:",
        "if not copies:",
        soaked("Paged"),
        "def append(",
    ),
    Fault(
        "shared prefixes are read twice",
        CACHES,
        "own_ends = [end - size * skip for",
        "own_ends = [end for",
        soaked("Paged"),
    ),
    Fault(
        "a sink counts for every part",
        CACHES,
        "self._attend(q, table, [length], return_lse=True)",
        "self._attend(q, table, [length], return_lse=True, sinks=self.sinks)",
        "test_paged_cache.py::TestSharedPrefixes::test_sinks_count_once",
    ),
    Fault(
        "left padding is stored",
        CACHES,
        "return [min(skip, width) for skip in self._skip]",
        "return [0 for skip in self._skip]",
        "test_paged_cache.py::TestBatches::test_left_padding_is_never_stored",
    ),
    Fault(
        "a damaged file is loaded",
        CACHES,
        "if kept != checksum(texts[_MARK], arrays):",
        "if not kept:",
        "test_kv_cache_files.py::TestFaults::test_every_damaged_byte_is_noticed",
    ),
    Fault(
        "a file of another model is loaded",
        CACHES,
        'described["model"] not in (None, fingerprint(model))',
        "False",
        "test_kv_cache_files.py::TestFaults::test_of_another_model",
    ),
    Fault(
        "a block is found by its own tokens alone",
        CACHES,
        "hashlib.sha256(digest + block).digest()",
        "hashlib.sha256(block).digest()",
        "test_prefix_cache.py::TestInMemory::test_the_longest_known_beginning_is_found",
    ),
    Fault(
        "blocks that others hold are dropped",
        CACHES,
        "if allocator.references(blocks[index]) == 1:",
        "if allocator.references(blocks[index]) >= 1:",
        "test_prefix_cache.py::TestInMemory::test_blocks_of_living_sequences_stay",
    ),
    Fault(
        "a damaged block is used",
        CACHES,
        'if metadata.get("digest") != checksum(description, arrays):',
        'if not metadata.get("digest"):',
        "test_prefix_cache.py::TestFiles::test_damaged_files_are_refused_and_the_rest_is_used",
    ),
    Fault(
        "a block that was found may go while the next one is loaded",
        CACHES,
        "self._share(self._blocks[key])",
        "self._share({})",
        "test_prefix_cache.py::TestFiles::test_loading_a_block_does_not_drop_one_that_was_found",
    ),
    Fault(
        "files are of a name, not of weights",
        CACHES,
        "None if self.files is None else self.pool.fingerprint()",
        "None",
        "test_prefix_cache.py::TestFiles::test_of_other_weights_under_the_same_name",
    ),
    Fault(
        "a step that is refused has written other layers",
        CACHES,
        "self.pool.require(tables, self._counts(N) or [N])",
        "pass",
        "test_paged_cache.py::TestExhausted::"
        "test_a_refused_step_changes_no_layer_beside_the_pool_either",
    ),
    Fault(
        "a draft's tokens are taken for known",
        CACHES,
        "length = min([length, *used])",
        "pass",
        "test_paged_serving.py::TestKnownPrompts::"
        "test_layers_that_hold_fewer_tokens_than_are_named",
    ),
    Fault(
        "no block is kept for a last one that is shared",
        CACHES,
        "return new + bool(shared)",
        "return new",
        "test_paged_serving.py::TestNeed",
    ),
    Fault(
        "half a stop sequence is forgotten in a pause",
        CACHES,
        "self._stopping[batch.uids[row]] = getattr(batch, _MATCHERS)[row]",
        "pass",
        "test_paged_serving.py::TestGenerator::test_a_stop_sequence_is_seen_across_a_pause",
    ),
    Fault(
        "a part without keys is no number",
        CACHES,
        "base = mx.where(highest == -mx.inf, 0.0, highest)",
        "base = highest",
        "test_package.py::TestMergeAttention",
        "def merge_attention(",
    ),
]

FAULTS = [
    *FORMATS_AND_SOFTMAX,
    *CPU_KERNELS,
    *CPU_INTEGER_KERNELS,
    *CPU_TILES_AND_PARTS,
    *THE_OP,
    *CUDA_KERNELS,
    *THE_CACHES,
]
