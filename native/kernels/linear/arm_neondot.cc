#if defined(__aarch64__)
#include "base/simd/neondot.h"
#include "kernels/linear/generic.h"

const tersor::linear::Kernels tersor::linear::neondot_kernels = TERSOR_LINEAR_KERNELS;
#endif
