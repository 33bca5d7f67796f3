// Sums over the values of matrices, each made in one read.
#pragma once

#include <cstdint>

namespace tersor {

// Adds the rows of x, (rows, columns): x^2 to squares, |x| to magnitudes, and their
// largest to absmax; each (columns). Sums of 64 rows are made in float, those of all rows in double. A NaN is larger
// than any number.
void column_sums(int64_t rows, int64_t columns, const float* x, double* squares, double* magnitudes, float* absmax);

// Writes the inner product of each row of x with that of y, both (rows, columns), in double.
void row_products(int64_t rows, int64_t columns, const float* x, const float* y, double* products);

}  // namespace tersor
