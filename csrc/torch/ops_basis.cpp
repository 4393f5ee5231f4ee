// Binding of change_basis.
#include "checks.h"
#include "register.h"

namespace smartkv::binding {
namespace {

Tensor change_basis(const Tensor& x, const Tensor& matrix, const std::optional<Tensor>& origin,
                    const std::optional<Tensor>& shift) {
  const Place place(x, "x");
  ChangeBasisParams params{};
  params.x = heads_view(place, x, "x", float_dtype(x, "x"));
  const auto sizes = x.sizes();
  check_dim(matrix, "matrix", 3, "(num_kv_heads, head_dim, head_dim)");
  const int64_t num_kv_heads = matrix.size(0), head_dim = sizes[3];
  params.batch = check_int32(sizes[0], "batch", 1);
  params.num_kv_heads = check_int32(num_kv_heads, "num_kv_heads", 1);
  params.num_heads = check_num_heads(sizes[1], num_kv_heads, "x");
  params.head_dim = check_head_dim(head_dim);
  params.n = sizes[2];
  const Tensor dense =
      dense_input(place, matrix, "matrix", ScalarType::Float, {num_kv_heads, head_dim, head_dim},
                  "(num_kv_heads, head_dim, head_dim)");
  params.matrix = dense.const_data_ptr<float>();
  const auto vectors = [&](const std::optional<Tensor>& given, const char* name) {
    std::optional<Tensor> found;
    if (given.has_value()) {
      found = dense_input(place, *given, name, ScalarType::Float, {num_kv_heads, head_dim},
                          "(num_kv_heads, head_dim)");
    }
    return found;
  };
  const std::optional<Tensor> dense_origin = vectors(origin, "origin");
  const std::optional<Tensor> dense_shift = vectors(shift, "shift");
  params.origin = dense_origin.has_value() ? dense_origin->const_data_ptr<float>() : nullptr;
  params.shift = dense_shift.has_value() ? dense_shift->const_data_ptr<float>() : nullptr;
  const Tensor out = torch::stable::new_empty(x, {sizes[0], sizes[1], sizes[2], sizes[3]});
  params.out = out.mutable_data_ptr();
  if (params.n > 0) place.run(&KernelTable::change_basis, params);
  return out;
}

}  // namespace

SMARTKV_REGISTER_OPS(m) { m.impl("change_basis", TORCH_BOX(&change_basis)); }

}  // namespace smartkv::binding
