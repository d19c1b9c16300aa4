// Elements in the log domain; softtopk/backends/reference.py has the mathematics and what the minor
// and the major side are.
#pragma once

#include "threshold.cuh"

namespace softtopk::cuda {

template <class T>
SOFTTOPK_DEVICE Solution<double> widened(const Solution<T>& s) {
  return {double(s.r_A), double(s.r_B), double(s.P), double(s.Q), double(s.D)};
}

// log p or, with `complement`, log(1 - p) of an element.
template <class T>
class LogOutput {
 public:
  SOFTTOPK_DEVICE LogOutput(const Solution<T>& s, T alpha, bool complement)
      : tails_(s.r_A, s.r_B, alpha), steps_(steps(alpha)), complement_(complement) {
    const LogDensities d = log_densities(widened(s), double(alpha));
    log_h_ = T(complement ? d.log_h_A : d.log_h_B);
    h_ = T(std::exp(complement ? d.log_h_B : d.log_h_A));
    at_A_ = std::abs(s.r_A) < infinity<T> ? s.r_A * steps_.before : T(0);
    at_B_ = std::abs(s.r_B) < infinity<T> ? s.r_B * steps_.before : T(0);
  }
  SOFTTOPK_DEVICE T operator()(T x) const {
    const bool above = tails_.above(x);
    if (above != complement_) return std::log1p(-h_ * tails_(x));
    const T t = std::fma(x, steps_.before, -(above ? at_A_ : at_B_)) * steps_.rate;
    return std::fma(-std::abs(t), T(0x1p64), log_h_);
  }

 private:
  Tails<T> tails_;
  Steps<T> steps_;
  T log_h_, h_;  // of the minor side, of the major side, at the references
  T at_A_, at_B_;
  bool complement_;
};

}  // namespace softtopk::cuda
