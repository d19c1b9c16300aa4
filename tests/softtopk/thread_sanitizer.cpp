// Calls the CPU launchers from several threads at once, each with several threads of its own, and
// compares every bit with a call on one thread. Exit status 1 where one differs.
//
// Built without OpenMP by test_threads.py, with the sanitizers: what they see is then everything
// from the launchers down, on the threads that csrc/cpu/threads.cpp starts, as it does in a forked
// child. Not covered is GNU's OpenMP itself, which is not instrumented: its barriers would be
// reported as races.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "softtopk.h"

using namespace softtopk;

namespace {

using Bytes = std::vector<unsigned char>;

struct Case {
  Type type;
  int64_t rows, n;
  bool largest;
  Form form;
  Bytes x, v;  // rows are n + 3 elements apart
  std::vector<double> k;
  std::vector<float> alpha;
};

int64_t size_of(Type type) { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }

// The upper half of a float's bits is a bfloat16, and some finite float16 of either sign.
void put(Type type, double value, unsigned char* to) {
  const float narrow = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &narrow, 4);
  uint16_t half = static_cast<uint16_t>(bits >> 16);
  if (type == Type::float16 && std::isinf(value)) half = (half & 0x8000) | 0x7c00;
  if (type == Type::float64) std::memcpy(to, &value, 8);
  if (type == Type::float32) std::memcpy(to, &narrow, 4);
  if (type == Type::float16 || type == Type::bfloat16) std::memcpy(to, &half, 2);
}

// Rows of normal numbers; with special ones, the first eight rows are each unusual in their way.
Case make(Type type, int64_t rows, int64_t n, bool largest, bool special, Form form) {
  std::mt19937 random(static_cast<unsigned>(rows * n));
  std::normal_distribution<double> normal;
  Case c{type, rows, n, largest, form, {}, {}, {}, {}};
  const int64_t size = size_of(type), elements = (rows - 1) * (n + 3) + n;
  c.x.resize(elements * size), c.v.resize(elements * size);
  for (int64_t i = 0; i < elements; ++i) {
    put(type, normal(random), &c.x[i * size]);
    put(type, normal(random), &c.v[i * size]);
  }
  for (int64_t row = 0; row < rows; ++row) {
    c.k.push_back((0.5 + static_cast<double>(row)) / static_cast<double>(rows) * n);
    c.alpha.push_back(row % 3 == 0 ? 1.0f : row % 3 == 1 ? 1e-2f : 1e-4f);
  }
  if (!special) return c;
  const auto set = [&](int64_t row, int64_t from, double value) {
    for (int64_t i = from; i < n; ++i) put(type, value, &c.x[(row * (n + 3) + i) * size]);
  };
  set(0, n - 2, INFINITY), set(1, n / 2, -INFINITY), set(2, n - 1, NAN), set(3, 0, 0.25);
  c.k[4] = NAN, c.k[5] = 0, c.k[6] = n;
  c.alpha[7] = 1e-40f;
  return c;
}

template <typename T>
Bytes bytes(const std::vector<T>& from) {
  const auto* data = reinterpret_cast<const unsigned char*>(from.data());
  return Bytes(data, data + sizeof(T) * from.size());
}

// The outputs of the launchers of soft_topk and hard_topk, one after the other.
std::vector<Bytes> dense(const Case& c, int threads) {
  const int64_t computed = c.type == Type::float64 ? 8 : 4, max_k = 40;
  const Rows x{c.x.data(), c.type, c.rows, c.n, c.n + 3, c.largest};
  const PerRow k{c.k.data(), Type::float64, 1, 0}, alpha{c.alpha.data(), Type::float32, 1, 0};
  const size_t all = c.rows * c.n * size_of(c.type), one = c.rows * computed;
  Bytes p(all), solution(5 * one), grad_x(all), grad_k(one), grad_alpha(one), mask(all);
  Bytes values(c.rows * max_k * size_of(c.type));
  std::vector<int64_t> indices(c.rows * max_k), counts(c.rows);
  cpu::soft_topk_forward(x, k, alpha, Form::none, nullptr, solution.data(), threads);
  cpu::soft_topk_forward(x, k, alpha, c.form, p.data(), solution.data(), threads);
  cpu::soft_topk_backward(x, solution.data(), alpha, c.form, c.v.data(), c.n + 3, grad_x.data(),
                          grad_k.data(), grad_alpha.data(), threads);
  cpu::hard_topk_mask(x, k, mask.data(), threads);
  cpu::hard_topk_indices(x, k, max_k, indices.data(), values.data(), counts.data(), threads);
  return {p, solution, grad_x, grad_k, grad_alpha, mask, bytes(indices), values, bytes(counts)};
}

// Those of the launchers of sparse codes. v serves as the bias and the decoder, x as what latents
// gather from its rows.
void add_sparse(const Case& c, Selecting mode, int threads, std::vector<Bytes>& out) {
  const int64_t computed = c.type == Type::float64 ? 8 : 4, C = 40, n = c.n;
  const int64_t d = std::min<int64_t>(c.rows, 7), places = c.rows * C, one = c.rows * computed;
  const Rows z{c.x.data(), c.type, c.rows, n, n + 3, true};
  const PerRow k{c.k.data(), Type::float64, 1, 0}, alpha{c.alpha.data(), Type::float32, 1, 0};
  const std::vector<float> thresholds(n, 0.125f);
  const Activation activation{c.v.data(), c.largest ? thresholds.data() : nullptr, 0.0};
  const bool hard = mode == Selecting::hard;
  Bytes values(C * one), active(C * one), state(7 * one), grad(C * one), grad_k(one),
      grad_alpha(one);
  std::vector<int32_t> indices(places), counts(c.rows), offsets(n + 1), entries(places);
  const Code code{values.data(),
                  indices.data(),
                  active.data(),
                  counts.data(),
                  hard ? nullptr : state.data(),
                  C};
  cpu::code_forward(z, k, alpha, activation, mode, code, nullptr, threads);
  if (!hard)
    cpu::code_backward(computed == 8 ? Type::float64 : Type::float32, c.rows, C, active.data(),
                       mode == Selecting::soft ? nullptr : values.data(), counts.data(),
                       state.data(), alpha, values.data(), 0.5, grad.data(), grad_k.data(),
                       grad_alpha.data(), threads);
  Bytes space(cpu::transpose_workspace(c.rows, C, n));
  cpu::transpose(indices.data(), counts.data(), c.rows, C, n, offsets.data(), entries.data(),
                 space.data(), threads);
  Bytes decoded(c.rows * d * size_of(c.type)), rows(n * d * size_of(c.type)), dots(C * one);
  Bytes sums(n * computed), squares(n * computed);
  cpu::decode(values.data(), indices.data(), counts.data(), c.rows, C, c.v.data(), c.type, n, d,
              c.x.data(), decoded.data(), threads);
  space.resize(cpu::gradients_workspace(c.type, c.rows, C, n, d, true, true));
  cpu::latent_gradients(values.data(), indices.data(), offsets.data(), entries.data(), c.rows, C, n,
                        d, c.x.data(), c.v.data(), c.type, c.type, c.largest, true, rows.data(),
                        dots.data(), sums.data(), squares.data(), space.data(), threads);
  for (Bytes* result : {&values, &active, &state, &grad, &grad_k, &grad_alpha, &decoded, &rows,
                        &dots, &sums, &squares})
    out.push_back(std::move(*result));
  for (const auto& result : {indices, counts, offsets, entries}) out.push_back(bytes(result));
}

std::vector<Bytes> everything(const Case& c, int threads) {
  std::vector<Bytes> out = dense(c, threads);
  for (const Selecting mode : {Selecting::soft, Selecting::straight_through, Selecting::hard})
    add_sparse(c, mode, threads, out);
  return out;
}

}  // namespace

// With an argument two types only, one of each type that sums are in: threads share rows alike for
// all.
int main(int arguments, char**) {
  std::vector<Type> types{Type::float64, Type::bfloat16};
  if (arguments == 1) types.insert(types.end(), {Type::float32, Type::float16});
  std::vector<Case> cases;
  for (const Type type : types) {
    // Elements for three threads: they are started where each gets 65536.
    cases.push_back(make(type, 80, 2500, true, false, Form::p));
    cases.push_back(make(type, 17, 12011, false, true, Form::log));  // a row per chunk
    cases.push_back(
        make(type, 2000, 100, true, true, Form::log_complement));  // many rows per chunk
    // Long enough for four threads within a row; two such rows are taken in turn by four.
    cases.push_back(make(type, 2, 140001, true, false, Form::p));
    cases.push_back(make(type, 1, 270003, false, false, Form::log));
    cases.push_back(make(type, 12, 11, true, true, Form::p));  // too small for threads
  }
  constexpr int callers = 3;
  // First, so that the first calls of the process come from several threads too.
  std::vector<std::vector<Bytes>> got[callers];
  std::vector<std::thread> threads;
  for (int caller = 0; caller < callers; ++caller)
    threads.emplace_back([&, caller] {
      for (const Case& c : cases) got[caller].push_back(everything(c, 2 + caller));
    });
  for (std::thread& thread : threads) thread.join();
  int different = 0;
  for (size_t i = 0; i < cases.size(); ++i) {
    const std::vector<Bytes> want = everything(cases[i], 1);
    for (const auto& results : got) different += results[i] != want;
  }
  std::printf("%d of %zu results differ\n", different, callers * cases.size());
  return different != 0;
}
