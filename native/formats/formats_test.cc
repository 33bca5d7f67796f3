// The number formats: the encoders write the same bytes on every CPU, and what was written is read back. That the
// layouts are those of other programs is tested in tests/conformance.
#include <algorithm>
#include <cmath>

#include "formats/affine.h"
#include "formats/affine_bits.h"
#include "formats/ggml.h"
#include "formats/lookup.h"
#include "kernels/kernel_test.h"

namespace tersor::test {
namespace {

uint64_t hash = 0xcbf29ce484222325;  // FNV-1a (Fowler, Noll, Vo), 64 bits

void add_to_hash(const std::vector<uint8_t>& bytes) {
  for (uint8_t b : bytes) hash = (hash ^ b) * 0x100000001b3;
}

// Value i is bits [i * bits, (i + 1) * bits) of the row, least significant first.
void test_bits(int bits) {
  Random random{uint32_t(bits)};
  for (int64_t n = 1; n <= 40; ++n) {
    std::vector<uint8_t> codes(n), packed(packed_bytes(n, bits), 0xff), want(packed.size()), back(n);
    for (uint8_t& c : codes) c = uint8_t(random.below(1 << bits));
    for (int64_t k = 0; k < n * bits; ++k) want[k / 8] |= uint8_t((codes[k / bits] >> (k % bits) & 1) << (k % 8));
    pack_row(codes.data(), n, bits, packed.data());
    unpack_row(packed.data(), n, bits, back.data());
    check(packed == want, "pack_row");
    check(back == codes, "unpack_row");
  }
}

// The searched grid of a group, then its codes; a decoded matrix encodes to the codes that it came from.
void test_affine(AffineKind kind, int bits, bool search, bool weighted, bool single) {
  Random random{uint32_t(bits)};
  const int64_t rows = 40, groups = 3, n = 37 + bits, columns = groups * n;
  const int max_code = (1 << bits) - 1;
  const std::vector<float> w = random.bells(rows * columns, 0.02f);
  std::vector<float> importance = random.bells(n), scale(rows * groups), offset(rows * groups);
  for (float& x : importance) x *= x;
  AffineMatrix matrix{rows, columns, groups, kind == AffineKind::kMinimum, bits, max_code, {}, {}};
  matrix.scale = {scale.data(), groups, 1};
  matrix.offset = {offset.data(), groups, 1};
  const int64_t row_bytes = packed_bytes(columns, bits);
  const std::vector<uint8_t> bytes = expect_same_bytes("affine encode", [&] {
    for (int64_t i = 0; i < rows * groups; ++i) {
      const AffineGrid grid =
          affine_fit({&w[i * n], weighted ? importance.data() : nullptr, 1, n, single}, kind, max_code, search);
      scale[i] = grid.scale;
      offset[i] = grid.offset;
    }
    std::vector<uint8_t> packed(rows * row_bytes);
    affine_encode(matrix, w.data(), packed.data());
    return packed;
  });
  add_to_hash(bytes);
  std::vector<float> decoded(w.size());
  affine_decode(matrix, bytes.data(), decoded.data());
  std::vector<uint8_t> again(bytes.size());
  affine_encode(matrix, decoded.data(), again.data());
  check(again == bytes, "affine encode of decoded weights");
  for (int64_t i = 0; i < rows * columns; ++i) {
    const double step = std::fabs(double(scale[i / n]));
    // Without a search the grid spans the group but for the rounding of its parameters: at most half a step off, one
    // at the top of a symmetric grid, which has a level less there.
    const double most = (kind == AffineKind::kSymmetric ? 1.01 : 0.51 + max_code * 0x1p-11) * step;
    check(search || std::fabs(double(decoded[i]) - double(w[i])) <= most, "affine decode is far off");
  }
}

void test_ggml(const char* name, bool weighted) {
  const GgmlType* type = ggml_type(name);
  check(type != nullptr, std::string(name) + " is missing");
  if (type == nullptr) return;
  Random random{uint32_t(type->bytes)};
  const int64_t rows = 3, columns = 3 * type->values, row_bytes = 3 * type->bytes;
  const std::vector<float> w = random.bells(rows * columns, 0.02f);
  std::vector<float> importance = random.bells(columns);
  for (float& x : importance) x *= x;
  std::vector<uint8_t> bytes;
  if (type->search != SearchType::kNone) {
    bytes = expect_same_bytes(std::string(name) + " encode", [&] {
      std::vector<uint8_t> blocks(rows * row_bytes);
      ggml_encode(*type, w.data(), weighted ? importance.data() : nullptr, blocks.data(), rows, columns);
      return blocks;
    });
    add_to_hash(bytes);
  } else {
    bytes = random.bytes(rows * row_bytes);
  }
  const std::vector<uint8_t> decoded = expect_same_bytes(std::string(name) + " decode", [&] {
    std::vector<float> out(rows * columns);
    ggml_decode(*type, bytes.data(), out.data(), rows, columns);
    const auto* first = reinterpret_cast<const uint8_t*>(out.data());
    return std::vector<uint8_t>(first, first + 4 * out.size());
  });
  if (type->search != SearchType::kNone) add_to_hash(decoded);  // random bytes may hold NaN, whose bits CPUs choose
}

// Sixteen levels and the bounds midway between them; codes are a permutation of the levels.
void test_lookup(int64_t block) {
  Random random{uint32_t(block)};
  const int64_t blocks = 600;
  float level[16], table[16];
  LookupEncoder encoder;
  for (int i = 0; i < 16; ++i) level[i] = float(i * i * (i < 8 ? -1 : 1) - 40) / 200;
  std::sort(level, level + 16);
  for (int i = 0; i < 15; ++i) encoder.bounds[i] = (level[i] + level[i + 1]) / 2;
  for (int i = 0; i < 16; ++i) {
    encoder.code_of_level[i] = uint8_t(i * 7 % 16);
    table[i * 7 % 16] = level[i];
  }
  const std::vector<float> w = random.bells(blocks * block);
  std::vector<float> absmax(blocks);
  for (int64_t i = 0; i < blocks * block; ++i) absmax[i / block] = std::max(absmax[i / block], std::fabs(w[i]));
  const std::vector<uint8_t> codes = expect_same_bytes("lookup encode", [&] {
    std::vector<uint8_t> out(blocks * block / 2);
    lookup_encode(w.data(), blocks, block, absmax.data(), encoder, out.data());
    return out;
  });
  add_to_hash(codes);
  std::vector<float> decoded(w.size());
  lookup_decode(codes.data(), blocks, block, absmax.data(), table, decoded.data());
  for (int64_t i = 0; i < blocks * block; ++i) {
    const float most = absmax[i / block];
    float least = INFINITY;
    for (float t : level) least = std::min(least, std::fabs(t * most - w[i]));
    // Near a bound either neighbour is the nearest but for rounding.
    check(std::fabs(decoded[i] - w[i]) <= least + 4 * float(kRounding) * most,
          "lookup decode is not the nearest level");
  }
}

}  // namespace

uint64_t encoder_bytes() { return hash; }

void test_formats() {
  for (int bits = 1; bits <= 8; ++bits) {
    test_bits(bits);
    for (auto kind : {AffineKind::kAsymmetric, AffineKind::kSymmetric, AffineKind::kMinimum}) {
      for (const bool single : {false, true}) {
        test_affine(kind, bits, false, false, single);
        test_affine(kind, bits, true, false, single);
        test_affine(kind, bits, true, true, single);
      }
    }
  }
  for (const char* name : {"q4_0",   "q4_1",  "q5_0",    "q5_1",  "q8_0",   "tq1_0",  "tq2_0", "mxfp4", "q2_k",
                           "q3_k",   "q4_k",  "q5_k",    "q6_k",  "iq4_nl", "iq4_xs", "iq1_s", "iq1_m", "iq2_xxs",
                           "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "nvfp4",  "q1_0",   "q2_0"}) {
    test_ggml(name, false);
    test_ggml(name, true);
  }
  for (int64_t block : {2, 64, 70}) test_lookup(block);
}

}  // namespace tersor::test
