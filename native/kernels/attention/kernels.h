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
#pragma once

#include <cstdint>

#include "base/kernel_tables.h"

namespace tersor::attention {

enum Type { kFloat32, kFloat16, kInt8, kTypes };

constexpr int type_bytes(Type type) { return type == kFloat32 ? 4 : type == kFloat16 ? 2 : 1; }

inline constexpr int kMaxRows = 96;     // query rows (queries x heads that share the keys) of one call
inline constexpr int kKeys = 64;        // keys at a time, a multiple of 16
inline constexpr int kMaxWidth = 512;   // largest head dimension
inline constexpr int kKeyGroup = 32;    // few, since keys have channels far larger than the others
inline constexpr int kValueGroup = 64;  // what a register tile of values is wide

constexpr int key_groups(int width) { return (width + kKeyGroup - 1) / kKeyGroup; }
constexpr int value_groups(int width) { return (width + kValueGroup - 1) / kValueGroup; }

struct Head {
  void* keys;
  void* values;
  float* key_scales;  // of int8 only, as the next
  float* value_scales;
  int head_dim, width;
  int64_t first;  // the position that these point to
};

// Rows of queries as `load_query` wrote them, scaled by log2(e) too, since powers of two are cheaper than of e; and the
// keys [first, end) that each may see, which do not decrease from row to row. A row takes query_floats(width): width
// floats, or for int8 width int16 codes, and from float `width` on a scale for each key group.
struct Queries {
  int rows;
  const float* values;
  const int64_t* first;
  const int64_t* end;
  float softcap;  // 0: none
};

constexpr int query_floats(int width) { return width + key_groups(width); }

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
constexpr int64_t scratch_floats(int head_dim, int width) { return int64_t(kKeys) * (kMaxRows + head_dim + width); }

struct Kernels {
  // Adds keys [begin, end) to the state, which the caller began; begin is a multiple of kKeys.
  void (*attend[kTypes])(const Head& head, const Queries& q, int64_t begin, int64_t end, const State& state,
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

}  // namespace tersor::attention
