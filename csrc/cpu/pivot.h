// A solved row as the factors that the sweeps of a backward take.
#pragma once

#include <limits>

#include "../laplace.h"
#include "sweeps.h"

namespace softtopk::cpu {

// The least e for which unit * e is a normal number; infinity for 0.
template <typename T>
T least_e(T unit) {
  return std::numeric_limits<T>::min() / unit;
}

// The pivot is the last element above or the first below; its v is not known here.
template <typename T>
Pivot<T> pivot_of(const Solution<double>& s, const Densities<double>& d, T alpha) {
  const Steps<T> step = steps(alpha);
  return {static_cast<T>(d.q_A),
          static_cast<T>(d.q_B),
          least_e(static_cast<T>(d.q_A)),
          least_e(static_cast<T>(d.q_B)),
          static_cast<T>(d.h_A * step.rate),
          static_cast<T>(d.h_B * step.rate),
          step.after,
          static_cast<T>(d.q_A >= d.q_B ? s.r_A : s.r_B),
          T(0)};
}

}  // namespace softtopk::cpu
