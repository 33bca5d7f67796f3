// A block of a product by tiles (product.cc), the part that is compiled for AMX.
#pragma once

#include "methods/product.h"

namespace tersor {

// bfloat16 of a block's factor as tiles: rows, or columns, in pairs of 16, times k in chunks of 32, times three parts.
constexpr int64_t tiles_size(int64_t lines, int64_t k) { return (lines + 31) / 32 * 2 * ((k + 31) / 32) * 3 * 512; }

void load_left(const LeftFactor& a, int64_t rows, int64_t k, uint16_t* to);
void load_right(const float* b, int64_t line, int64_t columns, int64_t k, uint16_t* to);
void multiply_tiles(const uint16_t* a, const uint16_t* b, int64_t rows, int64_t columns, int64_t k, float* out,
                    int64_t line, bool add);

}  // namespace tersor
