// Arguments of the rotary operators as the kernels read them.
#pragma once

#include <tuple>

#include "../common/checks.h"
#include "rotary.h"

namespace fastrpe {
namespace rotary {

inline Strides strides_of(const Tensor& x) {
  return {x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

template <typename T>
View<const T> input(const Tensor& x) {
  return {static_cast<const T*>(x.const_data_ptr()), strides_of(x)};
}

template <typename T>
View<T> output(Tensor& x) {
  return {static_cast<T*>(x.mutable_data_ptr()), strides_of(x)};
}

// `table` is positions with frequencies `freqs`, or cosines with sines `freqs`.
inline Shape shape_of(const char* op, const Tensor& q, const Tensor& k, const Tensor& table, const Tensor& freqs,
                      int64_t prefix, bool is_table) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, op, ": q and k must have shape (B, H, L, D)");
  STD_TORCH_CHECK(k.size(0) == q.size(0) && k.size(2) == q.size(2) && k.size(3) == q.size(3), op,
                  ": k must have the B, L and D of q");
  check_like(op, "k", k, q.scalar_type(), q);
  const ScalarType acc = acc_dtype(q.scalar_type());
  check_like(op, "the first table", table, acc, q);
  check_like(op, "the second table", freqs, acc, q);
  STD_TORCH_CHECK(table.is_contiguous() && freqs.is_contiguous(), op, ": tables must be contiguous");
  STD_TORCH_CHECK(table.dim() == 2 || table.dim() == 3, op, ": the first table must have 2 or 3 dimensions");
  const int64_t n = table.dim(), m = freqs.dim();
  Shape shape{};
  shape.B = q.size(0);
  shape.L = q.size(2);
  shape.prefix = prefix;
  shape.H = static_cast<int>(q.size(1));
  shape.Hk = static_cast<int>(k.size(1));
  shape.D = static_cast<int>(q.size(3));
  shape.batch_positions = n == 3;
  STD_TORCH_CHECK(
      0 <= prefix && prefix <= shape.L && table.size(n - 2) == shape.tokens() && (n == 2 || table.size(0) == shape.B),
      op, ": the first table must cover the tokens of q behind the prefix");
  if (is_table) {
    STD_TORCH_CHECK(m == n && freqs.numel() == table.numel(), op, ": sin must have the shape of cos");
    shape.sets = 1;
  } else {
    STD_TORCH_CHECK((m == 2 || m == 3) && freqs.size(m - 2) == table.size(n - 1) && table.size(n - 1) <= max_coords, op,
                    ": freqs must have shape (C, R) or (H, C, R)");
    shape.C = static_cast<int>(table.size(n - 1));
    shape.sets = m == 3 ? static_cast<int>(freqs.size(0)) : 1;
  }
  shape.R = static_cast<int>(freqs.size(m - 1));
  STD_TORCH_CHECK(2 * shape.R <= shape.D, op, ": freqs must have at most D // 2 planes");
  STD_TORCH_CHECK(shape.sets > 0 && shape.H % shape.sets == 0 && shape.Hk % shape.sets == 0, op,
                  ": the heads of q and k must be multiples of those of freqs");
  return shape;
}

// What the GPU kernels' 32-bit indices hold.
inline void check_limits(const char* op, const Shape& shape) {
  STD_TORCH_CHECK(shape.rows() < (int64_t{1} << 31) && shape.items() < (int64_t{1} << 31) && shape.sets < 65536, op,
                  ": the native kernel takes fewer than 2^31 rows and heads, and 2^16 sets of frequencies; use "
                  "backend='reference'");
}

inline void check_gradients(const char* op, const Tensor& dyq, const Tensor& dyk, const Tensor& q, const Tensor& k) {
  const Tensor* pairs[2][2] = {{&dyq, &q}, {&dyk, &k}};
  for (const auto& [dy, x] : pairs) {
    check_like(op, "the upstream gradient", *dy, x->scalar_type(), *x);
    STD_TORCH_CHECK(dy->dim() == 4, op, ": the upstream gradient must have shape (B, H, L, D)");
    for (int i = 0; i < 4; ++i) {
      STD_TORCH_CHECK(dy->size(i) == x->size(i), op, ": the upstream gradient must have the shape of q and k");
    }
  }
}

}  // namespace rotary
}  // namespace fastrpe
