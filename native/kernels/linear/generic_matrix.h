// Products of many activation rows by matrix tiles of bfloat16 (MatrixKernels). Include after base/simd/amx.h.
//
// Both sides are rounded to bfloat16, 8 significant bits: each factor is off by at most 2^-8 of itself. Sums are
// float32, over k in ascending order. Column block by column block, pairs of panels are decoded into the first cache
// and multiplied by all rows; the sums wait in the second one.
#pragma once

#include "kernels/linear/generic_codes.h"
#include "kernels/linear/generic_finish.h"

namespace tersor::linear {
namespace {

inline constexpr int kTile = 512;  // values of a tile of bfloat16

// ---- Activations ----

void round_rows(const float* x, int64_t stride, int n, int64_t k, int64_t tile, int64_t tiles, uint16_t* to) {
  const int64_t chunks = (k + kChunk - 1) / kChunk;
  for (int64_t b = 0; b < matrix_blocks(chunks); ++b) {
    const MatrixBlock block = matrix_block(chunks, b);
    uint16_t* out = to + kTile * (block.first * tiles + tile * block.chunks);
    for (int64_t c = block.first; c < block.first + block.chunks; ++c, out += kTile) {
      const int64_t left = k - kChunk * c;
      for (int row = 0; row < kMatrixRows; ++row) {
        const float* values = x + row * stride + kChunk * c;
        F a = zero(), b = zero();
        if (row < n) {
          a = left >= 16 ? load(values) : load_n(values, int(left));
          b = left >= 32 ? load(values + 16) : left > 16 ? load_n(values + 16, int(left - 16)) : zero();
        }
        store_halves(out + 32 * row, to_bf16(a, b));
      }
    }
  }
}

// ---- Weights ----

// The codes of step I of a chunk as floats, column by column: w = scale * code + base.
template <Code kCode, int I, int kColumn>
inline F code_floats(const uint8_t* p, const F& table) {
  if constexpr (kCode == kU4 || kCode == kT4)
    return lookup_float(table, shifted_right<8 * kColumn + 4 * (I % 2)>(load_codes(p + 64 * (I / 2))));
  else
    return to_float(column_of<kColumn>(step_codes<kCode, I>(p, Table{})));
}

template <Code kCode, int I, int kEnd>
inline void decode_steps(const uint8_t* p, const F& table, const F& scale, const F& base, uint16_t* out) {
  if constexpr (I < kEnd) {
    const auto column = [&](auto floats) { return fma(floats, scale, base); };
    store_halves(out + 64 * I, paired(to_bf16(column(code_floats<kCode, I, 0>(p, table)),
                                              column(code_floats<kCode, I, 1>(p, table)))));
    store_halves(out + 64 * I + 32, paired(to_bf16(column(code_floats<kCode, I, 2>(p, table)),
                                                   column(code_floats<kCode, I, 3>(p, table)))));
    decode_steps<kCode, I + 1, kEnd>(p, table, scale, base, out);
  }
}

// Scales and what is added to scale * code, of every group of some columns, 16 rows each.
struct GroupScales {
  alignas(64) float scale[16 * 16], base[16 * 16];
};

// Chunks of one block of the layout, each to a tile; tiles are kTilesApart apart.
inline constexpr int kPanelsHeld = 2, kTilesApart = kPanelsHeld * kTile;

template <Code kCode>
void decode_chunks(const uint8_t* p, int64_t chunks, int group, const F& table, const GroupScales& s, uint16_t* out) {
  for (int64_t c = 0; c < chunks; ++c, p += 64 * code_bits(kCode), out += kTilesApart) {
    if (group == 16) {
      decode_steps<kCode, 0, 4>(p, table, load(s.scale + 32 * c), load(s.base + 32 * c), out);
      decode_steps<kCode, 4, 8>(p, table, load(s.scale + 32 * c + 16), load(s.base + 32 * c + 16), out);
    } else {
      const int64_t g = 16 * (c * kChunk / group);
      decode_steps<kCode, 0, 8>(p, table, load(s.scale + g), load(s.base + g), out);
    }
  }
}

using DecodeChunks = void (*)(const uint8_t* p, int64_t chunks, int group, const F& table, const GroupScales& s,
                              uint16_t* out);
const DecodeChunks kDecodeChunks[kCodes] = {decode_chunks<kU1>, decode_chunks<kU2>, decode_chunks<kU3>,
                                            decode_chunks<kU4>, decode_chunks<kU5>, decode_chunks<kU6>,
                                            decode_chunks<kS8>, decode_chunks<kT4>};

// What a code of 4 bits stands for, before scale and offset.
inline F code_table(const Layout& l, const int8_t* low_table) {
  float values[16];
  for (int i = 0; i < 16; ++i)
    values[i] = l.code == kT4 ? float(l.table[i]) + (low_table ? float(low_table[i]) / 128 : 0) : float(i);
  return load(values);
}

// Chunks [first, first + chunks) of a panel, first at the beginning of a block of the layout.
void decode_columns(const IntegerPanel& panel, const F& table, int64_t first, int64_t chunks, uint16_t* out) {
  const Layout& l = panel.layout;
  const F offset = set(float((l.second == kZero ? 0 : l.offset) - (l.code == kS8 ? kSignedBias : 0)));
  const uint8_t* p = panel.blocks + first / kBlockChunks * block_bytes(l, kBlockColumns);
  GroupScales s;
  for (int64_t done = 0; done < chunks; done += kBlockChunks) {
    const int64_t count = chunks - done < kBlockChunks ? chunks - done : kBlockChunks, columns = kChunk * count;
    const uint8_t* scales = p + code_bytes(l, columns);
    expand_scales(l, scales, columns, s.scale, s.base);
    for (int g = 0; g < group_count(l, columns); ++g) {
      const F shift = mul(offset, load(s.scale + 16 * g));
      store(s.base + 16 * g, has_second(l) ? add(shift, load(s.base + 16 * g)) : shift);
    }
    kDecodeChunks[l.code](p, count, l.group, table, s, out + kTilesApart * done);
    p = scales + scale_bytes(l, columns);
  }
}

// ---- Products ----

// Adds the chunks of a block to the sums of M row tiles and N panels: x (M tiles x_tile apart, chunks), w (chunks, 2),
// sums (2, 2) of 16 x 16.
template <int M, int N>
inline void multiply_block(const uint16_t* x, int64_t x_tile, const uint16_t* w, int64_t chunks, bool begin,
                           float* sums) {
  if (begin) {
    clear_tile<0>(), clear_tile<1>(), clear_tile<2>(), clear_tile<3>();
  } else {
    load_tile<0>(sums);
    if constexpr (N > 1) load_tile<1>(sums + 256);
    if constexpr (M > 1) load_tile<2>(sums + 512);
    if constexpr (M > 1 && N > 1) load_tile<3>(sums + 768);
  }
  for (int64_t c = 0; c < chunks; ++c, x += kTile, w += kTilesApart) {
    load_tile<4>(x);
    load_tile<6>(w);
    multiply_tiles_bf16<0, 4, 6>();
    if constexpr (N > 1) load_tile<7>(w + kTile);
    if constexpr (N > 1) multiply_tiles_bf16<1, 4, 7>();
    if constexpr (M > 1) load_tile<5>(x + x_tile);
    if constexpr (M > 1) multiply_tiles_bf16<2, 5, 6>();
    if constexpr (M > 1 && N > 1) multiply_tiles_bf16<3, 5, 7>();
  }
  store_tile<0>(sums);
  if constexpr (N > 1) store_tile<1>(sums + 256);
  if constexpr (M > 1) store_tile<2>(sums + 512);
  if constexpr (M > 1 && N > 1) store_tile<3>(sums + 768);
}

// Asks the outer cache for what is decoded next, a share at a time, while something else is computed: it is a few lines
// of each panel, too few for the CPU to foresee. There may be one panel, or none: asking for no memory does nothing.
class Ahead {
 public:
  Ahead(const IntegerPanel& first, int64_t panel_bytes, const MatrixBlock& block, int64_t shares)
      : at_(first.blocks + linear::panel_bytes(first.layout, kChunk * block.first)),
        panel_bytes_(panel_bytes),
        lines_(linear::panel_bytes(first.layout, kChunk * block.chunks) / 64 + 1),
        end_(lines_ * kPanelsHeld),
        share_((end_ + shares - 1) / shares) {}
  void next_share() {
    for (const int64_t end = done_ + share_ < end_ ? done_ + share_ : end_; done_ < end; ++done_)
      __builtin_prefetch(at_ + done_ / lines_ * panel_bytes_ + done_ % lines_ * 64, 0, 2);
  }

 private:
  const uint8_t* at_;
  int64_t panel_bytes_, lines_, end_, share_, done_ = 0;
};

// One or two panels, decoded, times all rows.
template <int N>
void multiply_rows(const MatrixRows& x, const MatrixBlock& block, const uint16_t* w, bool begin, float* sums,
                   Ahead& ahead) {
  const int64_t x_tile = kTile * block.chunks;
  const uint16_t* tiles = x.tiles + kTile * block.first * x.count;
  int64_t t = 0;
  for (; t + 2 <= x.count; t += 2, sums += 1024) {
    ahead.next_share();
    multiply_block<2, N>(tiles + t * x_tile, x_tile, w, block.chunks, begin, sums);
  }
  if (t < x.count) multiply_block<1, N>(tiles + t * x_tile, x_tile, w, block.chunks, begin, sums);
}

void matrix(const IntegerPanel& first, int64_t panel_bytes, int count, const int8_t* low_table, const MatrixRows& x,
            int64_t n, const Finish& finish, float* sums) {
  [[maybe_unused]] const TilesInUse in_use;
  alignas(64) uint16_t w[(2 * kBlockChunks - 1) * kTilesApart];
  const F table = code_table(first.layout, low_table);
  const int64_t blocks = matrix_blocks(first.chunks), row_pairs = (x.count + 1) / 2, pair_sums = 1024 * row_pairs;
  const auto panel = [&](int p) { return IntegerPanel{first.blocks + p * panel_bytes, first.chunks, first.layout}; };
  for (int64_t b = 0; b < blocks; ++b) {
    const MatrixBlock block = matrix_block(first.chunks, b);
    for (int p = 0; p < count; p += kPanelsHeld) {
      const int held = count - p < kPanelsHeld ? count - p : kPanelsHeld;
      for (int i = 0; i < held; ++i) decode_columns(panel(p + i), table, block.first, block.chunks, w + i * kTile);
      // What comes next: the next panels, the first ones of the next block, or those after these, if there are any.
      const int next = p + kPanelsHeld < count ? p + kPanelsHeld : b + 1 < blocks ? 0 : count;
      const MatrixBlock next_block = next > p && next < count ? block : matrix_block(first.chunks, (b + 1) % blocks);
      Ahead ahead(panel(next), panel_bytes, next_block, row_pairs);
      (held == 2 ? multiply_rows<2> : multiply_rows<1>)(x, block, w, b == 0, sums + p / kPanelsHeld * pair_sums, ahead);
    }
  }
  for (int64_t row = 0; row < n; ++row) {
    const float* from = sums + row / 32 * 1024 + row / 16 % 2 * 512 + row % 16 * 16;
    for (int p = 0; p < count; ++p)
      finish_row(load(from + p / kPanelsHeld * pair_sums + p % kPanelsHeld * 256), finish_of(finish, p), row);
  }
}

}  // namespace
}  // namespace tersor::linear
