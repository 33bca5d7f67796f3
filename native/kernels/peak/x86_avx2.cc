#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels/peak/kernels.h"

namespace tersor::peak {
namespace {

constexpr int kChains = 8;

inline __m256i load(const uint8_t* bytes, int i) { return _mm256_loadu_si256((const __m256i*)(bytes + 32 * i)); }

// vpmaddubsw and the addition of its 16-bit sums, as for codes of up to 4 bits. Of intrinsics a compiler would do the
// product once.
inline void dot(__m256i& sum, __m256i w, __m256i x) {
  __m256i product;
  asm volatile("vpmaddubsw %2, %3, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(x), "x"(w));
}

uint32_t multiply(int64_t rounds, const uint8_t* bytes) {
  const __m256i w = load(bytes, kChains), x = load(bytes, kChains + 1);
  __m256i a = load(bytes, 0), b = load(bytes, 1), c = load(bytes, 2), d = load(bytes, 3);
  __m256i e = load(bytes, 4), f = load(bytes, 5), g = load(bytes, 6), h = load(bytes, 7);
  for (int64_t r = 0; r < rounds; ++r) {
    dot(a, w, x), dot(b, w, x), dot(c, w, x), dot(d, w, x);
    dot(e, w, x), dot(f, w, x), dot(g, w, x), dot(h, w, x);
  }
  const __m256i low = _mm256_add_epi16(_mm256_add_epi16(a, b), _mm256_add_epi16(c, d));
  const __m256i high = _mm256_add_epi16(_mm256_add_epi16(e, f), _mm256_add_epi16(g, h));
  return uint32_t(_mm256_extract_epi32(_mm256_add_epi16(low, high), 0));
}

}  // namespace

const Kernels avx2_kernels = {multiply, 2 * 32 * kChains};

}  // namespace tersor::peak
#endif
