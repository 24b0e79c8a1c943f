// Features of a block of rows on a CPU, and the products that attention makes of them. Matrices lie in rows whose
// length is a multiple of the vectors' and whose ends stay 0.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../common/vector.h"
#include "../features/features.h"

namespace fastrpe {
namespace linear {
namespace {

constexpr int64_t block = 64;       // rows whose features are held at a time
constexpr double empty = -1e30;     // log_scale of a feature that no key has reached
constexpr double slack = 40;        // how far an exponent may exceed the c it is held relative to: exp(40) is small
constexpr double negligible = -87;  // exponentials below this are 0, never denormal

enum class Kind { positive, hyperbolic, trigonometric, oprf, relu, exp, elu, features };

// Row lengths that are no power of two apart, which would fall into few sets of the cache.
template <typename A>
int64_t row_of(int64_t n) {
  return padded<A>(n) + lanes<A>;
}

// What is common to all rows of a set of heads.
template <typename A>
struct Map {
  Kind kind;
  bool projects;  // or omega is the identity
  bool has_bias;
  int64_t D, M, F, lx, lf;
  A scale, eps, floor;
  std::vector<A> omega, omega_t, bias;  // (M, lx), (D, lf), (lf,)

  bool has_norm() const {
    return kind == Kind::positive || kind == Kind::hyperbolic || kind == Kind::trigonometric;
  }
  bool is_exponential() const {
    return kind == Kind::positive || kind == Kind::hyperbolic || kind == Kind::exp;
  }
  bool has_exponent() const {
    return is_exponential() || kind == Kind::trigonometric;
  }
};

// exp within 1 ulp for x of at most 88, which exponents here are far below; where it is negligible, 0. The sum that
// rounds x / log 2 ends in the bits of 2^n.
FASTRPE_HD float exp_or_0(float x) {
  const float sum = x * 1.44269504f + 12582912.0f;
  float y = features::exponential_over(x, sum - 12582912.0f);
  uint32_t power, bits;
  std::memcpy(&power, &sum, sizeof power);
  std::memcpy(&bits, &y, sizeof bits);
  bits += power << 23;
  std::memcpy(&y, &bits, sizeof y);
  return x < float(negligible) ? 0.0f : y;
}

FASTRPE_HD double exp_or_0(double x) {
  return x < negligible ? 0.0 : std::exp(x);
}

// The largest of x + y, of the first n.
template <int bytes, typename A>
FASTRPE_HD A largest_sum_in(const A* x, const A* y, int64_t n) {
  const int64_t whole = n / lanes<A> * lanes<A>;
  A most = whole ? largest_sum<bytes>(x, y, whole) : x[0] + y[0];
  for (int64_t i = whole; i < n; ++i) {
    most = x[i] + y[i] > most ? x[i] + y[i] : most;
  }
  return most;
}

// Of projections e (n, lf): exponents in e, of which each row's shift is to be subtracted; amplitudes where they are
// not all 1.
template <int bytes, typename A>
FASTRPE_HD void activate_in(const Map<A>& map, A* e, A* amplitude, A* shift, const A* x, int64_t n) {
  const int64_t M = map.M, F = map.F;
  for (int64_t i = 0; i < n; ++i, e += map.lf, amplitude += map.lf, x += map.lx) {
    const A half = map.has_norm() ? dot<bytes>(x, x, padded<A>(map.D)) / 2 : A(0);
    shift[i] = map.kind == Kind::trigonometric ? -half : half;
    switch (map.kind) {
      case Kind::positive:
      case Kind::exp:
        for (int64_t f = 0; map.has_bias && f < F; ++f) {
          e[f] += map.bias[f];
        }
        break;
      case Kind::hyperbolic:
        for (int64_t f = 0; f < M; ++f) {
          amplitude[f] = -e[f];
        }
        std::copy(amplitude, amplitude + M, e + M);
        break;
      case Kind::trigonometric:
        for (int64_t f = 0; f < M; ++f) {
          A c, s;
          features::cos_sin(e[f], c, s);
          amplitude[f] = c;
          e[f] = s;
        }
        std::copy(e, e + M, amplitude + M);
        std::fill(e, e + F, A(0));
        break;
      case Kind::relu:
        for (int64_t f = 0; f < F; ++f) {
          amplitude[f] = e[f] > 0 ? e[f] : A(0);
        }
        break;
      case Kind::elu:
        for (int64_t f = 0; f < F; ++f) {
          amplitude[f] = features::positive_elu(e[f]);
        }
        break;
      default:
        std::copy(e, e + F, amplitude);
    }
  }
}

// How many rows can be held relative to one c: the first, and those behind it that exceed c by no more than the slack.
// `most` becomes the largest of each feature; c is what it is behind the first row. No row looks at a later one.
template <typename A>
FASTRPE_HD int64_t reach_in(const Map<A>& map, const A* e, const A* shift, const bool* keep, int64_t n, A* most, A* c) {
  const int64_t F = map.F;
  for (int64_t i = 0; i < n; ++i, e += map.lf) {
    if (i && keep[i]) {
      int over = 0;
      for (int64_t f = 0; f < F; ++f) {
        over |= e[f] - shift[i] > c[f] + A(slack);
      }
      if (over) {
        return i;
      }
    }
    if (keep[i]) {
      for (int64_t f = 0; f < F; ++f) {
        const A each = e[f] - shift[i];
        most[f] = each > most[f] ? each : most[f];
      }
    }
    if (!i) {
      for (int64_t f = 0; f < F; ++f) {
        c[f] = most[f];
      }
    }
  }
  return n;
}

// Key features divided by exp(c), in place of exponents: `own` without eps, `phi` with it (where it is not 0). Rows not
// kept are 0.
template <typename A>
FASTRPE_HD void keys_in(const Map<A>& map, A* own, A* phi, const A* amplitude, const A* shift, const A* c, const A* add,
                        const bool* keep, int64_t n) {
  const int64_t F = map.F;
  for (int64_t i = 0; i < n; ++i, own += map.lf, phi += map.lf, amplitude += map.lf) {
    if (!keep[i]) {
      std::fill(own, own + F, A(0));
      std::fill(phi, phi + F, A(0));
      continue;
    }
    if (map.is_exponential()) {
#pragma GCC ivdep
      for (int64_t f = 0; f < F; ++f) {
        own[f] = exp_or_0(own[f] - shift[i] - c[f]);
      }
    } else if (map.has_exponent()) {
#pragma GCC ivdep
      for (int64_t f = 0; f < F; ++f) {
        own[f] = amplitude[f] * exp_or_0(own[f] - shift[i] - c[f]);
      }
    } else {
      std::copy(amplitude, amplitude + F, own);
    }
    if (map.eps != 0) {
      for (int64_t f = 0; f < F; ++f) {
        phi[f] = own[f] + add[f];
      }
    }
  }
}

// Query features multiplied by exp(c - r), in place of exponents, and r. `own` and `w` as for keys.
template <int bytes, typename A>
FASTRPE_HD void queries_in(const Map<A>& map, A* own, A* w, const A* amplitude, const A* shift, const A* c, A* r,
                           int64_t n) {
  const int64_t F = map.F;
  A floor = c[0];  // the largest exponent of eps
  for (int64_t f = 1; f < F; ++f) {
    floor = c[f] > floor ? c[f] : floor;
  }
  floor += map.floor;
  for (int64_t i = 0; i < n; ++i, own += map.lf, w += map.lf, amplitude += map.lf) {
    if (!map.has_exponent()) {
      std::copy(amplitude, amplitude + F, own);
      r[i] = 0;
      for (int64_t f = 0; map.eps != 0 && f < F; ++f) {
        w[f] = own[f] + map.eps;
      }
      continue;
    }
    A most = largest_sum_in<bytes>(own, c, F);
    r[i] = most - shift[i];
    if (map.eps != 0) {
      r[i] = floor > r[i] ? floor : r[i];
      most = r[i] + shift[i];
    }
#pragma GCC ivdep
    for (int64_t f = 0; f < F; ++f) {
      own[f] = exp_or_0(own[f] + c[f] - most);
    }
    if (!map.is_exponential()) {
      for (int64_t f = 0; f < F; ++f) {
        own[f] *= amplitude[f];
      }
    }
    if (map.eps != 0) {
#pragma GCC ivdep
      for (int64_t f = 0; f < F; ++f) {
        w[f] = own[f] + exp_or_0(map.floor + c[f] - r[i]);
      }
    }
  }
}

// The derivative by the projections, in place of that by the features, d (n, lf), and by the |x|^2 / 2 that exponents
// are less by.
template <int bytes, typename A>
FASTRPE_HD void activate_bwd_in(const Map<A>& map, A* d, const A* own, A* total, int64_t n) {
  const int64_t M = map.M, F = map.F;
  for (int64_t i = 0; i < n; ++i, d += map.lf, own += map.lf) {
    total[i] = map.has_norm() ? dot<bytes>(d, own, padded<A>(F)) : A(0);
    total[i] = map.kind == Kind::trigonometric ? -total[i] : total[i];
    switch (map.kind) {
      case Kind::positive:
      case Kind::exp:
        for (int64_t f = 0; f < F; ++f) {
          d[f] *= own[f];
        }
        break;
      case Kind::hyperbolic:
        for (int64_t f = 0; f < M; ++f) {
          d[f] = d[f] * own[f] - d[M + f] * own[M + f];
        }
        break;
      case Kind::trigonometric:
        for (int64_t f = 0; f < M; ++f) {
          d[f] = d[M + f] * own[f] - d[f] * own[M + f];
        }
        break;
      case Kind::relu:
        for (int64_t f = 0; f < F; ++f) {
          d[f] = own[f] > 0 ? d[f] : A(0);
        }
        break;
      case Kind::elu:
        for (int64_t f = 0; f < F; ++f) {
          d[f] *= own[f] < 1 ? own[f] : A(1);
        }
        break;
      default:
        break;
    }
  }
}

// Rows of a state go from exp(from) to exp(to); few of them move.
template <typename A>
FASTRPE_HD void rescale_in(A* rows, int64_t row, int64_t n, A* sums, const A* from, const A* to, int64_t F) {
  for (int64_t f = 0; f < F; ++f) {
    if (from[f] == to[f]) {
      continue;
    }
    const A factor = exp_or_0(from[f] - to[f]);
    sums[f] *= factor;
    for (int64_t j = 0; j < n; ++j) {
      rows[f * row + j] *= factor;
    }
  }
}

// The same for a transposed state.
template <typename A>
FASTRPE_HD void rescale_t_in(A* columns, int64_t row, int64_t n, A* sums, const A* from, const A* to, int64_t F,
                             A* factor) {
  bool moved = false;
  for (int64_t f = 0; f < F; ++f) {
    factor[f] = exp_or_0(from[f] - to[f]);
    sums[f] *= factor[f];
    moved = moved || from[f] != to[f];
  }
  for (int64_t j = 0; moved && j < n; ++j) {
    for (int64_t f = 0; f < F; ++f) {
      columns[j * row + f] *= factor[f];
    }
  }
}

template <typename A>
FASTRPE_HD void transpose_in(A* to, int64_t to_row, const A* from, int64_t from_row, int64_t rows, int64_t columns) {
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = 0; i < rows; ++i) {
      to[j * to_row + i] = from[i * from_row + j];
    }
  }
}

// Sums over all features, or values, of products of rows: dots[i] = <x_i, y_i>, or <x_i, y> for a y_row of 0.
template <int bytes, typename A>
FASTRPE_HD void dots_in(A* dots, const A* x, int64_t x_row, const A* y, int64_t y_row, int64_t rows, int64_t n,
                        bool add) {
  for (int64_t i = 0; i < rows; ++i) {
    dots[i] = (add ? dots[i] : A(0)) + dot<bytes>(x + i * x_row, y + i * y_row, n);
  }
}

// rows[i] = rows[i] * by[i] + plus[i] * y.
template <typename A>
FASTRPE_HD void scale_rows_in(A* x, int64_t row, const A* by, const A* plus, const A* y, int64_t rows, int64_t n) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      x[i * row + j] = x[i * row + j] * by[i] + plus[i] * y[j];
    }
  }
}

// y += sum over rows of by[i] x_i.
template <typename A>
FASTRPE_HD void add_rows_in(A* y, const A* x, int64_t row, const A* by, int64_t rows, int64_t n) {
  for (int64_t i = 0; i < rows; ++i) {
    const A factor = by ? by[i] : A(1);
    for (int64_t j = 0; j < n; ++j) {
      y[j] += factor * x[i * row + j];
    }
  }
}

// The largest of each column over the rows kept, and of what `most` was.
template <typename A>
FASTRPE_HD void largest_rows_in(A* most, const A* e, int64_t row, const A* shift, const bool* keep, int64_t n,
                                int64_t F) {
  for (int64_t i = 0; i < n; ++i, e += row) {
    for (int64_t f = 0; keep[i] && f < F; ++f) {
      const A each = e[f] - shift[i];
      most[f] = each > most[f] ? each : most[f];
    }
  }
}

// x_i -= by[i] y_i.
template <typename A>
FASTRPE_HD void subtract_rows_in(A* x, const A* y, const A* by, int64_t rows, int64_t n) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      x[i * n + j] -= by[i] * y[i * n + j];
    }
  }
}

// x_i *= by[i].
template <typename A>
FASTRPE_HD void multiply_rows_in(A* x, int64_t row, const A* by, int64_t rows, int64_t n) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      x[i * row + j] *= by[i];
    }
  }
}

// Rows as they lie in a tensor, scaled; those not kept are 0.
template <typename T, typename A = acc_t<T>>
FASTRPE_HD void read_in(A* to, int64_t row, const T* from, int64_t sl, int64_t sd, int64_t n, int64_t size, A scale,
                        const bool* keep) {
  for (int64_t i = 0; i < n; ++i, to += row, from += sl) {
    if (keep && !keep[i]) {
      std::fill(to, to + size, A(0));
    } else if (sd == 1) {
#pragma GCC ivdep
      for (int64_t j = 0; j < size; ++j) {
        to[j] = scale * A(from[j]);
      }
    } else {
      for (int64_t j = 0; j < size; ++j) {
        to[j] = scale * A(from[j * sd]);
      }
    }
  }
}

template <typename T, typename A = acc_t<T>>
FASTRPE_HD void write_in(T* to, int64_t sl, const A* from, int64_t row, int64_t n, int64_t size, A scale, const A* by) {
  for (int64_t i = 0; i < n; ++i, from += row, to += sl) {
    const A factor = by ? scale * by[i] : scale;
#pragma GCC ivdep
    for (int64_t j = 0; j < size; ++j) {
      to[j] = static_cast<T>(factor * from[j]);
    }
  }
}

#define FASTRPE_DEFINE(TARGET, bytes, A)                                                                               \
  TARGET void product(A* c, int64_t ldc, const A* a, int64_t row, int64_t step, const A* b, int64_t ldb, int64_t n,    \
                      int64_t m, int64_t K, bool add) {                                                                \
    multiply<bytes>(c, ldc, a, row, step, b, ldb, n, padded<A>(m), K, add);                                            \
  }                                                                                                                    \
  TARGET void activate(const Map<A>& map, A* e, A* amplitude, A* shift, const A* x, int64_t n) {                       \
    activate_in<bytes>(map, e, amplitude, shift, x, n);                                                                \
  }                                                                                                                    \
  TARGET int64_t reach(const Map<A>& map, const A* e, const A* shift, const bool* keep, int64_t n, A* most, A* c) {    \
    return reach_in(map, e, shift, keep, n, most, c);                                                                  \
  }                                                                                                                    \
  TARGET void keys(const Map<A>& map, A* own, A* phi, const A* amplitude, const A* shift, const A* c, const A* add,    \
                   const bool* keep, int64_t n) {                                                                      \
    keys_in(map, own, phi, amplitude, shift, c, add, keep, n);                                                         \
  }                                                                                                                    \
  TARGET void queries(const Map<A>& map, A* own, A* w, const A* amplitude, const A* shift, const A* c, A* r,           \
                      int64_t n) {                                                                                     \
    queries_in<bytes>(map, own, w, amplitude, shift, c, r, n);                                                         \
  }                                                                                                                    \
  TARGET void activate_bwd(const Map<A>& map, A* d, const A* own, A* total, int64_t n) {                               \
    activate_bwd_in<bytes>(map, d, own, total, n);                                                                     \
  }                                                                                                                    \
  TARGET void rescale(A* rows, int64_t row, int64_t n, A* sums, const A* from, const A* to, int64_t F) {               \
    rescale_in(rows, row, n, sums, from, to, F);                                                                       \
  }                                                                                                                    \
  TARGET void rescale_t(A* columns, int64_t row, int64_t n, A* sums, const A* from, const A* to, int64_t F,            \
                        A* factor) {                                                                                   \
    rescale_t_in(columns, row, n, sums, from, to, F, factor);                                                          \
  }                                                                                                                    \
  TARGET void transpose(A* to, int64_t to_row, const A* from, int64_t from_row, int64_t rows, int64_t columns) {       \
    transpose_in(to, to_row, from, from_row, rows, columns);                                                           \
  }                                                                                                                    \
  TARGET void dots(A* to, const A* x, int64_t x_row, const A* y, int64_t y_row, int64_t rows, int64_t n, bool add) {   \
    dots_in<bytes>(to, x, x_row, y, y_row, rows, n, add);                                                              \
  }                                                                                                                    \
  TARGET void scale_rows(A* x, int64_t row, const A* by, const A* plus, const A* y, int64_t rows, int64_t n) {         \
    scale_rows_in(x, row, by, plus, y, rows, n);                                                                       \
  }                                                                                                                    \
  TARGET void add_rows(A* y, const A* x, int64_t row, const A* by, int64_t rows, int64_t n) {                          \
    add_rows_in(y, x, row, by, rows, n);                                                                               \
  }                                                                                                                    \
  TARGET void largest_rows(A* most, const A* e, int64_t row, const A* shift, const bool* keep, int64_t n, int64_t F) { \
    largest_rows_in(most, e, row, shift, keep, n, F);                                                                  \
  }                                                                                                                    \
  TARGET void subtract_rows(A* x, const A* y, const A* by, int64_t rows, int64_t n) {                                  \
    subtract_rows_in(x, y, by, rows, n);                                                                               \
  }                                                                                                                    \
  TARGET void multiply_rows(A* x, int64_t row, const A* by, int64_t rows, int64_t n) {                                 \
    multiply_rows_in(x, row, by, rows, n);                                                                             \
  }
FASTRPE_FOR_TARGETS(FASTRPE_DEFINE, float)
FASTRPE_FOR_TARGETS(FASTRPE_DEFINE, double)
#undef FASTRPE_DEFINE

#define FASTRPE_DEFINE(TARGET, bytes, T)                                                                           \
  TARGET void read(acc_t<T>* to, int64_t row, const T* from, int64_t sl, int64_t sd, int64_t n, int64_t size,      \
                   acc_t<T> scale, const bool* keep) {                                                             \
    read_in(to, row, from, sl, sd, n, size, scale, keep);                                                          \
  }                                                                                                                \
  TARGET void write(T* to, int64_t sl, const acc_t<T>* from, int64_t row, int64_t n, int64_t size, acc_t<T> scale, \
                    const acc_t<T>* by) {                                                                          \
    write_in(to, sl, from, row, n, size, scale, by);                                                               \
  }
FASTRPE_FOR_TARGETS(FASTRPE_DEFINE, float)
FASTRPE_FOR_TARGETS(FASTRPE_DEFINE, double)
FASTRPE_FOR_TARGETS(FASTRPE_DEFINE, BFloat16)
FASTRPE_FOR_TARGETS(FASTRPE_DEFINE, Half)
#undef FASTRPE_DEFINE

}  // namespace
}  // namespace linear
}  // namespace fastrpe
