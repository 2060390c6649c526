// Generalised advantage estimation (arXiv 1506.02438) over runs of a flat array.
#pragma once

#include "array.h"

namespace twinhead {

template <typename T>
struct GaeArrays {
  Array<const T> rewards;                // (N,)
  Array<const T> values;                 // (N,)
  Array<const std::int64_t> offsets;     // (S+1,): run s owns [offsets[s], offsets[s + 1])
  Array<const bool> mask;                // (N,) or absent: every element is an action
  Array<const T> bootstrap;              // (S,) or absent: 0
  Array<T> advantages;                   // (N,), written
  Array<T> returns;                      // (N,), written
};

// With `whitens` the advantages end with mean 0 and variance 1 over all actions; the returns are what they are without.
template <typename T>
void gae(const GaeArrays<T>& arrays, double gamma, double lam, bool whitens, int threads);

}  // namespace twinhead
