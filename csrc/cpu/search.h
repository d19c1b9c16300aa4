// The solution (r_A, r_B, P, Q, D) of one row, by trial splits; the mathematics is in laplace.h.
//
// A bracket is kept in values of elements: everything <= lo is known to lie in B, everything >= hi
// in A. A trial c in (lo, hi] splits the row at r_A = min{x >= c} and r_B = max{x < c}:
//   S(r_A) > k   the root lies above r_A: lo = r_A;
//   S(r_B) <= k  it lies at or below r_B: hi = r_B;
//   otherwise, or when no element is left between lo and hi, the split is the solution.
// Every trial moves at least one element out of the bracket, and bisection on the bit patterns in
// the rotation of trials bounds their number. Where counts decide, no exponential is computed.
// Once at most kCandidates elements remain inside, they are copied to the stack, the others are
// collapsed into one sum on each side, and the row is not read again. No row is ever sorted.
// Where alpha is small the root is near the k-th largest element: then the bracket is first taken
// from counts and only assumed; where S is smooth, from the root of a sample and the steps of the
// closed form. The sums show at the end whether it held; if not, the search goes on from what they
// proved.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "../laplace.h"
#include "sweeps.h"
#include "trials.h"

namespace softtopk::cpu {

template <typename T>
Scale<T> scale_of(T r_A, T r_B, T alpha) {
  // Below 2^-64 the factor log2(e) / alpha is split, so that neither half overflows.
  const double first = alpha < T(0x1p-64) ? 0x1p64 : 1;
  const double second = 1.4426950408889634 / (static_cast<double>(alpha) * first);
  return {r_A,
          r_B,
          std::isinf(r_A) ? T(0) : r_A,
          std::isinf(r_B) ? T(0) : r_B,
          static_cast<T>(first),
          static_cast<T>(second)};
}

template <typename T>
Solution<double> solve(const RowSweeps<T>& sweeps, const RowSweeps<T>& stack_sweeps, const Row& row,
                       double k, T alpha);

template <typename T>
class Search {
 public:
  // 0 < k < n after the infinite elements of `range` are taken away on both sides.
  Search(const RowSweeps<T>& sweeps, const RowSweeps<T>& stack_sweeps, const Row& row,
         const Range<T>& range, double k, T alpha)
      : row_sweeps_(sweeps),
        stack_sweeps_(stack_sweeps),
        whole_row_(row),
        sweeps_(&sweeps),
        row_(row),
        min_(range.min),
        max_(range.max),
        k_(k),
        least_(static_cast<double>(range.plus)),
        most_(static_cast<double>(row.n - range.minus)),
        alpha_(alpha),
        above_lo_(row.n - range.minus),
        from_hi_(range.plus),
        S_lo_(most_),
        S_hi_(least_) {}

  Solution<double> run() {
    if (above_lo_ - from_hi_ > kCandidates) {
      Guesses<T> guesses(*sweeps_, row_, (k_ - least_) / (most_ - least_));
      if (guesses.spread > 2 * alpha_) {
        if (assume(guesses)) return solution_;
      } else if (guesses.low > -kInfinity && guesses.high < kInfinity) {
        if (approach(guesses)) return solution_;
      } else if (guesses.low > -kInfinity) {
        if (trial(guesses.low)) return solution_;
      }
    }
    for (int step = 0;; ++step) {
      if (!collapsed_ && above_lo_ - from_hi_ <= kCandidates)
        collapse(sweeps_->tails(row_, scale_of(hi_, lo_, alpha_)));
      if (trial(next(step))) return solution_;
    }
  }

 private:
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();

  // Splits at c in (lo, hi]; true when that is the solution.
  bool trial(T c) {
    const Split<T> split = sweeps_->split(row_, c);
    const int64_t count = split.count + collapsed_above_;
    const T r_A = std::min(split.r_A, upper_), r_B = std::max(split.r_B, lower_);
    // Every element of A has p >= 1/2, every one of B p <= 1/2.
    if (r_A < hi_ && count > 2 * k_) return rise(r_A, count, count), false;
    if (r_A < hi_ && most_ + count <= 2 * k_) return fall(r_A, count, count), false;

    const Tails tails = sweeps_->tails(row_, scale_of(r_A, r_B, alpha_));
    const double alpha = alpha_, gap = (static_cast<double>(r_A) - r_B) / alpha;
    const double P = tails.P + weight(P_upper_, upper_, r_A);
    const double Q = tails.Q + weight(Q_lower_, r_B, lower_);
    const double D = static_cast<double>(count) - k_, g = std::exp(-gap);
    solution_ = {static_cast<double>(r_A), static_cast<double>(r_B), P, Q, D};
    // An element that is known stays where it is: two trials can disagree about one whose t is
    // within rounding of 0, and then either side gives the same p.
    const double at_A = D - P / 2 + Q * g / 2, at_B = D - P * g / 2 + Q / 2;
    const bool beyond = (at_A > 0 && r_A == upper_) || (at_B <= 0 && r_B == lower_);
    // The ends of a window are no elements: nothing is solved or proved by them.
    if (window_ && (beyond || (at_A <= 0 && at_B > 0 && (r_A == upper_ || r_B == lower_))))
      return release(), trial(c);
    if (assumed_ && beyond) release();
    if (at_A > 0 && r_A < hi_) {
      rise(r_A, count, k_ + at_A);
      step_ = closed_form_step(solution_, alpha, true);
      return false;
    }
    if (at_B <= 0 && r_B > lo_) {
      fall(r_B, count + 1, k_ + at_B);
      step_ = closed_form_step(solution_, alpha, false);
      return false;
    }
    return true;
  }

  void rise(T r_A, int64_t count, double S) {
    lo_ = r_A, above_lo_ = count - 1, S_lo_ = S, step_ = std::nan("");
  }

  void fall(T r, int64_t count, double S) {
    hi_ = r, from_hi_ = count, S_hi_ = S, step_ = std::nan("");
  }

  // sum * exp(-(high - low) / alpha); 0 for an empty side.
  double weight(double sum, T high, T low) const {
    if (sum == 0) return 0;
    return sum * std::exp(-(static_cast<double>(high) - low) / static_cast<double>(alpha_));
  }

  // Assumes a bracket of a few hundred elements around the k-th largest or, where that cannot be,
  // because too many are equal to it, splits there; true when that is the solution.
  bool assume(const Guesses<T>& guesses) {
    const int64_t K = std::min(std::max(std::llround(k_), from_hi_ + 1LL), above_lo_ + 0LL);
    const Range<T> range{min_, max_, from_hi_, row_.n - above_lo_, false};
    const CountBracket<T> b = bracket_by_counts(*sweeps_, row_, range, K, guesses);
    if (b.adjacent) return trial(b.hi);
    assumed_ = true;
    if (b.from_lo < above_lo_) rise(b.lo, b.from_lo, static_cast<double>(b.from_lo));
    if (b.hi < kInfinity) fall(b.hi, b.from_hi, static_cast<double>(b.from_hi));
    return false;
  }

  // Where S is smooth and the sample holds elements on both sides of the root: takes the closed
  // form's steps from the sample's root until one leads to within a window of a few hundred
  // elements, assumes that and collapses what is outside. True when solved: the root lies beyond
  // all elements.
  bool approach(Guesses<T>& guesses) {
    guesses.sort();
    const Row sample{guesses.values, guesses.size, false};
    const double alpha = alpha_, share = (k_ - least_) / (most_ - least_);
    double c = root(solve<T>(stack_sweeps_, stack_sweeps_, sample, share * guesses.size, alpha_));
    double half = 0, error = kInfinity, slope = 0;
    for (int step = 0; step < 3 && !(error < half); ++step) {
      const T r_A = std::min(std::max(static_cast<T>(c), min_), max_);
      const T r_B = std::nextafter(r_A, -kInfinity);
      const Tails tails = sweeps_->tails(row_, scale_of(r_A, r_B, alpha_));
      const Solution<double> at{static_cast<double>(r_A), static_cast<double>(r_B), tails.P,
                                tails.Q, static_cast<double>(tails.count) - k_};
      c = root(at), slope = densities(at, alpha).R / alpha;
      if ((r_A == max_ && c > max_) || (r_A == min_ && c < min_)) return trial(static_cast<T>(c));
      half = guesses.width(c, kCandidates / 4 / (most_ - least_));
      const double moved = std::abs(c - static_cast<double>(r_A)) / alpha;
      error = moved * moved * moved * alpha;  // of the elements that the step passes
    }
    const T lo = static_cast<T>(c - half), hi = static_cast<T>(c + half);
    if (!(error < half && lo < hi)) return false;
    const Tails outside = sweeps_->tails(row_, scale_of(hi, lo, alpha_));
    const int64_t inside = row_.n - outside.count - outside.below;
    if (inside > kCandidates) return false;
    rise(lo, outside.count + inside + 1, k_ + slope * half);
    fall(hi, outside.count, k_ - slope * half);
    step_ = c, assumed_ = window_ = true;
    collapse(outside);
    return false;
  }

  // The root, if the split of `s` is right.
  double root(const Solution<double>& s) const {
    return closed_form_step(s, static_cast<double>(alpha_), s.D >= 0);
  }

  // Back to the whole row and to nothing known: the assumed bracket does not hold the root.
  void release() {
    row_ = whole_row_, sweeps_ = &row_sweeps_;
    lo_ = lower_ = -kInfinity, hi_ = upper_ = kInfinity;
    P_upper_ = Q_lower_ = 0, collapsed_above_ = 0;
    above_lo_ = static_cast<int64_t>(most_), from_hi_ = static_cast<int64_t>(least_);
    S_lo_ = most_, S_hi_ = least_;
    assumed_ = collapsed_ = window_ = false, step_ = std::nan("");
  }

  // `outside`: the tails from hi up and from lo down.
  void collapse(const Tails& outside) {
    collapsed_ = true;
    const int64_t count = sweeps_->gather(row_, lo_, hi_, candidates_);
    P_upper_ = outside.P, upper_ = hi_, collapsed_above_ = outside.count;
    Q_lower_ = outside.Q, lower_ = lo_;
    row_ = {candidates_, count, false};
    sweeps_ = &stack_sweeps_;
  }

  // The next trial, in (lo, hi]. Rows where S is smooth are solved by the closed form in a few
  // steps; where it is a staircase, interpolation between the counts is faster.
  T next(int step) {
    const T low = std::isinf(lo_) ? min_ : lo_, high = std::isinf(hi_) ? max_ : hi_;
    const Bracket bracket{low, high, S_lo_, S_hi_, least_, most_};
    double c;
    if (step % 4 == 3)
      c = step % 8 == 3 ? middle(low, high) : (static_cast<double>(low) + high) / 2;
    else if (step % 2 == 1 || std::isnan(step_) || static_cast<double>(high) - low > 4 * alpha_)
      c = bracket.interpolate(k_, collapsed_ ? 0 : kCandidates / 4);
    else
      c = step_;
    const T first = std::isinf(lo_) ? min_ : std::nextafter(lo_, kInfinity);
    return std::min(std::max(static_cast<T>(c), first), hi_);
  }

  const RowSweeps<T>&row_sweeps_, &stack_sweeps_;
  const Row whole_row_;
  const RowSweeps<T>* sweeps_;
  Row row_;  // the elements that are still looked at
  const T min_, max_;
  const double k_, least_, most_;  // S lies between least (the +inf) and most (all but the -inf)
  const T alpha_;

  T lo_ = -kInfinity, hi_ = kInfinity;
  int64_t above_lo_, from_hi_;  // |{x > lo}| or more, |{x >= hi}| or less
  double S_lo_, S_hi_;          // S at lo and hi, or a bound
  double step_ = std::nan("");  // the closed form's proposal after the last trial

  bool collapsed_ = false, assumed_ = false, window_ = false;
  T upper_ = kInfinity, lower_ = -kInfinity;  // everything beyond is in the sums
  double P_upper_ = 0, Q_lower_ = 0;          // relative to upper, lower
  int64_t collapsed_above_ = 0;               // |{x >= upper}|
  Solution<double> solution_{};
  T candidates_[kCandidates + kGatherRoom];
};

// The solution of a row by the conventions of laplace.h.
template <typename T>
Solution<double> solve(const RowSweeps<T>& sweeps, const RowSweeps<T>& stack_sweeps, const Row& row,
                       double k, T alpha) {
  constexpr double inf = std::numeric_limits<double>::infinity();
  const Range<T> range = sweeps.range(row);
  if (range.nan || std::isnan(k) || !(alpha > 0) || std::isinf(alpha)) {
    const double nan = std::nan("");
    return {nan, nan, nan, nan, nan};
  }
  const double least = static_cast<double>(range.plus);
  const double most = static_cast<double>(row.n - range.minus);
  const double clamped = std::min(std::max(k, least), most);
  Solution<double> out{inf, -inf, 0, 0, 0};
  if (least == most) return out;
  if (least < clamped && clamped < most)
    return Search<T>(sweeps, stack_sweeps, row, range, clamped, alpha).run();
  // All finite elements on one side; the gradient to k passes where k is just at its bound.
  if (clamped == least)
    out.r_B = range.max;
  else
    out.r_A = range.min;
  if (clamped == k) {
    const Tails tails =
        sweeps.tails(row, scale_of(static_cast<T>(out.r_A), static_cast<T>(out.r_B), alpha));
    out.P = tails.P, out.Q = tails.Q;
  }
  return out;
}

}  // namespace softtopk::cpu
