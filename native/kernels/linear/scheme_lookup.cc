// nf4 and fp4: a table of 16 real numbers times a float32 absmax of every 64 columns. The table is held in 15 bits, as
// two tables of 8, so that products are those of two integer tables. nvfp4_gs: small integers times an E4M3 scale of
// every 16 columns over one of the tensor. Layouts: docs/formats.md; src/tersor/formats/{lookup,nvfp4}.py.
#include <cmath>
#include <cstring>

#include "base/float16.h"
#include "kernels/linear/scheme.h"

namespace tersor::linear {
namespace {

// round(value * kNf4Steps) = 128 * high + low. Of all numbers of steps up to 16256 this one has the least relative
// error, 7.1e-5; fp4 is exact.
constexpr float kNf4Steps = 14640, kFp4Steps = 12288;
constexpr int8_t kNf4High[16] = {-114, -80, -60, -45, -33, -21, -10, 0, 9, 18, 28, 39, 50, 64, 83, 114};
constexpr int8_t kNf4Low[16] = {-48, 48, -7, -22, 60, -17, -53, 0, 13, 52, 19, -45, 52, 45, -40, 48};
constexpr int8_t kFp4High[16] = {0, 0, 64, 96, 32, 48, 16, 24, 0, 0, -64, -96, -32, -48, -16, -24};
constexpr int8_t kFp4Low[16] = {0, 64, 0, 0, 0, 0, 0, 0, 0, -64};
constexpr float kNf4Values[16] = {-1.0f,
                                  -0.6961928009986877f,
                                  -0.5250730514526367f,
                                  -0.39491748809814453f,
                                  -0.28444138169288635f,
                                  -0.18477343022823334f,
                                  -0.09105003625154495f,
                                  0.0f,
                                  0.07958029955625534f,
                                  0.16093020141124725f,
                                  0.24611230194568634f,
                                  0.33791524171829224f,
                                  0.44070982933044434f,
                                  0.5626170039176941f,
                                  0.7229568362236023f,
                                  1.0f};
constexpr float kFp4Values[16] = {0,     0.0625f / 12,  8.0f / 12,  1.0f,  4.0f / 12,  0.5f,  2.0f / 12,  0.25f,
                                  -0.0f, -0.0625f / 12, -8.0f / 12, -1.0f, -4.0f / 12, -0.5f, -2.0f / 12, -0.25f};

// fields: codes, two a byte, the first in the high nibble; absmax.
void extract(const Scheme& s, const uint8_t* const* fields, int64_t columns, const RowCodes& row) {
  for (int64_t i = 0; i < columns / 2; ++i) {
    row.codes[2 * i] = fields[0][i] >> 4;
    row.codes[2 * i + 1] = fields[0][i] & 15;
  }
  memcpy(row.scale, fields[1], columns / 64 * sizeof(float));
}

// fields: codes, two a byte, the first in the low nibble; scale; global scale.
void extract_nvfp4(const Scheme& s, const uint8_t* const* fields, int64_t columns, const RowCodes& row) {
  for (int64_t i = 0; i < columns / 2; ++i) {
    row.codes[2 * i] = fields[0][i] & 15;
    row.codes[2 * i + 1] = fields[0][i] >> 4;
  }
  float global;
  memcpy(&global, fields[2], 4);
  for (int64_t g = 0; g < columns / 16; ++g) row.scale[g] = e4m3_to_f32(fields[1][g]) / global;
  const float inverse = 1 / global;
  *row.factor = std::isnormal(inverse) ? inverse : 1;
}

}  // namespace

std::optional<Scheme> find_lookup_scheme(const std::string& format, int64_t columns) {
  if (format == "nvfp4_gs" && columns % 16 == 0) {
    Scheme s;
    s.layout = {kT4, kHalves, kNone, 16, 0, kE2m1Table};
    s.unit = 0.5f;
    s.fields = {{"codes", columns / 2}, {"scale", columns / 16}, {"global_scale", 4, true}};
    s.extract = extract_nvfp4;
    return s;
  }
  const bool nf4 = format == "nf4";
  if ((!nf4 && format != "fp4") || columns % 64 != 0) return {};
  Scheme s;
  s.layout = {kT4, kHalves, kNone, 64, 0, nf4 ? kNf4High : kFp4High};
  s.unit = 128 / (nf4 ? kNf4Steps : kFp4Steps);
  s.low_table = nf4 ? kNf4Low : kFp4Low;
  s.values = nf4 ? kNf4Values : kFp4Values;
  s.fields = {{"codes", columns / 2}, {"absmax", columns / 64 * 4}};
  s.extract = extract;
  return s;
}

}  // namespace tersor::linear
