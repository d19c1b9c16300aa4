// Forward: p (rows, n) and the solution (rows, 5) = r_A, r_B, P, Q, D of every row of x.
//
//   p_i = 1 - (H_A / P) exp(-(x_i - r_A) / alpha)   for x_i >= r_A
//   p_i =     (H_B / Q) exp( (x_i - r_B) / alpha)   below
//
// In the place of p, log p or log(1 - p) (log_domain.cuh), or nothing.
// Bytes: x is read once and p written once where a row fits on chip; a longer one is read again on
// each of the search's sweeps (about 8), and the log domain reads x twice.
// Layout: rows of up to 256 chunks are a warp's, in registers; those that fit on chip a block's or
// a cluster's (quick_forward.cuh); the rest, and float64, a block's.
#include "log_domain.cuh"
#include "quick_forward.cuh"
#include "resident_launch.cuh"

namespace softtopk::cuda {

// In careful_forward.cu.
template <class S>
void launch_careful(ForwardArgs args, const Plan& plan, const Device& device, void* stream);

namespace {

// Room for 400 candidates lets twelve rows of 1024 chunks onto a multiprocessor, for 512 eleven.
// Where a block has more than 2048 chunks, k up to kMostBudget leaves about 2000 candidates.
constexpr Demand quick_demand(int64_t bytes) {
  return {1, kAnyPart, 3, {32, 32, 128}, {400, 400, bytes > 2048 * 16 ? 2048 : 1024}, 2304};
}
// The candidates of a large k are a share of the elements: of 16-bit ones a part has at most 25600.
constexpr Demand careful_demand(int64_t size) {
  const int64_t part = size == 2 ? 51200 : kAnyPart;
  const int room = size == 2 ? 2304 : 1024;
  return {1, part, 3, {64, 64, 128}, {1024, room, 2304}, 2176};
}

template <class S, class L>
__global__ void __launch_bounds__(L::block, L::resident(sizeof(S)))
    forward_kernel(const ForwardArgs args) {
  using T = Compute<S>;
  using Group = typename L::Group;
  using Row = typename L::template Row<S>;
  extern __shared__ uint4 row_memory[];
  __shared__ typename Group::Storage storage;

  const int64_t r = L::row(args.first_row);
  const int32_t n = int32_t(args.x.n);
  if (r >= args.x.rows) return;  // all threads of the group
  Group group(storage);
  const Source<S> source(args.x.data, r * args.x.stride, n, args.wide_x, !args.x.largest);
  const Row row(source, row_memory);
  const T alpha = scale_in<T>(per_row(args.alpha, r));
  Sweeper<S, Row, Group> sweeper(row, group);
  const Solution<T> s = solve(sweeper, per_row(args.k, r), alpha);
  if (Group::rank() == 0) write_solution(args, r, s);
  if (args.form == Form::none) return;
  const Sink<S> sink(args.out, r * n, n, args.wide_out);
  const Densities<T> factors = densities(s, alpha);
  const Tails<T> tails(s.r_A, s.r_B, alpha);
  row.for_each([&](int32_t item) {
    T x[Chunk<S>::size];
    row.chunk(item).read(x);
    to_probabilities(x, tails, factors.h_A, factors.h_B);
    sink.store(chunk_index<Group>(item), Chunk<S>::of(x));
  });
}

// log p or log(1 - p) from x and the solution.
template <class S, class L>
__global__ void __launch_bounds__(L::block, L::resident(sizeof(S)))
    log_kernel(const ForwardArgs args) {
  using T = Compute<S>;
  using Group = typename L::Group;
  const int64_t r = L::row(args.first_row);
  const int32_t n = int32_t(args.x.n);
  if (r >= args.x.rows) return;
  const Source<S> source(args.x.data, r * args.x.stride, n, args.wide_x, !args.x.largest);
  const Sink<S> sink(args.out, r * n, n, args.wide_out);
  const T* solution = static_cast<const T*>(args.solution) + 5 * r;
  const Solution<T> s = {solution[0], solution[1], solution[2], solution[3], solution[4]};
  const LogOutput<T> output(s, scale_in<T>(per_row(args.alpha, r)),
                            args.form == Form::log_complement);
  for (int32_t i = Group::rank(); i < source.chunks(); i += Group::size()) {
    T x[Chunk<S>::size];
    source.load(i).read(x);
#pragma unroll
    for (T& value : x) value = output(value);
    sink.store(i, Chunk<S>::of(x));
  }
}

template <class S>
void forward(ForwardArgs args, const Device& device, void* stream) {
  const Rows& x = args.x;
  if constexpr (sizeof(S) <= 4) {
    const bool longer = x.n * sizeof(S) > 256 * 16;
    const Plan quick =
        longer ? plan_resident(x.n, sizeof(S), quick_demand(x.n * sizeof(S)), device) : Plan();
    const Plan careful =
        longer ? plan_resident(x.n, sizeof(S), careful_demand(sizeof(S)), device) : Plan();
    if (quick.blocks > 0 && careful.blocks > 0) {
      constexpr int kHalves = sizeof(S) / 2;
      uint16_t* const solution = static_cast<uint16_t*>(args.solution);
      const bool in_solution = solution != nullptr;
      args.marks = in_solution ? solution + 9 : static_cast<uint16_t*>(args.out) + kHalves - 1;
      args.mark_stride = in_solution ? 10 : x.n * kHalves;
      args.fed = device.fed();
      args.room = quick.room;
      with_sharing<S, 32, 128, 256>(quick, x.n, [&](auto sharing) {
        launch_resident(forward_quick<decltype(sharing)>, args, x.rows, quick, device, stream);
      });
      return launch_careful<S>(args, careful, device, stream);
    }
  }
  with_layout<1, sizeof(S) == 8>(x.n, sizeof(S), device.shared_limit,
                                 [&](auto layout, int64_t shared) {
                                   using L = decltype(layout);
                                   launch<L>(forward_kernel<S, L>, args, x.rows, shared, stream);
                                 });
}

}  // namespace

void soft_topk_forward(const Rows& x, const PerRow& k, const PerRow& alpha, Form form, void* out,
                       void* solution, int device, void* stream) {
  check_length(x.n);
  const DeviceGuard guard(device);
  with_type(x.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    ForwardArgs args = {x,
                        k,
                        alpha,
                        form == Form::p ? Form::p : Form::none,
                        out,
                        solution,
                        nullptr,
                        0,
                        is_wide(x.data, x.rows, x.stride, sizeof(S)),
                        is_wide(out, x.rows, x.n, sizeof(S)),
                        false,
                        0,
                        0};
    forward<S>(args, device_at(device), stream);
    if (form == Form::p || form == Form::none) return;
    args.form = form;
    using L = Layout<Block<256>, GlobalRow, 0>;
    launch<L>(log_kernel<S, L>, args, x.rows, 0, stream);
  });
}

}  // namespace softtopk::cuda
