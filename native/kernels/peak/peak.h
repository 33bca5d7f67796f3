// A loop that does nothing but multiply bytes: the measure of what the kernels' threads can compute.
#pragma once

#include <cstdint>

namespace tersor::peak {

// Lets every thread of parallel_for do this many rounds; returns the operations done by all of them.
int64_t multiply_bytes(int64_t rounds);

}  // namespace tersor::peak
