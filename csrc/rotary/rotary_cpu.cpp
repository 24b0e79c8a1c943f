#include "rotary_cpu.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "../common/clones.h"
#include "rotary_args.h"

namespace fastrpe {
namespace rotary {
namespace {

constexpr int64_t block_rows = 64;   // rows whose phases are held at a time: 32 KiB at R = 64
constexpr int64_t chunk_items = 64;  // items a task rotates with them
constexpr int group = 4;             // items rotated at once

// cos and sin, (n, R), of n positions (n, C); at first they hold the phases.
template <typename A>
FASTRPE_HD void phases_impl(A* c, A* s, const A* position, const A* freqs, int64_t n, int C, int R, A factor, A sign) {
  constexpr int width = 64;  // planes whose frequencies are held in turns at a time
  A hi[width], lo[width];
  for (int m = 0; m < C; ++m) {
    for (int first = 0; first < R; first += width) {
      const int planes = std::min(width, R - first);
#pragma GCC ivdep
      for (int r = 0; r < planes; ++r) {
        const Turns<A> w = turns(freqs[m * R + first + r]);
        hi[r] = w.hi;
        lo[r] = w.lo;
      }
      for (int64_t i = 0; i < n; ++i) {
        const A p = position[i * C + m];
        A *turn = c + i * R + first, *rest = s + i * R + first;
        if (m == 0) {
#pragma GCC ivdep
          for (int r = 0; r < planes; ++r) {
            const Phase<A> phase = product(p, Turns<A>{hi[r], lo[r]});
            turn[r] = phase.turn;
            rest[r] = phase.rest;
          }
        } else {
#pragma GCC ivdep
          for (int r = 0; r < planes; ++r) {
            Phase<A> phase{turn[r], rest[r]};
            add(phase, product(p, Turns<A>{hi[r], lo[r]}));
            turn[r] = phase.turn;
            rest[r] = phase.rest;
          }
        }
      }
    }
  }
#pragma GCC ivdep
  for (int64_t i = 0; i < n * R; ++i) {
    A cos, sin;
    cos_sin(Phase<A>{c[i], s[i]}, cos, sin);
    c[i] = factor * cos;
    s[i] = factor * sign * sin;
  }
}

// The vectors of an item: n rows of x, which are written side by side to y.
template <typename T>
struct Rows {
  const T* x;
  int64_t xl, xd;
  T* y;
};

// `pair` is the distance of a plane's two coordinates, `step` that of two planes.
template <typename T>
FASTRPE_HD void rotate_any_rows(Rows<T> item, int64_t n, const acc_t<T>* c, const acc_t<T>* s, int R, int D, int pair,
                                int step) {
  const T* x = item.x;
  T* y = item.y;
  for (int64_t i = 0; i < n; ++i, x += item.xl, y += D, c += R, s += R) {
    for (int r = 0; r < R; ++r) {
      acc_t<T> a = x[r * step * item.xd], b = x[(r * step + pair) * item.xd];
      turn(a, b, c[r], s[r]);
      y[r * step] = static_cast<T>(a);
      y[r * step + pair] = static_cast<T>(b);
    }
    for (int j = 2 * R; j < D; ++j) {
      y[j] = x[j * item.xd];
    }
  }
}

// The same for whole heads in halves, side by side in memory: what a compiler turns into wide instructions. N items at
// once read cos and sin once, and keep more of the memory's streams busy.
template <int N, typename T>
FASTRPE_HD void rotate_half_rows(const Rows<T>* items, int64_t n, const acc_t<T>* c, const acc_t<T>* s, int R) {
  const T* x[N];
  T* y[N];
  for (int j = 0; j < N; ++j) {
    x[j] = items[j].x;
    y[j] = items[j].y;
  }
  for (int64_t i = 0; i < n; ++i, c += R, s += R) {
#pragma GCC ivdep
    for (int r = 0; r < R; ++r) {
      const acc_t<T> cos = c[r], sin = s[r];
      for (int j = 0; j < N; ++j) {
        acc_t<T> a = x[j][r], b = x[j][R + r];
        turn(a, b, cos, sin);
        y[j][r] = static_cast<T>(a);
        y[j][R + r] = static_cast<T>(b);
      }
    }
    for (int j = 0; j < N; ++j) {
      x[j] += items[j].xl;
      y[j] += 2 * R;
    }
  }
}

template <typename T>
FASTRPE_HD void rotate_group(const Rows<T>* items, int count, int64_t n, const acc_t<T>* c, const acc_t<T>* s, int R) {
  int done = 0;
  if constexpr (!std::is_same_v<T, Half>) {  // whose conversions are so long that compilers give up on more than one
    if (count == group) {
      return rotate_half_rows<group>(items, n, c, s, R);
    }
    if (count >= 2) {
      rotate_half_rows<2>(items, n, c, s, R);
      done = 2;
    }
  }
  for (; done < count; ++done) {
    rotate_half_rows<1>(items + done, n, c, s, R);
  }
}

// dx = R^T dy, and the derivative by the angle added to d_angle; c and s are those of the adjoint.
template <typename T>
FASTRPE_HD void rotate_bwd_row(const T* __restrict dy, int64_t dyd, const T* __restrict x, int64_t xd, T* __restrict dx,
                               const acc_t<T>* __restrict c, const acc_t<T>* __restrict s, acc_t<T>* __restrict d_angle,
                               int R, int D, int pair, int step) {
  for (int r = 0; r < R; ++r) {
    const int i = r * step, j = i + pair;
    acc_t<T> a = dy[i * dyd], b = dy[j * dyd];
    turn(a, b, c[r], s[r]);
    d_angle[r] += acc_t<T>(x[i * xd]) * b - acc_t<T>(x[j * xd]) * a;
    dx[i] = static_cast<T>(a);
    dx[j] = static_cast<T>(b);
  }
  for (int i = 2 * R; i < D; ++i) {
    dx[i] = dy[i * dyd];
  }
}

#define FASTRPE_DEFINE(T)                                                                                              \
  FASTRPE_CLONES void rotate_rows(const Rows<T>* items, int count, int64_t n, const acc_t<T>* c, const acc_t<T>* s,    \
                                  int R, int D, int pair, int step) {                                                  \
    bool plain = step == 1 && 2 * R == D;                                                                              \
    for (int j = 0; j < count; ++j) {                                                                                  \
      plain = plain && items[j].xd == 1;                                                                               \
    }                                                                                                                  \
    if (plain && R == 32) { /* sizes known to the compiler, for the usual heads */                                     \
      rotate_group(items, count, n, c, s, 32);                                                                         \
    } else if (plain && R == 64) {                                                                                     \
      rotate_group(items, count, n, c, s, 64);                                                                         \
    } else if (plain) {                                                                                                \
      rotate_group(items, count, n, c, s, R);                                                                          \
    } else {                                                                                                           \
      for (int j = 0; j < count; ++j) {                                                                                \
        rotate_any_rows(items[j], n, c, s, R, D, pair, step);                                                          \
      }                                                                                                                \
    }                                                                                                                  \
  }                                                                                                                    \
  FASTRPE_CLONES void rotate_bwd_rows(const T* dy, int64_t dyl, int64_t dyd, const T* x, int64_t xl, int64_t xd,       \
                                      T* dx, int64_t n, const acc_t<T>* c, const acc_t<T>* s, acc_t<T>* d_angle,       \
                                      int R, int D, int pair, int step) {                                              \
    for (int64_t i = 0; i < n; ++i) {                                                                                  \
      rotate_bwd_row(dy + i * dyl, dyd, x + i * xl, xd, dx + i * D, c + i * R, s + i * R, d_angle + i * R, R, D, pair, \
                     step);                                                                                            \
    }                                                                                                                  \
  }
FASTRPE_DEFINE(float)
FASTRPE_DEFINE(double)
FASTRPE_DEFINE(BFloat16)
FASTRPE_DEFINE(Half)
#undef FASTRPE_DEFINE

// to[i, j] = sum over n of from[i, n, j].
template <typename A>
void add_up(const A* from, A* to, int64_t outer, int64_t n, int64_t inner) {
  for (int64_t i = 0; i < outer; ++i) {
    std::fill(to + i * inner, to + (i + 1) * inner, A(0));
    for (int64_t m = 0; m < n; ++m) {
      for (int64_t j = 0; j < inner; ++j) {
        to[i * inner + j] += from[(i * n + m) * inner + j];
      }
    }
  }
}

#define FASTRPE_DEFINE(A)                                                                                      \
  FASTRPE_CLONES void phases(A* c, A* s, const A* position, const A* freqs, int64_t n, int C, int R, A factor, \
                             A sign) {                                                                         \
    phases_impl(c, s, position, freqs, n, C, R, factor, sign);                                                 \
  }
FASTRPE_DEFINE(float)
FASTRPE_DEFINE(double)
#undef FASTRPE_DEFINE

// Where the phases come from: positions and frequencies, or tables of cosines and sines.
template <typename A>
struct Source {
  const A* first;   // positions (.., L - prefix, C), or cos (.., L - prefix, R)
  const A* second;  // freqs (sets, C, R), or sin
  bool is_table;
  A factor, sign;

  // Fills (n, R) for rows [row, row + n), which lie in one sequence, behind its prefix.
  void fill(const Shape& shape, int64_t set, int64_t row, int64_t n, A* c, A* s) const {
    const int R = shape.R, C = shape.C;
    const int64_t token = row / shape.L * shape.tokens() + row % shape.L - shape.prefix;
    if (is_table) {
      for (int64_t i = 0; i < n * R; ++i) {
        c[i] = first[token * R + i];
        s[i] = sign * second[token * R + i];
      }
    } else {
      phases(c, s, first + token * C, second + set * C * R, n, C, R, factor, sign);
    }
  }
};

// A task: rows [row, row + n) of one set with items [item, item + items). None crosses a sequence or the prefix's end.
struct Task {
  int64_t index, set, chunk, row, n, item, items;
};

struct Plan {
  const Shape& shape;
  int64_t prefix_blocks, blocks, sequences, chunks;

  explicit Plan(const Shape& shape)
      : shape(shape),
        prefix_blocks((shape.prefix + block_rows - 1) / block_rows),
        blocks(prefix_blocks + (shape.tokens() + block_rows - 1) / block_rows),
        sequences(shape.batch_positions ? shape.B : 1),
        chunks((shape.items() + chunk_items - 1) / chunk_items) {}

  int64_t tasks_per_set() const {
    return sequences * blocks * chunks;
  }

  template <typename F>
  void run(const F& f) const {
    const int64_t work = std::max<int64_t>(1, block_rows * std::min(chunk_items, shape.items()) * shape.D);
    const auto body = [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        const int64_t chunk = index % chunks, block = index / chunks % blocks;
        const int64_t sequence = index / chunks / blocks % sequences, set = index / tasks_per_set();
        const bool head = block < prefix_blocks;
        const int64_t first = head ? block * block_rows : shape.prefix + (block - prefix_blocks) * block_rows;
        const int64_t last = std::min(first + block_rows, head ? shape.prefix : shape.L);
        const int64_t item = chunk * chunk_items;
        f(Task{index, set, chunk, sequence * shape.L + first, last - first, item,
               std::min(shape.items() - item, chunk_items)});
      }
    };
    torch::stable::parallel_for(0, shape.sets * tasks_per_set(), std::max<int64_t>(1, 32768 / work), body);
  }
};

struct Item {
  bool is_query;
  int64_t b, h, l;
};

Item item_at(const Shape& shape, const Task& task, int64_t i) {
  const int64_t b = shape.batch_positions ? task.row / shape.L : i / shape.heads();
  const int64_t j = i % shape.heads(), nq = shape.query_heads();
  return {j < nq, b, j < nq ? task.set * nq + j : task.set * (shape.heads() - nq) + j - nq, task.row % shape.L};
}

template <typename T>
void copy_rows(const View<const T>& x, T* y, const Item& at, int64_t n, int D) {
  for (int64_t i = 0; i < n; ++i) {
    const T* from = x.at(at.b, at.h, at.l + i);
    for (int j = 0; j < D; ++j) {
      y[i * D + j] = from[j * x.stride.d];
    }
  }
}

template <typename A>
Source<A> source_of(const Tensor& first, const Tensor& second, bool is_table, double factor, bool inverse) {
  return {static_cast<const A*>(first.const_data_ptr()), static_cast<const A*>(second.const_data_ptr()), is_table,
          static_cast<A>(factor), static_cast<A>(inverse ? -1 : 1)};
}

std::tuple<Tensor, Tensor> rotate_any(const char* op, const Tensor& q, const Tensor& k, const Tensor& first,
                                      const Tensor& second, bool is_table, bool interleaved, bool inverse,
                                      double factor, int64_t prefix) {
  const Shape shape = shape_of(op, q, k, first, second, prefix, is_table);
  Tensor yq = new_empty_like(q), yk = new_empty_like(k);
  dispatch_float(q.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const auto source = source_of<A>(first, second, is_table, factor, inverse);
    const View<const T> x[2] = {input<T>(k), input<T>(q)};
    const View<T> y[2] = {output<T>(yk), output<T>(yq)};
    const int R = shape.R, D = shape.D, pair = interleaved ? 1 : R, step = interleaved ? 2 : 1;
    Plan(shape).run([&](const Task& task) {
      const std::unique_ptr<A[]> c(new A[block_rows * R]), s(new A[block_rows * R]);
      if (task.row % shape.L >= shape.prefix) {
        source.fill(shape, task.set, task.row, task.n, c.get(), s.get());
      }
      Rows<T> items[group];
      int count = 0;
      for (int64_t i = 0; i < task.items; ++i) {
        const Item at = item_at(shape, task, task.item + i);
        const View<const T>& from = x[at.is_query];
        T* to = y[at.is_query].at(at.b, at.h, at.l);
        if (at.l < shape.prefix) {
          copy_rows(from, to, at, task.n, D);
          continue;
        }
        items[count++] = {from.at(at.b, at.h, at.l), from.stride.l, from.stride.d, to};
        if (count == group || i + 1 == task.items) {
          rotate_rows(items, count, task.n, c.get(), s.get(), R, D, pair, step);
          count = 0;
        }
      }
    });
  });
  return {yq, yk};
}

}  // namespace

std::tuple<Tensor, Tensor> rotate_cpu(const Tensor& q, const Tensor& k, const Tensor& positions, const Tensor& freqs,
                                      bool interleaved, bool inverse, double factor, int64_t prefix) {
  return rotate_any("rotate", q, k, positions, freqs, false, interleaved, inverse, factor, prefix);
}

std::tuple<Tensor, Tensor> rotate_cos_sin_cpu(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                                              bool interleaved, bool inverse, int64_t prefix) {
  return rotate_any("rotate_cos_sin", q, k, cos, sin, true, interleaved, inverse, 1.0, prefix);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rotate_bwd_cpu(const Tensor& dyq, const Tensor& dyk, const Tensor& q,
                                                          const Tensor& k, const Tensor& positions, const Tensor& freqs,
                                                          bool interleaved, bool inverse, double factor, int64_t prefix,
                                                          bool need_positions, bool need_freqs) {
  const char* op = "rotate_bwd";
  const Shape shape = shape_of(op, q, k, positions, freqs, prefix, false);
  check_gradients(op, dyq, dyk, q, k);
  Tensor dq = new_empty_like(q), dk = new_empty_like(k);
  Tensor dpositions = need_positions ? new_empty_like(positions) : new_empty(q, {0}, q.scalar_type());
  Tensor dfreqs = need_freqs ? new_empty_like(freqs) : new_empty(q, {0}, q.scalar_type());
  dispatch_float(q.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const auto source = source_of<A>(positions, freqs, false, factor, !inverse);
    const View<const T> x[2] = {input<T>(k), input<T>(q)}, dy[2] = {input<T>(dyk), input<T>(dyq)};
    const View<T> dx[2] = {output<T>(dk), output<T>(dq)};
    const int R = shape.R, D = shape.D, C = shape.C, pair = interleaved ? 1 : R, step = interleaved ? 2 : 1;
    const A sign = inverse ? -1 : 1;
    const Plan plan(shape);
    const int64_t per_set = plan.tasks_per_set(), points = positions.numel();
    // Every task writes sums of its own, added in a fixed order below: the same bits with any number of threads.
    std::vector<A> freq_sums(need_freqs ? shape.sets * per_set * C * R : 0);
    std::vector<A> position_sums(need_positions ? shape.sets * plan.chunks * points : 0);
    plan.run([&](const Task& task) {
      std::vector<A> c(block_rows * R), s(block_rows * R), d_angle(block_rows * R);
      if (task.row % shape.L >= shape.prefix) {
        source.fill(shape, task.set, task.row, task.n, c.data(), s.data());
      }
      const int64_t l = task.row % shape.L;
      for (int64_t i = task.item; i < task.item + task.items; ++i) {
        const Item at = item_at(shape, task, i);
        const View<const T>&from = x[at.is_query], &upstream = dy[at.is_query];
        T* to = dx[at.is_query].at(at.b, at.h, at.l);
        if (l < shape.prefix) {
          copy_rows(upstream, to, at, task.n, D);
        } else {
          rotate_bwd_rows(upstream.at(at.b, at.h, at.l), upstream.stride.l, upstream.stride.d,
                          from.at(at.b, at.h, at.l), from.stride.l, from.stride.d, to, task.n, c.data(), s.data(),
                          d_angle.data(), R, D, pair, step);
        }
      }
      if (l < shape.prefix) {
        return;
      }
      const int64_t token = task.row / shape.L * shape.tokens() + l - shape.prefix;
      A* freq_sum = freq_sums.data() + task.index * C * R;
      A* position_sum = position_sums.data() + (task.set * plan.chunks + task.chunk) * points + token * C;
      for (int64_t i = 0; i < task.n; ++i) {
        for (int j = 0; j < C; ++j) {
          const A position = source.first[(token + i) * C + j];
          const A* freq = source.second + (task.set * C + j) * R;
          A sum = 0;
          for (int r = 0; r < R; ++r) {
            const A d = sign * d_angle[i * R + r];
            if (need_freqs) {
              freq_sum[j * R + r] += position * d;
            }
            sum += freq[r] * d;
          }
          if (need_positions) {
            position_sum[i * C + j] = sum;
          }
        }
      }
    });
    if (need_freqs) {
      add_up(freq_sums.data(), static_cast<A*>(dfreqs.mutable_data_ptr()), shape.sets, per_set, C * R);
    }
    if (need_positions) {
      add_up(position_sums.data(), static_cast<A*>(dpositions.mutable_data_ptr()), 1, shape.sets * plan.chunks, points);
    }
  });
  return {dq, dk, dpositions, dfreqs};
}

}  // namespace rotary
}  // namespace fastrpe
