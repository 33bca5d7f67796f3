// Products of matrices whose factors lie as tiles of bfloat16, a float being the sum of up to three. Include after
// base/simd/amx.h.
#pragma once

namespace tersor {
namespace {

inline constexpr int kFloatParts = 3;  // bfloat16 that a float32 is the sum of
inline constexpr int kPanelsHeld = 2;  // panels of 16 columns whose tiles lie together

// Adds the chunks of a block to the sums of M row tiles and N panels: x (M tiles x_tile apart, chunks, X parts), w
// (chunks, 2, W parts), sums (2, 2) of 16 x 16. Of all products of parts those below 2^-24 of the whole are left
// out.
template <int M, int N, int X, int W>
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
  for (int64_t c = 0; c < chunks; ++c, x += X * kTile, w += kPanelsHeld * W * kTile) {
    for (int j = 0; j < W; ++j) {
      load_tile<6>(w + j * kTile);
      if constexpr (N > 1) load_tile<7>(w + (W + j) * kTile);
      for (int i = 0; i < X && i + j < kFloatParts; ++i) {
        load_tile<4>(x + i * kTile);
        multiply_tiles_bf16<0, 4, 6>();
        if constexpr (N > 1) multiply_tiles_bf16<1, 4, 7>();
        if constexpr (M > 1) load_tile<5>(x + x_tile + i * kTile);
        if constexpr (M > 1) multiply_tiles_bf16<2, 5, 6>();
        if constexpr (M > 1 && N > 1) multiply_tiles_bf16<3, 5, 7>();
      }
    }
  }
  store_tile<0>(sums);
  if constexpr (N > 1) store_tile<1>(sums + 256);
  if constexpr (M > 1) store_tile<2>(sums + 512);
  if constexpr (M > 1 && N > 1) store_tile<3>(sums + 768);
}

}  // namespace
}  // namespace tersor
