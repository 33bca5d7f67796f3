// The products of bytes of an ARM instruction set. Include only from arm_*.cc files.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace tersor::peak {
namespace {

constexpr int kChains = 16;

// dot(sums, w, x): the sums with products of 16 bytes and 16 others added.
template <typename Dot>
uint32_t multiply_chains(int64_t rounds, const uint8_t* bytes, Dot dot) {
  const int8_t* b = reinterpret_cast<const int8_t*>(bytes);
  int32x4_t sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = vreinterpretq_s32_s8(vld1q_s8(b + 16 * i));  // all different
  const int8x16_t w = vld1q_s8(b + 16 * kChains), x = vld1q_s8(b + 16 * (kChains + 1));
  for (int64_t r = 0; r < rounds; ++r) {
    for (int i = 0; i < kChains; ++i) sums[i] = dot(sums[i], w, x);
  }
  for (int i = 1; i < kChains; ++i) sums[0] = vaddq_s32(sums[0], sums[i]);
  return uint32_t(vaddvq_s32(sums[0]));
}

}  // namespace
}  // namespace tersor::peak
