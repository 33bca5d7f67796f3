#if defined(__x86_64__)
#include "base/simd/avx512vnni.h"
#include "kernels/linear/generic.h"

const tersor::linear::Kernels tersor::linear::avx512vnni_kernels = TERSOR_LINEAR_KERNELS;
#endif
