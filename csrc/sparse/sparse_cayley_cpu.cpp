// P x = 2 (I + S)^{-1} x - x by a sparse factorisation without pivoting. I + S has the symmetric part I, so L D V
// exists for every order of elimination, and its nonzeros are known before its values (fastrpe/ops/sparse/pattern.py).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../common/checks.h"
#include "../common/clones.h"

namespace fastrpe {
namespace sparse_cayley {
namespace {

constexpr int tile = 16;            // tokens solved side by side: two vectors of eight float64
constexpr int64_t max_chunks = 16;  // tasks of a head, each with its own sums of dtheta

// The nonzeros of one pattern. Vertices keep their numbers; only the order of elimination is another.
struct Pattern {
  int d;
  int64_t K;
  const int32_t* order;  // (d,) the vertex eliminated at each step
  const int64_t* start;  // (d + 1,) where the column of each step begins in rows
  const int32_t* rows;   // the vertices below the diagonal, in order of elimination; the row of V has the same
  const int64_t* slots;  // (K,) where theta lies in V (and -theta in L), or ~slot where the signs are the other way
  const int64_t* pairs;  // (K, 2)
};

// I + S = L D V, with L and V^T unit lower triangular on the same nonzeros.
struct Factors {
  std::vector<double> lower, upper, inverse_diagonal;
};

// Crout's order: step k takes its column of L and row of V together, from all earlier columns that reach k.
FASTRPE_CLONES void factorise(const Pattern& p, const double* theta, double* lower, double* upper, double* inverse) {
  const int64_t offset = p.start[0], entries = p.start[p.d] - offset;
  std::fill(lower, lower + entries, 0.0);
  std::fill(upper, upper + entries, 0.0);
  for (int64_t k = 0; k < p.K; ++k) {
    const bool turned = p.slots[k] < 0;
    const int64_t slot = (turned ? ~p.slots[k] : p.slots[k]) - offset;
    upper[slot] = turned ? -theta[k] : theta[k];
    lower[slot] = turned ? theta[k] : -theta[k];
  }
  std::vector<int> step_of(p.d), chain(p.d, -1), link(p.d, -1);
  std::vector<int64_t> next(p.d);
  std::vector<double> column(p.d), row(p.d), diagonal(p.d);
  for (int k = 0; k < p.d; ++k) {
    step_of[p.order[k]] = k;
    next[k] = p.start[k];
  }
  const auto reach = [&](int j) {  // files column j under the next step that it reaches
    if (next[j] < p.start[j + 1]) {
      const int k = step_of[p.rows[next[j]]];
      link[j] = chain[k];
      chain[k] = j;
    }
  };
  for (int k = 0; k < p.d; ++k) {
    for (int64_t m = p.start[k]; m < p.start[k + 1]; ++m) {
      column[p.rows[m]] = lower[m - offset];
      row[p.rows[m]] = upper[m - offset];
    }
    double pivot = 1;
    for (int j = chain[k], after; j >= 0; j = after) {
      after = link[j];
      const int64_t at = next[j]++ - offset;
      const double left = lower[at] * diagonal[j], right = diagonal[j] * upper[at];
      pivot -= left * upper[at];
      for (int64_t m = next[j]; m < p.start[j + 1]; ++m) {
        row[p.rows[m]] -= left * upper[m - offset];
        column[p.rows[m]] -= lower[m - offset] * right;
      }
      reach(j);
    }
    diagonal[k] = pivot;
    inverse[k] = 1 / pivot;
    for (int64_t m = p.start[k]; m < p.start[k + 1]; ++m) {
      lower[m - offset] = column[p.rows[m]] * inverse[k];
      upper[m - offset] = row[p.rows[m]] * inverse[k];
    }
    reach(k);
  }
}

// (I + S) u = w in place for a tile, w (d, tile); with L and V exchanged, (I - S) u = w.
FASTRPE_CLONES void solve(const Pattern& p, const double* __restrict lower, const double* __restrict upper,
                          const double* __restrict inverse, double* __restrict w) {
  lower -= p.start[0];
  upper -= p.start[0];
  for (int k = 0; k < p.d; ++k) {
    double x[tile];
    double* at = w + int64_t(p.order[k]) * tile;
    for (int t = 0; t < tile; ++t) {
      x[t] = at[t];
    }
    for (int64_t m = p.start[k]; m < p.start[k + 1]; ++m) {
      double* to = w + int64_t(p.rows[m]) * tile;
      for (int t = 0; t < tile; ++t) {
        to[t] -= lower[m] * x[t];
      }
    }
    for (int t = 0; t < tile; ++t) {
      at[t] = x[t] * inverse[k];
    }
  }
  for (int k = p.d - 1; k >= 0; --k) {
    double x[tile];
    double* at = w + int64_t(p.order[k]) * tile;
    for (int t = 0; t < tile; ++t) {
      x[t] = at[t];
    }
    for (int64_t m = p.start[k]; m < p.start[k + 1]; ++m) {
      const double* from = w + int64_t(p.rows[m]) * tile;
      for (int t = 0; t < tile; ++t) {
        x[t] -= upper[m] * from[t];
      }
    }
    for (int t = 0; t < tile; ++t) {
      at[t] = x[t];
    }
  }
}

// r = x - (I + S) u for a tile; with -1 for `sign`, of I - S.
FASTRPE_CLONES void residual(const Pattern& p, const double* theta, double sign, const double* __restrict x,
                             const double* __restrict u, double* __restrict r) {
  for (int64_t i = 0; i < int64_t(p.d) * tile; ++i) {
    r[i] = x[i] - u[i];
  }
  for (int64_t k = 0; k < p.K; ++k) {
    const int64_t a = p.pairs[2 * k] * tile, b = p.pairs[2 * k + 1] * tile;
    const double s = sign * theta[k];
    for (int t = 0; t < tile; ++t) {
      r[a + t] -= s * u[b + t];
      r[b + t] += s * u[a + t];
    }
  }
}

// sums[k] -= 2 sum over the tile of left_a right_b - left_b right_a.
FASTRPE_CLONES void add_gradient(const Pattern& p, const double* __restrict left, const double* __restrict right,
                                 double* __restrict sums) {
  for (int64_t k = 0; k < p.K; ++k) {
    const int64_t a = p.pairs[2 * k] * tile, b = p.pairs[2 * k + 1] * tile;
    double lanes[8] = {};
    for (int t = 0; t < tile; t += 8) {
      for (int i = 0; i < 8; ++i) {
        lanes[i] += left[a + t + i] * right[b + t + i] - left[b + t + i] * right[a + t + i];
      }
    }
    const double sum =
        ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
    sums[k] -= 2 * sum;
  }
}

#define FASTRPE_DEFINE(T)                                                                                     \
  FASTRPE_CLONES void gather(const T* const* rows, int n, int d, int64_t stride, double* __restrict w) {      \
    if (n == tile) { /* a loop of known length */                                                             \
      for (int j = 0; j < d; ++j) {                                                                           \
        for (int t = 0; t < tile; ++t) {                                                                      \
          w[int64_t(j) * tile + t] = static_cast<double>(rows[t][j * stride]);                                \
        }                                                                                                     \
      }                                                                                                       \
      return;                                                                                                 \
    }                                                                                                         \
    for (int j = 0; j < d; ++j) {                                                                             \
      for (int t = 0; t < n; ++t) {                                                                           \
        w[int64_t(j) * tile + t] = static_cast<double>(rows[t][j * stride]);                                  \
      }                                                                                                       \
    }                                                                                                         \
  }                                                                                                           \
  FASTRPE_CLONES void scatter(const T* const* rows, int n, int d, int64_t stride, const double* __restrict u, \
                              T* const* to) {                                                                 \
    for (int first = 0; first < d; first += tile) { /* what is read of u stays in the first cache */          \
      const int last = std::min(d, first + tile);                                                             \
      for (int t = 0; t < n; ++t) {                                                                           \
        for (int j = first; j < last; ++j) {                                                                  \
          to[t][j] = static_cast<T>(2 * u[int64_t(j) * tile + t] - static_cast<double>(rows[t][j * stride])); \
        }                                                                                                     \
      }                                                                                                       \
    }                                                                                                         \
  }
FASTRPE_DEFINE(float)
FASTRPE_DEFINE(double)
FASTRPE_DEFINE(BFloat16)
FASTRPE_DEFINE(Half)
#undef FASTRPE_DEFINE

struct Problem {
  int64_t B, H, L, sets, group, tokens, chunks;
  int d;
  std::vector<Pattern> patterns;  // one, or one for each set
  std::vector<Factors> factors;
  const double* theta;

  const Pattern& pattern(int64_t set) const {
    return patterns[patterns.size() > 1 ? set : 0];
  }
};

void check_index(const char* name, const Tensor& x, ScalarType dtype, int64_t numel) {
  STD_TORCH_CHECK(x.scalar_type() == dtype && x.is_contiguous() && !x.is_cuda() && x.numel() == numel,
                  "sparse_cayley: ", name, " does not belong to this pattern");
}

Problem problem_of(const Tensor& x, const Tensor& theta, const Tensor& pairs, const Tensor& order, const Tensor& start,
                   const Tensor& rows, const Tensor& slots) {
  STD_TORCH_CHECK(x.dim() == 4 && theta.dim() == 2, "sparse_cayley: x and theta must have 4 and 2 dimensions");
  Problem problem;
  problem.B = x.size(0), problem.H = x.size(1), problem.L = x.size(2), problem.d = static_cast<int>(x.size(3));
  problem.sets = theta.size(0);
  STD_TORCH_CHECK(problem.sets > 0 && problem.H % problem.sets == 0, "sparse_cayley: theta has the wrong heads");
  problem.group = problem.H / problem.sets;
  problem.tokens = problem.B * problem.group * problem.L;
  const int64_t tiles = (problem.tokens + tile - 1) / tile;
  problem.chunks = std::min(max_chunks, tiles);
  const int64_t K = theta.size(1), d = problem.d, count = order.size(0);
  STD_TORCH_CHECK(count == 1 || count == problem.sets, "sparse_cayley: order has the wrong heads");
  check_index("theta", theta, ScalarType::Double, problem.sets * K);
  check_index("pairs", pairs, ScalarType::Long, count * K * 2);
  check_index("order", order, ScalarType::Int, count * d);
  check_index("start", start, ScalarType::Long, count * (d + 1));
  check_index("rows", rows, ScalarType::Int, rows.numel());
  check_index("slots", slots, ScalarType::Long, count * K);
  for (int64_t i = 0; i < count; ++i) {
    problem.patterns.push_back({problem.d, K, static_cast<const int32_t*>(order.const_data_ptr()) + i * d,
                                static_cast<const int64_t*>(start.const_data_ptr()) + i * (d + 1),
                                static_cast<const int32_t*>(rows.const_data_ptr()),
                                static_cast<const int64_t*>(slots.const_data_ptr()) + i * K,
                                static_cast<const int64_t*>(pairs.const_data_ptr()) + i * K * 2});
  }
  problem.theta = static_cast<const double*>(theta.const_data_ptr());
  problem.factors.resize(problem.sets);
  torch::stable::parallel_for(0, problem.tokens ? problem.sets : 0, 1, [&](int64_t begin, int64_t end) {
    for (int64_t set = begin; set < end; ++set) {
      const Pattern& p = problem.pattern(set);
      Factors& f = problem.factors[set];
      const int64_t entries = p.start[d] - p.start[0];
      f.lower.resize(entries), f.upper.resize(entries), f.inverse_diagonal.resize(d);
      factorise(p, problem.theta + set * K, f.lower.data(), f.upper.data(), f.inverse_diagonal.data());
    }
  });
  return problem;
}

// Where a token of a set lies: its tokens are numbered by batch, query head of the group, length.
struct Place {
  int64_t b, h, l;

  Place(const Problem& problem, int64_t set, int64_t token)
      : b(token / (problem.group * problem.L)),
        h(set * problem.group + token / problem.L % problem.group),
        l(token % problem.L) {}

  void advance(const Problem& problem, int64_t set) {
    if (++l == problem.L) {
      l = 0;
      if (++h == (set + 1) * problem.group) {
        h -= problem.group;
        ++b;
      }
    }
  }
};

// Rows of a (B, H, L, d) tensor with any strides.
template <typename T>
struct View {
  T* data;
  int64_t b, h, l, stride;

  T* at(const Place& place) const {
    return data + place.b * b + place.h * h + place.l * l;
  }
};

template <typename T>
View<const T> input(const Tensor& x) {
  return {static_cast<const T*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

template <typename T>
View<T> output(Tensor& x) {
  return {static_cast<T*>(x.mutable_data_ptr()), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

template <typename T>
struct Solver {
  const Problem& problem;
  int64_t set;
  const Pattern& p;
  const Factors& f;
  std::vector<double> kept, rest;

  Solver(const Problem& problem, int64_t set)
      : problem(problem), set(set), p(problem.pattern(set)), f(problem.factors[set]) {
    if (std::is_same_v<T, double>) {
      kept.resize(int64_t(p.d) * tile), rest.resize(int64_t(p.d) * tile);
    }
  }

  void operator()(bool adjoint, double* w) {
    const double* theta = problem.theta + set * p.K;
    const int64_t size = int64_t(p.d) * tile;
    if (std::is_same_v<T, double>) {
      std::copy(w, w + size, kept.data());
    }
    run(adjoint, w);
    // Without pivots the factors of a large S grow as |S|^2: one refinement gives a float64 result its last digits.
    if (std::is_same_v<T, double>) {
      residual(p, theta, adjoint ? -1 : 1, kept.data(), w, rest.data());
      run(adjoint, rest.data());
      for (int64_t i = 0; i < size; ++i) {
        w[i] += rest[i];
      }
    }
  }

  void run(bool adjoint, double* w) const {
    const double *lower = f.lower.data(), *upper = f.upper.data();
    solve(p, adjoint ? upper : lower, adjoint ? lower : upper, f.inverse_diagonal.data(), w);
  }
};

// f(set, chunk, first, last) for all chunks of whole tiles of all heads; the split does not depend on the threads.
template <typename F>
void run_chunks(const Problem& problem, const F& f) {
  const int64_t tiles = (problem.tokens + tile - 1) / tile, chunks = problem.chunks;
  torch::stable::parallel_for(0, problem.sets * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t chunk = index % chunks;
      f(index / chunks, chunk, chunk * tiles / chunks * tile,
        std::min(problem.tokens, (chunk + 1) * tiles / chunks * tile));
    }
  });
}

}  // namespace

Tensor sparse_cayley_cpu(const Tensor& x,      // (B, H, L, d)
                         const Tensor& theta,  // (Hk, K) float64
                         const Tensor& pairs,  // (1 or Hk, K, 2)
                         const Tensor& order,  // (1 or Hk, d) int32
                         const Tensor& start,  // (1 or Hk, d + 1)
                         const Tensor& rows,   // (nonzeros,) int32
                         const Tensor& slots,  // (1 or Hk, K)
                         bool inverse) {
  const Problem problem = problem_of(x, theta, pairs, order, start, rows, slots);
  Tensor y = new_empty_like(x);
  dispatch_float(x.scalar_type(), "sparse_cayley", [&](auto zero) {
    using T = decltype(zero);
    const View<const T> from = input<T>(x);
    const View<T> to = output<T>(y);
    run_chunks(problem, [&](int64_t set, int64_t, int64_t first, int64_t last) {
      Solver<T> solver(problem, set);
      std::vector<double> w(int64_t(problem.d) * tile);
      const T* in[tile];
      T* out[tile];
      Place place(problem, set, first);
      for (int64_t token = first; token < last; token += tile) {
        const int n = static_cast<int>(std::min<int64_t>(tile, last - token));
        for (int t = 0; t < n; ++t, place.advance(problem, set)) {
          in[t] = from.at(place);
          out[t] = to.at(place);
        }
        gather(in, n, problem.d, from.stride, w.data());
        solver(inverse, w.data());
        scatter(in, n, problem.d, from.stride, w.data(), out);
      }
    });
  });
  return y;
}

// Gradients of x and theta; an empty tensor where theta's is not needed.
std::tuple<Tensor, Tensor> sparse_cayley_bwd_cpu(const Tensor& dy,     // (B, H, L, d)
                                                 const Tensor& x,      // (B, H, L, d)
                                                 const Tensor& theta,  // (Hk, K) float64
                                                 const Tensor& pairs, const Tensor& order, const Tensor& start,
                                                 const Tensor& rows, const Tensor& slots, bool inverse) {
  check_like("sparse_cayley_bwd", "dy", dy, x.scalar_type(), x);
  const Problem problem = problem_of(x, theta, pairs, order, start, rows, slots);
  STD_TORCH_CHECK(dy.sizes().equals(x.sizes()), "sparse_cayley_bwd: dy must have the shape of x");
  Tensor dx = new_empty_like(x), dtheta = new_empty_like(theta);
  const int64_t K = theta.size(1), size = int64_t(problem.d) * tile;
  std::vector<double> sums(problem.sets * problem.chunks * K);
  dispatch_float(x.scalar_type(), "sparse_cayley_bwd", [&](auto zero) {
    using T = decltype(zero);
    const View<const T> from = input<T>(x), upstream = input<T>(dy);
    const View<T> to = output<T>(dx);
    run_chunks(problem, [&](int64_t set, int64_t chunk, int64_t first, int64_t last) {
      Solver<T> solver(problem, set);
      std::vector<double> u(size), w(size);
      const T *in[tile], *up[tile];
      T* out[tile];
      Place place(problem, set, first);
      for (int64_t token = first; token < last; token += tile) {
        const int n = static_cast<int>(std::min<int64_t>(tile, last - token));
        for (int t = 0; t < n; ++t, place.advance(problem, set)) {
          in[t] = from.at(place);
          up[t] = upstream.at(place);
          out[t] = to.at(place);
        }
        if (n < tile) {  // lanes without a token take part in the sums
          std::fill(u.begin(), u.end(), 0.0);
          std::fill(w.begin(), w.end(), 0.0);
        }
        gather(in, n, problem.d, from.stride, u.data());
        solver(inverse, u.data());
        gather(up, n, problem.d, upstream.stride, w.data());
        solver(!inverse, w.data());
        scatter(up, n, problem.d, upstream.stride, w.data(), out);
        add_gradient(problem.pattern(set), inverse ? u.data() : w.data(), inverse ? w.data() : u.data(),
                     sums.data() + (set * problem.chunks + chunk) * K);
      }
    });
  });
  double* total = static_cast<double*>(dtheta.mutable_data_ptr());
  for (int64_t set = 0; set < problem.sets; ++set, total += K) {
    std::fill(total, total + K, 0.0);
    for (int64_t chunk = 0; chunk < problem.chunks; ++chunk) {
      const double* part = sums.data() + (set * problem.chunks + chunk) * K;
      for (int64_t k = 0; k < K; ++k) {
        total[k] += part[k];
      }
    }
  }
  return {dx, dtheta};
}

}  // namespace sparse_cayley
}  // namespace fastrpe

STABLE_TORCH_LIBRARY_FRAGMENT(fastrpe_native, m) {
  m.def(
      "sparse_cayley(Tensor x, Tensor theta, Tensor pairs, Tensor order, Tensor start, Tensor rows, Tensor slots, "
      "bool inverse) -> Tensor");
  m.def(
      "sparse_cayley_bwd(Tensor dy, Tensor x, Tensor theta, Tensor pairs, Tensor order, Tensor start, Tensor rows, "
      "Tensor slots, bool inverse) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastrpe_native, CPU, m) {
  m.impl("sparse_cayley", TORCH_BOX(&fastrpe::sparse_cayley::sparse_cayley_cpu));
  m.impl("sparse_cayley_bwd", TORCH_BOX(&fastrpe::sparse_cayley::sparse_cayley_bwd_cpu));
}
