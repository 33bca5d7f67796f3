#include "formats/floats.h"

#include <atomic>
#include <cstring>
#include <vector>

#include "base/float16.h"
#include "base/threads.h"

namespace tersor {

static constexpr int64_t kGrain = 1 << 15;  // values worth handing to a thread

void widen_f16(const uint16_t* values, int64_t n, float* wide) {
  parallel_for(n, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) wide[i] = f16_to_f32(values[i]);
  });
}

void widen_bf16(const uint16_t* values, int64_t n, float* wide) {
  parallel_for(n, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) wide[i] = bf16_to_f32(values[i]);
  });
}

void narrow_f16(const float* w, int64_t n, uint16_t* halves) {
  parallel_for(n, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) halves[i] = f32_to_f16(w[i]);
  });
}

// Without their sign, float32 numbers are in the order of their bits as integers: finite < infinity < NaN.
float largest_magnitude(const float* w, int64_t n) {
  std::atomic<int32_t> largest{0};
  parallel_for(n, kGrain, [&](int64_t begin, int64_t end) {
    int32_t top = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int32_t magnitude = static_cast<int32_t>(float_to_bits(w[i]) & 0x7fffffff);
      top = magnitude > top ? magnitude : top;
    }
    int32_t seen = largest.load();
    while (seen < top && !largest.compare_exchange_weak(seen, top)) {
    }
  });
  return bits_to_float(static_cast<uint32_t>(largest.load()));
}

// ---- Sums of squares ----

static constexpr int64_t kPart = 256;  // values that are summed in float32
static constexpr int64_t kLanes = 8;
typedef float F8 __attribute__((vector_size(4 * kLanes)));

static SquareSums sums_of_part(const float* w, const float* decoded, int64_t n) {
  F8 squares[2] = {}, errors[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes)
    for (int k = 0; k < 2; ++k) {
      F8 x, miss;
      std::memcpy(&x, w + i + k * kLanes, sizeof x);
      std::memcpy(&miss, decoded + i + k * kLanes, sizeof miss);
      miss -= x;
      squares[k] += x * x;
      errors[k] += miss * miss;
    }
  squares[0] += squares[1];
  errors[0] += errors[1];
  float square = 0.f, error = 0.f;
  for (; i < n; ++i) {
    const float miss = decoded[i] - w[i];
    square += w[i] * w[i];
    error += miss * miss;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    square += squares[0][lane];
    error += errors[0][lane];
  }
  return {square, error};
}

SquareSums square_sums(const float* w, const float* decoded, int64_t n) {
  const int64_t n_grains = (n + kGrain - 1) / kGrain;
  std::vector<SquareSums> grains(static_cast<size_t>(n_grains));
  parallel_for(n_grains, 1, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      SquareSums sums = {0, 0};
      const int64_t stop = n < (g + 1) * kGrain ? n : (g + 1) * kGrain;
      for (int64_t i = g * kGrain; i < stop; i += kPart) {
        const SquareSums part = sums_of_part(w + i, decoded + i, stop - i < kPart ? stop - i : kPart);
        sums.w += part.w;
        sums.error += part.error;
      }
      grains[static_cast<size_t>(g)] = sums;
    }
  });
  SquareSums all = {0, 0};
  for (const SquareSums& sums : grains) {
    all.w += sums.w;
    all.error += sums.error;
  }
  return all;
}

}  // namespace tersor
