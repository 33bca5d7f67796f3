// Four-bit lookup formats (nf4, fp4): w = table[q] * absmax of the block. Mirrors src/tersor/formats/lookup.py bit for
// bit.
#pragma once

#include <cstdint>

namespace tersor {

// How values become codes: level = number of bounds below x; code = code_of_level[level]. Unused bounds are infinite.
struct LookupEncoder {
  float bounds[15];
  uint8_t code_of_level[16];
};

// w: blocks * block values; absmax: one per block; codes: two per byte, the first in the high nibble. block is even.
void lookup_encode(const float* w, int64_t blocks, int64_t block, const float* absmax, const LookupEncoder& encoder,
                   uint8_t* codes);

// table: 16 values.
void lookup_decode(const uint8_t* codes, int64_t blocks, int64_t block, const float* absmax, const float* table,
                   float* w);

}  // namespace tersor
