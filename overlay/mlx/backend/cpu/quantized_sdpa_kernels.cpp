// The fused CPU kernels, compiled once for each instruction set. Nothing here
// may leave a symbol that another instruction set's code could link to, so no
// headers of the library and no std:: templates.

#include "mlx/backend/cpu/quantized_sdpa_integer_round.h"
#include "mlx/backend/cpu/quantized_sdpa_tile.h"
#include "mlx/backend/cpu/quantized_sdpa_vector.h"

namespace {

// What a format brings to the kernels.
struct FormatKernels {
  int row_bits;
  ScoreFn (*score[3])(int group_size);
  ValueFn value[3];
  DecodeFn decode_keys;
  DecodeFn decode_values;
  void (*fill_table)(const float* codebook, float* table);
};

template <typename Codec>
constexpr FormatKernels format_kernels() {
  return {
      Codec::bits,
      {score_fn<Codec, 1>, score_fn<Codec, 2>, score_fn<Codec, 4>},
      {value_tile<Codec, 1>, value_tile<Codec, 2>, value_tile<Codec, 4>},
      decode_keys<Codec>,
      decode_values<Codec>,
      fill_table<Codec>};
}

#define KV_FORMAT_KERNELS(name, mode, bits, codec) format_kernels<codec>(),
constexpr FormatKernels formats[] = {FOR_EACH_KV_CODEC(KV_FORMAT_KERNELS)};
#undef KV_FORMAT_KERNELS

int row_index(int rows) {
  return rows == 4 ? 2 : rows - 1;
}

TileView make_view(const CpuOperand& x, const OperandScratch& s) {
  formats[x.format].fill_table(x.codebook, s.table);
  TileView view;
  view.n = 0;
  view.dim = x.dim;
  view.group_size = x.group_size;
  view.n_groups = x.dim / x.group_size;
  view.scales = s.scales;
  view.biases = s.biases;
  view.table = s.table;
  return view;
}

void init_part(const CpuItem& item, int dim, const CpuPartials& part) {
  memset(part.acc, 0, size_t(item.n_rows) * dim * sizeof(float));
  for (int r = 0; r < item.n_rows; ++r) {
    part.states[r] = kv::softmax_init();
  }
}

size_t vector_scratch(const CpuArgs& args) {
  Arena arena(nullptr);
  VectorScratch scratch(args, arena);
  return arena.taken(nullptr) + max_vector_rows * args.v.dim;
}

size_t tile_scratch(const CpuArgs& args, int n_rows) {
  Arena arena(nullptr);
  TileScratch scratch(args, n_rows, arena);
  return arena.taken(nullptr);
}

void attend_vector(
    const CpuArgs& args,
    const CpuItem& item,
    float* memory,
    const CpuPartials& part) {
  init_part(item, args.v.dim, part);
  KeyRange keys = item_keys(args, item);
  if (keys.begin >= keys.end) {
    return;
  }
  Arena arena(memory);
  VectorScratch s(args, arena);
  float* acc = arena.take(max_vector_rows * args.v.dim);
  int rows = vector_rows(item.n_rows);
  memset(acc, 0, rows * args.v.dim * sizeof(float));
  load_queries(args, item, rows, s.rows);
  sum_groups(rows * args.k.dim, args.k.group_size, s.rows, s.q_sums);
  interleave_queries(rows, args.k.dim, s.rows, s.q);

  const FormatKernels& k_format = formats[args.k.format];
  const FormatKernels& v_format = formats[args.v.format];
  ScoreFn score = k_format.score[row_index(rows)](args.k.group_size);
  ValueFn value = v_format.value[row_index(rows)];
  TileView views[2];
  views[0] = make_view(args.k, s.k);
  views[1] = views[0];
  TileView v = make_view(args.v, s.v);
  int k_row_bytes = args.k.dim * k_format.row_bits / 8;
  int v_row_bytes = args.v.dim * v_format.row_bits / 8;
  bool v_has_bias = args.v.biases.data;
  KeyRange existing = existing_keys(args, item.batch);
  locate(args, args.k, item, tile_at(keys, first_tile(keys)), views[0]);
  int current = 0;

  for (int start = first_tile(keys); start < keys.end; start += tile_keys) {
    KeyRange tile = tile_at(keys, start);
    TileView& k = views[current];
    TileView& next_k = views[current ^= 1];
    load_scales(args, args.k, item, tile, k);
    locate(args, args.v, item, tile, v);
    load_scales(args, args.v, item, tile, v);
    clear_tail(v, v_has_bias);
    score({&k, &v, v_row_bytes, s.q, s.q_sums, s.scores});
    for (int r = 0; r < rows; ++r) {
      // A padding row has q = 0, so its state does not matter.
      kv::SoftmaxState unused = kv::softmax_init();
      bool real = r < item.n_rows;
      float factor = softmax_tile(
          args,
          item,
          existing,
          item.row_begin + (real ? r : 0),
          tile,
          s.scores + r * tile_keys,
          real ? part.states[r] : unused);
      scale_row(factor, args.v.dim, acc + r * args.v.dim);
    }
    scale_weights(v, rows, v_has_bias, s);
    KeyRange next = tile_at(keys, start + tile_keys);
    next_k.n = 0;
    if (next.begin < next.end) {
      locate(args, args.k, item, next, next_k);
    }
    value({&v, &next_k, k_row_bytes, s.weights, s.bias_sums, acc});
  }
  memcpy(part.acc, acc, size_t(item.n_rows) * args.v.dim * sizeof(float));
}

void attend_tile(
    const CpuArgs& args,
    const CpuItem& item,
    float* memory,
    const CpuPartials& part) {
  init_part(item, args.v.dim, part);
  KeyRange keys = item_keys(args, item);
  if (keys.begin >= keys.end) {
    return;
  }
  Arena arena(memory);
  TileScratch s(args, item.n_rows, arena);
  int rows = tile_rows(item.n_rows);
  memset(s.acc, 0, size_t(rows) * args.v.dim * sizeof(float));
  load_queries(args, item, rows, s.q);
  TileView k = make_view(args.k, s.k);
  TileView v = make_view(args.v, s.v);
  KeyRange existing = existing_keys(args, item.batch);

  for (int start = first_tile(keys); start < keys.end; start += tile_keys) {
    KeyRange tile = tile_at(keys, start);
    locate(args, args.k, item, tile, k);
    load_scales(args, args.k, item, tile, k);
    locate(args, args.v, item, tile, v);
    load_scales(args, args.v, item, tile, v);
    formats[args.k.format].decode_keys(k, s.keys);
    formats[args.v.format].decode_values(v, s.values);
    multiply_keys(rows, s.q, args.k.dim, s.keys, k.n, s.scores);
    for (int r = 0; r < item.n_rows; ++r) {
      float factor = softmax_tile(
          args,
          item,
          existing,
          item.row_begin + r,
          tile,
          s.scores + r * tile_keys,
          part.states[r]);
      scale_row(factor, args.v.dim, s.acc + r * args.v.dim);
    }
    multiply_values(s.scores, s.values, rows, v.n, s.acc, args.v.dim);
  }
  memcpy(part.acc, s.acc, size_t(item.n_rows) * args.v.dim * sizeof(float));
}

#if defined(__AVX2__) && !defined(__AVX512F__)

bool has_integer(int k_format, int v_format) {
  return integer_formats[k_format].supported &&
      integer_formats[v_format].supported;
}

size_t integer_scratch(const CpuArgs& args, int n_rows) {
  Arena arena(nullptr);
  IntegerScratch scratch(args, n_rows, arena);
  return arena.taken(nullptr);
}

// Integer products where rounding q does not show, else float32 ones.
void score_integer_tile(
    const CpuArgs& args,
    TileView& k,
    const Ahead& next_v,
    int rows,
    IntegerScratch& s) {
  auto& format = integer_formats[args.k.format];
  if (!is_close(args, format, k, rows, s.q_errors)) {
    formats[args.k.format].decode_keys(k, s.float_keys);
    return multiply_keys(rows, s.rows, k.dim, s.float_keys, k.n, s.scores);
  }
  adjust_scales(format, k);
  IntegerScoreJob job{
      &k, next_v, rows, s.keys, s.q, s.q_steps, s.q_sums, s.scores};
  if (rows == integer_rows) {
    job.q = s.wide_q;
    return format.score(job);
  }
  format.decode_keys(k, s.keys);
  score_integers(job);
}

// Scores of a tile to integer weights; the accumulators are scaled to match.
void weigh_integer_tile(
    const CpuArgs& args,
    const CpuItem& item,
    KeyRange existing,
    KeyRange keys,
    const TileView& v,
    IntegerScratch& s,
    kv::SoftmaxState* states) {
  for (int r = 0; r < tile_rows(item.n_rows); ++r) {
    float* scores = s.scores + r * tile_keys;
    if (r < item.n_rows) {
      float factor = softmax_tile(
          args, item, existing, item.row_begin + r, keys, scores, states[r]);
      scale_row(factor, args.v.dim, s.acc + r * args.v.dim);
    } else {
      memset(scores, 0, tile_keys * sizeof(float));
    }
    for (int g = 0; g < v.n_groups; ++g) {
      round_weights(v, r, g, s);
    }
  }
}

void attend_integer(
    const CpuArgs& args,
    const CpuItem& item,
    float* memory,
    const CpuPartials& part) {
  init_part(item, args.v.dim, part);
  KeyRange keys = item_keys(args, item);
  if (keys.begin >= keys.end) {
    return;
  }
  Arena arena(memory);
  IntegerScratch s(args, item.n_rows, arena);
  int rows = tile_rows(item.n_rows);
  memset(s.acc, 0, size_t(rows) * args.v.dim * sizeof(float));
  load_queries(args, item, rows, s.rows);
  round_queries(args, rows, s);
  auto& v_format = integer_formats[args.v.format];
  int k_bytes = args.k.dim * formats[args.k.format].row_bits / 8;
  int v_bytes = args.v.dim * formats[args.v.format].row_bits / 8;
  // The tile at hand and the next, by turns.
  TileView k_views[2];
  TileView v_views[2];
  k_views[0] = k_views[1] = make_view(args.k, s.k);
  v_views[0] = v_views[1] = make_view(args.v, s.v);
  KeyRange existing = existing_keys(args, item.batch);
  KeyRange first = tile_at(keys, first_tile(keys));
  locate(args, args.k, item, first, k_views[0]);
  locate(args, args.v, item, first, v_views[0]);
  int turn = 0;

  for (int start = first_tile(keys); start < keys.end; start += tile_keys) {
    KeyRange range = tile_at(keys, start);
    TileView& k = k_views[turn];
    TileView& v = v_views[turn];
    turn ^= 1;
    load_scales(args, args.k, item, range, k);
    load_scales(args, args.v, item, range, v);
    adjust_scales(v_format, v);
    // K's too: the estimate of its norm reads whole vectors.
    clear_tail(k, args.k.biases.data);
    clear_tail(v, true);
    k_views[turn].n = v_views[turn].n = 0;
    KeyRange next = tile_at(keys, start + tile_keys);
    if (next.begin < next.end) {
      locate(args, args.k, item, next, k_views[turn]);
      locate(args, args.v, item, next, v_views[turn]);
    }
    score_integer_tile(args, k, {&v_views[turn], v_bytes}, rows, s);
    weigh_integer_tile(args, item, existing, range, v, s, part.states);
    // Four rows read V's codes directly, more share what is decoded once.
    bool shared = rows > integer_rows;
    if (shared) {
      v_format.decode_values(v, s.values);
    }
    auto add = shared ? value_integers<DecodedPairs> : v_format.value;
    add(
        {&v,
         s.values,
         {&k_views[turn], k_bytes},
         rows,
         s.weights,
         s.steps,
         s.bias_sums,
         s.acc});
  }
  reorder_values(v_format, rows * args.v.dim, s.acc);
  memcpy(part.acc, s.acc, size_t(item.n_rows) * args.v.dim * sizeof(float));
}

#else

bool has_integer(int, int) {
  return false;
}

size_t integer_scratch(const CpuArgs&, int) {
  return 0;
}

void attend_integer(
    const CpuArgs&,
    const CpuItem&,
    float*,
    const CpuPartials&) {
  __builtin_trap();
}

#endif

void store_row(const Tensor& out, int64_t offset, int n, const float* row) {
  if (out.type == Scalar::f32) {
    memcpy(static_cast<float*>(out.data) + offset, row, n * sizeof(float));
    return;
  }
  auto halves = static_cast<uint16_t*>(out.data) + offset;
  if (out.type == Scalar::f16) {
    for (int i = 0; i < n; i += lanes) {
      store(halves + i, floats_to_half(load<Floats>(row + i)));
    }
  } else {
    for (int i = 0; i < n; ++i) {
      halves[i] = float_to_bfloat(row[i]);
    }
  }
}

void merge_into(
    const CpuPartials& parts,
    int part,
    int row,
    int n_rows,
    int dim) {
  float* first = parts.acc + size_t(row) * dim;
  const float* other = parts.acc + (size_t(part) * n_rows + row) * dim;
  auto factors = kv::softmax_merge(
      parts.states[row], parts.states[size_t(part) * n_rows + row]);
  for (int i = 0; i < dim; i += lanes) {
    store(
        first + i,
        load<Floats>(first + i) * splat(factors.first) +
            load<Floats>(other + i) * splat(factors.second));
  }
}

void finish(
    const CpuArgs& args,
    const CpuItem& item,
    const CpuPartials& parts) {
  int heads = args.n_q_heads / args.n_kv_heads;
  int dim = args.v.dim;
  for (int r = 0; r < item.n_rows; ++r) {
    int head = item.kv_head * heads + (item.row_begin + r) % heads;
    int q_pos = (item.row_begin + r) / heads;
    for (int part = 1; part < parts.n_parts; ++part) {
      merge_into(parts, part, r, item.n_rows, dim);
    }
    float* acc = parts.acc + size_t(r) * dim;
    kv::SoftmaxState& state = parts.states[r];
    if (args.sinks) {
      auto factors = kv::softmax_merge(state, {args.sinks[head], 1.0f});
      scale_row(factors.first, dim, acc);
    }
    scale_row(kv::softmax_finish(state), dim, acc);
    int64_t offset = item.batch * args.out.strides[0] +
        head * args.out.strides[1] + q_pos * args.out.strides[2];
    store_row(args.out, offset, dim, acc);
    if (args.lse) {
      int64_t row = int64_t(item.batch) * args.n_q_heads + head;
      args.lse[row * args.q_len + q_pos] = kv::softmax_lse(state);
    }
  }
}

} // namespace

#define QUANTIZED_SDPA_NAME_(target) cpu_kernels_##target
#define QUANTIZED_SDPA_NAME(target) QUANTIZED_SDPA_NAME_(target)
#define QUANTIZED_SDPA_TEXT_(target) #target
#define QUANTIZED_SDPA_TEXT(target) QUANTIZED_SDPA_TEXT_(target)

namespace mlx::core::quantized_sdpa {

const CpuKernels& QUANTIZED_SDPA_NAME(QUANTIZED_SDPA_TARGET)() {
  static const CpuKernels kernels{
      QUANTIZED_SDPA_TEXT(QUANTIZED_SDPA_TARGET),
      vector_scratch,
      tile_scratch,
      integer_scratch,
      has_integer,
      attend_vector,
      attend_tile,
      attend_integer,
      finish};
  return kernels;
}

} // namespace mlx::core::quantized_sdpa
