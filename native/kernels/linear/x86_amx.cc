#if defined(__x86_64__) && defined(TERSOR_HAS_AMX)
#include "base/simd/amx.h"
#include "kernels/linear/generic_matrix.h"

const tersor::linear::MatrixKernels tersor::linear::amx_matrix_kernels = TERSOR_MATRIX_KERNELS;
#endif
