// The forward of rows on chip, for what is usual: k of up to some hundreds, finite rows.
//
// One pass over memory: the copy engine brings a row, p is written. In between three sweeps over
// shared memory: the maxima of groups, whence a bound below the threshold (window.cuh); one that
// collapses what lies below and collects the candidates; the output. The search among the
// candidates is one warp's (few.cuh). Several blocks to a multiprocessor hide each other's waiting.
// A row that does not fit the pattern is marked, and left to careful_forward.cuh.
//
// The ladder, in fractions of the floor (H200, float32, alpha = 1e-2, n = 4096 | 16384 | 65536):
//   0.19 | 0.18 | 0.12  every sweep of a search by counts over the whole row
//   0.19 | 0.40 | 0.33  a window and one pass, with a general solver called inside
//   0.30 | 0.49 | 0.39  ex2 with denormals flushed, threads and raggedness at compile time
//   0.58 | 0.82 | 0.58  no calls, no local memory: the unusual rows in a kernel of their own
//   0.71 | 0.91 | 0.65  the split and its sums in one pass over candidates, three trials a sweep
//   0.75 | 0.95 | 0.65  k + k / 4 maxima instead of 2 k: fewer candidates
// What did not help: rows in registers and the next one in shared memory (every call spills the
// row); bringing the next row into the L2 cache ahead of time (0.65 | 0.74 | 0.62). What limits
// now: while one warp searches, a third of the time, its block's other warps wait, and no more rows
// fit on chip.
#pragma once

#include "careful_forward.cuh"
#include "few.cuh"

namespace softtopk::cuda {

struct Part {  // of a row, a warp's or a block's
  float T;
  int32_t candidates;
};

template <int WARPS>
struct QuickShared {
  uint64_t barrier;
  Found found;
  BoundShared<WARPS> bound;
  float2 bounds_of_blocks[kMostBlocks];
  Part parts[WARPS];
  Part parts_of_blocks[kMostBlocks];
};

template <class H>
__global__ void __launch_bounds__(H::threads, 1280 / H::threads)
    forward_quick(const ForwardArgs args) {
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ QuickShared<H::threads / 32> shared;
  using S = typename H::S;
  using C = typename H::C;
  using Raw = typename Element<S>::Raw;
  constexpr int kSize = Chunk<S>::size, kWarps = H::threads / 32, kGroups = 8, kKeys = 4;
  const int32_t n = int32_t(args.x.n), t = int32_t(threadIdx.x);
  const int warp = t / 32, lane = t % 32;
  const Mapping<H> map{n};
  ResidentRow<H> row(memory, &shared.barrier, map);
  float* candidates = reinterpret_cast<float*>(memory + row.slot_bytes());
  C::sync();

  const int64_t step = int64_t(gridDim.x) / C::size();
  for (int64_t r = int64_t(blockIdx.x) / C::size(); r < args.x.rows; r += step) {
    const double exact_k = per_row(args.k, r);
    const float alpha = float(per_row(args.alpha, r)), rate = 1.4426950408889634f / alpha;
    // Of each warp's 128 maxima the bound takes at most three quarters.
    if (!(exact_k > 0 && exact_k < 48 * kWarps * C::size() && exact_k < n && rate > 1e-36f &&
          rate < 1e36f)) {
      if (t == 0 && C::rank() == 0) leave(args, r);
      continue;
    }
    const Raw* data = static_cast<const Raw*>(args.x.data) + r * args.x.stride;
    if (is_fed<H>(args, r)) {
      row.ask(data);
      row.wait();
    } else {
      row.copy(data, args.wide_x);
    }
    if (!args.x.largest) row.negate();
    const Budget k = {int32_t(exact_k), float(exact_k - int32_t(exact_k))};

    float maxima[kGroups];
#pragma unroll
    for (float& max : maxima) max = -infinity<float>;
    const int items = row.items();
#pragma unroll 1
    for (int first = 0; first < items; first += kGroups) {
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        if (first + i < items) maxima[i] = max_with_nan(maxima[i], row.max(first + i));
      }
    }
    uint32_t key[kKeys];
#pragma unroll
    for (int i = 0; i < kKeys; ++i) key[i] = key_of(max_with_nan(maxima[i], maxima[i + kKeys]));
    Found found;
    // The bound is an element that enough of the maxima reach, each block finding its share: a few
    // more than k of them, nearly always enough for S > k, or else more than 2 k, which always are.
    for (int attempt = 0; attempt < 2; ++attempt) {
      const int wanted = attempt == 0 ? k.whole + k.whole / 4 + 4 : 2 * k.whole + 2;
      float2 limits = bound_of_block<kWarps>(key, wanted / C::size() + 1, C::many, shared.bound);
      if constexpr (C::many) {
        if (t < C::size()) *C::at(&shared.bounds_of_blocks[C::rank()], t) = limits;
        C::sync();
        limits = shared.bounds_of_blocks[0];
        for (int i = 1; i < C::size(); ++i) limits = widest(limits, shared.bounds_of_blocks[i]);
      }
      const Window window = {limits.x, infinity<float>, limits.y};

      // Collapse and collect.
      uint32_t found_in = 0;  // items with candidates
      Part mine = {0, 0};
      float T[4] = {0, 0, 0, 0};
      row.for_each([&](int item) {
        float x[kSize];
        row.read(item, x);
        const int32_t before = mine.candidates;
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const float above = x[i] - window.L, e = faster_exp2(above * rate);
          if (above > 0) {
            ++mine.candidates;
          } else {
            T[i % 4] += e;
          }
        }
        if (mine.candidates != before) found_in |= 1u << item;
      });
      mine.T = tree_sum(T);
      const int32_t upto = int32_t(inclusive_scan<32>(unsigned(mine.candidates), lane));
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) mine.T += __shfl_xor_sync(~0u, mine.T, mask);
      if (lane == 31) shared.parts[warp] = {mine.T, upto};
      __syncthreads();
      Part total = {0, 0};
      int32_t place = upto - mine.candidates;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) {
        if (i < warp) place += shared.parts[i].candidates;
        total.T += shared.parts[i].T;
        total.candidates += shared.parts[i].candidates;
      }
      if constexpr (C::many) {
        if (t < C::size()) *C::at(&shared.parts_of_blocks[C::rank()], t) = total;
        C::sync();
        total = {0, 0};
        for (int i = 0; i < C::size(); ++i) {
          if (i < C::rank()) place += shared.parts_of_blocks[i].candidates;
          total.T += shared.parts_of_blocks[i].T;
          total.candidates += shared.parts_of_blocks[i].candidates;
        }
      }
      const bool usual =
          window.L > -infinity<float> && window.max < infinity<float> && total.candidates <= kFew;
      if (usual) {
        float* to = C::at(candidates, 0);
        for (; found_in != 0; found_in &= found_in - 1) {
          float x[kSize];
          row.read(__ffs(int(found_in)) - 1, x);
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            if (x[i] > window.L) to[place++] = x[i];
          }
        }
      }
      C::sync();

      if (warp == 0 && C::rank() == 0) {
        found = {0, 0, 0, 0, 0};
        if (usual) {
          const Solution<float> s =
              FewSearch<Element<S>::grain>(candidates, window, total.candidates, total.T, k, alpha,
                                           rate)
                  .solve(found.right);
          found.r_A = s.r_A, found.r_B = s.r_B;
          const Densities<float> d = quick_densities(s, rate);
          found.h_A = d.h_A, found.h_B = d.h_B;
          if (lane == 0 && found.right) write_solution(args, r, s);
        }
        if (lane == 0 && !found.right && attempt == 1) leave(args, r);
        if (lane < C::size()) *C::at(&shared.found, lane) = found;
      }
      C::sync();
      found = shared.found;
      if (found.right) break;
    }
    if (found.right && args.form != Form::none) {
      const float at_A = found.r_A < infinity<float> ? found.r_A : 0, at_B = found.r_B;
      const ResidentSink<H> sink(static_cast<Raw*>(args.out) + r * n, map, args.wide_out);
      row.for_each([&](int item) {
        float x[kSize], p[kSize];
        row.read(item, x);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const bool above = x[i] >= found.r_A;
          const float e = faster_exp2(-fabsf(x[i] - (above ? at_A : at_B)) * rate);
          p[i] = (above ? 1.0f : 0.0f) + (above ? -found.h_A : found.h_B) * e;
        }
        sink.store(item, Chunk<S>::of(p));
      });
    }
    __syncthreads();  // the row has been read
  }
  C::sync();  // a block that has left can no longer be written to
}

}  // namespace softtopk::cuda
