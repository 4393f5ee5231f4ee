// Checks and allocation of merge_states.
#pragma once

#include <vector>

#include "checks.h"

namespace smartkv::binding {

struct MergeInput {
  MergeStatesParams params;
  Tensor o, lse;  // own what `params` points to, where it had to be made contiguous
  Tensor out, out_lse;
};

// o (num_states, ..., head_dim), lse (num_states, ...); rows is the product of the middle sizes.
inline MergeInput merge_input(const Tensor& o, const Tensor& lse) {
  MergeStatesParams params{};
  params.dtype = float_dtype(o, "o");
  check_dtype(lse, "lse", ScalarType::Float);
  const int64_t dim = o.dim();
  check(dim >= 2, "o must have shape (num_states, ..., head_dim); got ", dim, " dimension(s)");
  const auto sizes = o.sizes();
  const auto lse_sizes = lse.sizes();
  bool same = lse.dim() == dim - 1;
  for (int64_t i = 0; same && i < dim - 1; ++i) same = sizes[i] == lse_sizes[i];
  check(same, "lse must have the shape of o without its last dimension");
  check(sizes[0] >= 1, "num_states of o must be at least 1; got ", sizes[0]);
  params.num_states = sizes[0];
  params.head_dim = check_head_dim(sizes[dim - 1]);
  params.rows = lse.numel() / params.num_states;
  const std::vector<int64_t> out_sizes(sizes.begin() + 1, sizes.end());
  const std::vector<int64_t> lse_out_sizes(out_sizes.begin(), out_sizes.end() - 1);
  MergeInput input{params, torch::stable::contiguous(o), torch::stable::contiguous(lse),
                   torch::stable::new_empty(o, out_sizes),
                   torch::stable::new_empty(lse, lse_out_sizes)};
  input.params.o = input.o.const_data_ptr();
  input.params.lse = input.lse.const_data_ptr<float>();
  input.params.out = input.out.mutable_data_ptr();
  input.params.out_lse = input.out_lse.mutable_data_ptr<float>();
  return input;
}

}  // namespace smartkv::binding
