#if defined(__x86_64__) && defined(TERSOR_HAS_AMX)
#include <algorithm>

#include "base/simd/amx.h"
#include "base/simd/tile_product.h"
#include "methods/gram_tiles.h"

namespace tersor {
namespace {

constexpr int64_t kParts = kGramParts * kTile;  // of a chunk
static_assert(pair_size(32) == 2 * kParts);

// Adds 16 floats to as many doubles.
inline void add_floats(double* __restrict to, const float* __restrict from) {
  for (int i = 0; i < 16; ++i) to[i] += from[i];
}

}  // namespace

// left: (2, chunks, parts); right: (chunks, 2, parts)
void load_pair(const float* x, int64_t line, int64_t columns, int64_t rows, uint16_t* left, uint16_t* right) {
  const int64_t chunks = (rows + 31) / 32;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t panel = 0; panel < 2; ++panel, right += kParts) {
      const float* from = x + 32 * chunk * line + 16 * panel;
      const int64_t lines = rows - 32 * chunk, width = columns - 16 * panel;
      for (int64_t i = 0; i < 32; i += 2) {
        const F even = i < lines ? load_least(from + i * line, width) : zero();
        const F odd = i + 1 < lines ? load_least(from + (i + 1) * line, width) : zero();
        store_paired_parts<kGramParts>(right + 16 * i, even, odd);
      }
      uint16_t* turned = left + (panel * chunks + chunk) * kParts;
      for (int part = 0; part < kGramParts; ++part) transpose_pairs(right + part * kTile, turned + part * kTile);
    }
  }
}

namespace {

// Calls body(first column of a pair of the right side, sums) for each of them, sums being those of `left` times it:
// (2, 2) of 16 x 16.
template <typename Body>
inline void for_pairs(const uint16_t* left, const uint16_t* right, int64_t right_columns, int64_t rows,
                      const double* gram, int64_t line, int64_t left_columns, const Body& body) {
  [[maybe_unused]] const TilesInUse in_use;
  alignas(64) float sums[4 * 256];
  const int64_t chunks = (rows + 31) / 32;
  for (int64_t column = 0; column < right_columns; column += kPairColumns, right += 2 * chunks * kParts) {
    for (int64_t i = 0; i < left_columns; ++i) {  // asked for while the tiles multiply
      for (int64_t j = 0; j < kPairColumns; j += 8) __builtin_prefetch(gram + column + i * line + j, 1);
    }
    multiply_block<2, 2, kGramParts, kGramParts>(left, chunks * kParts, right, chunks, true, sums);
    body(column, sums);
  }
}

// The 16 sums of row i of a pair of the left side that begin at column j, a multiple of 16.
inline const float* sums_at(const float* sums, int64_t i, int64_t j) {
  return sums + i / 16 * 512 + j / 16 * 256 + i % 16 * 16;
}

}  // namespace

void add_pairs(const uint16_t* left, const uint16_t* right, int64_t left_columns, int64_t right_columns, int64_t rows,
               double* gram, int64_t line) {
  for_pairs(left, right, right_columns, rows, gram, line, left_columns, [&](int64_t column, const float* sums) {
    for (int64_t i = 0; i < left_columns; ++i) {
      double* to = gram + i * line + column;
      for (int64_t j = 0; j < std::min(kPairColumns, right_columns - column); j += 16) {
        const float* from = sums_at(sums, i, j);
        const int64_t left_over = right_columns - column - j;
        if (left_over >= 16) {
          add_floats(to + j, from);
        } else {
          for (int64_t k = 0; k < left_over; ++k) to[j + k] += from[k];
        }
      }
    }
  });
}

double weigh_pairs(const uint16_t* left, const uint16_t* right, int64_t left_columns, int64_t right_columns,
                   int64_t rows, const double* gram, int64_t line, int64_t diagonal) {
  double total = 0.0;
  for_pairs(left, right, right_columns, rows, gram, line, left_columns, [&](int64_t column, const float* sums) {
    for (int64_t i = 0; i < left_columns; ++i) {
      const double* weights = gram + i * line + column;
      const int64_t below = std::min(right_columns, diagonal + i) - column;  // columns left of the diagonal
      double twice[16] = {}, once = 0.0;
      for (int64_t j = 0; j < std::min(kPairColumns, below); j += 16) {
        const float* from = sums_at(sums, i, j);
        if (below - j >= 16) {
          for (int k = 0; k < 16; ++k) twice[k] += from[k] * weights[j + k];
        } else {
          for (int64_t k = 0; k < below - j; ++k) once += 2 * (from[k] * weights[j + k]);
        }
      }
      if (below >= 0 && below < kPairColumns && column + below < right_columns)
        once += sums_at(sums, i, below)[below % 16] * weights[below];
      for (const double part : twice) once += 2 * part;
      total += once;
    }
  });
  return total;
}

}  // namespace tersor
#endif
