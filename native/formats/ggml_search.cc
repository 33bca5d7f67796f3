// The search on the lowest CPU, and the choice of the instruction set.
#include "formats/ggml_search.h"

#include <cmath>
#include <cstdlib>

#include "base/cpu.h"
#include "formats/ggml_extremes.h"
#include "formats/ggml_half.h"
#include "formats/ggml_pack.h"
#include "formats/ggml_tables.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors of 32 bytes stay inside this file

#define TERSOR_SEARCH tersor::search_baseline
namespace TERSOR_SEARCH {
constexpr int kRefits = 3, kRounds = 4;
using namespace tersor;
}
#include "formats/ggml_search.inc"

namespace tersor {

void search_row(SearchType type, const float* w, const float* importance, uint8_t* blocks, int64_t n_blocks) {
  search_baseline::search_row(type, w, importance, blocks, n_blocks);
}

}  // namespace tersor
