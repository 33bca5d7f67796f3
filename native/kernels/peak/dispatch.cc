#include <atomic>

#include "base/isa_table.h"
#include "base/threads.h"
#include "kernels/peak/kernels.h"
#include "kernels/peak/peak.h"

namespace tersor::peak {
int64_t multiply_bytes(int64_t rounds) {
  const Kernels& kernels = TERSOR_OR_TILE_KERNELS(TERSOR_ACTIVE_BYTE_KERNELS());
  uint8_t bytes[kBytes];
  for (int i = 0; i < kBytes; ++i) bytes[i] = uint8_t(i * 7 % 127);
  std::atomic<uint32_t> sink{0};
  const int64_t n = threads();
  parallel_for(n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sink += kernels.multiply(rounds, bytes);
  });
  return n * rounds * kernels.operations;
}

}  // namespace tersor::peak
