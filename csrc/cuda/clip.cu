// The factors of a gradient clip for groups of parameters, in two launches however many there are.
//
// A block adds up a stretch of one tensor, in float32 what a thread has of it and then in float64;
// the last launch adds those sums up, a block for each group. All in an order that the sizes alone
// decide.
#include "block_sum.cuh"
#include "launch.cuh"

namespace softtopk::cuda {
namespace {

constexpr int kThreads = 256, kItems = 16;
constexpr int64_t kStretch = int64_t(kThreads) * kItems * 4;  // elements of a block
constexpr int kTogether = 96;                                 // tensors of a launch
constexpr int kMostGroups = 16;

struct SumArgs {
  const float* data[kTogether];
  int64_t size[kTogether];
  int32_t first[kTogether + 1];  // tensor i has the blocks from first[i] to first[i + 1]
  bool squared[kTogether];       // the elements are squares already
  double* sums;                  // of the blocks
};
static_assert(sizeof(SumArgs) <= 4096);

__global__ void __launch_bounds__(kThreads) sum_kernel(const __grid_constant__ SumArgs args) {
  int which = 0;
  while (int32_t(blockIdx.x) >= args.first[which + 1]) ++which;
  const float* data = args.data[which];
  const bool squared = args.squared[which];
  const int64_t begin = (int32_t(blockIdx.x) - args.first[which]) * kStretch;
  const int64_t end = min(begin + kStretch, args.size[which]);
  float sum = 0;
  const auto add = [&](float x) { sum += squared ? x : x * x; };
  if (reinterpret_cast<uintptr_t>(data) % 16 == 0 && end - begin == kStretch) {
    const float4* from = reinterpret_cast<const float4*>(data + begin) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const float4 x = from[i * kThreads];
      add(x.x), add(x.y), add(x.z), add(x.w);
    }
  } else {
    for (int64_t i = begin + int(threadIdx.x); i < end; i += kThreads) add(data[i]);
  }
  const double total = sum_of_block<kThreads>(sum);
  if (threadIdx.x == 0) args.sums[blockIdx.x] = total;
}

struct FactorArgs {
  const double* sums;
  int64_t first[kMostGroups + 1];  // group g has the sums from first[g] to first[g + 1]
  double max_norm[kMostGroups];
  float* out;  // (2, groups): factors, norms
};

__global__ void __launch_bounds__(kThreads) factor_kernel(const __grid_constant__ FactorArgs args) {
  const int64_t end = args.first[blockIdx.x + 1];
  double sum = 0;
  for (int64_t i = args.first[blockIdx.x] + int(threadIdx.x); i < end; i += kThreads) {
    sum += args.sums[i];
  }
  const double total = sum_of_block<kThreads>(sum);
  if (threadIdx.x != 0) return;
  const double norm = sqrt(total), factor = args.max_norm[blockIdx.x] / (norm + 1e-6);
  args.out[blockIdx.x] = float(factor > 1 ? 1 : factor);  // NaN stays
  args.out[gridDim.x + blockIdx.x] = float(norm);
}

int64_t blocks_of(int64_t size) { return (size + kStretch - 1) / kStretch; }

template <class Args>
void start(void (*kernel)(Args), Args args, int64_t blocks, void* stream) {
  if (blocks == 0) return;
  void* pointers[] = {&args};
  check(cudaLaunchKernel(kernel, dim3(unsigned(blocks)), dim3(kThreads), pointers, 0,
                         static_cast<cudaStream_t>(stream)),
        "kernel launch");
}

}  // namespace

int64_t clip_blocks(int64_t size) { return blocks_of(size); }

void clip_factors(const ClipPart* parts, int64_t count, const double* max_norms, int64_t groups,
                  double* sums, float* out, int device, void* stream) {
  if (groups > kMostGroups) throw std::invalid_argument("softtopk: clip: too many groups");
  const DeviceGuard guard(device);
  SumArgs args{};
  FactorArgs last{};
  args.sums = sums;
  int64_t done = 0;  // sums of the launches before
  int together = 0;
  const auto launch = [&] {
    start(sum_kernel, args, args.first[together], stream);
    done += args.first[together];
    args.sums = sums + done;
    together = 0;
  };
  int64_t part = 0;
  for (int64_t group = 0; group < groups; ++group) {
    for (; part < count && parts[part].group == group; ++part) {
      if (parts[part].size == 0) continue;
      if (together == kTogether) launch();
      args.data[together] = parts[part].data;
      args.size[together] = parts[part].size;
      args.squared[together] = parts[part].squared != 0;
      args.first[together + 1] = int32_t(args.first[together] + blocks_of(parts[part].size));
      ++together;
    }
    last.first[group + 1] = done + args.first[together];
    last.max_norm[group] = max_norms[group];
  }
  if (together > 0) launch();
  last.sums = sums;
  last.out = out;
  start(factor_kernel, last, groups, stream);
}

}  // namespace softtopk::cuda
