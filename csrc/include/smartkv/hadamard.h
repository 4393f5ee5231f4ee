// Orders of the orthonormal Hadamard rotation and the Paley-I matrices of order 12 and 20.
// Twin of smartkv_ext/reference/hadamard.py.
#pragma once

namespace smartkv {

// head_dim = paley * sylvester
constexpr int paley_order(int head_dim) { return head_dim == 80 ? 20 : head_dim == 96 ? 12 : 1; }
constexpr int sylvester_order(int head_dim) { return head_dim / paley_order(head_dim); }

constexpr float rotation_scale(int head_dim) {
  return head_dim == 64    ? 0.125f
         : head_dim == 80  ? 0.11180339887498948482f
         : head_dim == 96  ? 0.10206207261596575409f
         : head_dim == 128 ? 0.08838834764831844055f
                           : 0.0625f;
}

template <int ORDER>
struct PaleyMatrix {
  float at[ORDER][ORDER];
};

// I + [[0, 1], [-1, chi(i - j)]] for the quadratic character chi of the field of ORDER - 1.
template <int ORDER>
constexpr PaleyMatrix<ORDER> make_paley() {
  constexpr int Q = ORDER - 1;
  bool square[Q] = {};
  for (int i = 1; i < Q; ++i) square[i * i % Q] = true;
  PaleyMatrix<ORDER> matrix{};
  for (int i = 0; i < ORDER; ++i) {
    for (int j = 0; j < ORDER; ++j) {
      const bool plus = i == j || i == 0 || (j > 0 && square[(i - j + Q) % Q]);
      matrix.at[i][j] = plus ? 1.0f : -1.0f;
    }
  }
  return matrix;
}

}  // namespace smartkv
