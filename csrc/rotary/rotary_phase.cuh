// Phases on a GPU, shared by the rotation with and without a basis.
#pragma once

#include <cuda_runtime.h>

#include "rotary.h"

namespace fastrpe {
namespace rotary {

struct RowOf {
  uint32_t sequence, l;
};

__device__ __forceinline__ RowOf row_of(const Shape& shape, uint32_t row) {
  if (!shape.batch_positions) {
    return {0, row};
  }
  const uint32_t sequence = row / static_cast<uint32_t>(shape.L);
  return {sequence, row - sequence * static_cast<uint32_t>(shape.L)};
}

__device__ __forceinline__ int64_t token_of(const Shape& shape, RowOf row) {
  return row.sequence * shape.tokens() + row.l - shape.prefix;
}

// 16-bit values need neither the sum's last bits nor a reduced sum.
template <typename T>
__device__ __forceinline__ void accumulate(Phase<acc_t<T>>& phase, Phase<acc_t<T>> other) {
  if constexpr (sizeof(T) == 2) {
    phase.turn += other.turn;
    phase.rest += other.rest;
  } else {
    add(phase, other);
  }
}

template <typename T>
__device__ __forceinline__ void phase_cos_sin(Phase<acc_t<T>> phase, acc_t<T>& c, acc_t<T>& s) {
  if constexpr (sizeof(T) == 2) {
    // The hardware's sine: absolute error 5e-7, a thousandth of a 16-bit rounding.
    const float angle = 6.2831854820251465f * (phase.turn + phase.rest);
    c = __cosf(angle);
    s = __sinf(angle);
  } else {
    cos_sin(phase, c, s);
  }
}

}  // namespace rotary
}  // namespace fastrpe
