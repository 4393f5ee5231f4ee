// Bindings of quantize_kv and dequantize_kv.
#include <tuple>

#include "register.h"
#include "smartkv/layout.h"
#include "turns.h"

namespace smartkv::binding {
namespace {

Tensor quantize_kv(const Tensor& k, const Tensor& v, const Tensor& k_mean, const Tensor& positions,
                   const Tensor& scores, int64_t bits, StringHandle levels,
                   const std::optional<Tensor>& k_turns, const std::optional<Tensor>& turn_steps,
                   const std::optional<Tensor>& k_weights) {
  QuantizeParams params{};
  params.levels = take_levels(levels);
  params.tier = check_tier(bits);
  const Place place(k, "k");
  const DType dtype = float_dtype(k, "k");
  params.k = heads_view(place, k, "k", dtype);
  params.v = heads_view(place, v, "v", dtype);
  const auto sizes = k.sizes();
  const Shape per_token = {sizes[0], sizes[1], sizes[2]};
  check_shape(v, "v", {sizes[0], sizes[1], sizes[2], sizes[3]}, "of k");
  params.batch = check_int32(sizes[0], "batch", 1);
  params.num_kv_heads = check_int32(sizes[1], "num_kv_heads", 1);
  params.kv_len = check_int32(sizes[2], "n", 0);
  params.head_dim = check_head_dim(sizes[3]);
  const Tensor mean =
      dense_input(place, k_mean, "k_mean", ScalarType::Float, {sizes[0], sizes[1], sizes[3]},
                  "(batch, num_kv_heads, head_dim)");
  const Tensor position = dense_input(place, positions, "positions", ScalarType::Int, per_token,
                                      "(batch, num_kv_heads, n)");
  const Tensor score = dense_input(place, scores, "scores", ScalarType::Float, per_token,
                                   "(batch, num_kv_heads, n)");
  const TurnsInput turns =
      turns_input(place, k_turns, turn_steps, k_weights, sizes[0], sizes[1], sizes[3]);
  params.turns = turns.turns;
  params.k_mean = mean.const_data_ptr<float>();
  params.positions = position.const_data_ptr<int32_t>();
  params.scores = score.const_data_ptr<float>();
  params.page_bytes = page_layout(params.tier, params.head_dim, dtype_size(dtype)).page_bytes;
  const int64_t num_pages = (params.kv_len + PAGE_SIZE - 1) / PAGE_SIZE;
  const Tensor pages = torch::stable::new_empty(
      k, {sizes[0], sizes[1], num_pages, params.page_bytes}, ScalarType::Byte);
  params.pages = static_cast<uint8_t*>(pages.mutable_data_ptr());
  if (num_pages > 0) place.run(&KernelTable::quantize_kv, params);
  return pages;
}

std::tuple<Tensor, Tensor> dequantize_kv(const Tensor& pages, const Tensor& k_mean,
                                         int64_t head_dim, int64_t bits, StringHandle levels,
                                         ScalarType dtype, const std::optional<Tensor>& k_turns,
                                         const std::optional<Tensor>& turn_steps,
                                         const std::optional<Tensor>& k_weights) {
  DequantizeParams params{};
  params.levels = take_levels(levels);
  params.tier = check_tier(bits);
  params.head_dim = check_head_dim(head_dim);
  params.dtype = float_dtype(dtype, "dtype");
  params.page_bytes =
      page_layout(params.tier, params.head_dim, dtype_size(params.dtype)).page_bytes;
  const Place place(pages, "pages");
  check_dim(pages, "pages", 4, "(batch, num_kv_heads, num_pages, page_bytes)");
  const auto sizes = pages.sizes();
  const Tensor page = dense_input(place, pages, "pages", ScalarType::Byte,
                                  {sizes[0], sizes[1], sizes[2], params.page_bytes},
                                  "(batch, num_kv_heads, num_pages, page_bytes)");
  const Tensor mean =
      dense_input(place, k_mean, "k_mean", ScalarType::Float, {sizes[0], sizes[1], head_dim},
                  "(batch, num_kv_heads, head_dim)");
  const TurnsInput turns =
      turns_input(place, k_turns, turn_steps, k_weights, sizes[0], sizes[1], head_dim);
  params.turns = turns.turns;
  params.batch = check_int32(sizes[0], "batch", 1);
  params.num_kv_heads = check_int32(sizes[1], "num_kv_heads", 1);
  params.num_pages = sizes[2];
  check_int32(sizes[2] * PAGE_SIZE, "num_pages * 64", 0);
  params.pages = page.const_data_ptr<uint8_t>();
  check(reinterpret_cast<uintptr_t>(params.pages) % 64 == 0,
        "pages must start at an address that is a multiple of 64");
  params.k_mean = mean.const_data_ptr<float>();
  const auto shape = {sizes[0], sizes[1], sizes[2] * PAGE_SIZE, head_dim};
  const Tensor k = torch::stable::new_empty(pages, shape, dtype);
  const Tensor v = torch::stable::new_empty(pages, shape, dtype);
  params.k = k.mutable_data_ptr();
  params.v = v.mutable_data_ptr();
  if (params.num_pages > 0) place.run(&KernelTable::dequantize_kv, params);
  return {k, v};
}

}  // namespace

SMARTKV_REGISTER_OPS(m) {
  m.impl("quantize_kv", TORCH_BOX(&quantize_kv));
  m.impl("dequantize_kv", TORCH_BOX(&dequantize_kv));
}

}  // namespace smartkv::binding
