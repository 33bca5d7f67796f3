// The ggml block types whose weights are small integers times a scale. Layouts: docs/formats.md;
// ggml-org/ggml src/ggml-common.h (structs) and src/ggml-quants.c (dequantize_row_*).
#include <cmath>
#include <cstring>

#include "base/float16.h"
#include "kernels/linear/scheme.h"

namespace tersor::linear {
namespace {

constexpr int8_t kIq4Table[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

float half(const uint8_t* p) {
  uint16_t h;
  memcpy(&h, p, 2);
  return f16_to_f32(h);
}

// n bytes to 2n values: first the low nibbles, then the high ones.
void split_nibbles(const uint8_t* qs, int n, uint8_t* codes) {
  for (int i = 0; i < n; ++i) {
    codes[i] = qs[i] & 15;
    codes[n + i] = qs[i] >> 4;
  }
}

// Adds bit i of qh (32 bits) to value i as its bit 4.
void add_fifth_bits(const uint8_t* qh, uint8_t* codes) {
  for (int i = 0; i < 32; ++i) codes[i] |= (qh[i / 8] >> (i % 8) & 1) << 4;
}

// 256 values: value 128 h + 32 k + i is bits 2k, 2k + 1 of byte 32 h + i.
void two_bit_codes(const uint8_t* qs, uint8_t* codes) {
  for (int h = 0; h < 2; ++h) {
    for (int k = 0; k < 4; ++k) {
      for (int i = 0; i < 32; ++i) codes[128 * h + 32 * k + i] = qs[32 * h + i] >> (2 * k) & 3;
    }
  }
}

// The eight 6-bit scales and minima of q4_k and q5_k, as the layout in formats/ggml_layouts.py draws them.
void k_scales(const uint8_t* s, uint8_t* scale, uint8_t* min) {
  for (int j = 0; j < 4; ++j) {
    scale[j] = s[j] & 63;
    min[j] = s[4 + j] & 63;
    scale[4 + j] = (s[8 + j] & 15) | (s[j] >> 6) << 4;
    min[4 + j] = s[8 + j] >> 4 | (s[4 + j] >> 6) << 4;
  }
}

// Each block function reads one block: codes of all its values, and scale and second of its groups.

void q4_0(const uint8_t* b, const RowCodes& r) {
  r.scale[0] = half(b);
  split_nibbles(b + 2, 16, r.codes);
}

void q4_1(const uint8_t* b, const RowCodes& r) {
  r.scale[0] = half(b);
  r.second[0] = half(b + 2);
  split_nibbles(b + 4, 16, r.codes);
}

void q5_0(const uint8_t* b, const RowCodes& r) {
  r.scale[0] = half(b);
  split_nibbles(b + 6, 16, r.codes);
  add_fifth_bits(b + 2, r.codes);
}

void q5_1(const uint8_t* b, const RowCodes& r) {
  r.scale[0] = half(b);
  r.second[0] = half(b + 2);
  split_nibbles(b + 8, 16, r.codes);
  add_fifth_bits(b + 4, r.codes);
}

void q8_0(const uint8_t* b, const RowCodes& r) {
  r.scale[0] = half(b);
  memcpy(r.codes, b + 2, 32);
}

void mxfp4(const uint8_t* b, const RowCodes& r) {
  r.scale[0] = std::ldexp(1.0f, b[0] - 128);
  split_nibbles(b + 1, 16, r.codes);
}

void q2_k(const uint8_t* b, const RowCodes& r) {
  r.scale[0] = half(b + 80);
  r.second[0] = half(b + 82);
  for (int g = 0; g < 16; ++g) {
    r.sub[g] = int8_t(b[g] & 15);
    r.submin[g] = b[g] >> 4;
  }
  two_bit_codes(b + 16, r.codes);
}

void q3_k(const uint8_t* b, const RowCodes& r) {
  const uint8_t* s = b + 96;
  r.scale[0] = half(b + 108);
  for (int g = 0; g < 16; ++g) {
    const int low = s[g % 8] >> (g / 8 * 4) & 15, high = s[8 + g % 4] >> (g / 4 * 2) & 3;
    r.sub[g] = int8_t((low | high << 4) - 32);
  }
  two_bit_codes(b + 32, r.codes);
  for (int k = 0; k < 8; ++k) {
    for (int i = 0; i < 32; ++i) r.codes[32 * k + i] |= (b[i] >> k & 1) << 2;
  }
}

void scales_of_k(const uint8_t* b, const RowCodes& r) {
  r.scale[0] = half(b);
  r.second[0] = half(b + 2);
  k_scales(b + 4, reinterpret_cast<uint8_t*>(r.sub), r.submin);
}

void q4_k(const uint8_t* b, const RowCodes& r) {
  scales_of_k(b, r);
  for (int k = 0; k < 4; ++k) split_nibbles(b + 16 + 32 * k, 32, r.codes + 64 * k);
}

void q5_k(const uint8_t* b, const RowCodes& r) {
  scales_of_k(b, r);
  for (int k = 0; k < 4; ++k) split_nibbles(b + 48 + 32 * k, 32, r.codes + 64 * k);
  for (int k = 0; k < 8; ++k) {
    for (int i = 0; i < 32; ++i) r.codes[32 * k + i] |= (b[16 + i] >> k & 1) << 4;
  }
}

void q6_k(const uint8_t* b, const RowCodes& r) {
  r.scale[0] = half(b + 208);
  memcpy(r.sub, b + 192, 16);
  for (int k = 0; k < 2; ++k) split_nibbles(b + 64 * k, 64, r.codes + 128 * k);
  uint8_t high[256];
  two_bit_codes(b + 128, high);
  for (int i = 0; i < 256; ++i) r.codes[i] |= high[i] << 4;
}

void iq4_xs(const uint8_t* b, const RowCodes& r) {
  r.scale[0] = half(b);
  const int high = b[2] | b[3] << 8;
  for (int g = 0; g < 8; ++g) {
    const int low = b[4 + g / 2] >> (g % 2 * 4) & 15;
    r.sub[g] = int8_t((low | (high >> (2 * g) & 3) << 4) - 32);
    split_nibbles(b + 8 + 16 * g, 16, r.codes + 32 * g);
  }
}

// Trit t of a byte: the leading digits are multiplied away modulo 256, the next one is the top of byte * 3.
uint8_t trit(uint8_t byte, int t) {
  static constexpr uint8_t kPowers[5] = {1, 3, 9, 27, 81};
  return uint16_t(uint8_t(byte * kPowers[t])) * 3 >> 8;
}

void tq1_0(const uint8_t* b, const RowCodes& r) {
  r.scale[0] = half(b + 52);
  for (int i = 0; i < 160; ++i) r.codes[i] = trit(b[i % 32], i / 32);
  for (int i = 0; i < 80; ++i) r.codes[160 + i] = trit(b[32 + i % 16], i / 16);
  for (int i = 0; i < 16; ++i) r.codes[240 + i] = trit(b[48 + i % 4], i / 4);
}

void tq2_0(const uint8_t* b, const RowCodes& r) {
  r.scale[0] = half(b + 64);
  two_bit_codes(b, r.codes);
}

// w = d when the bit is set, else -d: the code is 2 * bit, the offset -1.
void q1_0(const uint8_t* b, const RowCodes& r) {
  r.scale[0] = half(b);
  for (int i = 0; i < 128; ++i) r.codes[i] = (b[2 + i / 8] >> (i % 8) & 1) * 2;
}

void q2_0(const uint8_t* b, const RowCodes& r) {
  r.scale[0] = half(b);
  for (int i = 0; i < 64; ++i) r.codes[i] = b[2 + i / 4] >> (i % 4 * 2) & 3;
}

// UE4M3: exponent bits 6..3 with bias 7, mantissa bits 2..0, 0x7f reads as 0; halved since the table is doubled.
float ue4m3_half(uint8_t x) { return x == 0x7f ? 0 : 0.5f * e4m3_to_f32(x & 0x7f); }

void nvfp4(const uint8_t* b, const RowCodes& r) {
  for (int g = 0; g < 4; ++g) {
    r.scale[g] = ue4m3_half(b[g]);
    split_nibbles(b + 4 + 8 * g, 8, r.codes + 16 * g);
  }
}

struct Type {
  const char* name;
  int values, bytes;  // of a block
  Layout layout;
  void (*block)(const uint8_t*, const RowCodes&);
};

constexpr Type kTypes[] = {
    {"q4_0", 32, 18, {kU4, kHalves, kNone, 32, -8, nullptr}, q4_0},
    {"q4_1", 32, 20, {kU4, kHalves, kMin, 32, 0, nullptr}, q4_1},
    {"q5_0", 32, 22, {kU5, kHalves, kNone, 32, -16, nullptr}, q5_0},
    {"q5_1", 32, 24, {kU5, kHalves, kMin, 32, 0, nullptr}, q5_1},
    {"q8_0", 32, 34, {kS8, kHalves, kNone, 32, 0, nullptr}, q8_0},
    {"q2_k", 256, 84, {kU2, kNibbles, kMin, 16, 0, nullptr}, q2_k},
    {"q3_k", 256, 110, {kU3, kSuper, kNone, 16, -4, nullptr}, q3_k},
    {"q4_k", 256, 144, {kU4, kSuper, kMin, 32, 0, nullptr}, q4_k},
    {"q5_k", 256, 176, {kU5, kSuper, kMin, 32, 0, nullptr}, q5_k},
    {"q6_k", 256, 210, {kU6, kSuper, kNone, 16, -32, nullptr}, q6_k},
    {"iq4_nl", 32, 18, {kT4, kHalves, kNone, 32, 0, kIq4Table}, q4_0},  // the bytes of q4_0
    {"iq4_xs", 256, 136, {kT4, kSuper, kNone, 32, 0, kIq4Table}, iq4_xs},
    {"tq1_0", 256, 54, {kU2, kHalves, kNone, 256, -1, nullptr}, tq1_0},
    {"tq2_0", 256, 66, {kU2, kHalves, kNone, 256, -1, nullptr}, tq2_0},
    {"mxfp4", 32, 17, {kT4, kHalves, kNone, 32, 0, kE2m1Table}, mxfp4},
    {"nvfp4", 64, 36, {kT4, kHalves, kNone, 16, 0, kE2m1Table}, nvfp4},
    {"q1_0", 128, 18, {kU1, kHalves, kNone, 128, -1, nullptr}, q1_0},
    {"q2_0", 64, 18, {kU2, kHalves, kNone, 64, -1, nullptr}, q2_0},
};

void extract(const Scheme& s, const uint8_t* const* fields, int64_t columns, const RowCodes& row) {
  const int64_t scales = s.scales(s.block_values), groups = s.groups(s.block_values);
  for (int64_t i = 0; i < columns / s.block_values; ++i) {
    s.block(fields[0] + i * s.block_bytes,
            {row.codes + i * s.block_values, row.scale + i * scales, row.second + i * scales, row.sub + i * groups,
             row.submin + i * groups, row.factor});
  }
}

}  // namespace

std::optional<Scheme> find_ggml_scheme(const std::string& format, int64_t columns) {
  for (const Type& t : kTypes) {
    if (format != t.name || columns % t.values != 0) continue;
    Scheme s;
    s.layout = t.layout;
    s.fields = {{"blocks", columns / t.values * t.bytes}};
    s.extract = extract;
    s.block_values = t.values;
    s.block_bytes = t.bytes;
    s.block = t.block;
    return s;
  }
  return {};
}

}  // namespace tersor::linear
