// The search with eight lanes in one register: three to five times as fast as with two registers of SSE2, and the same
// bytes (Q4_K 84 ns a weight against 212, Q2_K 74 against 360, Q6_K 19 against 62; benchmarks/ggml_encoders.py, one Zen
// 3 core).
#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>

#include "formats/ggml_extremes.h"
#include "formats/ggml_half.h"
#include "formats/ggml_pack.h"
#include "formats/ggml_search.h"
#include "formats/ggml_tables.h"

#define TERSOR_SEARCH tersor::search_avx2
#include "formats/ggml_search.inc"
#include "formats/ggml_search_affine.inc"
#include "formats/ggml_search_types.inc"

#endif
