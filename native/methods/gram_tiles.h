// The parts of add_gram (gram.cc) that are compiled for AMX. Columns go in pairs of panels of 16.
#pragma once

#include <cstdint>

namespace tersor {

inline constexpr int64_t kPairColumns = 32;

inline constexpr int kGramParts = 3;  // bfloat16 that a float is the sum of

// bfloat16 of a pair as tiles, for either side of a product: two panels, chunks of 32 rows, parts.
constexpr int64_t pair_size(int64_t rows) { return 2 * ((rows + 31) / 32) * kGramParts * 512; }

// Writes a pair for both sides, x being its first column in the first row; columns and rows that miss are 0.
void load_pair(const float* x, int64_t line, int64_t columns, int64_t rows, uint16_t* left, uint16_t* right);

// Adds the products of a pair, `left_columns` of it, with some pairs to gram, `line` apart: of these all but what is
// beyond `right_columns`.
void add_pairs(const uint16_t* left, const uint16_t* right, int64_t left_columns, int64_t right_columns, int64_t rows,
               double* gram, int64_t line);

// Returns the sum over the same products, each times its place in gram: once on the diagonal, which row i reaches at
// column `diagonal` + i, twice before it.
double weigh_pairs(const uint16_t* left, const uint16_t* right, int64_t left_columns, int64_t right_columns,
                   int64_t rows, const double* gram, int64_t line, int64_t diagonal);

}  // namespace tersor
