// The ggml block types whose weights are rows of a grid: iq1 .. iq3. Every value is one of at most 16 integers times a
// scale, so that they multiply like other tables of 16. Layouts: docs/formats.md; formats/ggml_decode.cc.
#include <cstring>

#include "formats/ggml_decode.h"
#include "kernels/linear/scheme.h"

namespace tersor::linear {
namespace {

constexpr int8_t kTable1[16] = {-9, -7, -1, 1, 7, 9};  // 8 * (-1, 0, 1) with a shift of 1 either way
constexpr int8_t kTable2[16] = {8, 25, 43, -8, -25, -43};
constexpr int8_t kTable3Xxs[16] = {4, 12, 20, 28, 36, 44, 52, 62, -4, -12, -20, -28, -36, -44, -52, -62};
constexpr int8_t kTable3S[16] = {1, 3, 5, 7, 9, 11, 13, 15, -1, -3, -5, -7, -9, -11, -13, -15};

constexpr uint16_t kOne = 0x3c00;  // 1 in float16

// Takes d out of a block, which then has d = 1.
template <typename Block>
float take_d(Block& b) {
  const float d = f16_to_f32(b.d);
  b.d = kOne;
  return d;
}

// d lies in the top four bits of each of the scales, from the low ones up.
float take_d(BlockIQ1_M& b) {
  int bits = 0;
  for (int k = 0; k < 4; ++k) {
    bits |= b.scales[k] >> 12 << 4 * k;
    b.scales[k] = uint16_t((b.scales[k] & 0x0fff) | (kOne >> 4 * k & 15) << 12);
  }
  return f16_to_f32(uint16_t(bits));
}

// The scale of group g, an odd integer; d times it times the unit is the step of the group.
int sub(const BlockIQ1_S& b, int g) { return 2 * (b.qh[g] >> 12 & 7) + 1; }
int sub(const BlockIQ1_M& b, int g) { return 2 * (b.scales[g / 4] >> 3 * (g % 4) & 7) + 1; }
int sub(const BlockIQ2_XXS& b, int g) { return 2 * int(b.qs[g].signs_scale >> 28) + 1; }
int sub(const BlockIQ2_XS& b, int g) { return 2 * (b.scales[g / 2] >> 4 * (g % 2) & 15) + 1; }
int sub(const BlockIQ2_S& b, int g) { return 2 * (b.scales[g / 2] >> 4 * (g % 2) & 15) + 1; }
int sub(const BlockIQ3_XXS& b, int g) { return 2 * int(b.signs_scale[g] >> 28) + 1; }
int sub(const BlockIQ3_S& b, int g) { return 2 * (b.scales[g / 2] >> 4 * (g % 2) & 15) + 1; }

// The block is decoded with d = 1; what a value is to its group's step is looked up in the table.
template <typename Block, int kGroup, int kUnits>
void block(const uint8_t* bytes, const int8_t* table, const RowCodes& r) {
  Block b;
  memcpy(&b, bytes, sizeof(b));
  r.scale[0] = take_d(b);
  uint8_t code_of[256] = {};
  for (int i = 15; i >= 0; --i) code_of[uint8_t(table[i])] = uint8_t(i);
  float values[256];
  decode_block(b, values);
  for (int g = 0; g < 256 / kGroup; ++g) {
    const int scale = sub(b, g);
    r.sub[g] = int8_t(scale);
    const float inverse = float(kUnits) / float(scale);
    for (int i = kGroup * g; i < kGroup * (g + 1); ++i)
      r.codes[i] = code_of[uint8_t(int8_t(__builtin_lrintf(values[i] * inverse)))];
  }
}

struct Type {
  const char* name;
  int bytes, group, units;  // units: 1 / Scheme::unit
  const int8_t* table;
  void (*block)(const uint8_t*, const int8_t*, const RowCodes&);
};

constexpr Type kTypes[] = {
    {"iq1_s", sizeof(BlockIQ1_S), 32, 8, kTable1, block<BlockIQ1_S, 32, 8>},
    {"iq1_m", sizeof(BlockIQ1_M), 16, 8, kTable1, block<BlockIQ1_M, 16, 8>},
    {"iq2_xxs", sizeof(BlockIQ2_XXS), 32, 8, kTable2, block<BlockIQ2_XXS, 32, 8>},
    {"iq2_xs", sizeof(BlockIQ2_XS), 16, 8, kTable2, block<BlockIQ2_XS, 16, 8>},
    {"iq2_s", sizeof(BlockIQ2_S), 16, 8, kTable2, block<BlockIQ2_S, 16, 8>},
    {"iq3_xxs", sizeof(BlockIQ3_XXS), 32, 4, kTable3Xxs, block<BlockIQ3_XXS, 32, 4>},
    {"iq3_s", sizeof(BlockIQ3_S), 32, 1, kTable3S, block<BlockIQ3_S, 32, 1>},
};

const Type* find_type(const std::string& format) {
  for (const Type& t : kTypes) {
    if (format == t.name) return &t;
  }
  return nullptr;
}

template <int kIndex>
void extract(const Scheme& s, const uint8_t* const* fields, int64_t columns, const RowCodes& row) {
  const Type& t = kTypes[kIndex];
  const int64_t groups = 256 / t.group;
  for (int64_t i = 0; i < columns / 256; ++i) {
    t.block(fields[0] + i * t.bytes, t.table,
            {row.codes + 256 * i, row.scale + i, row.second + i, row.sub + i * groups, row.submin + i * groups,
             row.factor});
  }
}

constexpr decltype(&extract<0>) kExtract[] = {extract<0>, extract<1>, extract<2>, extract<3>,
                                              extract<4>, extract<5>, extract<6>};
static_assert(sizeof(kExtract) / sizeof(kExtract[0]) == sizeof(kTypes) / sizeof(kTypes[0]));

}  // namespace

std::optional<Scheme> find_grid_scheme(const std::string& format, int64_t columns) {
  const Type* t = find_type(format);
  if (!t || columns % 256 != 0) return {};
  Scheme s;
  s.layout = {kT4, kSuper, kNone, t->group, 0, t->table};
  s.unit = 1.0f / float(t->units);
  s.fields = {{"blocks", columns / 256 * t->bytes}};
  s.extract = kExtract[t - kTypes];
  return s;
}

}  // namespace tersor::linear
