#if defined(__x86_64__) && defined(TERSOR_HAS_AMX) && !defined(TERSOR_EMULATE)
#include "base/simd/amx.h"
#include "kernels/peak/kernels.h"

namespace tersor::peak {
namespace {

// tdpbssd: 16 x 16 sums of 64 products of bytes.
uint32_t multiply(int64_t rounds, const uint8_t* bytes) {
  const TilesInUse in_use;
  load_tile<0>(bytes), load_tile<1>(bytes), load_tile<2>(bytes), load_tile<3>(bytes);
  load_tile<4>(bytes), load_tile<5>(bytes), load_tile<6>(bytes), load_tile<7>(bytes);
  for (int64_t r = 0; r < rounds; ++r) {
    asm volatile("tdpbssd %tmm6, %tmm4, %tmm0\n\ttdpbssd %tmm7, %tmm4, %tmm1");
    asm volatile("tdpbssd %tmm6, %tmm5, %tmm2\n\ttdpbssd %tmm7, %tmm5, %tmm3");
  }
  alignas(64) uint32_t out[256];
  store_tile<0>(out);
  return out[0];
}

}  // namespace

const Kernels amx_kernels = {multiply, 2 * 4 * 16 * 16 * 64};

}  // namespace tersor::peak
#endif
