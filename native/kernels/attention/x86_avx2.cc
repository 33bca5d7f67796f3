#if defined(__x86_64__)
#include "base/simd/avx2.h"
#include "kernels/attention/generic.h"

const tersor::attention::Kernels tersor::attention::avx2_kernels = TERSOR_ATTENTION_KERNELS;
#endif
