// The body of sums_scalar.cc compiled for AVX2.
#if defined(__AVX2__)
#include <algorithm>
#include <cmath>

#include "methods/sums_parts.h"

#define TERSOR_SUM_COLUMNS sum_columns_avx2
#define TERSOR_ROW_PRODUCT row_product_avx2
#include "methods/sums.inc"
#endif
