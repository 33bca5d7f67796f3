// Looking tokens up in a stored tensor, for those who do it again and again.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "bindings/op_arrays.h"

namespace tersor::ops_bindings {

// out (n, columns) = scale * the tokens' rows; tokens (n) are in range.
using Embed = std::function<void(const int32_t* tokens, int64_t n, float* out)>;

// Arguments as of `embed`; keeps the arrays. Raises ValueError for what embed refuses.
Embed embedding(const std::string& format, int64_t rows, int64_t columns, nb::dict arrays, float scale);

inline void require_tokens(const char* op, const int32_t* tokens, int64_t n, int64_t rows) {
  for (int64_t i = 0; i < n; ++i)
    require(tokens[i] >= 0 && tokens[i] < rows, op, ": token ", tokens[i], ", need 0 to ", rows - 1);
}

}  // namespace tersor::ops_bindings
