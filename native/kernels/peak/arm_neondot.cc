#if defined(__aarch64__)
#include "kernels/peak/arm_chains.h"
#include "kernels/peak/kernels.h"

namespace tersor::peak {
namespace {

// sdot: four products of bytes and their sum in each of 4 lanes.
uint32_t multiply(int64_t rounds, const uint8_t* bytes) {
  return multiply_chains(rounds, bytes, [](int32x4_t s, int8x16_t w, int8x16_t x) { return vdotq_s32(s, w, x); });
}

}  // namespace

const Kernels neondot_kernels = {multiply, 2 * 16 * kChains};

}  // namespace tersor::peak
#endif
