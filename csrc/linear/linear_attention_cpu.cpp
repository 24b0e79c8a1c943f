#include "linear_attention_cpu.h"

#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <memory>

#include "feature_map_cpu.h"

// Linear attention on a CPU, from features that live for a block of rows.
//
// Bidirectional: sums over the keys by spans of rows, the spans' sums added in order, then the queries. Causal: blocks
// of rows one after the other, cut into pieces whose keys' features are relative to one exp(c); a query meets the keys
// of its piece pair by pair, those before it as sums. Spans depend on the shape alone: the bits do not depend on the
// threads.
//
// c is the largest exponent of each feature among the keys up to the piece's first row, and the piece ends before the
// first row with an exponent above c + slack. So neither c nor the piece that a row falls into depends on later rows,
// and pairs with them are exactly 0: they change no bit of an earlier row. Nor do they spoil it: no feature is above
// exp(slack), whose products with weights of at most 1 are far from overflow, and the key that set c keeps the
// denominator of positive features at 1 or more. A piece raises some c by the slack or reaches its block's end, so
// there are few.
namespace fastrpe {
namespace linear {
namespace {

// x[b, h, l, d] lies at p[b s0 + h s1 + l s2 + d s3].
template <typename T>
struct View {
  T* p;
  int64_t s[4];

  T* row(int64_t b, int64_t h, int64_t l) const {
    return p + b * s[0] + h * s[1] + l * s[2];
  }
};

template <typename T>
View<const T> input(const Tensor& x) {
  return {static_cast<const T*>(x.const_data_ptr()), {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}};
}

template <typename T>
View<T> output(Tensor& x) {
  return {static_cast<T*>(x.mutable_data_ptr()), {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}};
}

template <typename A>
const A* data(const std::optional<Tensor>& x) {
  return x ? static_cast<const A*>(x->const_data_ptr()) : nullptr;
}

struct Sequence {
  int64_t batch, first, length, first_query, queries;
};

struct Shape {
  int64_t B, H, Hk, L, S, D, V, F, N;
  std::vector<Sequence> sequences;
  bool packed;

  int64_t group() const {
    return H / Hk;
  }
};

// Rows [first, first + n) of a sequence, as one of a number of spans that all sequences are cut into.
struct Span {
  int64_t first, n;
};

struct Cut {
  int64_t spans, rows;

  Cut(int64_t total, int64_t heads, int64_t least = block) {
    spans = std::clamp<int64_t>(32 / std::max<int64_t>(heads, 1), 1, 16);
    rows = std::max((total + spans - 1) / spans, least);
    rows = (rows + block - 1) / block * block;
    spans = std::max<int64_t>((total + rows - 1) / rows, 1);
  }

  Span at(int64_t i, int64_t length) const {
    const int64_t first = std::min(i * rows, length);
    return {first, std::min(rows, length - first)};
  }
};

Shape shape_of(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& omega,
               Kind kind, bool causal, const std::optional<Tensor>& bias, const std::optional<Tensor>& mask,
               const std::optional<Tensor>& cu_seqlens) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, op, ": q, k and v must have 4 dimensions");
  Shape s{q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3), v.size(3), 0, q.size(0), {}, false};
  STD_TORCH_CHECK(k.size(0) == s.B && k.size(3) == s.D && v.size(0) == s.B && v.size(1) == s.Hk && v.size(2) == s.S &&
                      (s.Hk ? s.H % s.Hk == 0 : s.H == 0) && (!causal || s.S == s.L),
                  op, ": k and v must have shapes that fit q");
  check_like(op, "k", k, q.scalar_type(), q);
  check_like(op, "v", v, q.scalar_type(), q);
  STD_TORCH_CHECK(kind >= Kind::positive && kind <= Kind::features, op, ": kind must be one of 8");
  const ScalarType acc = acc_dtype(q.scalar_type());
  int64_t M = s.D;
  if (omega) {
    const int64_t dims = omega->dim();
    STD_TORCH_CHECK(omega->is_contiguous() && omega->scalar_type() == acc && (dims == 2 || dims == 3) &&
                        omega->size(dims - 1) == s.D && (dims == 2 || omega->size(0) == s.Hk),
                    op, ": omega must be contiguous, of the arithmetic's dtype and shape (M, D) or (Hk, M, D)");
    M = omega->size(dims - 2);
    STD_TORCH_CHECK(
        !bias || (bias->is_contiguous() && bias->scalar_type() == acc && bias->numel() * s.D == omega->numel()), op,
        ": bias must be contiguous, of the arithmetic's dtype and shape (M,) or (Hk, M)");
  }
  s.F = kind == Kind::hyperbolic || kind == Kind::trigonometric ? 2 * M : M;
  STD_TORCH_CHECK(
      !mask || (mask->is_contiguous() && mask->scalar_type() == ScalarType::Bool && mask->numel() == s.B * s.S), op,
      ": mask must be contiguous, bool and of shape (B, S)");
  if (!cu_seqlens) {
    for (int64_t b = 0; b < s.B; ++b) {
      s.sequences.push_back({b, 0, s.S, 0, s.L});
    }
    return s;
  }
  STD_TORCH_CHECK(cu_seqlens->is_contiguous() && cu_seqlens->scalar_type() == ScalarType::Int &&
                      cu_seqlens->numel() > 0 && s.B == 1 && s.S == s.L,
                  op, ": cu_seqlens must be contiguous, int32, and of sequences packed into a batch of one");
  const int32_t* at = data<int32_t>(cu_seqlens);
  s.N = cu_seqlens->numel() - 1;
  s.packed = true;
  STD_TORCH_CHECK(at[0] >= 0 && at[s.N] <= s.L, op, ": cu_seqlens must lie between 0 and L");
  for (int64_t i = 0; i < s.N; ++i) {
    STD_TORCH_CHECK(at[i] <= at[i + 1], op, ": cu_seqlens must not fall");
    s.sequences.push_back({0, at[i], at[i + 1] - at[i], at[i], at[i + 1] - at[i]});
  }
  return s;
}

template <typename A>
std::vector<A> padded_rows(const A* from, int64_t rows, int64_t columns, int64_t row) {
  std::vector<A> to(rows * row);
  for (int64_t i = 0; i < rows; ++i) {
    std::copy(from + i * columns, from + (i + 1) * columns, to.data() + i * row);
  }
  return to;
}

// One for each set of heads; omega itself is for the backward alone.
template <typename A>
std::vector<Map<A>> maps_of(const Shape& s, const std::optional<Tensor>& omega, Kind kind, double scale,
                            const std::optional<Tensor>& bias, double eps, bool backward) {
  const int64_t sets = omega && omega->dim() == 3 ? s.Hk : 1;
  std::vector<Map<A>> maps(sets);
  for (int64_t i = 0; i < sets; ++i) {
    Map<A>& map = maps[i];
    map.kind = kind;
    map.projects = omega.has_value();
    map.has_bias = bias.has_value();
    map.D = s.D;
    map.F = s.F;
    map.M = omega ? omega->size(omega->dim() - 2) : s.D;
    map.lx = row_of<A>(s.D);
    map.lf = row_of<A>(s.F);
    map.scale = A(scale);
    map.eps = A(eps);
    map.floor = A(eps > 0 ? std::log(eps) : -INFINITY);
    map.bias.resize(map.lf);
    if (omega) {
      map.omega_t.resize(map.D * map.lf);
      const A* from = data<A>(omega) + i * map.M * map.D;
      transpose(map.omega_t.data(), map.lf, from, map.D, map.M, map.D);
      if (backward) {
        map.omega = padded_rows<A>(from, map.M, map.D, map.lx);
      }
      if (bias) {
        std::copy_n(data<A>(bias) + i * map.M, map.M, map.bias.data());
      }
    }
  }
  return maps;
}

template <typename T, typename A = acc_t<T>>
void load(A* to, int64_t row, const View<const T>& x, int64_t b, int64_t h, int64_t l, int64_t n, int64_t size, A scale,
          const bool* keep) {
  read(to, row, x.row(b, h, l), x.s[2], x.s[3], n, size, scale, keep);
}

template <typename T, typename A = acc_t<T>>
void store(const View<T>& y, int64_t b, int64_t h, int64_t l, int64_t n, int64_t size, const A* from, int64_t row,
           A scale, const A* by) {
  write(y.row(b, h, l), y.s[2], from, row, n, size, scale, by);
}

// A block of rows of q or k: scaled, projected, activated.
template <typename A>
struct Rows {
  const Map<A>& map;
  std::vector<A> x, own, amplitude, shift, with_eps, r, total, dx;  // own: projections, exponents, features

  Rows(const Map<A>& map, int64_t n)  // at most n rows at a time
      : map(map),
        x(n * map.lx),
        own(n * map.lf),
        amplitude(n * map.lf),
        shift(n),
        with_eps(map.eps != 0 ? n * map.lf : 0),
        r(n),
        total(n),
        dx(n * map.lx) {}

  A* features() {
    return map.eps != 0 ? with_eps.data() : own.data();
  }

  template <typename T>
  void read(const View<const T>& from, int64_t b, int64_t h, int64_t l, int64_t n, const bool* keep) {
    load(x.data(), map.lx, from, b, h, l, n, map.D, map.scale, keep);
    if (!map.projects) {
      for (int64_t i = 0; i < n; ++i) {
        std::copy(x.data() + i * map.lx, x.data() + i * map.lx + map.D, own.data() + i * map.lf);
      }
    } else {
      product(own.data(), map.lf, x.data(), map.lx, 1, map.omega_t.data(), map.lf, n, map.M, map.D, false);
    }
    activate(map, own.data(), amplitude.data(), shift.data(), x.data(), n);
  }

  // Features of the keys from row `at` on, relative to c.
  void as_keys(int64_t at, int64_t n, const A* c, const A* add, const bool* keep) {
    const int64_t skip = at * map.lf;
    keys(map, own.data() + skip, features() + skip, amplitude.data() + skip, shift.data() + at, c, add, keep + at, n);
  }

  void as_queries(int64_t n, const A* c) {
    queries(map, own.data(), features(), amplitude.data(), shift.data(), c, r.data(), n);
  }

  // From the gradient d (n, lf) of the features, which is lost: that of x to `to`, those of omega and bias added to
  // `sums`, (M, lx) and (lf,), unless it is null.
  template <typename T>
  void backward(A* d, const View<T>& to, int64_t b, int64_t h, int64_t l, int64_t n, A* sums) {
    activate_bwd(map, d, own.data(), total.data(), n);
    if (sums) {
      product(sums, map.lx, d, 1, map.lf, x.data(), map.lx, map.M, map.D, n, true);
      add_rows(sums + map.M * map.lx, d, map.lf, nullptr, n, map.M);
    }
    if (!map.projects) {
      store(to, b, h, l, n, map.D, d, map.lf, map.scale, static_cast<const A*>(nullptr));
      return;
    }
    product(dx.data(), map.lx, d, map.lf, 1, map.omega.data(), map.lx, n, map.D, map.M, false);
    if (map.has_norm()) {
      subtract_rows(dx.data(), x.data(), total.data(), n, map.lx);
    }
    store(to, b, h, l, n, map.D, dx.data(), map.lx, map.scale, static_cast<const A*>(nullptr));
  }
};

// Sums over keys relative to exp(c): kv (F, lv), or its transpose (V, lf), and z (lf,).
template <typename A>
struct Sums {
  std::vector<A> kv, z, c, most, add;
  std::vector<A> factor;

  Sums(const Map<A>& map, int64_t size)
      : kv(size), z(map.lf), c(map.lf, A(empty)), most(map.lf, A(empty)), add(map.lf), factor(map.lf) {
    if (!map.has_exponent()) {
      std::fill(c.begin(), c.end(), A(0));
      most = c;
      std::fill(add.begin(), add.end(), map.eps);
    }
    raise(map);
  }

  // eps is an exponent, too.
  void raise(const Map<A>& map) {
    if (map.has_exponent() && map.eps != 0) {
      for (int64_t f = 0; f < map.F; ++f) {
        most[f] = std::max(most[f], map.floor);
      }
    }
  }

  void take(const Map<A>& map, const A* log_scale) {
    if (map.has_exponent()) {
      std::copy(log_scale, log_scale + map.F, c.data());
      most = c;
      raise(map);
    }
  }

  // What eps adds to a key's features relative to c.
  void set_add(const Map<A>& map) {
    if (map.has_exponent() && map.eps != 0) {
      for (int64_t f = 0; f < map.F; ++f) {
        add[f] = std::exp(map.floor - c[f]);
      }
    }
  }
};

template <typename T>
struct Problem {
  using A = acc_t<T>;
  Shape s;
  std::vector<Map<A>> maps;
  View<const T> q, k, v;
  const bool* mask;
  bool normalize;
  const A *kv0, *z0, *c0;  // the state before the first key, or null; kv0 also where V is 0
  int64_t lv;

  const Map<A>& map(int64_t head) const {
    return maps[maps.size() > 1 ? head : 0];
  }

  const bool* keep(const Sequence& at, int64_t l) const {
    static const std::vector<char> all(block, 1);
    return mask ? mask + at.batch * s.S + at.first + l : reinterpret_cast<const bool*>(all.data());
  }

  // 1 / denominator, or what undoes r.
  void weigh(const A* den, const A* r, int64_t n, A* weight) const {
    for (int64_t i = 0; i < n; ++i) {
      weight[i] = !normalize ? std::exp(r[i]) : den[i] == 0 ? A(0) : 1 / den[i];
    }
  }

  void read_keys(Rows<A>& rows, A* values, const Sequence& at, int64_t head, int64_t l, int64_t n) const {
    const bool* kept = mask ? keep(at, l) : nullptr;
    rows.read(k, at.batch, head, at.first + l, n, kept);
    load(values, lv, v, at.batch, head, at.first + l, n, s.V, A(1), kept);
  }
};

// The largest exponents of a span's keys, with a span's sums rescaled to them, block by block.
template <typename T, typename A = acc_t<T>>
void sum_keys(const Problem<T>& p, const Map<A>& map, Sums<A>& sums, const Sequence& at, int64_t head, Span span) {
  const int64_t most = std::min(block, span.n);
  Rows<A> rows(map, most);
  std::vector<A> values(most * p.lv), before(map.lf);
  for (int64_t l = span.first; l < span.first + span.n; l += block) {
    const int64_t n = std::min(block, span.first + span.n - l);
    const bool* keep = p.keep(at, l);
    p.read_keys(rows, values.data(), at, head, l, n);
    before = sums.c;
    if (map.has_exponent()) {
      largest_rows(sums.most.data(), rows.own.data(), map.lf, rows.shift.data(), keep, n, map.F);
    }
    sums.c = sums.most;
    sums.set_add(map);
    rescale(sums.kv.data(), p.lv, p.s.V, sums.z.data(), before.data(), sums.c.data(), map.F);
    rows.as_keys(0, n, sums.c.data(), sums.add.data(), keep);
    add_rows(sums.z.data(), rows.features(), map.lf, nullptr, n, map.F);
    product(sums.kv.data(), p.lv, rows.features(), 1, map.lf, values.data(), p.lv, map.F, p.s.V, n, true);
  }
}

template <typename F>
void for_each(int64_t n, const F& f) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      f(i);
    }
  });
}

// The state as it is given and returned, for each sequence and head: (F, V), (F,), (F,).
template <typename A>
struct StateView {
  A *kv, *z, *c;
};

template <typename A>
void unpad_rows(const std::vector<A>& from, int64_t rows, int64_t columns, int64_t row, A* to) {
  for (int64_t i = 0; i < rows; ++i) {
    std::copy(from.data() + i * row, from.data() + i * row + columns, to + i * columns);
  }
}

// Adds to the sums of some keys those of others, which are lost.
template <typename T, typename A = acc_t<T>>
void merge(const Problem<T>& p, Sums<A>& sums, Sums<A>& others) {
  const A none = 0;
  const bool kept = true;
  const std::vector<A> before = sums.c;
  largest_rows(sums.most.data(), others.most.data(), 0, &none, &kept, 1, p.s.F);
  sums.c = sums.most;
  rescale(sums.kv.data(), p.lv, p.s.V, sums.z.data(), before.data(), sums.c.data(), p.s.F);
  rescale(others.kv.data(), p.lv, p.s.V, others.z.data(), others.c.data(), sums.c.data(), p.s.F);
  add_rows(sums.kv.data(), others.kv.data(), 0, nullptr, 1, p.s.F * p.lv);
  add_rows(sums.z.data(), others.z.data(), 0, nullptr, 1, p.s.F);
}

template <typename A>
void give(const Sums<A>& sums, const Shape& s, int64_t lv, StateView<A> state, int64_t i) {
  unpad_rows(sums.kv, s.F, s.V, lv, state.kv + i * s.F * s.V);
  std::copy_n(sums.z.data(), s.F, state.z + i * s.F);
  std::copy_n(sums.c.data(), s.F, state.c + i * s.F);
}

template <typename T, typename A = acc_t<T>>
void full_fwd(const Problem<T>& p, const View<T>& out, StateView<A> state) {
  const Shape& s = p.s;
  const Cut key_cut(s.S, s.N * s.Hk), query_cut(s.L, s.N * s.H);
  std::vector<std::unique_ptr<Sums<A>>> parts(s.N * s.Hk * key_cut.spans);
  for_each(parts.size(), [&](int64_t i) {
    const int64_t head = i / key_cut.spans % s.Hk;
    const Sequence& at = s.sequences[i / key_cut.spans / s.Hk];
    const Map<A>& map = p.map(head);
    parts[i] = std::make_unique<Sums<A>>(map, s.F * p.lv);
    sum_keys(p, map, *parts[i], at, head, key_cut.at(i % key_cut.spans, at.length));
  });
  for_each(s.N * s.Hk, [&](int64_t i) {
    Sums<A>& sums = *parts[i * key_cut.spans];
    for (int64_t j = 1; j < key_cut.spans; ++j) {
      merge(p, sums, *parts[i * key_cut.spans + j]);
    }
    const std::vector<A> before = sums.c;
    sums.c = sums.most;  // eps alone, where there is no key
    rescale(sums.kv.data(), p.lv, s.V, sums.z.data(), before.data(), sums.c.data(), s.F);
    give(sums, s, p.lv, state, i);
  });
  parts.clear();
  for_each(s.N * s.H * query_cut.spans, [&](int64_t i) {
    const int64_t head = i / query_cut.spans % s.H, sums = i / query_cut.spans / s.H * s.Hk + head / s.group();
    const Sequence& at = s.sequences[i / query_cut.spans / s.H];
    const Span span = query_cut.at(i % query_cut.spans, at.queries);
    const Map<A>& map = p.map(head / s.group());
    if (!span.n) {
      return;
    }
    const std::vector<A> kv = padded_rows<A>(state.kv + sums * s.F * s.V, s.F, s.V, p.lv);
    const std::vector<A> z = padded_rows<A>(state.z + sums * s.F, 1, s.F, map.lf);
    const std::vector<A> c = padded_rows<A>(state.c + sums * s.F, 1, s.F, map.lf);
    const int64_t most = std::min(block, span.n);
    Rows<A> rows(map, most);
    std::vector<A> num(most * p.lv), den(block), weight(block);
    for (int64_t l = span.first; l < span.first + span.n; l += block) {
      const int64_t n = std::min(block, span.first + span.n - l);
      rows.read(p.q, at.batch, head, at.first_query + l, n, nullptr);
      rows.as_queries(n, c.data());
      const A* w = rows.features();
      product(num.data(), p.lv, w, map.lf, 1, kv.data(), p.lv, n, s.V, s.F, false);
      dots(den.data(), w, map.lf, z.data(), 0, n, padded<A>(s.F), false);
      p.weigh(den.data(), rows.r.data(), n, weight.data());
      store(out, at.batch, head, at.first_query + l, n, s.V, num.data(), p.lv, A(1), weight.data());
    }
  });
}

// Rows [first, first + n) of a sequence, and the c that their features are held relative to.
template <typename A>
struct Piece {
  int64_t first, n;
  std::vector<A> c;
};

// Pairs of a piece: scores (n, ls), 0 above the diagonal, from queries' and transposed keys' features or values.
constexpr int64_t ls = block + 16;

template <typename A>
void pairs(A* scores, const A* left, int64_t row, const A* right_t, int64_t n, int64_t K) {
  product(scores, ls, left, row, 1, right_t, ls, n, n, K, false);
  for (int64_t i = 0; i < n; ++i) {
    std::fill(scores + i * ls + i + 1, scores + i * ls + padded<A>(n), A(0));
  }
}

// Long sequences are cut where there are few heads: the price is a second look at the keys.
Cut causal_cut(const Shape& s) {
  return {s.L, s.N * s.Hk, 8192};
}

// The sums of the keys before each span, of each sequence and head.
template <typename T, typename A = acc_t<T>>
std::vector<Sums<A>> starts_of(const Problem<T>& p, const Cut& cut) {
  const Shape& s = p.s;
  std::vector<Sums<A>> starts;
  for (int64_t i = 0; i < s.N * s.Hk * cut.spans; ++i) {
    starts.emplace_back(p.map(i / cut.spans % s.Hk), s.F * p.lv);
  }
  for_each(s.N * s.Hk * (cut.spans - 1), [&](int64_t i) {
    const int64_t which = i / (cut.spans - 1), span = i % (cut.spans - 1), head = which % s.Hk;
    const Sequence& at = s.sequences[which / s.Hk];
    sum_keys(p, p.map(head), starts[which * cut.spans + span + 1], at, head, cut.at(span, at.length));
  });
  for_each(s.N * s.Hk, [&](int64_t i) {
    Sums<A>* start = starts.data() + i * cut.spans;
    const Map<A>& map = p.map(i % s.Hk);
    if (p.z0) {
      start->kv = padded_rows<A>(p.kv0 + i * s.F * s.V, s.F, s.V, p.lv);
      start->z = padded_rows<A>(p.z0 + i * s.F, 1, s.F, map.lf);
      start->take(map, p.c0 + i * s.F);
    }
    for (int64_t j = 1; j < cut.spans; ++j) {
      Sums<A> before = start[j - 1];
      merge(p, start[j], before);
    }
  });
  return starts;
}

template <typename T, typename A = acc_t<T>>
void causal_rows(const Problem<T>& p, const View<T>& out, Sums<A>& sums, int64_t i, Span span) {
  const Shape& s = p.s;
  const int64_t head = i % s.Hk;
  const Sequence& at = s.sequences[i / s.Hk];
  const Map<A>& map = p.map(head);
  const int64_t most = std::min(block, span.n);
  Rows<A> key(map, most), query(map, most);
  std::vector<A> values(most * p.lv), phi_t(s.F * ls), scores(most * ls), before(map.lf);
  std::vector<A> num(most * p.lv), den(block), weight(block), ones(ls, A(1));
  for (int64_t l = span.first; l < span.first + span.n; l += block) {
    const int64_t rows = std::min(block, span.first + span.n - l);
    const bool* keep = p.keep(at, l);
    p.read_keys(key, values.data(), at, head, l, rows);
    for (int64_t first = 0, n; first < rows; first += n) {
      before = sums.c;
      n = rows;
      if (map.has_exponent()) {
        n = reach(map, key.own.data() + first * map.lf, key.shift.data() + first, keep + first, rows - first,
                  sums.most.data(), sums.c.data());
        rescale(sums.kv.data(), p.lv, s.V, sums.z.data(), before.data(), sums.c.data(), s.F);
        sums.set_add(map);
      }
      key.as_keys(first, n, sums.c.data(), sums.add.data(), keep);
      const A* phi = key.features() + first * map.lf;
      const A* some = values.data() + first * p.lv;
      transpose(phi_t.data(), ls, phi, map.lf, n, s.F);
      for (int64_t g = 0; g < s.group(); ++g) {
        const int64_t h = head * s.group() + g, row = at.first + l + first;
        query.read(p.q, at.batch, h, row, n, nullptr);
        query.as_queries(n, sums.c.data());
        const A* w = query.features();
        product(num.data(), p.lv, w, map.lf, 1, sums.kv.data(), p.lv, n, s.V, s.F, false);
        dots(den.data(), w, map.lf, sums.z.data(), 0, n, padded<A>(s.F), false);
        pairs(scores.data(), w, map.lf, phi_t.data(), n, s.F);
        dots(den.data(), scores.data(), ls, ones.data(), 0, n, padded<A>(n), true);
        product(num.data(), p.lv, scores.data(), ls, 1, some, p.lv, n, s.V, n, true);
        p.weigh(den.data(), query.r.data(), n, weight.data());
        store(out, at.batch, h, row, n, s.V, num.data(), p.lv, A(1), weight.data());
      }
      add_rows(sums.z.data(), phi, map.lf, nullptr, n, s.F);
      product(sums.kv.data(), p.lv, phi, 1, map.lf, some, p.lv, s.F, s.V, n, true);
    }
  }
  before = sums.c;
  sums.c = sums.most;
  rescale(sums.kv.data(), p.lv, s.V, sums.z.data(), before.data(), sums.c.data(), s.F);
}

template <typename T, typename A = acc_t<T>>
void causal_fwd(const Problem<T>& p, const View<T>& out, StateView<A> state) {
  const Cut cut = causal_cut(p.s);
  std::vector<Sums<A>> sums = starts_of(p, cut);
  for_each(sums.size(), [&](int64_t task) {
    const int64_t i = task / cut.spans, span = task % cut.spans;
    causal_rows(p, out, sums[task], i, cut.at(span, p.s.sequences[i / p.s.Hk].length));
    if (span + 1 == cut.spans) {
      give(sums[task], p.s, p.lv, state, i);
    }
  });
}

// What a backward reads and writes.
template <typename T>
struct Gradients {
  using A = acc_t<T>;
  View<const T> dout;
  View<T> dq, dk, dv;
  const A *dkv, *dz;    // of the state behind the last key, or null
  const A *kv, *z, *c;  // that state
  A *dkv0, *dz0;        // of the state before the first key, or null
  bool need_omega;
  struct Part {
    int64_t head;
    std::vector<A> sums;  // of omega, (M, lx), and bias, (lf,)
  };
  std::vector<Part> parts;  // of each task

  A* part(int64_t task, int64_t head, const Map<A>& map) {
    if (!need_omega) {
      return nullptr;
    }
    parts[task] = {head, std::vector<A>(map.M * map.lx + map.lf)};
    return parts[task].sums.data();
  }
};

// From dots[i] = <dout_i, num_i>: what a pair's derivative is of <dout_i, v_j>, times alpha, and of 1, beta.
template <typename T, typename A = acc_t<T>>
void weigh_bwd(const Problem<T>& p, const A* den, const A* r, const A* dot, int64_t n, A* alpha, A* beta) {
  p.weigh(den, r, n, alpha);
  for (int64_t i = 0; i < n; ++i) {
    beta[i] = p.normalize ? -dot[i] * alpha[i] * alpha[i] : A(0);
  }
}

template <typename A>
void clear_rows(A* x, int64_t row, const bool* keep, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (!keep[i]) {
      std::fill(x + i * row, x + (i + 1) * row, A(0));
    }
  }
}

template <typename T, typename A = acc_t<T>>
void full_bwd(const Problem<T>& p, Gradients<T>& g) {
  const Shape& s = p.s;
  const Cut key_cut(s.S, s.N * s.Hk), query_cut(s.L, s.N * s.Hk);
  const int64_t query_tasks = s.N * s.Hk * query_cut.spans, key_tasks = s.N * s.Hk * key_cut.spans;
  g.parts.resize(query_tasks + key_tasks);
  std::vector<std::vector<A>> sums(query_tasks);  // of the state's gradient: (F, lv), then (lf,)
  for_each(query_tasks, [&](int64_t i) {
    const int64_t state = i / query_cut.spans, head = state % s.Hk;
    const Sequence& at = s.sequences[state / s.Hk];
    const Span span = query_cut.at(i % query_cut.spans, at.queries);
    const Map<A>& map = p.map(head);
    A* part = g.part(i, head, map);
    sums[i].resize(s.F * p.lv + map.lf);
    A *dkv = sums[i].data(), *dz = dkv + s.F * p.lv;
    if (!span.n) {
      return;
    }
    std::vector<A> kv_t(s.V * map.lf);
    transpose(kv_t.data(), map.lf, g.kv + state * s.F * s.V, s.V, s.F, s.V);
    const std::vector<A> z = padded_rows<A>(g.z + state * s.F, 1, s.F, map.lf);
    const std::vector<A> c = padded_rows<A>(g.c + state * s.F, 1, s.F, map.lf);
    Rows<A> query(map, block);
    std::vector<A> dy(block * p.lv), d(block * map.lf), den(block), dot(block), alpha(block), beta(block);
    for (int64_t h = head * s.group(); h < (head + 1) * s.group(); ++h) {
      for (int64_t l = span.first; l < span.first + span.n; l += block) {
        const int64_t n = std::min(block, span.first + span.n - l), row = at.first_query + l;
        query.read(p.q, at.batch, h, row, n, nullptr);
        query.as_queries(n, c.data());
        const A* w = query.features();
        load(dy.data(), p.lv, g.dout, at.batch, h, row, n, s.V, A(1), nullptr);
        product(d.data(), map.lf, dy.data(), p.lv, 1, kv_t.data(), map.lf, n, s.F, s.V, false);
        dots(den.data(), w, map.lf, z.data(), 0, n, padded<A>(s.F), false);
        dots(dot.data(), w, map.lf, d.data(), map.lf, n, padded<A>(s.F), false);
        weigh_bwd(p, den.data(), query.r.data(), dot.data(), n, alpha.data(), beta.data());
        scale_rows(d.data(), map.lf, alpha.data(), beta.data(), z.data(), n, s.F);
        multiply_rows(dy.data(), p.lv, alpha.data(), n, s.V);
        product(dkv, p.lv, w, 1, map.lf, dy.data(), p.lv, s.F, s.V, n, true);
        add_rows(dz, w, map.lf, beta.data(), n, s.F);
        query.backward(d.data(), g.dq, at.batch, h, row, n, part);
      }
    }
  });
  for_each(s.N * s.Hk, [&](int64_t i) {
    const Map<A>& map = p.map(i % s.Hk);
    std::vector<A>& sum = sums[i * query_cut.spans];
    for (int64_t j = 1; j < query_cut.spans; ++j) {
      add_rows(sum.data(), sums[i * query_cut.spans + j].data(), 0, nullptr, 1, s.F * p.lv + map.lf);
    }
    for (int64_t f = 0; f < s.F; ++f) {
      if (g.dkv) {
        add_rows(sum.data() + f * p.lv, g.dkv + (i * s.F + f) * s.V, 0, nullptr, 1, s.V);
      }
      if (g.dz) {
        sum[s.F * p.lv + f] += g.dz[i * s.F + f];
      }
    }
  });
  for_each(key_tasks, [&](int64_t i) {
    const int64_t state = i / key_cut.spans, head = state % s.Hk;
    const Sequence& at = s.sequences[state / s.Hk];
    const Span span = key_cut.at(i % key_cut.spans, at.length);
    const Map<A>& map = p.map(head);
    A* part = g.part(query_tasks + i, head, map);
    if (!span.n) {
      return;
    }
    const A *dkv = sums[state * query_cut.spans].data(), *dz = dkv + s.F * p.lv;
    std::vector<A> dkv_t(s.V * map.lf);
    transpose(dkv_t.data(), map.lf, dkv, p.lv, s.F, s.V);
    Sums<A> relative(map, 0);
    relative.take(map, g.c + state * s.F);
    relative.set_add(map);
    Rows<A> key(map, block);
    std::vector<A> values(block * p.lv), dvalues(block * p.lv), d(block * map.lf);
    const std::vector<A> ones(block, A(1));
    for (int64_t l = span.first; l < span.first + span.n; l += block) {
      const int64_t n = std::min(block, span.first + span.n - l), row = at.first + l;
      const bool* keep = p.keep(at, l);
      p.read_keys(key, values.data(), at, head, l, n);
      key.as_keys(0, n, relative.c.data(), relative.add.data(), keep);
      product(d.data(), map.lf, values.data(), p.lv, 1, dkv_t.data(), map.lf, n, s.F, s.V, false);
      scale_rows(d.data(), map.lf, ones.data(), ones.data(), dz, n, s.F);
      clear_rows(d.data(), map.lf, keep, n);
      product(dvalues.data(), p.lv, key.features(), map.lf, 1, dkv, p.lv, n, s.V, s.F, false);
      store(g.dv, at.batch, head, row, n, s.V, dvalues.data(), p.lv, A(1), static_cast<const A*>(nullptr));
      key.backward(d.data(), g.dk, at.batch, head, row, n, part);
    }
  });
}

// The derivatives by a piece's scores, in place of <dout_i, v_j>.
template <typename A>
void scale_pairs(A* scores, const A* alpha, const A* beta, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      scores[i * ls + j] = alpha[i] * scores[i * ls + j] + beta[i];
    }
  }
}

// Forward over the pieces for dq, as the forward went, then back over them for dk and dv.
// What the way forward over a span leaves for the way back.
template <typename A>
struct Left {
  std::vector<Piece<A>> pieces;
  std::vector<A> alpha, beta;  // of each query head and row
  std::vector<A> dkv, dz;      // the state's gradient (F, lv) and (lf,): by the span's rows, later by all behind it
  std::vector<A> c;            // what it is relative to, as exp(-c)
};

template <typename T, typename A = acc_t<T>>
void causal_queries_bwd(const Problem<T>& p, Gradients<T>& g, const Sums<A>& start, int64_t i, Span span, int64_t task,
                        bool has_earlier, Left<A>& left) {
  const Shape& s = p.s;
  const int64_t head = i % s.Hk, lv = p.lv, group = s.group();
  const Sequence& at = s.sequences[i / s.Hk];
  const Map<A>& map = p.map(head);
  const int64_t lf = map.lf;
  A* part = g.part(task, head, map);
  Rows<A> key(map, block), query(map, block);
  Sums<A> sums = start;
  sums.kv.assign(s.V * lf, A(0));
  transpose(sums.kv.data(), lf, start.kv.data(), lv, s.F, s.V);
  std::vector<A> values(block * lv), values_t(s.V * ls), phi_t(s.F * ls), scores(block * ls), dscores(block * ls);
  std::vector<A> before(lf), dy(block * lv), d(block * lf), den(block), dot(block), ones(ls, A(1));
  std::vector<A>&alpha = left.alpha, &beta = left.beta, dkv, dz;  // the gradient by a piece's rows
  alpha.resize(group * span.n);
  beta.resize(group * span.n);
  if (has_earlier) {
    left.dkv.resize(s.F * lv);
    left.dz.resize(lf);
  }
  for (int64_t l = span.first; l < span.first + span.n; l += block) {
    const int64_t rows = std::min(block, span.first + span.n - l);
    const bool* keep = p.keep(at, l);
    p.read_keys(key, values.data(), at, head, l, rows);
    for (int64_t first = 0, n; first < rows; first += n) {
      before = sums.c;
      n = rows;
      if (map.has_exponent()) {
        n = reach(map, key.own.data() + first * lf, key.shift.data() + first, keep + first, rows - first,
                  sums.most.data(), sums.c.data());
        rescale_t(sums.kv.data(), lf, s.V, sums.z.data(), before.data(), sums.c.data(), s.F, sums.factor.data());
        sums.set_add(map);
      }
      left.pieces.push_back({l + first, n, sums.c});
      key.as_keys(first, n, sums.c.data(), sums.add.data(), keep);
      const A* phi = key.features() + first * lf;
      const A* some = values.data() + first * lv;
      transpose(phi_t.data(), ls, phi, lf, n, s.F);
      transpose(values_t.data(), ls, some, lv, n, s.V);
      for (int64_t j = 0; j < group; ++j) {
        const int64_t h = head * group + j, row = at.first + l + first, place = j * span.n + l + first - span.first;
        query.read(p.q, at.batch, h, row, n, nullptr);
        query.as_queries(n, sums.c.data());
        const A* w = query.features();
        load(dy.data(), lv, g.dout, at.batch, h, row, n, s.V, A(1), nullptr);
        product(d.data(), lf, dy.data(), lv, 1, sums.kv.data(), lf, n, s.F, s.V, false);
        pairs(scores.data(), w, lf, phi_t.data(), n, s.F);
        pairs(dscores.data(), dy.data(), lv, values_t.data(), n, s.V);
        dots(den.data(), w, lf, sums.z.data(), 0, n, padded<A>(s.F), false);
        dots(den.data(), scores.data(), ls, ones.data(), 0, n, padded<A>(n), true);
        dots(dot.data(), w, lf, d.data(), lf, n, padded<A>(s.F), false);
        dots(dot.data(), scores.data(), ls, dscores.data(), ls, n, padded<A>(n), true);
        weigh_bwd(p, den.data(), query.r.data(), dot.data(), n, alpha.data() + place, beta.data() + place);
        scale_rows(d.data(), lf, alpha.data() + place, beta.data() + place, sums.z.data(), n, s.F);
        scale_pairs(dscores.data(), alpha.data() + place, beta.data() + place, n);
        product(d.data(), lf, dscores.data(), ls, 1, phi, lf, n, s.F, n, true);
        if (has_earlier) {
          multiply_rows(dy.data(), lv, alpha.data() + place, n, s.V);
          dkv.assign(s.F * lv, A(0));
          dz.assign(lf, A(0));
          product(dkv.data(), lv, w, 1, lf, dy.data(), lv, s.F, s.V, n, true);
          add_rows(dz.data(), w, lf, beta.data() + place, n, s.F);
          rescale(dkv.data(), lv, s.V, dz.data(), left.pieces[0].c.data(), sums.c.data(), s.F);
          add_rows(left.dkv.data(), dkv.data(), 0, nullptr, 1, s.F * lv);
          add_rows(left.dz.data(), dz.data(), 0, nullptr, 1, s.F);
        }
        query.backward(d.data(), g.dq, at.batch, h, row, n, part);
      }
      add_rows(sums.z.data(), phi, lf, nullptr, n, s.F);
      product(sums.kv.data(), lf, some, 1, lv, phi, lf, s.V, s.F, n, true);
    }
  }
}

// The state's gradient shrinks as c falls, so nothing overflows here either.
template <typename T, typename A = acc_t<T>>
void causal_keys_bwd(const Problem<T>& p, Gradients<T>& g, int64_t i, Span span, int64_t task, Left<A>& left) {
  const Shape& s = p.s;
  const int64_t head = i % s.Hk, lv = p.lv, group = s.group();
  const Sequence& at = s.sequences[i / s.Hk];
  const Map<A>& map = p.map(head);
  const int64_t lf = map.lf;
  A* part = g.part(task, head, map);
  Rows<A> key(map, block), query(map, block);
  Sums<A> relative(map, 0);
  std::vector<A> values(block * lv), values_t(s.V * ls), phi_t(s.F * ls), scores(block * ls), dscores(block * ls);
  std::vector<A> dy(block * lv), d(block * lf), dkv_t(s.V * lf), dvalues(block * lv);
  const std::vector<A> ones(block, A(1)), &alpha = left.alpha, &beta = left.beta;
  std::vector<A>&dkv = left.dkv, &dz = left.dz;
  const std::vector<Piece<A>>& pieces = left.pieces;
  const A* later = left.c.data();
  for (int64_t m = static_cast<int64_t>(pieces.size()) - 1; m >= 0; --m) {
    const Piece<A>& piece = pieces[m];
    const int64_t n = piece.n, row = at.first + piece.first;
    const bool* keep = p.keep(at, piece.first);
    rescale(dkv.data(), lv, s.V, dz.data(), piece.c.data(), later, s.F);
    later = piece.c.data();
    relative.c = piece.c;
    relative.set_add(map);
    p.read_keys(key, values.data(), at, head, piece.first, n);
    key.as_keys(0, n, piece.c.data(), relative.add.data(), keep);
    const A* phi = key.features();
    transpose(phi_t.data(), ls, phi, lf, n, s.F);
    transpose(values_t.data(), ls, values.data(), lv, n, s.V);
    transpose(dkv_t.data(), lf, dkv.data(), lv, s.F, s.V);
    product(d.data(), lf, values.data(), lv, 1, dkv_t.data(), lf, n, s.F, s.V, false);
    scale_rows(d.data(), lf, ones.data(), ones.data(), dz.data(), n, s.F);
    product(dvalues.data(), lv, phi, lf, 1, dkv.data(), lv, n, s.V, s.F, false);
    for (int64_t j = 0; j < group; ++j) {
      const int64_t h = head * group + j, place = j * span.n + piece.first - span.first;
      query.read(p.q, at.batch, h, row, n, nullptr);
      query.as_queries(n, piece.c.data());
      const A* w = query.features();
      load(dy.data(), lv, g.dout, at.batch, h, row, n, s.V, A(1), nullptr);
      pairs(scores.data(), w, lf, phi_t.data(), n, s.F);
      pairs(dscores.data(), dy.data(), lv, values_t.data(), n, s.V);
      scale_pairs(dscores.data(), alpha.data() + place, beta.data() + place, n);
      multiply_rows(dy.data(), lv, alpha.data() + place, n, s.V);
      product(d.data(), lf, dscores.data(), 1, ls, w, lf, n, s.F, n, true);
      product(dvalues.data(), lv, scores.data(), 1, ls, dy.data(), lv, n, s.V, n, true);
      product(dkv.data(), lv, w, 1, lf, dy.data(), lv, s.F, s.V, n, true);
      add_rows(dz.data(), w, lf, beta.data() + place, n, s.F);
    }
    clear_rows(d.data(), lf, keep, n);
    clear_rows(dvalues.data(), lv, keep, n);
    store(g.dv, at.batch, head, row, n, s.V, dvalues.data(), lv, A(1), static_cast<const A*>(nullptr));
    key.backward(d.data(), g.dk, at.batch, head, row, n, part);
  }
  if (p.z0 && span.first == 0) {
    std::vector<A> c0(lf, A(0));
    if (map.has_exponent()) {
      std::copy(p.c0 + i * s.F, p.c0 + (i + 1) * s.F, c0.data());
      rescale(dkv.data(), lv, s.V, dz.data(), c0.data(), later, s.F);
    }
    unpad_rows(dkv, s.F, s.V, lv, g.dkv0 + i * s.F * s.V);
    std::copy(dz.data(), dz.data() + s.F, g.dz0 + i * s.F);
  }
}

template <typename T, typename A = acc_t<T>>
void causal_bwd(const Problem<T>& p, Gradients<T>& g) {
  const Shape& s = p.s;
  const Cut cut = causal_cut(s);
  const std::vector<Sums<A>> starts = starts_of(p, cut);
  const int64_t tasks = starts.size();
  std::vector<Left<A>> left(tasks);
  g.parts.resize(2 * tasks);
  for_each(tasks, [&](int64_t task) {
    const int64_t i = task / cut.spans, span = task % cut.spans;
    const Span rows = cut.at(span, s.sequences[i / s.Hk].length);
    causal_queries_bwd(p, g, starts[task], i, rows, task, span > 0, left[task]);
  });
  for_each(s.N * s.Hk, [&](int64_t i) {
    const int64_t lf = p.map(i % s.Hk).lf;
    std::vector<A> dkv(s.F * p.lv), dz(lf), c = padded_rows<A>(g.c + i * s.F, 1, s.F, lf);
    if (g.dkv) {
      dkv = padded_rows<A>(g.dkv + i * s.F * s.V, s.F, s.V, p.lv);
    }
    if (g.dz) {
      dz = padded_rows<A>(g.dz + i * s.F, 1, s.F, lf);
    }
    for (int64_t span = cut.spans - 1; span >= 0; --span) {
      Left<A>& at = left[i * cut.spans + span];
      const std::vector<A> behind = dkv, zbehind = dz, cbehind = c;
      if (span > 0 && !at.pieces.empty()) {
        c = at.pieces[0].c;
        rescale(dkv.data(), p.lv, s.V, dz.data(), c.data(), cbehind.data(), s.F);
        add_rows(dkv.data(), at.dkv.data(), 0, nullptr, 1, s.F * p.lv);
        add_rows(dz.data(), at.dz.data(), 0, nullptr, 1, s.F);
      }
      at.dkv = behind;
      at.dz = zbehind;
      at.c = cbehind;
    }
  });
  for_each(tasks, [&](int64_t task) {
    const int64_t i = task / cut.spans, span = task % cut.spans;
    const Span rows = cut.at(span, s.sequences[i / s.Hk].length);
    if (span == 0 || rows.n) {
      causal_keys_bwd(p, g, i, rows, tasks + task, left[task]);
    }
  });
}

// The tasks' sums of omega and bias, in their order.
template <typename T, typename A = acc_t<T>>
void add_parts(const Problem<T>& p, const Gradients<T>& g, A* domega, A* dbias) {
  const Map<A>& map = p.maps[0];
  const int64_t M = map.M, D = map.D, sets = p.maps.size();
  std::fill(domega, domega + sets * M * D, A(0));
  for_each(sets * M, [&](int64_t i) {
    A bias = 0;
    for (const auto& part : g.parts) {
      if (part.sums.empty() || (sets > 1 && part.head != i / M)) {
        continue;
      }
      const A* from = part.sums.data() + i % M * map.lx;
      for (int64_t j = 0; j < D; ++j) {
        domega[i * D + j] += from[j];
      }
      bias += part.sums[M * map.lx + i % M];
    }
    if (dbias) {
      dbias[i] = bias;
    }
  });
}

template <typename T>
Problem<T> problem_of(bool backward, const Shape& s, const Tensor& q, const Tensor& k, const Tensor& v,
                      const std::optional<Tensor>& omega, Kind kind, double scale, const std::optional<Tensor>& bias,
                      double eps, bool normalize, const std::optional<Tensor>& mask, const std::optional<Tensor>& kv,
                      const std::optional<Tensor>& z, const std::optional<Tensor>& log_scale) {
  using A = acc_t<T>;
  return {s,
          maps_of<A>(s, omega, kind, scale, bias, eps, backward),
          input<T>(q),
          input<T>(k),
          input<T>(v),
          data<bool>(mask),
          normalize,
          data<A>(kv),
          data<A>(z),
          data<A>(log_scale),
          row_of<A>(s.V)};
}

void check_state(const char* op, const Shape& s, const std::optional<Tensor>& kv, const std::optional<Tensor>& z,
                 ScalarType acc) {
  const int64_t sizes[2] = {s.N * s.Hk * s.F * s.V, s.N * s.Hk * s.F};
  const std::optional<Tensor>* state[2] = {&kv, &z};
  for (int i = 0; i < 2; ++i) {
    const std::optional<Tensor>& x = *state[i];
    STD_TORCH_CHECK(!x || (x->is_contiguous() && x->scalar_type() == acc && x->numel() == sizes[i]), op,
                    ": the state and its gradients must be contiguous, of the arithmetic's dtype and shapes "
                    "(N, Hk, F, V) and (N, Hk, F)");
  }
}

void check_whole(const char* op, const std::optional<Tensor>& kv, const std::optional<Tensor>& z,
                 const std::optional<Tensor>& log_scale) {
  STD_TORCH_CHECK(kv.has_value() == z.has_value() && kv.has_value() == log_scale.has_value(), op,
                  ": kv, z and log_scale must be given together");
}

void zero(Tensor& x) {
  std::memset(x.mutable_data_ptr(), 0, x.numel() * x.element_size());
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_attention_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& omega, int64_t kind, bool causal,
    double scale, const std::optional<Tensor>& bias, double eps, bool normalize, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& kv, const std::optional<Tensor>& z,
    const std::optional<Tensor>& log_scale, bool need_state) {
  const char* op = "linear_attention";
  const Kind which = static_cast<Kind>(kind);
  const Shape s = shape_of(op, q, k, v, omega, which, causal, bias, mask, cu_seqlens);
  const ScalarType acc = acc_dtype(q.scalar_type());
  check_whole(op, kv, z, log_scale);
  check_state(op, s, kv, z, acc);
  check_state(op, s, kv, log_scale, acc);
  Tensor out = new_empty(q, {s.B, s.H, s.L, s.V}, q.scalar_type());
  Tensor sums = new_empty(q, {s.N, s.Hk, s.F, s.V}, acc), z1 = new_empty(q, {s.N, s.Hk, s.F}, acc);
  Tensor c1 = new_empty(q, {s.N, s.Hk, s.F}, acc);
  if (s.packed) {
    zero(out);
  }
  dispatch_float(q.scalar_type(), op, [&](auto nothing) {
    using T = decltype(nothing);
    using A = acc_t<T>;
    const Problem<T> p =
        problem_of<T>(false, s, q, k, v, omega, which, scale, bias, eps, normalize, mask, kv, z, log_scale);
    const View<T> y = output<T>(out);
    const StateView<A> state{static_cast<A*>(sums.mutable_data_ptr()), static_cast<A*>(z1.mutable_data_ptr()),
                             static_cast<A*>(c1.mutable_data_ptr())};
    if (causal) {
      causal_fwd(p, y, state);
    } else {
      full_fwd(p, y, state);
    }
  });
  if (!need_state) {
    sums = new_empty(q, {0}, acc);
    z1 = new_empty(q, {0}, acc);
    c1 = new_empty(q, {0}, acc);
  }
  return {out, sums, z1, c1};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention_bwd_cpu(
    const Tensor& dout, const std::optional<Tensor>& dkv, const std::optional<Tensor>& dz, const Tensor& q,
    const Tensor& k, const Tensor& v, const std::optional<Tensor>& omega, int64_t kind, bool causal, double scale,
    const std::optional<Tensor>& bias, double eps, bool normalize, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& kv, const std::optional<Tensor>& z,
    const std::optional<Tensor>& log_scale, const Tensor& last_kv, const Tensor& last_z, const Tensor& last_log_scale,
    bool need_omega) {
  const char* op = "linear_attention_bwd";
  const Kind which = static_cast<Kind>(kind);
  const Shape s = shape_of(op, q, k, v, omega, which, causal, bias, mask, cu_seqlens);
  const ScalarType acc = acc_dtype(q.scalar_type());
  check_whole(op, kv, z, log_scale);
  check_state(op, s, kv, z, acc);
  check_state(op, s, dkv, dz, acc);
  check_state(op, s, last_kv, last_z, acc);
  check_state(op, s, kv, log_scale, acc);
  check_state(op, s, last_kv, last_log_scale, acc);
  check_like(op, "dout", dout, q.scalar_type(), q);
  STD_TORCH_CHECK(
      dout.dim() == 4 && dout.size(0) == s.B && dout.size(1) == s.H && dout.size(2) == s.L && dout.size(3) == s.V, op,
      ": dout must have shape (B, H, L, V)");
  Tensor dq = new_empty_like(q), dk = new_empty_like(k), dv = new_empty_like(v);
  const bool has_omega = need_omega && omega;
  Tensor domega = has_omega ? new_empty_like(*omega) : new_empty(q, {0}, acc);
  Tensor dbias = has_omega && bias ? new_empty_like(*bias) : new_empty(q, {0}, acc);
  Tensor dkv0 = kv ? new_empty_like(*kv) : new_empty(q, {0}, acc);
  Tensor dz0 = z ? new_empty_like(*z) : new_empty(q, {0}, acc);
  if (s.packed) {
    zero(dq);
    zero(dk);
    zero(dv);
  }
  dispatch_float(q.scalar_type(), op, [&](auto nothing) {
    using T = decltype(nothing);
    using A = acc_t<T>;
    const Problem<T> p =
        problem_of<T>(true, s, q, k, v, omega, which, scale, bias, eps, normalize, mask, kv, z, log_scale);
    Gradients<T> g{input<T>(dout),
                   output<T>(dq),
                   output<T>(dk),
                   output<T>(dv),
                   data<A>(dkv),
                   data<A>(dz),
                   data<A>(last_kv),
                   data<A>(last_z),
                   data<A>(last_log_scale),
                   kv ? static_cast<A*>(dkv0.mutable_data_ptr()) : nullptr,
                   z ? static_cast<A*>(dz0.mutable_data_ptr()) : nullptr,
                   has_omega,
                   {}};
    if (causal) {
      causal_bwd(p, g);
    } else {
      full_bwd(p, g);
    }
    if (has_omega) {
      add_parts(p, g, static_cast<A*>(domega.mutable_data_ptr()),
                bias ? static_cast<A*>(dbias.mutable_data_ptr()) : nullptr);
    }
  });
  return {dq, dk, dv, domega, dbias, dkv0, dz0};
}

}  // namespace linear
}  // namespace fastrpe
