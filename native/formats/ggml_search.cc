// The search on the lowest CPU, and the choice of the instruction set.
#include "formats/ggml_search.h"

#include <cmath>

#include "base/cpu.h"
#include "formats/ggml_extremes.h"
#include "formats/ggml_half.h"
#include "formats/ggml_pack.h"
#include "formats/ggml_tables.h"

#define TERSOR_SEARCH tersor::search_baseline
#include "formats/ggml_search.inc"
#include "formats/ggml_search_affine.inc"
#include "formats/ggml_search_types.inc"

namespace tersor::search_avx2 {
void search_row(SearchType type, const float* w, const float* importance, uint8_t* blocks, int64_t n_blocks);
}
namespace tersor::search_avx512vnni {
void search_row(SearchType type, const float* w, const float* importance, uint8_t* blocks, int64_t n_blocks);
}

namespace tersor {

void search_row(SearchType type, const float* w, const float* importance, uint8_t* blocks, int64_t n_blocks) {
#if defined(__x86_64__)
  if (active_isa() >= Isa::kAvx512Vnni) return search_avx512vnni::search_row(type, w, importance, blocks, n_blocks);
  if (active_isa() >= Isa::kAvx2) return search_avx2::search_row(type, w, importance, blocks, n_blocks);
#endif
  search_baseline::search_row(type, w, importance, blocks, n_blocks);
}

}  // namespace tersor
