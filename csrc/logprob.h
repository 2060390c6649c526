// Log-probabilities of chosen words and entropies, from rows of logits: u = logits / temperature, p = softmax(u).
#pragma once

#include <vector>

#include "array.h"

namespace twinhead {

// The rows of an array (..., V) whose last dimension has no gaps.
template <typename T>
struct Rows {
  const T* data;
  std::vector<std::int64_t> sizes, strides;  // of the leading dimensions; strides in elements
  std::int64_t count, width;

  const T* operator[](std::int64_t row) const {
    std::int64_t offset = 0;
    for (std::size_t d = sizes.size(); d-- > 0; row /= sizes[d]) offset += row % sizes[d] * strides[d];
    return data + offset;
  }
};

template <typename T>
struct Choices {
  Rows<T> logits;                   // (R, V)
  Array<const std::int64_t> index;  // (R, K), in [0, V) in rows that count
  Array<const bool> mask;           // (R,): the rows that count; or absent: all
  std::int64_t words;               // K
  double temperature;
};

// Both arrays of results are 0 in rows that do not count.
template <typename T>
struct Likelihood {
  Array<T> logprobs;  // (R, K): u - log sum exp u at the words of index
  Array<T> entropy;   // (R,): -sum p log p; or absent
  Array<T> lse;       // (R, 2): a logit c, and log sum exp((logits - c) / temperature)
};

template <typename T>
struct LikelihoodGradient {
  Array<const T> lse;       // (R, 2), as found
  Array<const T> entropy;   // (R,), as found; or absent, and then so is dentropy
  Array<const T> dlogprobs; // (R, K)
  Array<const T> dentropy;  // (R,) or absent
};

// Reads the logits once.
template <typename T>
void logprob(const Choices<T>& choices, const Likelihood<T>& found, int threads);

// Reads the logits once and writes dlogits, (R, V), once.
template <typename T>
void logprob_gradient(const Choices<T>& choices, const LikelihoodGradient<T>& gradient, Array<T> dlogits, int threads);

}  // namespace twinhead
