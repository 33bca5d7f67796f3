#include "kernels/linear/pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/float16.h"
#include "base/threads.h"

namespace tersor::linear {
namespace {

// The 16 rows of a panel as integers, padded with zeros.
struct PanelCodes {
  const Scheme& scheme;
  int64_t columns;  // padded to chunks
  int64_t scales, groups;
  std::vector<uint8_t> codes, submin;
  std::vector<int8_t> sub;
  std::vector<float> scale, second, factor;

  PanelCodes(const Scheme& s, int64_t source_columns)
      : scheme(s),
        columns((source_columns + kChunk - 1) / kChunk * kChunk),
        scales(s.scales(columns)),
        groups(s.groups(columns)),
        codes(16 * columns),
        submin(16 * groups),
        sub(16 * groups),
        scale(16 * scales),
        second(16 * scales),
        factor(16) {}

  RowCodes row(int i) {
    return {codes.data() + i * columns, scale.data() + i * scales,  second.data() + i * scales,
            sub.data() + i * groups,    submin.data() + i * groups, factor.data() + i};
  }
  void clear_row(int i) {
    std::fill_n(codes.begin() + i * columns, columns, uint8_t(0));
    std::fill_n(scale.begin() + i * scales, scales, 0.0f);
    std::fill_n(second.begin() + i * scales, scales, 0.0f);
    std::fill_n(sub.begin() + i * groups, groups, int8_t(0));
    std::fill_n(submin.begin() + i * groups, groups, uint8_t(0));
    factor[i] = 1;
  }
};

// Takes a factor out of a row's scales so that float16 holds what is left, and returns it. One common scale becomes the
// factor. Else it is the power of two that brings the largest scale or minimum to [2^14, 2^15): what was float16 stays
// exact. Other scales stay: d and dmin of kSuper and kNibbles are float16 already, and kSingles holds all. The row's
// own factor is taken out first.
float normalize(const Layout& l, const RowCodes& row, int64_t scales) {
  if (l.scales != kHalves) return 1;
  const float own = *row.factor;
  for (int64_t g = 0; own != 1 && g < scales; ++g) row.scale[g] /= own;
  if (l.second != kMin && std::all_of(row.scale, row.scale + scales, [&](float x) { return x == row.scale[0]; })) {
    const float common = row.scale[0];
    std::fill_n(row.scale, scales, 1.0f);
    return common * own;
  }
  float largest = 0;
  for (int64_t g = 0; g < scales; ++g) {
    largest = std::max(largest, std::fabs(row.scale[g]));
    if (l.second == kMin) largest = std::max(largest, std::fabs(row.second[g]));
  }
  if (!(largest > 0) || !std::isfinite(largest)) return own;
  // Within float32's normal numbers, both for the factor and for its inverse.
  const int exponent = std::clamp(std::ilogb(largest) - 14, -126, 126);
  const float inverse = std::ldexp(1.0f, -exponent);
  for (int64_t g = 0; g < scales; ++g) {
    row.scale[g] *= inverse;
    if (l.second == kMin) row.second[g] *= inverse;
  }
  return std::ldexp(1.0f, exponent) * own;
}

uint32_t four(const uint8_t* p) {
  uint32_t x;
  memcpy(&x, p, 4);
  return x;
}

// One line of 64 bytes: of each row `steps` steps from its codes on, `bits` bits of every code from bit `from` on.
uint8_t* write_line(const uint8_t* codes, int64_t stride, int steps, int from, int bits, uint8_t* out) {
  const uint32_t mask = ((1u << bits) - 1) * 0x01010101u;
  for (int row = 0; row < 16; ++row, out += 4) {
    uint32_t word = 0;
    for (int s = 0; s < steps; ++s) word |= (four(codes + row * stride + 4 * s) >> from & mask) << (s * bits);
    memcpy(out, &word, 4);
  }
  return out;
}

// The planes of one chunk.
uint8_t* write_chunk(Code code, const uint8_t* codes, int64_t stride, uint8_t* out) {
  const auto lines = [&](int from, int bits) {
    const int steps = 8 / bits;
    for (int s = 0; s < 8; s += steps) out = write_line(codes + 4 * s, stride, steps, from, bits, out);
  };
  if (code == kU1) lines(1, 1);  // 0 or 2
  if (code == kU2 || code == kU3) lines(0, 2);
  if (code == kU3) lines(2, 1);
  if (code == kU4 || code == kT4 || code == kU5 || code == kU6) lines(0, 4);
  if (code == kU5) lines(4, 1);
  if (code == kU6) lines(4, 2);
  if (code == kS8) lines(0, 8);
  return out;
}

// f(row) of 16 rows as float16, or as float32.
template <typename F>
uint8_t* write_floats(bool single, F f, uint8_t* out) {
  for (int row = 0; row < 16; ++row) {
    const float x = f(row);
    const uint16_t h = f32_to_f16(x);
    memcpy(out, single ? (const void*)&x : &h, single ? 4 : 2);
    out += single ? 4 : 2;
  }
  return out;
}

// Writes a panel in the order of kernels.h.
void interleave(const PanelCodes& p, uint8_t* out) {
  const Layout& l = p.scheme.layout;
  for (int64_t first = 0; first < p.columns; first += kBlockColumns) {
    const int64_t columns = std::min<int64_t>(kBlockColumns, p.columns - first);
    for (int64_t k = first; k < first + columns; k += kChunk)
      out = write_chunk(l.code, p.codes.data() + k, p.columns, out);
    const int64_t group = first / l.group, end = group + group_count(l, columns), super = first / kBlockColumns;
    const auto floats = [&](const std::vector<float>& values, int64_t at) {
      out = write_floats(l.scales == kSingles, [&](int row) { return values[row * p.scales + at]; }, out);
    };
    const auto bytes = [&](auto f) {
      for (int64_t g = group; g < end; ++g) {
        for (int row = 0; row < 16; ++row) *out++ = uint8_t(f(row * p.groups + g, row, g));
      }
    };
    if (per_group(l.scales)) {
      for (int64_t g = group; g < end; ++g) floats(p.scale, g);
      if (l.second == kMin) {
        for (int64_t g = group; g < end; ++g) floats(p.second, g);
      } else if (l.second == kZero) {
        bytes([&](int64_t, int row, int64_t g) { return p.second[row * p.scales + g]; });
      }
      continue;
    }
    floats(p.scale, super);
    if (l.second == kMin) floats(p.second, super);
    if (l.scales == kNibbles) {
      bytes([&](int64_t at, int, int64_t) { return p.sub[at] | p.submin[at] << 4; });
    } else {
      bytes([&](int64_t at, int, int64_t) { return p.sub[at]; });
      if (l.second == kMin) bytes([&](int64_t at, int, int64_t) { return p.submin[at]; });
    }
  }
}

// Walks through the rows of sources.
struct RowWalk {
  const std::vector<Source>& sources;
  std::vector<int64_t> first;  // row of each source

  explicit RowWalk(const std::vector<Source>& s) : sources(s) {
    int64_t row = 0;
    for (const Source& source : s) {
      first.push_back(row);
      row += source.rows;
    }
    first.push_back(row);
  }
  int64_t rows() const { return first.back(); }
  // The source that holds a row, and its number in it.
  std::pair<const Source&, int64_t> find(int64_t row) const {
    const int64_t i = std::upper_bound(first.begin(), first.end(), row) - first.begin() - 1;
    return {sources[i], row - first[i]};
  }
};

}  // namespace

Part pack_integers(const Scheme& s, const std::vector<Source>& sources, int64_t columns) {
  const RowWalk walk(sources);
  const int64_t rows = walk.rows(), panels = (rows + kPanelRows - 1) / kPanelRows,
                size = panel_bytes(s.layout, (columns + kChunk - 1) / kChunk * kChunk);
  Part part{rows, columns, true, s.layout, s.low_table, kF32, size, Bytes(panels * size), {}};
  part.scale.assign(panels * kPanelRows, 0.0f);
  parallel_for(panels, 1, [&](int64_t begin, int64_t end) {
    PanelCodes codes(s, columns);
    std::vector<const uint8_t*> at(s.fields.size());
    for (int64_t panel = begin; panel < end; ++panel) {
      for (int i = 0; i < kPanelRows; ++i) {
        const int64_t row = panel * kPanelRows + i;
        codes.clear_row(i);
        if (row >= rows) continue;
        const auto [source, source_row] = walk.find(row);
        for (size_t f = 0; f < at.size(); ++f)
          at[f] = source.fields[f] + (s.fields[f].shared ? 0 : source_row * s.fields[f].row_bytes);
        s.extract(s, at.data(), columns, codes.row(i));
        part.scale[row] = normalize(s.layout, codes.row(i), s.scales(columns)) * s.unit;
      }
      interleave(codes, part.panels.data() + panel * size);
    }
  });
  if (part.low_table) {
    part.low_scale = part.scale;
    for (float& scale : part.low_scale) scale /= 128;
  }
  return part;
}

Part pack_floats(Float type, const std::vector<Source>& sources, int64_t columns, bool shared_scale) {
  const RowWalk walk(sources);
  const int64_t rows = walk.rows(), panels = (rows + kPanelRows - 1) / kPanelRows, size = float_bytes(type),
                panel_size = columns * kPanelRows * size;
  Part part{rows, columns, false, {}, nullptr, type, panel_size, Bytes(panels * panel_size), {}};
  part.scale.assign(panels * kPanelRows, 1.0f);
  parallel_for(panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      uint8_t* out = part.panels.data() + panel * panel_size;
      for (int i = 0; i < kPanelRows; ++i) {
        const int64_t row = panel * kPanelRows + i;
        if (row >= rows) {
          for (int64_t k = 0; k < columns; ++k) memset(out + (k * kPanelRows + i) * size, 0, size);
          continue;
        }
        const auto [source, source_row] = walk.find(row);
        const uint8_t* in = source.fields[0] + source_row * columns * size;
        if (type == kE4M3) {
          memcpy(&part.scale[row], source.fields[1] + (shared_scale ? 0 : 4 * source_row), 4);
          part.scale[row] *= 256;
        }
        for (int64_t k = 0; k < columns; ++k) memcpy(out + (k * kPanelRows + i) * size, in + k * size, size);
      }
    }
  });
  return part;
}

}  // namespace tersor::linear
