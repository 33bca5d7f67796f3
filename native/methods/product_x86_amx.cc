#if defined(__x86_64__) && defined(TERSOR_HAS_AMX)
#include <algorithm>

#include "base/simd/amx.h"
#include "base/simd/tile_product.h"
#include "methods/product_tiles.h"

namespace tersor {
namespace {

constexpr int64_t kParts = kFloatParts * kTile;  // of a chunk

// Up to 32 lines of 16 floats, `line` apart, as the parts of a tile of pairs.
inline void load_pairs(const float* from, int64_t line, int64_t columns, int64_t k, uint16_t* to) {
  for (int64_t i = 0; i < 32; i += 2) {
    const F x = i < k ? load_least(from + i * line, columns) : zero();
    const F y = i + 1 < k ? load_least(from + (i + 1) * line, columns) : zero();
    store_paired_parts<kFloatParts>(to + 16 * i, x, y);
  }
}

}  // namespace

// (row tiles, chunks, parts)
void load_left(const LeftFactor& a, int64_t rows, int64_t k, uint16_t* to) {
  alignas(64) uint16_t pairs[kParts];
  for (int64_t row = 0; row < (rows + 31) / 32 * 32; row += 16) {
    const int64_t some = rows - row;
    for (int64_t depth = 0; depth < k; depth += 32, to += kParts) {
      if (a.by_columns) {
        load_pairs(a.data + depth * a.line + row, a.line, some, k - depth, pairs);
        for (int part = 0; part < kFloatParts; ++part) transpose_pairs(pairs + part * kTile, to + part * kTile);
        continue;
      }
      for (int64_t i = 0; i < 16; ++i) {
        const float* x = a.data + (row + i) * a.line + depth;
        const int64_t left = i < some ? k - depth : 0;
        store_parts<kFloatParts>(to + 32 * i, load_least(x, left), load_least(x + 16, left - 16));
      }
    }
  }
}

// (pairs of panels of 16 columns, chunks, 2, parts)
void load_right(const float* b, int64_t line, int64_t columns, int64_t k, uint16_t* to) {
  for (int64_t column = 0; column < columns; column += 32) {
    for (int64_t depth = 0; depth < k; depth += 32) {
      for (int64_t panel = column; panel < column + 32; panel += 16, to += kParts)
        load_pairs(b + depth * line + panel, line, columns - panel, k - depth, to);
    }
  }
}

void multiply_tiles(const uint16_t* a, const uint16_t* b, int64_t rows, int64_t columns, int64_t k, float* out,
                    int64_t line, bool add) {
  [[maybe_unused]] const TilesInUse in_use;
  alignas(64) float sums[4 * 256];
  const int64_t chunks = (k + 31) / 32, row_tile = chunks * kParts;
  for (int64_t column = 0; column < columns; column += 32, b += 2 * row_tile) {
    for (int64_t row = 0; row < rows; row += 32) {
      multiply_block<2, 2, kFloatParts, kFloatParts>(a + row / 16 * row_tile, row_tile, b, chunks, true, sums);
      for (int64_t i = 0; i < std::min<int64_t>(32, rows - row); ++i) {
        for (int64_t j = 0; j < std::min<int64_t>(32, columns - column); j += 16) {
          float* to = out + (row + i) * line + column + j;
          const F sum = load(sums + i / 16 * 512 + j / 16 * 256 + i % 16 * 16);
          const int64_t left = columns - column - j;
          if (left >= 16)
            store(to, add ? tersor::add(load(to), sum) : sum);
          else
            store_n(to, add ? tersor::add(load_n(to, int(left)), sum) : sum, int(left));
        }
      }
    }
  }
}

}  // namespace tersor
#endif
