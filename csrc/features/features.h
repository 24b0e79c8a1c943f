// The mathematics of the random features.
//
// A *row* is one token of one head. Of its projection p = W x, with x scaled, a row's features are taken; see
// fastrpe/ops/features/api.py for the formulas. Features tell their own derivative, so the backward reads them and
// neither projects nor exponentiates again.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../common/dtype.h"

namespace fastrpe {
namespace features {

enum class Kind { positive, hyperbolic, trigonometric, oprf, relu, exp, elu };
enum class Stabilizer { none, row, global };

FASTRPE_HD bool is_pair(Kind kind) {
  return kind == Kind::hyperbolic || kind == Kind::trigonometric;
}

// Whether |x|^2 / 2 is in the exponent.
FASTRPE_HD bool has_norm(Kind kind) {
  return is_pair(kind) || kind == Kind::positive || kind == Kind::oprf;
}

FASTRPE_HD bool is_exponential(Kind kind) {
  return kind != Kind::trigonometric && kind != Kind::relu && kind != Kind::elu;
}

// 1 / root of the number of features, and OPRF's factor.
inline double constant(Kind kind, int64_t M, int64_t D, double a) {
  const double c = 1 / std::sqrt(static_cast<double>(kind == Kind::hyperbolic ? 2 * M : M));
  if (kind == Kind::oprf) {
    return c * std::pow(1 - 4 * a, D / 4.0);
  }
  return has_norm(kind) ? c : 1.0;
}

// 2^n for n in [-126, 127].
FASTRPE_HD float power_of_two(int n) {
  const int bits = (n + 127) * (1 << 23);
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The nearest integer of |x| < 2^22, in arithmetic that every machine does in vectors.
FASTRPE_HD float nearest(float x) {
  return (x + 12582912.0f) - 12582912.0f;
}

// exp(x) / 2^n, for the whole n nearest to x / log 2.
FASTRPE_HD float exponential_over(float x, float n) {
  float r = std::fma(n, -0.693359375f, x);
  r = std::fma(n, 2.12194440e-4f, r);
  float p = std::fma(r, 1.9875691500e-4f, 1.3981999507e-3f);  // Cephes: (exp(r) - 1 - r) / r^2
  p = std::fma(r, p, 8.3334519073e-3f);
  p = std::fma(r, p, 4.1665795894e-2f);
  p = std::fma(r, p, 1.6666665459e-1f);
  p = std::fma(r, p, 5.0000001201e-1f);
  return std::fma(r * r, p, r) + 1.0f;
}

// exp within 1 ulp of float32, denormals included; infinities and NaN as std::exp.
FASTRPE_HD float exponential(float x) {
  x = x < -104.0f ? -104.0f : x;
  x = x > 89.0f ? 89.0f : x;
  const float n = nearest(x * 1.44269504f), p = exponential_over(x, n);
  const int whole = static_cast<int>(n), half = whole / 2;
  return p * power_of_two(half) * power_of_two(whole - half);
}

FASTRPE_HD double exponential(double x) {
  return std::exp(x);
}

// Cosine and sine, absolute error 1e-7 in float32 for |x| < 1e4.
FASTRPE_HD void cos_sin(float x, float& c, float& s) {
  const float n = nearest(x * 0.636619772f);  // quarter turns
  float r = std::fma(n, -1.57079637050628662f, x);
  r = std::fma(n, 4.37113900018624283e-8f, r);
  const float u = r * r;
  float p = std::fma(u, -1.9515295891e-4f, 8.3321608736e-3f);  // Cephes: (sin(r) - r) / r^3
  p = std::fma(u, p, -1.6666654611e-1f);
  p = std::fma(u * r, p, r);
  float q = std::fma(u, 2.443315711809948e-5f, -1.388731625493765e-3f);  // (cos(r) - 1 + r^2 / 2) / r^4
  q = std::fma(u, q, 4.166664568298827e-2f);
  q = std::fma(u * u, q, std::fma(u, -0.5f, 1.0f));
  const int turn = static_cast<int>(n);
  const float a = turn & 1 ? p : q, b = turn & 1 ? q : p;
  c = (turn + 1) & 2 ? -a : a;
  s = turn & 2 ? -b : b;
}

FASTRPE_HD void cos_sin(double x, double& c, double& s) {
  c = std::cos(x);
  s = std::sin(x);
}

// elu + 1.
template <typename A>
FASTRPE_HD A positive_elu(A p) {
  const A e = exponential(p < 0 ? p : A(0));
  return p > 0 ? p + 1 : e;
}

}  // namespace features
}  // namespace fastrpe
