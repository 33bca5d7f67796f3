#if defined(__x86_64__)
#include "base/simd/avx2.h"
#include "kernels/elementwise/generic.h"

const tersor::elementwise::Kernels tersor::elementwise::avx2_kernels = TERSOR_ELEMENTWISE_KERNELS;
#endif
