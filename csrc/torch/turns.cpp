#include "turns.h"

namespace smartkv::binding {

TurnsInput turns_input(const Place& place, const std::optional<Tensor>& k_turns,
                       const std::optional<Tensor>& turn_steps,
                       const std::optional<Tensor>& k_weights, int64_t batch, int64_t num_kv_heads,
                       int64_t head_dim) {
  TurnsInput input;
  if (k_weights.has_value()) {
    input.weights = dense_input(place, *k_weights, "k_weights", ScalarType::Float,
                                {batch, num_kv_heads, head_dim}, "(batch, num_kv_heads, head_dim)");
    input.turns.weights = input.weights->const_data_ptr<float>();
  }
  check(k_turns.has_value() == turn_steps.has_value(),
        "k_turns and turn_steps must be given together");
  if (!k_turns.has_value()) return input;
  const char* const dims = "(batch, num_kv_heads, turns, 2, head_dim)";
  check_dim(*k_turns, "k_turns", 5, dims);
  const int64_t count = k_turns->size(2);
  check(count <= MAX_TURNS, "k_turns must have at most ", MAX_TURNS, " turns; got ", count);
  input.vectors = dense_input(place, *k_turns, "k_turns", ScalarType::Half,
                              {batch, num_kv_heads, count, 2, head_dim}, dims);
  input.steps = dense_input(place, *turn_steps, "turn_steps", ScalarType::Int,
                            {batch, num_kv_heads, count}, "(batch, num_kv_heads, turns)");
  if (count == 0) return input;
  input.turns.vectors = static_cast<const uint16_t*>(input.vectors->const_data_ptr());
  input.turns.steps = input.steps->const_data_ptr<int32_t>();
  input.turns.count = static_cast<int>(count);
  return input;
}

}  // namespace smartkv::binding
