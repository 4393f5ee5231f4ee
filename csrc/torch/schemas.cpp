// The ops of the extension. Shapes and dtypes: docs/design/ops.md.
#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(smartkv, m) {
  m.def(
      "quantize_kv(Tensor k, Tensor v, Tensor k_mean, Tensor positions, Tensor scores, int bits, "
      "str levels, Tensor? k_turns=None, Tensor? turn_steps=None, Tensor? k_weights=None) -> "
      "Tensor");
  m.def(
      "dequantize_kv(Tensor pages, Tensor k_mean, int head_dim, int bits, str levels, "
      "ScalarType dtype, Tensor? k_turns=None, Tensor? turn_steps=None, Tensor? k_weights=None) -> "
      "(Tensor, Tensor)");
  m.def(
      "append_kv(Tensor(a!)[] pools, Tensor block_table, Tensor(b!) cache_seqlens, Tensor k, "
      "Tensor v, Tensor k_mean, Tensor positions, Tensor scores, Tensor tiers, int[] tier_bits, "
      "str levels, Tensor? k_turns=None, Tensor? turn_steps=None, Tensor? k_weights=None) -> ()");
  m.def(
      "decode_attention(Tensor q, Tensor[] pools, Tensor block_table, Tensor cache_seqlens, "
      "Tensor k_mean, Tensor k_window, Tensor v_window, Tensor window_positions, Tensor q_start, "
      "int[] tier_bits, str levels, float softmax_scale, int sliding_window=0, "
      "bool return_mass=False, str precision=\"auto\", Tensor? k_turns=None, "
      "Tensor? turn_steps=None, Tensor? k_weights=None) -> (Tensor out, Tensor lse, Tensor mass, "
      "Tensor window_mass)");
  m.def(
      "attention_mass(Tensor q, Tensor k, Tensor k_positions, Tensor q_start, float softmax_scale, "
      "int sliding_window=0, Tensor? lse=None) -> Tensor");
  m.def(
      "select_kv(Tensor scores, Tensor current, Tensor budgets, int[] page_bytes, "
      "float[] distortion, float evict_distortion=1.0, float zipf_offset=64.0) -> Tensor");
  m.def(
      "compact_kv(Tensor(a!)[] pools, Tensor block_table, Tensor(b!) cache_seqlens, "
      "Tensor targets, Tensor k_mean, int[] tier_bits, str levels, ScalarType dtype, "
      "Tensor? k_turns=None, Tensor? turn_steps=None, Tensor? k_weights=None) -> ()");
  m.def("merge_states(Tensor o, Tensor lse) -> (Tensor, Tensor)");
  m.def("gate_score(Tensor[] keys, Tensor[] weights, Tensor[] biases) -> Tensor");
  m.def("change_basis(Tensor x, Tensor matrix, Tensor? origin=None, Tensor? shift=None) -> Tensor");
}

// `import smartkv_ext._C` runs the registrations above; the module itself is empty.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
