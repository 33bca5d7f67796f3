// Softmax statistics of rows of logits: what every instruction set provides.
#pragma once

#include <cstdint>

#include "base/kernel_tables.h"

namespace tersor::logits {

struct Comparison {
  double nll_p, nll_q;  // -log of the target's probability, in nats
  double divergence;    // KL(p || q) in nats
  double same_top;      // 1 when both have the same argmax (the first of equals), else 0
  double change;        // q(target) - p(target)
};

struct Kernels {
  // log sum exp of n logits. exp in float32 (relative error 2e-7), sums in float64.
  double (*log_sum_exp)(const float* x, int64_t n);
  Comparison (*compare)(const float* p, const float* q, int64_t n, int64_t target);
  // out = e^((x - most) * scale) in float64, relative error below 1e-14, for x <= most and scale > 0; 0 below e^-700.
  void (*weigh)(const float* x, int64_t n, float most, double scale, double* out);
  // The place of the first of the largest values; 0 with NaN among them.
  int64_t (*top)(const float* x, int64_t n);
};

TERSOR_KERNEL_TABLES

}  // namespace tersor::logits
