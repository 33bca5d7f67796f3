#if defined(__x86_64__)
#include "base/simd/avxvnni.h"
#include "kernels/linear/generic.h"

const tersor::linear::Kernels tersor::linear::avxvnni_kernels = TERSOR_LINEAR_KERNELS;
#endif
