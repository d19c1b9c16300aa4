// Hard top-k: the round-half-up(k) largest elements of every row, the lowest index first among
// equals, as a mask of 0 and 1 (rows, n) or as ascending indices (rows, max_k) with their values
// and counts.
//
// Bytes: x is read once where a row fits in registers or shared memory, on every sweep of the
// search otherwise; the mask is written once, or 8 bytes for each of the max_k indices and the
// value. Layout: a warp or a block to a row (row.cuh). The search (threshold.cuh) gives the value
// of the last element selected and how many of its equals are. Elements are then visited in the
// order of their indices, a chunk to a thread, with a prefix sum over the threads for the place of
// each.
#include "quick_hard_topk.cuh"
#include "resident_launch.cuh"
#include "threshold.cuh"

namespace softtopk::cuda {
namespace {

constexpr Demand kQuick = {1, kAnyPart, 3, {64, 128, 128}, {512, 1024, 1024}, 2048};

struct MaskArgs {
  Rows x;
  PerRow k;
  void* mask;
  bool wide_x, wide_mask;
  int64_t first_row;
};

// Calls f(chunk index, selected, x, place) for the chunks of a row in order: selected[i] is whether
// its element x[i] is, place what number among the selected the first that is one of them has.
// Returns early, in all threads, once every selected element has been visited and `all` is false.
template <class S, class Group, class Row, class T, class F>
__device__ __forceinline__ void visit_selected(const Row& row, Group& group, const Cut<T>& cut,
                                               bool all, F f) {
  constexpr int kSize = Chunk<S>::size;
  int32_t greater = 0, equal = 0;  // in the chunks so far
  row.for_each([&](int32_t item) {
    // The same in all threads. At most 512 * 8 elements to a visit: two counts fit in 32 bits.
    if (!all && greater + min(equal, cut.ties) >= cut.count) return;
    T x[kSize];
    row.chunk(item).read(x);
    unsigned counts = 0;
#pragma unroll
    for (int i = 0; i < kSize; ++i) counts += x[i] > cut.value ? 0x10000u : x[i] == cut.value;
    unsigned total;
    const unsigned before = group.scan(counts, &total);
    int32_t rank = equal + int32_t(before & 0xffff);
    const int32_t place = greater + int32_t(before >> 16) + min(rank, cut.ties);
    bool selected[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const bool tie = x[i] == cut.value;
      selected[i] = x[i] > cut.value || (tie && rank < cut.ties);
      rank += tie;
    }
    greater += int32_t(total >> 16);
    equal += int32_t(total & 0xffff);
    f(chunk_index<Group>(item), selected, x, place);
  });
}

template <class S, class L>
__global__ void __launch_bounds__(L::block, L::resident(sizeof(S)))
    mask_kernel(const MaskArgs args) {
  using T = Compute<S>;
  using Group = typename L::Group;
  using Row = typename L::template Row<S>;
  constexpr int kSize = Chunk<S>::size;
  extern __shared__ uint4 row_memory[];
  __shared__ typename Group::Storage storage;

  const int64_t r = L::row(args.first_row);
  const int32_t n = int32_t(args.x.n);
  if (r >= args.x.rows) return;  // all threads of the group
  Group group(storage);
  const Source<S> source(args.x.data, r * args.x.stride, n, args.wide_x, !args.x.largest);
  const Row row(source, row_memory);
  Sweeper<S, Row, Group> sweeper(row, group);
  const Cut<T> cut = hard_cut<T>(sweeper, per_row(args.k, r), n);

  const Sink<S> sink(args.mask, r * n, n, args.wide_mask);
  const T zero = cut.value == cut.value ? T(0) : cut.value;  // a NaN row is NaN
  visit_selected<S>(row, group, cut, true,
                    [&](int32_t index, const bool (&selected)[kSize], const T(&)[kSize], int32_t) {
                      T mask[kSize];
#pragma unroll
                      for (int i = 0; i < kSize; ++i) mask[i] = selected[i] ? T(1) : zero;
                      sink.store(index, Chunk<S>::of(mask));
                    });
}

template <class S, class Row, class Group>
__device__ __forceinline__ void indices_of_row(const IndicesArgs& args, int64_t r, const Row& row,
                                               Group& group) {
  using T = Compute<S>;
  constexpr int kSize = Chunk<S>::size;
  const int32_t n = int32_t(args.x.n);
  Sweeper<S, Row, Group> sweeper(row, group);
  const int32_t limit = int32_t(args.max_k < n ? args.max_k : n);
  const Cut<T> cut = hard_cut<T>(sweeper, per_row(args.k, r), limit);

  visit_selected<S>(
      row, group, cut, false,
      [&](int32_t index, const bool (&selected)[kSize], const T(&x)[kSize], int32_t place) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          if (!selected[i]) continue;
          write_selected<S>(args, r, place++, int64_t(index) * kSize + i, x[i]);
        }
      });
  for (int64_t i = cut.count + Group::rank(); i < args.max_k; i += Group::size()) {
    write_unused<S>(args, r, i);
  }
  if (Group::rank() == 0) args.counts[r] = cut.count;
}

template <class S, class L>
__global__ void __launch_bounds__(L::block, L::resident(sizeof(S)))
    indices_kernel(const IndicesArgs args) {
  using Group = typename L::Group;
  using Row = typename L::template Row<S>;
  extern __shared__ uint4 row_memory[];
  __shared__ typename Group::Storage storage;

  const int64_t r = L::row(args.first_row);
  if (r >= args.x.rows) return;  // all threads of the group
  Group group(storage);
  const Source<S> source(args.x.data, r * args.x.stride, int32_t(args.x.n), args.wide_x,
                         !args.x.largest);
  const Row row(source, row_memory);
  indices_of_row<S>(args, r, row, group);
}

// The rows that hard_quick has left.
template <class S>
__global__ void __launch_bounds__(256, 4) indices_careful(const IndicesArgs args) {
  using Row = GlobalRow<S, Block<256>, 0>;
  __shared__ typename Block<256>::Storage storage;
  Block<256> group(storage);
  for (int64_t first = int64_t(blockIdx.x) * 32; first < args.x.rows;
       first += int64_t(gridDim.x) * 32) {
    const int64_t mine = first + int(threadIdx.x) % 32;
    uint32_t left = __ballot_sync(~0u, mine < args.x.rows && args.counts[mine] == kLeftCount);
    if (left != 0) __syncthreads();  // all have looked before one is done
    for (; left != 0; left &= left - 1) {
      const int64_t r = first + __ffs(int(left)) - 1;
      const Source<S> source(args.x.data, r * args.x.stride, int32_t(args.x.n), args.wide_x,
                             !args.x.largest);
      const Row row(source, nullptr);
      indices_of_row<S>(args, r, row, group);
    }
  }
}

}  // namespace

void hard_topk_mask(const Rows& x, const PerRow& k, void* mask, int device, void* stream) {
  check_length(x.n);
  const DeviceGuard guard(device);
  with_type(x.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    with_layout<1, true>(x.n, sizeof(S), device_at(device).shared_limit,
                         [&](auto layout, int64_t shared) {
                           using L = decltype(layout);
                           const MaskArgs args = {x,
                                                  k,
                                                  mask,
                                                  is_wide(x.data, x.rows, x.stride, sizeof(S)),
                                                  is_wide(mask, x.rows, x.n, sizeof(S)),
                                                  0};
                           launch<L>(mask_kernel<S, L>, args, x.rows, shared, stream);
                         });
  });
}

void hard_topk_indices(const Rows& x, const PerRow& k, int64_t max_k, int64_t* indices,
                       void* values, int64_t* counts, int device, void* stream) {
  check_length(x.n);
  const DeviceGuard guard(device);
  with_type(x.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const Device& gpu = device_at(device);
    IndicesArgs args = {
        x,         k, max_k, indices, values, counts, is_wide(x.data, x.rows, x.stride, sizeof(S)),
        gpu.fed(), 0, 0};
    if constexpr (sizeof(S) <= 4) {
      const Plan plan = plan_resident(x.n, sizeof(S), kQuick, gpu);
      args.room = plan.room - 4;  // the last words may be lost to alignment
      if (x.n * sizeof(S) > 256 * 16 && plan.blocks > 0 && max_k > 0) {
        with_sharing<S, 64, 128, 256>(plan, x.n, [&](auto sharing) {
          launch_resident(hard_quick<decltype(sharing)>, args, x.rows, plan, gpu, stream);
        });
        launch_resident(indices_careful<S>, args, (x.rows + 31) / 32, Plan{1, 256, 0, 0}, gpu,
                        stream);
        return;
      }
    }
    with_layout<1, sizeof(S) == 8>(x.n, sizeof(S), gpu.shared_limit,
                                   [&](auto layout, int64_t shared) {
                                     using L = decltype(layout);
                                     launch<L>(indices_kernel<S, L>, args, x.rows, shared, stream);
                                   });
  });
}

}  // namespace softtopk::cuda
