#include <algorithm>

#include "base/isa_table.h"
#include "base/threads.h"
#include "kernels/logits/logits.h"

namespace tersor::logits {

void nll(const float* x, int64_t n, int64_t vocab, const int32_t* targets, double* out) {
  const Kernels& kernels = TERSOR_ACTIVE_KERNELS();
  parallel_for(n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      out[i] = kernels.log_sum_exp(x + i * vocab, vocab) - double(x[i * vocab + targets[i]]);
  });
}

void compare(const float* p, const float* q, int64_t n, int64_t vocab, const int32_t* targets, Comparison* out) {
  const Kernels& kernels = TERSOR_ACTIVE_KERNELS();
  parallel_for(n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] = kernels.compare(p + i * vocab, q + i * vocab, vocab, targets[i]);
  });
}

double weigh(const float* x, int64_t n, double temperature, double* out) {
  const Kernels& kernels = TERSOR_ACTIVE_KERNELS();
  constexpr int64_t kPart = 2048;
  const float most = x[kernels.top(x, n)];
  const double scale = std::min(1 / temperature, 1e300);  // not infinite, so that the largest weight is 1 at any
  parallel_for((n + kPart - 1) / kPart, 4, [&](int64_t begin, int64_t end) {
    const int64_t from = begin * kPart, to = std::min(n, end * kPart);
    kernels.weigh(x + from, to - from, most, scale, out + from);
  });
  double sums[8] = {};
  for (int64_t i = 0; i < n; ++i) sums[i % 8] += out[i];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

void top(const float* x, int64_t n, int64_t vocab, int32_t* out) {
  const Kernels& kernels = TERSOR_ACTIVE_KERNELS();
  parallel_for(n, 4, [&](int64_t begin, int64_t end) {  // a row takes microseconds
    for (int64_t i = begin; i < end; ++i) out[i] = int32_t(kernels.top(x + i * vocab, vocab));
  });
}

}  // namespace tersor::logits
