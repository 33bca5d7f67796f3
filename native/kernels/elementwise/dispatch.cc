#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "base/isa_table.h"
#include "base/threads.h"
#include "kernels/elementwise/elementwise.h"

namespace tersor::elementwise {
namespace {

constexpr int64_t kMinValues = 1 << 14;  // values worth a thread: a few microseconds

int64_t rows_per_thread(int64_t row_values) {
  return std::max<int64_t>(1, kMinValues / std::max<int64_t>(1, row_values));
}

// The cosines and sines of some positions. All layers of a token ask for the same ones, so the last few are kept.
struct Angles {
  float scale = 0;
  std::vector<int32_t> positions;               // (n)
  std::vector<float> inv_freq, cosines, sines;  // (half); (n, half)

  bool matches(const int32_t* p, int64_t n, const float* freq, int64_t half, float factor) const {
    return scale == factor && int64_t(positions.size()) == n && int64_t(inv_freq.size()) == half &&
           std::equal(p, p + n, positions.begin()) && std::equal(freq, freq + half, inv_freq.begin());
  }

  void fill(const int32_t* p, int64_t n, const float* freq, int64_t half, float factor) {
    scale = factor;
    positions.assign(p, p + n);
    inv_freq.assign(freq, freq + half);
    cosines.resize(n * half);
    sines.resize(n * half);
    parallel_for(n, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t j = 0; j < half; ++j) {
          const double angle = float(positions[i]) * freq[j];
          cosines[i * half + j] = float(std::cos(angle) * double(scale));
          sines[i * half + j] = float(std::sin(angle) * double(scale));
        }
      }
    });
  }
};

const Angles& angles_of(const int32_t* positions, int64_t n, const float* inv_freq, int64_t half, float scale) {
  static thread_local Angles kept[4];  // a model has one or two sets of frequencies
  static thread_local int oldest = 0;
  for (const Angles& a : kept) {
    if (a.matches(positions, n, inv_freq, half, scale)) return a;
  }
  Angles& a = kept[oldest];
  oldest = (oldest + 1) % 4;
  a.fill(positions, n, inv_freq, half, scale);
  return a;
}

}  // namespace

void rms_norm(const float* x, int64_t rows, int64_t d, const float* weight, float eps, float* y) {
  const Kernels& kernels = TERSOR_ACTIVE_KERNELS();
  parallel_for(rows, rows_per_thread(d), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernels.rms_norm(x + i * d, d, weight, eps, y + i * d);
  });
}

void gated(const float* x, int64_t rows, int64_t f, Activation activation, float* y) {
  const Kernels& kernels = TERSOR_ACTIVE_KERNELS();
  // Cut by values rather than rows, so that one long row is shared too.
  parallel_for(rows * f, std::min<int64_t>(f, kMinValues / 4), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = begin / f, at = begin % f, n = std::min(f - at, end - begin);
      kernels.gated(x + row * 2 * f + at, x + row * 2 * f + f + at, n, activation, y + begin);
      begin += n;
    }
  });
}

void add(float* x, const float* y, int64_t n) {
  const Kernels& kernels = TERSOR_ACTIVE_KERNELS();
  parallel_for(n, kMinValues, [&](int64_t begin, int64_t end) { kernels.add(x + begin, y + begin, end - begin); });
}

void softcap(float* x, int64_t n, float cap) {
  const Kernels& kernels = TERSOR_ACTIVE_KERNELS();
  parallel_for(n, kMinValues / 4, [&](int64_t begin, int64_t end) { kernels.softcap(x + begin, end - begin, cap); });
}

void rope(float* x, int64_t n, int64_t row_stride, int64_t heads, int64_t half, const int32_t* positions,
          const float* inv_freq, float scale) {
  const Angles& angles = angles_of(positions, n, inv_freq, half, scale);
  rotate(x, n, row_stride, heads, half, angles.cosines.data(), angles.sines.data(), half);
}

void rotate(float* x, int64_t n, int64_t row_stride, int64_t heads, int64_t half, const float* cosines,
            const float* sines, int64_t angle_stride) {
  const Kernels& kernels = TERSOR_ACTIVE_KERNELS();
  parallel_for(n, rows_per_thread(heads * half * 2), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t h = 0; h < heads; ++h) {
        kernels.rotate(x + i * row_stride + h * 2 * half, half, cosines + i * angle_stride, sines + i * angle_stride);
      }
    }
  });
}

void rope_from(float* x, int64_t n, int64_t row_stride, int64_t heads, int64_t half, int64_t start,
               const float* inv_freq, float scale) {
  static thread_local std::vector<int32_t> positions;
  positions.resize(n);
  std::iota(positions.begin(), positions.end(), int32_t(start));
  rope(x, n, row_stride, heads, half, positions.data(), inv_freq, scale);
}

}  // namespace tersor::elementwise
