// The forward of rows on chip, for what is usual: k of up to some hundreds, finite rows.
//
// One pass over memory: the copy engine brings a row, p is written. In between three sweeps over
// shared memory: the maxima of groups, whence a bound below the threshold (window.cuh); one that
// collapses what lies below and collects the candidates; the output. Where alpha is small, the last
// two look only at groups whose maximum says that anything in them counts. The search among the
// candidates is one warp's (few.cuh). Rows of up to 1024 chunks are a warp's alone. The blocks of a
// cluster send each other their candidates, and each searches for itself. Several blocks to a
// multiprocessor hide each other's waiting. A row that does not fit the pattern is marked, and left
// to careful_forward.cuh.
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
//   0.85 | 0.87 | 0.64  messages instead of cluster barriers, stores without a test each
//   0.86 | 0.87 | 0.65  groups that do not count are skipped; a bound for each block, so that
//                       blocks exchange once; fewer registers spilled
//   0.86 | 0.86 | 0.70  every lane of a warp asks for a piece of a cluster's row; one origin for
//                       the exponents also where a side is empty
//   0.87 | 0.87 | 0.75  groups are counted as bits, 16-bit ones in pairs; fewer address
//                       computations
// and 24576 | 50256 elements 0.70 | 0.63 to 0.87 | 0.76 with as few blocks to a row as keep the
// memory of a multiprocessor full (resident_launch.cuh).
// In bfloat16 the last three steps took 0.59 | 0.77 | 0.60 to 0.59 | 0.84 | 0.72 and 0.73 | 0.86 |
// 0.76. What did not help: rows in registers and the next one in shared memory (every call spilled
// the row); bringing the next row into the L2 cache ahead of time; asking for each quarter of the
// next row as soon as that of the last is written (0.75 | 0.85 | 0.60); smaller parts in larger
// clusters (16384 elements in two blocks: 0.53); two warps for a short row (0.84 at n = 4096); the
// groups that count written straight to memory and not by way of the row's place on chip (0.81 |
// 0.67 | 0.52: half sectors); the blocks' candidates gathered by all warps (0.68 at n = 65536: it
// spilled); the other warps writing zeros while one searches (0.86 | 0.84 | 0.75).
// What limits now: one warp of a block searches while the others wait, the blocks of a cluster wait
// for the last of them, and no more rows fit on chip.
#pragma once

#include "careful_forward.cuh"
#include "exponent.cuh"
#include "few.cuh"

namespace softtopk::cuda {

struct Part {  // of a row, a warp's or a block's
  float T;
  int32_t candidates;
};
// What a block of a cluster finds in its part: a bound of its own, and the largest element.
struct PartOfBlock {
  Part part;
  float L, max;
};

template <int WARPS, bool CLUSTER>
struct QuickShared {
  uint64_t barrier;
  Found found;
  BoundShared<WARPS> bound;
  Part parts[WARPS];
  // What the blocks of a cluster tell each other, of two rows: a block may be ahead by one.
  uint64_t mailboxes[4];
  PartOfBlock parts_of_blocks[2][CLUSTER ? kMostBlocks : 1];
};

// Counts x in `above` if it is greater than L, else adds e to T. As predicated instructions: what
// the compiler makes of an if is more.
__device__ __forceinline__ void add_or_count(float x, float L, float e, float& T, int32_t& above) {
  asm("{\n"
      ".reg .pred p;\n"
      "setp.gt.f32 p, %2, %3;\n"
      "@p add.s32 %1, %1, 1;\n"
      "@!p add.f32 %0, %0, %4;\n"
      "}"
      : "+f"(T), "+r"(above)
      : "f"(x), "f"(L), "f"(e));
}

// Of 16-bit elements: puts -inf in the place of those above the one in both halves of `bound`, and
// returns how many they are.
template <class S>
__device__ __forceinline__ int32_t chunk_without_candidates(Chunk<S>& chunk, uint32_t bound) {
  constexpr uint32_t lowest = Element<S>::minus_infinity * 0x10001u;
  uint32_t which = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t above = pairs_above<S>(chunk.word(i), bound);
    which |= above & 0x10001u << i;
    chunk.word(i) = (chunk.word(i) & ~above) | (lowest & above);
  }
  return __popc(which);
}

// p of a row, from its solution, with the row's place as a scratchpad; p is 0 in all chunks but
// `weighty` ones.
template <class H>
__device__ __forceinline__ void write_probabilities(ResidentRow<H>& row,
                                                    const ResidentSink<H>& sink,
                                                    const ChunkSet<H>& weighty, const Found& found,
                                                    float rate) {
  using S = typename H::S;
  constexpr int kSize = Chunk<S>::size;
  const Origin origin(found.r_A, found.r_B, rate, sizeof(S) == 2 ? 32.0f : 4.0f);
  const float near_A = -origin.of_A(found.h_A), near_B = origin.of_B(found.h_B);
  const auto near = [&](int item) {
    float x[kSize], p[kSize];
    row.read(item, x);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float e = faster_exp2(-fabsf(origin.z(x[i])));
      p[i] = near_B * e;
      if (x[i] >= found.r_A) p[i] = fmaf(near_A, e, 1.0f);
    }
    return Chunk<S>::of(p);
  };
  const float at_A = found.r_A < infinity<float> ? found.r_A : 0, at_B = found.r_B;
  const auto far = [&](int item) {
    float x[kSize], p[kSize];
    row.read(item, x);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const bool above = x[i] >= found.r_A;
      const float e = faster_exp2(-fabsf(x[i] - (above ? at_A : at_B)) * rate);
      p[i] = found.h_B * e;
      if (above) p[i] = fmaf(-found.h_A, e, 1.0f);
    }
    return Chunk<S>::of(p);
  };
  if (weighty.most()) {
    if (origin.serves) {
      sink.fill(row, near);
    } else {
      sink.fill(row, far);
    }
    return;
  }
  if (origin.serves) {
    weighty.for_each([&](int item) { row.replace(item, near(item)); });
  } else {
    weighty.for_each([&](int item) { row.replace(item, far(item)); });
  }
  row.release();  // before the stores to memory, which it need not wait for
  sink.fill(row, [&](int item) { return weighty.has(item) ? row.chunk(item) : Chunk<S>{}; });
}

// By one warp: moves the blocks' candidates, each in `room` places, together, and takes all that
// they collapsed relative to `L`.
template <class C>
__device__ __forceinline__ Part gather_parts(const PartOfBlock* of_blocks, float L, float rate,
                                             float* candidates, int32_t room) {
  const int lane = int(threadIdx.x) % 32;
  Part total = {0, 0};
  // The first 32 of several blocks are read at a time: a place is never written before it was read.
  constexpr int kTogether = 4;
  for (int first = 0; first < C::size(); first += kTogether) {
    float x[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) x[j] = candidates[(first + j) % C::size() * room + lane];
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      if (first + j >= C::size()) break;
      const PartOfBlock& of_block = of_blocks[first + j];
      const int32_t count = of_block.part.candidates;
      float* to = candidates + total.candidates;
      const float* from = candidates + (first + j) * room;
      if (lane < count) to[lane] = x[j];
      for (int32_t i = 32; i < count; i += 32) {
        __syncwarp();
        const float more = i + lane < count ? from[i + lane] : 0;
        __syncwarp();
        if (i + lane < count) to[i + lane] = more;
      }
      total.candidates += count;
      total.T = fmaf(of_block.part.T, faster_exp2((of_block.L - L) * rate), total.T);
    }
    __syncwarp();
  }
  return total;
}

// Blocks that registers must suffice for, on a multiprocessor.
template <class H>
inline constexpr int blocks_of = H::threads == 32    ? 24
                                 : H::threads == 128 ? 8
                                 : H::C::many        ? 3
                                                     : 4;

template <class H>
__global__ void __launch_bounds__(H::threads, blocks_of<H>) forward_quick(const ForwardArgs args) {
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ QuickShared<H::threads / 32, H::C::many> shared;
  using S = typename H::S;
  using C = typename H::C;
  using Raw = typename Element<S>::Raw;
  constexpr int kSize = Chunk<S>::size, kWarps = H::threads / 32;
  constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
  const int32_t n = int32_t(args.x.n), t = int32_t(threadIdx.x);
  const int warp = t / 32, lane = t % 32;
  const Mapping<H> map{n};
  ResidentRow<H> row(memory, &shared.barrier, map);
  // Those of a cluster's blocks lie one after the other, in every block, those of two rows in turn.
  float* candidates = reinterpret_cast<float*>(memory + row.slot_bytes());
  const int32_t room = args.room / (C::many ? 2 * C::size() : 1);
  Mailbox<2> parts(&shared.mailboxes[0]), values(&shared.mailboxes[2]);
  C::sync();

  constexpr int kTogether = sizeof(S) == 2 ? 1 : C::many ? 2 : 4;
  const int step = int(gridDim.x) / C::size();
  const auto data = [&](int64_t r) {
    return static_cast<const Raw*>(args.x.data) + r * args.x.stride;
  };
  // The row's numbers; rate = 0: not for this kernel.
  struct Request {
    Budget k;
    float alpha, rate;
  };
  const auto request = [&](int64_t r) -> Request {
    if (r >= args.x.rows) return {Budget(0), 1, 0};
    const double k = per_row(args.k, r);
    const float alpha = float(per_row(args.alpha, r)), rate = kLog2e / alpha;
    const bool fits = k > 0 && k < ::min(kMostBudget<H>, anew(n)) && rate > 1e-36f && rate < 1e36f;
    return {Budget(k), alpha, fits ? rate : 0};
  };
  const int64_t first_row = int64_t(blockIdx.x) / C::size();
  uint32_t phase = 0;
  Request next = request(first_row);
  if (next.rate > 0 && is_fed<H>(args, first_row)) row.ask(data(first_row), warp == 0);
  for (int64_t r = first_row; r < args.x.rows; r += step) {
    const Budget k = next.k;
    const float alpha = next.alpha, rate = next.rate;
    next = request(r + step);
    const auto ask = [&] {
      const int64_t after = anew(r + step);
      if (next.rate > 0 && is_fed<H>(args, after)) row.ask(data(after), warp == 0);
    };
    if (!(rate > 0)) {
      if (t == 0 && C::rank() == 0) leave(args, r);
      ask();
      continue;
    }
    if (is_fed<H>(args, r)) {
      row.template wait<kTogether>(phase);
      phase ^= 1;
    } else {
      row.copy(data(r), args.wide_x);
    }
    if (!args.x.largest) row.negate();

    Found found;
    ChunkSet<H> weighty;  // in which p is not 0
    // The bound is an element that enough of the maxima reach: a few more than k of them, nearly
    // always enough for S > k, or else more than 2 k, which always are. The blocks of a cluster
    // each have a bound of their own, which more of their elements reach than of the k largest will
    // be theirs; the largest of the bounds is the row's. Where the largest elements lie together,
    // as in a sorted row, too many candidates are left: then a bound that fewer reach.
    bool crowded = false;
    for (int attempt = 0; attempt < 2; ++attempt) {
      MaximaOf<H> maxima;  // anew for a second attempt: they need not outlive the search
      maxima.read(row);
      const int sure = 2 * k.whole + 2;
      int wanted = k.whole + k.whole / 4 + 4;
      if constexpr (C::many) {
        const float share = float(k.whole) / C::size();
        if (!crowded) wanted = int(share + 3.5f * quick_sqrt(share)) + 3;
      }
      if (attempt == 1) wanted = crowded ? wanted / (kSize * 3 / 4) : sure;
      const float2 limits =
          bound_of_block<kWarps>(maxima, wanted + 1, C::many || crowded, shared.bound);
      Window window = {limits.x, limits.y};

      // Collapse and count. The exponents are relative to L * rate as it is rounded; what that
      // leaves out is the same factor of every term (exponent.cuh).
      const float origin = window.L * rate, rest = fmaf(window.L, rate, -origin);
      const uint32_t bound = uint32_t(Element<S>::raw(window.L)) * 0x10001u;
      uint32_t found_in = 0;  // items with candidates
      int32_t own = 0;
      float T[4] = {0, 0, 0, 0};
      const auto look_at = [&](int item) {
        float x[kSize];
        const int32_t before = own;
        if constexpr (kPaired<H>) {
          Chunk<S> chunk = row.chunk(item);
          own += chunk_without_candidates(chunk, bound);
          chunk.read(x);
#pragma unroll
          for (int i = 0; i < kSize; ++i) T[i % 4] += faster_exp2(fmaf(x[i], rate, -origin));
        } else {
          row.read(item, x);
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            add_or_count(x[i], window.L, faster_exp2(fmaf(x[i], rate, -origin)), T[i % 4], own);
          }
        }
        if (own != before) found_in |= 1u << item;
      };
      // What is less than 2^-46 of the largest of T's terms is left out. Short 16-bit rows have one
      // loop for both: less code.
      const ChunkSet<H> counts(row, maxima, window.L - 46 * kLn2 * alpha);
      if (!kPaired<H> && counts.most()) {
        row.for_each(look_at);
      } else {
        counts.for_each(look_at);
      }
      weighty = ChunkSet<H>(row, maxima, window.L - 127 * kLn2 * alpha);
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
      total.T *= faster_exp2(-rest);
      bool usual = window.L > -infinity<float> && window.max < infinity<float> &&
                   fabsf(origin) < 0x1p26f && total.candidates <= room;
      float* all = candidates + values.place() * C::size() * room;
      if (usual) {
        float* const mine = all + (C::many ? C::rank() * room : 0);
        float* to = mine + place;
        for (; found_in != 0; found_in &= found_in - 1) {
          float x[kSize];
          row.read(__ffs(int(found_in)) - 1, x);
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            if (x[i] > window.L) *to++ = x[i];
          }
        }
        if constexpr (C::many) {
          __syncthreads();
          // C::size() is a power of two.
          for (int i = t; i < total.candidates * C::size(); i += H::threads) {
            float* const one = mine + i / C::size();
            const int b = i & (C::size() - 1);
            if (b != C::rank()) values.send(one, b, *one);
          }
        }
      }
      if constexpr (C::many) {
        PartOfBlock* of_blocks = shared.parts_of_blocks[parts.place()];
        if (!usual) total.candidates = room + 1;
        const PartOfBlock mine = {total, window.L, window.max};
        if (t < C::size()) parts.send(&of_blocks[C::rank()], t, mine);
        parts.receive(C::size() * sizeof(PartOfBlock));
        const int32_t own_sent = usual ? total.candidates : 0;
        int32_t sent = 0;
        usual = true;
        for (int b = 0; b < C::size(); ++b) {
          const PartOfBlock& other = of_blocks[b];
          const bool sends = other.part.candidates <= room;
          usual = usual && sends;
          sent += sends ? other.part.candidates : 0;
          window.L = fmaxf(window.L, other.L);
          window.max = fmaxf(window.max, other.max);
        }
        if (warp == 0) {
          values.receive((sent - own_sent) * sizeof(float));
          total = {0, 0};
          if (usual) total = gather_parts<C>(of_blocks, window.L, rate, all, room);
        } else {
          values.pass();
          total = {0, sent};
        }
      } else {
        H::sync();
      }
      crowded = !usual || total.candidates > kFew;
      usual = !crowded;

      if (warp == 0) {  // in every block the same
        found = {0, 0, 0, 0, 0};
        if (usual) {
          const Solution<float> s =
              FewSearch<Element<S>::grain>(all, window, total.candidates, total.T, k, alpha, rate)
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
      write_probabilities(row, sink, weighty, found, rate);
      sink.flush(row);
    }
    H::sync();  // the row has been read
    ask();
  }
  C::sync();  // a block that has left can no longer be written to
}

}  // namespace softtopk::cuda
