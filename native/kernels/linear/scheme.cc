#include "kernels/linear/scheme.h"

namespace tersor::linear {

std::optional<Scheme> find_scheme(const std::string& format, int64_t columns) {
  if (auto scheme = find_ggml_scheme(format, columns)) return scheme;
  return find_stream_scheme(format, columns);
}

void decode_row(const Scheme& s, const uint8_t* const* fields, int64_t columns, std::vector<uint8_t>& scratch,
                float* out) {
  const int64_t groups = (columns + s.group - 1) / s.group, code_space = (columns + 3) / 4 * 4;
  scratch.resize(code_space + groups * 8);
  auto* scale = reinterpret_cast<float*>(scratch.data() + code_space);
  const RowCodes row = {scratch.data(), scale, scale + groups};
  s.extract(s, fields, columns, row);
  for (int64_t i = 0; i < columns; ++i) {
    const int64_t g = i / s.group;
    const float code = s.code == kT4 ? s.table[row.codes[i]] : s.code == kS8 ? int8_t(row.codes[i]) : row.codes[i];
    if (s.second == kZero)
      out[i] = (code + s.offset - row.second[g]) * row.scale[g];
    else if (s.second == kMin)
      out[i] = (code + s.offset) * row.scale[g] + row.second[g];
    else
      out[i] = (code + s.offset) * row.scale[g];
  }
}

}  // namespace tersor::linear
