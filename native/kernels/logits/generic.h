// Softmax statistics, once. Included by one file per instruction set, after base/simd/.
#pragma once

#include "base/simd/math.h"
#include "kernels/logits/kernels.h"

namespace tersor::logits {
namespace {

// The index of the largest value, the first of equals.
int64_t top(const float* x, int64_t n) {
  int64_t best = 0;
  for (int64_t i = 1; i < n; ++i) best = x[i] > x[best] ? i : best;
  return best;
}

float largest(const float* x, int64_t n) {
  F m = set(x[0]);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) m = max(m, load(x + i));
  float best = max_of(m);
  for (; i < n; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

double log_sum_exp_from(const float* x, int64_t n, float most) {
  const F most16 = set(most);
  double total = 0;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) total += sum_f64(exp(sub(load(x + i), most16)));
  for (; i < n; ++i) total += __builtin_exp(double(x[i]) - most);
  return most + __builtin_log(total);
}

double log_sum_exp(const float* x, int64_t n) { return log_sum_exp_from(x, n, largest(x, n)); }

// KL(p || q) = sum_i e^(p_i - lp) (p_i - lp - q_i + lq) = (lq - lp) + sum_i e^(p_i - lp) (p_i - q_i): one pass.
Comparison compare(const float* p, const float* q, int64_t n, int64_t target) {
  const int64_t top_p = top(p, n), top_q = top(q, n);
  const float most = p[top_p];
  const double lp = log_sum_exp_from(p, n, most), lq = log_sum_exp_from(q, n, q[top_q]);
  const F most16 = set(most);
  // Centred on the mean difference of the logs, so that terms are as small as their sum.
  const F shift = set(float(lp - lq));
  double total = 0, weights = 0;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const F a = load(p + i), weight = exp(sub(a, most16));
    total += sum_f64(mul(weight, sub(sub(a, load(q + i)), shift)));
    weights += sum_f64(weight);
  }
  for (; i < n; ++i) {
    const double weight = __builtin_exp(double(p[i]) - most);
    total += weight * (double(p[i]) - q[i] - float(lp - lq));
    weights += weight;
  }
  const double divergence = total / weights + (double(float(lp - lq)) - (lp - lq));
  const double tp = p[target] - lp, tq = q[target] - lq;
  return {-tp, -tq, divergence, top_p == top_q ? 1.0 : 0.0, __builtin_exp(tq) - __builtin_exp(tp)};
}

#define TERSOR_LOGITS_KERNELS {log_sum_exp, compare}

}  // namespace
}  // namespace tersor::logits
