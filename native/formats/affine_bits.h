// Dense bit streams, least significant bit first: value i is bits [i*B, i*B+B) of the row, stream bit k is bit k%8 of
// byte k/8.
#pragma once

#include <cstdint>

namespace tersor {

// Bytes of n codes of this many bits.
constexpr int64_t packed_bytes(int64_t n, int bits) { return (n * bits + 7) / 8; }

// codes: n values < 2^bits; packed: packed_bytes(n, bits) bytes, all written, unused high bits zero. bits in 1..8.
void pack_row(const uint8_t* codes, int64_t n, int bits, uint8_t* packed);

// The inverse: reads packed_bytes(n, bits) bytes, writes n codes.
void unpack_row(const uint8_t* packed, int64_t n, int bits, uint8_t* codes);

}  // namespace tersor
