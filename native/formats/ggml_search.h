// The search for ggml blocks of least squared error, sum of weight * (w - decoded)^2, one algorithm for the whole
// family.
#pragma once

#include <cstdint>

namespace tersor {

enum class SearchType {
  kNone,
  kQ4_0,
  kQ4_1,
  kQ5_0,
  kQ5_1,
  kQ8_0,
  kTQ1_0,
  kTQ2_0,
  kMXFP4,
  kQ2_K,
  kQ3_K,
  kQ4_K,
  kQ5_K,
  kQ6_K,
  kIQ4_NL,
  kIQ4_XS
};

// Encodes one row of n_blocks blocks. importance: one weight per column, or null.
// The same bytes come out whatever the instruction set: every sum has a fixed order and nothing is contracted.
void search_row(SearchType type, const float* w, const float* importance, uint8_t* blocks, int64_t n_blocks);

}  // namespace tersor
