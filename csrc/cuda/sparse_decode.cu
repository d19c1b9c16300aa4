// x_hat[r] = sum_j values[r, j] weight[indices[r, j]] + bias: the decoder's rows that a code
// chooses.
//
// Bytes: every entry reads a row of the weight, from the L2 cache where that holds it. A warp has a
// row and a tile of the columns, 512 bytes wide or, where the weight is larger than the cache,
// 1024; all rows are decoded for one tile before the next. Where rows are shorter than that, parts
// of the warp take entries in turn and are summed up at the end, in the same order every time.
//
// In development runs on an H200 (bfloat16, microseconds, (rows, k, d, n) = (4096, 64, 768, 24576)
// | (4096, 64, 2304, 16384) | (4096, 64, 2304, 65536) | (8192, 32, 4096, 131072)): tiles of 1024
// bytes 61 | 145 | 174 | 405, of 512 bytes 56 | 147 | 186 | 415, of 256 bytes - | - | 184 | 416, of
// 128 bytes - | - | 243 | 557: what a narrow tile gains in the cache it loses in requests.
// These took 42 instructions an entry, of which 24 load, convert and add. It is 25 since entries of
// which all are there are not asked one by one, and columns beyond a row are read as well: 48 | 139
// | 177 | 406, where the kernel before had 63 | 169 | 236 | 517 in the same run. On tensor cores,
// sixteen entries at a time: 65 | 185 | 190 | 391.
//
// soft_topk_decode is two kernels, 114 | 194 | 340 | 980 with the selection. In one, where the warp
// that has solved a row decodes it at once, tile by tile, the same bits take 150 | 304 | 585 |
// 1410; with fewer blocks and 12 warps of a multiprocessor that solve 125 | 194 | 627 | 1523, with
// 18 114 | 195 | 613 | 1529: nowhere faster, and half as fast where the weight is larger than the
// cache.
#include <type_traits>

#include "launch.cuh"
#include "layout.cuh"

namespace softtopk::cuda {
namespace {

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

constexpr int kThreads = 128;
constexpr int64_t kCached = 40 << 20;  // bytes of a weight that the L2 cache holds

// LANES of a warp take an entry, each VECTORS chunks of it, LANES chunks apart. WIDE: all rows
// start on 16 bytes.
template <class S, int LANES, int VECTORS, bool WIDE>
__global__ void __launch_bounds__(kThreads) decode_rows(const DecodeArgs args) {
  using T = Compute<S>;
  using Raw = typename Element<S>::Raw;
  constexpr int kSize = Chunk<S>::size, kParts = 32 / LANES;
  constexpr int kTogether = 8 / VECTORS;  // entries of a part that are asked for at once
  const int lane = int(threadIdx.x) % 32, part = lane / LANES;
  const int64_t r = int64_t(blockIdx.x) * (kThreads / 32) + int(threadIdx.x) / 32;
  if (r >= args.rows) return;
  const int64_t d = args.d;
  const int64_t first = (int64_t(blockIdx.y) * LANES * VECTORS + lane % LANES) * kSize;
  const Raw* const weight = static_cast<const Raw*>(args.weight);
  // Of whole chunks those beyond the row are the first one: read as well, and not written.
  const auto load = [&](const Raw* data, uint32_t row, int vector) {
    const int64_t column = first + vector * LANES * kSize;
    Chunk<S> chunk{};
    if constexpr (WIDE) {
      const Raw* const own = data + (column < d ? column : 0);
      chunk.words = __ldg(reinterpret_cast<const uint4*>(own + uint64_t(row) * uint32_t(d)));
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        if (column + i < d) chunk.set_raw(i, data[uint64_t(row) * uint32_t(d) + column + i]);
      }
    }
    return chunk;
  };
  T sum[VECTORS][kSize] = {};
  const int32_t count = int32_t(min(int64_t(args.counts[r]), args.max_active));
  const int64_t place = r * args.max_active;
  int32_t here = 0, latent = 0;
  T value = 0;
  // The entries from `start` on of the 32 that the warp has. ALL: there are so many.
  const auto add = [&](int start, auto all) {
    constexpr bool ALL = decltype(all)::value;
    Chunk<S> chunk[kTogether][VECTORS];
    T scale[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int entry = start + i * kParts + part;  // beyond 31: none
      const uint32_t chosen = __shfl_sync(~0u, latent, entry % 32);
      scale[i] = __shfl_sync(~0u, value, entry % 32);
      const bool any = ALL || entry < here;
      if (!any) scale[i] = 0;
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
        chunk[i][v] = Chunk<S>{};
        if (any) chunk[i][v] = load(weight, chosen, v);
      }
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
        T w[kSize];
        chunk[i][v].read(w);
#pragma unroll
        for (int j = 0; j < kSize; ++j) sum[v][j] = fma(scale[i], w[j], sum[v][j]);
      }
    }
  };
  constexpr int kStep = kTogether * kParts;
  for (int32_t base = 0; base < count; base += 32) {
    here = min(32, count - base);
    if (lane < here) {
      latent = args.indices[place + base + lane];
      value = static_cast<const T*>(args.values)[place + base + lane];
    }
    int start = 0;
#pragma unroll 1
    for (; start + kStep <= here; start += kStep) add(start, std::true_type());
#pragma unroll 1
    for (; start < here; start += kStep) add(start, std::false_type());
  }
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
    for (int mask = LANES; mask < 32; mask *= 2) {
#pragma unroll
      for (T& element : sum[v]) element += __shfl_xor_sync(~0u, element, mask);
    }
    if (part != 0) continue;
    const int64_t column = first + v * LANES * kSize;
    if (args.bias != nullptr) {
      T bias[kSize];
      load(static_cast<const Raw*>(args.bias), 0, v).read(bias);
#pragma unroll
      for (int j = 0; j < kSize; ++j) sum[v][j] += bias[j];
    }
    const Chunk<S> chunk = Chunk<S>::of(sum[v]);
    Raw* const out = static_cast<Raw*>(args.out) + r * d + column;
    if constexpr (WIDE) {
      if (column < d) store_global(out, chunk.words);
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        if (column + i < d) out[i] = chunk.raw(i);
      }
    }
  }
}

template <class S, int LANES, int VECTORS>
void launch_decode(DecodeArgs args, bool wide, void* stream) {
  constexpr int64_t kTile = LANES * VECTORS * Chunk<S>::size;
  const auto kernel =
      wide ? decode_rows<S, LANES, VECTORS, true> : decode_rows<S, LANES, VECTORS, false>;
  constexpr int64_t kRowsOfBlock = kThreads / 32;
  const dim3 grid(unsigned((args.rows + kRowsOfBlock - 1) / kRowsOfBlock),
                  unsigned((args.d + kTile - 1) / kTile));
  void* pointers[] = {&args};
  check(cudaLaunchKernel(kernel, grid, dim3(kThreads), pointers, 0,
                         static_cast<cudaStream_t>(stream)),
        "kernel launch");
}

}  // namespace

void decode(const void* values, const int32_t* indices, const int32_t* counts, int64_t rows,
            int64_t max_active, const void* weight, Type type, int64_t n, int64_t d,
            const void* bias, void* out, int device, void* stream) {
  if (rows == 0 || d == 0) return;
  const DeviceGuard guard(device);
  with_type(type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const DecodeArgs args = {values, indices, counts, rows, max_active, weight, d, bias, out};
    const bool wide = is_wide(weight, n, d, sizeof(S)) && is_wide(out, rows, d, sizeof(S)) &&
                      is_wide(bias, 1, 0, sizeof(S)) && d * sizeof(S) % 16 == 0;
    const int64_t size = sizeof(S), chunks = (d * size + 15) / 16;
    if (chunks <= 8) return launch_decode<S, 8, 1>(args, wide, stream);
    if (chunks <= 16) return launch_decode<S, 16, 1>(args, wide, stream);
    if (chunks <= 32 || n * d * size <= kCached) return launch_decode<S, 32, 1>(args, wide, stream);
    launch_decode<S, 32, 2>(args, wide, stream);
  });
}

}  // namespace softtopk::cuda
