// A loop that does nothing but read: the measure of what memory can deliver to the kernels' threads.
#pragma once

#include <cstdint>

namespace tersor {

// Returns the sum, modulo 2^64, of n words, read by the threads of parallel_for.
uint64_t read_words(const uint64_t* words, int64_t n);

}  // namespace tersor
