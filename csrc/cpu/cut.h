// Where the K largest elements of a row end, lowest index first among equals.
//
// The K-th largest value is bracketed by counting (trials.h); once few elements are left inside,
// they are copied to the stack and selected there.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "trials.h"

namespace softtopk::cpu {

template <typename T>
struct Cut {
  T value;       // everything above is selected
  int64_t ties;  // and so many of the elements equal to it
  int64_t count;
  bool nan;
};

// round-half-up(k) within [#(+inf), n - #(-inf)], at most max_k.
inline int64_t hard_budget(double k, int64_t plus, int64_t most, int64_t max_k) {
  const double rounded = std::floor(k + 0.5);
  const double clamped =
      std::min(std::max(rounded, static_cast<double>(plus)), static_cast<double>(most));
  return std::min(static_cast<int64_t>(clamped), max_k);
}

template <typename T>
Cut<T> cut(const RowSweeps<T>& sweeps, const Row& row, double k, int64_t max_k) {
  constexpr T inf = std::numeric_limits<T>::infinity();
  const Range<T> range = sweeps.range(row);
  if (range.nan || std::isnan(k)) return {inf, 0, 0, true};
  const int64_t most = row.n - range.minus;
  const int64_t K = hard_budget(k, range.plus, most, max_k);
  if (K <= range.plus) return {inf, K, K, false};

  const double share = static_cast<double>(K - range.plus) / static_cast<double>(most - range.plus);
  const bool sampled = most - range.plus > kCandidates;
  const auto [lo, hi, from_lo, from_hi, adjacent] = bracket_by_counts(
      sweeps, row, range, K, sampled ? Guesses<T>(sweeps, row, share) : Guesses<T>());
  if (adjacent) return {lo, K - from_hi, K, false};

  T candidates[kCandidates + kGatherRoom];
  const T below = std::nextafter(lo, -inf);
  const int64_t count = sweeps.gather(row, below, hi, candidates);
  T* const wanted = candidates + (K - from_hi - 1);
  std::nth_element(candidates, wanted, candidates + count, [](T a, T b) { return a > b; });
  const int64_t larger =
      std::count_if(candidates, candidates + count, [&](T x) { return x > *wanted; });
  return {*wanted, K - from_hi - larger, K, false};
}

}  // namespace softtopk::cpu
