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

} // namespace

int main() {
  check_e4m3();
  return n_wrong > 0;
}
