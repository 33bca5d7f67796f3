// Attention of many queries over a float16 cache by matrix tiles of bfloat16. Include after base/simd/amx.h and
// generic.h.
//
// Every factor is the sum of two bfloat16: float16 is exactly, and queries and weights up to 2^-15 of themselves. The
// product of the two smaller parts is left out, below 2^-16 of the whole. A pair is of dimensions, or keys, 16 apart.
#pragma once

#include "kernels/attention/generic.h"

namespace tersor::attention {
namespace {

// Sums T and T + 1 += x w, of both parts: x in tiles 4 and 5, w loaded from four tiles; or T only, from two. No product
// waits for the one before it.
template <int T>
inline void add_product(const uint16_t* w) {
  load_tile<6>(w);
  load_tile<7>(w + kTile);
  multiply_tiles_bf16<T, 4, 6>();
  multiply_tiles_bf16<T, 5, 6>();
  multiply_tiles_bf16<T, 4, 7>();
}
template <int T>
inline void add_two_products(const uint16_t* w) {
  load_tile<6>(w);
  load_tile<7>(w + 2 * kTile);
  multiply_tiles_bf16<T, 4, 6>();
  multiply_tiles_bf16<T + 1, 4, 7>();
  multiply_tiles_bf16<T, 5, 6>();
  multiply_tiles_bf16<T + 1, 5, 7>();
  load_tile<6>(w + kTile);
  load_tile<7>(w + 3 * kTile);
  multiply_tiles_bf16<T, 4, 6>();
  multiply_tiles_bf16<T + 1, 4, 7>();
}

// Sums 0 .. n - 1 += x w: x of `chunks` times both parts, w (chunks, n tiles and more, both parts).
inline void add_products(const uint16_t* x, const uint16_t* w, int64_t w_next, int chunks, int n) {
  for (int c = 0; c < chunks; ++c, x += 2 * kTile, w += w_next) {
    load_tile<4>(x);
    load_tile<5>(x + kTile);
    n > 1 ? add_two_products<0>(w) : add_product<0>(w);
    if (n > 2) n > 3 ? add_two_products<2>(w + 4 * kTile) : add_product<2>(w + 4 * kTile);
  }
}

inline void clear_sums() { clear_tile<0>(), clear_tile<1>(), clear_tile<2>(), clear_tile<3>(); }
inline void load_sums(const float* p, int64_t line, int n) {
  load_tile<0>(p, line);
  if (n > 1) load_tile<1>(p + 16, line);
  if (n > 2) load_tile<2>(p + 32, line);
  if (n > 3) load_tile<3>(p + 48, line);
}
inline void store_sums(float* p, int64_t line, int n) {
  store_tile<0>(p, line);
  if (n > 1) store_tile<1>(p + 16, line);
  if (n > 2) store_tile<2>(p + 32, line);
  if (n > 3) store_tile<3>(p + 48, line);
}

// (row tiles, chunks of 32 dimensions, both parts)
void load_query_tiles(const Queries& q, int head_dim, int width, uint16_t* to) {
  const int stride = query_floats(kFloat16, width), tiles = (q.rows + 15) / 16;
  for (int t = 0; t < tiles; ++t) {
    for (int d = 0; d < head_dim; d += 32, to += 2 * kTile) {
      for (int m = 0; m < 16; ++m) {
        const float* x = q.values + int64_t(16 * t + m) * stride + d;
        const int left = 16 * t + m < q.rows ? head_dim - d : 0;
        store_parted_pairs(to + 32 * m, load_least(x, left), load_least(x + 16, left - 16));
      }
    }
  }
}

// (chunks of 32 dimensions, panels of 16 keys, both parts)
void load_key_tiles(const uint16_t* keys, int head_dim, int panels, uint16_t* to) {
  for (int d = 0; d < head_dim; d += 32) {
    for (int p = 0; p < panels; ++p, to += 2 * kTile) {
      const uint16_t* k = keys + (int64_t(p) * head_dim + d) * 16;
      for (int i = 0; i < 16; ++i, k += 16) {
        const F x = d + i < head_dim ? load_f16(k) : zero(), y = d + i + 16 < head_dim ? load_f16(k + 256) : zero();
        store_parted_pairs(to + 32 * i, x, y);
      }
    }
  }
}

// (chunks of 32 keys, 16 dimensions each, both parts)
void load_value_tiles(const uint16_t* values, int width, int keys, uint16_t* to) {
  for (int key = 0; key < keys; key += 32) {
    for (int d = 0; d < width; d += 16, to += 2 * kTile) {
      const uint16_t *v = values + int64_t(key) * width + d, *later = v + 16 * width;
      for (int i = 0; i < 16; ++i, v += width, later += width) {
        const F x = key + i < keys ? load_f16(v) : zero(), y = key + i + 16 < keys ? load_f16(later) : zero();
        store_parted_pairs(to + 32 * i, x, y);
      }
    }
  }
}

// Softmax weights of rows [row, row + rows) as tiles, (chunks of 32 keys, both parts); `keys` of 16 are not 0.
void load_weight_tiles(const float* weights, int rows, Range keys, uint16_t* to) {
  for (int key = keys.begin / 32 * 32; key < keys.end; key += 32, to += 2 * kTile) {
    const bool first = key + 16 > keys.begin, second = key + 16 < keys.end;
    for (int m = 0; m < 16; ++m) {
      const float* w = weights + m * kKeys + key;
      store_parted_pairs(to + 32 * m, first && m < rows ? load(w) : zero(), second && m < rows ? load(w + 16) : zero());
    }
  }
}

void attend_tiles(const Head& head, const Queries& q, int64_t begin, int64_t end, const State& state, float* scratch) {
  [[maybe_unused]] const TilesInUse in_use;
  const int dim = head.head_dim, width = head.width, chunks = (dim + 31) / 32;
  float* scores = scratch;
  auto* key_tiles = (uint16_t*)(scores + kMaxRows * kKeys);
  uint16_t *value_tiles = key_tiles + 2 * kKeys * 32 * chunks, *query_tiles = value_tiles + 2 * kKeys * width;
  alignas(64) uint16_t weight_tiles[kKeys / 32 * 2 * kTile];
  load_query_tiles(q, dim, width, query_tiles);
  for (int64_t at = begin; at < end; at += kKeys) {
    const int count = least(kKeys, end - at), all = (count + 15) / 16;
    const int64_t held = at - head.first;
    Block b = {};
    b.at = at, b.keys = count;
    load_key_tiles((const uint16_t*)head.keys + held * dim, dim, all, key_tiles);
    load_value_tiles((const uint16_t*)head.values + held * width, width, count, value_tiles);
    for (int row = 0; row < q.rows; row += 16) {
      const int rows = least(16, q.rows - row);
      const Range range = seen(q, row, rows, b);
      if (range.begin >= range.end) continue;
      const int first = range.begin / 16, panels = (range.end + 15) / 16 - first;
      clear_sums();
      add_products(query_tiles + int64_t(row / 16) * chunks * 2 * kTile, key_tiles + first * 2 * kTile, all * 2 * kTile,
                   chunks, panels);
      float* own = scores + int64_t(row) * kKeys;
      store_sums(own + 16 * first, kKeys * 4, panels);
      soften_rows(q, row, rows, at + 16 * first, panels, own + 16 * first, kKeys, state, width);
      const Range keys = {16 * first, 16 * (first + panels)};
      load_weight_tiles(own, rows, keys, weight_tiles);
      const int skipped = keys.begin / 32, some = (keys.end + 31) / 32 - skipped;
      for (int d = 0; d < width; d += 64) {
        const int vectors = least(4, (width - d) / 16);
        float* out = state.out + int64_t(row) * width + d;
        load_sums(out, width * 4, vectors);
        add_products(weight_tiles, value_tiles + int64_t(skipped * width + d) / 16 * 2 * kTile, width / 16 * 2 * kTile,
                     some, vectors);
        store_sums(out, width * 4, vectors);
      }
    }
  }
}

}  // namespace
}  // namespace tersor::attention
