// CUB's batched top-k as one C function, for benchmarks/speed_peers.py, which compiles it with nvcc
// against the CCCL checkout that SOFTTOPK_PEER_CUB names: once per PEER_N and PEER_TYPE, since CUB
// chooses its algorithm by the length that it knows when it is compiled.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cub/device/device_batched_topk.cuh>
#include <cuda/argument>
#include <cuda/iterator>

namespace {

constexpr int length = PEER_N, k = PEER_K;
using Value = PEER_TYPE;

}  // namespace

extern "C" int version() { return CUB_VERSION; }

// The k largest of each row of x (rows, n), in no order: values (rows, k) and their indices (rows,
// k). With no scratch memory nothing runs and its size is written to scratch_bytes. Returns a
// cudaError_t.
extern "C" int top_k(const void* x, void* values, int* indices, void* scratch,
                     size_t* scratch_bytes, int64_t rows, void* stream) {
  auto row = [](auto* start, int stride) {
    return cuda::make_strided_iterator(cuda::make_counting_iterator(start), stride);
  };
  auto environment = cuda::std::execution::env{
      cuda::stream_ref{static_cast<cudaStream_t>(stream)},
      cuda::execution::require(cuda::execution::determinism::not_guaranteed,
                               cuda::execution::tie_break::unspecified,
                               cuda::execution::output_ordering::unsorted)};
  return cub::DeviceBatchedTopK::MaxPairs(
      scratch, *scratch_bytes, row(static_cast<const Value*>(x), length),
      row(static_cast<Value*>(values), k),
      cuda::make_constant_iterator(cuda::make_counting_iterator(0)), row(indices, k),
      cuda::args::constant<length>{}, cuda::args::constant<k>{}, cuda::args::immediate{rows},
      environment);
}
