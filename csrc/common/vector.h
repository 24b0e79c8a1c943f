// Wide vectors for the CPU kernels: small matrix products in cache, sums and maxima in a fixed order. `bytes` is the
// length of the target's vectors, see clones.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "clones.h"
#include "dtype.h"

namespace fastrpe {

// Rows are padded to 64 bytes, a vector or a few.
template <typename A>
constexpr int lanes = 64 / sizeof(A);

template <typename A>
constexpr int64_t padded(int64_t n) {
  return (n + lanes<A> - 1) / lanes<A> * lanes<A>;
}

template <typename A, int bytes>
struct Vector {
  typedef A type __attribute__((vector_size(bytes), aligned(sizeof(A)), may_alias));
};

// The sum of all lanes, or the largest, by halves.
template <bool largest, typename A, int bytes, typename V>
FASTRPE_HD A fold(const V& x) {
  if constexpr (bytes == sizeof(A)) {
    return x[0];
  } else {
    typename Vector<A, bytes / 2>::type half[2];
    std::memcpy(half, &x, bytes);
    half[0] = !largest ? half[0] + half[1] : half[1] > half[0] ? half[1] : half[0];
    return fold<largest, A, bytes / 2>(half[0]);
  }
}

// The sum over n of x y, a multiple of the lanes.
template <int bytes, typename A>
FASTRPE_HD A dot(const A* x, const A* y, int64_t n) {
  using V = typename Vector<A, bytes>::type;
  V sum = {};
  for (int64_t i = 0; i < n; i += sizeof(V) / sizeof(A)) {
    sum += *reinterpret_cast<const V*>(x + i) * *reinterpret_cast<const V*>(y + i);
  }
  return fold<false, A, bytes>(sum);
}

template <int bytes, typename A>
FASTRPE_HD A sum_of(const A* x, int64_t n) {
  using V = typename Vector<A, bytes>::type;
  V sum = {};
  for (int64_t i = 0; i < n; i += sizeof(V) / sizeof(A)) {
    sum += *reinterpret_cast<const V*>(x + i);
  }
  return fold<false, A, bytes>(sum);
}

template <int bytes, typename A>
FASTRPE_HD A largest_of(const A* x, int64_t n) {
  using V = typename Vector<A, bytes>::type;
  V most = *reinterpret_cast<const V*>(x);
  for (int64_t i = sizeof(V) / sizeof(A); i < n; i += sizeof(V) / sizeof(A)) {
    const V v = *reinterpret_cast<const V*>(x + i);
    most = v > most ? v : most;
  }
  return fold<true, A, bytes>(most);
}

// The largest of x + y.
template <int bytes, typename A>
FASTRPE_HD A largest_sum(const A* x, const A* y, int64_t n) {
  using V = typename Vector<A, bytes>::type;
  V most = *reinterpret_cast<const V*>(x) + *reinterpret_cast<const V*>(y);
  for (int64_t i = sizeof(V) / sizeof(A); i < n; i += sizeof(V) / sizeof(A)) {
    const V v = *reinterpret_cast<const V*>(x + i) + *reinterpret_cast<const V*>(y + i);
    most = v > most ? v : most;
  }
  return fold<true, A, bytes>(most);
}

// c (R, W vectors) = a (R, K) b (K, W vectors), or that much more of it; a has any strides.
template <int bytes, int R, int W, typename A>
FASTRPE_HD void multiply_tile(A* c, int64_t ldc, const A* a, int64_t row, int64_t step, const A* b, int64_t ldb,
                              int64_t K, bool add) {
  using V = typename Vector<A, bytes>::type;
  constexpr int n = bytes / sizeof(A);
  V sum[R][W] = {};
  for (int64_t k = 0; k < K; ++k) {
    V v[W];
#pragma GCC unroll 8
    for (int j = 0; j < W; ++j) {
      v[j] = *reinterpret_cast<const V*>(b + k * ldb + j * n);
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
      V* to = reinterpret_cast<V*>(c + i * ldc + j * n);
      *to = add ? *to + sum[i][j] : sum[i][j];
    }
  }
}

template <int bytes, int W, typename A>
FASTRPE_HD void multiply_panel(A* c, int64_t ldc, const A* a, int64_t row, int64_t step, const A* b, int64_t ldb,
                               int64_t n, int64_t K, bool add) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    multiply_tile<bytes, 4, W>(c + i * ldc, ldc, a + i * row, row, step, b, ldb, K, add);
  }
  for (; i < n; ++i) {
    multiply_tile<bytes, 1, W>(c + i * ldc, ldc, a + i * row, row, step, b, ldb, K, add);
  }
}

template <int bytes, int W, typename A>
FASTRPE_HD void multiply_panels(A* c, int64_t ldc, const A* a, int64_t row, int64_t step, const A* b, int64_t ldb,
                                int64_t n, int64_t m, int64_t K, bool add) {
  constexpr int width = W * bytes / sizeof(A);
  int64_t j = 0;
  for (; j + width <= m; j += width) {
    multiply_panel<bytes, W>(c + j, ldc, a, row, step, b + j, ldb, n, K, add);
  }
  if constexpr (width > lanes<A>) {
    if (j < m) {
      multiply_panels<bytes, W / 2>(c + j, ldc, a, row, step, b + j, ldb, n, m - j, K, add);
    }
  }
}

// c (n, m) = a (n, K) b (K, m), or added to c; m is a multiple of the lanes, a[i, k] lies at i row + k step. The sums
// of a tile fill half of the registers: there are 32 of 64 bytes, or 16 of fewer.
template <int bytes, typename A>
FASTRPE_HD void multiply(A* c, int64_t ldc, const A* a, int64_t row, int64_t step, const A* b, int64_t ldb, int64_t n,
                         int64_t m, int64_t K, bool add) {
  multiply_panels<bytes, bytes == 64 ? 4 : 2>(c, ldc, a, row, step, b, ldb, n, m, K, add);
}

}  // namespace fastrpe
