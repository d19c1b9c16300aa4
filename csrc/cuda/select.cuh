// What the kernels of a code share (sparse_select.cu): their arguments, the activation of
// pre-activations, what is written of a row, and the careful selection of a row of any kind.
#pragma once

#include "row.cuh"
#include "threshold.cuh"
#include "unit.cuh"

namespace softtopk::cuda {

struct Entry;
struct Part;

struct SelectArgs {
  Rows x;
  PerRow k, alpha;
  Activation activation;
  Selecting mode;
  Code code;
  bool wide_x, wide_bias;  // every row, and the bias, starts on 16 bytes
  bool all;                // the careful kernel has all rows
  float threshold;         // the activation's, if it is one for all
  int64_t first_row;       // of the launch, where rows are short
  // Of rows on chip (quick_select.cuh): how they are cut, how many candidates of a unit a warp has
  // room for, and where the units of a row put theirs, what is known of these, and how many are
  // done; and how many units have been drawn.
  Units units;
  int32_t room;
  Entry* sent;
  Part* sent_parts;
  int32_t* arrived;
  int32_t* drawn;  // null: the blocks have units in turns
};

inline constexpr int32_t kLeftRow = -2;        // marks a row, in the place of its count
inline constexpr float kLeastKept = 0x1p-24f;  // of p and q

// Pre-activations to activations, a chunk at a time.
template <class S>
class Activated {
  using T = Compute<S>;
  using Raw = typename Element<S>::Raw;
  static constexpr int kSize = Chunk<S>::size;

 public:
  __device__ explicit Activated(const SelectArgs& args)
      : bias_(static_cast<const Raw*>(args.activation.bias)),
        thresholds_(args.activation.thresholds),
        threshold_(T(args.activation.threshold)),
        n_(int32_t(args.x.n)),
        wide_(args.wide_bias) {}

  // Of the chunk whose first element is the row's `first`; what lies before the row or beyond its
  // end stays.
  __device__ __forceinline__ Chunk<S> operator()(const Chunk<S>& chunk, int32_t first) const {
    T x[kSize], bias[kSize] = {}, threshold[kSize];
    chunk.read(x);
    const bool whole = first >= 0 && first + kSize <= n_;
    if (bias_ != nullptr) {
      Chunk<S> biases{};
      if (wide_ && whole) {
        biases.words = __ldg(reinterpret_cast<const uint4*>(bias_ + first));
      } else {
#pragma unroll
        for (int i = 0; i < kSize; ++i)
          biases.set_raw(i, inside(first + i) ? bias_[first + i] : Raw(0));
      }
      biases.read(bias);
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      threshold[i] = threshold_;
      if (thresholds_ != nullptr && inside(first + i))
        threshold[i] = T(__ldg(thresholds_ + first + i));
    }
    Chunk<S> out{};
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      Raw raw = chunk.raw(i);
      if (bias_ != nullptr) raw = Element<S>::raw(x[i] + bias[i]);
      if (Element<S>::value(raw) <= threshold[i]) raw = Raw(0);
      out.set_raw(i, inside(first + i) ? raw : chunk.raw(i));
    }
    return out;
  }

 private:
  __device__ __forceinline__ bool inside(int32_t index) const {
    return uint32_t(index) < uint32_t(n_);
  }

  const Raw* bias_;
  const float* thresholds_;
  T threshold_;
  int32_t n_;
  bool wide_;
};

// Where a row's part of the code is.
template <class T>
class CodeRow {
 public:
  __device__ CodeRow(const Code& code, int64_t r)
      : values_(static_cast<T*>(code.values) + r * code.max_active),
        active_(static_cast<T*>(code.active) + r * code.max_active),
        indices_(code.indices + r * code.max_active),
        counts_(code.counts + r),
        room_(int32_t(code.max_active)) {}

  __device__ int32_t room() const { return room_; }
  // Writes an entry, if there is room for it.
  __device__ __forceinline__ void write(int32_t place, int32_t index, T value, T active) const {
    if (place >= room_) return;
    values_[place] = value;
    indices_[place] = index;
    active_[place] = active;
  }
  // Writes what is left besides `count` entries, by `threads` threads: their number, and the places
  // that are not used.
  __device__ __forceinline__ void write_rest(int32_t count, int32_t n, int rank,
                                             int threads) const {
    for (int32_t i = count + rank; i < room_; i += threads) write(i, n, T(0), T(0));
    if (rank == 0) *counts_ = count;
  }

 private:
  T *values_, *active_;
  int32_t *indices_, *counts_;
  int32_t room_;
};

// By one thread: the solution, and the shares of q of what is not in the code.
template <class T>
__device__ __forceinline__ void write_state(const Code& code, int64_t r, const Solution<T>& s,
                                            T Q_out, T M_out) {
  T* const state = static_cast<T*>(code.state) + 7 * r;
  state[0] = s.r_A;
  state[1] = s.r_B;
  state[2] = s.P;
  state[3] = s.Q;
  state[4] = s.D;
  state[5] = Q_out;
  state[6] = M_out;
}

// The activations of a row, made anew from global memory whenever they are read.
template <class S, class Group>
class ActivatedRow : public LongRow<S, Group> {
 public:
  __device__ ActivatedRow(const Source<S>& source, const Activated<S>& activated)
      : LongRow<S, Group>(source.chunks()), source_(source), activated_(activated) {}
  __device__ Chunk<S> chunk(int32_t item) const {
    const int32_t index = chunk_index<Group>(item);
    return activated_(source_.load(index), index * Chunk<S>::size);
  }

 private:
  Source<S> source_;
  Activated<S> activated_;
};

// Those of a short row, made once.
template <class S, class Group, int ITEMS>
class ActivatedRegisters : public RegisterRow<S, Group, ITEMS> {
 public:
  __device__ ActivatedRegisters(const Source<S>& source, const Activated<S>& activated)
      : RegisterRow<S, Group, ITEMS>(source, nullptr) {
    this->for_each([&](int32_t item) {
      this->row_[item] = activated(this->row_[item], chunk_index<Group>(item) * Chunk<S>::size);
    });
  }
};

// The code of row r by a group of threads. Its order is that of the chunks: item by item, and the
// threads within an item.
template <class S, class Row, class Group>
__device__ __forceinline__ void select_row(const SelectArgs& args, int64_t r, Group& group) {
  using T = Compute<S>;
  constexpr int kSize = Chunk<S>::size;
  const int32_t n = int32_t(args.x.n);
  const Source<S> source(args.x.data, r * args.x.stride, n, args.wide_x, false);
  const Row row(source, Activated<S>(args));
  Sweeper<S, Row, Group> sweeper(row, group);
  const CodeRow<T> to(args.code, r);
  const double k = per_row(args.k, r);
  const bool soft = args.mode != Selecting::hard, masked = args.mode != Selecting::soft;

  Solution<T> s = {};
  T alpha = 1;
  if (soft) {
    alpha = scale_in<T>(per_row(args.alpha, r));
    s = solve(sweeper, k, alpha);
  }
  Cut<T> cut = {};
  if (masked) cut = hard_cut<T>(sweeper, k, n);
  if (s.D != s.D || cut.value != cut.value) {
    if (group.rank() == 0) {
      to.write(0, 0, nan<T>, nan<T>);
      if (soft) write_state(args.code, r, {nan<T>, nan<T>, nan<T>, nan<T>, nan<T>}, nan<T>, nan<T>);
    }
    return to.write_rest(1, n, group.rank(), Group::size());
  }

  const Densities<T> factors = densities(s, alpha);
  const Tails<T> tails(s.r_A, s.r_B, alpha);
  const T anchor = s.r_B == -infinity<T> ? s.r_A : s.r_B;
  CompensatedSum<T> Q_out, M_out;
  int32_t count = 0, ties = 0;  // in the chunks so far
  row.for_each([&](int32_t item) {
    T x[kSize];
    row.chunk(item).read(x);
    unsigned in_mask = 0, kept = 0, total;
    if (masked) {
      unsigned equal = 0;
#pragma unroll
      for (int i = 0; i < kSize; ++i) equal += x[i] == cut.value;
      int32_t rank = ties + int32_t(group.scan(equal, &total));
      ties += int32_t(total);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const bool tie = x[i] == cut.value;
        in_mask |= unsigned(x[i] > 0 && (x[i] > cut.value || (tie && rank < cut.ties))) << i;
        rank += tie;
      }
      kept = in_mask;
    }
    T p[kSize], q[kSize];
    if (soft) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const bool above = tails.above(x[i]);
        const T e = tails(x[i]);
        q[i] = (above ? factors.q_A : factors.q_B) * e;
        p[i] = above ? 1 - factors.h_A * e : factors.h_B * e;
        kept |= unsigned(x[i] > 0 && (p[i] >= kLeastKept || q[i] >= kLeastKept)) << i;
      }
    }
    int32_t place = count + int32_t(group.scan(unsigned(__popc(kept)), &total));
    count += int32_t(total);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const bool keep = kept >> i & 1;
      if (keep) {
        T value = x[i];
        if (masked) {
          value = in_mask >> i & 1 ? x[i] : T(0);
        } else if (soft) {
          value = p[i] >= kLeastKept ? value * p[i] : T(0);
        }
        to.write(place, chunk_index<Group>(item) * kSize + i, value, x[i]);
      }
      if (soft && q[i] > 0 && !(keep && place < to.room())) {
        Q_out.add(q[i]);
        M_out.add(q[i] * ((x[i] - anchor) / alpha));
      }
      place += keep;
    }
  });
  if (soft) {
    const TailSums<T> out = group.reduce(TailSums<T>{Q_out.value(), M_out.value()});
    if (group.rank() == 0) write_state(args.code, r, s, out.P, out.Q);
  }
  to.write_rest(count, n, group.rank(), Group::size());
}

}  // namespace softtopk::cuda
