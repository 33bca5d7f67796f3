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

void top(const float* x, int64_t n, int64_t vocab, int32_t* out) {
  const Kernels& kernels = TERSOR_ACTIVE_KERNELS();
  parallel_for(n, 4, [&](int64_t begin, int64_t end) {  // a row takes microseconds
    for (int64_t i = begin; i < end; ++i) out[i] = int32_t(kernels.top(x + i * vocab, vocab));
  });
}

}  // namespace tersor::logits
