// The search for a row's threshold, for any number of cooperating threads.
//
// Every element x of a row is either known to lie in A (S(x) <= k, csrc/laplace.h), known to lie
// in B, or between the two. A trial c splits the row at {x >= c} and {x < c}; the elements next to
// it, r_A and r_B, decide: S(r_A) > k moves r_A and all below it into B, S(r_B) <= k moves r_B and
// all above it into A, and otherwise the split is right and (r_A, r_B, P, Q, D) is the solution.
// The bracket is made of elements, so every trial shrinks it, rounding or not, and the tests never
// compare a sum of p with k.
//
// `Row` is what the search needs of a row: row.sweep(accumulator) feeds it every element, some of
// the threads' own in each copy, and returns the combined result to all of them. Places beyond the
// row's end read as -inf; the accumulators give those, as all infinite elements, no weight.
#pragma once

#include <cstdint>
#include <cstring>

#include "../laplace.h"

#ifdef __CUDACC__
#define SOFTTOPK_DEVICE __device__ __forceinline__
#else
#define SOFTTOPK_DEVICE inline
#endif

namespace softtopk::cuda {

template <class T>
inline constexpr T infinity = std::numeric_limits<T>::infinity();
template <class T>
inline constexpr T nan = std::numeric_limits<T>::quiet_NaN();
template <class T>
inline constexpr T largest = std::numeric_limits<T>::max();
template <class T>
inline constexpr T epsilon = std::numeric_limits<T>::epsilon();

SOFTTOPK_DEVICE float fast_exp2(float t) {
#ifdef __CUDA_ARCH__
  float e;
  asm("ex2.approx.f32 %0, %1;" : "=f"(e) : "f"(t));  // 2^-22.5 relative, denormals kept
  return e;
#else
  return std::exp2(t);
#endif
}
SOFTTOPK_DEVICE double fast_exp2(double t) { return std::exp2(t); }
// One instruction instead of four: 0 below 2^-126.
SOFTTOPK_DEVICE float faster_exp2(float t) {
#ifdef __CUDA_ARCH__
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(t));
  return e;
#else
  return std::exp2(t);
#endif
}

// exp(-|x - r| / alpha) with r = r_A for x >= r_A and r_B below; 0 for an infinite x.
template <class T>
class Tails {
 public:
  SOFTTOPK_DEVICE Tails(T r_A, T r_B, T alpha) : r_A_(r_A) {
    constexpr T up = T(1ull << std::numeric_limits<T>::digits);
    // An infinite reference has no finite element on its side; 0 keeps inf - inf away.
    at_A_ = std::abs(r_A) < infinity<T> ? r_A : T(0);
    at_B_ = std::abs(r_B) < infinity<T> ? r_B : T(0);
    // 1 / alpha overflows for a denormal alpha. Differences that matter there are as small, so
    // they are scaled up, unless r is so large that no difference but 0 can matter.
    const bool tiny = alpha < 4 / largest<T> && std::abs(at_A_) < largest<T> / up &&
                      std::abs(at_B_) < largest<T> / up;
    unit_ = tiny ? up : T(1);
    at_A_ *= unit_;
    at_B_ *= unit_;
    rate_ = T(1.4426950408889634074) / (alpha * unit_);
    if (rate_ > largest<T>) rate_ = largest<T>;
  }
  SOFTTOPK_DEVICE bool above(T x) const { return x >= r_A_; }
  SOFTTOPK_DEVICE T operator()(T x) const {
    const T distance = std::fma(x, unit_, -(above(x) ? at_A_ : at_B_));  // x - r, rounded once
    return fast_exp2(-std::abs(distance) * rate_);
  }

 private:
  T r_A_, at_A_, at_B_, unit_, rate_;
};

// A sum with its rounding errors carried along: rows of a million equal terms stay exact.
template <class T>
class CompensatedSum {
 public:
  SOFTTOPK_DEVICE void add(T term) {
    const T corrected = term + rest_;
    const T next = sum_ + corrected;
    rest_ = corrected - (next - sum_);
    sum_ = next;
  }
  SOFTTOPK_DEVICE T value() const { return sum_ + rest_; }

 private:
  T sum_ = 0, rest_ = 0;
};

// The sum of a few terms as a balanced tree.
template <int N, class T>
SOFTTOPK_DEVICE T tree_sum(const T (&terms)[N]) {
  T t[N];
#pragma unroll
  for (int i = 0; i < N; ++i) t[i] = terms[i];
#pragma unroll
  for (int half = N / 2; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) t[i] += t[i + half];
  }
  return t[0];
}

// What a row holds: any NaN, how many elements equal to inf and above -inf, and the range of the
// finite ones (min = inf and max = -inf when there are none).
template <class T>
struct Tally {
  int32_t plus = 0, most = 0;
  T min = infinity<T>, max = -infinity<T>;
  int nan = 0;

  template <int N>
  SOFTTOPK_DEVICE void add(const T (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      nan |= x[i] != x[i];
      plus += x[i] == infinity<T>;
      most += x[i] > -infinity<T>;
      if (x[i] > -infinity<T> && x[i] < min) min = x[i];
      if (x[i] < infinity<T> && x[i] > max) max = x[i];
    }
  }
  SOFTTOPK_DEVICE void combine(const Tally& other) {
    plus += other.plus;
    most += other.most;
    min = other.min < min ? other.min : min;
    max = other.max > max ? other.max : max;
    nan |= other.nan;
  }
  SOFTTOPK_DEVICE Tally result() const { return *this; }
};

// The split of a row at a trial: |{x >= c}| and the elements on either side.
template <class T>
struct Split {
  int32_t count;
  T r_A, r_B;  // min {x >= c}, max {x < c}
  SOFTTOPK_DEVICE void combine(const Split& other) {
    count += other.count;
    r_A = other.r_A < r_A ? other.r_A : r_A;
    r_B = other.r_B > r_B ? other.r_B : r_B;
  }
};

template <class T>
class SplitAt {
 public:
  SOFTTOPK_DEVICE explicit SplitAt(T trial) : trial_(trial) {}
  template <int N>
  SOFTTOPK_DEVICE void add(const T (&x)[N]) {
    int above = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const bool in_A = x[i] >= trial_;
      above += in_A;
      if (in_A && x[i] < split_.r_A) split_.r_A = x[i];
      if (!in_A && x[i] > split_.r_B) split_.r_B = x[i];
    }
    split_.count += above;
  }
  SOFTTOPK_DEVICE Split<T> result() const { return split_; }

 private:
  T trial_;
  Split<T> split_{0, infinity<T>, -infinity<T>};
};

template <class T>
struct TailSums {
  T P, Q;
  SOFTTOPK_DEVICE void combine(const TailSums& other) {
    P += other.P;
    Q += other.Q;
  }
};

template <class T>
class SumTails {
 public:
  SOFTTOPK_DEVICE explicit SumTails(const Tails<T>& tails) : tails_(tails) {}
  template <int N>
  SOFTTOPK_DEVICE void add(const T (&x)[N]) {
    T p[N], q[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const T e = tails_(x[i]);
      const bool in_A = tails_.above(x[i]);
      p[i] = in_A ? e : T(0);
      q[i] = in_A ? T(0) : e;
    }
    P_.add(tree_sum(p));
    Q_.add(tree_sum(q));
  }
  SOFTTOPK_DEVICE TailSums<T> result() const { return {P_.value(), Q_.value()}; }
  SOFTTOPK_DEVICE const Tails<T>& tails() const { return tails_; }

 private:
  Tails<T> tails_;
  CompensatedSum<T> P_, Q_;
};

template <class T>
struct Pattern;
template <>
struct Pattern<float> {
  using Int = uint32_t;
};
template <>
struct Pattern<double> {
  using Int = uint64_t;
};

// The value a fraction of the way from low to high in the order of bit patterns, in (low, high].
template <class T>
SOFTTOPK_DEVICE T between_patterns(T low, T high, float fraction) {
  using Int = typename Pattern<T>::Int;
  constexpr Int sign = Int(1) << (8 * sizeof(T) - 1);
  low += T(0);  // -0 becomes +0: one value, one pattern
  high += T(0);
  Int first, last;
  std::memcpy(&first, &low, sizeof(T));
  std::memcpy(&last, &high, sizeof(T));
  first = first & sign ? ~first : first | sign;
  last = last & sign ? ~last : last | sign;
  const Int width = last - first;
  Int step = fraction == 0.5f ? width - width / 2 : Int(double(width) * fraction);
  if (step < 1) step = 1;
  if (step > width) step = width;
  const Int between = first + step;
  const Int pattern = between & sign ? between & ~sign : ~between;
  T value;
  std::memcpy(&value, &pattern, sizeof(T));
  return value;
}

// The open part of a search, the elements between lo and hi, and where to split it next.
template <class T>
class Bracket {
 public:
  // `plus` elements are equal to inf; those above -inf weigh no more than `most` together.
  SOFTTOPK_DEVICE Bracket(T min, T max, int32_t plus, int32_t most, double budget)
      : min_(min), max_(max), plus_(plus), most_(most) {
    target_ = logit(float(budget - plus), float(most - budget));
    count_lo_ = open_ = most;
    count_hi_ = plus;
    weight_lo_ = score(count_lo_);
    weight_hi_ = score(count_hi_ + 1);
  }
  // -inf and inf while no element is known on that side.
  SOFTTOPK_DEVICE T lo() const { return lo_; }
  SOFTTOPK_DEVICE T hi() const { return hi_; }

  // lo moves up to an element with |{x >= element}| = count.
  SOFTTOPK_DEVICE void raise(T element, int32_t count) {
    lo_ = element;
    count_lo_ = count;
    weight_lo_ = score(count);
    weight_hi_ = side_ > 0 ? weight_hi_ / 2 : score(count_hi_ + 1);
    side_ = 1;
  }
  // hi moves down to an element with |{x > element}| = count.
  SOFTTOPK_DEVICE void lower(T element, int32_t count) {
    hi_ = element;
    count_hi_ = count;
    weight_hi_ = score(count + 1);
    weight_lo_ = side_ < 0 ? weight_lo_ / 2 : score(count_lo_);
    side_ = -1;
  }

  // The next trial, lo < c <= hi: the guess, or without one (NaN) an interpolation of the counts
  // (regula falsi on their logits, which are near linear in x for light tails; the Illinois
  // variant). Where that leaves more than a quarter of the open elements, heavy tails are
  // suspected and it is done on bit patterns, near linear in log |x|; every fourth of those times
  // the patterns are halved, so that no row takes more than 4 trials a bit.
  SOFTTOPK_DEVICE T trial(T guess) {
    if (lo_ == max_) return infinity<T>;  // no finite element lies above
    const T low = lo_ == -infinity<T> ? min_ : lo_;
    const T high = hi_ == infinity<T> ? max_ : hi_;
    if (!(low < high)) return high;
    const int32_t open = count_lo_ - count_hi_;
    const bool slow = open > open_ / 4;
    open_ = open;
    slow_ += slow;
    const float fraction = weight_lo_ / (weight_lo_ - weight_hi_);
    T c;
    if (slow && slow_ % 4 == 3) {
      c = between_patterns(low, high, 0.5f);
    } else if (guess == guess) {
      c = guess;
    } else if (slow && slow_ % 2 == 1) {
      c = between_patterns(low, high, fraction);
    } else {
      c = low + (high - low) * T(fraction);
    }
    if (c > high) c = high;
    return c > low ? c : between_patterns(low, high, 0.0f);
  }

 private:
  SOFTTOPK_DEVICE static float logit(float above, float below) {
    return std::log((above + 0.5f) / (below + 0.5f));
  }
  // How far a count is from the budget; positive when it is larger.
  SOFTTOPK_DEVICE float score(int32_t count) const {
    return logit(float(count - plus_), float(most_ - count)) - target_;
  }

  T lo_ = -infinity<T>, hi_ = infinity<T>;
  T min_, max_;                           // of the finite elements
  int32_t plus_, most_;                   // elements equal to inf; above -inf
  int32_t count_lo_, count_hi_;           // elements >= lo; > hi
  int32_t open_;                          // their difference at the last trial
  float target_, weight_lo_, weight_hi_;  // logits
  int side_ = 0, slow_ = 0;               // which end moved last; trials that gained little
};

// The right split of a row's open elements, those that the bracket leaves.
template <class T, class Row>
SOFTTOPK_DEVICE Solution<T> search(Row& row, Bracket<T> bracket, double budget, int32_t plus,
                                   int32_t most, T alpha) {
  T guess = nan<T>;
  for (;;) {
    const Split<T> split = row.sweep(SplitAt<T>(bracket.trial(guess)));
    guess = nan<T>;
    const T r_A = split.r_A + T(0), r_B = split.r_B + T(0);  // -0 becomes +0
    const bool may_raise = r_A<bracket.hi(), may_lower = r_B> bracket.lo();
    // p >= 1/2 in A at the threshold r_A, p <= 1/2 in B at r_B: the count alone often decides.
    const double count = split.count;
    if (may_raise && count + plus > 2 * budget) {
      bracket.raise(r_A, split.count);
      continue;
    }
    if (may_lower && count + most < 2 * budget) {
      bracket.lower(r_B, split.count);
      continue;
    }
    const TailSums<T> sums = row.sweep(SumTails<T>(Tails<T>(r_A, r_B, alpha)));
    Solution<T> s = {r_A, r_B, sums.P, sums.Q, T(count - budget)};
    const T g = std::exp(-(r_A - r_B) / alpha);
    // A threshold past r_A or r_B by less than this, in units of alpha, is rounding: there h and q
    // change by as little, and p by its square.
    constexpr T tolerance = 4 * epsilon<T>;
    const T slope_A = (s.P + s.Q * g) / 2, slope_B = (s.P * g + s.Q) / 2;
    if (may_raise && s.D - s.P / 2 + s.Q * g / 2 > tolerance * slope_A) {
      bracket.raise(r_A, split.count);
      // The step reaches about as many elements as lie within alpha: not worth it for few.
      if (4 * s.P >= s.D) guess = closed_form_step(s, alpha, true);
    } else if (may_lower && s.D - s.P * g / 2 + s.Q / 2 < -tolerance * slope_B) {
      bracket.lower(r_B, split.count);
      if (4 * s.Q >= -s.D) guess = closed_form_step(s, alpha, false);
    } else {
      return s;
    }
  }
}

// The solution of a row (csrc/laplace.h), as backends/reference.py defines it.
template <class T, class Row>
SOFTTOPK_DEVICE Solution<T> solve(Row& row, double k, T alpha) {
  const Tally<T> tally = row.sweep(Tally<T>());
  if (tally.nan || k != k || !(alpha > 0 && alpha < infinity<T>)) {
    return {nan<T>, nan<T>, nan<T>, nan<T>, nan<T>};
  }
  const int32_t plus = tally.plus, most = tally.most;
  const double budget = k < plus ? plus : k > most ? most : k;

  Bracket<T> bracket(tally.min, tally.max, plus, most, budget);
  if (budget <= plus) {
    bracket.raise(tally.max, plus + 1);  // no finite element is in A
  } else if (budget >= most) {
    bracket.lower(tally.min, most - 1);  // all of them are
  }
  Solution<T> s = search<T>(row, bracket, budget, plus, most, alpha);
  if (budget != k) s.P = s.Q = 0;
  return s;
}

// The hard selection: `count` elements, those > value and of those == value the first `ties`.
template <class T>
struct Cut {
  T value;  // NaN: a NaN row, nothing is selected
  int32_t count, ties;
};

// The cut after the round-half-up(k) largest elements, or the `limit` largest if those are fewer.
template <class T, class Row>
SOFTTOPK_DEVICE Cut<T> hard_cut(Row& row, double k, int32_t limit) {
  const Tally<T> tally = row.sweep(Tally<T>());
  if (tally.nan || k != k) return {nan<T>, 0, 0};
  const int32_t most = tally.most;
  const double rounded = std::floor(k + 0.5);
  const double clamped = rounded < double(tally.plus) ? double(tally.plus)
                         : rounded > double(most)     ? double(most)
                                                      : rounded;
  const int32_t count = clamped < double(limit) ? int32_t(clamped) : limit;
  if (count <= tally.plus) return {infinity<T>, count, count};
  if (count >= most) return {-infinity<T>, count, 0};

  // The element of rank `count` lies in [lo, hi], elements both.
  Bracket<T> bracket(tally.min, tally.max, tally.plus, most, double(count));
  bracket.raise(tally.min, most);
  bracket.lower(tally.max, tally.plus);
  int32_t greater = tally.plus;  // |{x > hi}|
  while (bracket.lo() < bracket.hi()) {
    const T trial = bracket.trial(nan<T>);
    const Split<T> split = row.sweep(SplitAt<T>(trial));
    if (split.count == count) return {split.r_A, count, count};  // all of its ties fit
    if (split.count > count) {
      bracket.raise(split.r_A + T(0), split.count);
    } else {
      bracket.lower(split.r_B + T(0), split.count);
      greater = split.count;
    }
  }
  return {bracket.lo(), count, count - greater};
}

}  // namespace softtopk::cuda
