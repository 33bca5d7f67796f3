// Constant tables of ggml's formats.
#pragma once

#include <cstdint>

namespace tersor {

// Levels of IQ4_NL and IQ4_XS.
inline constexpr int8_t kLevelsIQ4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// Levels of MXFP4 and NVFP4: E2M1 doubled.
inline constexpr int8_t kLevelsE2M1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// Grids of the IQ types. A row of eight values holds value k as a 2-bit index at bit 2*k, a row of four (IQ3) as a
// 3-bit index at bit 4*k; the index selects one of the values below.
extern const uint16_t kGridIQ1[2048];
extern const uint16_t kGridIQ2_XXS[256];
extern const uint16_t kGridIQ2_XS[512];
extern const uint16_t kGridIQ2_S[1024];
extern const uint16_t kGridIQ3_XXS[256];
extern const uint16_t kGridIQ3_S[512];
inline constexpr float kValuesIQ1[3] = {-1, 0, 1};
inline constexpr float kValuesIQ2[3] = {8, 25, 43};
inline constexpr float kValuesIQ3_XXS[8] = {4, 12, 20, 28, 36, 44, 52, 62};
inline constexpr float kValuesIQ3_S[8] = {1, 3, 5, 7, 9, 11, 13, 15};

}  // namespace tersor
