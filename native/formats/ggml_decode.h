// Decoding of ggml's blocks, one overload per type: writes all values of one block. No checks; caller owns memory.
#pragma once

#include "formats/ggml_blocks.h"

namespace tersor {

void decode_block(const BlockQ4_0& b, float* out);
void decode_block(const BlockQ4_1& b, float* out);
void decode_block(const BlockQ5_0& b, float* out);
void decode_block(const BlockQ5_1& b, float* out);
void decode_block(const BlockQ8_0& b, float* out);
void decode_block(const BlockQ2_K& b, float* out);
void decode_block(const BlockQ3_K& b, float* out);
void decode_block(const BlockQ4_K& b, float* out);
void decode_block(const BlockQ5_K& b, float* out);
void decode_block(const BlockQ6_K& b, float* out);
void decode_block(const BlockIQ4_NL& b, float* out);
void decode_block(const BlockIQ4_XS& b, float* out);
void decode_block(const BlockIQ1_S& b, float* out);
void decode_block(const BlockIQ1_M& b, float* out);
void decode_block(const BlockIQ2_XXS& b, float* out);
void decode_block(const BlockIQ2_XS& b, float* out);
void decode_block(const BlockIQ2_S& b, float* out);
void decode_block(const BlockIQ3_XXS& b, float* out);
void decode_block(const BlockIQ3_S& b, float* out);
void decode_block(const BlockTQ1_0& b, float* out);
void decode_block(const BlockTQ2_0& b, float* out);
void decode_block(const BlockMXFP4& b, float* out);
void decode_block(const BlockNVFP4& b, float* out);
void decode_block(const BlockQ1_0& b, float* out);
void decode_block(const BlockQ2_0& b, float* out);

}  // namespace tersor
