#include "formats/affine.h"

#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "base/cpu.h"
#include "base/threads.h"
#include "formats/affine_bits.h"
#include "formats/affine_search.h"

namespace tersor {
namespace {

constexpr float kHalfNormal = 0x1p-14f;  // smallest normal float16
constexpr float kHalfStep = 0x1p-24f;    // distance of subnormal float16 values
constexpr float kHalfOver = 65520.0f;    // from here on float16 rounds to infinity
constexpr int64_t kGrain = 1 << 14;      // values worth handing to a thread

// Nearest float16 below the normal range: in [0.5, 1) neighbouring float32 values are kHalfStep apart.
float round_subnormal(float x) { return (x + 0.75f) - 0.75f; }

float round_half(float x) {
  if (!(std::fabs(x) < kHalfOver)) return std::isnan(x) ? x : std::copysign(std::numeric_limits<float>::infinity(), x);
  if (std::fabs(x) < kHalfNormal) return round_subnormal(x);
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits += 0xfff + ((bits >> 13) & 1);  // float32 has 13 bits of fraction more
  bits &= ~uint32_t{0x1fff};
  float rounded;
  std::memcpy(&rounded, &bits, sizeof rounded);
  return rounded;
}

int64_t row_grain(int64_t columns) { return columns >= kGrain ? 1 : (kGrain + columns - 1) / columns; }

float at(const AffineParams& p, int64_t row, int64_t group) {
  return p.values[row * p.row_stride + group * p.group_stride];
}

// Half to even for |x| < 2^22, by adding 1.5 * 2^23; a larger x stays far outside the codes, where to_code clips it.
inline float round_even(float x) { return (x + 12582912.0f) - 12582912.0f; }

inline uint8_t to_code(float q, float max_code) {
  q = q > 0.0f ? q : 0.0f;
  return static_cast<uint8_t>(static_cast<int32_t>(q < max_code ? q : max_code));
}

void encode_zero(const float* w, int64_t n, float scale, float zero, float max_code, uint8_t* codes) {
  for (int64_t i = 0; i < n; i++) codes[i] = to_code(round_even(w[i] / scale) + zero, max_code);
}

void encode_minimum(const float* w, int64_t n, float scale, float minimum, float max_code, uint8_t* codes) {
  for (int64_t i = 0; i < n; i++) codes[i] = to_code(round_even((w[i] - minimum) / scale), max_code);
}

}  // namespace

float affine_stored_scale(float x, bool single) {
  if (single) return x + 0.0f;  // -0 becomes 0
  if (!(x < kHalfNormal)) return round_half(x);
  const float rounded = round_subnormal(x);
  return rounded < x ? rounded + kHalfStep : rounded;
}

float affine_stored_minimum(float x, bool single) {
  return (single ? x : round_half(x)) + 0.0f;  // + 0: -0 becomes 0
}

AffineGrid affine_range_grid(float lo, float hi, AffineKind kind, int max_code, bool single) {
  const float steps = static_cast<float>(max_code);
  if (kind == AffineKind::kSymmetric) {
    const float highest = hi > -lo ? hi : -lo;
    return {affine_stored_scale(highest * 2.0f / steps, single), static_cast<float>((max_code + 1) / 2)};
  }
  if (kind == AffineKind::kMinimum) {
    const float minimum = affine_stored_minimum(lo, single);
    const float range = hi - minimum;
    return {affine_stored_scale((range > 0.0f ? range : 0.0f) / steps, single), minimum};
  }
  const float scale = affine_stored_scale((hi - lo) / steps, single);
  return {scale, static_cast<float>(to_code(round_even(-lo / (scale == 0.0f ? 1.0f : scale)), steps))};
}

// Here and not in the search: an initializer in a file with instruction-set flags would run on every CPU.
double affine_ratio(int step) {
  static const std::array<double, kAffineRatios> ratios = [] {
    std::array<double, kAffineRatios> values;
    for (int k = 0; k < kAffineRatios; k++) values[k] = std::pow(0.8, static_cast<double>(k) / kAffineRatioSteps);
    return values;
  }();
  return ratios[step];
}

AffineGrid affine_fit(const AffineGroup& group, AffineKind kind, int max_code, bool search) {
#if defined(__x86_64__)
  if (active_isa() != Isa::kScalar) return affine_search_avx2(group, kind, max_code, search);
#endif
  return affine_search_scalar(group, kind, max_code, search);
}

void affine_encode(const AffineMatrix& m, const float* w, uint8_t* packed) {
  const int64_t n = m.columns / m.groups, row_bytes = packed_bytes(m.columns, m.bits);
  const float max_code = static_cast<float>(m.max_code);
  parallel_for(m.rows, row_grain(m.columns), [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> codes(m.columns);
    for (int64_t row = begin; row < end; row++) {
      for (int64_t g = 0; g < m.groups; g++) {
        const float stored = at(m.scale, row, g), offset = at(m.offset, row, g);
        const float scale = stored == 0.0f ? 1.0f : stored;  // such a group holds only zeros (or only its minimum)
        (m.minimum ? encode_minimum : encode_zero)(w + row * m.columns + g * n, n, scale, offset, max_code,
                                                   codes.data() + g * n);
      }
      pack_row(codes.data(), m.columns, m.bits, packed + row * row_bytes);
    }
  });
}

void affine_decode(const AffineMatrix& m, const uint8_t* packed, float* w) {
  const int64_t n = m.columns / m.groups, row_bytes = packed_bytes(m.columns, m.bits);
  parallel_for(m.rows, row_grain(m.columns), [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> codes(m.columns);
    for (int64_t row = begin; row < end; row++) {
      unpack_row(packed + row * row_bytes, m.columns, m.bits, codes.data());
      for (int64_t g = 0; g < m.groups; g++) {
        const float scale = at(m.scale, row, g), offset = at(m.offset, row, g);
        const uint8_t* q = codes.data() + g * n;
        float* out = w + row * m.columns + g * n;
        if (m.minimum) {
          for (int64_t i = 0; i < n; i++) out[i] = static_cast<float>(q[i]) * scale + offset;
        } else {
          for (int64_t i = 0; i < n; i++) out[i] = (static_cast<float>(q[i]) - offset) * scale;
        }
      }
    }
  });
}

}  // namespace tersor
