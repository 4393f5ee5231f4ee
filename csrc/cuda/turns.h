// The part of a key's shift that turns with its position (smartkv/turns.h).
#pragma once

#include "rotation.h"
#include "smartkv/turns.h"

namespace smartkv {

// EXACT: product and sum are rounded, as the CPU kernels encode.
template <bool EXACT>
__device__ __forceinline__ float multiply_add(float a, float b, float c) {
  return EXACT ? __fadd_rn(__fmul_rn(a, b), c) : fmaf(a, b, c);
}

struct SinCos {
  float sin, cos;
};

template <bool EXACT>
__device__ __forceinline__ SinCos sin_cos(int position, int step) {
  const unsigned angle = static_cast<unsigned>(position) * static_cast<unsigned>(step);
  const float z = static_cast<float>(static_cast<int>(angle)) * Wave::HALF_TURNS_PER_UNIT;
  const float square = __fmul_rn(z, z);
  constexpr float SIN[] = {Wave::SIN[0], Wave::SIN[1], Wave::SIN[2], Wave::SIN[3], Wave::SIN[4]};
  constexpr float COS[] = {Wave::COS[0], Wave::COS[1], Wave::COS[2], Wave::COS[3], Wave::COS[4]};
  float sin = SIN[Wave::TERMS - 1], cos = COS[Wave::TERMS - 1];
#pragma unroll
  for (int i = Wave::TERMS - 2; i >= 0; --i) {
    sin = multiply_add<EXACT>(sin, square, SIN[i]);
    cos = multiply_add<EXACT>(cos, square, COS[i]);
  }
  return {__fmul_rn(sin, z), cos};
}

// row += SIGN * what turns of a key at a position, by the half of the warp that has the key; the
// other half only takes part. Lane i of it has the wave of turn i.
template <int SIGN, int HEAD_DIM>
__device__ __forceinline__ void turn_row(HeadRow<HEAD_DIM>& row, const KeyShift& shift,
                                         int position, bool is_key) {
  const int lane = threadIdx.x % HALF_WARP;
  const SinCos mine = sin_cos<true>(position, shift.steps[min(lane, shift.turns - 1)]);
  for (int i = 0; i < 2 * shift.turns; ++i) {
    const float wave = __shfl_sync(ALL_LANES, i % 2 == 0 ? mine.cos : mine.sin, i / 2, HALF_WARP);
    const __half* const vector = reinterpret_cast<const __half*>(shift.vectors) + i * HEAD_DIM;
    if (!is_key) continue;
#pragma unroll
    for (int r = 0; r < HEAD_DIM / HALF_WARP; ++r) {
      const float value = to_float(vector[lane + HALF_WARP * r]);
      row.at[r] = multiply_add<true>(value, SIGN * wave, row.at[r]);
    }
  }
}

}  // namespace smartkv
