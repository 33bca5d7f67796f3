// Parts of sums.h; the same code for each instruction set (sums.inc), chosen by sums.cc.
#pragma once

#include <cstdint>

namespace tersor {

constexpr int64_t kSumColumns = 512;  // whose sums stay in the L1 cache

// column_sums of n columns, at most kSumColumns, from `first` on.
void sum_columns_scalar(int64_t rows, int64_t columns, const float* x, int64_t first, int64_t n, double* squares,
                        double* magnitudes, float* absmax);
void sum_columns_avx2(int64_t rows, int64_t columns, const float* x, int64_t first, int64_t n, double* squares,
                      double* magnitudes, float* absmax);

// The inner product of n floats.
double row_product_scalar(int64_t n, const float* x, const float* y);
double row_product_avx2(int64_t n, const float* x, const float* y);

}  // namespace tersor
