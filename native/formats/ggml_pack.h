// Placing codes into ggml's blocks: the inverse of what decode_block reads. codes: one byte per value, in range.
#pragma once

#include <cstring>

#include "formats/ggml_blocks.h"

namespace tersor {

// 32 codes: byte i = code(i+16) << 4 | code(i), low four bits of each.
static inline void pack_nibbles_16(const uint8_t* codes, uint8_t* qs) {
  for (int i = 0; i < 16; ++i) qs[i] = static_cast<uint8_t>((codes[i] & 15) | codes[i + 16] << 4);
}

// Bit 4 of 32 codes as one bit stream.
static inline void pack_fifth_bits(const uint8_t* codes, uint8_t* qh) {
  std::memset(qh, 0, 4);
  for (int i = 0; i < 32; ++i) qh[i / 8] |= static_cast<uint8_t>((codes[i] >> 4 & 1) << i % 8);
}

// `bits` bits of every code from bit `from` on, in planes: a run of `run` bytes holds `run` values in its lowest bits,
// the next `run` values in the next bits, and so on. n codes.
static inline void pack_planes(const uint8_t* codes, int n, int from, int bits, int run, uint8_t* out) {
  const int planes = 8 / bits, mask = (1 << bits) - 1;
  for (int start = 0; start < n; start += run * planes, out += run)
    for (int i = 0; i < run; ++i) {
      int byte = 0;
      for (int p = 0; p < planes; ++p) byte |= (codes[start + run * p + i] >> from & mask) << bits * p;
      out[i] = static_cast<uint8_t>(byte);
    }
}

// Eight 6-bit scales and minima of Q4_K and Q5_K into 12 bytes.
static inline void pack_k_scales(const uint8_t* s, const uint8_t* m, uint8_t* out) {
  for (int j = 0; j < 4; ++j) {
    out[j] = static_cast<uint8_t>(s[j] | s[j + 4] >> 4 << 6);
    out[4 + j] = static_cast<uint8_t>(m[j] | m[j + 4] >> 4 << 6);
    out[8 + j] = static_cast<uint8_t>((s[j + 4] & 15) | m[j + 4] << 4);
  }
}

// Sixteen scales, -32..31, of Q3_K into 12 bytes.
static inline void pack_q3k_scales(const int8_t* scales, uint8_t* out) {
  uint8_t stored[16];
  for (int j = 0; j < 16; ++j) stored[j] = static_cast<uint8_t>(scales[j] + 32);
  pack_planes(stored, 16, 0, 4, 8, out);
  pack_planes(stored, 16, 4, 2, 4, out + 8);
}

// Eight scales, -32..31, of IQ4_XS.
static inline void pack_iq4xs_scales(const int8_t* scales, BlockIQ4_XS& b) {
  uint8_t stored[8], high[2];
  for (int j = 0; j < 8; ++j) stored[j] = static_cast<uint8_t>(scales[j] + 32);
  pack_planes(stored, 8, 0, 4, 1, b.scales_l);
  pack_planes(stored, 8, 4, 2, 1, high);
  b.scales_h = static_cast<uint16_t>(high[0] | high[1] << 8);
}

// Five trits per byte (four in qh): ceil(256 * t / 243), the first trit the most significant.
static inline void pack_trits(const uint8_t* codes, BlockTQ1_0& b) {
  const auto run = [&codes](uint8_t* out, int n, int trits) {
    for (int i = 0; i < n; ++i) {
      int t = 0;
      for (int k = 0; k < 5; ++k) t = 3 * t + (k < trits ? codes[n * k + i] : 0);
      out[i] = static_cast<uint8_t>((t * 256 + 242) / 243);
    }
    codes += n * trits;
  };
  run(b.qs, 32, 5);
  run(b.qs + 32, 16, 5);
  run(b.qh, 4, 4);
}

// All codes of one block.
static inline void place(const uint8_t* codes, BlockQ4_0& b) { pack_nibbles_16(codes, b.qs); }
static inline void place(const uint8_t* codes, BlockQ4_1& b) { pack_nibbles_16(codes, b.qs); }
static inline void place(const uint8_t* codes, BlockQ5_0& b) {
  pack_nibbles_16(codes, b.qs);
  pack_fifth_bits(codes, b.qh);
}
static inline void place(const uint8_t* codes, BlockQ5_1& b) {
  pack_nibbles_16(codes, b.qs);
  pack_fifth_bits(codes, b.qh);
}
static inline void place(const uint8_t* codes, BlockQ8_0& b) {
  for (int i = 0; i < 32; ++i) b.qs[i] = static_cast<int8_t>(codes[i] ^ 128);
}
static inline void place(const uint8_t* codes, BlockIQ4_NL& b) { pack_nibbles_16(codes, b.qs); }
static inline void place(const uint8_t* codes, BlockTQ1_0& b) { pack_trits(codes, b); }
static inline void place(const uint8_t* codes, BlockTQ2_0& b) { pack_planes(codes, 256, 0, 2, 32, b.qs); }
static inline void place(const uint8_t* codes, BlockMXFP4& b) { pack_nibbles_16(codes, b.qs); }
static inline void place(const uint8_t* codes, BlockQ2_K& b) { pack_planes(codes, 256, 0, 2, 32, b.qs); }
static inline void place(const uint8_t* codes, BlockQ3_K& b) {
  pack_planes(codes, 256, 0, 2, 32, b.qs);
  pack_planes(codes, 256, 2, 1, 32, b.hmask);
}
static inline void place(const uint8_t* codes, BlockQ4_K& b) { pack_planes(codes, 256, 0, 4, 32, b.qs); }
static inline void place(const uint8_t* codes, BlockQ5_K& b) {
  pack_planes(codes, 256, 0, 4, 32, b.qs);
  pack_planes(codes, 256, 4, 1, 32, b.qh);
}
static inline void place(const uint8_t* codes, BlockQ6_K& b) {
  pack_planes(codes, 256, 0, 4, 64, b.ql);
  pack_planes(codes, 256, 4, 2, 32, b.qh);
}
static inline void place(const uint8_t* codes, BlockIQ4_XS& b) {
  for (int j = 0; j < 8; ++j) pack_nibbles_16(codes + 32 * j, b.qs + 16 * j);
}

// The parameters of a super-block.
static inline void place_scales(const uint8_t* scales, const uint8_t* mins, BlockQ2_K& b) {
  for (int j = 0; j < 16; ++j) b.scales[j] = static_cast<uint8_t>(scales[j] | mins[j] << 4);
}
static inline void place_scales(const uint8_t* scales, const uint8_t* mins, BlockQ4_K& b) {
  pack_k_scales(scales, mins, b.scales);
}
static inline void place_scales(const uint8_t* scales, const uint8_t* mins, BlockQ5_K& b) {
  pack_k_scales(scales, mins, b.scales);
}
static inline void place_scales(const int8_t* scales, BlockQ3_K& b) { pack_q3k_scales(scales, b.scales); }
static inline void place_scales(const int8_t* scales, BlockQ6_K& b) { std::memcpy(b.scales, scales, 16); }
static inline void place_scales(const int8_t* scales, BlockIQ4_XS& b) { pack_iq4xs_scales(scales, b); }

}  // namespace tersor
