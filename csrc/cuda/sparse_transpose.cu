// The entries of a code by latent (softtopk.h), for the gradients of encoder and decoder.
//
// A counting sort: count the entries of every latent, sum the counts up, put every entry somewhere
// into its latent's segment, and each segment into order. The atomics are on integers, and what
// they decide is undone by the last step: a latent occurs once in a row at most, so that an entry's
// place in its segment is the number of rows before its own that have the latent. Short segments
// are compared entry by entry in a warp; of a long one a bitmap of rows in shared memory is made
// and its bits are counted, so that a latent which fires everywhere costs no more than others.
//
// Bytes: the code's indices are read twice, and 4 bytes an entry moved three times: all in the L2
// cache.
#include "launch.cuh"

namespace softtopk::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kScanned = 2048;  // counts that a block sums up
constexpr int kShort = 64;      // entries that a warp puts in order
constexpr int kRows = 1 << 16;  // of a bitmap
constexpr int kWords = kRows / 32;

struct TransposeArgs {
  const int32_t* indices;
  const int32_t* counts;
  int64_t rows, max_active;
  int32_t n;
  int32_t* offsets;
  int32_t* entries;
  // The workspace.
  int32_t* next;       // (n,) of every latent its count, then where its next entry goes
  int32_t* sums;       // of every kScanned counts
  int32_t* unordered;  // (rows * max_active,)
};

// f(place, latent) for the entries of the code, each by one thread.
template <class F>
__device__ __forceinline__ void for_each_entry(const TransposeArgs& args, F f) {
  const uint32_t width = uint32_t(args.max_active), places = uint32_t(args.rows) * width;
  const uint32_t step = gridDim.x * kThreads;
  for (uint32_t place = blockIdx.x * kThreads + threadIdx.x; place < places; place += step) {
    const uint32_t row = place / width;
    if (int32_t(place - row * width) < args.counts[row]) f(int32_t(place), args.indices[place]);
  }
}

__global__ void __launch_bounds__(kThreads) count_entries(const TransposeArgs args) {
  for_each_entry(args, [&](int32_t, int32_t latent) { atomicAdd(args.next + latent, 1); });
}

__device__ __forceinline__ int32_t sum_of_warp(int32_t value) {
  return __reduce_add_sync(~0u, value);
}

// The sum over the block, in all threads.
__device__ __forceinline__ int32_t sum_of_block(int32_t value) {
  __shared__ int32_t of_warps[kThreads / 32];
  value = sum_of_warp(value);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  __syncthreads();
  int32_t total = 0;
#pragma unroll
  for (const int32_t of_warp : of_warps) total += of_warp;
  return total;
}

// The sum over the threads before the calling one. `of_warps` is no other call's.
__device__ __forceinline__ int32_t sum_before(int32_t value, int32_t (&of_warps)[kThreads / 32]) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int32_t upto = int32_t(inclusive_scan<32>(unsigned(value), lane));
  if (lane == 31) of_warps[warp] = upto;
  __syncthreads();
  int32_t before = upto - value;
  for (int w = 0; w < warp; ++w) before += of_warps[w];
  return before;
}

__global__ void __launch_bounds__(kThreads) sum_counts(const TransposeArgs args) {
  int32_t sum = 0;
  for (int i = int(threadIdx.x); i < kScanned; i += kThreads) {
    const int64_t latent = int64_t(blockIdx.x) * kScanned + i;
    if (latent < args.n) sum += args.next[latent];
  }
  sum = sum_of_block(sum);
  if (threadIdx.x == 0) args.sums[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads) scan_counts(const TransposeArgs args) {
  constexpr int kEach = kScanned / kThreads;
  __shared__ int32_t of_warps[kThreads / 32];
  int32_t base = 0;
  for (int i = int(threadIdx.x); i < int(blockIdx.x); i += kThreads) base += args.sums[i];
  base = sum_of_block(base);
  const int64_t first = int64_t(blockIdx.x) * kScanned + int64_t(threadIdx.x) * kEach;
  int32_t count[kEach], sum = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    count[i] = first + i < args.n ? args.next[first + i] : 0;
    sum += count[i];
  }
  int32_t offset = base + sum_before(sum, of_warps);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (first + i >= args.n) break;
    args.offsets[first + i] = args.next[first + i] = offset;
    offset += count[i];
    if (first + i + 1 == args.n) args.offsets[args.n] = offset;
  }
}

__global__ void __launch_bounds__(kThreads) place_entries(const TransposeArgs args) {
  for_each_entry(args, [&](int32_t place, int32_t latent) {
    args.unordered[atomicAdd(args.next + latent, 1)] = place;
  });
}

// By one warp: `count` places, at most kShort, in ascending order.
__device__ __forceinline__ void order_short(const int32_t* from, int32_t* to, int32_t count) {
  constexpr int kEach = kShort / 32;
  const int lane = int(threadIdx.x) % 32;
  int32_t own[kEach], rank[kEach] = {};
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    own[i] = lane + 32 * i < count ? from[lane + 32 * i] : 0x7fffffff;
  }
#pragma unroll
  for (int part = 0; part < kEach; ++part) {
    const int upto = min(32, count - 32 * part);
    for (int other = 0; other < upto; ++other) {
      const int32_t place = __shfl_sync(~0u, own[part], other);
#pragma unroll
      for (int i = 0; i < kEach; ++i) rank[i] += place < own[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (lane + 32 * i < count) to[rank[i]] = own[i];
  }
}

struct Bitmap {
  uint32_t rows[kWords];
  int32_t before[kWords];  // bits in the words before
  int32_t of_warps[kThreads / 32];
};

// By a block: the same of any number, the places of `rows` rows of `width` each.
__device__ void order_long(const int32_t* from, int32_t* to, int32_t count, uint32_t rows,
                           uint32_t width, Bitmap& bits) {
  const int t = int(threadIdx.x);
  int32_t done = 0;
  for (uint32_t first = 0; first < rows; first += kRows) {
    const int words = int(min(rows - first, uint32_t(kRows)) + 31) / 32;
    for (int i = t; i < words; i += kThreads) bits.rows[i] = 0;
    __syncthreads();
    for (int32_t i = t; i < count; i += kThreads) {
      const uint32_t row = uint32_t(from[i]) / width - first;
      if (row < kRows) atomicOr(bits.rows + row / 32, 1u << row % 32);
    }
    __syncthreads();
    int32_t sum = 0;
    const int each = (words + kThreads - 1) / kThreads;
    for (int i = t * each; i < min((t + 1) * each, words); ++i) {
      bits.before[i] = sum;
      sum += __popc(bits.rows[i]);
    }
    const int32_t before = done + sum_before(sum, bits.of_warps);
    for (int i = t * each; i < min((t + 1) * each, words); ++i) bits.before[i] += before;
    __syncthreads();
    for (int32_t i = t; i < count; i += kThreads) {
      const int32_t place = from[i];
      const uint32_t row = uint32_t(place) / width - first;
      if (row >= kRows) continue;
      const uint32_t below = bits.rows[row / 32] & ((1u << row % 32) - 1);
      to[bits.before[row / 32] + __popc(below)] = place;
    }
    done = bits.before[words - 1] + __popc(bits.rows[words - 1]);
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads) order_entries(const TransposeArgs args) {
  constexpr int kWarps = kThreads / 32;
  __shared__ Bitmap bits;
  __shared__ int32_t longs[kWarps];
  const int warp = int(threadIdx.x) / 32;
  // Neighbours, which may all be long, go to different blocks.
  for (int64_t first = blockIdx.x; first < args.n; first += int64_t(gridDim.x) * kWarps) {
    const int64_t latent = first + int64_t(warp) * gridDim.x;
    int32_t begin = 0, count = 0;
    if (latent < args.n) {
      begin = args.offsets[latent];
      count = args.offsets[latent + 1] - begin;
    }
    if (count <= kShort) order_short(args.unordered + begin, args.entries + begin, count);
    if (threadIdx.x % 32 == 0) longs[warp] = count > kShort ? int32_t(latent) : -1;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) {
      const int32_t which = longs[w];
      if (which < 0) continue;
      const int32_t from = args.offsets[which];
      order_long(args.unordered + from, args.entries + from, args.offsets[which + 1] - from,
                 uint32_t(args.rows), uint32_t(args.max_active), bits);
    }
    __syncthreads();
  }
}

int64_t scan_blocks(int64_t n) { return (n + kScanned - 1) / kScanned; }

void run(void (*kernel)(TransposeArgs), TransposeArgs args, int64_t blocks, void* stream) {
  void* pointers[] = {&args};
  check(cudaLaunchKernel(kernel, dim3(unsigned(std::max<int64_t>(blocks, 1))), dim3(kThreads),
                         pointers, 0, static_cast<cudaStream_t>(stream)),
        "kernel launch");
}

}  // namespace

int64_t transpose_workspace(int64_t rows, int64_t max_active, int64_t n) {
  return 4 * (n + scan_blocks(n) + rows * max_active);
}

void transpose(const int32_t* indices, const int32_t* counts, int64_t rows, int64_t max_active,
               int64_t n, int32_t* offsets, int32_t* entries, void* workspace, int device,
               void* stream) {
  check_length(n);
  check_length(rows * max_active);
  const DeviceGuard guard(device);
  int32_t* const next = static_cast<int32_t*>(workspace);
  int32_t* const sums = next + n;
  const TransposeArgs args = {indices, counts,  rows, max_active, int32_t(n),
                              offsets, entries, next, sums,       sums + scan_blocks(n)};
  check(cudaMemsetAsync(next, 0, size_t(4 * n), static_cast<cudaStream_t>(stream)),
        "cudaMemsetAsync");
  const int64_t many = int64_t(device_at(device).multiprocessors) * 8;
  const int64_t over_entries = std::min((rows * max_active + kThreads - 1) / kThreads, many);
  if (rows * max_active > 0) run(count_entries, args, over_entries, stream);
  run(sum_counts, args, scan_blocks(n), stream);
  run(scan_counts, args, scan_blocks(n), stream);
  if (rows * max_active == 0) return;
  run(place_entries, args, over_entries, stream);
  run(order_entries, args, std::min((n + 7) / 8, many), stream);
}

}  // namespace softtopk::cuda
