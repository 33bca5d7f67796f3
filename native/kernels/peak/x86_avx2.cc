#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels/peak/kernels.h"

namespace tersor::peak {
namespace {

constexpr int kChains = 12;

// vpmaddubsw and the addition of its 16-bit sums, as for codes of up to 4 bits.
uint32_t multiply(int64_t rounds, const uint8_t* bytes) {
  __m256i sums[kChains], x = _mm256_loadu_si256((const __m256i*)bytes);
  for (int i = 0; i < kChains; ++i) sums[i] = _mm256_loadu_si256((const __m256i*)(bytes + 32 * i));
  const __m256i w = _mm256_loadu_si256((const __m256i*)(bytes + 32 * kChains));
  for (int64_t r = 0; r < rounds; ++r) {
    for (int i = 0; i < kChains; ++i) {
      asm("" : "+x"(x));  // a new x, for all that the compiler knows
      sums[i] = _mm256_add_epi16(sums[i], _mm256_maddubs_epi16(w, x));
    }
  }
  for (int i = 1; i < kChains; ++i) sums[0] = _mm256_add_epi16(sums[0], sums[i]);
  return uint32_t(_mm256_extract_epi32(sums[0], 0));
}

}  // namespace

const Kernels avx2_kernels = {multiply, 2 * 32 * kChains};

}  // namespace tersor::peak
#endif
