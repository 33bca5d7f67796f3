// Through the public functions only: any layout of the packed weights and any kernel may lie behind them.
#include "kernels/linear/linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

#include "base/cpu.h"
#include "base/threads.h"
#include "formats/affine_bits.h"
#include "formats/ggml.h"
#include "kernels/kernel_test.h"
#include "kernels/linear/pack.h"
#include "kernels/linear/scheme.h"

namespace tersor::test {
namespace {

// A stored matrix, what it decodes to, and by what magnitudes a kernel may compute it: the kernel's terms are
// scale * code * x, scale * offset * x and second * x, which may cancel.
struct Matrix {
  std::string format;
  int64_t rows, columns;
  std::vector<std::vector<uint8_t>> fields;
  std::vector<float> w, magnitude;
  bool integer;
  bool coarse = false;  // codes of so few bits that few activations get 15

  linear::Source source() const {
    linear::Source s{{}, rows};
    for (const auto& f : fields) s.fields.push_back(f.data());
    return s;
  }
};

void put_half(std::vector<uint8_t>& bytes, int64_t at, float x) {
  const uint16_t h = f32_to_f16(x);
  memcpy(&bytes[at], &h, 2);
}

// Puts x, rounded to float16 unless it is stored in `size` = 4 bytes, and returns what is stored.
float put_float(std::vector<uint8_t>& bytes, int64_t i, float x, int64_t size) {
  if (size == 2) x = f16_to_f32(f32_to_f16(x)), put_half(bytes, 2 * i, x);
  if (size == 4) memcpy(&bytes[4 * i], &x, 4);
  return x;
}

// ---- Matrices of each kind ----

// Random weights encoded; random codes below a sensible scale where there is no encoder.
Matrix ggml_matrix(const std::string& format, int64_t rows, int64_t columns) {
  const GgmlType& type = *ggml_type(format);
  Random random{uint32_t(rows * 1000 + columns)};
  const int64_t blocks = columns / type.values, row_bytes = blocks * type.bytes;
  std::vector<uint8_t> bytes(rows * row_bytes);
  if (type.search != SearchType::kNone) {
    const std::vector<float> w = random.bells(rows * columns, 0.05f);
    ggml_encode(type, w.data(), nullptr, bytes.data(), rows, columns);
  } else {
    bytes = random.bytes(int64_t(bytes.size()));
    for (int64_t i = 0; i < rows * blocks; ++i) {
      if (format == "nvfp4")  // four scales of exponent <= 7, UE4M3
        for (int g = 0; g < 4; ++g) bytes[i * type.bytes + g] &= 0x3f;
      else
        put_half(bytes, i * type.bytes, 0.01f * float(1 + random.below(5)));
    }
  }
  Matrix m{format, rows, columns, {bytes}, std::vector<float>(rows * columns), {}, true};
  ggml_decode(type, bytes.data(), m.w.data(), rows, columns);
  return m;
}

enum class Kind { kZero, kSymmetric, kMinimum, kFloatZero, kBinary, kTernary };

// Codes in a bit stream, a scale per group of a row (or one for all), and a zero point or a minimum; floats are
// float16, or float32 when the format's name ends in f.
//   zero and float zero: (q - z) s   symmetric: (q - 2^(bits - 1)) s   minimum: q s + m
//   binary: (2q - 1) s   ternary: (q - 1) s
Matrix stream_matrix(const std::string& format, int64_t rows, int64_t columns, int bits, int64_t group, Kind kind,
                     bool per_tensor = false) {
  Random random{uint32_t(rows * 1000 + columns + bits)};
  const int64_t groups = columns / group, stored = per_tensor ? 1 : rows * groups,
                row_bytes = packed_bytes(columns, bits);
  Matrix m{format, rows, columns, {}, std::vector<float>(rows * columns), {}, true};
  const int64_t size = format.back() == 'f' ? 4 : 2;
  std::vector<uint8_t> codes(rows * row_bytes), scale(size * stored), minimum(size * stored), zeros, row(columns),
      zero(stored);
  std::vector<float> scales(stored), minima(stored);
  for (int64_t i = 0; i < stored; ++i) {
    scales[i] = put_float(scale, i, 0.001f * float(1 + random.below(30)), size);
    minima[i] = put_float(minimum, i, -0.01f * float(random.below(20)), size);
    zero[i] = uint8_t(random.below(1 << bits));
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (uint8_t& c : row) c = uint8_t(random.below(kind == Kind::kTernary ? 3 : 1 << bits));
    pack_row(row.data(), columns, bits, &codes[r * row_bytes]);
    for (int64_t k = 0; k < columns; ++k) {
      const int64_t g = per_tensor ? 0 : r * groups + k / group;
      const float q = row[k], s = scales[g];
      m.w[r * columns + k] = kind == Kind::kZero        ? (q - float(zero[g])) * s
                             : kind == Kind::kSymmetric ? (q - float(1 << (bits - 1))) * s
                             : kind == Kind::kMinimum   ? q * s + minima[g]
                             : kind == Kind::kFloatZero ? (q - minima[g]) * s
                             : kind == Kind::kBinary    ? (2 * q - 1) * s
                                                        : (q - 1) * s;
    }
  }
  m.fields = {codes, scale};
  if (kind == Kind::kZero) {
    const int64_t per_row = per_tensor ? 1 : groups, zero_bytes = packed_bytes(per_row, bits);
    zeros.resize(stored / per_row * zero_bytes);
    for (int64_t r = 0; r < stored / per_row; ++r) pack_row(&zero[r * per_row], per_row, bits, &zeros[r * zero_bytes]);
    m.fields.push_back(zeros);
  }
  if (kind == Kind::kMinimum || kind == Kind::kFloatZero) m.fields.push_back(minimum);
  return m;
}

// w = q scb / 127, one float32 scb a row.
Matrix int8_row_matrix(int64_t rows, int64_t columns) {
  Random random{uint32_t(rows * 1000 + columns)};
  Matrix m{"int8_row", rows, columns, {random.bytes(rows * columns), {}}, {}, {}, true};
  for (uint8_t& q : m.fields[0]) q = q == 0x80 ? 0x81 : q;  // -127..127
  for (int64_t r = 0; r < rows; ++r) {
    const float scb = 0.1f * float(1 + random.below(9));
    const auto* bytes = reinterpret_cast<const uint8_t*>(&scb);
    m.fields[1].insert(m.fields[1].end(), bytes, bytes + 4);
    for (int64_t k = 0; k < columns; ++k) m.w.push_back(float(int8_t(m.fields[0][r * columns + k])) * (scb / 127.0f));
  }
  return m;
}

// w = e2m1 (e4m3 / global), a scale for 16 columns and one for all.
Matrix nvfp4_matrix(int64_t rows, int64_t columns) {
  static constexpr float kMagnitudes[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
  Random random{uint32_t(rows * 1000 + columns)};
  const float global = 437.3f;
  const auto* bytes = reinterpret_cast<const uint8_t*>(&global);
  Matrix m{"nvfp4_gs", rows,
           columns,    {random.bytes(rows * columns / 2), random.bytes(rows * columns / 16), {bytes, bytes + 4}},
           {},         {},
           true};
  for (uint8_t& scale : m.fields[1]) scale &= 0x77;  // positive, not NaN
  for (int64_t i = 0; i < rows * columns; ++i) {
    const int code = m.fields[0][i / 2] >> 4 * (i % 2) & 15;
    const float value = (code & 8 ? -1.0f : 1.0f) * kMagnitudes[code & 7];
    m.w.push_back(value * (e4m3_to_f32(m.fields[1][i / 16]) / global));
  }
  return m;
}

// w = e4m3 s, a float32 s a row.
Matrix fp8_matrix(int64_t rows, int64_t columns) {
  Random random{uint32_t(rows * 1000 + columns)};
  Matrix m{"fp8_c", rows, columns, {random.bytes(rows * columns), {}}, {}, {}, false};
  for (uint8_t& q : m.fields[0]) q &= 0xf7;  // not NaN
  for (int64_t r = 0; r < rows; ++r) {
    const float scale = 0.001f * float(1 + random.below(9));
    const auto* bytes = reinterpret_cast<const uint8_t*>(&scale);
    m.fields[1].insert(m.fields[1].end(), bytes, bytes + 4);
    for (int64_t k = 0; k < columns; ++k) m.w.push_back(e4m3_to_f32(m.fields[0][r * columns + k]) * scale);
  }
  m.magnitude = m.w;
  return m;
}

Matrix float_matrix(Float type, int64_t rows, int64_t columns) {
  static const char* const kNames[] = {"f32", "f16", "bf16"};
  Random random{uint32_t(rows * 1000 + columns)};
  Matrix m{kNames[type], rows, columns, {{}}, random.bells(rows * columns, 0.05f), {}, false};
  std::vector<uint8_t>& bytes = m.fields[0];
  bytes.resize(m.w.size() * float_bytes(type));
  for (size_t i = 0; i < m.w.size(); ++i) {
    if (type == kF32) {
      memcpy(&bytes[4 * i], &m.w[i], 4);
      continue;
    }
    const uint16_t h = type == kF16 ? f32_to_f16(m.w[i]) : uint16_t(float_to_bits(m.w[i]) >> 16);
    memcpy(&bytes[2 * i], &h, 2);
    m.w[i] = type == kF16 ? f16_to_f32(h) : bf16_to_f32(h);
  }
  m.magnitude = m.w;
  return m;
}

// Reads the rows as the kernels will, compares them with the independent decoding, and takes the magnitudes.
void read_scheme(Matrix& m, const linear::Scheme& s) {
  const linear::Layout& l = s.layout;
  m.coarse = linear::code_bits(l.code) <= linear::kCoarseBits;
  linear::RowBuffer buffer;
  std::vector<float> decoded(m.columns);
  Expected want;
  Result got;
  m.magnitude.resize(m.w.size());
  for (int64_t r = 0; r < m.rows; ++r) {
    std::vector<const uint8_t*> at;
    for (size_t f = 0; f < s.fields.size(); ++f)
      at.push_back(m.fields[f].data() + (s.fields[f].shared ? 0 : r * s.fields[f].row_bytes));
    linear::decode_row(s, at.data(), m.columns, buffer, decoded.data());
    got.insert(got.end(), decoded.begin(), decoded.end());
    const linear::RowCodes row = buffer.row(s, m.columns);
    s.extract(s, at.data(), m.columns, row);
    for (int64_t k = 0; k < m.columns; ++k) {
      const int64_t g = k / l.group, block = k / linear::kBlockColumns;
      const bool per_group = linear::per_group(l.scales);
      const float code = l.code == linear::kT4   ? float(l.table[row.codes[k]])
                         : l.code == linear::kS8 ? float(int8_t(row.codes[k]))
                                                 : float(row.codes[k]);
      const float scale = std::fabs(per_group ? row.scale[g] : row.scale[block] * float(row.sub[g]));
      const float second = l.second == linear::kNone   ? 0
                           : l.second == linear::kZero ? row.second[g] * scale
                           : per_group                 ? row.second[g]
                                                       : row.second[block] * float(row.submin[g]);
      // kernels may add 128 to signed codes
      const float shift = std::fabs(float(l.offset)) + (l.code == linear::kS8 || l.code == linear::kT4 ? 128 : 0);
      float& magnitude = m.magnitude[r * m.columns + k];
      magnitude = scale * (std::fabs(code) + shift) + std::fabs(second);
      // A few roundings of the terms: ggml multiplies in another order.
      want.add(m.w[r * m.columns + k], 4 * kRounding * magnitude);
    }
  }
  expect_near(m.format + ": decode_row", got, want);
}

// ---- Products ----

linear::Part pack(const Matrix& m, const std::vector<float>& bias) {
  const Float type = m.format == "f32" ? kF32 : m.format == "f16" ? kF16 : m.format == "bf16" ? kBF16 : kE4M3;
  linear::Part part = m.integer
                          ? linear::pack_integers(*linear::find_scheme(m.format, m.columns), {m.source()}, m.columns)
                          : linear::pack_floats(type, {m.source()}, m.columns);
  if (!bias.empty()) {
    part.bias.assign(part.panel_count() * linear::kPanelRows, 0.0f);
    std::copy(bias.begin(), bias.end(), part.bias.begin());
  }
  return part;
}

// What n rows of activations times the matrices, one below the other, should be. Two kinds of bound:
//   `oracle`: from the exact product. Integer kernels round 32 activations at a time to 16256 steps a side when rows
//     are few and codes of many bits, else to 127: each is off by half a step. Stored scales are kept exactly.
//   `isas`: between two instruction sets, which quantize alike, sum the same integers and round differently: per group
//     of at least 16 columns four roundings, some more for each row; for floats two for each column.
// Matrix tiles of bfloat16 (amx) have bounds of their own where they are used, for integers times many rows:
//   `tiles`: from the exact product, both factors rounded to 8 bits: 2^-8 of each, and a little for both together.
//   `tiles_isas`: from the others, which round activations to 8 bits.
struct Problem {
  std::vector<float> x, bias, residual;
  Expected oracle = {}, isas = {}, tiles = {}, tiles_isas = {};
};

Problem make_problem(const std::vector<Matrix>& parts, int64_t n, bool extras) {
  Random random{uint32_t(n)};
  const int64_t columns = parts[0].columns;
  int64_t rows = 0;
  for (const Matrix& m : parts) rows += m.rows;
  Problem p{random.bells(n * columns), {}, {}};
  if (extras) p.bias = random.bells(rows), p.residual = random.bells(n * rows);
  for (int64_t i = 0; i < n; ++i) {
    const float* x = &p.x[i * columns];
    std::vector<double> step(columns);
    for (int64_t k = 0; k < columns; k += 32) {
      double largest = 0;
      for (int64_t j = k; j < std::min(columns, k + 32); ++j) largest = std::max(largest, std::fabs(double(x[j])));
      for (int64_t j = k; j < std::min(columns, k + 32); ++j) step[j] = largest / 127;
    }
    int64_t row = 0;
    for (const Matrix& m : parts) {
      for (int64_t r = 0; r < m.rows; ++r, ++row) {
        double y = 0, size = 0, steps = 0, halves = 0;
        for (int64_t k = 0; k < columns; ++k) {
          const double magnitude = std::fabs(double(m.magnitude[r * columns + k]));
          y += double(m.w[r * columns + k]) * double(x[k]);
          const double off = step[k] * (n > linear::kFineRows || m.coarse ? 0.501 : 0.501 * 127 / 16256);
          size += magnitude * (std::fabs(double(x[k])) + (m.integer ? step[k] : 0));
          steps += std::fabs(double(m.w[r * columns + k])) * off;
          halves += std::fabs(double(m.w[r * columns + k]) * double(x[k])) * 1.01 / 128;
        }
        const double added = extras ? double(p.bias[row]) + double(p.residual[i * rows + row]) : 0;
        const double around = 4 * kRounding * (std::fabs(y) + std::fabs(added) + 1);
        const double rounding =
            (m.integer ? 4 * double(columns) / 16 + 16 : 2 * double(columns) + 4) * kRounding * size + around;
        p.oracle.add(y + added, rounding + (m.integer ? steps : 0));
        p.isas.add(0, 2 * rounding);
        const bool many = n > linear::kFineRows, tiles = m.integer && many;
        // Floats are sums of parts: up to six products for each column, and what is left out.
        const double parts = m.integer || !many ? 0 : (6 * double(columns) + 12) * kRounding * size;
        p.tiles.add(y + added, tiles ? halves + rounding : p.oracle.bound.back() + parts);
        p.tiles_isas.add(0, 2 * rounding + (tiles ? halves + steps : parts));
      }
    }
  }
  return p;
}

void test_product(const std::string& what, const std::vector<Matrix>& parts, int64_t n, bool extras) {
  const Problem p = make_problem(parts, n, extras);
  const std::vector<Result> results = expect_everywhere(
      what,
      [&] {
        linear::Weight weight;
        weight.columns = parts[0].columns;
        for (const Matrix& m : parts) {
          std::vector<float> bias;
          if (extras) bias.assign(p.bias.begin() + weight.rows, p.bias.begin() + weight.rows + m.rows);
          weight.parts.push_back(pack(m, bias));
          weight.rows += m.rows;
        }
        Result y(p.residual.empty() ? n * weight.rows : 0);
        y.insert(y.end(), p.residual.begin(), p.residual.end());  // in place
        linear::multiply(p.x.data(), n, weight, extras ? y.data() : nullptr, y.data());
        return y;
      },
      [&](const std::string& isa) -> const Expected& { return isa == "amx" ? p.tiles : p.oracle; });
  for (size_t i = 1; i < results.size(); ++i) {
    Expected want = isas()[i] == "amx" || isas()[0] == "amx" ? p.tiles_isas : p.isas;
    for (size_t k = 0; k < want.value.size(); ++k) want.value[k] = results[0][k];
    expect_near(what + ", " + isas()[i] + " against " + isas()[0], results[i], want);
  }
}

void test_matrix(Matrix m) {
  if (m.integer) {
    const auto scheme = linear::find_scheme(m.format, m.columns);
    check(scheme.has_value(), m.format + " has no scheme");
    if (!scheme) return;
    read_scheme(m, *scheme);
  }
  for (int64_t n : {1, 2, 3, 4, 5, 7, 16, 17, 24}) test_product(m.format, {m}, n, n % 2 == 0);
  if (m.rows == 33) test_product(m.format, {m}, 101, true);
}

// Products with one scale for a row. Codes are exact: a division and a rounding; outliers of kOutlier are off by half
// of 16256 steps a side of the largest of their 32 columns.
void test_rounding(const std::string& what, Matrix m, linear::Rounding rounding, int64_t n) {
  read_scheme(m, *linear::find_scheme(m.format, m.columns));
  Random random{uint32_t(n + 7)};
  std::vector<float> x = random.bells(n * m.columns, 2);
  Expected want;
  for (int64_t i = 0; i < n; ++i) {
    float* row = &x[i * m.columns];
    if (i % 3 == 2) std::fill(row, row + m.columns, 0.0f);
    if (i % 2 == 0) row[random.below(int(m.columns))] = -40;
    const auto apart = [&](int64_t k) {
      return rounding.kind == linear::kOutlier && std::fabs(row[k]) >= rounding.value;
    };
    float step = rounding.value;
    if (rounding.kind != linear::kTensor) {
      step = 0;
      for (int64_t k = 0; k < m.columns; ++k) step = std::max(step, apart(k) ? 0 : std::fabs(row[k]));
      step /= 127;
    }
    std::vector<double> rounded, off;
    for (int64_t k = 0; k < m.columns; ++k) {
      float top = 0;
      for (int64_t j = k / 32 * 32; j < std::min(m.columns, k / 32 * 32 + 32); ++j)
        top = std::max(top, apart(j) ? std::fabs(row[j]) : 0);
      const float code = step > 0 ? std::clamp(std::nearbyint(row[k] / step), -127.0f, 127.0f) : 0;
      rounded.push_back(apart(k) ? double(row[k]) : double(code) * double(step));
      off.push_back(apart(k) ? 0.501 * double(top) / 16256 : 0);
    }
    for (int64_t r = 0; r < m.rows; ++r) {
      double y = 0, size = 0, error = 0;
      for (int64_t k = 0; k < m.columns; ++k) {
        const int64_t at = r * m.columns + k;
        y += double(m.w[at]) * rounded[k];
        error += std::fabs(double(m.w[at])) * off[k];
        size += std::fabs(double(m.magnitude[at])) * (std::fabs(rounded[k]) + double(step));
      }
      want.add(y, error + (4 * double(m.columns) / 16 + 20) * kRounding * size + 4 * kRounding * std::fabs(y));
    }
  }
  expect_everywhere(
      what,
      [&] {
        linear::Weight weight;
        weight.columns = m.columns;
        weight.rows = m.rows;
        weight.rounding = rounding;
        weight.parts.push_back(pack(m, {}));
        Result y(n * m.rows);
        linear::multiply(x.data(), n, weight, nullptr, y.data());
        return y;
      },
      want);
}

// multiply_gated has the bits of multiply and gated.
void test_gated(const std::vector<Matrix>& parts, int64_t n) {
  Random random{uint32_t(n + 3)};
  const int64_t columns = parts[0].columns;
  const std::vector<float> x = random.bells(n * columns);
  for (const std::string& isa : isas()) {
    check(force_isa(isa).empty(), "force_isa " + isa);
    linear::Weight weight;
    weight.columns = columns;
    for (const Matrix& m : parts) {
      weight.parts.push_back(pack(m, random.bells(m.rows)));
      weight.rows += m.rows;
    }
    const int64_t width = weight.rows / 2;
    for (const auto activation : {elementwise::kSilu, elementwise::kGeluTanh}) {
      Result both(n * weight.rows), want(n * width), got(n * width);
      linear::multiply(x.data(), n, weight, nullptr, both.data());
      elementwise::gated(both.data(), n, width, activation, want.data());
      linear::multiply_gated(x.data(), n, weight, activation, got.data());
      check(!memcmp(got.data(), want.data(), 4 * got.size()),
            "gated product of " + parts[0].format + ", " + isa + ", " + std::to_string(n) + " rows: other bits");
    }
  }
}

#if defined(__x86_64__) && defined(TERSOR_HAS_AMX) && !defined(TERSOR_EMULATE)
// Whether the shapes that a thread has given its tiles are the same after f.
__attribute__((target("amx-tile"))) bool keeps_tiles(const std::function<void()>& f) {
  struct alignas(64) Shapes {
    uint8_t bytes[64];
  } before = {}, after = {};
  before.bytes[0] = 1;                          // the palette
  before.bytes[16] = 32, before.bytes[48] = 5;  // tile 0: 5 lines of 32 bytes
  asm volatile("ldtilecfg %0" ::"m"(before));
  f();
  asm volatile("sttilecfg %0\n\ttilerelease" : "=m"(after));
  return !memcmp(before.bytes, after.bytes, 64);
}

void test_tiles_of_others() {
  if (std::find(isas().begin(), isas().end(), "amx") == isas().end()) return;
  check(force_isa("amx").empty(), "force_isa amx");
  set_threads(1);
  linear::Weight weight;
  weight.rows = 33, weight.columns = 96;
  weight.parts.push_back(pack(ggml_matrix("q4_0", 33, 96), {}));
  const std::vector<float> x(40 * 96, 0.5f);
  std::vector<float> y(40 * 33);
  check(keeps_tiles([&] { linear::multiply(x.data(), 40, weight, nullptr, y.data()); }),
        "amx: another's tiles are lost");
}
#else
void test_tiles_of_others() {}
#endif

}  // namespace

void test_linear() {
  test_tiles_of_others();
  for (const char* name : {"q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl",
                           "iq4_xs", "tq1_0", "tq2_0", "mxfp4", "nvfp4", "q1_0", "q2_0"}) {
    const int64_t values = ggml_type(name)->values;
    test_matrix(ggml_matrix(name, 33, 2 * values));
    test_matrix(ggml_matrix(name, 5, 3 * values));
  }
  for (int bits : {1, 2, 3, 4, 5, 6, 8}) {
    const std::string name = "int" + std::to_string(bits);
    for (int64_t group : {16, 32, 48, 64}) {
      const std::string grouped = name + "_g" + std::to_string(group);
      test_matrix(stream_matrix(grouped, 33, 3 * group, bits, group, Kind::kZero));
      test_matrix(stream_matrix(grouped + "f", 33, 3 * group, bits, group, Kind::kZero));
      test_matrix(stream_matrix(grouped + "s", 16, 2 * group, bits, group, Kind::kSymmetric));
      test_matrix(stream_matrix(grouped + "sf", 16, 2 * group, bits, group, Kind::kSymmetric));
      test_matrix(stream_matrix(grouped + "m", 17, 5 * group, bits, group, Kind::kMinimum));
      test_matrix(stream_matrix(grouped + "mf", 17, 5 * group, bits, group, Kind::kMinimum));
      test_matrix(stream_matrix(grouped + "z", 17, 2 * group, bits, group, Kind::kFloatZero));
    }
    for (int64_t columns : {1, 31, 32, 33, 70}) {  // no group, any length
      test_matrix(stream_matrix(name + "_c", 33, columns, bits, columns, Kind::kZero));
      test_matrix(stream_matrix(name + "_ts", 7, columns, bits, columns, Kind::kSymmetric, true));
      test_matrix(stream_matrix(name + "_cmf", 5, columns, bits, columns, Kind::kMinimum));
      test_matrix(stream_matrix(name + "_czf", 5, columns, bits, columns, Kind::kFloatZero));
    }
  }
  test_matrix(stream_matrix("binary_g64", 33, 192, 1, 64, Kind::kBinary));
  test_matrix(stream_matrix("ternary_g32", 33, 96, 2, 32, Kind::kTernary));
  for (int64_t columns : {1, 33, 96}) test_matrix(int8_row_matrix(33, columns));
  for (int64_t n : {1, 5, 16, 17, 27}) {
    for (const linear::Rounding rounding :
         {linear::Rounding{linear::kToken, 0}, linear::Rounding{linear::kTensor, 0.03f},
          linear::Rounding{linear::kOutlier, 6}}) {
      const std::string what = "rounding " + std::to_string(rounding.kind) + " ";
      for (int64_t columns : {1, 33, 96}) test_rounding(what + "int8_row", int8_row_matrix(33, columns), rounding, n);
      test_rounding(what + "q4_1", ggml_matrix("q4_1", 20, 96), rounding, n);
      test_rounding(what + "q2_k", ggml_matrix("q2_k", 20, 256), rounding, n);
    }
  }
  for (Float type : {kF32, kF16, kBF16}) {
    for (int64_t columns : {1, 15, 16, 17, 33, 300}) test_matrix(float_matrix(type, 33, columns));
    test_matrix(float_matrix(type, 1, 64));
  }
  for (int64_t columns : {1, 15, 16, 17, 33, 300}) test_matrix(fp8_matrix(33, columns));
  test_matrix(nvfp4_matrix(33, 48));
  test_matrix(nvfp4_matrix(5, 512));
  for (int64_t n : {1, 16, 17, 70}) {
    for (int64_t rows : {32, 36, 128, 320}) {
      test_gated({ggml_matrix("q4_0", rows, 96)}, n);
      test_gated({float_matrix(kF16, rows, 96)}, n);
    }
    test_gated({ggml_matrix("q4_k", 32, 768)}, n);
    test_gated({ggml_matrix("q4_0", 16, 96), ggml_matrix("q8_0", 16, 96)}, n);
  }
  Matrix q4 = ggml_matrix("q4_k", 40, 256), q8 = ggml_matrix("q8_0", 20, 256), f16 = float_matrix(kF16, 7, 256);
  read_scheme(q4, *linear::find_scheme("q4_k", 256));
  read_scheme(q8, *linear::find_scheme("q8_0", 256));
  for (int64_t n : {1, 6, 200}) test_product("parts of three formats", {q4, q8, f16}, n, true);
}

}  // namespace tersor::test
