#include <algorithm>
#include <cmath>

#include "methods/sums_parts.h"

#define TERSOR_SUM_COLUMNS sum_columns_scalar
#define TERSOR_ROW_PRODUCT row_product_scalar
#include "methods/sums.inc"
