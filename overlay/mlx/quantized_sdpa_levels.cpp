// The default table of the turbo modes, solved instead of typed in.

#include <array>
#include <cmath>
#include <numbers>
#include <stdexcept>
#include <string>

#include "mlx/quantized_sdpa.h"

namespace mlx::core::fast {

namespace {

constexpr int max_level_bits = 4;

double density(double x) {
  return std::exp(-0.5 * x * x) / std::sqrt(2 * std::numbers::pi);
}

double upper_tail(double x) {
  return 0.5 * std::erfc(x / std::sqrt(2.0));
}

// The mean of N(0, 1) between two positive bounds.
double centroid(double low, double high) {
  double mass = upper_tail(low) - (std::isinf(high) ? 0 : upper_tail(high));
  return (density(low) - (std::isinf(high) ? 0 : density(high))) / mass;
}

// Lloyd's fixed point on the positive half: each level is the centroid of the
// values nearest to it.
std::vector<float> solve(int bits) {
  int half = 1 << (bits - 1);
  std::vector<double> levels(half);
  for (int i = 0; i < half; ++i) {
    levels[i] = 3.0 * (i + 0.5) / half;
  }
  for (double change = 1; change > 1e-12;) {
    change = 0;
    double low = 0;
    for (int i = 0; i < half; ++i) {
      double high = i + 1 < half ? 0.5 * (levels[i] + levels[i + 1]) : INFINITY;
      double next = centroid(low, high);
      change = std::max(change, std::abs(next - levels[i]));
      levels[i] = next;
      low = high;
    }
  }
  std::vector<float> table(2 * half);
  for (int i = 0; i < half; ++i) {
    table[half + i] = float(levels[i]);
    table[half - 1 - i] = -float(levels[i]);
  }
  return table;
}

} // namespace

const std::vector<float>& lloyd_max_levels(int bits) {
  if (bits < 1 || bits > max_level_bits) {
    throw std::invalid_argument(
        "[lloyd_max_levels] bits must lie between 1 and " +
        std::to_string(max_level_bits) + "; got " + std::to_string(bits) + ".");
  }
  static const auto tables = [] {
    std::array<std::vector<float>, max_level_bits + 1> all;
    for (int b = 1; b <= max_level_bits; ++b) {
      all[b] = solve(b);
    }
    return all;
  }();
  return tables[bits];
}

} // namespace mlx::core::fast
