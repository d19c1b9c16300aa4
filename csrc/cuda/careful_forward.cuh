// The forward of the rows on chip that quick_forward.cuh leaves: large k, infinite elements, NaN, k
// out of its range, many ties.
//
// As there, but the window is that of a sample, closed on both sides (sample.cuh), and a warp, a
// block or a whole cluster searches among the candidates (many.cuh). The solution is checked
// against the definition; where it is not right, or the candidates are too many, all of the row is
// searched. What is still not solved, rows with NaN or more infinite elements than k among them, is
// left for the end, when the general search (threshold.cuh) reads it from global memory on every
// sweep: a call of it inside the loop would cost every row.
//
// The ladder, in fractions of the floor (H200, float32, alpha = 1e-2, k = n / 8, n = 4096 | 16384 |
// 65536):
//   0.14 | 0.16 | 0.07  sample, collapse and search as calls, one bit of the bounds a round
//   0.37 | 0.51 | 0.35  nothing called, several thresholds a round, rows shared out one by one
//   0.35 | 0.55 | 0.37  in the search one warp decides for all instead of every warp for itself
//   0.51 | 0.56 | 0.39  one warp seeks either end of the window, and neither waits for anyone; 9
//                       instructions an element in the collapse and 6.6 in the output instead of 13
//                       and 10; rows of up to 1024 chunks are two warps', so that up to 16 are on
//                       chip; one warp searches up to 2048 candidates
//   0.55 | 0.64 | 0.43  all warps seek the window; no local memory but for what is spilled: where
//                       rows are being written it takes a thousand cycles
// What limits now (cycles of a row of 65536 in four blocks, 45,000 in all): waiting for the row
// 5,000, the sample 4,000, the window 9,000, the collapse 10,000, the search 12,000, the output
// 3,000; most of them latencies, which three blocks on a multiprocessor do not hide.
#pragma once

#include "collapse.cuh"
#include "exponent.cuh"
#include "sample.cuh"

namespace softtopk::cuda {

struct ForwardArgs {
  Rows x;
  PerRow k, alpha;
  Form form;
  void* out;
  void* solution;       // null: nobody needs it
  uint16_t* marks;      // of rows on chip: where a row is marked as left, in the solution or in out
  int64_t mark_stride;  // from row to row
  bool wide_x, wide_out;  // every row starts on 16 bytes
  bool fed;               // of rows on chip: by the copy engine
  int32_t room;           // and the candidates that a block has room for
  int64_t first_row;
};

template <class T>
__device__ __forceinline__ void write_solution(const ForwardArgs& args, int64_t r,
                                               const Solution<T>& s) {
  if (args.solution == nullptr) return;
  T* out = static_cast<T*>(args.solution) + 5 * r;
  out[0] = s.r_A, out[1] = s.r_B, out[2] = s.P, out[3] = s.Q, out[4] = s.D;
}

// Candidates up to which one warp searches: it does so in fewer instructions than a block.
inline constexpr int32_t kFewOfWarp = 2048;

// The mark of a row that is left to forward_careful, in the place of the upper half of D or of p_0:
// in every type a NaN of no computation.
inline constexpr uint16_t kLeft = 0x7fd1;
__device__ __forceinline__ void leave(const ForwardArgs& args, int64_t r) {
  args.marks[r * args.mark_stride] = kLeft;
}
__device__ __forceinline__ bool is_left(const ForwardArgs& args, int64_t r) {
  return r < args.x.rows && args.marks[r * args.mark_stride] == kLeft;
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

// Whether a row comes by the copy engine. Whole granules of the last ragged row would reach beyond
// its end.
template <class H>
__device__ __forceinline__ bool is_fed(const ForwardArgs& args, int64_t r) {
  if (!args.fed || r >= args.x.rows) return false;
  return H::ragged ? r + 1 < args.x.rows && args.x.stride >= args.x.n : args.wide_x;
}

template <class H>
struct CarefulShared {
  static constexpr int warps = H::threads / 32;
  using Team = AllWarps<typename H::C, warps>;
  uint64_t barrier;
  Found found;
  CollapseShared<H> collapsed;
  typename Team::Storage team;
  typename Team::Mail mail;
};

__device__ __forceinline__ Found found_of(const Solution<float>& s, int32_t right, float rate) {
  const Densities<float> d = quick_densities(s, rate);
  return {s.r_A, s.r_B, d.h_A, d.h_B, right};
}

// The search by all warps, and its result in all threads.
template <uint32_t GRAIN, class H, class Values, class Team>
__device__ __forceinline__ Found search_together(const ForwardArgs& args, int64_t r,
                                                 const Values& values, const Outside& rest,
                                                 const Outside& near, const Budget& k, float alpha,
                                                 float rate, Team& team, CarefulShared<H>& shared) {
  if (threadIdx.x < 32) {
    int32_t right;
    const Solution<float> s =
        ManySearch<GRAIN, Lead<Team>, Values>(values, rest, k, alpha, rate, {team, shared.team})
            .solve(near, right);
    if (threadIdx.x == 0) {
      shared.found = found_of(s, right, rate);
      if (H::C::rank() == 0 && right) write_solution(args, r, s);
    }
    team.dismiss(shared.team);
  } else {
    team.answer(shared.team, values, rate);
  }
  return shared.found;
}

// p of a row, from its solution.
template <class H>
__device__ __forceinline__ void write_all(ResidentRow<H>& row, const ResidentSink<H>& sink,
                                          const Found& found, float rate) {
  using S = typename H::S;
  constexpr int kSize = Chunk<S>::size;
  const Origin origin(found.r_A, found.r_B, rate, sizeof(S) == 2 ? 32.0f : 4.0f);
  const auto fill = [&](float h_A, float h_B, auto exponential) {
    sink.fill(row, [&](int item) {
      float x[kSize], p[kSize];
      row.read(item, x);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const bool above = x[i] >= found.r_A;
        const float e = exponential(x[i], above);
        p[i] = h_B * e;
        if (above) p[i] = fmaf(-h_A, e, 1.0f);
      }
      return Chunk<S>::of(p);
    });
  };
  if (origin.serves) {
    fill(origin.of_A(found.h_A), origin.of_B(found.h_B),
         [&](float x, bool) { return faster_exp2(-fabsf(origin.z(x))); });
  } else {
    const float at_A = found.r_A < infinity<float> ? found.r_A : 0,
                at_B = found.r_B > -infinity<float> ? found.r_B : 0;
    fill(found.h_A, found.h_B, [&](float x, bool above) {
      return faster_exp2(-fabsf(x - (above ? at_A : at_B)) * rate);
    });
  }
}

// Blocks that registers must suffice for, on a multiprocessor: as many as fit in shared memory.
template <class H>
inline constexpr int careful_blocks_of = H::threads == 64 ? (sizeof(typename H::S) == 2 ? 16 : 10)
                                         : H::threads == 128          ? 6
                                         : sizeof(typename H::S) == 2 ? 4
                                                                      : 3;

// The rows that forward_quick has left.
template <class H>
__global__ void __launch_bounds__(H::threads, careful_blocks_of<H>)
    forward_careful(const __grid_constant__ ForwardArgs args) {
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ CarefulShared<H> shared;
  using S = typename H::S;
  using C = typename H::C;
  using Raw = typename Element<S>::Raw;
  using Team = AllWarps<C, H::threads / 32>;
  constexpr uint32_t kGrain = Element<S>::grain;
  const int32_t n = int32_t(args.x.n), t = int32_t(threadIdx.x), lane = t % 32;
  constexpr int warps = H::threads / 32;
  const Mapping<H> map{n};
  const int step = int(gridDim.x) / C::size();
  const int64_t own = int64_t(blockIdx.x) / C::size();
  ResidentRow<H> row(memory, &shared.barrier, map);
  float* candidates = reinterpret_cast<float*>(memory + row.slot_bytes());
  Team team(shared.mail);
  uint32_t phase = 0;
  bool unsolved = false;
  // Which warp searches alone, another one in each block of a multiprocessor and from row to row: a
  // scheduler has every fourth warp.
  int turn = int(blockIdx.x * uint64_t(8) / gridDim.x);
  C::sync();

  // Every cluster has each of its rows `step` after the last. Of 32 of them at a time those that
  // are left; none is solved before all threads have looked.
  for (int64_t first = own; first < args.x.rows; first += 32 * step) {
    uint32_t left = __ballot_sync(~0u, is_left(args, first + t % 32 * step));
    if (left != 0) C::sync();
    for (; left != 0; left &= left - 1) {
      const int64_t r = first + (__ffs(int(left)) - 1) * step;
      const double exact_k = per_row(args.k, r);
      const float alpha = float(per_row(args.alpha, r)), rate = 1.4426950408889634f / alpha;
      if (!(exact_k > 0 && exact_k < n && rate > 1e-36f && rate < 1e36f)) {
        unsolved = true;
        continue;
      }
      const Raw* data = static_cast<const Raw*>(args.x.data) + r * args.x.stride;
      if (is_fed<H>(args, r)) {
        row.ask(data, t < 32);
        row.template wait<1>(phase);
        phase ^= 1;
      } else {
        row.copy(data, args.wide_x);
      }
      if (!args.x.largest) row.negate();
      if (H::ragged || !args.x.largest) __syncthreads();
      const Budget k(exact_k);
      constexpr int32_t kSample = kSampleSize<H::threads>;
      take_sample(row, candidates);
      const Limits window = window_of_sample<kGrain, H::threads>(
          candidates, __fdividef((float(k.whole) + k.rest) * float(kSample), n), rate,
          *reinterpret_cast<SampleShared<warps>*>(candidates + kSample));
      Outside rest;
      int32_t in_block, right;
      Found found = {0, 0, 0, 0, 0};
      if (collapse(row, window, rate, candidates, kFewOfWarp, args.room, shared.collapsed, rest,
                   in_block)) {
        const Candidates all = {candidates, in_block};
        if (rest.candidates <= kFewOfWarp) {
          turn = (turn + 1) % warps;
          if (t / 32 == turn && C::rank() == 0) {
            const Solution<float> s =
                ManySearch<kGrain, OneWarp, Candidates>(all, rest, k, alpha, rate, {})
                    .solve(rest, right);
            found = found_of(s, right, rate);
            if (lane == 0 && right) write_solution(args, r, s);
            if (lane < C::size()) *C::at(&shared.found, lane) = found;
          }
          C::sync();
          found = shared.found;
        } else {
          found = search_together<kGrain>(args, r, all, rest, rest, k, alpha, rate, team, shared);
        }
      }
      if (!found.right) {
        C::sync();  // what the last search has used has been read
        const Outside none = {-largest<float>, largest<float>, n, 0, 0, 0};
        const WholeRow<H> all = {row};
        found = search_together<kGrain>(args, r, all, none, rest, k, alpha, rate, team, shared);
      }
      unsolved = unsolved || !found.right;
      if (found.right && args.form != Form::none) {
        const ResidentSink<H> sink(static_cast<Raw*>(args.out) + r * n, map, args.wide_out);
        write_all(row, sink, found, rate);
        sink.flush(row);
      }
      C::sync();  // the row has been read, and so have the candidates
    }
  }
  C::sync();  // a block that has left can no longer be written to

  if (!unsolved || C::rank() != 0) return;
  WholeBlock::Storage& storage = *reinterpret_cast<WholeBlock::Storage*>(memory);
  for (int64_t r = own; r < args.x.rows; r += step) {
    const bool left = is_left(args, r);
    __syncthreads();
    if (left) forward_of_global_row<S>(args, r, storage);
  }
}

}  // namespace softtopk::cuda
