// The forward of rows on chip, for what is usual: k of up to some hundreds, finite rows.
//
// One pass over memory: the copy engine brings a row, p is written. In between three sweeps over
// shared memory: the maxima of groups, whence a bound below the threshold (window.cuh); one that
// collapses what lies below and collects the candidates; the output. The search among the
// candidates is one warp's (few.cuh). Rows of up to 1024 chunks are a warp's alone. The blocks of a
// cluster send each other their bounds and then all candidates, and each searches for itself.
// Several blocks to a multiprocessor hide each other's waiting. A row that does not fit the pattern
// is marked, and left to careful_forward.cuh.
//
// The ladder, in fractions of the floor (H200, float32, alpha = 1e-2, n = 4096 | 16384 | 65536).
// The floor of the first six was measured up to 10% slower than it is; relative to each other they
// hold:
//   0.19 | 0.18 | 0.12  every sweep of a search by counts over the whole row
//   0.19 | 0.40 | 0.33  a window and one pass, with a general solver called inside
//   0.30 | 0.49 | 0.39  ex2 with denormals flushed, threads and raggedness at compile time
//   0.58 | 0.82 | 0.58  no calls, no local memory: the unusual rows in a kernel of their own
//   0.71 | 0.91 | 0.65  the split and its sums in one pass over candidates, three trials a sweep
//   0.75 | 0.95 | 0.65  k + k / 4 maxima instead of 2 k: fewer candidates
//   0.74 | 0.86 | 0.61  the same, measured again
//   0.79 | 0.87 | 0.61  one fused operation an exponent (exponent.cuh); a warp for a short row
//   0.85 | 0.87 | 0.66  messages instead of cluster barriers, stores without a test each
// In bfloat16 these last two steps took 0.41 | 0.64 | 0.46 to 0.60 | 0.79 | 0.60. What did not
// help: rows in registers and the next one in shared memory (every call spilled the row); bringing
// the next row into the L2 cache ahead of time; asking for each quarter of the next row as soon as
// that of the last is written (0.75 | 0.85 | 0.60); smaller parts in larger clusters (16384
// elements in two blocks: 0.53). What limits now: a third of the time a block's other warps wait
// for the one that searches, in clusters for each other, and no more rows fit on chip.
#pragma once

#include "careful_forward.cuh"
#include "exponent.cuh"
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
  Part parts[WARPS];
  // What the blocks of a cluster tell each other.
  uint64_t mailboxes[3];
  float2 bounds_of_blocks[kMostBlocks];
  Part parts_of_blocks[kMostBlocks];
};

// p of a row, from its solution.
template <class H>
__device__ __forceinline__ void write_probabilities(const ResidentRow<H>& row,
                                                    const ResidentSink<H>& sink, const Found& found,
                                                    float rate) {
  using S = typename H::S;
  constexpr int kSize = Chunk<S>::size;
  const Origin origin(found.r_A, found.r_B, rate, sizeof(S) == 2 ? 32.0f : 4.0f);
  if (origin.serves) {
    const float h_A = -origin.of_A(found.h_A), h_B = origin.of_B(found.h_B);
    sink.fill(row, [&](int item) {
      float x[kSize], p[kSize];
      row.read(item, x);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const bool above = x[i] >= found.r_A;
        p[i] = fmaf(above ? h_A : h_B, faster_exp2(-fabsf(origin.z(x[i]))), above ? 1.0f : 0.0f);
      }
      return Chunk<S>::of(p);
    });
  } else {
    const float at_A = found.r_A < infinity<float> ? found.r_A : 0, at_B = found.r_B;
    sink.fill(row, [&](int item) {
      float x[kSize], p[kSize];
      row.read(item, x);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const bool above = x[i] >= found.r_A;
        const float e = faster_exp2(-fabsf(x[i] - (above ? at_A : at_B)) * rate);
        p[i] = fmaf(above ? -found.h_A : found.h_B, e, above ? 1.0f : 0.0f);
      }
      return Chunk<S>::of(p);
    });
  }
}

// Blocks that registers must suffice for, on a multiprocessor.
template <class H>
inline constexpr int blocks_of = H::threads == 32 ? 24 : (H::C::many ? 1024 : 1280) / H::threads;

template <class H>
__global__ void __launch_bounds__(H::threads, blocks_of<H>) forward_quick(const ForwardArgs args) {
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ QuickShared<H::threads / 32> shared;
  using S = typename H::S;
  using C = typename H::C;
  using Raw = typename Element<S>::Raw;
  constexpr int kSize = Chunk<S>::size, kWarps = H::threads / 32;
  constexpr float kLog2e = 1.4426950408889634f;
  const int32_t n = int32_t(args.x.n), t = int32_t(threadIdx.x);
  const int warp = t / 32, lane = t % 32;
  const Mapping<H> map{n};
  ResidentRow<H> row(memory, &shared.barrier, map);
  // Those of a cluster's blocks lie one after the other, in every block.
  float* candidates = reinterpret_cast<float*>(memory + row.slot_bytes());
  const int32_t room = args.room / C::size();
  Mailbox bounds(&shared.mailboxes[0]), parts(&shared.mailboxes[1]), values(&shared.mailboxes[2]);
  C::sync();

  const int64_t step = int64_t(gridDim.x) / C::size();
  const auto data = [&](int64_t r) {
    return static_cast<const Raw*>(args.x.data) + r * args.x.stride;
  };
  // The row's numbers; k = 0: not for this kernel.
  struct Request {
    double k;
    float alpha;
  };
  const auto request = [&](int64_t r) -> Request {
    if (r >= args.x.rows) return {0, 1};
    const double k = per_row(args.k, r);
    const float alpha = float(per_row(args.alpha, r)), rate = kLog2e / alpha;
    const bool fits = k > 0 && k < kMostBudget<H> * C::size() && k < n;
    return {fits && rate > 1e-36f && rate < 1e36f ? k : 0, alpha};
  };
  const int64_t first_row = int64_t(blockIdx.x) / C::size();
  Request next = request(first_row);
  if (next.k > 0 && is_fed<H>(args, first_row)) row.ask(data(first_row));
  for (int64_t r = first_row; r < args.x.rows; r += step) {
    const double exact_k = next.k;
    const float alpha = next.alpha, rate = kLog2e / alpha;
    next = request(r + step);
    const bool asks = next.k > 0 && is_fed<H>(args, r + step);
    if (!(exact_k > 0)) {
      if (t == 0 && C::rank() == 0) leave(args, r);
      if (asks) row.ask(data(r + step));
      continue;
    }
    if (is_fed<H>(args, r)) {
      row.wait();
    } else {
      row.copy(data(r), args.wide_x);
    }
    if (!args.x.largest) row.negate();
    const Budget k(exact_k);

    uint32_t key[kKeysOf<H>];
    keys_of_maxima(row, key);
    Found found;
    // The bound is an element that enough of the maxima reach, each block finding its share: a few
    // more than k of them, nearly always enough for S > k, or else more than 2 k, which always are.
    // Where the largest elements lie together, as in a sorted row, that leaves too many candidates:
    // then one that fewer reach, all in one block.
    bool crowded = false;
    for (int attempt = 0; attempt < 2; ++attempt) {
      const int likely = k.whole + k.whole / 4 + 4, sure = 2 * k.whole + 2;
      const int wanted = crowded ? likely / 3 : (attempt == 0 ? likely : sure) / C::size();
      float2 limits = bound_of_block<kWarps>(key, wanted + 1, C::many, shared.bound);
      if constexpr (C::many) {
        if (t < C::size()) bounds.send(&shared.bounds_of_blocks[C::rank()], t, limits);
        bounds.receive(C::size() * sizeof(float2));
        limits = shared.bounds_of_blocks[0];
        for (int i = 1; i < C::size(); ++i) {
          const float least = limits.x;
          limits = widest(limits, shared.bounds_of_blocks[i]);
          if (crowded) limits.x = fmaxf(least, shared.bounds_of_blocks[i].x);
        }
      }
      const Window window = {limits.x, infinity<float>, limits.y};

      // Collapse and count. The exponents are relative to L * rate as it is rounded; what that
      // leaves out is the same factor of every term (exponent.cuh).
      const float origin = window.L * rate, rest = fmaf(window.L, rate, -origin);
      uint32_t found_in = 0;  // items with candidates
      int32_t own = 0;
      float T[4] = {0, 0, 0, 0};
      row.for_each([&](int item) {
        float x[kSize];
        row.read(item, x);
        const int32_t before = own;
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const float e = faster_exp2(fmaf(x[i], rate, -origin));
          if (x[i] > window.L) {
            ++own;
          } else {
            T[i % 4] += e;
          }
        }
        if (own != before) found_in |= 1u << item;
      });
      Part total = {tree_sum(T), int32_t(inclusive_scan<32>(unsigned(own), lane))};
      int32_t place = total.candidates - own;
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) total.T += __shfl_xor_sync(~0u, total.T, mask);
      total.candidates = __shfl_sync(~0u, total.candidates, 31);
      if constexpr (kWarps > 1) {
        if (lane == 0) shared.parts[warp] = total;
        __syncthreads();
        total = {0, 0};
#pragma unroll
        for (int i = 0; i < kWarps; ++i) {
          if (i < warp) place += shared.parts[i].candidates;
          total.T += shared.parts[i].T;
          total.candidates += shared.parts[i].candidates;
        }
      }
      bool usual =
          window.L > -infinity<float> && window.max < infinity<float> && fabsf(origin) < 0x1p26f;
      if (usual && total.candidates <= room) {
        for (; found_in != 0; found_in &= found_in - 1) {
          float x[kSize];
          row.read(__ffs(int(found_in)) - 1, x);
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            if (!(x[i] > window.L)) continue;
            if constexpr (C::many) {
              for (int b = 0; b < C::size(); ++b) {
                values.send(candidates + C::rank() * room + place, b, x[i]);
              }
            } else {
              candidates[place] = x[i];
            }
            ++place;
          }
        }
      }
      if constexpr (C::many) {
        if (t < C::size()) parts.send(&shared.parts_of_blocks[C::rank()], t, total);
        parts.receive(C::size() * sizeof(Part));
        if (warp == 0) {
          int32_t sent = 0;
          for (int b = 0; usual && b < C::size(); ++b) {
            const int32_t count = shared.parts_of_blocks[b].candidates;
            sent += count <= room ? count : 0;
          }
          values.receive(sent * sizeof(float));
        }
        total = {0, 0};
        for (int b = 0; b < C::size(); ++b) {
          const Part part = shared.parts_of_blocks[b];
          usual = usual && part.candidates <= room;
          if (warp == 0 && usual && b > 0) {  // up to those of the blocks before
            for (int32_t first = 0; first < part.candidates; first += 32) {
              const int32_t i = first + lane;
              const float x = candidates[b * room + i];
              __syncwarp();
              if (i < part.candidates) candidates[total.candidates + i] = x;
              __syncwarp();
            }
          }
          total.T += part.T;
          total.candidates += part.candidates;
        }
      } else {
        usual = usual && total.candidates <= room;
        H::sync();
      }
      crowded = !usual || total.candidates > kFew;
      usual = !crowded;

      if (warp == 0) {  // in every block the same
        found = {0, 0, 0, 0, 0};
        if (usual) {
          const Solution<float> s =
              FewSearch<Element<S>::grain>(candidates, window, total.candidates,
                                           total.T * faster_exp2(-rest), k, alpha, rate)
                  .solve(found.right);
          found.r_A = s.r_A, found.r_B = s.r_B;
          const Densities<float> d = quick_densities(s, rate);
          found.h_A = d.h_A, found.h_B = d.h_B;
          if (lane == 0 && C::rank() == 0 && found.right) write_solution(args, r, s);
        }
        if (lane == 0 && C::rank() == 0 && !found.right && attempt == 1) leave(args, r);
        if (kWarps > 1 && lane == 0) shared.found = found;
      }
      if constexpr (kWarps > 1) {
        __syncthreads();
        found = shared.found;
      }
      if (found.right) break;
    }
    if (found.right && args.form != Form::none) {
      const ResidentSink<H> sink(static_cast<Raw*>(args.out) + r * n, map, args.wide_out);
      write_probabilities(row, sink, found, rate);
    }
    H::sync();  // the row has been read
    if (asks) row.ask(data(r + step));
  }
  C::sync();  // a block that has left can no longer be written to
}

}  // namespace softtopk::cuda
