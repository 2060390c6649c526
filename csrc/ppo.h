// The PPO loss on tokens, its statistics and its slopes in one pass; what they mean stands in kernels/ppo.
#pragma once

#include "array.h"

namespace twinhead {

constexpr std::int64_t kPpoStatistics = 10;

template <typename T>
struct PpoTokens {  // (R,) each
  Array<const T> logprobs, old_logprobs, advantages;
  Array<const T> values, old_values, returns;
  Array<const T> entropy;   // or absent: 0
  Array<const bool> mask;   // or absent: every element is an action; the others are never computed with
};

struct PpoSettings {
  double clip_low, clip_high;
  double dual_clip, value_clip;  // infinity: off
  double value_coef, entropy_coef;
  double divisor;  // of all sums, at least 1; 0: the number of actions
};

template <typename T>
struct PpoResults {
  Array<T> loss;        // (1,), written
  Array<T> statistics;  // (10,), written, in the order of STATISTICS in kernels/_surrogate.py
  Array<T> slopes;      // (2 R,) or with entropy (3 R,), written: d loss by logprobs, values, entropy; or absent
};

template <typename T>
void ppo_loss(const PpoTokens<T>& tokens, const PpoSettings& settings, const PpoResults<T>& results, int threads);

}  // namespace twinhead
