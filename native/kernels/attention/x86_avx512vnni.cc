#if defined(__x86_64__)
#include "base/simd/avx512vnni.h"
#include "kernels/attention/generic.h"

const tersor::attention::Kernels tersor::attention::avx512vnni_kernels = TERSOR_ATTENTION_KERNELS;
#endif
