#if defined(__aarch64__)
#include "base/simd/neondot.h"
#include "kernels/elementwise/generic.h"

const tersor::elementwise::Kernels tersor::elementwise::neondot_kernels = TERSOR_ELEMENTWISE_KERNELS;
#endif
