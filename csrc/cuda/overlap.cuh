// Kernels that overlap the one before them in their stream: programmatic dependent launch, which
// architectures from 9.0 on have. Such a kernel may begin when all blocks of the one before have
// called let_kernel_after_start() or ended, and must call wait_for_kernel_before() before it
// touches what others write or read; that returns when the one before has ended and its writes can
// be seen. Since that one has waited in its turn, all before it have ended as well.
#pragma once

#include "launch.cuh"

namespace softtopk::cuda {

__device__ __forceinline__ void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_kernel_after_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Launches kernel(args), where it `overlaps` so that it may begin early.
template <class Args>
void launch_overlapping(void (*kernel)(Args), const Args& args, dim3 blocks, int64_t threads,
                        int64_t shared, bool overlaps, void* stream) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = overlaps ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, args), "kernel launch");
}

}  // namespace softtopk::cuda
