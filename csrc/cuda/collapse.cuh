// One sweep over a resident row that collapses what lies outside of a window to two sums and a
// count, and collects the candidates in between.
#pragma once

#include "many.cuh"
#include "sample.cuh"

namespace softtopk::cuda {

template <class H>
struct CollapseShared {
  Outside of_warps[H::threads / 32];
  Outside of_blocks[H::C::many ? kMostBlocks : 1];
};

__device__ __forceinline__ void add_up(Outside& total, const Outside& other) {
  total.candidates += other.candidates;
  total.above += other.above;
  total.T += other.T;
  total.P += other.P;
}

// Sorts x into a window: e is added to T up to L, or where x is NaN, and to P from U on; in between
// `bit` is added to `places`, and from U on `one`. As predicated instructions: what the compiler
// makes of an if is more.
__device__ __forceinline__ void sort_in(float x, const Limits& window, float e, float bit,
                                        float one, float& T, float& P, float& places) {
  asm("{\n"
      ".reg .pred over, up;\n"
      "setp.gt.f32 over, %3, %4;\n"
      "setp.ge.f32 up, %3, %5;\n"
      "@!over add.f32 %0, %0, %6;\n"
      "@up add.f32 %1, %1, %6;\n"
      "@over add.f32 %2, %2, %7;\n"
      "@up add.f32 %2, %2, %8;\n"
      "}"
      : "+f"(T), "+f"(P), "+f"(places)
      : "f"(x), "f"(window.L), "f"(window.U), "f"(e), "f"(bit), "f"(one - bit));
}

// Adds up what lies outside of the window and collects the candidates: up to `few` of a cluster in
// its first block, else each block its own. The total is the same in all threads, own.candidates
// those that the calling block has; false if there is no room for them.
template <class H>
__device__ __forceinline__ bool collapse(const ResidentRow<H>& row, const Limits& window,
                                         float rate, float* candidates, int32_t few, int32_t room,
                                         CollapseShared<H>& shared, Outside& total, int32_t& own) {
  using C = typename H::C;
  constexpr int kSize = Chunk<typename H::S>::size, kWarps = H::threads / 32;
  constexpr int kTogether = 16 / kSize;  // items of which a float counts the elements
  const int t = int(threadIdx.x), warp = t / 32, lane = t % 32;
  // A bit for each of the thread's elements, the last ones first. In registers: their places must
  // not depend on a variable, and memory of a thread's own is slow while rows are being written.
  constexpr int kMost = H::C::many || H::threads > 128 ? kMostItems : kMostItems / 2,
                kWords = kMost / kTogether / 2;
  uint32_t candidate[kWords];
  int32_t above = 0, inside = 0;  // elements, and their sums
  float T[2] = {0, 0}, P[2] = {0, 0};
  const auto sweep = [&](auto exponential) {
#pragma unroll 1
    for (int first = 0; first < row.items();) {
      uint32_t bits = 0;
#pragma unroll 1
      for (int shift = 0; shift < 32 && first < row.items(); shift += 16, first += kTogether) {
        float places = 0x1p23f;  // from here on the last bits of a float count
        const auto look_at = [&](int j) {
          float x[kSize];
          row.read(first + j, x);
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            sort_in(x[i], window, exponential(x[i]), float(1 << (j * kSize + i)), 0x1p16f, T[i % 2],
                    P[i % 2], places);
          }
        };
        if (first + kTogether <= row.items()) {
#pragma unroll
          for (int j = 0; j < kTogether; ++j) look_at(j);
        } else {
#pragma unroll
          for (int j = 0; j < kTogether; ++j) {
            if (first + j < row.items()) look_at(j);
          }
        }
        const uint32_t counted = __float_as_uint(places);
        bits |= (counted & 0xffff) << shift;
        above += counted >> 16 & 31;
      }
#pragma unroll
      for (int i = kWords - 1; i > 0; --i) candidate[i] = candidate[i - 1];
      candidate[0] = bits;
      inside += __popc(bits);
    }
  };
  // Where the window is narrow, one exponent serves for both sides, relative to its middle
  // (exponent.cuh).
  const float middle = (window.L + (window.U - window.L) / 2) * rate;
  const float z_L = fmaf(window.L, rate, -middle), z_U = fmaf(window.U, rate, -middle);
  if (z_U - z_L <= 32 && fabsf(middle) < 0x1p26f) {
    sweep([&](float x) { return faster_exp2(-fabsf(fmaf(x, rate, -middle))); });
    const float of_L = faster_exp2(-z_L), of_U = faster_exp2(z_U);
#pragma unroll
    for (int i = 0; i < 2; ++i) T[i] *= of_L, P[i] *= of_U;
  } else {
    sweep([&](float x) {
      const float out = fminf(x - window.L, window.U - x);  // < 0 outside of the window
      return faster_exp2(-fabsf(out) * rate);
    });
  }
  Outside mine = {window.L,    window.U,   0, int32_t(__reduce_add_sync(~0u, above)),
                  T[0] + T[1], P[0] + P[1]};
  mine.candidates = int32_t(inclusive_scan<32>(unsigned(inside), lane));
  int32_t place = mine.candidates - inside;
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    mine.T += __shfl_xor_sync(~0u, mine.T, mask);
    mine.P += __shfl_xor_sync(~0u, mine.P, mask);
  }
  if (lane == 31) shared.of_warps[warp] = mine;
  __syncthreads();
  total = shared.of_warps[0];
#pragma unroll
  for (int i = 1; i < kWarps; ++i) {
    if (i == warp) place += total.candidates;
    add_up(total, shared.of_warps[i]);
  }
  own = total.candidates;
  bool fits = own <= room;
  float* to = candidates;
  if constexpr (C::many) {
    if (t < C::size()) *C::at(&shared.of_blocks[C::rank()], t) = total;
    C::sync();
    fits = true;
    int32_t before = 0;
    total = shared.of_blocks[0];
    fits = total.candidates <= room;
    for (int i = 1; i < C::size(); ++i) {
      if (i == C::rank()) before = total.candidates;
      fits = fits && shared.of_blocks[i].candidates <= room;
      add_up(total, shared.of_blocks[i]);
    }
    if (total.candidates <= few) {
      to = C::at(candidates, 0);
      place += before;
      own = total.candidates;
    }
  }
  if (!fits || !(total.T >= 0)) return false;
  const int words = (row.items() + 2 * kTogether - 1) / (2 * kTogether);
#pragma unroll 1
  for (int first = (words - 1) * 2 * kTogether; first >= 0; first -= 2 * kTogether) {
    for (uint32_t left = candidate[0]; left != 0; left &= left - 1) {
      const int i = __ffs(int(left)) - 1, item = first + i / kSize;
      to[place++] = row.element(item, row.map().index(item, i % kSize));
    }
#pragma unroll
    for (int i = 0; i < kWords - 1; ++i) candidate[i] = candidate[i + 1];
  }
  C::sync();
  return true;
}

}  // namespace softtopk::cuda
