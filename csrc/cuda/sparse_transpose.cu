// The entries of a code by latent (softtopk.h), for the gradients of encoder and decoder.
//
// A radix sort of two digits, the first of which is a range of latents, narrower where a sample
// finds that they fire more. The first kernel has a tile of the code's places to a block, and
// writes its entries down by range, in their order, with the number of them that lie before each
// range. The second has a range to a block. Summed over the tiles those numbers are where the range
// begins in the result: no kernel has to scan anything across blocks, nothing has to be zero
// beforehand, and nobody waits for anybody within a kernel.
//
// Both place their entries alike, and stably. The warps of a block have consecutive parts of its
// entries; every warp counts the keys of its own, a scan over (key, warp) makes of the counts the
// places where they go, and a warp hands these out 32 entries at a time, in order, to those that
// __match_any_sync finds to have the same key. So a latent that fires everywhere costs no more
// than others: what would be contended is counted within a warp.
//
// Bytes: the code's indices are read once, and 8 bytes an entry are written and read, in the L2
// cache; the pieces of a tile that a range consists of have about 5 entries.
//
// In development runs on an H200 (microseconds; 4096 rows of 64 among 24576 | 65536 | Zipf 65536,
// 8192 of 32 among 131072, of 220 among 4096): a counting sort of five kernels with two atomics an
// entry 35 | 44 | 60 | 62 | 155, this 21 | 22 | 23 | 24 | 66; without the sample 21 | 21 | 22 | 24
// | 66, but hot neighbours then share a block. Half of it is latency within the first kernel.
#include "overlap.cuh"

namespace softtopk::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kKeys = kThreads;  // at most, of either digit: a scan has one to a thread
constexpr int kItems = 4;        // places of a tile to a thread
constexpr int kTile = kThreads * kItems;
constexpr int kAhead = 4;     // times 32 entries that a warp of the second kernel asks for at once
constexpr int kResident = 3;  // blocks of a multiprocessor, and ranges for each

struct Entry {
  int32_t latent, place;
};

struct TransposeArgs {
  const int32_t* indices;
  const int32_t* counts;
  int32_t rows, places, max_active, n, tiles, ranges, buckets;
  int log_bucket;  // latents of a bucket
  int32_t* offsets;
  int32_t* entries;
  // The workspace.
  Entry* by_range;   // (tiles, kTile)
  int32_t* lowest;   // (ranges + 1,): latents
  uint16_t* before;  // (ranges + 1, tiles): entries of the tile in ranges before
};

// What the warps of a block have of every key; after the scan, where the next entry of each goes.
struct Keys {
  int32_t of_warp[kWarps][kKeys];
  int32_t sums[kWarps];

  __device__ void clear() {
#pragma unroll
    for (auto& of_keys : of_warp) of_keys[threadIdx.x] = 0;
  }

  // Thread t gets the number of entries with a key less than t; in `total` that of all.
  __device__ int32_t scan(int32_t* total) {
    const int t = int(threadIdx.x), warp = t / 32, lane = t % 32;
    int32_t count = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) count += of_warp[w][t];
    const int32_t upto = int32_t(inclusive_scan<32>(unsigned(count), lane));
    if (lane == 31) sums[warp] = upto;
    __syncthreads();
    const int32_t sum = lane < kWarps ? sums[lane] : 0;
    *total = __reduce_add_sync(~0u, sum);
    const int32_t start = upto - count + __reduce_add_sync(~0u, lane < warp ? sum : 0);
    int32_t next = start;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const int32_t own = of_warp[w][t];
      of_warp[w][t] = next;
      next += own;
    }
    return start;
  }

  // Counts the keys of a warp's lanes and returns what its counter had before the calling lane's.
  // Lanes without an entry have a negative key.
  __device__ int32_t take(int32_t key) {
    int32_t* const own = of_warp[threadIdx.x / 32];
    const int lane = int(threadIdx.x) % 32;
    const unsigned same = __match_any_sync(~0u, key);
    const int32_t rank = __popc(same & ((1u << lane) - 1));
    const int32_t next = key < 0 ? 0 : own[key];
    __syncwarp();
    if (rank == 0 && key >= 0) own[key] = next + __popc(same);
    __syncwarp();
    return next + rank;
  }
};

// Which latents are a range: about as many as have its share of the entries. Of the ranges 3/4 are
// shared out evenly among the latents, 1/4 by a sample, so that no range is much wider than others
// and hot latents that are neighbours are not all in one. The sample is of kWarps rows and counts
// what falls into buckets of latents; within a bucket, latents are equals.
struct Ranges {
  static constexpr int kShift = 16;  // bits behind the point of `edges`

  uint32_t edges[kKeys + 1];  // in ranges: where each bucket begins
  int32_t sampled[kKeys];
  uint32_t sums[kWarps];

  // The same in every block.
  __device__ void make(const TransposeArgs& args) {
    const int t = int(threadIdx.x), warp = t / 32, lane = t % 32;
    const int64_t row = int64_t(args.rows) * warp / kWarps;
    const int32_t count = min(args.counts[row], args.max_active);
    int32_t latent = -1;
    if (count > 0) {
      latent = args.indices[row * args.max_active + int32_t(int64_t(count) * lane / 32)];
    }
    sampled[t] = 0;
    __syncthreads();
    if (latent >= 0) atomicAdd(sampled + (latent >> args.log_bucket), 1);
    __syncthreads();
    const uint32_t all = uint32_t(args.ranges) << kShift;
    const uint32_t even = all / 4 * 3 / uint32_t(args.buckets), each = all / 4 / kThreads;
    uint32_t upto = t < args.buckets ? even + each * uint32_t(sampled[t]) : 0;
    upto = inclusive_scan<32>(upto, lane);
    if (lane == 31) sums[warp] = upto;
    __syncthreads();
    upto += __reduce_add_sync(~0u, lane < warp ? sums[lane] : 0u);
    edges[t + 1] = upto;
    if (t == 0) edges[0] = 0;
    __syncthreads();
  }

  __device__ int32_t of(const TransposeArgs& args, int32_t latent) const {
    const int32_t bucket = latent >> args.log_bucket, in = latent - (bucket << args.log_bucket);
    const uint32_t edge = edges[bucket];
    return int32_t(
        (edge + uint32_t(uint64_t(edges[bucket + 1] - edge) * uint32_t(in) >> args.log_bucket)) >>
        kShift);
  }

  // Every block writes some of the lowest latents, a thread those in its bucket.
  __device__ void write_lowest(const TransposeArgs& args) const {
    const uint32_t t = threadIdx.x, last = uint32_t(args.buckets) - 1;
    if (t > last) return;
    const uint32_t edge = edges[t], width = edges[t + 1] - edge;
    const uint32_t all = uint32_t(args.ranges);
    const uint32_t end = t == last ? all + 1 : ((edge + width - 1) >> kShift) + 1;
    const uint32_t begin = (edge + (1u << kShift) - 1) >> kShift;
    const uint32_t tiles = uint32_t(args.tiles),
                   skip = (blockIdx.x + tiles - begin % tiles) % tiles;
    for (uint32_t range = begin + skip; range < end; range += tiles) {
      const uint64_t target = uint64_t((range << kShift) - edge) << args.log_bucket;
      const uint64_t latent = (uint64_t(t) << args.log_bucket) + (target + width - 1) / width;
      args.lowest[range] = int32_t(min(latent, uint64_t(args.n)));
    }
  }
};

__global__ void __launch_bounds__(kThreads) split_by_range(const TransposeArgs args) {
  __shared__ Keys keys;
  __shared__ Ranges ranges;
  let_kernel_after_start();
  const int t = int(threadIdx.x), warp = t / 32, lane = t % 32;
  const int32_t first = int32_t(blockIdx.x) * kTile + warp * (32 * kItems) + lane;
  Entry entry[kItems];
  bool used[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    entry[i] = {0, first + 32 * i};
    used[i] = entry[i].place < args.places;
    if (used[i]) {
      const uint32_t row = uint32_t(entry[i].place) / uint32_t(args.max_active);
      entry[i].latent = args.indices[entry[i].place];
      used[i] = entry[i].place - int32_t(row) * args.max_active < args.counts[row];
    }
  }
  keys.clear();
  ranges.make(args);
  int32_t range[kItems], rank[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    range[i] = used[i] ? ranges.of(args, entry[i].latent) : -1;
    rank[i] = keys.take(range[i]);
  }
  __syncthreads();
  int32_t total;
  const int32_t start = keys.scan(&total);
  if (t < args.ranges) args.before[int64_t(t) * args.tiles + blockIdx.x] = uint16_t(start);
  if (t == 0) args.before[int64_t(args.ranges) * args.tiles + blockIdx.x] = uint16_t(total);
  __syncthreads();
  Entry* const to = args.by_range + int64_t(blockIdx.x) * kTile;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (used[i]) to[keys.of_warp[warp][range[i]] + rank[i]] = entry[i];
  }
  ranges.write_lowest(args);
}

// A range's pieces of up to 32 consecutive tiles, one to a lane of the warp.
struct Pieces {
  int32_t upto;   // entries in this one and those before
  int32_t from;   // the entry that is number 0 is at by_range[from], if it is in this piece
  int32_t start;  // entries of the tile before the range

  __device__ static Pieces load(const TransposeArgs& args, int32_t tile, int32_t last) {
    const int lane = int(threadIdx.x) % 32;
    tile += lane;
    int32_t start = 0, count = 0;
    if (tile < last) {
      const uint16_t* const before = args.before + int64_t(blockIdx.x) * args.tiles + tile;
      start = before[0];
      count = before[args.tiles] - start;
    }
    const int32_t upto = int32_t(inclusive_scan<32>(unsigned(count), lane));
    return {upto, tile * kTile + start - (upto - count), start};
  }

  // f(entry, whether the calling lane has one), 32 entries at a time and in their order.
  template <class F>
  __device__ void for_each(const TransposeArgs& args, F f) const {
    const int lane = int(threadIdx.x) % 32;
    const int32_t total = __shfl_sync(~0u, upto, 31);
    for (int32_t first = 0; first < total; first += 32 * kAhead) {
      Entry entry[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int32_t number = first + 32 * i + lane;
        int piece = 0;  // the first that reaches beyond the number
#pragma unroll
        for (int step = 16; step > 0; step /= 2) {
          if (__shfl_sync(~0u, upto, piece + step - 1) <= number) piece += step;
        }
        const int32_t at = __shfl_sync(~0u, from, piece) + number;
        entry[i] = number < total ? args.by_range[at] : Entry{0, 0};
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (first + 32 * i < total) f(entry[i], first + 32 * i + lane < total);
      }
    }
  }
};

__global__ void __launch_bounds__(kThreads, kResident) order_range(const TransposeArgs args) {
  __shared__ Keys keys;
  __shared__ int32_t starts[kWarps];
  const int t = int(threadIdx.x), warp = t / 32, lane = t % 32;
  const int32_t first = int32_t(int64_t(args.tiles) * warp / kWarps);
  const int32_t last = int32_t(int64_t(args.tiles) * (warp + 1) / kWarps);
  keys.clear();
  wait_for_kernel_before();
  let_kernel_after_start();
  const int64_t low = args.tiles > 0 ? args.lowest[blockIdx.x] : 0;
  const int64_t high = args.tiles > 0 ? args.lowest[blockIdx.x + 1] : args.n;
  int32_t start = 0;  // of the range, then of the keys, which are kKeys of its latents
  for (int64_t window = low; window < high; window += kKeys) {
    const auto key = [&](const Entry& entry) {
      const uint32_t which = uint32_t(entry.latent) - uint32_t(window);
      return which < uint32_t(kKeys) ? int32_t(which) : -1;
    };
    if (window != low) keys.clear();
    __syncthreads();
    Pieces pieces = {};
    int32_t warp_start = 0;
    for (int32_t tile = first; tile < last; tile += 32) {
      pieces = Pieces::load(args, tile, last);
      warp_start += pieces.start;
      pieces.for_each(args, [&](const Entry& entry, bool valid) {
        const int32_t which = valid ? key(entry) : -1;
        if (which >= 0) atomicAdd(&keys.of_warp[warp][which], 1);
      });
    }
    if (window == low) {
      warp_start = __reduce_add_sync(~0u, warp_start);
      if (lane == 0) starts[warp] = warp_start;
    }
    __syncthreads();
    if (window == low) start = __reduce_add_sync(~0u, lane < kWarps ? starts[lane] : 0);
    int32_t total;
    const int32_t offset = start + keys.scan(&total);
    if (window + t < high) args.offsets[window + t] = offset;
    __syncthreads();
    for (int32_t tile = first; tile < last; tile += 32) {
      if (last - first > 32) pieces = Pieces::load(args, tile, last);
      pieces.for_each(args, [&](const Entry& entry, bool valid) {
        const int32_t which = valid ? key(entry) : -1;
        const int32_t at = keys.take(which);
        if (which >= 0) args.entries[start + at] = entry.place;
      });
    }
    __syncthreads();
    start += total;
  }
  if (low < high && high == args.n && t == 0) args.offsets[args.n] = start;
}

int64_t tiles_of(int64_t places) { return (places + kTile - 1) / kTile; }

}  // namespace

int64_t transpose_workspace(int64_t rows, int64_t max_active, int64_t) {
  const int64_t tiles = tiles_of(rows * max_active);
  return tiles * (kTile * int64_t(sizeof(Entry)) + (kKeys + 1) * int64_t(sizeof(uint16_t))) +
         (kKeys + 1) * int64_t(sizeof(int32_t));
}

void transpose(const int32_t* indices, const int32_t* counts, int64_t rows, int64_t max_active,
               int64_t n, int32_t* offsets, int32_t* entries, void* workspace, int device,
               void* stream) {
  check_length(n);
  check_length(rows * max_active);
  const DeviceGuard guard(device);
  if (n == 0) {
    check(cudaMemsetAsync(offsets, 0, sizeof(int32_t), static_cast<cudaStream_t>(stream)),
          "cudaMemsetAsync");
    return;
  }
  TransposeArgs args = {};
  args.indices = indices, args.counts = counts;
  args.places = int32_t(rows * max_active), args.max_active = int32_t(max_active);
  args.rows = int32_t(rows), args.n = int32_t(n), args.tiles = int32_t(tiles_of(args.places));
  const auto buckets = [&] { return ((n - 1) >> args.log_bucket) + 1; };
  while (buckets() > kKeys) ++args.log_bucket;
  args.buckets = int32_t(buckets());
  const Device& on = device_at(device);
  const int64_t many = std::min<int64_t>(on.multiprocessors * kResident, kKeys);
  args.ranges = args.tiles > 0 ? int32_t(std::min(n, many)) : 1;
  args.offsets = offsets, args.entries = entries;
  args.by_range = static_cast<Entry*>(workspace);
  args.lowest = reinterpret_cast<int32_t*>(args.by_range + int64_t(args.tiles) * kTile);
  args.before = reinterpret_cast<uint16_t*>(args.lowest + kKeys + 1);
  const auto run = [&](auto kernel, int32_t blocks, bool overlaps) {
    launch_overlapping(kernel, args, dim3(unsigned(blocks)), kThreads, 0, overlaps, stream);
  };
  if (args.tiles > 0) run(split_by_range, args.tiles, false);
  run(order_range, args.ranges, args.tiles > 0 && on.fed());
}

}  // namespace softtopk::cuda
