#include "methods/gram.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <vector>

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
constexpr int64_t kHeld = 4;     // pairs of the right side that stay in a core's outer cache, 768 KiB

// A pair of the left side and the pairs of the right one that are held and not beyond it.
struct Unit {
  const uint16_t *left, *right;
  int64_t row, column;            // of the result, the first ones
  int64_t rows, columns, inputs;  // how many; inputs: rows of x
  int64_t number;                 // among all units of all rows of x
};

int64_t count_pairs(int64_t columns) { return (columns + kPairColumns - 1) / kPairColumns; }

int64_t count_units(int64_t columns) {
  const int64_t pairs = count_pairs(columns), blocks = (pairs + kHeld - 1) / kHeld;
  return blocks * pairs - kHeld * blocks * (blocks - 1) / 2;
}

// Calls body(unit) for all that the lower triangle of X^T X is made of, kRows of x at a time, on several threads.
template <typename Body>
void for_units(int64_t rows, int64_t columns, const float* x, const Body& body) {
  const int64_t pairs = count_pairs(columns), units = count_units(columns);
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
    parallel_for(units, 1, [&](int64_t begin, int64_t end) {
      int64_t first = 0, unit = begin;  // the first pair that is held
      for (; unit >= pairs - first; first += kHeld) unit -= pairs - first;
      for (int64_t n = begin; n < end; ++n) {
        const int64_t pair = first + unit, held = std::min(kHeld, pair - first + 1);
        const int64_t at = pair * kPairColumns, from = first * kPairColumns;
        body(Unit{left.data() + pair * size, right.data() + first * size, at, from,
                  std::min(kPairColumns, columns - at), std::min(held * kPairColumns, columns - from), some,
                  row / kRows * units + n});
        if (++unit == pairs - first) first += kHeld, unit = 0;
      }
    });
  }
}

}  // namespace

void add_gram(int64_t rows, int64_t columns, const float* x, double* gram) {
  for_units(rows, columns, x, [&](const Unit& u) {
    add_pairs(u.left, u.right, u.rows, u.columns, u.inputs, gram + u.row * columns + u.column, columns);
  });
}

double gram_product(int64_t rows, int64_t columns, const float* x, const double* gram) {
  std::vector<double> parts(count_units(columns) * ((rows + kRows - 1) / kRows));
  for_units(rows, columns, x, [&](const Unit& u) {
    parts[u.number] = weigh_pairs(u.left, u.right, u.rows, u.columns, u.inputs, gram + u.row * columns + u.column,
                                  columns, u.row - u.column);
  });
  return std::accumulate(parts.begin(), parts.end(), 0.0);
}
#else
void add_gram(int64_t, int64_t, const float*, double*) { std::abort(); }
double gram_product(int64_t, int64_t, const float*, const double*) { std::abort(); }
#endif

}  // namespace tersor
