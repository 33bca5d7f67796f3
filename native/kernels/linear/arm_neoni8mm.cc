#if defined(__aarch64__)
#include "base/simd/neoni8mm.h"
#include "kernels/linear/generic.h"

const tersor::linear::Kernels tersor::linear::neoni8mm_kernels = TERSOR_LINEAR_KERNELS;
#endif
