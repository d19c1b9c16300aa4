// Forward: p (rows, n) and the solution (rows, 5) = r_A, r_B, P, Q, D of every row of x.
//
//   p_i = 1 - (H_A / P) exp(-(x_i - r_A) / alpha)   for x_i >= r_A
//   p_i =     (H_B / Q) exp( (x_i - r_B) / alpha)   below
//
// In the place of p, log p or log(1 - p) (log_domain.cuh), or nothing.
// Bytes: x is read once and p written once where a row fits in registers or shared memory; a row
// longer than that is read again on each of the search's sweeps (about 8).
// Layout: a warp or a block to a row (row.cuh). All of its threads run the search (threshold.cuh)
// in step on the same numbers, then each writes the p of the elements it holds.
#include "launch.cuh"
#include "log_domain.cuh"
#include "row.cuh"
#include "threshold.cuh"

namespace softtopk::cuda {
namespace {

struct ForwardArgs {
  Rows x;
  PerRow k, alpha;
  Form form;
  void* out;
  void* solution;
  bool wide_x, wide_out;
  int64_t first_row;
};

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

  if (Group::rank() == 0) {
    T* out = static_cast<T*>(args.solution) + 5 * r;
    out[0] = s.r_A, out[1] = s.r_B, out[2] = s.P, out[3] = s.Q, out[4] = s.D;
  }
  if (args.form == Form::none) return;
  const Sink<S> sink(args.out, r * n, n, args.wide_out);
  if (args.form != Form::p) {
    const LogOutput<T> output(s, alpha, args.form == Form::log_complement);
    row.for_each([&](int32_t item) {
      T x[Chunk<S>::size];
      row.chunk(item).read(x);
#pragma unroll
      for (T& value : x) value = output(value);
      sink.store(chunk_index<Group>(item), Chunk<S>::of(x));
    });
    return;
  }
  const Densities<T> factors = densities(s, alpha);
  const Tails<T> tails(s.r_A, s.r_B, alpha);
  row.for_each([&](int32_t item) {
    T x[Chunk<S>::size];
    row.chunk(item).read(x);
#pragma unroll
    for (T& value : x) {
      const T e = tails(value);
      value = tails.above(value) ? 1 - factors.h_A * e : factors.h_B * e;
    }
    sink.store(chunk_index<Group>(item), Chunk<S>::of(x));
  });
}

}  // namespace

void soft_topk_forward(const Rows& x, const PerRow& k, const PerRow& alpha, Form form, void* out,
                       void* solution, int device, void* stream) {
  check_length(x.n);
  const DeviceGuard guard(device);
  with_type(x.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    with_layout<1>(x.n, sizeof(S), shared_memory_limit(device), [&](auto layout, int64_t shared) {
      using L = decltype(layout);
      const ForwardArgs args = {x,
                                k,
                                alpha,
                                form,
                                out,
                                solution,
                                is_wide(x.data, x.rows, x.stride, sizeof(S)),
                                is_wide(out, x.rows, x.n, sizeof(S)),
                                0};
      launch<L>(forward_kernel<S, L>, args, x.rows, shared, stream);
    });
  });
}

}  // namespace softtopk::cuda
