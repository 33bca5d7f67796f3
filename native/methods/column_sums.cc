#include "methods/column_sums.h"

#include <algorithm>
#include <cmath>

#include "base/threads.h"

namespace tersor {
namespace {

constexpr int64_t kRows = 64;
constexpr int64_t kColumns = 64;  // whose sums stay in the L1 cache

// Those of n columns, at most kColumns, from `first` on.
void sum_columns(int64_t rows, int64_t columns, const float* x, int64_t first, int64_t n, double* squares,
                 double* magnitudes, float* absmax) {
  float largest[kColumns];
  std::copy(absmax + first, absmax + first + n, largest);
  for (int64_t top = 0; top < rows; top += kRows) {
    float sum[kColumns] = {}, square[kColumns] = {};
    for (int64_t r = top; r < std::min(rows, top + kRows); r++) {
      const float* row = x + r * columns + first;
      for (int64_t c = 0; c < n; c++) {
        const float a = std::fabs(row[c]);
        sum[c] += a;
        square[c] += a * a;
        largest[c] = (a > largest[c]) | (a != a) ? a : largest[c];  // a NaN stays, since nothing is larger
      }
    }
    for (int64_t c = 0; c < n; c++) {
      magnitudes[first + c] += sum[c];
      squares[first + c] += square[c];
    }
  }
  std::copy(largest, largest + n, absmax + first);
}

}  // namespace

void column_sums(int64_t rows, int64_t columns, const float* x, double* squares, double* magnitudes, float* absmax) {
  parallel_for(columns, kColumns, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kColumns)
      sum_columns(rows, columns, x, first, std::min(kColumns, end - first), squares, magnitudes, absmax);
  });
}

}  // namespace tersor
