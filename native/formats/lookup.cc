#include "formats/lookup.h"

#include <cmath>

#include "base/threads.h"

namespace tersor {
namespace {

constexpr float kTiny = 1e-38f;     // least divisor: its reciprocal is finite
constexpr int64_t kGrain = 1 << 8;  // blocks worth handing to a thread
constexpr int64_t kStrip = 64;      // values whose levels are counted together

// levels[i] = number of bounds below x[i] * inverse; NaN counts as below all.
void count_levels(const float* x, int64_t n, float inverse, const float* bounds, uint8_t* levels) {
  float scaled[kStrip];
  int32_t counts[kStrip] = {};
  for (int64_t i = 0; i < n; i++) scaled[i] = x[i] * inverse;
  for (int b = 0; b < 15; b++) {
    for (int64_t i = 0; i < n; i++) counts[i] += scaled[i] > bounds[b] ? 1 : 0;
  }
  for (int64_t i = 0; i < n; i++) levels[i] = static_cast<uint8_t>(counts[i]);
}

}  // namespace

void lookup_encode(const float* w, int64_t blocks, int64_t block, const float* absmax, const LookupEncoder& encoder,
                   uint8_t* codes) {
  parallel_for(blocks, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) {
      const float inverse = 1.0f / (std::fabs(absmax[b]) < kTiny ? kTiny : absmax[b]);
      for (int64_t at = 0; at < block; at += kStrip) {
        const int64_t n = block - at < kStrip ? block - at : kStrip;
        uint8_t levels[kStrip];
        count_levels(w + b * block + at, n, inverse, encoder.bounds, levels);
        uint8_t* out = codes + (b * block + at) / 2;
        for (int64_t i = 0; i < n / 2; i++) {
          out[i] = static_cast<uint8_t>(encoder.code_of_level[levels[2 * i]] << 4 |
                                        encoder.code_of_level[levels[2 * i + 1]]);
        }
      }
    }
  });
}

void lookup_decode(const uint8_t* codes, int64_t blocks, int64_t block, const float* absmax, const float* table,
                   float* w) {
  parallel_for(blocks, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) {
      const uint8_t* in = codes + b * block / 2;
      float* out = w + b * block;
      for (int64_t i = 0; i < block / 2; i++) {
        out[2 * i] = table[in[i] >> 4] * absmax[b];
        out[2 * i + 1] = table[in[i] & 15] * absmax[b];
      }
    }
  });
}

}  // namespace tersor
