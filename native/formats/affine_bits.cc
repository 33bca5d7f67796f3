#include "formats/affine_bits.h"

#include <cstring>

namespace tersor {
namespace {

// Eight codes of B bits are B bytes: the unit in which streams are read and written.
template <int B>
inline uint64_t join8(const uint8_t* codes) {
  uint64_t word = 0;
  for (int i = 0; i < 8; i++) word |= static_cast<uint64_t>(codes[i]) << (i * B);
  return word;
}

template <int B>
inline void split8(uint64_t word, uint8_t* codes) {
  for (int i = 0; i < 8; i++) codes[i] = static_cast<uint8_t>(word >> (i * B)) & ((1 << B) - 1);
}

// Little-endian words, byte by byte, so that the host's byte order does not matter.
inline void store_bytes(uint64_t word, int count, uint8_t* bytes) {
  for (int i = 0; i < count; i++) bytes[i] = static_cast<uint8_t>(word >> (8 * i));
}

inline uint64_t load_bytes(const uint8_t* bytes, int count) {
  uint64_t word = 0;
  for (int i = 0; i < count; i++) word |= static_cast<uint64_t>(bytes[i]) << (8 * i);
  return word;
}

template <int B>
void pack(const uint8_t* codes, int64_t n, uint8_t* packed) {
  const int64_t whole = n / 8;
  for (int64_t u = 0; u < whole; u++) store_bytes(join8<B>(codes + 8 * u), B, packed + B * u);
  if (const int rest = static_cast<int>(n % 8); rest > 0) {
    uint8_t padded[8] = {};
    std::memcpy(padded, codes + 8 * whole, rest);
    store_bytes(join8<B>(padded), static_cast<int>(packed_bytes(rest, B)), packed + B * whole);
  }
}

template <int B>
void unpack(const uint8_t* packed, int64_t n, uint8_t* codes) {
  const int64_t whole = n / 8;
  for (int64_t u = 0; u < whole; u++) split8<B>(load_bytes(packed + B * u, B), codes + 8 * u);
  if (const int rest = static_cast<int>(n % 8); rest > 0) {
    uint8_t padded[8];
    split8<B>(load_bytes(packed + B * whole, static_cast<int>(packed_bytes(rest, B))), padded);
    std::memcpy(codes + 8 * whole, padded, rest);
  }
}

using Row = void (*)(const uint8_t*, int64_t, uint8_t*);
constexpr Row kPack[] = {pack<1>, pack<2>, pack<3>, pack<4>, pack<5>, pack<6>, pack<7>, pack<8>};
constexpr Row kUnpack[] = {unpack<1>, unpack<2>, unpack<3>, unpack<4>, unpack<5>, unpack<6>, unpack<7>, unpack<8>};

}  // namespace

void pack_row(const uint8_t* codes, int64_t n, int bits, uint8_t* packed) { kPack[bits - 1](codes, n, packed); }

void unpack_row(const uint8_t* packed, int64_t n, int bits, uint8_t* codes) { kUnpack[bits - 1](packed, n, codes); }

}  // namespace tersor
