#if defined(__x86_64__)
#include "base/simd/avxvnni.h"
#include "kernels/peak/kernels.h"

namespace tersor::peak {
namespace {

constexpr int kChains = 6;

// vpdpbusd: four products of bytes and their sum in each of two times 8 lanes.
uint32_t multiply(int64_t rounds, const uint8_t* bytes) {
  I sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = load_int((const int32_t*)(bytes + 64 * i));  // all different
  const Codes w = load_codes(bytes + 64 * kChains);
  Four x = load_codes(bytes + 64 * (kChains + 1)).a;
  for (int64_t r = 0; r < rounds; ++r) {
    pin(x);  // so that every round is computed
#pragma GCC unroll 6
    for (int i = 0; i < kChains; ++i) sums[i] = dot(sums[i], w, x);
  }
  for (int i = 1; i < kChains; ++i) sums[0] = add(sums[0], sums[i]);
  return uint32_t(sum_int(sums[0]));
}

}  // namespace

const Kernels avxvnni_kernels = {multiply, 2 * 64 * kChains};

}  // namespace tersor::peak
#endif
