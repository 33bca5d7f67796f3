// Matrix tiles in plain C++, for tests on CPUs without them. Names and meanings: base/simd/amx.h.
#pragma once

#include "base/simd/avx512vnni.h"

namespace tersor {
namespace {

thread_local uint8_t emulated_tiles[8][1024];

struct TilesInUse {};

template <int T>
void clear_tile() {
  memset(emulated_tiles[T], 0, 1024);
}
template <int T>
void load_tile(const void* p) {
  memcpy(emulated_tiles[T], p, 1024);
}
template <int T>
void store_tile(void* p) {
  memcpy(p, emulated_tiles[T], 1024);
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
// Two times 16 floats as 32 bfloat16.
inline void store_bf16(uint16_t* p, F x, F y) {
  float values[32];
  store(values, x), store(values + 16, y);
  for (int i = 0; i < 32; ++i) p[i] = uint16_t(rounded_bits(values[i]) >> 16);
}
// The same with those of x at the even places, those of y at the odd ones.
inline void store_bf16_pairs(uint16_t* p, F x, F y) {
  uint16_t values[32];
  store_bf16(values, x, y);
  for (int i = 0; i < 16; ++i) p[2 * i] = values[i], p[2 * i + 1] = values[16 + i];
}

}  // namespace
}  // namespace tersor
