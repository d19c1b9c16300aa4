// Where to split a row next: shared by search.h and hard_topk.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <type_traits>

#include "pieces.h"

namespace softtopk::cpu {

// The value half-way between two finite ones in the order of their bit patterns, where -0 = +0.
template <typename T>
T middle(T low, T high) {
  using Bits = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  constexpr Bits least = std::numeric_limits<Bits>::min();
  const auto order = [](T value) {
    Bits bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits < 0 ? least - bits : bits;
  };
  const Bits rank = (order(low) >> 1) + (order(high) >> 1);
  const Bits bits = rank < 0 ? least - rank : rank;
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// A decreasing function S of the threshold (the soft or hard count of what is selected) between two
// values of which S(low) >= k > S(high) is known, with bounds least <= S <= most.
struct Bracket {
  double low, high, S_low, S_high, least, most;

  // Where S meets k if log((S - least) / (most - S)) is linear. With a margin it aims that far to
  // the side of k that is known less well, so that the bracket closes from both sides.
  double interpolate(double k, double margin) const {
    double target = k;
    if (S_low > k + 2 * margin)
      target = k + margin;
    else if (S_high < k - 2 * margin)
      target = k - margin;
    const auto logit = [&](double S) {
      S = std::min(std::max(S, least + 0.25), most - 0.25);
      return std::log((S - least) / (most - S));
    };
    const double from = logit(S_low);
    const double part = (from - logit(target)) / (from - logit(S_high));
    return low + (part > 0 && part < 1 ? part : 0.5) * (high - low);
  }
};

// Two values likely to lie just below and just above the element of rank share * n: quantiles of
// elements at fixed places. A wrong guess costs a trial, nothing else.
template <typename T>
struct Guesses {
  T values[kPlaces];  // the finite ones of the sample; the largest first once they are sorted
  int size = 0;
  T low = -std::numeric_limits<T>::infinity(), high = std::numeric_limits<T>::infinity();
  T spread = 0;  // from the one to the other, or to the end of the sample

  Guesses() = default;
  Guesses(const RowSweeps<T>& sweeps, const Row& row, double share) {
    sweeps.sample(row, values);
    T* const end = std::remove_if(values, values + kPlaces, [](T x) { return std::isinf(x); });
    size = static_cast<int>(end - values);
    if (size == 0) return;
    const double margin = 3 * std::sqrt(size * share * (1 - share)) + 1;
    const double below = std::ceil(size * share + margin), above = size * share - margin;
    T* const from_low = values + std::min(static_cast<int>(below), size);
    if (from_low < end) {
      std::nth_element(values, from_low, end, std::greater<T>());
      low = *from_low;
    }
    if (above >= 0) {
      T* const from_high = values + static_cast<int>(above);
      std::nth_element(values, from_high, from_low, std::greater<T>());
      high = *from_high;
    }
    spread = (above >= 0 ? high : *std::max_element(values, end)) -
             (from_low < end ? low : *std::min_element(values, end));
  }

  void sort() { std::sort(values, values + size, std::greater<T>()); }

  // Of the sorted ones: how far apart are two values near x with as large a share of the row's
  // elements in between.
  double width(double x, double share) const {
    const int place =
        std::lower_bound(values, values + size, x, [](T a, double b) { return a > b; }) - values;
    const int first = std::max(place - 8, 0), last = std::min(place + 8, size - 1);
    return (static_cast<double>(values[first]) - values[last]) / (last - first) * size * share;
  }
};

// Where the K-th largest element of a row lies, with #(+inf) < K <= n - #(-inf).
template <typename T>
struct CountBracket {
  T lo, hi;                  // |{x >= lo}| >= K > |{x >= hi}|
  int64_t from_lo, from_hi;  // those counts
  bool adjacent;             // no element lies between lo and hi
};

// Counts until at most kCandidates elements are left in [lo, hi), or only those equal to lo.
template <typename T>
CountBracket<T> bracket_by_counts(const RowSweeps<T>& sweeps, const Row& row, const Range<T>& range,
                                  int64_t K, const Guesses<T>& guesses) {
  constexpr T inf = std::numeric_limits<T>::infinity();
  const int64_t most = row.n - range.minus;
  CountBracket<T> b{range.min, inf, most, range.plus, false};
  T top = inf;  // hi or the last element below it: with hi alone an outlier would stop the search
  const auto wide = [&] { return !b.adjacent && b.from_lo - b.from_hi > kCandidates; };
  const auto split = [&](T c) {
    const Split<T> split = sweeps.split(row, c);
    if (split.count >= K) {
      b.lo = split.r_A, b.from_lo = split.count;
    } else {
      top = split.r_A < b.hi ? split.r_A : split.r_B;
      b.hi = split.r_A, b.from_hi = split.count;
    }
    b.adjacent = b.lo == top || (split.count < K && split.r_B == b.lo);
  };
  for (const T c : {guesses.low, guesses.high})
    if (wide() && c > b.lo && c < b.hi) split(c);
  for (int step = 0; wide(); ++step) {
    const T high = std::min(top, range.max);
    const Bracket bracket{b.lo,
                          high,
                          static_cast<double>(b.from_lo),
                          static_cast<double>(b.from_hi),
                          static_cast<double>(range.plus),
                          static_cast<double>(most)};
    double c = middle(b.lo, high);
    if (step % 6 == 4)
      c = (static_cast<double>(b.lo) + high) / 2;
    else if (step % 6 != 5)
      c = bracket.interpolate(static_cast<double>(K), kCandidates / 4);
    split(std::min(std::max(static_cast<T>(c), std::nextafter(b.lo, inf)), top));
  }
  return b;
}

}  // namespace softtopk::cpu
