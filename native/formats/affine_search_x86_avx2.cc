#if defined(__AVX2__)
#include "formats/affine_search.h"

#define TERSOR_AFFINE_SEARCH affine_search_avx2
#include "formats/affine_search.inc"
#endif
