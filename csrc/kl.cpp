// One pass over both rows forward, one backward. With P and Q the softmax of p / temperature and q / temperature,
//
//     KL(P || Q) = rate u / s - log s + log t,   s = sum e^(rate a),  t = sum e^(rate b),  u = sum e^(rate a) (a - b)
//
// where a and b are the logits relative to the largest one so far of their row, so that nothing large is subtracted, and
// rate = 1 / temperature. By p's logits the gradient is P rate^2 (a - b - u / s), by q's (Q - P) rate. The two a - b are
// differences without a product, which no compiler fuses and rounds in two ways: where P is certain they cancel.
#include "kl.h"

#include <cmath>
#include <limits>

#include "pages.h"

namespace twinhead {

namespace {

constexpr std::int64_t kBlock = 512;  // words whose terms are summed in the precision of the logits

// A block in the precision of the results: where it lies, or widened into a buffer. Loops run on numbers of one size.
template <typename Real>
TWINHEAD_INLINE const Real* widened(const Real* x, std::int64_t, Real*) {
  return x;
}

TWINHEAD_INLINE const float* widened(const BFloat16* __restrict x, std::int64_t length, float* __restrict buffer) {
#pragma omp simd
  for (std::int64_t i = 0; i < length; ++i) buffer[i] = widen(x[i]);
  return buffer;
}

// The reverse, to the nearest, of two to the even one; NaN stays NaN.
template <typename Real>
TWINHEAD_INLINE void narrow(const Real* __restrict x, std::int64_t length, Real* to) {
  if (x == to) return;
#pragma omp simd
  for (std::int64_t i = 0; i < length; ++i) to[i] = x[i];
}

TWINHEAD_INLINE void narrow(const float* __restrict x, std::int64_t length, BFloat16* __restrict to) {
#pragma omp simd
  for (std::int64_t i = 0; i < length; ++i) {
    const std::uint32_t bits = bits_as<std::uint32_t>(x[i]);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to[i].bits = static_cast<std::uint16_t>(x[i] == x[i] ? rounded : 0x7fc0u);
  }
}

template <typename Real>
struct Sums {
  Real p_peak, q_peak;  // the largest logits so far
  double s, t, u;       // relative to them

  // From here on relative to these.
  void raise(Real to_p, Real to_q, double rate) {
    if (to_p == p_peak && to_q == q_peak) return;
    const double p_step = (double(to_p) - p_peak) * rate, q_step = (double(to_q) - q_peak) * rate;
    const double p_fade = std::exp(-p_step), q_fade = std::exp(-q_step);
    u = s > 0 && p_fade > 0 ? p_fade * (u + s * (q_step - p_step) / rate) : 0;
    s = s > 0 ? p_fade * s : 0;
    t = t > 0 ? q_fade * t : 0;
    p_peak = to_p;
    q_peak = to_q;
  }
};

template <typename Real>
TWINHEAD_INLINE void find_peaks(const Real* __restrict p, const Real* __restrict q, std::int64_t length, Real& p_peak,
                                Real& q_peak) {
  Real high_p = p_peak, high_q = q_peak;
#pragma omp simd reduction(max : high_p, high_q)
  for (std::int64_t i = 0; i < length; ++i) {
    high_p = p[i] > high_p ? p[i] : high_p;
    high_q = q[i] > high_q ? q[i] : high_q;
  }
  p_peak = high_p;
  q_peak = high_q;
}

template <typename Real>
TWINHEAD_INLINE void add_block(const Real* __restrict p, const Real* __restrict q, std::int64_t length, Real rate,
                               Sums<Real>& sums) {
  const Real p_peak = sums.p_peak, q_peak = sums.q_peak;
  Real s = 0, t = 0, u = 0;
#pragma omp simd reduction(+ : s, t, u)
  for (std::int64_t i = 0; i < length; ++i) {
    const Real a = p[i] - p_peak, b = q[i] - q_peak, weight = exp_nonpositive(a * rate);
    const Real term = weight * (a - b);  // NaN if both are -inf
    s += weight;
    t += exp_nonpositive(b * rate);
    u += weight > 0 ? term : Real(0);
  }
  sums.s += s;
  sums.t += t;
  sums.u += u;
}

template <typename T, typename Real>
TWINHEAD_CLONES void sum_row(const T* p, const T* q, std::int64_t words, double rate, Sums<Real>* found) {
  constexpr Real kLowest = std::numeric_limits<Real>::lowest();
  Sums<Real> sums{kLowest, kLowest, 0, 0, 0};
  Real p_buffer[kBlock], q_buffer[kBlock];
  for_blocks<kBlock>(words, [&](std::int64_t begin, std::int64_t length) {
    const Real* p_block = widened(p + begin, length, p_buffer);
    const Real* q_block = widened(q + begin, length, q_buffer);
    Real p_peak = sums.p_peak, q_peak = sums.q_peak;
    find_peaks(p_block, q_block, length, p_peak, q_peak);
    sums.raise(p_peak, q_peak, rate);
    add_block(p_block, q_block, length, static_cast<Real>(rate), sums);
  });
  *found = sums;
}

template <typename Real>
struct Slope {
  Real p_peak, p_log, q_peak, q_log, mean, slope, rate;
};

// dp may be p itself, so it is not restricted; a word is read before it is written.
template <typename Real>
TWINHEAD_INLINE void slope_of_p(const Real* p, const Real* q, std::int64_t length, const Slope<Real>& row, Real* dp) {
  const Slope<Real> r = row;
  const Real factor = r.slope * r.rate * r.rate;
#pragma omp simd
  for (std::int64_t i = 0; i < length; ++i) {
    const Real a = p[i] - r.p_peak, b = q[i] - r.q_peak, probability = exp_nonpositive(a * r.rate - r.p_log);
    const Real slope = factor * probability * (a - b - r.mean);
    dp[i] = probability > 0 ? slope : Real(0);
  }
}

template <typename Real>
TWINHEAD_INLINE void slope_of_q(const Real* p, const Real* q, std::int64_t length, const Slope<Real>& row, Real* dq) {
  const Slope<Real> r = row;
  const Real factor = r.slope * r.rate;
#pragma omp simd
  for (std::int64_t i = 0; i < length; ++i) {
    const Real log_p = (p[i] - r.p_peak) * r.rate - r.p_log, log_q = (q[i] - r.q_peak) * r.rate - r.q_log;
    dq[i] = factor * (exp_nonpositive(log_q) - exp_nonpositive(log_p));
  }
}

template <typename T, typename Real>
TWINHEAD_CLONES void slope_row(const T* p, const T* q, std::int64_t words, const Slope<Real>& row, T* dp, T* dq) {
  Real p_buffer[kBlock], q_buffer[kBlock], p_slopes[kBlock], q_slopes[kBlock];
  for_blocks<kBlock>(words, [&](std::int64_t begin, std::int64_t length) {
    const Real* p_block = widened(p + begin, length, p_buffer);
    const Real* q_block = widened(q + begin, length, q_buffer);
    if (dp) slope_of_p(p_block, q_block, length, row, p_slopes);
    if (dq) slope_of_q(p_block, q_block, length, row, q_slopes);
    if (dp) narrow(p_slopes, length, dp + begin);
    if (dq) narrow(q_slopes, length, dq + begin);
  });
}

template <typename T>
void clear_row(T* row, std::int64_t words) {
  for (std::int64_t i = 0; row && i < words; ++i) row[i] = T{};
}

}  // namespace

template <typename T>
void measure_kl(const Divergence<T>& divergence, Array<typename Divergence<T>::Real> kl, int threads) {
  using Real = typename Divergence<T>::Real;
  const Divergence<T>& d = divergence;
  const bool parallel = d.rows > 1 && d.rows * d.words >= kParallelElements;
#pragma omp parallel for num_threads(threads) schedule(static) if (parallel)
  for (std::int64_t row = 0; row < d.rows; ++row) {
    Sums<Real> sums;
    sum_row(d.p[row], d.q[row], d.words, 1 / d.temperature, &sums);
    const double log_s = std::log(sums.s), log_t = std::log(sums.t);
    kl[row] = static_cast<Real>(sums.u / sums.s / d.temperature - log_s + log_t);
    Real* moments = d.moments.data + 5 * row;
    moments[0] = sums.p_peak;
    moments[1] = static_cast<Real>(log_s);
    moments[2] = sums.q_peak;
    moments[3] = static_cast<Real>(log_t);
    moments[4] = static_cast<Real>(sums.u / sums.s);
  }
}

template <typename T>
void kl_gradient(const Divergence<T>& divergence, Array<const typename Divergence<T>::Real> slopes, RowsOf<T> dp,
                 RowsOf<T> dq, int threads) {
  using Real = typename Divergence<T>::Real;
  const Divergence<T>& d = divergence;
  const std::int64_t bytes = d.rows * d.words * static_cast<std::int64_t>(sizeof(T));
  if (dp && dp.data != d.p.data) prefer_large_pages(dp.data, bytes);
  if (dq && dq.data != d.q.data) prefer_large_pages(dq.data, bytes);
  const bool parallel = d.rows > 1 && d.rows * d.words >= kParallelElements;
#pragma omp parallel for num_threads(threads) schedule(static) if (parallel)
  for (std::int64_t row = 0; row < d.rows; ++row) {
    T *row_dp = dp ? dp[row] : nullptr, *row_dq = dq ? dq[row] : nullptr;
    if (slopes[row] == 0) {
      clear_row(row_dp, d.words);
      clear_row(row_dq, d.words);
      continue;
    }
    const Real* moments = d.moments.data + 5 * row;
    const Slope<Real> slope{moments[0], moments[1], moments[2],  moments[3],
                            moments[4], slopes[row], static_cast<Real>(1 / d.temperature)};
    slope_row(d.p[row], d.q[row], d.words, slope, row_dp, row_dq);
  }
}

#define TWINHEAD_INSTANTIATE(T)                                                                                     \
  template void measure_kl<T>(const Divergence<T>&, Array<Divergence<T>::Real>, int);                               \
  template void kl_gradient<T>(const Divergence<T>&, Array<const Divergence<T>::Real>, RowsOf<T>, RowsOf<T>, int)
TWINHEAD_INSTANTIATE(float);
TWINHEAD_INSTANTIATE(double);
TWINHEAD_INSTANTIATE(BFloat16);
#undef TWINHEAD_INSTANTIATE

}  // namespace twinhead
