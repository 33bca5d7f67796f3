// Codes and scales of a panel, out of their bit planes. Include after a header of base/simd/; see kernels.h.
#pragma once

#include "kernels/linear/kernels.h"

namespace tersor::linear {
namespace {

// Bytes of a code in an open panel, and of an activation that it is multiplied by.
template <int kClass>
inline constexpr int kOpenBytes = kClass == 2 ? kSignedBytes : 1;

// Step I of a chunk whose codes are unsigned, from its bit planes at p.
template <Code kCode, int I>
inline Codes unsigned_step(const uint8_t* p) {
  if constexpr (kCode == kU1) {
    return bits_of<I - 1>(load_codes(p), 2);  // the bit as 0 or 2
  } else if constexpr (kCode == kU2) {
    return bits_of<I % 4 * 2>(load_codes(p + 64 * (I / 4)), 3);
  } else if constexpr (kCode == kU3) {
    return join(unsigned_step<kU2, I>(p), bits_of<I - 2>(load_codes(p + 128), 4));
  } else if constexpr (kCode == kU4) {
    return bits_of<I % 2 * 4>(load_codes(p + 64 * (I / 2)), 15);
  } else if constexpr (kCode == kU5) {
    return join(unsigned_step<kU4, I>(p), bits_of<I - 4>(load_codes(p + 256), 16));
  } else {
    static_assert(kCode == kU6);
    return join(unsigned_step<kU4, I>(p), bits_of<I % 4 * 2 - 4>(load_codes(p + 256 + 64 * (I / 4)), 48));
  }
}

// Step I of a chunk whose codes are signed bytes.
template <Code kCode, int I>
inline Signed signed_step(const uint8_t* p, const Table& table) {
  if constexpr (kCode == kS8)
    return load_signed(p + 64 * I);
  else
    return lookup(table, unsigned_step<kU4, I>(p));
}

// 16 scales or minima as a layout of kHalves or kSingles has them, group g of those at p.
template <Scales kScales>
inline F load_floats(const uint8_t* p, int64_t g) {
  if constexpr (kScales == kSingles)
    return load((const float*)(p + 64 * g));
  else
    return load_f16((const uint16_t*)(p + 32 * g));
}

template <Scales kScales>
inline void expand_groups(const Layout& l, const uint8_t* p, int groups, float* scale, float* second) {
  const uint8_t* seconds = p + (kScales == kSingles ? 64 : 32) * groups;
  for (int g = 0; g < groups; ++g) {
    const F s = load_floats<kScales>(p, g);
    store(scale + 16 * g, s);
    if (l.second == kMin) store(second + 16 * g, load_floats<kScales>(seconds, g));
    if (l.second == kZero)
      store(second + 16 * g, mul(s, sub(set(float(l.offset)), to_float(widen_u8(seconds + 16 * g)))));
  }
}

// The scale and the second number of every group of a block's columns, 16 rows each: scale[16 * group + row].
inline void expand_scales(const Layout& l, const uint8_t* p, int64_t columns, float* scale, float* second) {
  const int groups = group_count(l, columns);
  if (l.scales == kHalves) return expand_groups<kHalves>(l, p, groups, scale, second);
  if (l.scales == kSingles) return expand_groups<kSingles>(l, p, groups, scale, second);
  const F d = load_f16((const uint16_t*)p);
  if (l.scales == kSuper && l.second == kNone) {
    for (int g = 0; g < groups; ++g)
      store(scale + 16 * g, mul(d, to_float(widen_i8((const int8_t*)(p + 32 + 16 * g)))));
    return;
  }
  const F dmin = sub(zero(), load_f16((const uint16_t*)(p + 32)));
  p += 64;
  for (int g = 0; g < groups; ++g) {
    const bool nibbles = l.scales == kNibbles;
    const I sub_scale = nibbles ? widen_low(p + 16 * g) : widen_i8((const int8_t*)(p + 16 * g));
    const I sub_minimum = nibbles ? widen_high(p + 16 * g) : widen_u8(p + 16 * (groups + g));
    store(scale + 16 * g, mul(d, to_float(sub_scale)));
    store(second + 16 * g, mul(dmin, to_float(sub_minimum)));
  }
}

// Codes of step I, signed or not, as the code is.
template <Code kCode, int I>
inline auto step_codes(const uint8_t* p, const Table& table) {
  if constexpr (code_class(kCode) == 2)
    return signed_step<kCode, I>(p, table);
  else
    return unsigned_step<kCode, I>(p);
}

template <Code kCode, int I = 0>
inline void open_chunk(const uint8_t* p, const Table& table, uint8_t* out) {
  const auto codes = step_codes<kCode, I>(p, table);
  constexpr int kNext = I + kStepColumns / 4;
  if constexpr (kStepColumns == 8)
    store_joined(out + 64 * I, codes, step_codes<kCode, I + 1>(p, table));
  else if constexpr (code_class(kCode) == 2)
    store_opened(out + 64 * kSignedBytes * I, codes);
  else
    store_codes(out + 64 * I, codes);
  if constexpr (kNext < 8) open_chunk<kCode, kNext>(p, table, out);
}

template <Code kCode>
void open_codes(const uint8_t* p, int64_t chunks, const Table& table, uint8_t* out) {
  constexpr int kBytes = kOpenBytes<code_class(kCode)>;
  for (int64_t c = 0; c < chunks; ++c) open_chunk<kCode>(p + 64 * code_bits(kCode) * c, table, out + 512 * kBytes * c);
}

using OpenCodes = void (*)(const uint8_t* p, int64_t chunks, const Table& table, uint8_t* out);
const OpenCodes kOpenCodes[kCodes] = {open_codes<kU1>, open_codes<kU2>, open_codes<kU3>, open_codes<kU4>,
                                      open_codes<kU5>, open_codes<kU6>, open_codes<kS8>, open_codes<kT4>};

inline Table table_of(const Layout& l) { return l.code == kT4 ? load_table(l.table) : Table{}; }

void open(const IntegerPanel& panel, const OpenPanel& out) {
  const Layout& l = panel.layout;
  const Table table = table_of(l);
  const uint8_t* p = panel.blocks;
  alignas(64) float scale[16 * 16], second[16 * 16];  // of a block's groups
  const int parts = l.group == 16 ? 2 : 1;            // scales of a chunk
  const int bytes = code_class(l.code) == 2 ? kSignedBytes : 1;
  for (int64_t first = 0; first < panel.chunks; first += kBlockChunks) {
    const int64_t chunks = panel.chunks - first < kBlockChunks ? panel.chunks - first : kBlockChunks;
    kOpenCodes[l.code](p, chunks, table, out.codes + 512 * bytes * first);
    p += code_bytes(l, 32 * chunks);
    expand_scales(l, p, 32 * chunks, scale, second);
    p += scale_bytes(l, 32 * chunks);
    for (int64_t i = 0; i < chunks * parts; ++i) {
      const int64_t group = l.group == 16 ? i : i * 32 / l.group, at = 16 * (first * parts + i);
      store(out.scale + at, load(scale + 16 * group));
      if (has_second(l)) store(out.second + at, load(second + 16 * group));
    }
  }
}

}  // namespace
}  // namespace tersor::linear
