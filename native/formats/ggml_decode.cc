// Decoding of ggml's blocks. The order of the products is gguf-py's (gguf/quants.py, dequantize_blocks), so that the
// bits agree; the build forbids contraction into fused multiply-adds for the same reason.
#include "formats/ggml_decode.h"

#include <bit>

#include "formats/ggml_half.h"
#include "formats/ggml_tables.h"

namespace tersor {

void decode_block(const BlockQ4_0& b, float* out) {
  const float d = f32_from_f16(b.d);
  for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(nibble_16(b.qs, i) - 8);
}

void decode_block(const BlockQ4_1& b, float* out) {
  const float d = f32_from_f16(b.d), m = f32_from_f16(b.m);
  for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(nibble_16(b.qs, i)) + m;
}

static int five_bits(const uint8_t* qs, const uint8_t* qh, int i) {
  return nibble_16(qs, i) | (qh[i / 8] >> i % 8 & 1) << 4;
}

void decode_block(const BlockQ5_0& b, float* out) {
  const float d = f32_from_f16(b.d);
  for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(five_bits(b.qs, b.qh, i) - 16);
}

void decode_block(const BlockQ5_1& b, float* out) {
  const float d = f32_from_f16(b.d), m = f32_from_f16(b.m);
  for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(five_bits(b.qs, b.qh, i)) + m;
}

void decode_block(const BlockQ8_0& b, float* out) {
  const float d = f32_from_f16(b.d);
  for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(b.qs[i]);
}

void decode_block(const BlockQ2_K& b, float* out) {
  const float d = f32_from_f16(b.d), dmin = f32_from_f16(b.dmin);
  for (int j = 0; j < 16; ++j) {
    const float step = d * static_cast<float>(b.scales[j] & 15), min = dmin * static_cast<float>(b.scales[j] >> 4);
    const uint8_t* qs = b.qs + 32 * (j / 8) + 16 * (j % 2);
    const int shift = 2 * (j / 2 % 4);
    for (int i = 0; i < 16; ++i) out[16 * j + i] = step * static_cast<float>(qs[i] >> shift & 3) - min;
  }
}

void decode_block(const BlockQ3_K& b, float* out) {
  const float d = f32_from_f16(b.d);
  for (int j = 0; j < 16; ++j) {
    const float step = d * static_cast<float>(q3k_scale(b.scales, j));
    const uint8_t* qs = b.qs + 32 * (j / 8) + 16 * (j % 2);
    const uint8_t* high = b.hmask + 16 * (j % 2);
    const int shift = 2 * (j / 2 % 4);
    for (int i = 0; i < 16; ++i) {
      const int q = (qs[i] >> shift & 3) | (high[i] >> j / 2 & 1) << 2;
      out[16 * j + i] = step * static_cast<float>(q - 4);
    }
  }
}

void decode_block(const BlockQ4_K& b, float* out) {
  const float d = f32_from_f16(b.d), dmin = f32_from_f16(b.dmin);
  for (int j = 0; j < 8; ++j) {
    const float step = d * static_cast<float>(k_scale(b.scales, j)),
                min = dmin * static_cast<float>(k_min(b.scales, j));
    const uint8_t* qs = b.qs + 32 * (j / 2);
    const int shift = 4 * (j % 2);
    for (int i = 0; i < 32; ++i) out[32 * j + i] = step * static_cast<float>(qs[i] >> shift & 15) - min;
  }
}

void decode_block(const BlockQ5_K& b, float* out) {
  const float d = f32_from_f16(b.d), dmin = f32_from_f16(b.dmin);
  for (int j = 0; j < 8; ++j) {
    const float step = d * static_cast<float>(k_scale(b.scales, j)),
                min = dmin * static_cast<float>(k_min(b.scales, j));
    const uint8_t* qs = b.qs + 32 * (j / 2);
    const int shift = 4 * (j % 2);
    for (int i = 0; i < 32; ++i) {
      const int q = (qs[i] >> shift & 15) | (b.qh[i] >> j & 1) << 4;
      out[32 * j + i] = step * static_cast<float>(q) - min;
    }
  }
}

void decode_block(const BlockQ6_K& b, float* out) {
  const float d = f32_from_f16(b.d);
  for (int j = 0; j < 16; ++j) {
    const float step = d * static_cast<float>(b.scales[j]);
    const uint8_t* low = b.ql + 64 * (j / 8) + 16 * (j % 4);
    const uint8_t* high = b.qh + 32 * (j / 8) + 16 * (j % 2);
    const int low_shift = 4 * (j / 4 % 2), high_shift = 2 * (j / 2 % 4);
    for (int i = 0; i < 16; ++i) {
      const int q = (low[i] >> low_shift & 15) | (high[i] >> high_shift & 3) << 4;
      out[16 * j + i] = step * static_cast<float>(q - 32);
    }
  }
}

void decode_block(const BlockIQ4_NL& b, float* out) {
  const float d = f32_from_f16(b.d);
  for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(kLevelsIQ4[nibble_16(b.qs, i)]);
}

void decode_block(const BlockIQ4_XS& b, float* out) {
  const float d = f32_from_f16(b.d);
  for (int j = 0; j < 8; ++j) {
    const float step = d * static_cast<float>(iq4xs_scale(b, j));
    for (int i = 0; i < 32; ++i) out[32 * j + i] = step * static_cast<float>(kLevelsIQ4[nibble_16(b.qs + 16 * j, i)]);
  }
}

// Eight values of a codebook row of 2-bit indices, shifted: step * (value + shift).
static void row_shifted(uint16_t row, float step, float shift, float* out) {
  for (int k = 0; k < 8; ++k) out[k] = step * (kValuesIQ1[row >> 2 * k & 3] + shift);
}

void decode_block(const BlockIQ1_S& b, float* out) {
  const float d = f32_from_f16(b.d);
  for (int j = 0; j < 8; ++j) {
    const float step = d * static_cast<float>(2 * (b.qh[j] >> 12 & 7) + 1);
    const float shift = b.qh[j] & 0x8000 ? -0.125f : 0.125f;
    for (int r = 0; r < 4; ++r) {
      const int index = b.qs[4 * j + r] | (b.qh[j] >> 3 * r & 7) << 8;
      row_shifted(kGridIQ1[index], step, shift, out + 32 * j + 8 * r);
    }
  }
}

void decode_block(const BlockIQ1_M& b, float* out) {
  int bits = 0;
  for (int k = 0; k < 4; ++k) bits |= (b.scales[k] >> 12) << 4 * k;
  const float d = f32_from_f16(static_cast<uint16_t>(bits));
  for (int r = 0; r < 32; ++r) {  // eight values each; two rows share a scale
    const float step = d * static_cast<float>(2 * (b.scales[r / 8] >> 3 * (r / 2 % 4) & 7) + 1);
    const int high = b.qh[r / 2] >> 4 * (r % 2);
    row_shifted(kGridIQ1[b.qs[r] | (high & 7) << 8], step, high & 8 ? -0.125f : 0.125f, out + 8 * r);
  }
}

// n values of a codebook row with one sign bit each. `width` bits per index.
static void row_signed(uint16_t row, int width, const float* values, int n, float step, int signs, float* out) {
  for (int k = 0; k < n; ++k) {
    const float v = step * values[row >> width * k & ((1 << width) - 1)];
    out[k] = signs >> k & 1 ? -v : v;
  }
}

// Seven sign bits and an eighth that makes the number of negative values even.
static int even_signs(uint32_t seven) {
  seven &= 127;
  return static_cast<int>(seven | (std::popcount(seven) & 1) << 7);
}

void decode_block(const BlockIQ2_XXS& b, float* out) {
  const float d = f32_from_f16(b.d);
  for (int j = 0; j < 8; ++j) {
    const uint32_t word = b.qs[j].signs_scale;
    const float step = d * (0.5f + static_cast<float>(word >> 28)) * 0.25f;
    for (int r = 0; r < 4; ++r)
      row_signed(kGridIQ2_XXS[b.qs[j].rows[r]], 2, kValuesIQ2, 8, step, even_signs(word >> 7 * r),
                 out + 32 * j + 8 * r);
  }
}

void decode_block(const BlockIQ2_XS& b, float* out) {
  const float d = f32_from_f16(b.d);
  for (int r = 0; r < 32; ++r) {
    const float step = d * (0.5f + static_cast<float>(b.scales[r / 4] >> 4 * (r / 2 % 2) & 15)) * 0.25f;
    row_signed(kGridIQ2_XS[b.qs[r] & 511], 2, kValuesIQ2, 8, step, even_signs(b.qs[r] >> 9), out + 8 * r);
  }
}

void decode_block(const BlockIQ2_S& b, float* out) {
  const float d = f32_from_f16(b.d);
  for (int r = 0; r < 32; ++r) {
    const float step = d * (0.5f + static_cast<float>(b.scales[r / 4] >> 4 * (r / 2 % 2) & 15)) * 0.25f;
    const int index = b.qs[r] | (b.qh[r / 4] >> 2 * (r % 4) & 3) << 8;
    row_signed(kGridIQ2_S[index], 2, kValuesIQ2, 8, step, b.signs[r], out + 8 * r);
  }
}

void decode_block(const BlockIQ3_XXS& b, float* out) {
  const float d = f32_from_f16(b.d);
  for (int j = 0; j < 8; ++j) {
    const uint32_t word = b.signs_scale[j];
    const float step = d * (0.5f + static_cast<float>(word >> 28)) * 0.5f;
    for (int r = 0; r < 8; ++r) {  // four values each
      const int signs = even_signs(word >> 7 * (r / 2)) >> 4 * (r % 2);
      row_signed(kGridIQ3_XXS[b.qs[8 * j + r]], 4, kValuesIQ3_XXS, 4, step, signs, out + 32 * j + 4 * r);
    }
  }
}

void decode_block(const BlockIQ3_S& b, float* out) {
  const float d = f32_from_f16(b.d);
  for (int r = 0; r < 64; ++r) {
    const float step = d * static_cast<float>(1 + 2 * (b.scales[r / 16] >> 4 * (r / 8 % 2) & 15));
    const int index = b.qs[r] | (b.qh[r / 8] >> r % 8 & 1) << 8;
    row_signed(kGridIQ3_S[index], 4, kValuesIQ3_S, 4, step, b.signs[r / 2] >> 4 * (r % 2), out + 4 * r);
  }
}

void decode_block(const BlockTQ1_0& b, float* out) {
  const float d = f32_from_f16(b.d);
  // byte * 3^k modulo 256 brings trit k to the top, where * 3 >> 8 reads it.
  const auto run = [&](const uint8_t* bytes, int n, int trits) {
    for (int k = 0, power = 1; k < trits; ++k, power *= 3)
      for (int i = 0; i < n; ++i) {
        const int top = static_cast<uint8_t>(bytes[i] * power);
        *out++ = d * static_cast<float>((top * 3 >> 8) - 1);
      }
  };
  run(b.qs, 32, 5);
  run(b.qs + 32, 16, 5);
  run(b.qh, 4, 4);
}

void decode_block(const BlockTQ2_0& b, float* out) {
  const float d = f32_from_f16(b.d);
  for (int j = 0; j < 8; ++j)
    for (int i = 0; i < 32; ++i)
      out[32 * j + i] = d * static_cast<float>((b.qs[32 * (j / 4) + i] >> 2 * (j % 4) & 3) - 1);
}

void decode_block(const BlockMXFP4& b, float* out) {
  const float d = mxfp4_step(b.e);
  for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(kLevelsE2M1[nibble_16(b.qs, i)]);
}

// Half of an unsigned E4M3 number (the levels are doubled). 0x7f, its NaN, reads as 0.
static float half_of_ue4m3(uint8_t x) {
  if (x == 0 || x == 0x7f) return 0.f;
  const int exponent = x >> 3 & 15, mantissa = x & 7;
  if (exponent == 0) return static_cast<float>(mantissa) * 0x1p-10f;
  const float power = std::bit_cast<float>(static_cast<uint32_t>(exponent - 8 + 127) << 23);
  return (1.f + static_cast<float>(mantissa) * 0.125f) * power;
}

void decode_block(const BlockNVFP4& b, float* out) {
  for (int j = 0; j < 4; ++j) {
    const float d = half_of_ue4m3(b.d[j]);
    for (int i = 0; i < 16; ++i) {
      const uint8_t byte = b.qs[8 * j + i % 8];
      out[16 * j + i] = d * static_cast<float>(kLevelsE2M1[i < 8 ? byte & 15 : byte >> 4]);
    }
  }
}

void decode_block(const BlockQ1_0& b, float* out) {
  const float d = f32_from_f16(b.d);
  for (int i = 0; i < 128; ++i) out[i] = b.qs[i / 8] >> i % 8 & 1 ? d : -d;
}

void decode_block(const BlockQ2_0& b, float* out) {
  const float d = f32_from_f16(b.d);
  for (int i = 0; i < 64; ++i) out[i] = d * static_cast<float>((b.qs[i / 4] >> 2 * (i % 4) & 3) - 1);
}

}  // namespace tersor
