// Softmax statistics of rows of logits, on the thread pool.
#pragma once

#include <cstdint>

#include "kernels/logits/kernels.h"

namespace tersor::logits {

// out[i] = -log softmax(x[i])[targets[i]]; x (n, vocab).
void nll(const float* x, int64_t n, int64_t vocab, const int32_t* targets, double* out);

// out[i] compares row i of p with row i of q.
void compare(const float* p, const float* q, int64_t n, int64_t vocab, const int32_t* targets, Comparison* out);

// out (n) = e^((x - the largest x) / temperature); returns their sum. n > 0.
double weigh(const float* x, int64_t n, double temperature, double* out);

// out[i] = the place of the first largest value of row i.
void top(const float* x, int64_t n, int64_t vocab, int32_t* out);

}  // namespace tersor::logits
