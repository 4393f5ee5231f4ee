#include "checks.h"

#include <limits>

#include "smartkv/layout.h"

namespace smartkv::binding {

namespace {

template <typename Sizes>
std::string shape_text(const Sizes& sizes) {
  std::ostringstream text;
  text << '(';
  size_t i = 0;
  for (const int64_t size : sizes) text << (i++ == 0 ? "" : ", ") << size;
  text << (i == 1 ? ",)" : ")");
  return text.str();
}

template <typename Values>
std::string list_text(const Values& values) {
  std::ostringstream text;
  bool first = true;
  for (const auto value : values) {
    text << (first ? "" : ", ") << value;
    first = false;
  }
  return text.str();
}

}  // namespace

const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(dtype);
  }
}

ScalarType scalar_type(DType dtype) {
  return dtype == DType::FLOAT32    ? ScalarType::Float
         : dtype == DType::BFLOAT16 ? ScalarType::BFloat16
                                    : ScalarType::Half;
}

DType float_dtype(ScalarType dtype, const char* name) {
  if (dtype == ScalarType::Float) return DType::FLOAT32;
  if (dtype == ScalarType::BFloat16) return DType::BFLOAT16;
  check(dtype == ScalarType::Half, name, " must be float32, bfloat16 or float16; got ",
        dtype_name(dtype));
  return DType::FLOAT16;
}

DType float_dtype(const Tensor& tensor, const char* name) {
  return float_dtype(tensor.scalar_type(), name);
}

void check_dtype(const Tensor& tensor, const char* name, ScalarType dtype) {
  const ScalarType got = tensor.scalar_type();
  if (got != dtype) check(false, name, " must be ", dtype_name(dtype), "; got ", dtype_name(got));
}

void check_dim(const Tensor& tensor, const char* name, int64_t dim, const char* dims) {
  if (tensor.dim() != dim) {
    check(false, name, " must have ", dim, " dimensions ", dims, "; got shape ",
          shape_text(tensor.sizes()));
  }
}

void check_shape(const Tensor& tensor, const char* name, Shape shape, const char* dims) {
  const auto sizes = tensor.sizes();
  bool same = sizes.size() == shape.size();
  for (size_t i = 0; same && i < shape.size(); ++i) same = sizes[i] == shape.begin()[i];
  if (!same) {
    check(false, name, " must have shape ", dims, " = ", shape_text(shape), "; got ",
          shape_text(sizes));
  }
}

Tensor dense_input(const Place& place, const Tensor& tensor, const char* name, ScalarType dtype,
                   Shape shape, const char* dims) {
  place.check(tensor, name);
  check_dtype(tensor, name, dtype);
  check_shape(tensor, name, shape, dims);
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

HeadsView heads_view(const Place& place, const Tensor& tensor, const char* name, DType dtype) {
  place.check(tensor, name);
  check_dtype(tensor, name, scalar_type(dtype));
  check_dim(tensor, name, 4, "(batch, heads, n, head_dim)");
  const auto strides = tensor.strides();
  check(strides[3] == 1 || tensor.numel() == 0, name,
        " must be contiguous in its last dimension; got stride ", strides[3]);
  return {tensor.const_data_ptr(), dtype, strides[0], strides[1], strides[2]};
}

int check_tier(int64_t bits) {
  if (!is_supported_tier(bits)) {
    check(false, "bits must be one of ", list_text(TIERS), "; got ", bits);
  }
  return static_cast<int>(bits);
}

int check_head_dim(int64_t head_dim) {
  if (head_dim > MAX_HEAD_DIM || !is_supported_head_dim(static_cast<int>(head_dim))) {
    check(false, "head_dim must be one of ", list_text(HEAD_DIMS), "; got ", head_dim);
  }
  return static_cast<int>(head_dim);
}

int check_num_heads(int64_t num_heads, int64_t num_kv_heads, const char* name) {
  check_int32(num_heads, "num_heads", 1);
  check(num_heads % num_kv_heads == 0, "num_heads of ", name, " (", num_heads,
        ") must be a multiple of num_kv_heads (", num_kv_heads, ")");
  return static_cast<int>(num_heads);
}

int check_int32(int64_t value, const char* name, int64_t least) {
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  check(value >= least && value <= most, name, " must be in [", least, ", ", most, "]; got ",
        value);
  return static_cast<int>(value);
}

static std::string take_string(StringHandle handle) {
  const char* data = nullptr;
  size_t length = 0;
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  std::string text(data, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return text;
}

Precision take_precision(StringHandle handle) {
  const std::string precision = take_string(handle);
  if (precision == "auto") return Precision::AUTO;
  if (precision == "fp32") return Precision::FLOAT32;
  if (precision == "int16") return Precision::INT16;
  check(precision == "int8", "precision must be one of auto, fp32, int16, int8; got '", precision,
        "'");
  return Precision::INT8;
}

Levels take_levels(StringHandle handle) {
  const std::string levels = take_string(handle);
  if (levels == "gaussian") return Levels::GAUSSIAN;
  check(levels == "uniform", "levels must be one of uniform, gaussian; got '", levels, "'");
  return Levels::UNIFORM;
}

Parallel torch_parallel() {
  const auto run = [](int64_t count, void* context, void (*fn)(void*, int64_t, int64_t)) {
    torch::stable::parallel_for(
        0, count, 1, [context, fn](int64_t begin, int64_t end) { fn(context, begin, end); });
  };
  return {run, static_cast<int>(torch::stable::get_num_threads())};
}

}  // namespace smartkv::binding
