// Attention of some query rows to the keys of one key-value head: what every instruction set provides.
//
// The cache of a layer and key-value head; width = head_dim rounded up to a multiple of 16:
//   keys:   panels of 16 positions, [position / 16][head_dim][16], so that 16 scores are sums of whole vectors
//   values: [position][width], zero beyond head_dim
// As int8 both are codes in [-127, 127], in pairs for the integer dot products, with a float scale, absmax / 127, for
// every position and group of kKeyGroup or kValueGroup values. Queries and weights are rounded to int16 for them.
//   keys:   [position / 16][width / 2][16][2]
//   values: [position / 2][width][2]
//   scales: [position / 16][group][16]
// As int4 both are codes in [0, 15] with a float16 scale and minimum, (max - min) / 15 and min, for every position and
// 32 values; the first of a pair of codes is in the low half of a byte. Of keys it is the difference from the block's
// anchor: the first of 64 keys, in float16.
//   keys:   [position / 16][width / 2][16]    a byte is two dimensions
//   values: [position / 2][width]             a byte is two positions
//   scales: [position / 16][group][2][16]     float16: scales, then minima
//   anchors: [position / 64][width]           float16
#pragma once

#include <cstdint>

#include "base/kernel_tables.h"

namespace tersor::attention {

enum Type { kFloat32, kFloat16, kInt8, kInt4, kTypes };

constexpr int type_bits(Type type) { return type == kFloat32 ? 32 : type == kFloat16 ? 16 : type == kInt8 ? 8 : 4; }
constexpr int64_t bytes_of(Type type, int64_t values) { return values * type_bits(type) / 8; }
constexpr bool is_integer(Type type) { return type == kInt8 || type == kInt4; }

inline constexpr int kMaxRows = 96;    // query rows (queries x heads that share the keys) of one call
inline constexpr int kKeys = 64;       // keys at a time, a multiple of 16
inline constexpr int kMaxWidth = 512;  // largest head dimension
inline constexpr int kKeyGroup = 32;   // few, since keys have channels far larger than the others
// Of int8, what a register tile of values is wide; 4 bits need finer groups.
constexpr int value_group(Type type) { return type == kInt4 ? 32 : 64; }

constexpr int key_groups(int width) { return (width + kKeyGroup - 1) / kKeyGroup; }
constexpr int value_groups(Type type, int width) { return (width + value_group(type) - 1) / value_group(type); }

struct Head {
  void* keys;
  void* values;
  float* key_scales;  // of integers only, as the next; of int4 pairs of float16 in the same bytes
  float* value_scales;
  uint16_t* anchors;  // of int4 only
  int head_dim, width;
  int64_t first;   // the position that these point to
  int64_t wanted;  // positions before it will be read soon by the thread that reads the ones before them
};

// Rows of queries as `load_query` wrote them, scaled by log2(e) too, since powers of two are cheaper than of e; and the
// keys [first, end) that each may see, which do not decrease from row to row. A row takes query_floats(width): width
// floats, or for integers width int16 codes, and from float `width` on a scale for each key group; for int4 from float
// width / 2 on the sum of the codes of each, and after the scales the floats themselves.
struct Queries {
  int rows;
  const float* values;
  const int64_t* first;
  const int64_t* end;
  float softcap;  // 0: none
};

constexpr int query_floats(Type type, int width) { return (type == kInt4 ? 2 : 1) * width + key_groups(width); }

// The state of a softmax of rows: the largest score so far; sums of 2^(score - largest), (rows, 16), to be added; and
// the values weighted by the same, (rows, width).
struct State {
  float* largest;
  float* total;
  float* out;
};

inline constexpr float kLowest = -1e30f;  // the largest score of no keys
inline constexpr float kMasked = -2e30f;  // a score that is not seen; 2^(kMasked - kLowest) = 0

// Floats of working memory, which begins at a multiple of 64 bytes, as caches and states do.
constexpr int64_t scratch_floats(int head_dim, int width) {
  const int padded = (head_dim + 31) / 32 * 32;
  return int64_t(kKeys) * (kMaxRows + padded + width) + kMaxRows * padded;
}

inline constexpr int kManyQueries = 17;  // of one sequence: from here on attend_many

struct Kernels {
  // Adds keys [begin, end) to the state, which the caller began; begin is a multiple of kKeys.
  void (*attend[kTypes])(const Head& head, const Queries& q, int64_t begin, int64_t end, const State& state,
                         float* scratch);
  // The same for many queries, of which a tile may hold some only. Has other bits where products are of matrix tiles;
  // then it reads and writes `out` up to a multiple of 16 rows.
  void (*attend_many[kTypes])(const Head& head, const Queries& q, int64_t begin, int64_t end, const State& state,
                              float* scratch);
  // Writes a key (head_dim) and a value at a position of a head's cache, counted from head.first.
  void (*append[kTypes])(const float* key, const float* value, int64_t position, const Head& head);
  // Writes a query (head_dim) times factor as attend wants it.
  void (*load_query[kTypes])(const float* x, float factor, int head_dim, int width, float* to);
  // y (n) = x / sum of total (16)
  void (*finish)(const float* x, const float* total, int n, float* y);
  // x (n) = x * a + y * b, n a multiple of 16
  void (*blend)(float* x, float a, const float* y, float b, int n);
};

TERSOR_KERNEL_TABLES
TERSOR_TILE_KERNEL_TABLE

}  // namespace tersor::attention
