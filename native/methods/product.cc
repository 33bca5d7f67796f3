#include "methods/product.h"

#include <algorithm>
#include <cstdlib>

#include "base/cpu.h"
#include "base/memory.h"
#include "methods/product_tiles.h"

namespace tersor {

bool multiplies_by_tiles() {
#ifdef TERSOR_HAS_AMX
  return active_isa() == Isa::kAmx;
#else
  return false;
#endif
}

#ifdef TERSOR_HAS_AMX
namespace {

// Of a block of b 512 KiB of each part, and as much of a, so that both stay in the outer cache.
constexpr int64_t kBlock = 512;

}  // namespace

void multiply(int64_t m, int64_t n, int64_t k, const LeftFactor& a, const float* b, int64_t b_line, float* out,
              int64_t out_line) {
  static thread_local LargeVector<uint16_t> left, right;
  if (k == 0) {
    for (int64_t i = 0; i < m; ++i) std::fill_n(out + i * out_line, n, 0.0f);
  }
  for (int64_t row = 0; row < m; row += kBlock) {
    const int64_t rows = std::min(kBlock, m - row);
    for (int64_t depth = 0; depth < k; depth += kBlock) {
      const int64_t some = std::min(kBlock, k - depth);
      const int64_t at = a.by_columns ? depth * a.line + row : row * a.line + depth;
      if (int64_t need = tiles_size(rows, some); int64_t(left.size()) < need) left.clear(), left.resize(need);
      load_left({a.data + at, a.line, a.by_columns}, rows, some, left.data());
      for (int64_t column = 0; column < n; column += kBlock) {
        const int64_t columns = std::min(kBlock, n - column);
        if (int64_t need = tiles_size(columns, some); int64_t(right.size()) < need) right.clear(), right.resize(need);
        load_right(b + depth * b_line + column, b_line, columns, some, right.data());
        multiply_tiles(left.data(), right.data(), rows, columns, some, out + row * out_line + column, out_line,
                       depth > 0);
      }
    }
  }
}
#else
void multiply(int64_t, int64_t, int64_t, const LeftFactor&, const float*, int64_t, float*, int64_t) { std::abort(); }
#endif

}  // namespace tersor
