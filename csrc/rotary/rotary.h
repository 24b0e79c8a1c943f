// The mathematics of the rotary family, shared by the CPU and CUDA kernels.
//
// Work is laid out the same way on both. A *set* is one set of frequencies with the heads it serves (all heads when
// they share them, otherwise one key head and its group of query heads). A *row* is one token that has its own phase: a
// position of one sequence, or of every sequence when the batch shares its positions. An *item* is one vector that a
// row's phase rotates: (sequence, head). Phases are computed once per row and set and used for all its items.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/dtype.h"

namespace fastrpe {
namespace rotary {

constexpr int max_coords = 4;

// Sizes; see fastrpe/ops/rotary/api.py for the symbols.
struct Shape {
  int64_t B, L, prefix;
  int H, Hk, D, C, R;
  int sets;              // sets of frequencies
  bool batch_positions;  // positions (B, L - prefix, C) rather than (L - prefix, C)

  FASTRPE_HD int64_t tokens() const {
    return L - prefix;
  }
  // Rows cover the prefix too, which is copied.
  FASTRPE_HD int64_t rows() const {
    return (batch_positions ? B : 1) * L;
  }
  FASTRPE_HD int query_heads() const {
    return H / sets;
  }
  FASTRPE_HD int heads() const {
    return (H + Hk) / sets;
  }
  FASTRPE_HD int64_t items() const {
    return (batch_positions ? 1 : B) * heads();
  }
};

// One of q, k and their gradients: (B, H, L, D) with any strides.
struct Strides {
  int64_t b, h, l, d;
};

template <typename T>
struct View {
  T* data;
  Strides stride;

  FASTRPE_HD T* at(int64_t b, int64_t h, int64_t l) const {
    return data + b * stride.b + h * stride.h + l * stride.l;
  }
};

// omega / (2 pi) as an unevaluated sum, so that the phase of a position of 1e6 keeps its fraction.
template <typename T>
struct Turns {
  T hi, lo;
};

template <typename T>
FASTRPE_HD Turns<T> turns(T omega) {
  // 1 / (2 pi) to twice the precision of T
  constexpr T hi = T(0.15915494309189535);
  constexpr T lo = sizeof(T) == 8 ? T(-9.839338337591243e-18) : T(6.4206382e-09);
  const T w = omega * hi;
  return {w, std::fma(omega, lo, std::fma(omega, hi, -w))};
}

// A phase in turns, as a reduced part in [-1/2, 1/2] and a small remainder.
template <typename T>
struct Phase {
  T turn, rest;
};

// The nearest integer. On a GPU by two additions at full rate; beyond 2^22 those leave a small whole number behind,
// which a phase may keep.
FASTRPE_HD float nearest(float x) {
#ifdef __CUDA_ARCH__
  return (x + 12582912.0f) - 12582912.0f;
#else
  return std::rint(x);
#endif
}

FASTRPE_HD double nearest(double x) {
  return std::rint(x);
}

template <typename T>
FASTRPE_HD Phase<T> product(T position, Turns<T> w) {
  const T p = position * w.hi;
  return {p - nearest(p), std::fma(position, w.lo, std::fma(position, w.hi, -p))};
}

template <typename T>
FASTRPE_HD void add(Phase<T>& phase, Phase<T> other) {
  const T sum = phase.turn + other.turn, part = sum - phase.turn;
  phase.rest += other.rest + ((phase.turn - (sum - part)) + (other.turn - part));  // what the sum rounded off
  phase.turn = sum - nearest(sum);
}

// cos and sin of a phase; absolute error 1e-7 in float32.
FASTRPE_HD void cos_sin(Phase<float> phase, float& c, float& s) {
  const float half_turns = nearest(2.0f * phase.turn);                   // -1, 0 or 1
  const float r = std::fma(-0.5f, half_turns, phase.turn) + phase.rest;  // [-1/4, 1/4]
  const float sign = std::fma(-2.0f, half_turns * half_turns, 1.0f);
  const float u = r * r;
  float p = std::fma(u, 39.682708740234375f, -76.57188415527344f);  // minimax of (sin(2 pi r) - 2 pi r) / r^3
  p = std::fma(u, p, 81.60215759277344f);
  p = std::fma(u, p, -41.341678619384766f);
  float q = std::fma(u, -25.00679588317871f, 60.1482048034668f);  // minimax of (cos(2 pi r) - 1) / r^2
  q = std::fma(u, q, -85.45382690429688f);
  q = std::fma(u, q, 64.9393539428711f);
  q = std::fma(u, q, -19.739208221435547f);
  s = sign * std::fma(r * u, p, 6.2831854820251465f * r);
  c = sign * std::fma(u, q, 1.0f);
}

FASTRPE_HD void cos_sin(Phase<double> phase, double& c, double& s) {
  const double a = 6.283185307179586 * (phase.turn + phase.rest);
  c = std::cos(a);
  s = std::sin(a);
}

// (a, b) turned by the angle of (c, s).
template <typename T>
FASTRPE_HD void turn(T& a, T& b, T c, T s) {
  const T x = a, y = b;
  a = x * c - y * s;
  b = y * c + x * s;
}

}  // namespace rotary
}  // namespace fastrpe
