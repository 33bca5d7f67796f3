#if defined(__x86_64__)
#include "base/simd/avx2.h"
#include "kernels/linear/generic.h"

const tersor::linear::Kernels tersor::linear::avx2_kernels = TERSOR_LINEAR_KERNELS;
#endif
