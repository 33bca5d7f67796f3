#include "base/bandwidth.h"

#include <atomic>

#include "base/threads.h"

namespace tersor {

uint64_t read_words(const uint64_t* words, int64_t n) {
  std::atomic<uint64_t> total{0};
  // 4096 words = 32 KiB, so that no two threads share a page's lines.
  parallel_for(n, 4096, [&](int64_t begin, int64_t end) {
    uint64_t sums[8] = {};  // independent chains, so that additions do not wait for each other
    int64_t i = begin;
    for (; i + 8 <= end; i += 8) {
      for (int k = 0; k < 8; ++k) sums[k] += words[i + k];
    }
    for (; i < end; ++i) sums[0] += words[i];
    uint64_t sum = 0;
    for (uint64_t s : sums) sum += s;
    total += sum;
  });
  return total;
}

}  // namespace tersor
