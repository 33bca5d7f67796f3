#include "base/simd/scalar.h"

#include "kernels/attention/generic.h"

const tersor::attention::Kernels tersor::attention::scalar_kernels = TERSOR_ATTENTION_KERNELS;
