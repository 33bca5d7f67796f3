#include "formats/ggml.h"

#include <vector>

#include "base/threads.h"
#include "formats/ggml_decode.h"
#include "formats/ggml_extremes.h"
#include "formats/ggml_search.h"

namespace tersor {

template <typename Block, int kValues>
static void decode_blocks(const uint8_t* blocks, float* out, int64_t n_blocks) {
  const Block* b = reinterpret_cast<const Block*>(blocks);
  for (int64_t i = 0; i < n_blocks; ++i) decode_block(b[i], out + i * kValues);
}

template <typename Block, int kValues>
static void encode_blocks(const float* w, uint8_t* blocks, int64_t n_blocks) {
  Block* b = reinterpret_cast<Block*>(blocks);
  for (int64_t i = 0; i < n_blocks; ++i) encode_extremes(w + i * kValues, b[i]);
}

template <typename Block, int kValues>
static constexpr GgmlType by_extremes(const char* name, SearchType search) {
  return {name, kValues, sizeof(Block), decode_blocks<Block, kValues>, encode_blocks<Block, kValues>, search};
}

template <typename Block, int kValues>
static constexpr GgmlType by_search(const char* name, SearchType search) {
  return {name, kValues, sizeof(Block), decode_blocks<Block, kValues>, nullptr, search};
}

template <typename Block, int kValues>
static constexpr GgmlType decode_only(const char* name) {
  return {name, kValues, sizeof(Block), decode_blocks<Block, kValues>, nullptr, SearchType::kNone};
}

static constexpr GgmlType kTypes[] = {
    by_extremes<BlockQ4_0, 32>("q4_0", SearchType::kQ4_0),
    by_extremes<BlockQ4_1, 32>("q4_1", SearchType::kQ4_1),
    by_extremes<BlockQ5_0, 32>("q5_0", SearchType::kQ5_0),
    by_extremes<BlockQ5_1, 32>("q5_1", SearchType::kQ5_1),
    by_extremes<BlockQ8_0, 32>("q8_0", SearchType::kQ8_0),
    by_extremes<BlockTQ1_0, 256>("tq1_0", SearchType::kTQ1_0),
    by_extremes<BlockTQ2_0, 256>("tq2_0", SearchType::kTQ2_0),
    by_extremes<BlockMXFP4, 32>("mxfp4", SearchType::kMXFP4),
    by_search<BlockQ2_K, 256>("q2_k", SearchType::kQ2_K),
    by_search<BlockQ3_K, 256>("q3_k", SearchType::kQ3_K),
    by_search<BlockQ4_K, 256>("q4_k", SearchType::kQ4_K),
    by_search<BlockQ5_K, 256>("q5_k", SearchType::kQ5_K),
    by_search<BlockQ6_K, 256>("q6_k", SearchType::kQ6_K),
    by_search<BlockIQ4_NL, 32>("iq4_nl", SearchType::kIQ4_NL),
    by_search<BlockIQ4_XS, 256>("iq4_xs", SearchType::kIQ4_XS),
    decode_only<BlockIQ1_S, 256>("iq1_s"),
    decode_only<BlockIQ1_M, 256>("iq1_m"),
    decode_only<BlockIQ2_XXS, 256>("iq2_xxs"),
    decode_only<BlockIQ2_XS, 256>("iq2_xs"),
    decode_only<BlockIQ2_S, 256>("iq2_s"),
    decode_only<BlockIQ3_XXS, 256>("iq3_xxs"),
    decode_only<BlockIQ3_S, 256>("iq3_s"),
    decode_only<BlockNVFP4, 64>("nvfp4"),
    decode_only<BlockQ1_0, 128>("q1_0"),
    decode_only<BlockQ2_0, 64>("q2_0"),
};

const GgmlType* ggml_type(std::string_view name) {
  for (const GgmlType& type : kTypes)
    if (name == type.name) return &type;
  return nullptr;
}

void ggml_decode(const GgmlType& type, const uint8_t* blocks, float* out, int64_t rows, int64_t columns) {
  const int64_t n_blocks = rows * (columns / type.values);
  parallel_for(n_blocks, 4096 / type.values, [&](int64_t begin, int64_t end) {
    type.decode(blocks + begin * type.bytes, out + begin * type.values, end - begin);
  });
}

// importance / mean + 2^-20, so that columns of no importance still have a defined best; empty when all are 0.
static std::vector<float> normalized(const float* importance, int64_t columns) {
  double total = 0;
  for (int64_t i = 0; i < columns; ++i) total += static_cast<double>(importance[i]);
  if (!(total > 0)) return {};
  const double scale = static_cast<double>(columns) / total;
  std::vector<float> weights(static_cast<size_t>(columns));
  for (int64_t i = 0; i < columns; ++i)
    weights[i] = static_cast<float>(static_cast<double>(importance[i]) * scale + 0x1p-20);
  return weights;
}

void ggml_encode(const GgmlType& type, const float* w, const float* importance, uint8_t* blocks, int64_t rows,
                 int64_t columns) {
  const std::vector<float> weights = importance == nullptr ? std::vector<float>{} : normalized(importance, columns);
  const int64_t row_blocks = columns / type.values, row_bytes = row_blocks * type.bytes;
  if (weights.empty() && type.encode_extremes != nullptr) {
    parallel_for(rows * row_blocks, 4096 / type.values, [&](int64_t begin, int64_t end) {
      type.encode_extremes(w + begin * type.values, blocks + begin * type.bytes, end - begin);
    });
    return;
  }
  parallel_for(rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      search_row(type.search, w + row * columns, weights.empty() ? nullptr : weights.data(), blocks + row * row_bytes,
                 row_blocks);
  });
}

}  // namespace tersor
