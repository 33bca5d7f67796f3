#include "methods/sums.h"

#include <algorithm>

#include "base/cpu.h"
#include "base/threads.h"
#include "methods/sums_parts.h"

namespace tersor {
namespace {

constexpr int64_t kGrain = 64;  // columns, or rows, worth handing to a thread

}  // namespace

void column_sums(int64_t rows, int64_t columns, const float* x, double* squares, double* magnitudes, float* absmax) {
  auto* sum = sum_columns_scalar;
#if defined(__x86_64__)
  if (active_isa() != Isa::kScalar) sum = sum_columns_avx2;
#endif
  parallel_for(columns, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kSumColumns)
      sum(rows, columns, x, first, std::min(kSumColumns, end - first), squares, magnitudes, absmax);
  });
}

void row_products(int64_t rows, int64_t columns, const float* x, const float* y, double* products) {
  auto* product = row_product_scalar;
#if defined(__x86_64__)
  if (active_isa() != Isa::kScalar) product = row_product_avx2;
#endif
  parallel_for(rows, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) products[r] = product(columns, x + r * columns, y + r * columns);
  });
}

}  // namespace tersor
