#if defined(__x86_64__) && defined(TERSOR_HAS_AMX)
#include "base/simd/amx.h"
#include "kernels/peak/kernels.h"

namespace tersor::peak {
namespace {

// tdpbssd: 16 x 16 sums of 64 products of bytes.
uint32_t multiply(int64_t rounds, const uint8_t* bytes) {
  [[maybe_unused]] const TilesInUse in_use;
  load_tile<0>(bytes), load_tile<1>(bytes), load_tile<2>(bytes), load_tile<3>(bytes);
  load_tile<4>(bytes), load_tile<5>(bytes), load_tile<6>(bytes), load_tile<7>(bytes);
  for (int64_t r = 0; r < rounds; ++r) {
    multiply_tiles_i8<0, 4, 6>(), multiply_tiles_i8<1, 4, 7>();
    multiply_tiles_i8<2, 5, 6>(), multiply_tiles_i8<3, 5, 7>();
  }
  uint32_t out[256];
  store_tile<0>(out);
  return out[0];
}

}  // namespace

const Kernels amx_kernels = {multiply, 2 * 4 * 16 * 16 * 64};

}  // namespace tersor::peak
#endif
