// Argument checks shared by all bindings. Each failure names the argument, what came and what is
// accepted, and is raised in Python as RuntimeError with exactly that sentence.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "place.h"
#include "smartkv/params.h"

namespace smartkv::binding {

using torch::headeronly::ScalarType;
using Shape = std::initializer_list<int64_t>;

// The parts are formatted only on failure. Not STD_TORCH_CHECK: it would put the function, file
// and line of the build tree before the sentence.
template <typename... Parts>
inline void check(bool ok, const Parts&... parts) {
  if (ok) [[likely]] {
    return;
  }
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// Name as in Python: "float32", "int8".
const char* dtype_name(ScalarType dtype);
ScalarType scalar_type(DType dtype);

// float32, bfloat16 or float16; anything else is refused.
DType float_dtype(const Tensor& tensor, const char* name);
DType float_dtype(ScalarType dtype, const char* name);

void check_dtype(const Tensor& tensor, const char* name, ScalarType dtype);
void check_dim(const Tensor& tensor, const char* name, int64_t dim, const char* dims);
// dims names the axes of `shape`: "(batch, num_kv_heads, n)".
void check_shape(const Tensor& tensor, const char* name, Shape shape, const char* dims);

// A read-only tensor of exactly this place, dtype and shape; copied only if it is not contiguous.
Tensor dense_input(const Place& place, const Tensor& tensor, const char* name, ScalarType dtype,
                   Shape shape, const char* dims);

// A (batch, heads, n, head_dim) tensor of any strides but a contiguous last dimension.
HeadsView heads_view(const Place& place, const Tensor& tensor, const char* name, DType dtype);

int check_tier(int64_t bits);
int check_head_dim(int64_t head_dim);
// Of the tensor `name`.
int check_num_heads(int64_t num_heads, int64_t num_kv_heads, const char* name);
// Sizes that kernels hold in an int or in an int32 position; at least `least`.
int check_int32(int64_t value, const char* name, int64_t least);

// Consumes the handle. Not a std::string parameter: that conversion of the stable ABI leaks one
// string per call (seen in the headers of torch 2.13).
Levels take_levels(StringHandle handle);
Precision take_precision(StringHandle handle);

// The threads of torch, for the kernels.
Parallel torch_parallel();

}  // namespace smartkv::binding
