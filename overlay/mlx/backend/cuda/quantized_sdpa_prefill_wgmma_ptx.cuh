// PTX of sm_90a: asynchronous matrix products of a warpgroup, the barriers of a
// producer and its consumers, registers moved between them.

#pragma once

#include "mlx/backend/cuda/quantized_sdpa_ptx.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define QUANTIZED_SDPA_HAS_WGMMA 1
#else
#define QUANTIZED_SDPA_HAS_WGMMA 0
#endif

namespace mlx::core::quantized_sdpa::prefill {

KV_DEVICE void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier),
               "r"(arrivals)
               : "memory");
}

KV_DEVICE void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Waits for the phase of this parity to end.
KV_DEVICE void wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Ordinary writes to shared memory become visible to the tensor cores.
KV_DEVICE void fence_shared_writes() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

KV_DEVICE void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

KV_DEVICE void arrive_threads(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

KV_DEVICE bool any_thread(int barrier, int threads, bool x) {
  uint32_t y;
  asm volatile(
      "{.reg .pred p, q;\n"
      "setp.ne.u32 p, %3, 0;\n"
      "bar.red.or.pred q, %1, %2, p;\n"
      "selp.u32 %0, 1, 0, q;}\n"
      : "=r"(y)
      : "r"(barrier), "r"(threads), "r"(uint32_t(x))
      : "memory");
  return y != 0;
}

#if QUANTIZED_SDPA_HAS_WGMMA

template <int n>
KV_DEVICE void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(n));
}

template <int n>
KV_DEVICE void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(n));
}

KV_DEVICE void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

KV_DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int pending>
KV_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Tells the compiler that these registers change here.
template <int n>
KV_DEVICE void hold_registers(float (&x)[n][4]) {
#pragma unroll
  for (int j = 0; j < n; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      asm volatile("" : "+f"(x[j][i])::"memory");
    }
  }
}

#endif

// A matrix in shared memory in rows of 128 bytes whose 16-byte pieces are
// swizzled by the row, eight rows together. `step` is the distance in bytes
// between parts 64 columns apart, which only a transposed operand needs.
KV_DEVICE uint64_t matrix_descriptor(uint32_t address, int step) {
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(step >> 4) << 16 |
      uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

#if QUANTIZED_SDPA_HAS_WGMMA

// clang-format off
#define ACC1(c, j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define ACC4(c, j) ACC1(c, j), ACC1(c, j + 1), ACC1(c, j + 2), ACC1(c, j + 3)
#define REGS32 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, " \
  "%30, %31"
#define REGS64 REGS32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, " \
  "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, " \
  "%60, %61, %62, %63"
// clang-format on

// c = a b^T, or c += a b^T, with a [64, 16] and b [8 n, 16] in shared memory.
template <bool add>
KV_DEVICE void wgmma_shared(float (&c)[8][4], uint64_t a, uint64_t b) {
  asm volatile(
      "{.reg .pred p;\n"
      "setp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " REGS32
      "}, %32, %33, p, 1, 1, 0, 0;}\n"
      : ACC4(c, 0), ACC4(c, 4)
      : "l"(a), "l"(b), "n"(int(add)));
}

template <bool add>
KV_DEVICE void wgmma_shared(float (&c)[16][4], uint64_t a, uint64_t b) {
  asm volatile(
      "{.reg .pred p;\n"
      "setp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " REGS64
      "}, %64, %65, p, 1, 1, 0, 0;}\n"
      : ACC4(c, 0), ACC4(c, 4), ACC4(c, 8), ACC4(c, 12)
      : "l"(a), "l"(b), "n"(int(add)));
}

// c += a b with a [64, 16] in registers and b [16, 8 n] in shared memory.
KV_DEVICE void
wgmma_registers(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " REGS32
               "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"
               : ACC4(c, 0), ACC4(c, 4)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

KV_DEVICE void
wgmma_registers(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " REGS64
               "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
               : ACC4(c, 0), ACC4(c, 4), ACC4(c, 8), ACC4(c, 12)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#undef ACC1
#undef ACC4
#undef REGS32
#undef REGS64

#endif

} // namespace mlx::core::quantized_sdpa::prefill
