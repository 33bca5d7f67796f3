#include "base/simd/scalar.h"

#include "kernels/linear/generic.h"

const tersor::linear::Kernels tersor::linear::scalar_kernels = TERSOR_LINEAR_KERNELS;
