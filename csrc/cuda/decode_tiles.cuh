// Decoding on tensor cores, for bfloat16: sixteen entries of a row at a time.
//
// The product of a tile of the weight's rows, turned over, with the values in one column; see
// gather.cuh. A warp has a row and kDecodeChunks x 64 columns. All columns of the product are the
// same, and so are the sums of the four lanes of a row: each writes a part of them.
#pragma once

#include "gather.cuh"

namespace softtopk::cuda {

#ifndef SOFTTOPK_DECODE_CHUNKS
#define SOFTTOPK_DECODE_CHUNKS 4
#endif
#ifndef SOFTTOPK_DECODE_BLOCKS
#define SOFTTOPK_DECODE_BLOCKS 4
#endif

struct DecodeArgs {
  const void* values;
  const int32_t* indices;
  const int32_t* counts;
  int64_t rows, max_active;
  const void* weight;
  int64_t d;
  const void* bias;
  void* out;
};

constexpr int kDecodeChunks = SOFTTOPK_DECODE_CHUNKS;  // of 64 columns, of a warp
constexpr int kDecodeThreads = 128;

template <bool FULL>
__global__ void __launch_bounds__(kDecodeThreads, SOFTTOPK_DECODE_BLOCKS)
    decode_tiles(const DecodeArgs args) {
  using S = __nv_bfloat16;
  const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int64_t r = int64_t(blockIdx.x) * (kDecodeThreads / 32) + int(threadIdx.x) / 32;
  if (r >= args.rows) return;
  const int32_t d = int32_t(args.d), max_active = int32_t(args.max_active);
  const int32_t column = int32_t(blockIdx.y) * kDecodeChunks * 64 + 8 * g;
  const auto* const weight = static_cast<const unsigned char*>(args.weight) + 2 * column;
  const int32_t* const indices = args.indices + r * max_active;
  const float* const values = static_cast<const float*>(args.values) + r * max_active;
  // 32 entries, one to a lane; asked for before it is known how many there are.
  int32_t index = lane < max_active ? indices[lane] : 0;
  float value = lane < max_active ? values[lane] : 0;
  const int32_t count = min(args.counts[r], max_active);

  float sum[kDecodeChunks][4][4] = {};
#pragma unroll 1
  for (int32_t base = 0; base < count; base += 32) {
    const int32_t now = index;
    const float scale = value;
    if (base + 32 + lane < count) {
      index = indices[base + 32 + lane];
      value = values[base + 32 + lane];
    }
#pragma unroll 1
    for (int first = 0; first < min(32, count - base); first += 16) {
      const unsigned char* rows[4];
      uint32_t scales[2] = {0, 0};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int e = first + 2 * t + i % 2 + 8 * (i / 2);
        const int32_t chosen = __shfl_sync(~0u, now, e);
        const float of = __shfl_sync(~0u, scale, e);
        const bool there = base + e < count;
        rows[i] = there ? weight + int64_t(chosen) * (2 * d) : nowhere() + 16 * g;
        uint32_t parts[3];
        split(there ? of : 0.0f, parts);
        scales[i / 2] |= (g % 2 == 0 ? parts[0] : parts[1]) << (16 * (i % 2));
      }
#pragma unroll
      for (int c = 0; c < kDecodeChunks; ++c) {
        uint4 x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          x[i] = make_uint4(0, 0, 0, 0);
          if (FULL || column + 64 * c < d) {
            x[i] = __ldg(reinterpret_cast<const uint4*>(rows[i] + 128 * c));
          }
        }
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          const Turned a(x, m);
          multiply_add(sum[c][m], a.words, scales);
        }
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kDecodeChunks; ++c) {
    if (t != c % 4 || (!FULL && column + 64 * c >= d)) continue;
    float x[8];
    sums_of(sum[c], x);
    if (args.bias != nullptr) {
      float bias[8];
      const auto* const from = static_cast<const unsigned char*>(args.bias) + 2 * (column + 64 * c);
      Chunk<S>{__ldg(reinterpret_cast<const uint4*>(from))}.read(bias);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] += bias[i];
    }
    store_8(static_cast<S*>(args.out) + r * d + column + 64 * c, x);
  }
}

}  // namespace softtopk::cuda
