// Every ggml type that tersor knows: sizes, decoding, encoding.
#pragma once

#include <cstdint>
#include <string_view>

#include "formats/ggml_search.h"

namespace tersor {

// One ggml block type. name as in FORMATS; `values` numbers in `bytes` bytes.
struct GgmlType {
  const char* name;
  int values;
  int bytes;

  // Writes blocks * values numbers. Bit for bit what gguf-py's dequantize gives.
  void (*decode)(const uint8_t* blocks, float* out, int64_t n_blocks);

  // Encodes w without importance by ggml's own rule (scale from the extremes), byte for byte as gguf-py does.
  // Null for types whose only encoder is the search.
  void (*encode_extremes)(const float* w, uint8_t* blocks, int64_t n_blocks);

  // The search for the least squared error; kNone for types that are only decoded.
  SearchType search;
};

// The type of this name, or null.
const GgmlType* ggml_type(std::string_view name);

// Decodes rows of `columns` numbers, on all threads. columns must be a multiple of type.values.
void ggml_decode(const GgmlType& type, const uint8_t* blocks, float* out, int64_t rows, int64_t columns);

// Encodes rows of `columns` numbers, on all threads. importance: one weight >= 0 per column, or null. type.search must
// not be kNone.
void ggml_encode(const GgmlType& type, const float* w, const float* importance, uint8_t* blocks, int64_t rows,
                 int64_t columns);

}  // namespace tersor
