#if defined(__x86_64__)
#include "base/simd/avx512vnni.h"
#include "kernels/elementwise/generic.h"

const tersor::elementwise::Kernels tersor::elementwise::avx512vnni_kernels = TERSOR_ELEMENTWISE_KERNELS;
#endif
