// Encoding by ggml's own rule, which takes the scale from the extremes of a block. Byte for byte what gguf-py's
// quantize_blocks gives (gguf/quants.py). Where gguf-py would divide by a subnormal number, or overflow float16, ours
// gives zero codes and the largest finite scale instead of undefined values. NaN weights give some bytes, never a
// fault.
#pragma once

#include "formats/ggml_blocks.h"

namespace tersor {

void encode_extremes(const float* w, BlockQ4_0& b);
void encode_extremes(const float* w, BlockQ4_1& b);
void encode_extremes(const float* w, BlockQ5_0& b);
void encode_extremes(const float* w, BlockQ5_1& b);
void encode_extremes(const float* w, BlockQ8_0& b);
void encode_extremes(const float* w, BlockTQ1_0& b);
void encode_extremes(const float* w, BlockTQ2_0& b);
void encode_extremes(const float* w, BlockMXFP4& b);

// The nearest codes of 32 weights for the exponent e; a value midway gets the level of smaller magnitude.
void mxfp4_codes(const float* w, uint8_t e, uint8_t* codes);

}  // namespace tersor
