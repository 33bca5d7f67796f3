// Products of float32 matrices that calibration makes many of: Gram matrices, and errors times a Hessian.
#pragma once

#include <cstdint>

namespace tersor {

// The left factor, (m, k): element (i, j) at data[i * line + j], or, of one that lies by columns, at data[j * line +
// i].
struct LeftFactor {
  const float* data;
  int64_t line;
  bool by_columns;
};

// Whether the instruction set in use has tiles (AMX). What has none multiplies faster by a BLAS than multiply could.
bool multiplies_by_tiles();

// out (m, n) = a b; b (k, n), lines b_line and out_line apart. On the calling thread. Every float is
// the sum of three bfloat16, which is exact; of their nine products the six down to 2^-24 of the whole are summed in
// float32. Subnormal numbers count as 0. Needs multiplies_by_tiles().
void multiply(int64_t m, int64_t n, int64_t k, const LeftFactor& a, const float* b, int64_t b_line, float* out,
              int64_t out_line);

}  // namespace tersor
