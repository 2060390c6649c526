// Kullback-Leibler divergence of two softmax distributions, row by row; what it means stands in kernels/kl.
#pragma once

#include "array.h"
#include "simd.h"

namespace twinhead {

// Rows of words that belong to somebody else.
template <typename T>
struct RowsOf {
  T* data;
  std::int64_t stride;  // from row to row, in elements; the words of a row are side by side

  T* operator[](std::int64_t row) const { return data + row * stride; }
  explicit operator bool() const { return data != nullptr; }
};

// What is known of KL(P || Q), where P and Q are the softmax of p / temperature and of q / temperature, and a and b the
// logits less the largest one of their row.
template <typename T>
struct Divergence {
  using Real = decltype(widen(T{}));

  RowsOf<const T> p, q;  // (n, V) logits
  std::int64_t rows, words;
  double temperature;
  Array<Real> moments;  // (n, 5): p's largest logit, log sum exp((p - it) / temperature), q's two, and P's mean of a - b
};

// Writes the moments and kl (n,). A word of which P's probability is 0 adds 0.
template <typename T>
void measure_kl(const Divergence<T>& divergence, Array<typename Divergence<T>::Real> kl, int threads);

// From the moments writes the gradients of sum slopes * kl; dp and dq may be absent, and may stand where p and q do.
template <typename T>
void kl_gradient(const Divergence<T>& divergence, Array<const typename Divergence<T>::Real> slopes, RowsOf<T> dp,
                 RowsOf<T> dq, int threads);

}  // namespace twinhead
