#if defined(__x86_64__)
#ifdef TERSOR_EMULATE
#include "base/simd/emulated_avx512.h"
#else
#include <immintrin.h>
#endif

#include "kernels/peak/kernels.h"

namespace tersor::peak {
namespace {

constexpr int kChains = 12;

// vpdpbusd: four products of bytes and their sum in each of 16 lanes.
uint32_t multiply(int64_t rounds, const uint8_t* bytes) {
  __m512i sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = _mm512_loadu_si512(bytes + 64 * i);  // all different
  const __m512i w = _mm512_loadu_si512(bytes + 64 * kChains), x = _mm512_loadu_si512(bytes + 64 * (kChains + 1));
  for (int64_t r = 0; r < rounds; ++r) {
    for (int i = 0; i < kChains; ++i) sums[i] = _mm512_dpbusd_epi32(sums[i], w, x);
  }
  for (int i = 1; i < kChains; ++i) sums[0] = _mm512_add_epi32(sums[0], sums[i]);
  uint32_t out[16];
  _mm512_storeu_si512(out, sums[0]);
  return out[0];
}

}  // namespace

const Kernels avx512vnni_kernels = {multiply, 2 * 64 * kChains};

}  // namespace tersor::peak
#endif
