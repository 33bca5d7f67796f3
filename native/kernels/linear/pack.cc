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
  int64_t columns, groups;  // columns: padded
  std::vector<uint8_t> codes;
  std::vector<float> scale, second;

  PanelCodes(const Scheme& s, int64_t source_columns)
      : columns((source_columns + 31) / 32 * 32),
        groups(columns / s.group),
        codes(16 * columns),
        scale(16 * groups),
        second(16 * groups) {}

  RowCodes row(int i) { return {codes.data() + i * columns, scale.data() + i * groups, second.data() + i * groups}; }
  void clear_row(int i) {
    std::fill_n(codes.begin() + i * columns, columns, uint8_t(0));
    std::fill_n(scale.begin() + i * groups, groups, 0.0f);
    std::fill_n(second.begin() + i * groups, groups, 0.0f);
  }
};

// Takes a factor out of a row's scales so that float16 holds what is left, and returns it. One common scale becomes the
// factor. Else it is the power of two that brings the largest scale or minimum to [2^14, 2^15): scales that were
// float16 stay exact, and products of a scale and a sub-scale round to 2^-12 of themselves.
float normalize(const Scheme& s, const RowCodes& row, int64_t groups) {
  if (s.second != kMin && std::all_of(row.scale, row.scale + groups, [&](float x) { return x == row.scale[0]; })) {
    const float common = row.scale[0];
    std::fill_n(row.scale, groups, 1.0f);
    return common;
  }
  float largest = 0;
  for (int64_t g = 0; g < groups; ++g) {
    largest = std::max(largest, std::fabs(row.scale[g]));
    if (s.second == kMin) largest = std::max(largest, std::fabs(row.second[g]));
  }
  if (!(largest > 0) || !std::isfinite(largest)) return 1;
  // Within float32's normal numbers, both for the factor and for its inverse.
  const int exponent = std::clamp(std::ilogb(largest) - 14, -126, 126);
  for (int64_t g = 0; g < groups; ++g) {
    row.scale[g] = std::ldexp(row.scale[g], -exponent);
    if (s.second == kMin) row.second[g] = std::ldexp(row.second[g], -exponent);
  }
  return std::ldexp(1.0f, exponent);
}

uint32_t four(const uint8_t* p) {
  uint32_t x;
  memcpy(&x, p, 4);
  return x;
}

// Writes a panel in the order of kernels.h.
void interleave(const Scheme& s, const PanelCodes& p, uint8_t* out) {
  const bool nibbles = s.code == kU4 || s.code == kT4;
  for (int64_t g = 0; g < p.groups; ++g) {
    const int64_t first = g * s.group;
    for (int64_t k = first; k < first + s.group; k += nibbles ? 8 : 4) {
      for (int row = 0; row < 16; ++row, out += 4) {
        const uint8_t* codes = p.codes.data() + row * p.columns + k;
        const uint32_t word = nibbles ? four(codes) | four(codes + 4) << 4 : four(codes);
        memcpy(out, &word, 4);
      }
    }
    for (const std::vector<float>* values : {&p.scale, &p.second}) {
      if (values == &p.second && s.second == kNone) break;
      for (int row = 0; row < 16; ++row, out += 2) {
        const uint16_t h = f32_to_f16((*values)[row * p.groups + g]);
        memcpy(out, &h, 2);
      }
    }
  }
}

}  // namespace

Part pack_integers(const Scheme& s, const uint8_t* const* fields, int64_t rows, int64_t columns) {
  const int64_t panels = (rows + kPanelRows - 1) / kPanelRows, groups = (columns + 31) / 32 * 32 / s.group;
  const int64_t panel_bytes = groups * block_bytes(s.code, s.group, s.second);
  Part part{
      rows, columns, true, kF32, s.code, s.group, s.second, s.offset, s.table, panel_bytes, Bytes(panels * panel_bytes),
      {},   {}};
  part.scale.resize(panels * kPanelRows);
  parallel_for(panels, 1, [&](int64_t begin, int64_t end) {
    PanelCodes codes(s, columns);
    std::vector<const uint8_t*> at(s.fields.size());
    for (int64_t panel = begin; panel < end; ++panel) {
      for (int i = 0; i < kPanelRows; ++i) {
        const int64_t row = panel * kPanelRows + i;
        codes.clear_row(i);
        if (row >= rows) continue;
        for (size_t f = 0; f < at.size(); ++f)
          at[f] = fields[f] + (s.fields[f].shared ? 0 : row * s.fields[f].row_bytes);
        s.extract(s, at.data(), columns, codes.row(i));
        part.scale[row] = normalize(s, codes.row(i), (columns + s.group - 1) / s.group);
      }
      interleave(s, codes, part.panels.data() + panel * panel_bytes);
    }
  });
  return part;
}

Part pack_floats(Float type, const void* values, int64_t rows, int64_t columns) {
  const int64_t panels = (rows + kPanelRows - 1) / kPanelRows, size = float_bytes(type),
                panel_bytes = columns * kPanelRows * size;
  Part part{rows, columns, false, type, kU4, 0, kNone, 0, nullptr, panel_bytes, Bytes(panels * panel_bytes), {}, {}};
  part.scale.assign(panels * kPanelRows, 1.0f);
  parallel_for(panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      uint8_t* out = part.panels.data() + panel * panel_bytes;
      for (int i = 0; i < kPanelRows; ++i) {
        const int64_t row = panel * kPanelRows + i;
        const uint8_t* in = static_cast<const uint8_t*>(values) + row * columns * size;
        for (int64_t k = 0; k < columns; ++k) {
          if (row < rows)
            memcpy(out + (k * kPanelRows + i) * size, in + k * size, size);
          else
            memset(out + (k * kPanelRows + i) * size, 0, size);
        }
      }
    }
  });
  return part;
}

}  // namespace tersor::linear
