#include "kernels/linear/scheme.h"

namespace tersor::linear {

RowCodes RowBuffer::row(const Scheme& scheme, int64_t columns) {
  codes_.resize((columns + 31) / 32 * 32);
  scale_.resize(scheme.scales(columns));
  second_.resize(scheme.scales(columns));
  sub_.resize(scheme.groups(columns));
  submin_.resize(scheme.groups(columns));
  return {codes_.data(), scale_.data(), second_.data(), sub_.data(), submin_.data(), &factor_};
}

std::optional<Scheme> find_scheme(const std::string& format, int64_t columns) {
  for (const auto find : {find_ggml_scheme, find_grid_scheme, find_lookup_scheme}) {
    if (auto scheme = find(format, columns)) return scheme;
  }
  return find_stream_scheme(format, columns);
}

void decode_row(const Scheme& s, const uint8_t* const* fields, int64_t columns, RowBuffer& buffer, float* out) {
  const Layout& l = s.layout;
  const RowCodes row = buffer.row(s, columns);
  s.extract(s, fields, columns, row);
  const auto offset = float(l.offset);
  for (int64_t first = 0; first < columns; first += l.group) {
    const int64_t g = first / l.group, super = first / kBlockColumns;
    const float scale = per_group(l.scales) ? row.scale[g] : row.scale[super] * float(row.sub[g]);
    const float second = l.second == kNone     ? 0.0f
                         : per_group(l.scales) ? row.second[g]
                                               : -(row.second[super] * float(row.submin[g]));
    for (int64_t i = first; i < columns && i < first + l.group; ++i) {
      if (s.values) {
        out[i] = s.values[row.codes[i]] * scale;
        continue;
      }
      const float code = l.code == kT4 ? l.table[row.codes[i]] : l.code == kS8 ? int8_t(row.codes[i]) : row.codes[i];
      if (l.second == kZero)
        out[i] = (code + offset - second) * scale;
      else if (l.second == kMin)
        out[i] = (code + offset) * scale + second;
      else
        out[i] = (code + offset) * scale * s.unit;
    }
  }
}

}  // namespace tersor::linear
