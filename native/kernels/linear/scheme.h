// How the rows of a stored tensor become integers and scales: what packing and embedding need to know of a format.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernels/linear/kernels.h"

namespace tersor::linear {

// A field of a stored tensor, as bytes of one row; shared: the same bytes for all rows (per-tensor formats).
struct Field {
  std::string name;
  int64_t row_bytes;
  bool shared = false;
};

// The integers of one row. `codes`: columns values, stored as the scheme's Code (kS8: two's complement). `scale` and
// `second`: one per group of Scheme::group columns.
struct RowCodes {
  uint8_t* codes;
  float* scale;
  float* second;
};

// A format whose weights are small integers times a scale: w as in kernels.h (Second).
struct Scheme {
  Code code;
  int group;  // 16 or 32: columns that share a scale for the kernel
  Second second;
  float offset;
  const int8_t* table;  // of kT4
  std::vector<Field> fields;

  // Reads one row; fields[i] points to the row's bytes of field i.
  void (*extract)(const Scheme& scheme, const uint8_t* const* fields, int64_t columns, const RowCodes& row);

  // Of bit-stream formats: bits of a stored code, and columns that share a stored scale.
  int bits = 0;
  int64_t source_group = 0;
  // Of ggml types: values and bytes of a block, and the function that reads one.
  int64_t block_values = 0, block_bytes = 0;
  void (*block)(const uint8_t* bytes, const RowCodes& codes) = nullptr;
};

// The scheme of a format for rows of this many columns, or nothing when the format has none (it is then decoded to
// floats).
std::optional<Scheme> find_scheme(const std::string& format, int64_t columns);
std::optional<Scheme> find_ggml_scheme(const std::string& format, int64_t columns);    // scheme_ggml.cc
std::optional<Scheme> find_stream_scheme(const std::string& format, int64_t columns);  // scheme_stream.cc

// Decodes one row to float32, in the order of operations of kernels.h. Grows scratch.
void decode_row(const Scheme& scheme, const uint8_t* const* fields, int64_t columns, std::vector<uint8_t>& scratch,
                float* out);

}  // namespace tersor::linear
