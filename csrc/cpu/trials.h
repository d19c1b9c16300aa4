// Where to split a row next: shared by the searches of soft_topk.cpp and hard_topk.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "sweeps.h"

namespace softtopk::cpu {

// A row with more elements than this inside the bracket is searched as a whole; with fewer, they
// are copied to the stack.
constexpr int kCandidates = 1024;

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
  T low = -std::numeric_limits<T>::infinity(), high = std::numeric_limits<T>::infinity();

  Guesses(const Sweeps<T>& sweeps, const Row& row, double share) {
    constexpr int kPlaces = 128;
    T values[kPlaces];
    int size = 0;
    for (int i = 0; i < kPlaces; ++i) {
      const T x = sweeps.element(row, row.n / kPlaces * i + row.n % kPlaces * i / kPlaces);
      if (!std::isinf(x)) values[size++] = x;
    }
    if (size == 0) return;
    std::sort(values, values + size, [](T a, T b) { return a > b; });
    const double margin = 3 * std::sqrt(size * share * (1 - share)) + 1;
    const double below = std::ceil(size * share + margin), above = size * share - margin;
    if (below < size) low = values[static_cast<int>(below)];
    if (above >= 0) high = values[static_cast<int>(above)];
  }
};

}  // namespace softtopk::cpu
