#if defined(__aarch64__)
#include "kernels/peak/arm_chains.h"
#include "kernels/peak/kernels.h"

namespace tersor::peak {
namespace {

// smmla: the products of two rows of 8 bytes and two others, and their sums.
uint32_t multiply(int64_t rounds, const uint8_t* bytes) {
  return multiply_chains(rounds, bytes, [](int32x4_t s, int8x16_t w, int8x16_t x) { return vmmlaq_s32(s, w, x); });
}

}  // namespace

const Kernels neoni8mm_kernels = {multiply, 2 * 32 * kChains};

}  // namespace tersor::peak
#endif
