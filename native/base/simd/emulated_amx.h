// Matrix tiles in plain C++, for tests on CPUs without them. Names and meanings: base/simd/amx.h,
// which includes this.
#pragma once

#include "base/float16.h"

namespace tersor {
namespace {

thread_local uint8_t emulated_tiles[8][1024];

struct TilesInUse {};

template <int T>
void clear_tile() {
  memset(emulated_tiles[T], 0, 1024);
}
template <int T>
void load_tile(const void* p, int64_t line = 64) {
  for (int i = 0; i < 16; ++i) memcpy(emulated_tiles[T] + 64 * i, (const char*)p + i * line, 64);
}
template <int T>
void store_tile(void* p, int64_t line = 64) {
  for (int i = 0; i < 16; ++i) memcpy((char*)p + i * line, emulated_tiles[T] + 64 * i, 64);
}
template <int kSums, int kX, int kW>
void multiply_tiles_bf16() {
  auto* sums = reinterpret_cast<float*>(emulated_tiles[kSums]);
  const auto* x = reinterpret_cast<const uint16_t*>(emulated_tiles[kX]);
  const auto* w = reinterpret_cast<const uint16_t*>(emulated_tiles[kW]);
  const auto value = [](uint16_t h) { return bits_to_float(uint32_t(h) << 16); };
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      for (int k = 0; k < 32; ++k) sums[16 * m + n] += value(x[32 * m + k]) * value(w[32 * (k / 2) + 2 * n + k % 2]);
    }
  }
}
inline uint32_t rounded_bits(float x) {
  const uint32_t bits = float_to_bits(x);
  return bits + 0x7fff + (bits >> 16 & 1);
}
template <int kSums, int kX, int kW>
void multiply_tiles_i8() {
  auto* sums = reinterpret_cast<uint32_t*>(emulated_tiles[kSums]);
  const auto* x = reinterpret_cast<const int8_t*>(emulated_tiles[kX]);
  const auto* w = reinterpret_cast<const int8_t*>(emulated_tiles[kW]);
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      for (int k = 0; k < 64; ++k) sums[16 * m + n] += uint32_t(x[64 * m + k] * w[64 * (k / 4) + 4 * n + k % 4]);
    }
  }
}
inline Halves to_bf16(F x, F y) {
  float values[32];
  uint16_t halves[32];
  store(values, x), store(values + 16, y);
  for (int i = 0; i < 32; ++i) halves[i] = uint16_t(rounded_bits(values[i]) >> 16);
  return {_mm512_loadu_si512(halves)};
}
inline Halves paired(Halves h) {
  uint16_t values[32], pairs[32];
  store_halves(values, h);
  for (int i = 0; i < 32; ++i) pairs[i] = values[i % 2 * 16 + i / 2];
  return {_mm512_loadu_si512(pairs)};
}
inline void transpose_pairs(const uint16_t* from, uint16_t* to) {
  for (int i = 0; i < 16; ++i) {
    for (int p = 0; p < 16; ++p) memcpy(to + 32 * i + 2 * p, from + 32 * p + 2 * i, 4);
  }
}
}  // namespace
}  // namespace tersor
