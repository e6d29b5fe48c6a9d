// One small kernel a feature of the executor. FAULT plants a fault where a
// kernel has one to offer.

#include <metal_atomic>
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
#include <metal_stdlib>

using namespace metal;

#ifndef FAULT
#define FAULT 0
#endif

constant bool negate [[function_constant(0)]];
constant int offset [[function_constant(1)]];

// Sum over a threadgroup through threadgroup memory.
template <typename T>
[[kernel]] void row_sum(
    const device T* x [[buffer(0)]],
    device float* y [[buffer(1)]],
    constant int& n [[buffer(2)]],
    const device T* bias [[buffer(3), function_constant(negate)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup float parts[FAULT == 1 ? 3 : 4];
  float sum = 0;
  int end = FAULT == 2 ? n + 1 : n;
  for (int i = simdgroup * 32 + lane; i < end; i += 128) {
    sum += float(x[group.x * n + i]);
  }
  sum = simd_sum(sum);
  if (lane == 0 && (FAULT != 3 || simdgroup != 2)) {
    parts[simdgroup] = sum;
  }
#if FAULT == 4
  threadgroup_barrier(mem_flags::mem_none);
#elif FAULT == 5
  if (simdgroup != 1) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
#elif FAULT != 6
  threadgroup_barrier(mem_flags::mem_threadgroup);
#endif
  if (simdgroup == 0 && (FAULT != 7 || lane < 16)) {
    sum = simd_sum(lane < 4 ? parts[lane] : 0.0f);
    if (lane == 0 || FAULT == 8) {
      y[FAULT == 9 ? 0 : group.x] =
          offset + (negate ? float(bias[0]) - sum : sum);
    }
  }
}

template [[host_name(
    "row_sum_half")]] [[kernel]] decltype(row_sum<half>) row_sum<half>;
template [[host_name(
    "row_sum_float")]] [[kernel]] decltype(row_sum<float>) row_sum<float>;
template [[host_name(
    "row_sum_bfloat")]] [[kernel]] decltype(row_sum<bfloat>) row_sum<bfloat>;

// What each operation of a simdgroup gives for x in row r of y.
[[kernel]] void lane_operations(
    const device float* x [[buffer(0)]],
    device float* y [[buffer(1)]],
    uint lane [[thread_index_in_simdgroup]]) {
  float v = x[lane];
  device float* at = y + lane;
  at[0] = simd_sum(v);
  at[32] = simd_product(v);
  at[64] = simd_min(v);
  at[96] = simd_max(v);
  at[128] = simd_prefix_inclusive_sum(v);
  at[160] = simd_prefix_exclusive_sum(v);
  at[192] = simd_shuffle(v, ushort(31 - lane));
  at[224] = simd_shuffle_xor(v, 5);
  at[256] = simd_shuffle_and_fill_down(v, -v, 3);
  at[288] = simd_shuffle_and_fill_up(v, -v, 3);
  at[320] = simd_shuffle_rotate_down(v, 3);
  at[352] = simd_shuffle_rotate_up(v, 3);
  at[384] = simd_broadcast(v, 7);
  at[416] = simd_broadcast_first(v);
  at[448] = quad_sum(v);
  at[480] = quad_max(v);
  at[512] = quad_shuffle_xor(v, 1);
  at[544] = simd_any(v > 1) + 2 * simd_all(v > 0);
  at[576] = popcount(uint(simd_vote::vote_t(simd_ballot(v > 1).votes)));
  at[608] = simd_sum(half(v));
  at[640] = float(simd_and(uint(lane)) + simd_or(lane) + simd_xor(lane));
  float2 pair = simd_sum(float2(v, 2 * v));
  at[672] = pair.x + pair.y;
  at[704] = simd_shuffle_down(v, 0);
  at[736] = simd_shuffle_up(v, 0);
}

// c = a b + a for 8 x 8 matrices, b stored transposed.
template <typename T>
[[kernel]] void matrices(
    const device T* a [[buffer(0)]],
    const device T* b [[buffer(1)]],
    device float* c [[buffer(2)]]) {
  threadgroup T staged[64];
  simdgroup_matrix<T, 8, 8> left, right, copy;
  simdgroup_matrix<float, 8, 8> sum(0.0f);
  simdgroup_load(left, a);
  simdgroup_store(left, staged, 8, ulong2(0), true);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  simdgroup_load(copy, staged, 8, ulong2(0), true);
  simdgroup_load(right, b, 8, ulong2(0), true);
  simdgroup_matrix<T, 8, 8> one(T(1));
  simdgroup_multiply(sum, copy, one);
  simdgroup_multiply_accumulate(sum, left, right, sum);
  simdgroup_store(sum, c, 8);
}
template [[host_name(
    "matrices_half")]] [[kernel]] decltype(matrices<half>) matrices<half>;
template [[host_name(
    "matrices_float")]] [[kernel]] decltype(matrices<float>) matrices<float>;

// A histogram by atomics, and threadgroup memory that the host sizes.
[[kernel]] void histogram(
    const device uint* x [[buffer(0)]],
    device atomic_uint* counts [[buffer(1)]],
    device atomic_float* total [[buffer(2)]],
    threadgroup uint* copies [[threadgroup(0)]],
    uint position [[thread_position_in_grid]],
    uint local [[thread_index_in_threadgroup]],
    uint size [[threads_per_threadgroup]]) {
  copies[local] = x[position];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint value = copies[size - 1 - local];
  atomic_fetch_add_explicit(counts + value, 1u, memory_order_relaxed);
  uint seen = atomic_load_explicit(counts + value, memory_order_relaxed);
  if (seen > 0) {
    atomic_fetch_add_explicit(total, 0.5f, memory_order_relaxed);
  }
}
