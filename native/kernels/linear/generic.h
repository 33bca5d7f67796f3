// The algorithm of `linear`, once. Included by one file per instruction set, after its base/simd/ header: everything
// here has internal linkage, so that no instruction leaks into another file.
//
// Every output is summed over k in ascending order by one accumulator, whatever the number of activation rows: a row of
// a large product has the same bits as that row in another one of the same kind (up to kFineRows rows, or more).
#pragma once

#include "kernels/linear/generic_codes.h"
#include "kernels/linear/generic_fine.h"
#include "kernels/linear/generic_finish.h"
#include "kernels/linear/generic_float.h"
#include "kernels/linear/generic_quantize.h"
#include "kernels/linear/generic_quantize_rows.h"
#include "kernels/linear/generic_tile.h"

namespace tersor::linear {
namespace {

// Where one dot product serves all codes, so do the kernels of one class.
template <int kClass>
inline constexpr int kKernelClass = kDotIsInt && kClass == 1 ? 0 : kClass;

#define TERSOR_TILES(code_class)                                                           \
  {                                                                                        \
    {tile<kKernelClass<code_class>, 1, false>, tile<kKernelClass<code_class>, 1, true>}, { \
      tile<kKernelClass<code_class>, 2, false>, tile<kKernelClass<code_class>, 2, true>    \
    }                                                                                      \
  }
#define TERSOR_LINEAR_KERNELS                                                             \
  {                                                                                       \
      quantize_fine,                                                                      \
      quantize_tile,                                                                      \
      quantize_fine_row,                                                                  \
      quantize_tile_rows,                                                                 \
      largest_below,                                                                      \
      fine,                                                                               \
      widen_fours,                                                                        \
      kSignedBias,                                                                        \
      open,                                                                               \
      {TERSOR_TILES(0), TERSOR_TILES(1), TERSOR_TILES(2)},                                \
      {float_panels<kF32>, float_panels<kF16>, float_panels<kBF16>, float_panels<kE4M3>}, \
  }

}  // namespace
}  // namespace tersor::linear
