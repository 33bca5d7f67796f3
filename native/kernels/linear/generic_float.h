// Products with panels of floats. Include after generic_finish.h.
#pragma once

#include "base/simd/product.h"
#include "kernels/linear/generic_finish.h"

namespace tersor::linear {
namespace {

inline constexpr int kBlockK = 256;  // columns at a time: 16 KiB of float32 weights stay in the first cache

// kFloatPanels panels, panel_bytes apart, times M rows: the sums of one row and panel alone would wait for each other.
template <Float kFloat, int M>
void few_rows(const void* panels, int64_t panel_bytes, int64_t k, const float* x, int64_t stride,
              const Finish& finish) {
  F sums[M][kFloatPanels];
#pragma GCC unroll 3
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int p = 0; p < kFloatPanels; ++p) sums[m][p] = zero();
  }
  constexpr int kColumn = 16 * float_bytes(kFloat);  // bytes of a panel
  for (int64_t i = 0; i < k; ++i) {
    F w[kFloatPanels];
#pragma GCC unroll 4
    for (int p = 0; p < kFloatPanels; ++p) {
      const char* panel = (const char*)panels + p * panel_bytes;
      if (kAhead.floats && M == 1 && i % (64 / kColumn) == 0)
        __builtin_prefetch(panel + kColumn * i + kAhead.floats, 0, 2);
      w[p] = load_as<kFloat>(panel, 16 * i);
    }
#pragma GCC unroll 3
    for (int m = 0; m < M; ++m) {
      const F one = set(x[m * stride + i]);
#pragma GCC unroll 4
      for (int p = 0; p < kFloatPanels; ++p) sums[m][p] = fma(one, w[p], sums[m][p]);
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < kFloatPanels; ++p) {
    const Finish one = finish_of(finish, p);
#pragma GCC unroll 3
    for (int m = 0; m < M; ++m) finish_row(sums[m][p], one, m);
  }
}

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

template <Float kFloat>
void float_panels(const void* panels, int64_t panel_bytes, int count, int64_t k, const float* x, int64_t stride, int n,
                  const Finish& finish) {
  if (count == kFloatPanels && n == 1) return few_rows<kFloat, 1>(panels, panel_bytes, k, x, stride, finish);
  if (count == kFloatPanels && n == 2) return few_rows<kFloat, 2>(panels, panel_bytes, k, x, stride, finish);
  if (count == kFloatPanels && n == 3) return few_rows<kFloat, 3>(panels, panel_bytes, k, x, stride, finish);
  for (int p = 0; p < count; ++p)
    float_panel<kFloat>((const char*)panels + p * panel_bytes, k, x, stride, n, finish_of(finish, p));
}

}  // namespace
}  // namespace tersor::linear
