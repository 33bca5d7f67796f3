// Products with panels of floats. Include after generic_finish.h.
#pragma once

#include "base/simd/product.h"
#include "kernels/linear/generic_finish.h"

namespace tersor::linear {
namespace {

inline constexpr int kBlockK = 256;  // columns at a time: 16 KiB of float32 weights stay in the first cache

template <Float kFloat>
void float_panel(const void* panel, int64_t k, const float* x, int64_t stride, int n, const Finish& finish) {
  alignas(64) float sums[kMaxRows * 16];
  alignas(64) float converted[kBlockK * 16];
  for (int m = 0; m < n; ++m) store(sums + 16 * m, zero());
  const bool convert = kFloat != kF32 && n > kFloatTile;  // else in registers, on the way
  for (int64_t first = 0; first < k; first += kBlockK) {
    const int64_t size = k - first < kBlockK ? k - first : kBlockK;
    const void* block = (const char*)panel + first * 16 * float_bytes(kFloat);
    if (convert) {
      for (int64_t i = 0; i < size; ++i) store(converted + 16 * i, load_as<kFloat>(block, 16 * i));
      product<kF32>({converted, 16, size, x + first, stride, sums, 16}, 0, n);
    } else {
      product<kFloat>({block, 16, size, x + first, stride, sums, 16}, 0, n);
    }
  }
  for (int m = 0; m < n; ++m) finish_row(load(sums + 16 * m), finish, m);
}

}  // namespace
}  // namespace tersor::linear
