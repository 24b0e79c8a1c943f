// The projection of features, as all kernels of linear attention on Hopper read it.
#pragma once

#include <cstdint>
#include <optional>

#include "../common/cuda.cuh"
#include "../common/hopper.cuh"

namespace fastrpe {
namespace linear {

struct Projection {
  const void* omega;  // (M, D) or (Hk, M, D), of T or float, aligned to 16 bytes; null for the identity
  int64_t head;       // numbers from one head's to the next's
  bool wide;          // of float
  int features;       // M
};

// Starts to copy a head's M rows of 64 in 16 bits to where the tensor cores read them.
template <typename T, int M, int Threads>
__device__ __forceinline__ void fill_projection(const Projection& from, int64_t head, uint4* to) {
  const int64_t start = head * from.head;
#pragma unroll
  for (int n = threadIdx.x; n < M * 8; n += Threads) {
    const int row = n / 8, u = n % 8;
    uint4* at = to + row * 8 + (u ^ row % 8);
    if (M == 64 && from.omega == nullptr) {
      const uint32_t one = u == row / 8 ? row % 2 == 0 ? pack<T>(1, 0) : pack<T>(0, 1) : 0;
      const int pair = row % 8 / 2;
      *at = {pair == 0 ? one : 0, pair == 1 ? one : 0, pair == 2 ? one : 0, pair == 3 ? one : 0};
    } else if (from.wide) {
      const float4* source = reinterpret_cast<const float4*>(static_cast<const float*>(from.omega) + start) + 2 * n;
      const float4 x = source[0], y = source[1];
      *at = {pack<T>(x.x, x.y), pack<T>(x.z, x.w), pack<T>(y.x, y.y), pack<T>(y.z, y.w)};
    } else {
      copy_async<16>(at, static_cast<const T*>(from.omega) + start + n * 8, true);
    }
  }
}

inline Projection projection_of(const char* op, const std::optional<Tensor>& omega, const Tensor& q, int64_t Hk) {
  constexpr int D = 64;
  if (!omega) {
    return {nullptr, 0, false, D};
  }
  const int64_t dims = omega->dim();
  const bool wide = omega->scalar_type() == ScalarType::Float;
  check_like(op, "omega", *omega, wide ? ScalarType::Float : q.scalar_type(), q);
  STD_TORCH_CHECK((dims == 2 || (dims == 3 && omega->size(0) == Hk)) && omega->size(dims - 1) == D, op,
                  ": omega must have shape (M, D) or (Hk, M, D)");
  STD_TORCH_CHECK(omega->is_contiguous() && reinterpret_cast<uintptr_t>(omega->const_data_ptr()) % 16 == 0, op,
                  ": omega must be contiguous and aligned to 16 bytes");
  const int64_t M = omega->size(dims - 2);
  STD_TORCH_CHECK(M == 64 || M == 128 || M == 256, op, ": omega must have 64, 128 or 256 rows");
  return {omega->const_data_ptr(), dims == 3 ? M * D : 0, wide, static_cast<int>(M)};
}

}  // namespace linear
}  // namespace fastrpe
