// How the rows of a stored tensor become integers and scales: what packing and embedding need to know of a format.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernels/linear/kernels.h"

namespace tersor::linear {

// The values of E2M1, doubled: of mxfp4 and both forms of NVFP4.
inline constexpr int8_t kE2m1Table[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// A field of a stored tensor, as bytes of one row; shared: the same bytes for all rows (per-tensor formats).
struct Field {
  std::string name;
  int64_t row_bytes;
  bool shared = false;
};

// The integers of one row. `codes`: columns values, as the layout's Code makes integers of them (kS8: two's complement;
// kT4: indices of the table). Scales of kHalves and kSingles: `scale` and `second`, one per group. Of the others:
// `scale` (d) and `second` (dmin), one per 256 columns, and `sub` and `submin`, one per group. `factor`: what all
// scales of the row have in common, so that float16 holds the rest of those of kHalves exactly; 1 unless there is such
// a one.
struct RowCodes {
  uint8_t* codes;
  float* scale;
  float* second;
  int8_t* sub;
  uint8_t* submin;
  float* factor;
};

// A format whose weights are small integers times a scale: w as in kernels.h (Second).
struct Scheme {
  Layout layout;
  // What all scales are multiplied by when packed.
  float unit = 1;
  // Of tables finer than 8 bits: entry i is (128 * table[i] + low_table[i]) * unit / 128, and values[i] before
  // rounding.
  const int8_t* low_table = nullptr;
  const float* values = nullptr;
  std::vector<Field> fields;

  // Reads one row; fields[i] points to the row's bytes of field i.
  void (*extract)(const Scheme& scheme, const uint8_t* const* fields, int64_t columns, const RowCodes& row);

  // Of bit-stream formats: bits of a stored code, and columns that share a stored scale.
  int bits = 0;
  int64_t source_group = 0;
  // Of ggml types: values and bytes of a block, and the function that reads one.
  int64_t block_values = 0, block_bytes = 0;
  void (*block)(const uint8_t* bytes, const RowCodes& codes) = nullptr;

  // How many numbers `scale` and `sub` of a row have.
  int64_t scales(int64_t columns) const {
    const int64_t each = per_group(layout.scales) ? layout.group : kBlockColumns;
    return (columns + each - 1) / each;
  }
  int64_t groups(int64_t columns) const { return (columns + layout.group - 1) / layout.group; }
};

// Memory for the RowCodes of one row after the other.
class RowBuffer {
 public:
  RowCodes row(const Scheme& scheme, int64_t columns);

 private:
  std::vector<uint8_t> codes_, submin_;
  std::vector<int8_t> sub_;
  std::vector<float> scale_, second_;
  float factor_ = 1;
};

// The scheme of a format for rows of this many columns, or nothing when the format has none (it is then decoded to
// floats).
std::optional<Scheme> find_scheme(const std::string& format, int64_t columns);
std::optional<Scheme> find_ggml_scheme(const std::string& format, int64_t columns);    // scheme_ggml.cc
std::optional<Scheme> find_grid_scheme(const std::string& format, int64_t columns);    // scheme_grid.cc
std::optional<Scheme> find_lookup_scheme(const std::string& format, int64_t columns);  // scheme_lookup.cc
std::optional<Scheme> find_stream_scheme(const std::string& format, int64_t columns);  // scheme_stream.cc

// Decodes one row to float32, in the order of operations of kernels.h.
void decode_row(const Scheme& scheme, const uint8_t* const* fields, int64_t columns, RowBuffer& buffer, float* out);

}  // namespace tersor::linear
