#if defined(__x86_64__) && defined(TERSOR_HAS_AMX)
#include "base/simd/amx.h"
#include "kernels/linear/generic.h"
#include "kernels/linear/generic_matrix.h"

const tersor::linear::Kernels tersor::linear::amx_kernels = TERSOR_LINEAR_KERNELS;
const tersor::linear::MatrixKernels tersor::linear::amx_matrix_kernels = TERSOR_MATRIX_KERNELS;
#endif
