// The optional arguments k_turns, turn_steps and k_weights, which many ops take.
#pragma once

#include <optional>

#include "checks.h"

namespace smartkv::binding {

struct TurnsInput {
  Turns turns{};
  std::optional<Tensor> vectors, steps, weights;  // own what `turns` points to
};

TurnsInput turns_input(const Place& place, const std::optional<Tensor>& k_turns,
                       const std::optional<Tensor>& turn_steps,
                       const std::optional<Tensor>& k_weights, int64_t batch, int64_t num_kv_heads,
                       int64_t head_dim);

}  // namespace smartkv::binding
