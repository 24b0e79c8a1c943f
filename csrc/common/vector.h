// Wide vectors for the CPU kernels: small matrix products in cache, sums and maxima in a fixed order.
#pragma once

#include <cstdint>

#include "clones.h"
#include "dtype.h"

namespace fastrpe {

// 64 bytes, which older machines compute in parts.
template <typename A>
constexpr int lanes = 64 / sizeof(A);

template <typename A>
struct Wide;
template <>
struct Wide<float> {
  typedef float type __attribute__((vector_size(64), aligned(4), may_alias));
};
template <>
struct Wide<double> {
  typedef double type __attribute__((vector_size(64), aligned(8), may_alias));
};

template <typename A>
constexpr int64_t padded(int64_t n) {
  return (n + lanes<A> - 1) / lanes<A> * lanes<A>;
}

// The sum of squares, and the largest, of n numbers; n is a multiple of the lanes.
template <typename A>
FASTRPE_HD A sum_of_squares(const A* x, int64_t n) {
  using V = typename Wide<A>::type;
  V sum = {};
  for (int64_t i = 0; i < n; i += lanes<A>) {
    const V v = *reinterpret_cast<const V*>(x + i);
    sum += v * v;
  }
  A total = 0;
  for (int j = 0; j < lanes<A>; ++j) {
    total += sum[j];
  }
  return total;
}

template <typename A>
FASTRPE_HD A sum_of(const A* x, int64_t n) {
  using V = typename Wide<A>::type;
  V sum = {};
  for (int64_t i = 0; i < n; i += lanes<A>) {
    sum += *reinterpret_cast<const V*>(x + i);
  }
  A total = 0;
  for (int j = 0; j < lanes<A>; ++j) {
    total += sum[j];
  }
  return total;
}

template <typename A>
FASTRPE_HD A largest_of(const A* x, int64_t n) {
  using V = typename Wide<A>::type;
  V most = *reinterpret_cast<const V*>(x);
  for (int64_t i = lanes<A>; i < n; i += lanes<A>) {
    const V v = *reinterpret_cast<const V*>(x + i);
    most = v > most ? v : most;
  }
  A result = most[0];
  for (int j = 1; j < lanes<A>; ++j) {
    result = most[j] > result ? most[j] : result;
  }
  return result;
}

// c (R, W lanes) = a (R, K) b (K, W lanes), or that much more of it; a has any strides.
template <int R, int W, typename A>
FASTRPE_HD void multiply_tile(A* c, int64_t ldc, const A* a, int64_t row, int64_t step, const A* b, int64_t ldb,
                              int64_t K, bool add) {
  using V = typename Wide<A>::type;
  V sum[R][W] = {};
  for (int64_t k = 0; k < K; ++k) {
    V v[W];
#pragma GCC unroll 8
    for (int j = 0; j < W; ++j) {
      v[j] = *reinterpret_cast<const V*>(b + k * ldb + j * lanes<A>);
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const A s = a[i * row + k * step];
#pragma GCC unroll 8
      for (int j = 0; j < W; ++j) {
        sum[i][j] += s * v[j];
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < W; ++j) {
      V* to = reinterpret_cast<V*>(c + i * ldc + j * lanes<A>);
      *to = add ? *to + sum[i][j] : sum[i][j];
    }
  }
}

template <int W, typename A>
FASTRPE_HD void multiply_panel(A* c, int64_t ldc, const A* a, int64_t row, int64_t step, const A* b, int64_t ldb,
                               int64_t n, int64_t K, bool add) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    multiply_tile<4, W>(c + i * ldc, ldc, a + i * row, row, step, b, ldb, K, add);
  }
  for (; i < n; ++i) {
    multiply_tile<1, W>(c + i * ldc, ldc, a + i * row, row, step, b, ldb, K, add);
  }
}

// c (n, m) = a (n, K) b (K, m), or added to c; m is a multiple of the lanes, a[i, k] lies at i row + k step.
template <typename A>
FASTRPE_HD void multiply(A* c, int64_t ldc, const A* a, int64_t row, int64_t step, const A* b, int64_t ldb, int64_t n,
                         int64_t m, int64_t K, bool add) {
  int64_t j = 0;
  for (; j + 2 * lanes<A> <= m; j += 2 * lanes<A>) {
    multiply_panel<2>(c + j, ldc, a, row, step, b + j, ldb, n, K, add);
  }
  if (j < m) {
    multiply_panel<1>(c + j, ldc, a, row, step, b + j, ldb, n, K, add);
  }
}

}  // namespace fastrpe
