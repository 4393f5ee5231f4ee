// Bindings of gate_score and select_kv.
#include <array>
#include <cmath>
#include <vector>

#include "checks.h"
#include "register.h"

namespace smartkv::binding {
namespace {

std::string indexed(const char* name, size_t i) {
  return std::string(name) + "[" + std::to_string(i) + "]";
}

// (num_layers, num_kv_heads, out, in) weights whose `in` is the previous layer's `out`, then
// biases.
void fill_linears(GateScoreParams& params, const Place& place, const std::vector<Tensor>& weights,
                  const std::vector<Tensor>& biases, std::vector<Tensor>& owned) {
  const size_t count = weights.size();
  check(count == 2 || count == 3, "weights must have 2 or 3 tensors; got ", count);
  check(biases.size() == count, "biases must have one tensor per weight (", count, "); got ",
        biases.size());
  params.num_linear = static_cast<int>(count);
  for (size_t i = 0; i < count; ++i) {
    const std::string weight = indexed("weights", i), bias = indexed("biases", i);
    check_dim(weights[i], weight.c_str(), 4, "(num_layers, num_kv_heads, out, in)");
    const int64_t out = i + 1 == count ? 1 : weights[i].size(2);
    params.sizes[i + 1] = check_int32(out, "out of weights", 1);
    owned.push_back(dense_input(place, weights[i], weight.c_str(), ScalarType::Float,
                                {params.num_layers, params.num_kv_heads, out, params.sizes[i]},
                                "(num_layers, num_kv_heads, out, in)"));
    params.weights[i] = owned.back().const_data_ptr<float>();
    owned.push_back(dense_input(place, biases[i], bias.c_str(), ScalarType::Float,
                                {params.num_layers, params.num_kv_heads, out},
                                "(num_layers, num_kv_heads, out)"));
    params.biases[i] = owned.back().const_data_ptr<float>();
  }
}

Tensor gate_score(const std::vector<Tensor>& keys, const std::vector<Tensor>& weights,
                  const std::vector<Tensor>& biases) {
  check(!keys.empty(), "keys must have at least one tensor; got 0");
  GateScoreParams params{};
  const Place place(keys[0], "keys[0]");
  const DType dtype = float_dtype(keys[0], "keys[0]");
  std::vector<HeadsView> views;
  for (size_t i = 0; i < keys.size(); ++i) {
    const std::string name = indexed("keys", i);
    views.push_back(heads_view(place, keys[i], name.c_str(), dtype));
    const auto sizes = keys[0].sizes();
    check_shape(keys[i], name.c_str(), {sizes[0], sizes[1], sizes[2], sizes[3]}, "of keys[0]");
  }
  const auto sizes = keys[0].sizes();
  params.keys = views.data();
  params.num_layers = check_int32(static_cast<int64_t>(keys.size()), "num_layers", 1);
  params.batch = check_int32(sizes[0], "batch", 1);
  params.num_kv_heads = check_int32(sizes[1], "num_kv_heads", 1);
  params.kv_len = check_int32(sizes[2], "n", 0);
  params.sizes[0] = check_head_dim(sizes[3]);
  std::vector<Tensor> owned;
  fill_linears(params, place, weights, biases, owned);
  const Tensor scores = torch::stable::new_empty(
      keys[0], {params.num_layers, sizes[0], sizes[1], sizes[2]}, ScalarType::Float);
  params.scores = scores.mutable_data_ptr<float>();
  if (params.kv_len > 0) place.run(&KernelTable::gate_score, params);
  return scores;
}

// The convex hull of tiers divides by differences of page_bytes: they must be strictly ascending.
void fill_costs(SelectParams& params, const std::vector<int64_t>& page_bytes,
                const std::vector<double>& distortion) {
  check(!page_bytes.empty() && page_bytes.size() <= MAX_TIERS, "page_bytes must have 1 to ",
        MAX_TIERS, " entries; got ", page_bytes.size());
  check(distortion.size() == page_bytes.size(), "distortion must have one entry per page_bytes (",
        page_bytes.size(), "); got ", distortion.size());
  params.num_tiers = static_cast<int>(page_bytes.size());
  for (int t = 0; t < params.num_tiers; ++t) {
    check(page_bytes[t] > (t == 0 ? 0 : page_bytes[t - 1]),
          "page_bytes must be positive and ascending; got ", page_bytes[t], " at index ", t);
    check(std::isfinite(distortion[t]), "distortion must be finite; got ", distortion[t]);
    params.page_bytes[t] = page_bytes[t];
    params.distortion[t] = distortion[t];
  }
}

void check_select_values(const SelectParams& params) {
  for (int64_t i = 0; i < params.groups * params.heads * params.n; ++i) {
    const int tier = params.current[i];
    check(tier >= -1 && tier <= params.num_tiers, "current must be in [-1, ", params.num_tiers,
          "] (-1: no token, ", params.num_tiers, ": full precision); got ", tier);
  }
  for (int64_t g = 0; g < params.groups; ++g) {
    check(params.budgets[g] >= 0, "budgets must be at least 0; got ", params.budgets[g]);
  }
}

Tensor select_kv(const Tensor& scores, const Tensor& current, const Tensor& budgets,
                 const std::vector<int64_t>& page_bytes, const std::vector<double>& distortion,
                 double evict_distortion, double zipf_offset) {
  SelectParams params{};
  fill_costs(params, page_bytes, distortion);
  check(std::isfinite(evict_distortion), "evict_distortion must be finite; got ", evict_distortion);
  check(std::isfinite(zipf_offset) && zipf_offset > 0,
        "zipf_offset must be finite and above 0; got ", zipf_offset);
  const Place place(scores, "scores");
  check_dim(scores, "scores", 3, "(groups, heads, n)");
  const auto sizes = scores.sizes();
  const Shape shape = {sizes[0], sizes[1], sizes[2]};
  check_int32(sizes[1] * sizes[2], "heads * n", 0);
  const Tensor score =
      dense_input(place, scores, "scores", ScalarType::Float, shape, "(groups, heads, n)");
  const Tensor present =
      dense_input(place, current, "current", ScalarType::Char, shape, "(groups, heads, n)");
  const Tensor budget =
      dense_input(place, budgets, "budgets", ScalarType::Long, {sizes[0]}, "(groups)");
  params.scores = score.const_data_ptr<float>();
  params.current = present.const_data_ptr<int8_t>();
  params.budgets = budget.const_data_ptr<int64_t>();
  params.groups = sizes[0];
  params.heads = sizes[1];
  params.n = sizes[2];
  params.evict_distortion = evict_distortion;
  params.zipf_offset = zipf_offset;
  if (place.has_readable_values()) check_select_values(params);
  const Tensor tiers =
      torch::stable::new_empty(scores, {sizes[0], sizes[1], sizes[2]}, ScalarType::Char);
  params.tiers = tiers.mutable_data_ptr<int8_t>();
  if (tiers.numel() > 0) place.run(&KernelTable::select_kv, params);
  return tiers;
}

}  // namespace

SMARTKV_REGISTER_OPS(m) {
  m.impl("gate_score", TORCH_BOX(&gate_score));
  m.impl("select_kv", TORCH_BOX(&select_kv));
}

}  // namespace smartkv::binding
