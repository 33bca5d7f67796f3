#include "methods/gram.h"

#include <algorithm>
#include <cstdlib>

#include "base/cpu.h"
#include "base/memory.h"
#include "base/threads.h"
#include "methods/gram_tiles.h"

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

constexpr int64_t kRows = 1024;  // at a time
constexpr int64_t kHeld = 8;     // pairs of the right side that stay in a core's outer cache, 1 MiB

}  // namespace

void add_gram(int64_t rows, int64_t columns, const float* x, double* gram) {
  const int64_t pairs = (columns + kPairColumns - 1) / kPairColumns;
  LargeVector<uint16_t> left, right;
  left.resize(pairs * pair_size(std::min(kRows, rows))), right.resize(left.size());
  for (int64_t row = 0; row < rows; row += kRows) {
    const int64_t some = std::min(kRows, rows - row), size = pair_size(some);
    parallel_for(pairs, 1, [&](int64_t begin, int64_t end) {
      for (int64_t pair = begin; pair < end; ++pair) {
        const int64_t column = pair * kPairColumns;
        load_pair(x + row * columns + column, columns, std::min(kPairColumns, columns - column), some,
                  left.data() + pair * size, right.data() + pair * size);
      }
    });
    // Each unit is a pair of the left side times those of the right one that are held and not beyond it.
    const int64_t blocks = (pairs + kHeld - 1) / kHeld, units = blocks * pairs - kHeld * blocks * (blocks - 1) / 2;
    parallel_for(units, 1, [&](int64_t begin, int64_t end) {
      int64_t first = 0, unit = begin;  // the first pair that is held
      for (; unit >= pairs - first; first += kHeld) unit -= pairs - first;
      for (int64_t n = begin; n < end; ++n) {
        const int64_t pair = first + unit, held = std::min(kHeld, pair - first + 1);
        const int64_t at = pair * kPairColumns, from = first * kPairColumns;
        add_pairs(left.data() + pair * size, right.data() + first * size, std::min(kPairColumns, columns - at),
                  std::min(held * kPairColumns, columns - from), some, gram + at * columns + from, columns);
        if (++unit == pairs - first) first += kHeld, unit = 0;
      }
    });
  }
}
#else
void add_gram(int64_t, int64_t, const float*, double*) { std::abort(); }
#endif

}  // namespace tersor
