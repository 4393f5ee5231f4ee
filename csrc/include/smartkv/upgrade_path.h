// How select_kv spends bytes: the lower convex hull of (page bytes, distortion) from "evicted"
// through the tiers. Twin of upgrade_path in smartkv_ext/reference/select.py.
#pragma once

#include "smartkv/params.h"

namespace smartkv {

// One step of the hull.
struct UpgradeStep {
  int tier;
  int64_t bytes;  // beyond the step before
  double slope;   // distortion removed per byte
};

struct UpgradePath {
  UpgradeStep steps[MAX_TIERS];
  int count;

  constexpr const UpgradeStep& operator[](int i) const { return steps[i]; }
  // First tier that a step passes.
  constexpr int from_tier(int step) const { return step > 0 ? steps[step - 1].tier + 1 : 0; }
};

inline UpgradePath make_upgrade_path(const SelectParams& p) {
  UpgradePath path{};
  int tier = -1;
  int64_t bytes = 0;
  double error = p.evict_distortion;
  while (true) {
    UpgradeStep best{-1, 0, 0.0};
    for (int t = tier + 1; t < p.num_tiers; ++t) {
      const double slope = (error - p.distortion[t]) / static_cast<double>(p.page_bytes[t] - bytes);
      if (slope > 0 && (best.tier < 0 || slope > best.slope)) {
        best = {t, p.page_bytes[t] - bytes, slope};
      }
    }
    if (best.tier < 0) return path;
    path.steps[path.count++] = best;
    tier = best.tier;
    bytes = p.page_bytes[tier];
    error = p.distortion[tier];
  }
}

}  // namespace smartkv
