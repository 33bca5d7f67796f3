#if defined(__aarch64__)
#include <arm_neon.h>

#include "kernels/peak/kernels.h"

namespace tersor::peak {
namespace {

constexpr int kChains = 16;

// smmla: the products of two rows of 8 bytes and two others, and their sums.
uint32_t multiply(int64_t rounds, const uint8_t* bytes) {
  const int8_t* b = reinterpret_cast<const int8_t*>(bytes);
  int32x4_t sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = vreinterpretq_s32_s8(vld1q_s8(b + 16 * i));  // all different
  const int8x16_t w = vld1q_s8(b + 16 * kChains), x = vld1q_s8(b + 16 * (kChains + 1));
  for (int64_t r = 0; r < rounds; ++r) {
    for (int i = 0; i < kChains; ++i) sums[i] = vmmlaq_s32(sums[i], w, x);
  }
  for (int i = 1; i < kChains; ++i) sums[0] = vaddq_s32(sums[0], sums[i]);
  return uint32_t(vaddvq_s32(sums[0]));
}

}  // namespace

const Kernels neoni8mm_kernels = {multiply, 2 * 32 * kChains};

}  // namespace tersor::peak
#endif
