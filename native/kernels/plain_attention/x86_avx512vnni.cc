#if defined(__x86_64__)
#include "base/simd/avx512vnni.h"
#include "kernels/plain_attention/generic.h"

const tersor::plain_attention::Kernels tersor::plain_attention::avx512vnni_kernels = TERSOR_PLAIN_ATTENTION_KERNELS;
#endif
