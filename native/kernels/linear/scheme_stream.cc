// Affine integers, binary and ternary signs, and int8 rows: codes in a dense bit stream beside arrays of parameters.
// Layouts: docs/formats.md; src/tersor/formats/{affine,signs,int8}.py.
#include <cstdlib>
#include <cstring>
#include <vector>

#include "base/float16.h"
#include "kernels/linear/scheme.h"

namespace tersor::linear {
namespace {

// Value i is bits [i*bits, (i+1)*bits) of the stream, least significant bit first.
void unpack(const uint8_t* stream, int bits, int64_t n, uint8_t* out) {
  if (bits == 8) {
    memcpy(out, stream, n);
    return;
  }
  const uint32_t mask = (1u << bits) - 1;
  int64_t i = 0;
  for (; i + 8 <= n; i += 8, stream += bits) {  // eight values are `bits` whole bytes
    uint64_t word = 0;
    memcpy(&word, stream, bits);
    for (int k = 0; k < 8; ++k) out[i + k] = word >> (k * bits) & mask;
  }
  uint64_t word = 0;
  memcpy(&word, stream, ((n - i) * bits + 7) / 8);
  for (int k = 0; i + k < n; ++k) out[i + k] = word >> (k * bits) & mask;
}

float half(const uint8_t* p, int64_t i) {
  uint16_t h;
  memcpy(&h, p + 2 * i, 2);
  return f16_to_f32(h);
}

float single(const uint8_t* p, int64_t i) {
  float x;
  memcpy(&x, p + 4 * i, 4);
  return x;
}

// fields: codes, scale, then zero (bit stream) or min (like scale) as scheme.second says; kFloatZero: the last is a
// zero, and -zero * scale the minimum. kLoad: half or single.
template <float (*kLoad)(const uint8_t*, int64_t), bool kFloatZero = false>
void extract_affine(const Scheme& s, const uint8_t* const* fields, int64_t columns, const RowCodes& row) {
  unpack(fields[0], s.bits, columns, row.codes);
  if (s.layout.code == kS8) {
    for (int64_t i = 0; i < columns; ++i)
      row.codes[i] ^= 0x80;  // q - 128; the offset of 128 or the zero below makes up for it
  }
  const int64_t stored = s.source_group;  // one stored scale covers stored / group groups of the layout
  std::vector<uint8_t> zeros;
  if (s.layout.second == kZero) {
    zeros.resize((columns + stored - 1) / stored);
    unpack(fields[2], s.bits, int64_t(zeros.size()), zeros.data());
  }
  for (int64_t g = 0; g < s.groups(columns); ++g) {
    const int64_t at = g * s.layout.group / stored;
    row.scale[g] = kLoad(fields[1], at);
    if (s.layout.second == kZero) row.second[g] = zeros[at];
    if (s.layout.second == kMin)
      row.second[g] = kFloatZero ? -kLoad(fields[2], at) * row.scale[g] : kLoad(fields[2], at);
  }
}

// w = (2q - 1) * scale: the code is 2q, the offset -1.
void extract_binary(const Scheme& s, const uint8_t* const* fields, int64_t columns, const RowCodes& row) {
  extract_affine<half>(s, fields, columns, row);
  for (int64_t i = 0; i < columns; ++i) row.codes[i] *= 2;
}

// w = q * (scb / 127)
void extract_int8_row(const Scheme& s, const uint8_t* const* fields, int64_t columns, const RowCodes& row) {
  memcpy(row.codes, fields[0], columns);
  float scb;
  memcpy(&scb, fields[1], 4);
  for (int64_t g = 0; g < s.groups(columns); ++g) row.scale[g] = scb / 127.0f;
}

// A whole number of digits at p, moved past them; -1 when there are none.
int64_t read_number(const char*& p) {
  if (*p < '0' || *p > '9') return -1;
  char* end;
  const int64_t value = std::strtol(p, &end, 10);
  p = end;
  return value;
}

// "_g64": columns that share a scale, a multiple of 16 that divides the columns; -1 for anything else.
int64_t read_group(const char*& p, int64_t columns) {
  if (p[0] != '_' || p[1] != 'g') return -1;
  p += 2;
  const int64_t group = read_number(p);
  return group >= 16 && group % 16 == 0 && columns % group == 0 ? group : -1;
}

// The group of the layout for a stored group: itself if 256 is a multiple of it, else one that both are multiples of.
int layout_group(int64_t stored) {
  for (int group : {256, 128, 64, 32}) {
    if (stored % group == 0) return group;
  }
  return 16;
}

Scheme base(int bits, int64_t columns, int64_t source_group) {
  static constexpr Code kCodeOfBits[] = {kU2, kU2, kU2, kU3, kU4, kU5, kU6, kS8, kS8};
  Scheme s{};
  s.layout = {kCodeOfBits[bits], kHalves, kNone, layout_group(source_group), 0, nullptr};
  s.bits = bits;
  s.source_group = source_group;
  s.extract = extract_affine<half>;
  s.fields = {{"codes", (columns * bits + 7) / 8}, {"scale", 2 * (columns / source_group)}};
  return s;
}

// intB_gN, intB_c and intB_t with "", "s", "m" or "z", and "f" for float32 scales, minima and zeros.
std::optional<Scheme> find_affine(const char* p, int64_t columns) {
  const int64_t bits = read_number(p);
  if (bits < 1 || bits > 8 || bits == 7 || *p != '_') return {};
  const bool per_tensor = p[1] == 't', per_row = p[1] == 'c' || per_tensor;
  int64_t group;
  if (per_row) {
    group = (columns + 255) / 256 * 256;  // one group, as the layout's blocks reach
    p += 2;
  } else if ((group = read_group(p, columns)) < 0) {
    return {};
  }
  std::string kind = p;
  const bool wide = !kind.empty() && kind.back() == 'f';
  if (wide) kind.pop_back();
  const int64_t float_bytes = wide ? 4 : 2;
  Scheme s = base(int(bits), columns, group);
  const int64_t groups = per_row ? 1 : columns / group;
  s.fields[1].row_bytes = float_bytes * groups;
  if (wide) s.extract = extract_affine<single>;
  // One scale for a row becomes the row's factor (normalize), whatever its type.
  if (kind == "z" || (wide && (!per_row || kind == "m"))) s.layout.scales = kSingles;
  const int half_range = 1 << (bits - 1);
  const bool is_signed = s.layout.code == kS8;
  if (kind == "") {
    s.layout.second = kZero;
    s.layout.offset = is_signed ? 128 : 0;
    s.fields.push_back({"zero", (groups * bits + 7) / 8});
  } else if (kind == "s") {
    s.layout.second = kNone;
    s.layout.offset = is_signed ? 0 : -half_range;
  } else if (kind == "m") {
    s.layout.second = kMin;
    s.layout.offset = is_signed ? 128 : 0;
    s.fields.push_back({"min", float_bytes * groups});
  } else if (kind == "z") {
    s.layout.second = kMin;
    s.layout.offset = is_signed ? 128 : 0;
    s.fields.push_back({"zero", float_bytes * groups});
    s.extract = wide ? extract_affine<single, true> : extract_affine<half, true>;
  } else {
    return {};
  }
  if (per_tensor) {
    for (size_t i = 1; i < s.fields.size(); ++i) s.fields[i].shared = true;
  }
  return s;
}

}  // namespace

std::optional<Scheme> find_stream_scheme(const std::string& format, int64_t columns) {
  if (format == "int8_row") {
    Scheme s = base(8, columns, 256);
    s.extract = extract_int8_row;
    s.fields = {{"codes", columns}, {"scb", 4}};
    return s;
  }
  if (format.rfind("int", 0) == 0) return find_affine(format.c_str() + 3, columns);
  const bool binary = format.rfind("binary", 0) == 0;
  if (!binary && format.rfind("ternary", 0) != 0) return {};
  const char* p = format.c_str() + (binary ? 6 : 7);
  const int64_t group = read_group(p, columns);
  if (group < 0 || *p) return {};
  Scheme s = base(binary ? 1 : 2, columns, group);
  s.layout.offset = -1;
  if (binary) {
    s.layout.code = kU1;
    s.extract = extract_binary;
  }
  return s;
}

}  // namespace tersor::linear
