#include "features_cpu.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "../common/vector.h"
#include "features.h"

namespace fastrpe {
namespace features {
namespace {

constexpr int64_t block_rows = 32;  // rows projected at a time: x, p and y stay in cache
constexpr int64_t max_parts = 64;   // tasks that keep sums over rows of their own

struct Shape {
  int64_t B, H, L, D, M, F;
  int64_t sets;  // projections: 1, or one for each head
  Kind kind;
  Stabilizer stabilizer;
  bool has_omega;
  double scale, eps, root, factor;  // of omega: root = sqrt(1 - 4 a); of y: factor

  int64_t blocks() const {
    return (L + block_rows - 1) / block_rows;
  }
  int64_t items() const {  // blocks of one projection
    return sets ? B * (H / sets) * blocks() : 0;
  }
  int64_t grain() const {
    return std::max<int64_t>(1, (int64_t{1} << 18) / (block_rows * M * D + 1));
  }
};

struct Strides {
  int64_t b, h, l, d;
};

template <typename T>
struct View {
  const T* data;
  Strides stride;

  explicit View(const Tensor& x)
      : data(static_cast<const T*>(x.const_data_ptr())), stride{x.stride(0), x.stride(1), x.stride(2), x.stride(3)} {}

  const T* at(int64_t b, int64_t h, int64_t l) const {
    return data + b * stride.b + h * stride.h + l * stride.l;
  }
};

// What a block needs of its shape, and memory for it.
template <typename A>
struct Block {
  Kind kind;
  Stabilizer stabilizer;
  bool has_omega;
  int64_t D, M, F, wide_D, wide_M, wide_F;
  A scale, eps, factor;
  std::vector<A> x, p, row;

  explicit Block(const Shape& s)
      : kind(s.kind),
        stabilizer(s.stabilizer),
        has_omega(s.has_omega),
        D(s.D),
        M(s.M),
        F(s.F),
        wide_D(padded<A>(s.D)),
        wide_M(padded<A>(s.M)),
        wide_F(padded<A>(s.F)),
        scale(static_cast<A>(s.scale)),
        eps(static_cast<A>(s.eps)),
        factor(static_cast<A>(s.factor)),
        x(block_rows * wide_D),
        p(block_rows * wide_M),
        row(2 * wide_F) {}
};

template <typename T>
FASTRPE_HD void load_row(const T* from, int64_t step, int64_t n, acc_t<T>* to) {
  if (step == 1) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      to[i] = from[i];
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      to[i] = from[i * step];
    }
  }
}

template <typename T>
FASTRPE_HD void store_row(const acc_t<T>* from, int64_t n, T* to) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    to[i] = static_cast<T>(from[i]);
  }
}

// x as it is, (n, wide_D), and p = W x plus the bias, (n, wide_M).
template <int bytes, typename T, typename A = acc_t<T>>
FASTRPE_HD void project_rows(Block<A>& b, const T* x, int64_t xl, int64_t xd, int64_t n, const A* omega,
                             const A* bias) {
  for (int64_t i = 0; i < n; ++i) {
    load_row(x + i * xl, xd, b.D, b.x.data() + i * b.wide_D);
  }
  A* p = b.p.data();
  if (b.has_omega) {
    multiply<bytes>(p, b.wide_M, b.x.data(), b.wide_D, 1, omega, b.wide_M, n, b.wide_M, b.D, false);
  } else {
#pragma GCC ivdep
    for (int64_t i = 0; i < n * b.wide_M; ++i) {
      p[i] = b.scale * b.x[i];
    }
  }
  if (b.kind != Kind::trigonometric) {
    for (int64_t i = 0; i < n; ++i) {
#pragma GCC ivdep
      for (int64_t m = 0; m < b.wide_M; ++m) {
        p[i * b.wide_M + m] += bias[m];
      }
    }
  }
}

// Of row i of a projected block: |x|^2 / 2 where the kind has it, and the largest of its exponents before that.
template <int bytes, typename A>
FASTRPE_HD A half_norm(const Block<A>& b, int64_t i) {
  const A* x = b.x.data() + i * b.wide_D;
  return has_norm(b.kind) ? b.scale * b.scale / 2 * dot<bytes>(x, x, b.wide_D) : A(0);
}

template <int bytes, typename A>
FASTRPE_HD A largest(Block<A>& b, int64_t i) {
  const A* p = b.p.data() + i * b.wide_M;
  if (b.kind != Kind::hyperbolic) {
    return largest_of<bytes>(p, b.wide_M);
  }
  A* size = b.row.data();
#pragma GCC ivdep
  for (int64_t m = 0; m < b.wide_M; ++m) {
    size[m] = m < b.M ? std::fabs(p[m]) : A(0);
  }
  return largest_of<bytes>(size, b.wide_M);
}

// The largest exponent of n rows.
template <int bytes, typename T, typename A = acc_t<T>>
FASTRPE_HD A largest_rows(Block<A>& b, const T* x, int64_t xl, int64_t xd, int64_t n, const A* omega, const A* bias) {
  project_rows<bytes>(b, x, xl, xd, n, omega, bias);
  A most = -std::numeric_limits<A>::infinity();
  for (int64_t i = 0; i < n; ++i) {
    const A norm = half_norm<bytes>(b, i);
    most = std::max(most, b.kind == Kind::trigonometric ? norm : largest<bytes>(b, i) - norm);
  }
  return most;
}

// y of n rows, side by side.
template <int bytes, typename T, typename A = acc_t<T>>
FASTRPE_HD void forward_rows(Block<A>& b, const T* x, int64_t xl, int64_t xd, int64_t n, const A* omega, const A* bias,
                             A head_most, T* y) {
  project_rows<bytes>(b, x, xl, xd, n, omega, bias);
  const int64_t M = b.M;
  const A factor = b.factor, eps = b.eps;
  A* other = b.row.data() + b.wide_F;
  for (int64_t i = 0; i < n; ++i, y += b.F) {
    A* p = b.p.data() + i * b.wide_M;
    A shift = half_norm<bytes>(b, i);  // what is subtracted from the exponents
    if (b.kind == Kind::trigonometric) {
      shift = b.stabilizer == Stabilizer::row ? A(0) : head_most - shift;
      const A size = factor * exponential(-shift);
#pragma GCC ivdep
      for (int64_t m = 0; m < M; ++m) {
        A c, s;
        cos_sin(p[m], c, s);
        p[m] = size * c;
        other[m] = size * s;
      }
      store_row(other, M, y + M);
    } else if (b.kind == Kind::relu) {
#pragma GCC ivdep
      for (int64_t m = 0; m < M; ++m) {
        p[m] = (p[m] <= 0 ? A(0) : p[m]) + eps;
      }
    } else if (b.kind == Kind::elu) {
#pragma GCC ivdep
      for (int64_t m = 0; m < M; ++m) {
        p[m] = positive_elu(p[m]) + eps;
      }
    } else {
      // Where a row subtracts its largest, its norm cancels.
      shift = b.stabilizer == Stabilizer::row ? largest<bytes>(b, i) : shift + head_most;
      if (b.kind == Kind::hyperbolic) {
#pragma GCC ivdep
        for (int64_t m = 0; m < M; ++m) {
          other[m] = factor * (exponential(-p[m] - shift) + eps);
        }
        store_row(other, M, y + M);
      }
#pragma GCC ivdep
      for (int64_t m = 0; m < M; ++m) {
        p[m] = factor * (exponential(p[m] - shift) + eps);
      }
    }
    store_row(p, M, y);
  }
}

// dx of n rows, side by side; what p's gradients add to the sums over rows, where those are asked for.
template <int bytes, typename T, typename A = acc_t<T>>
FASTRPE_HD void backward_rows(Block<A>& b, const T* dy, int64_t dyl, int64_t dyd, const A* y, const T* x, int64_t xl,
                              int64_t xd, int64_t n, const A* omega, T* dx, A* outer, A* total) {
  const int64_t M = b.M;
  const A floor = b.factor * b.eps, eps = b.eps;
  A norm_gradient[block_rows];
  A *up = b.row.data(), *sizes = up + b.wide_F;
  for (int64_t i = 0; i < n; ++i, y += b.F) {
    load_row(x + i * xl, xd, b.D, b.x.data() + i * b.wide_D);
    load_row(dy + i * dyl, dyd, b.F, up);
    A* dp = b.p.data() + i * b.wide_M;
    norm_gradient[i] = 0;
    if (is_exponential(b.kind)) {
#pragma GCC ivdep
      for (int64_t f = 0; f < b.F; ++f) {
        sizes[f] = up[f] * (y[f] - floor);
      }
#pragma GCC ivdep
      for (int64_t m = 0; m < M; ++m) {
        dp[m] = b.kind == Kind::hyperbolic ? sizes[m] - sizes[M + m] : sizes[m];
      }
      norm_gradient[i] = b.kind == Kind::exp ? A(0) : -sum_of<bytes>(sizes, b.wide_F);
    } else if (b.kind == Kind::trigonometric) {
#pragma GCC ivdep
      for (int64_t f = 0; f < b.F; ++f) {
        sizes[f] = up[f] * y[f];
      }
#pragma GCC ivdep
      for (int64_t m = 0; m < M; ++m) {
        dp[m] = up[M + m] * y[m] - up[m] * y[M + m];
      }
      norm_gradient[i] = sum_of<bytes>(sizes, b.wide_F);
    } else if (b.kind == Kind::relu) {
#pragma GCC ivdep
      for (int64_t m = 0; m < M; ++m) {
        dp[m] = y[m] > eps ? up[m] : A(0);
      }
    } else {
#pragma GCC ivdep
      for (int64_t m = 0; m < M; ++m) {
        const A size = y[m] - eps;
        dp[m] = up[m] * (size > 1 ? A(1) : size);
      }
    }
  }
  const A *dp = b.p.data(), *z = b.x.data();
  A* dz = b.row.data();
  if (outer) {
    multiply<bytes>(outer, b.wide_D, dp, 1, b.wide_M, z, b.wide_D, M, b.wide_D, n, true);
    for (int64_t i = 0; i < n; ++i) {
#pragma GCC ivdep
      for (int64_t m = 0; m < M; ++m) {
        total[m] += dp[i * b.wide_M + m];
      }
    }
  }
  for (int64_t i = 0; i < n; i += 4) {
    const int64_t rows = std::min<int64_t>(4, n - i);
    if (b.has_omega) {
      multiply<bytes>(dz, b.wide_D, dp + i * b.wide_M, b.wide_M, 1, omega, b.wide_D, rows, b.wide_D, M, false);
    } else {
#pragma GCC ivdep
      for (int64_t j = 0; j < rows * b.wide_D; ++j) {
        dz[j] = b.scale * dp[i * b.wide_M + j];
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const A more = b.scale * b.scale * norm_gradient[i + r];
#pragma GCC ivdep
      for (int64_t d = 0; d < b.D; ++d) {
        dz[r * b.wide_D + d] += more * z[(i + r) * b.wide_D + d];
      }
      store_row(dz + r * b.wide_D, b.D, dx + (i + r) * b.D);
    }
  }
}

// Butterflies over rows of D, in place.
template <typename A>
FASTRPE_HD void butterflies(A* x, int64_t D, A scale) {
  for (int64_t half = 1; half < D; half *= 2) {
    for (int64_t first = 0; first < D; first += 2 * half) {
      A *a = x + first, *b = a + half;
#pragma GCC ivdep
      for (int64_t i = 0; i < half; ++i) {
        const A u = a[i], v = b[i];
        a[i] = u + v;
        b[i] = u - v;
      }
    }
  }
#pragma GCC ivdep
  for (int64_t i = 0; i < D; ++i) {
    x[i] *= scale;
  }
}

#define FASTRPE_DEFINE(TARGET, bytes, T)                                                                               \
  TARGET acc_t<T> largest_block(Block<acc_t<T>>& b, const T* x, int64_t xl, int64_t xd, int64_t n,                     \
                                const acc_t<T>* omega, const acc_t<T>* bias) {                                         \
    return largest_rows<bytes>(b, x, xl, xd, n, omega, bias);                                                          \
  }                                                                                                                    \
  TARGET void forward_block(Block<acc_t<T>>& b, const T* x, int64_t xl, int64_t xd, int64_t n, const acc_t<T>* omega,  \
                            const acc_t<T>* bias, acc_t<T> head_most, T* y) {                                          \
    forward_rows<bytes>(b, x, xl, xd, n, omega, bias, head_most, y);                                                   \
  }                                                                                                                    \
  TARGET void backward_block(Block<acc_t<T>>& b, const T* dy, int64_t dyl, int64_t dyd, const acc_t<T>* y, const T* x, \
                             int64_t xl, int64_t xd, int64_t n, const acc_t<T>* omega, T* dx, acc_t<T>* outer,         \
                             acc_t<T>* total) {                                                                        \
    backward_rows<bytes>(b, dy, dyl, dyd, y, x, xl, xd, n, omega, dx, outer, total);                                   \
  }                                                                                                                    \
  TARGET void fwht_rows(const T* x, int64_t n, int64_t D, acc_t<T> scale, acc_t<T>* row, T* y) {                       \
    for (int64_t i = 0; i < n; ++i) {                                                                                  \
      load_row(x + i * D, 1, D, row);                                                                                  \
      butterflies(row, D, scale);                                                                                      \
      store_row(row, D, y + i * D);                                                                                    \
    }                                                                                                                  \
  }
FASTRPE_FOR_TARGETS(FASTRPE_DEFINE, float)
FASTRPE_FOR_TARGETS(FASTRPE_DEFINE, double)
FASTRPE_FOR_TARGETS(FASTRPE_DEFINE, BFloat16)
FASTRPE_FOR_TARGETS(FASTRPE_DEFINE, Half)
#undef FASTRPE_DEFINE

void check_dim(const char* op, const Tensor& x, int64_t dim) {
  STD_TORCH_CHECK(x.dim() == dim, op, ": tensors must have shapes (B, H, L, D) and (H, M, D)");
}

Shape shape_of(const char* op, const Tensor& x, const std::optional<Tensor>& omega, int64_t kind, double scale,
               double eps, const std::optional<Tensor>& a, int64_t stabilizer) {
  check_dim(op, x, 4);
  const ScalarType acc = acc_dtype(x.scalar_type());
  Shape s{};
  s.B = x.size(0);
  s.H = x.size(1);
  s.L = x.size(2);
  s.D = s.M = x.size(3);
  s.sets = 1;
  s.kind = static_cast<Kind>(kind);
  s.stabilizer = static_cast<Stabilizer>(stabilizer);
  s.has_omega = omega.has_value();
  if (omega) {
    check_like(op, "omega", *omega, acc, x);
    const int64_t n = omega->dim();
    STD_TORCH_CHECK(
        omega->is_contiguous() && (n == 2 || (n == 3 && omega->size(0) == s.H)) && omega->size(n - 1) == s.D, op,
        ": omega must be contiguous, with shape (M, D) or (H, M, D)");
    s.M = omega->size(n - 2);
    s.sets = n == 3 ? s.H : 1;
  }
  s.F = is_pair(s.kind) ? 2 * s.M : s.M;
  s.scale = scale;
  s.eps = eps;
  double value = 0;
  if (a) {
    check_like(op, "a", *a, acc, x);
    STD_TORCH_CHECK(a->numel() == 1, op, ": a must have one element");
    value = acc == ScalarType::Double ? *static_cast<const double*>(a->const_data_ptr())
                                      : *static_cast<const float*>(a->const_data_ptr());
  }
  s.root = std::sqrt(1 - 4 * value);
  s.factor = constant(s.kind, s.M, s.D, value);
  return s;
}

// omega as the kernels read it, times scale and root: (sets, D, wide_M) for the forward, (sets, M, wide_D) for the
// backward; and what is added to p: OPRF's a |w|^2, and beyond M nothing that could be the largest.
template <typename A>
struct Projection {
  std::vector<A> omega, bias;
  int64_t size, wide_M;

  Projection(const Shape& s, const std::optional<Tensor>& w, bool transposed)
      : size(transposed ? s.D * padded<A>(s.M) : s.M * padded<A>(s.D)), wide_M(padded<A>(s.M)) {
    bias.assign(s.sets * wide_M, A(0));
    for (int64_t i = 0; i < s.sets; ++i) {
      std::fill(bias.begin() + i * wide_M + s.M, bias.begin() + (i + 1) * wide_M, -std::numeric_limits<A>::infinity());
    }
    if (!w) {
      return;
    }
    const A* from = static_cast<const A*>(w->const_data_ptr());
    const A factor = static_cast<A>(s.scale * s.root), a = static_cast<A>((1 - s.root * s.root) / 4);
    omega.assign(s.sets * size, A(0));
    for (int64_t i = 0; i < s.sets; ++i) {
      for (int64_t m = 0; m < s.M; ++m) {
        A square = 0;
        for (int64_t d = 0; d < s.D; ++d) {
          const A value = from[(i * s.M + m) * s.D + d];
          omega[i * size + (transposed ? d * wide_M + m : m * padded<A>(s.D) + d)] = factor * value;
          square += value * value;
        }
        if (s.kind == Kind::oprf) {
          bias[i * wide_M + m] = a * square;
        }
      }
    }
  }
};

// Where a block of rows lies: `index` counts the blocks of one projection.
struct Place {
  int64_t b, h, l, n;

  Place(const Shape& s, int64_t set, int64_t index)
      : b(index / s.blocks() / (s.H / s.sets)),
        h(set + index / s.blocks() % (s.H / s.sets)),
        l(index % s.blocks() * block_rows),
        n(std::min(block_rows, s.L - l)) {}

  int64_t head(const Shape& s) const {
    return b * s.H + h;
  }
  int64_t row(const Shape& s) const {
    return head(s) * s.L + l;
  }
};

}  // namespace

Tensor random_features_cpu(const Tensor& x, const std::optional<Tensor>& omega, int64_t kind, double scale, double eps,
                           const std::optional<Tensor>& a, int64_t stabilizer) {
  const char* op = "random_features";
  const Shape s = shape_of(op, x, omega, kind, scale, eps, a, stabilizer);
  Tensor y = new_empty(x, {s.B, s.H, s.L, s.F}, x.scalar_type());
  if (x.numel() == 0) {
    STD_TORCH_CHECK(y.numel() == 0, op, ": x must have D > 0");
    return y;
  }
  dispatch_float(x.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const Projection<A> w(s, omega, true);
    const View<T> from(x);
    T* to = static_cast<T*>(y.mutable_data_ptr());
    const int64_t items = s.items();
    const auto each_block = [&](const auto& f) {
      torch::stable::parallel_for(0, s.sets * items, s.grain(), [&](int64_t begin, int64_t end) {
        Block<A> block(s);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t set = i / items;
          f(block, Place(s, set, i % items), w.omega.data() + set * w.size, w.bias.data() + set * w.wide_M, i);
        }
      });
    };
    std::vector<A> most(s.B * s.H, A(0));
    if (s.stabilizer == Stabilizer::global) {
      std::vector<A> part(s.sets * items);
      each_block([&](Block<A>& block, const Place& at, const A* W, const A* bias, int64_t i) {
        part[i] = largest_block(block, from.at(at.b, at.h, at.l), from.stride.l, from.stride.d, at.n, W, bias);
      });
      std::fill(most.begin(), most.end(), -std::numeric_limits<A>::infinity());
      for (int64_t i = 0; i < s.sets * items; ++i) {
        A& head = most[Place(s, i / items, i % items).head(s)];
        head = std::max(head, part[i]);
      }
    }
    each_block([&](Block<A>& block, const Place& at, const A* W, const A* bias, int64_t) {
      forward_block(block, from.at(at.b, at.h, at.l), from.stride.l, from.stride.d, at.n, W, bias, most[at.head(s)],
                    to + at.row(s) * s.F);
    });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> random_features_bwd_cpu(const Tensor& dy, const Tensor& y, const Tensor& x,
                                                           const std::optional<Tensor>& omega, int64_t kind,
                                                           double scale, double eps, const std::optional<Tensor>& a,
                                                           bool need_sums) {
  const char* op = "random_features_bwd";
  const Shape s = shape_of(op, x, omega, kind, scale, eps, a, 0);
  check_dim(op, dy, 4);
  check_dim(op, y, 4);
  check_like(op, "dy", dy, x.scalar_type(), x);
  check_like(op, "y", y, acc_dtype(x.scalar_type()), x);
  const int64_t sizes[4] = {s.B, s.H, s.L, s.F};
  for (int i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(dy.size(i) == sizes[i] && y.size(i) == sizes[i], op, ": dy and y must have the features' shape");
  }
  STD_TORCH_CHECK(y.is_contiguous(), op, ": y must be contiguous");
  need_sums = need_sums && omega.has_value();
  const ScalarType acc = acc_dtype(x.scalar_type());
  const bool per_head = need_sums && omega->dim() == 3;
  std::vector<int64_t> total_shape{0}, outer_shape{0};
  if (need_sums) {
    total_shape = per_head ? std::vector<int64_t>{s.sets, s.M} : std::vector<int64_t>{s.M};
    outer_shape = total_shape;
    outer_shape.push_back(s.D);
  }
  Tensor dx = new_empty_like(x), outer = new_empty(x, outer_shape, acc), total = new_empty(x, total_shape, acc);
  dispatch_float(x.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const Projection<A> w(s, omega, false);
    const View<T> from(x), up(dy);
    const A* value = static_cast<const A*>(y.const_data_ptr());
    T* to = static_cast<T*>(dx.mutable_data_ptr());
    // Every part writes sums of its own, added in a fixed order below: the same bits with any number of threads.
    const int64_t items = s.items(), wide_D = padded<A>(s.D), wide_M = padded<A>(s.M);
    const int64_t parts =
        need_sums ? std::min(items, std::max<int64_t>(1, max_parts / std::max<int64_t>(1, s.sets))) : items;
    std::vector<A> outers(need_sums ? s.sets * parts * s.M * wide_D : 0),
        totals(need_sums ? s.sets * parts * wide_M : 0);
    const int64_t grain = need_sums ? 1 : s.grain();
    torch::stable::parallel_for(0, s.sets * parts, grain, [&](int64_t begin, int64_t end) {
      Block<A> block(s);
      block.row.resize(std::max<size_t>(block.row.size(), 4 * wide_D));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t set = i / parts, part = i % parts;
        for (int64_t j = items * part / parts; j < items * (part + 1) / parts; ++j) {
          const Place at(s, set, j);
          std::fill(block.row.begin(), block.row.end(), A(0));
          backward_block(block, up.at(at.b, at.h, at.l), up.stride.l, up.stride.d, value + at.row(s) * s.F,
                         from.at(at.b, at.h, at.l), from.stride.l, from.stride.d, at.n, w.omega.data() + set * w.size,
                         to + at.row(s) * s.D, need_sums ? outers.data() + i * s.M * wide_D : nullptr,
                         need_sums ? totals.data() + i * wide_M : nullptr);
        }
      }
    });
    if (need_sums) {
      A *outer_to = static_cast<A*>(outer.mutable_data_ptr()), *total_to = static_cast<A*>(total.mutable_data_ptr());
      for (int64_t set = 0; set < s.sets; ++set) {
        for (int64_t m = 0; m < s.M; ++m) {
          double sum = 0;
          for (int64_t part = set * parts; part < (set + 1) * parts; ++part) {
            sum += totals[part * wide_M + m];
          }
          total_to[set * s.M + m] = static_cast<A>(sum);
          for (int64_t d = 0; d < s.D; ++d) {
            sum = 0;
            for (int64_t part = set * parts; part < (set + 1) * parts; ++part) {
              sum += outers[(part * s.M + m) * wide_D + d];
            }
            outer_to[(set * s.M + m) * s.D + d] = static_cast<A>(s.scale * sum);
          }
        }
      }
    }
  });
  return {dx, outer, total};
}

Tensor fwht_cpu(const Tensor& x, double scale) {
  const char* op = "fwht";
  check_dim(op, x, 2);
  STD_TORCH_CHECK(x.is_contiguous() && x.size(1) > 0 && (x.size(1) & (x.size(1) - 1)) == 0, op,
                  ": x must be contiguous, (rows, D) with D a power of two");
  Tensor y = new_empty_like(x);
  dispatch_float(x.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const int64_t D = x.size(1);
    const T* from = static_cast<const T*>(x.const_data_ptr());
    T* to = static_cast<T*>(y.mutable_data_ptr());
    torch::stable::parallel_for(0, x.size(0), std::max<int64_t>(1, 32768 / D), [&](int64_t begin, int64_t end) {
      std::vector<A> row(D);
      fwht_rows(from + begin * D, end - begin, D, static_cast<A>(scale), row.data(), to + begin * D);
    });
  });
  return y;
}

}  // namespace features
}  // namespace fastrpe
