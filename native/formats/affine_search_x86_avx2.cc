// The body of affine_search.cc compiled for AVX2. Searched clip of int4_g64, 2 M weights, one thread of a Zen 3, in one
// run: 24.6 ns of CPU time per weight, the baseline build 74.4; min-max 0.6 against 4.1.
#if defined(__AVX2__)
#include "formats/affine_search.h"

#define TERSOR_AFFINE_SEARCH affine_search_avx2
#include "formats/affine_search.inc"
#endif
