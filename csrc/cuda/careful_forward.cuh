// The forward of the rows on chip that quick_forward.cuh leaves: large k, infinite elements, NaN, k
// out of its range, many ties.
//
// As there, but the window may be that of a sample, closed on both sides (window.cuh), and a block
// or a whole cluster searches among many candidates. Where that fails too, the general search
// (threshold.cuh) reads the row from global memory on every sweep.
#pragma once

#include "window.cuh"

namespace softtopk::cuda {

struct ForwardArgs {
  Rows x;
  PerRow k, alpha;
  Form form;
  void* out;
  void* solution;
  bool wide_x, wide_out;  // every row starts on 16 bytes
  bool fed;               // of rows on chip: by the copy engine
  int32_t room;           // and the candidates that a block has room for
  int64_t first_row;
};

template <class T>
__device__ __forceinline__ void write_solution(const ForwardArgs& args, int64_t r,
                                               const Solution<T>& s) {
  T* out = static_cast<T*>(args.solution) + 5 * r;
  out[0] = s.r_A, out[1] = s.r_B, out[2] = s.P, out[3] = s.Q, out[4] = s.D;
}

// The mark of a row that is left to forward_careful, in the place of D: a NaN of no computation.
inline constexpr uint32_t kLeft = 0x7fc0d1e5;
__device__ __forceinline__ void leave(const ForwardArgs& args, int64_t r) {
  static_cast<uint32_t*>(args.solution)[5 * r + 4] = kLeft;
}
__device__ __forceinline__ bool is_left(const ForwardArgs& args, int64_t r) {
  return r < args.x.rows && static_cast<const uint32_t*>(args.solution)[5 * r + 4] == kLeft;
}

// p in the place of x.
template <class T, int N>
__device__ __forceinline__ void to_probabilities(T (&x)[N], const Tails<T>& tails, T h_A, T h_B) {
#pragma unroll
  for (T& value : x) {
    const T e = tails(value);
    value = tails.above(value) ? 1 - h_A * e : h_B * e;
  }
}

// The general search over a row in global memory.
template <class S>
__device__ __noinline__ void forward_of_global_row(const ForwardArgs& args, int64_t r,
                                                   WholeBlock::Storage& storage) {
  const int32_t n = int32_t(args.x.n);
  WholeBlock group(storage);
  const Source<S> source(args.x.data, r * args.x.stride, n, args.wide_x, !args.x.largest);
  using Row = GlobalRow<S, WholeBlock, 0>;
  const Row row(source, nullptr);
  const float alpha = scale_in<float>(per_row(args.alpha, r));
  Sweeper<S, Row, WholeBlock> sweeper(row, group);
  const Solution<float> s = solve(sweeper, per_row(args.k, r), alpha);
  if (group.rank() == 0) write_solution(args, r, s);
  if (args.form == Form::none) return;
  const Sink<S> sink(args.out, r * n, n, args.wide_out);
  const Densities<float> d = densities(s, alpha);
  const Tails<float> tails(s.r_A, s.r_B, alpha);
  row.for_each([&](int32_t item) {
    float x[Chunk<S>::size];
    row.chunk(item).read(x);
    to_probabilities(x, tails, d.h_A, d.h_B);
    sink.store(chunk_index<WholeBlock>(item), Chunk<S>::of(x));
  });
}

struct ForwardShared {
  uint64_t barrier;
  Window windows[kMostBlocks];
  Collapsed totals[kMostBlocks];
  Window windows_of_warps[kMostThreads / 32];
  Collapsed of_warps[kMostThreads / 32];
  Outcome outcome;
  WholeBlock::Storage block;
};

// Whether a row comes by the copy engine. Whole granules of the last ragged row would reach beyond
// its end.
template <class H>
__device__ __forceinline__ bool is_fed(const ForwardArgs& args, int64_t r) {
  if (!args.fed || r >= args.x.rows) return false;
  return H::ragged ? r + 1 < args.x.rows && args.x.stride >= args.x.n : args.wide_x;
}

// The row's window, the same in all threads of all blocks. Of attempt 0 by maxima, of 1 by a
// sample.
template <class H>
__device__ __forceinline__ Window find_window(const ResidentRow<H>& row, int attempt, double k,
                                              float rate, uint32_t* keys, ForwardShared& shared) {
  using S = typename H::S;
  using C = typename H::C;
  constexpr int kGroups = 8, kKeys = kGroups / 2, threads = H::threads;
  const int t = int(threadIdx.x);
  float maxima[kGroups];
#pragma unroll
  for (float& max : maxima) max = -infinity<float>;
  const int items = row.items();
  int first = 0;
#pragma unroll 1
  for (; first + kGroups <= items; first += kGroups) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      maxima[i] = max_with_nan(maxima[i], row.max(first + i));
    }
  }
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    if (first + i < items) {
      maxima[i] = max_with_nan(maxima[i], row.max(first + i));
    }
  }
  Window mine;
  if (attempt == 0) {
    // Every warp bounds its share of the maxima; the least bound serves all of them.
    const int need = int(2 * k / (C::size() * (threads / 32))) + 1;
    uint32_t key[kKeys];
#pragma unroll
    for (int i = 0; i < kKeys; ++i) key[i] = key_of(max_with_nan(maxima[i], maxima[i + kKeys]));
    uint32_t most = key[0];
#pragma unroll
    for (int i = 1; i < kKeys; ++i) most = max(most, key[i]);
    const float bound = value_of(bound_of_keys(key, need)),
                max = value_of(__reduce_max_sync(~0u, most));
    if (t % 32 == 0) shared.windows_of_warps[t / 32] = {bound, infinity<float>, max};
    __syncthreads();
    mine = WholeBlock::of_warps(shared.windows_of_warps[t % 8]);
  } else {
    // One element of each of several pieces, other pieces for other threads.
    const int each = min(items, kMostKeys / threads);
    for (int i = 0; i < each; ++i) {
      float x[Chunk<S>::size];
      row.read((t + i * items / each) % items, x);
      keys[i * threads + t] = key_of(x[0]);
    }
#pragma unroll
    for (int i = 1; i < kGroups; ++i) maxima[0] = max_with_nan(maxima[0], maxima[i]);
    __syncthreads();
    WholeBlock block(shared.block);
    const float places = float(items) * float(row.map().piece_elements() * C::size());
    mine = window_of_sample(keys, each * threads, float(k) / places, rate, block);
    mine.max = block.reduce(Window{0, 0, maxima[0]}).max;
  }
  if constexpr (C::many) {
    if (t < C::size()) *C::at(&shared.windows[C::rank()], t) = mine;
    C::sync();
    mine = shared.windows[0];
    for (int i = 1; i < C::size(); ++i) mine.combine(shared.windows[i]);
  }
  return mine;
}

// Adds up what lies outside of the window and collects the candidates, as far as there is room: of
// few, all in the first block, else each block its own. The totals are the same in all threads.
template <class H>
__device__ __forceinline__ Collapsed collapse(const ResidentRow<H>& row, const Window& window,
                                              float rate, float* candidates, int32_t room,
                                              ForwardShared& shared) {
  using C = typename H::C;
  constexpr int kSize = Chunk<typename H::S>::size;
  const int t = int(threadIdx.x), warp = t / 32, lane = t % 32;
  uint32_t found = 0;  // items with candidates
  Collapsed mine = {0, 0, 0, 0};
  if (window.U == infinity<float>) {
    row.for_each([&](int item) {
      float x[kSize], e[kSize];
      row.read(item, x);
      const int32_t before = mine.candidates;
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const bool inside = x[i] > window.L;
        e[i] = faster_exp2((x[i] - window.L) * rate);
        e[i] = inside ? 0.0f : e[i];
        mine.candidates += inside;
      }
      mine.T += tree_sum(e);
      if (mine.candidates > before) found |= 1u << item;
    });
  } else {
    row.for_each([&](int item) {
      float x[kSize], below[kSize], above[kSize];
      row.read(item, x);
      int32_t inside = 0;
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const bool is_below = x[i] <= window.L, is_above = x[i] >= window.U;
        const float e = faster_exp2((is_below ? x[i] - window.L : window.U - x[i]) * rate);
        below[i] = is_below ? e : 0.0f;
        above[i] = is_above ? e : 0.0f;
        mine.above += is_above;
        inside += !is_below && !is_above;
      }
      mine.T += tree_sum(below);
      mine.P += tree_sum(above);
      mine.candidates += inside;
      if (inside > 0) found |= 1u << item;
    });
  }

  const int32_t upto = int32_t(inclusive_scan<32>(unsigned(mine.candidates), lane));
  int32_t place = upto - mine.candidates;
  Collapsed of_warp;
  of_warp.candidates = __shfl_sync(~0u, upto, 31);
  of_warp.above = 0, of_warp.P = 0, of_warp.T = mine.T;
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) of_warp.T += __shfl_xor_sync(~0u, of_warp.T, mask);
  if (window.U < infinity<float>) {
    of_warp.above = __reduce_add_sync(~0u, mine.above), of_warp.P = mine.P;
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) of_warp.P += __shfl_xor_sync(~0u, of_warp.P, mask);
  }
  if (lane == 0) shared.of_warps[warp] = of_warp;
  __syncthreads();
  place += __reduce_add_sync(~0u, lane < warp ? shared.of_warps[lane].candidates : 0);
  Collapsed total = WholeBlock::of_warps(shared.of_warps[lane % 8]);
  float* to = candidates;
  bool fits = total.candidates <= room;
  if constexpr (C::many) {
    if (t < C::size()) *C::at(&shared.totals[C::rank()], t) = total;
    C::sync();
    total = shared.totals[0];
    int32_t before = 0;
    for (int i = 1; i < C::size(); ++i) {
      if (i <= C::rank()) before = total.candidates;
      fits = fits && shared.totals[i].candidates <= room;
      total.combine(shared.totals[i]);
    }
    fits = fits && shared.totals[0].candidates <= room;
    if (total.candidates <= room) {
      to = C::at(candidates, 0);
      place += before;
    }
  }
  if (!fits) {
    total.candidates = -1;
    return total;
  }
  for (; found != 0; found &= found - 1) {
    float x[kSize];
    row.read(__ffs(int(found)) - 1, x);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (x[i] > window.L && x[i] < window.U) to[place++] = x[i];
    }
  }
  return total;
}

// The threads of all blocks of a cluster, for the search among many candidates.
class WholeCluster {
 public:
  __device__ WholeCluster(WholeBlock::Storage& storage, unsigned char (*slots)[kMostBlocks][32])
      : block_(storage), slots_(slots) {}
  __device__ static int rank() { return int(threadIdx.x); }
  __device__ static int size() { return int(blockDim.x); }
  template <class A>
  __device__ A reduce(const A& a) {
    static_assert(sizeof(A) <= 32);
    const A mine = block_.reduce(a);
    set_ ^= 1;
    if (rank() < Cluster::size()) {
      *Cluster::at(reinterpret_cast<A*>(slots_[set_][Cluster::rank()]), rank()) = mine;
    }
    Cluster::sync();
    A all = *reinterpret_cast<const A*>(slots_[set_][0]);
    for (int i = 1; i < Cluster::size(); ++i)
      all.combine(*reinterpret_cast<const A*>(slots_[set_][i]));
    return all;
  }

 private:
  WholeBlock block_;
  unsigned char (*slots_)[kMostBlocks][32];
  int set_ = 0;
};

// The solution among the candidates that collapse() left, into every block's `outcome`.
template <class C>
__device__ __forceinline__ void solve_window(const ForwardArgs& args, int64_t r,
                                             const Window& window, const Collapsed& rest, double k,
                                             float alpha, const float* candidates,
                                             ForwardShared& shared) {
  const int t = int(threadIdx.x);
  if constexpr (C::many) {
    if (rest.candidates > args.room) {  // every block has its own
      __shared__ __align__(16) unsigned char slots[2][kMostBlocks][32];
      WholeCluster cluster(shared.block, slots);
      const int32_t own = shared.totals[C::rank()].candidates;
      const Outcome found =
          solve_candidates<WholeCluster>(candidates, own, window, rest, k, alpha, cluster);
      __syncthreads();
      if (t == 0) shared.outcome = found;
      if (t == 0 && C::rank() == 0 && found.right) write_solution(args, r, found.solution);
      C::sync();
      return;
    }
  }
  if (C::rank() == 0) {
    Outcome found;
    if (rest.candidates > kWarpCandidates) {
      WholeBlock block(shared.block);
      found =
          solve_candidates<WholeBlock>(candidates, rest.candidates, window, rest, k, alpha, block);
    } else if (t < 32) {
      Warp::Storage none;
      Warp warp(none);
      found = solve_candidates<Warp>(candidates, rest.candidates, window, rest, k, alpha, warp);
    }
    if (t < C::size()) *C::at(&shared.outcome, t) = found;
    if (t == 0 && found.right) write_solution(args, r, found.solution);
  }
  C::sync();
}

// The rows that forward_quick has left, shared out among the clusters.
template <class H>
__global__ void __launch_bounds__(H::threads, 4 * 256 / H::threads)
    forward_careful(const ForwardArgs args) {
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ ForwardShared shared;
  using S = typename H::S;
  using C = typename H::C;
  using Raw = typename Element<S>::Raw;
  constexpr int kSize = Chunk<S>::size;
  const int32_t n = int32_t(args.x.n);
  const Mapping<H> map{n};
  const int64_t step = int64_t(gridDim.x) / C::size();
  const auto row_at = [&](int64_t r) {
    return static_cast<const Raw*>(args.x.data) + r * args.x.stride;
  };

  ResidentRow<H> row(memory, &shared.barrier, map);
  float* candidates = reinterpret_cast<float*>(memory + row.slot_bytes());
  C::sync();

  // Of 32 rows at a time those that are left to be done; none is before all threads have looked.
  for (int64_t first = int64_t(blockIdx.x) / C::size() * 32; first < args.x.rows;
       first += step * 32) {
    uint32_t left = __ballot_sync(~0u, is_left(args, first + int(threadIdx.x) % 32));
    if (left != 0) C::sync();
    for (; left != 0; left &= left - 1) {
      const int64_t r = first + __ffs(int(left)) - 1;
      if (is_fed<H>(args, r)) row.ask(row_at(r));
      const double k = per_row(args.k, r);
      const float alpha = scale_in<float>(per_row(args.alpha, r));
      const float rate = 1.4426950408889634f / alpha;
      if (is_fed<H>(args, r)) {
        row.wait();
      } else {
        row.copy(row_at(r), args.wide_x);
      }
      if (!args.x.largest) row.negate();

      bool solved = false;
      if (k > 0 && k < n && rate > 1e-36f && rate < 1e36f) {
        // The window of the maxima serves where there are enough of them; else, or if it fails, a
        // sample's.
        for (int attempt = 2 * k / (C::size() * (H::threads / 32)) < 96 ? 0 : 1;
             attempt < 2 && !solved; ++attempt) {
          const Window window = find_window<H>(row, attempt, k, rate,
                                               reinterpret_cast<uint32_t*>(candidates), shared);
          if (!(window.max < infinity<float>) || !(window.L > -infinity<float>)) break;
          const Collapsed rest = collapse<H>(row, window, rate, candidates, args.room, shared);
          C::sync();
          if (rest.candidates < 0) continue;
          solve_window<C>(args, r, window, rest, k, alpha, candidates, shared);
          solved = shared.outcome.right;
        }
      }
      if (!solved) {
        __syncthreads();  // the search has read what the general one will reduce in
        if (C::rank() == 0) forward_of_global_row<S>(args, r, shared.block);
        C::sync();  // before the next row's window is written
      } else if (args.form != Form::none) {
        const Outcome found = shared.outcome;
        const Solution<float>& s = found.solution;
        const float at_A = fabsf(s.r_A) < infinity<float> ? s.r_A : 0, at_B = s.r_B;
        const ResidentSink<H> sink(static_cast<Raw*>(args.out) + r * n, map, args.wide_out);
        row.for_each([&](int item) {
          float x[kSize], p[kSize];
          row.read(item, x);
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            const bool above = x[i] >= s.r_A;
            const float e = faster_exp2(-fabsf(x[i] - (above ? at_A : at_B)) * rate);
            p[i] = (above ? 1.0f : 0.0f) + (above ? -found.h_A : found.h_B) * e;
          }
          sink.store(item, Chunk<S>::of(p));
        });
      }
      __syncthreads();  // the row has been read
    }
  }
  C::sync();  // a block that has left can no longer be written to
}

}  // namespace softtopk::cuda
