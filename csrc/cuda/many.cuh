// The search among the candidates of a window closed on both sides, or in a whole row, by a warp, a
// block or a cluster: that of few.cuh, with what lies above the window as one sum too.
#pragma once

#include "cluster.cuh"
#include "few.cuh"
#include "resident.cuh"

namespace softtopk::cuda {

// What lies outside of a window, and how many candidates lie inside. L or U is an element where T
// or P is not 0, and else below or above all finite ones.
struct Outside {
  float L, U;
  int32_t candidates, above;  // L < x < U, x >= U
  float T, P;                 // sums of e^((x - L) / alpha), e^((U - x) / alpha) outside
};

// 1 or 0 by one instruction, to add and multiply with.
__device__ __forceinline__ float one_if_not_less(float x, float y) {
  float one;
  asm("set.ge.f32.f32 %0, %1, %2;" : "=f"(one) : "f"(x), "f"(y));
  return one;
}

// From c on counts x and adds e to P, below it to Q; `up` and `down` become the elements next to c.
// As predicated instructions: what the compiler makes of an if is more.
__device__ __forceinline__ void add_to_side(float x, float c, float e, float& P, float& Q,
                                            float& count, float& up, float& down) {
  asm("{\n"
      ".reg .pred above;\n"
      "setp.ge.f32 above, %5, %6;\n"
      "@above add.f32 %0, %0, %7;\n"
      "@!above add.f32 %1, %1, %7;\n"
      "@above add.f32 %2, %2, 0f3f800000;\n"
      "@above min.f32 %3, %3, %5;\n"
      "@!above max.f32 %4, %4, %5;\n"
      "}"
      : "+f"(P), "+f"(Q), "+f"(count), "+f"(up), "+f"(down)
      : "f"(x), "f"(c), "f"(e));
}

// A question about all that is searched.
enum class Ask : int32_t { nothing, counts, split, sums, ends };
struct Question {
  Ask ask;
  float c[3];
};
// Its answer: of counts how many reach each c; of split (at c[0]) how many do, the keys of the
// least that does and the greatest that does not, and the sums relative to c[0]; of sums those
// relative to c[1] on side A, to c[2] on side B; of ends the keys of the extremes of the finite
// ones.
struct Answer {
  uint32_t words[3];
  float P, Q;
};

// Over the lanes of a warp, of which those from `active` on hold what lower ones hold.
__device__ __forceinline__ Answer over_lanes(Ask ask, Answer a, int active = 32) {
  const bool counts = int(threadIdx.x) % 32 < active;
  if (ask == Ask::counts) {
#pragma unroll
    for (uint32_t& word : a.words) word = __reduce_add_sync(~0u, counts ? word : 0);
    return a;
  }
  if (ask != Ask::sums) {
    a.words[0] = __reduce_add_sync(~0u, counts ? a.words[0] : 0);
    a.words[1] = __reduce_min_sync(~0u, a.words[1]);
    a.words[2] = __reduce_max_sync(~0u, a.words[2]);
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const float P = __shfl_xor_sync(~0u, a.P, mask), Q = __shfl_xor_sync(~0u, a.Q, mask);
    if (mask < active) a.P += P, a.Q += Q;
  }
  return a;
}

// A thread's part of the answer.
template <class Team, class Values>
__device__ __forceinline__ Answer answer_of_thread(const Question& q, const Values& values,
                                                   float rate) {
  Answer a = {{0, ~0u, 0}, 0, 0};
  if (q.ask == Ask::counts) {
    float count[3] = {0, 0, 0};
    values.template for_each<Team>([&](float x) {
#pragma unroll
      for (int i = 0; i < 3; ++i) count[i] += one_if_not_less(x, q.c[i]);
    });
#pragma unroll
    for (int i = 0; i < 3; ++i) a.words[i] = uint32_t(count[i]);
  } else if (q.ask == Ask::split) {
    const float c = q.c[0];
    float count = 0, up = infinity<float>, down = -infinity<float>;
    values.template for_each<Team>([&](float x) {
      add_to_side(x, c, faster_exp2(-fabsf(x - c) * rate), a.P, a.Q, count, up, down);
    });
    a.words[0] = uint32_t(count);
    a.words[1] = key_of(up);
    a.words[2] = key_of(down);
  } else if (q.ask == Ask::sums) {
    values.template for_each<Team>([&](float x) {
      const bool above = x >= q.c[0];
      const float e = faster_exp2(-fabsf(x - (above ? q.c[1] : q.c[2])) * rate);
      a.P += above ? e : 0.0f;
      a.Q += above ? 0.0f : e;
    });
  } else {
    float min = infinity<float>, max = -infinity<float>;
    values.template for_each<Team>([&](float x) {
      if (x > -infinity<float>) min = fminf(min, x);
      if (x < infinity<float>) max = fmaxf(max, x);
    });
    a.words[1] = key_of(min);
    a.words[2] = key_of(max);
  }
  return a;
}

// One warp that searches alone. A team's rank() of size threads each hold some of what is searched.
struct OneWarp {
  static constexpr int size = 32;
  __device__ static int rank() { return int(threadIdx.x) % 32; }
  template <class Values>
  __device__ __forceinline__ Answer ask(const Question& q, const Values& values, float rate) {
    return over_lanes(q.ask, answer_of_thread<OneWarp>(q, values, rate));
  }
};

// All warps of the blocks of C. The first of each block leads: it asks, and the others answer until
// nothing is asked any more. The leaders of a cluster hear the same answers and so ask the same.
template <class C, int WARPS>
class AllWarps {
 public:
  struct Storage {
    Question question;
    Answer of_warps[WARPS];
  };
  // What lives as long as the kernel.
  struct Mail {
    uint64_t mailboxes[2];
    Answer of_blocks[2][C::many ? kMostBlocks : 1];  // of two rounds: a block may be ahead by one
  };
  static constexpr int size = 32 * WARPS;

  __device__ __forceinline__ explicit AllWarps(Mail& mail)
      : mail_(mail), boxes_{Mailbox<>(&mail.mailboxes[0]), Mailbox<>(&mail.mailboxes[1])} {}
  __device__ static int rank() { return int(threadIdx.x); }

  // By the leading warp.
  template <class Values>
  __device__ __forceinline__ Answer ask(Storage& storage, const Question& q, const Values& values,
                                        float rate) {
    const int lane = rank() % 32;
    if (lane == 0) storage.question = q;
    __syncthreads();
    const Answer mine = over_lanes(q.ask, answer_of_thread<AllWarps>(q, values, rate));
    if (lane == 0) storage.of_warps[0] = mine;
    __syncthreads();
    Answer all = over_lanes(q.ask, storage.of_warps[lane % WARPS], WARPS);
    if constexpr (C::many) {
      Answer* of_blocks = mail_.of_blocks[parity_];
      const uint32_t bytes = C::size() * sizeof(Answer);
      if (parity_ == 0) {
        if (lane < C::size()) boxes_[0].send(&of_blocks[C::rank()], lane, all);
        boxes_[0].receive(bytes);
      } else {
        if (lane < C::size()) boxes_[1].send(&of_blocks[C::rank()], lane, all);
        boxes_[1].receive(bytes);
      }
      parity_ ^= 1;
      all = over_lanes(q.ask, of_blocks[lane & (C::size() - 1)], C::size());
    }
    return all;
  }
  __device__ __forceinline__ void dismiss(Storage& storage) {
    if (rank() % 32 == 0) storage.question.ask = Ask::nothing;
    __syncthreads();
  }
  // By the other warps, until they are dismissed.
  template <class Values>
  __device__ __forceinline__ void answer(Storage& storage, const Values& values, float rate) {
#pragma unroll 1
    for (;;) {
      __syncthreads();
      const Question q = storage.question;
      if (q.ask == Ask::nothing) break;
      const Answer mine = over_lanes(q.ask, answer_of_thread<AllWarps>(q, values, rate));
      if (rank() % 32 == 0) storage.of_warps[rank() / 32] = mine;
      __syncthreads();
    }
  }

 private:
  Mail& mail_;
  Mailbox<> boxes_[2];
  int parity_ = 0;
};

// A team that has its storage for one search.
template <class Team>
struct Lead {
  static constexpr int size = Team::size;
  Team& team;
  typename Team::Storage& storage;
  template <class Values>
  __device__ __forceinline__ Answer ask(const Question& q, const Values& values, float rate) {
    return team.ask(storage, q, values, rate);
  }
};

// What is searched: `count` candidates in a block's shared memory, or a block's part of a row.
struct Candidates {
  const float* values;
  int32_t count;
  template <class Team, class F>
  __device__ __forceinline__ void for_each(F f) const {
#pragma unroll 4
    for (int32_t i = Team::rank(); i < count; i += Team::size) f(values[i]);
  }
};
template <class H>
struct WholeRow {
  const ResidentRow<H>& row;
  template <class Team, class F>
  __device__ __forceinline__ void for_each(F f) const {
    row.template for_each<1>([&](int item) {
      float x[Chunk<typename H::S>::size];
      row.read(item, x);
#pragma unroll
      for (float value : x) f(value);
    });
  }
};

// GRAIN: by how much the keys of neighbouring values differ.
template <uint32_t GRAIN, class Team, class Values>
class ManySearch {
 public:
  __device__ __forceinline__ ManySearch(const Values& values, const Outside& rest, const Budget& k,
                                        float alpha, float rate, Team team)
      : values_(values), rest_(rest), k_(k), alpha_(alpha), rate_(rate), team_(team) {}

  // The solution is right if `right` is not 0. `near` is a window that is likely to hold it.
  __device__ __forceinline__ Solution<float> solve(const Outside& near, int32_t& right) {
    const bool has_L = rest_.T > 0, has_U = rest_.P > 0;
    float lo = rest_.L, hi = infinity<float>;  // lo is in B, hi, an element, in A
    float top = rest_.U;                       // no finite element is greater
    if (!has_L || !has_U) {
      const Answer ends = team_.ask({Ask::ends, {0, 0, 0}}, values_, rate_);
      const float min = value_of(ends.words[1]);
      const bool any = min < infinity<float>;
      if (!has_U) top = any ? value_of(ends.words[2]) : lo;
      if (!has_L) lo = value_of(key_of((any ? min : top) + 0.0f) - 1);
    }
    const float least = lo, most = has_U ? rest_.U : infinity<float>;
    float c = (top - lo) * rate_ >= 8 ? by_count(lo, top, near)
              : has_L && has_U        ? lo + (top - lo) / 2
                                      : next_up(lo);
    Solution<float> s;
    right = 0;
#pragma unroll 1
    for (int round = 0; round < 24; ++round) {
      c = fminf(fmaxf(c, next_up(least)), most);
      s.D = k_.excess(split(c, s));
      const float gap = faster_exp2((s.r_B - s.r_A) * rate_);
      const float at_A = s.D - s.P / 2 + s.Q * gap / 2, at_B = s.D - s.P * gap / 2 + s.Q / 2;
      const float unsure_A = 2 * epsilon<float> * (s.P + s.Q * gap),
                  unsure_B = 2 * epsilon<float> * (s.P * gap + s.Q);
      const bool raise = s.r_A < fminf(hi, most) && at_A > unsure_A;
      const bool lower = s.r_B > lo && at_B < -unsure_B;
      if (!raise && !lower) {
        right = at_A <= 2 * unsure_A && at_B >= -2 * unsure_B;
        break;
      }
      // The root if no other element lay between; it is never passed.
      const float R = quick_hypot(fabsf(s.D), quick_sqrt(s.P) * quick_sqrt(s.Q) * quick_sqrt(gap));
      if (raise) {
        lo = s.r_A;
        c = fmaxf(lo + alpha_ * __logf(__fdividef(R + s.D, s.P)), next_up(lo));
      } else {
        hi = s.r_B;
        c = fminf(hi - alpha_ * __logf(__fdividef(R - s.D, s.Q)), hi);
      }
      if (round % 4 == 3 || !(c > lo && c <= hi)) c = lo + (fminf(hi, top) - lo) / 2;
      if (!(c > lo)) c = next_up(lo);
    }
    return s;
  }

 private:
  __device__ static float next_up(float x) { return value_of(key_of(x + 0.0f) + 1); }

  // A value in (lo, hi] with about k elements at or above it, or one within alpha of such a value.
  __device__ __forceinline__ float by_count(float lo, float hi, const Outside& near) {
    const float first = next_up(lo), wanted = fmaxf(k_.whole + k_.rest, 0.5f);
    float at_lo = rest_.candidates + rest_.above + 1, at_hi = rest_.above;
    const float near_lo = near.candidates + near.above;
    if (near_lo >= wanted) lo = fmaxf(lo, near.L), at_lo = fminf(at_lo, near_lo + 1);
    if (near.above < wanted) hi = fminf(hi, near.U), at_hi = fmaxf(at_hi, near.above);
    at_hi = fmaxf(at_hi, 0.5f);
#pragma unroll 1
    for (int round = 0; round < 16 && at_lo >= wanted + 1 && (hi - lo) * rate_ > 0.5f; ++round) {
      // The number above falls about exponentially: three trials near where it should be k, apart
      // by twice the deviation there. Where it does not, three that quarter the bit patterns.
      const float per_span = __fdividef(1, __logf(__fdividef(at_lo, at_hi))),
                  share = __logf(__fdividef(at_lo, wanted)) * per_span;
      const float between =
          fmaxf(__fdividef((at_lo - wanted) * (wanted - at_hi), at_lo - at_hi), 0);
      const float deviation = __fdividef(quick_sqrt(between), wanted) * per_span,
                  aside = fminf(2 * deviation + (round == 0 ? 0.04f : 1e-3f), 0.25f);
      const uint32_t low = key_of(lo), quarter = (key_of(hi) - low) / 4;
      Question q = {Ask::counts, {0, 0, 0}};
      float (&trial)[3] = q.c;
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        const float near = lo + (hi - lo) * (share + float(i - 1) * aside);
        trial[i] = round % 3 == 2 ? value_of(low + (i + 1) * quarter + 1)
                                  : fminf(fmaxf(near, next_up(lo)), hi);
      }
      const Answer reached = team_.ask(q, values_, rate_);
      const float open = at_lo - at_hi;
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        const float count = int32_t(reached.words[i]) + rest_.above;
        if (count >= wanted) {
          if (trial[i] > lo) lo = trial[i], at_lo = count;
        } else if (trial[i] < hi) {
          hi = trial[i];
          at_hi = fmaxf(count, 0.5f);
        }
      }
      // At most one value is left, perhaps many times, or so it seems.
      if (key_of(hi) - key_of(lo) <= GRAIN) break;
      if (round % 3 == 2 && round > 6 && at_lo - at_hi == open) break;
    }
    return fmaxf(lo, first);
  }
  // The split at c and its sums; returns how many elements are >= c.
  __device__ __forceinline__ int32_t split(float c, Solution<float>& s) {
    const bool has_L = rest_.T > 0, has_U = rest_.P > 0;
    const Answer sides = team_.ask({Ask::split, {c, 0, 0}}, values_, rate_);
    const uint32_t up = min(sides.words[1], key_of(has_U ? rest_.U : infinity<float>)),
                   down = max(sides.words[2], key_of(has_L ? rest_.L : -infinity<float>));
    s.r_A = value_of(up) + 0.0f;  // -0 becomes +0
    s.r_B = value_of(down) + 0.0f;
    // Relative to c the sums are as exact, unless c lies far from the elements next to it.
    const float at_A = s.r_A < infinity<float> ? s.r_A : c,
                at_B = s.r_B > -infinity<float> ? s.r_B : c;
    const float to_A = (at_A - c) * rate_, to_B = (c - at_B) * rate_;
    if (to_A > 4 || to_B > 4) {
      const Answer again = team_.ask({Ask::sums, {c, at_A, at_B}}, values_, rate_);
      s.P = again.P;
      s.Q = again.Q;
    } else {
      s.P = sides.P * faster_exp2(to_A);
      s.Q = sides.Q * faster_exp2(to_B);
    }
    if (has_U) s.P += rest_.P * faster_exp2((at_A - rest_.U) * rate_);
    if (has_L) s.Q += rest_.T * faster_exp2((rest_.L - at_B) * rate_);
    return int32_t(sides.words[0]) + rest_.above;
  }

  Values values_;
  Outside rest_;
  Budget k_;
  float alpha_, rate_;
  Team team_;
};

}  // namespace softtopk::cuda
