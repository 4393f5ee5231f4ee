// merge_states, gate_score and change_basis against plain double precision.
#include "basis_problem.h"
#include "gate_problem.h"
#include "not_finite.h"

using namespace smartkv;
using testing::Dense;
using testing::is_close;

namespace {

void test_merge(const KernelTable& kernels) {
  Dense o(DType::FLOAT32, 3, 1, 4, 64), out(DType::FLOAT32, 1, 1, 4, 64);
  o.fill_normal();
  std::vector<float> lse = testing::normals(12), merged(4);
  lse[1] = -INFINITY;  // an empty state may hold anything
  for (int d = 0; d < 64; ++d) o.set(64 + d, NAN);
  for (int s = 0; s < 3; ++s) lse[s * 4 + 3] = -INFINITY;
  kernels.merge_states(
      {o.bytes.data(), lse.data(), out.bytes.data(), merged.data(), o.dtype, 3, 4, 64},
      testing::parallel(2));
  for (int row = 0; row < 4; ++row) {
    double total = 0;
    for (int s = 0; s < 3; ++s) total += std::exp(double{lse[s * 4 + row]});
    CHECK(is_close(merged[row], std::log(total), 1e-6));
    for (int d = 0; d < 64; ++d) {
      double want = 0;
      for (int s = 0; s < 3; ++s) {
        const double weight = total > 0 ? std::exp(double{lse[s * 4 + row]}) / total : 0;
        if (weight > 0) want += weight * o.get((s * 4 + row) * 64 + d);
      }
      CHECK(is_close(out.get(row * 64 + d), want, 1e-6));
    }
  }
}

}  // namespace

int main() {
  for (const KernelTable* kernels : testing::all_kernels()) {
    test_merge(*kernels);
    check_gate_keeps_nan(*kernels, {64, 16, 1}, DType::FLOAT32, 3);
    check_merge_keeps_nan(*kernels);
    check_gate(*kernels, {128, 32, 1}, DType::BFLOAT16);
    check_gate(*kernels, {80, 24, 7, 1}, DType::FLOAT32);
    for (DType dtype : {DType::FLOAT32, DType::BFLOAT16, DType::FLOAT16}) {
      check_change_basis(*kernels, dtype, 80, 1);
      check_change_basis(*kernels, dtype, 256, 50);
    }
  }
  return testing::report("scores");
}
