// Conversions of small floats, of every code at every place, against the codec.

#include <cstdio>

#include "mlx/backend/cuda/quantized_sdpa_small_floats.cuh"

using namespace mlx::core;
using namespace mlx::core::quantized_sdpa;

namespace {

int n_wrong;

void check(const char* what, uint32_t code, uint32_t half, float expected) {
  float x = f16_to_float(half);
  bool same =
      x != x ? expected != expected : float_bits(x) == float_bits(expected);
  if (!same) {
    std::fprintf(stderr, "%s %#x: %g, not %g\n", what, code, x, expected);
    ++n_wrong;
  }
}

void check_e4m3() {
  for (uint32_t codes = 0; codes < 1 << 16; ++codes) {
    for (uint32_t pair :
         {convert_e4m3x2(codes), e4m3_to_f16x2_by_bits(codes)}) {
      check("e4m3", codes, pair, kv::e4m3_to_float(codes & 0xff));
      check("e4m3", codes, pair >> 16, kv::e4m3_to_float(codes >> 8));
    }
  }
}

// Whatever the codes beside a pair are.
void check_e2m1() {
  for (uint32_t codes = 0; codes < 1 << 8; ++codes) {
    uint32_t low = codes % 16, high = codes / 16;
    for (int i = 0; i < 4; ++i) {
      for (uint32_t others : {0u, ~0u, 0x12345678u, 0xfedcba98u}) {
        uint32_t places = 0x000f000fu << 4 * i;
        uint32_t pair = (low | high << 16) << 4 * i;
        uint32_t x = e2m1_to_f16x2((others & ~places) | pair, i);
        check("e2m1", low, x, kv::e2m1_to_float(low) / 16384);
        check("e2m1", high, x >> 16, kv::e2m1_to_float(high) / 16384);
      }
    }
  }
}

} // namespace

int main() {
  check_e4m3();
  check_e2m1();
  return n_wrong > 0;
}
