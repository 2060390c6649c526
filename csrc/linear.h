// What follows a block of rows of hidden @ weight.T: log-probs and entropies, and the gradient in the products' place.
// What it means stands in kernels/linear; in symbols, with cap(y) = softcap * tanh(y / softcap),
//
//     z = cap(scale * (product + bias)) / temperature,   or  z = scale * (product + bias)  where there is no softcap
#pragma once

#include "array.h"

namespace twinhead {

struct LogitShape {
  double scale;
  double softcap;  // infinity: none
  double temperature;
};

template <typename T>
struct HeadBlock {
  Array<T> products;                  // (n, V)
  Array<const T> bias;                // (V,) or absent: 0
  Array<const std::int64_t> targets;  // (n,), in [0, V), or below 0: the row is left out, and is never read
  LogitShape shape;

  std::int64_t rows() const { return targets.size; }
  std::int64_t words() const { return rows() == 0 ? 0 : products.size / rows(); }
};

// Of each row's softmax, (n,) each; a row that is left out has 0 everywhere.
template <typename T>
struct Measures {
  Array<T> entropy;
  Array<T> peak;     // the largest z
  Array<T> log_sum;  // log of the sum of exp(z - peak)
};

// A token's part of the PPO loss; the numbers of kernels/linear/objective.py.
template <typename T>
struct TokenObjective {
  Array<const T> old_logprobs, advantages;  // (n,)
  Array<const T> ref_logprobs;              // (n,) or absent
  double clip_low, clip_high;
  double dual_clip;  // infinity: none
  double kl_coef;
  int kl_estimator;  // 1, 2, 3
  double entropy_coef;
  double divisor;
};

// Writes the targets' log-probs (n,), 0 for a row that is left out, and the measures; the products stay.
template <typename T>
void measure_head(const HeadBlock<T>& block, Array<T> logprobs, const Measures<T>& measures, int threads);

// Writes over the products their gradient: that of sum slopes * logprobs + entropy_slopes * entropy, (n,) or absent: 0.
template <typename T>
void head_gradient(const HeadBlock<T>& block, const Measures<T>& measures, Array<const T> slopes,
                   Array<const T> entropy_slopes, int threads);

// Both: writes log-probs and measures, and over the products the gradient of the objective at these log-probs.
template <typename T>
void learn_head(const HeadBlock<T>& block, Array<T> logprobs, const Measures<T>& measures,
                const TokenObjective<T>& objective, int threads);

}  // namespace twinhead
