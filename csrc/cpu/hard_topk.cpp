// Hard top-k on the CPU: the K largest elements of a row, lowest index first among equals.
//
// The K-th largest value is found by counting elements above trial values, in a bracket (lo, hi)
// with |{x >= lo}| >= K > |{x >= hi}|; once few elements are left inside, they are copied to the
// stack and selected there. Then one sweep writes the mask or the indices.
#include <algorithm>
#include <cmath>
#include <limits>

#include "rows.h"
#include "trials.h"

namespace softtopk::cpu {
namespace {

template <typename T>
struct Cut {
  T value;       // everything above is selected
  int64_t ties;  // and so many of the elements equal to it
  int64_t count;
  bool nan;
};

// round-half-up(k) within [#(+inf), n - #(-inf)], at most max_k.
int64_t budget(double k, int64_t plus, int64_t most, int64_t max_k) {
  const double rounded = std::floor(k + 0.5);
  const double clamped =
      std::min(std::max(rounded, static_cast<double>(plus)), static_cast<double>(most));
  return std::min(static_cast<int64_t>(clamped), max_k);
}

template <typename T>
Cut<T> cut(const Sweeps<T>& sweeps, const Row& row, double k, int64_t max_k) {
  constexpr T inf = std::numeric_limits<T>::infinity();
  const Range<T> range = sweeps.range(row);
  if (range.nan || std::isnan(k)) return {inf, 0, 0, true};
  const int64_t most = row.n - range.minus;
  const int64_t K = budget(k, range.plus, most, max_k);
  if (K <= range.plus) return {inf, K, K, false};

  // lo is the largest value known with |{x >= lo}| >= K, hi the smallest known with fewer than K.
  T lo = range.min, hi = inf;
  int64_t from_lo = most, from_hi = range.plus;
  const auto split = [&](T c) {
    const Split<T> split = sweeps.split(row, c);
    if (split.count >= K) {
      lo = split.r_A, from_lo = split.count;
    } else {
      hi = split.r_A, from_hi = split.count;
      if (split.r_B == lo) from_lo = from_hi;  // nothing but lo itself is left
    }
  };
  if (from_lo - from_hi > kCandidates) {
    const double finite = static_cast<double>(most - range.plus);
    const Guesses<T> guesses(sweeps, row, static_cast<double>(K - range.plus) / finite);
    for (const T c : {guesses.low, guesses.high})
      if (c > lo && c < hi) split(c);
  }
  for (int step = 0; from_lo - from_hi > kCandidates; ++step) {
    const T high = std::min(hi, range.max);
    const Bracket bracket{lo,          high, double(from_lo), double(from_hi), double(range.plus),
                          double(most)};
    double c = middle(lo, high);
    if (step % 4 == 2)
      c = (static_cast<double>(lo) + high) / 2;
    else if (step % 4 != 3)
      c = bracket.interpolate(static_cast<double>(K), kCandidates / 4);
    split(std::min(std::max(static_cast<T>(c), std::nextafter(lo, inf)), hi));
  }
  if (from_lo == from_hi) return {lo, K - from_hi, K, false};

  T candidates[kCandidates];
  const T below = std::nextafter(lo, -inf);
  const int64_t count = sweeps.gather(row, below, hi, candidates, kCandidates);
  T* const wanted = candidates + (K - from_hi - 1);
  std::nth_element(candidates, wanted, candidates + count, [](T a, T b) { return a > b; });
  const int64_t larger =
      std::count_if(candidates, candidates + count, [&](T x) { return x > *wanted; });
  return {*wanted, K - from_hi - larger, K, false};
}

template <typename F>
void for_cuts(const Rows& x, const PerRow& k, int64_t max_k, int threads, F f) {
  with_compute_type(x.type, [&](auto zero) {
    using T = decltype(zero);
    const Sweeps<T>& row_sweeps = sweeps<T>(x.type);
    for_rows(x, threads, [&](int64_t row) {
      const Row elements = row_at(x, row);
      f(row_sweeps, elements, row, cut(row_sweeps, elements, value_at(k, row), max_k));
    });
  });
}

}  // namespace

void hard_topk_mask(const Rows& x, const PerRow& k, void* mask, int threads) {
  for_cuts(x, k, x.n, threads, [&](const auto& sweeps, const Row& elements, int64_t row, auto cut) {
    void* out = output_at(x, mask, row);
    if (cut.nan)
      sweeps.fill(elements, std::numeric_limits<decltype(cut.value)>::quiet_NaN(), out);
    else
      sweeps.mask(elements, cut.value, cut.ties, out);
  });
}

void hard_topk_indices(const Rows& x, const PerRow& k, int64_t max_k, int64_t* indices,
                       int64_t* counts, int threads) {
  for_cuts(x, k, max_k, threads,
           [&](const auto& sweeps, const Row& elements, int64_t row, auto cut) {
             int64_t* const out = indices + row * max_k;
             if (cut.count > 0) sweeps.indices(elements, cut.value, cut.ties, out);
             std::fill(out + cut.count, out + max_k, int64_t{-1});
             counts[row] = cut.count;
           });
}

}  // namespace softtopk::cpu
