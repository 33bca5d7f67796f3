#include "base/simd/scalar.h"

#include "kernels/elementwise/generic.h"

const tersor::elementwise::Kernels tersor::elementwise::scalar_kernels = TERSOR_ELEMENTWISE_KERNELS;
