// The search with the 32 registers and the masks of AVX-512, still eight lanes: the bytes of the AVX2 build in 5 to 10
// % less time for Q3_K, Q6_K and IQ4 (Q3_K 5.2 ns a weight against 5.8, Q6_K 9.1 against 9.8, IQ4_XS 36.3 against 39.6;
// one Zen 4 core).
#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>

#include "formats/ggml_extremes.h"
#include "formats/ggml_half.h"
#include "formats/ggml_pack.h"
#include "formats/ggml_search.h"
#include "formats/ggml_tables.h"

#define TERSOR_SEARCH tersor::search_avx512vnni
#include "formats/ggml_search.inc"
#include "formats/ggml_search_affine.inc"
#include "formats/ggml_search_types.inc"

#endif
