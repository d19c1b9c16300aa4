// The sweeps of sweeps.h over a row of any length: a long one in pieces, on several threads.
//
// Where the pieces end depends on n alone, and sums are added up in the order of the pieces, on one
// thread as on many: so no bit depends on the number of threads. What is exact (counts, extremes,
// the outputs) needs no pieces on one thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>

#include "sweeps.h"
#include "threads.h"

namespace softtopk::cpu {

// Whole blocks of every instruction set. A sweep takes a microsecond or two over a piece.
constexpr int64_t kPiece = 16384;
constexpr int64_t kMostPieces = 128;
// A row with more elements than this inside the bracket is searched as a whole; with fewer, they
// are copied to the stack.
constexpr int kCandidates = 1024;

inline int64_t element_size(Type type) {
  return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2;
}

template <typename T>
class RowSweeps {
 public:
  // On the calling thread alone without a team.
  RowSweeps(Type type, Team* team)
      : table_(sweeps<T>(type)), size_(element_size(type)), team_(team) {}

  T element(const Row& row, int64_t i) const { return table_.element(row, i); }

  void sample(const Row& row, T* out) const { table_.sample(row, out); }

  Range<T> range(const Row& row) const {
    if (whole(row)) return table_.range(row);
    return reduce<Range<T>>(
        row, [&](int64_t first, int64_t n) { return table_.range(part(row, first, n)); },
        [](Range<T>& a, const Range<T>& b) {
          a = {std::min(a.min, b.min), std::max(a.max, b.max), a.plus + b.plus, a.minus + b.minus,
               a.nan || b.nan};
        });
  }

  Split<T> split(const Row& row, T c) const {
    if (whole(row)) return table_.split(row, c);
    return reduce<Split<T>>(
        row, [&](int64_t first, int64_t n) { return table_.split(part(row, first, n), c); },
        [](Split<T>& a, const Split<T>& b) {
          a = {a.count + b.count, std::min(a.r_A, b.r_A), std::max(a.r_B, b.r_B)};
        });
  }

  Tails tails(const Row& row, const Scale<T>& scale) const {
    if (row.n <= kPiece) return table_.tails(row, scale);
    return reduce<Tails>(
        row, [&](int64_t first, int64_t n) { return table_.tails(part(row, first, n), scale); },
        [](Tails& a, const Tails& b) {
          a.P += b.P, a.Q += b.Q, a.count += b.count, a.below += b.below;
        });
  }

  // At most kCandidates elements lie inside; out has room for kCandidates + kGatherRoom.
  int64_t gather(const Row& row, T lo, T hi, T* out) const {
    if (whole(row)) return table_.gather(row, lo, hi, out, kCandidates);
    struct Found {
      int64_t count, place;
    } found[kMostPieces];
    T unordered[kCandidates];
    std::atomic<int64_t> end{0};
    each(row, [&](int64_t i, int64_t first, int64_t n) {
      T own[kCandidates + kGatherRoom];
      const int64_t count = table_.gather(part(row, first, n), lo, hi, own, kCandidates);
      found[i] = {count, end.fetch_add(count, std::memory_order_relaxed)};
      std::memcpy(unordered + found[i].place, own, count * sizeof(T));
    });
    int64_t total = 0;
    for (int64_t i = 0; i < pieces(row.n); total += found[i++].count)
      std::memcpy(out + total, unordered + found[i].place, found[i].count * sizeof(T));
    return total;
  }

  int64_t find(const Row& row, T value) const {
    if (whole(row)) return table_.find(row, value);
    std::atomic<int64_t> least{row.n};
    each(row, [&](int64_t, int64_t first, int64_t n) {
      if (first > least.load(std::memory_order_relaxed)) return;
      const int64_t i = table_.find(part(row, first, n), value);
      int64_t before = least.load(std::memory_order_relaxed);
      while (i >= 0 && first + i < before && !least.compare_exchange_weak(before, first + i)) {
      }
    });
    return least;
  }

  void probabilities(const Row& row, const Scale<T>& scale, T h_A, T h_B, void* p) const {
    write(row, p, [&](const Row& some, int64_t, void* out) {
      table_.probabilities(some, scale, h_A, h_B, out);
    });
  }

  Means means(const Row& row, const Row& v, const Scale<T>& scale, const Pivot<T>& pivot) const {
    if (row.n <= kPiece) return table_.means(row, v, scale, pivot);
    return reduce<Means>(
        row,
        [&](int64_t first, int64_t n) {
          return table_.means(part(row, first, n), part(v, first, n), scale, pivot);
        },
        [](Means& a, const Means& b) { a.v += b.v, a.t += b.t; });
  }

  double gradient(const Row& row, const Row& v, const Scale<T>& scale, const Pivot<T>& pivot,
                  const Means& means, void* grad_x) const {
    if (row.n <= kPiece) return table_.gradient(row, v, scale, pivot, means, grad_x);
    return reduce<double>(
        row,
        [&](int64_t first, int64_t n) {
          return table_.gradient(part(row, first, n), part(v, first, n), scale, pivot, means,
                                 at(grad_x, first));
        },
        [](double& a, double b) { a += b; });
  }

  void log_probabilities(const Row& row, const Scale<T>& scale, const LogOutput<T>& form,
                         void* out) const {
    write(row, out, [&](const Row& some, int64_t, void* to) {
      table_.log_probabilities(some, scale, form, to);
    });
  }

  LogMeans log_means(const Row& row, const Row& v, const Scale<T>& scale,
                     const LogPivot<T>& pivot) const {
    if (row.n <= kPiece) return table_.log_means(row, v, scale, pivot);
    return reduce<LogMeans>(
        row,
        [&](int64_t first, int64_t n) {
          return table_.log_means(part(row, first, n), part(v, first, n), scale, pivot);
        },
        [](LogMeans& a, const LogMeans& b) {
          a.u += b.u, a.t += b.t, a.rest_q += b.rest_q, a.rest_v += b.rest_v;
        });
  }

  double log_gradient(const Row& row, const Row& v, const Scale<T>& scale, const LogPivot<T>& pivot,
                      const LogMoments<T>& moments, void* grad_x) const {
    if (row.n <= kPiece) return table_.log_gradient(row, v, scale, pivot, moments, grad_x);
    return reduce<double>(
        row,
        [&](int64_t first, int64_t n) {
          return table_.log_gradient(part(row, first, n), part(v, first, n), scale, pivot, moments,
                                     at(grad_x, first));
        },
        [](double& a, double b) { a += b; });
  }

  void mask(const Row& row, T value, int64_t ties, void* out) const {
    if (whole(row)) return table_.mask(row, value, ties, out);
    Counts counts[kMostPieces + 1];
    count_before(row, value, counts);
    write(row, out, [&](const Row& some, int64_t i, void* to) {
      table_.mask(some, value, ties - counts[i].equal, to);
    });
  }

  void indices(const Row& row, T value, int64_t ties, int64_t* out) const {
    if (whole(row)) return table_.indices(row, value, ties, out);
    Counts counts[kMostPieces + 1];
    count_before(row, value, counts);
    const auto place = [&](int64_t i) {
      return out + counts[i].above + std::min(ties, counts[i].equal);
    };
    each(row, [&](int64_t i, int64_t first, int64_t n) {
      table_.indices(part(row, first, n), value, ties - counts[i].equal, place(i));
      std::for_each(place(i), place(i + 1), [&](int64_t& index) { index += first; });
    });
  }

  void fill(const Row& row, T value, void* out) const {
    write(row, out, [&](const Row& some, int64_t, void* to) { table_.fill(some, value, to); });
  }

 private:
  bool whole(const Row& row) const { return !team_ || row.n <= kPiece; }

  // How long the pieces of a row of n are, the last one excepted, and how many.
  static int64_t length(int64_t n) {
    const int64_t least = (n + kMostPieces - 1) / kMostPieces;
    return std::max(kPiece, (least + 1023) / 1024 * 1024);
  }
  static int64_t pieces(int64_t n) { return (n + length(n) - 1) / length(n); }

  Row part(const Row& row, int64_t first, int64_t n) const {
    return {static_cast<const char*>(row.data) + first * size_, n, row.negate};
  }
  void* at(void* out, int64_t first) const { return static_cast<char*>(out) + first * size_; }

  // f(i, first, n) for every piece.
  template <typename F>
  void each(const Row& row, F f) const {
    const int64_t size = length(row.n), count = pieces(row.n);
    const auto piece = [&](int64_t i) { f(i, i * size, std::min(size, row.n - i * size)); };
    if (!team_) {
      for (int64_t i = 0; i < count; ++i) piece(i);
      return;
    }
    team_->share(count, std::ref(piece));
  }

  // f(first, n) of every piece, merged in their order.
  template <typename R, typename F, typename Merge>
  R reduce(const Row& row, F f, Merge merge) const {
    R results[kMostPieces];
    each(row, [&](int64_t i, int64_t first, int64_t n) { results[i] = f(first, n); });
    for (int64_t i = 1; i < pieces(row.n); ++i) merge(results[0], results[i]);
    return results[0];
  }

  // f(piece, i, where it writes) for every piece, or once for the whole row.
  template <typename F>
  void write(const Row& row, void* out, F f) const {
    if (whole(row)) return f(row, 0, out);
    each(row,
         [&](int64_t i, int64_t first, int64_t n) { f(part(row, first, n), i, at(out, first)); });
  }

  // What the pieces before each hold; the last entry is of the whole row.
  void count_before(const Row& row, T value, Counts* before) const {
    each(row, [&](int64_t i, int64_t first, int64_t n) {
      before[i + 1] = table_.counts(part(row, first, n), value);
    });
    before[0] = {0, 0};
    for (int64_t i = 0; i < pieces(row.n); ++i)
      before[i + 1].above += before[i].above, before[i + 1].equal += before[i].equal;
  }

  const Sweeps<T>& table_;
  const int64_t size_;
  Team* const team_;
};

}  // namespace softtopk::cpu
