#include "kernels/peak/kernels.h"

namespace tersor::peak {
namespace {

uint32_t multiply(int64_t rounds, const uint8_t* bytes) {
  uint32_t sums[4] = {};
  for (int64_t r = 0; r < rounds; ++r) {
    for (int i = 0; i < 64; ++i) sums[i % 4] += uint32_t(bytes[i]) * bytes[64 + i];
    asm volatile("" ::"r"(bytes) : "memory");  // so that every round is computed
  }
  return sums[0] + sums[1] + sums[2] + sums[3];
}

}  // namespace

const Kernels scalar_kernels = {multiply, 2 * 64};

}  // namespace tersor::peak
