// Which latents of a batch are active, and how many: one pass over the latents, dense or a code.
//
// A warp takes a row. A block marks the latents in a bitmap in shared memory, where all but the
// first mark of each cost a look, and writes it out at the end; what is written to the same place
// is the same. Counts are integers, so that the order of their sums does not matter.
#include "launch.cuh"

namespace softtopk::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
using Count = unsigned long long;  // what there are atomics for

struct ActivityArgs {
  const void* latents;     // (rows, n), or the values of a code (rows, n), n its places
  const int32_t* indices;  // of a code
  const int32_t* counts;
  int64_t rows;
  int32_t n, latent_count;
  Count* totals;   // values that are not 0, entries, the most entries of a row
  uint8_t* fired;  // (latent_count,)
};

// What a block has found.
struct Found {
  Count active, entries, most;
};

// The block's bitmap, all 0.
__device__ __forceinline__ uint32_t* empty_bitmap(const ActivityArgs& args, Found& found) {
  extern __shared__ uint32_t bits[];
  for (int32_t i = int(threadIdx.x); i < (args.latent_count + 31) / 32; i += kThreads) bits[i] = 0;
  if (threadIdx.x == 0) found = {0, 0, 0};
  __syncthreads();
  return bits;
}

__device__ __forceinline__ void mark(uint32_t* word, uint32_t bits) {
  if (bits & ~*word) atomicOr(word, bits);
}

// What one lane has counted of all rows of its warp, `most` of a row the same in all lanes.
__device__ __forceinline__ void add_up(const ActivityArgs& args, const uint32_t* bits, Found& found,
                                       uint32_t active, uint32_t entries, uint32_t most) {
  active = __reduce_add_sync(~0u, active);
  entries = __reduce_add_sync(~0u, entries);
  if (threadIdx.x % 32 == 0) {
    atomicAdd(&found.active, Count(active));
    atomicAdd(&found.entries, Count(entries));
    atomicMax(&found.most, Count(most));
  }
  __syncthreads();
  for (int32_t i = int(threadIdx.x); i < args.latent_count; i += kThreads) {
    if (bits[i / 32] >> (i % 32) & 1) args.fired[i] = 1;
  }
  if (threadIdx.x != 0) return;
  atomicAdd(args.totals, found.active);
  atomicAdd(args.totals + 1, found.entries);
  atomicMax(args.totals + 2, found.most);
}

template <class Raw>
__device__ __forceinline__ bool not_zero(Raw raw) {
  return Raw(raw << 1) != 0;  // without the sign
}

// WHOLE: rows are whole chunks of 16 bytes, on 16 bytes.
template <class S, bool WHOLE>
__global__ void __launch_bounds__(kThreads) dense_activity(const ActivityArgs args) {
  using Raw = typename Element<S>::Raw;
  constexpr int kBatch = 4, kSize = Chunk<S>::size;
  __shared__ Found found;
  uint32_t* bits = empty_bitmap(args, found);
  const int lane = int(threadIdx.x) % 32;
  uint32_t active = 0, most = 0;
  for (int64_t row = int64_t(blockIdx.x) * kWarps + int(threadIdx.x) / 32; row < args.rows;
       row += int64_t(gridDim.x) * kWarps) {
    uint32_t of_row = 0;
    if constexpr (WHOLE) {
      const int32_t chunks = args.n / kSize;
      const uint4* from = static_cast<const uint4*>(args.latents) + row * chunks;
      for (int32_t first = lane; first < chunks; first += 32 * kBatch) {
        Chunk<S> chunk[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const int32_t i = first + 32 * b;
          chunk[b].words = i < chunks ? from[i] : uint4{0, 0, 0, 0};
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          uint32_t own = 0;
#pragma unroll
          for (int e = 0; e < kSize; ++e) own |= uint32_t(not_zero(chunk[b].raw(e))) << e;
          if (own == 0) continue;
          of_row += __popc(own);
          const int32_t i = (first + 32 * b) * kSize;
          mark(bits + i / 32, own << (i % 32));
        }
      }
    } else {
      const Raw* from = static_cast<const Raw*>(args.latents) + row * args.n;
      for (int32_t i = lane; i < args.n; i += 32) {
        if (!not_zero(from[i])) continue;
        ++of_row;
        mark(bits + i / 32, 1u << (i % 32));
      }
    }
    active += of_row;
    most = max(most, __reduce_add_sync(~0u, of_row));
  }
  add_up(args, bits, found, active, active, most);
}

template <class S>
__global__ void __launch_bounds__(kThreads) code_activity(const ActivityArgs args) {
  using Raw = typename Element<S>::Raw;
  __shared__ Found found;
  uint32_t* bits = empty_bitmap(args, found);
  const int lane = int(threadIdx.x) % 32;
  uint32_t active = 0, entries = 0, most = 0;
  for (int64_t row = int64_t(blockIdx.x) * kWarps + int(threadIdx.x) / 32; row < args.rows;
       row += int64_t(gridDim.x) * kWarps) {
    const int32_t count = args.counts[row];
    const Raw* values = static_cast<const Raw*>(args.latents) + row * args.n;
    const int32_t* indices = args.indices + row * args.n;
    for (int32_t i = lane; i < min(count, args.n); i += 32) {
      const int32_t latent = indices[i];
      if (!not_zero(values[i])) continue;
      ++active;
      mark(bits + latent / 32, 1u << (latent % 32));
    }
    if (lane == 0) entries += uint32_t(count);
    most = max(most, uint32_t(count));
  }
  add_up(args, bits, found, active, entries, most);
}

void run(void (*kernel)(ActivityArgs), ActivityArgs args, int device, void* stream) {
  check(cudaMemsetAsync(args.totals, 0, size_t(3 * sizeof(Count) + args.latent_count),
                        static_cast<cudaStream_t>(stream)),
        "cudaMemsetAsync");
  const int64_t many = int64_t(device_at(device).multiprocessors) * 8;
  const int64_t blocks = std::min((args.rows + kWarps - 1) / kWarps, many);
  if (blocks == 0) return;
  const size_t shared = size_t(args.latent_count + 31) / 32 * 4;
  void* pointers[] = {&args};
  check(cudaLaunchKernel(kernel, dim3(unsigned(blocks)), dim3(kThreads), pointers, shared,
                         static_cast<cudaStream_t>(stream)),
        "kernel launch");
}

// `found` as totals and, behind them, fired.
ActivityArgs activity_args(const void* latents, int64_t rows, int64_t n, int64_t latent_count,
                           void* found) {
  Count* totals = static_cast<Count*>(found);
  return {latents,    nullptr,
          nullptr,    rows,
          int32_t(n), int32_t(latent_count),
          totals,     reinterpret_cast<uint8_t*>(totals + 3)};
}

}  // namespace

int64_t most_latents() { return (int64_t(48) << 10) * 8 - 1024; }

void latents_activity(const void* latents, Type type, int64_t rows, int64_t n, void* found,
                      int device, void* stream) {
  const DeviceGuard guard(device);
  const ActivityArgs args = activity_args(latents, rows, n, n, found);
  with_type(type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const bool whole = n % Chunk<S>::size == 0 && reinterpret_cast<uintptr_t>(latents) % 16 == 0;
    run(whole ? dense_activity<S, true> : dense_activity<S, false>, args, device, stream);
  });
}

void codes_activity(const void* values, Type type, const int32_t* indices, const int32_t* counts,
                    int64_t rows, int64_t max_active, int64_t n, void* found, int device,
                    void* stream) {
  const DeviceGuard guard(device);
  ActivityArgs args = activity_args(values, rows, max_active, n, found);
  args.indices = indices;
  args.counts = counts;
  if (type == Type::float64) return run(code_activity<double>, args, device, stream);
  run(code_activity<float>, args, device, stream);
}

}  // namespace softtopk::cuda
