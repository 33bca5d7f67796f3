// Gram matrices X^T X of the inputs of linear layers.
#pragma once

#include <cstdint>

namespace tersor {

// Whether the instruction set in use has tiles (AMX). What has none multiplies faster by a BLAS than add_gram could.
bool multiplies_by_tiles();

// Adds X^T X to the lower triangle of gram, (columns, columns); what it holds above the diagonal is not defined. x:
// (rows, columns). Every float is the sum of three bfloat16, which is exact; of their nine products the six down to
// 2^-24 of the whole are summed in float over 1024 rows, the sums of those in double. Subnormal numbers count as 0.
// Needs multiplies_by_tiles().
void add_gram(int64_t rows, int64_t columns, const float* x, double* gram);

// Returns tr(X H X^T), H being symmetric, (columns, columns), and read up to its diagonal; X^T X is made as by
// add_gram. Needs multiplies_by_tiles().
double gram_product(int64_t rows, int64_t columns, const float* x, const double* gram);

}  // namespace tersor
