// What the forward's kernels that take a tile at a time share.
#pragma once

#include "linear_attention.cuh"

namespace fastrpe {
namespace linear {

// Of piece u of a row of the product a thread holds pairs p: columns 32 (u / 4) + 8 p + 2 (u % 4) and the next of the
// values.
template <int M, typename T>
__device__ __forceinline__ void store_state(const Args<T>& args, const Place& place, int row, int u,
                                            const float2 (&kv)[4], float z, float c) {
  const int64_t feature = static_cast<int64_t>(place.head) * M + row;
  float* to = args.kv + feature * width + u / 4 * 32 + u % 4 * 2;
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    *reinterpret_cast<float2*>(to + 8 * p) = kv[p];
  }
  if (u == 0) {
    args.z[feature] = z;
    args.log_scale[feature] = (c + feature_bias(args, place.h, row)) * ln2;
  }
}

template <typename T>
__device__ __forceinline__ uint4 mean_value(const float2 (&kv)[4], float z) {
  const float inverse = z == 0 ? 0 : 1 / z;
  return {pack<T>(kv[0].x * inverse, kv[0].y * inverse), pack<T>(kv[1].x * inverse, kv[1].y * inverse),
          pack<T>(kv[2].x * inverse, kv[2].y * inverse), pack<T>(kv[3].x * inverse, kv[3].y * inverse)};
}

// What a feature adds to a query's exponent; its bias counts for keys and for queries.
template <typename T>
__device__ __forceinline__ float query_exponent(const Args<T>& args, int h, int row, float z, float c) {
  return z == 0 ? empty : c + log2f(z) + 2 * feature_bias(args, h, row);
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// c (64 rows x 2 R) = a b^T over the width.
template <typename T, int R>
__device__ __forceinline__ void project(float (&c)[R], const uint4* a, const uint4* b) {
  const uint64_t of_a = operand(a), of_b = operand(b);
  products_begin();
#pragma unroll
  for (int step = 0; step < width / 16; ++step) {
    multiply<T>(c, further(of_a, 32 * step), further(of_b, 32 * step), step > 0);
  }
  products_end();
}

// Row i of a thread's two of a product with values, to where its first columns go: a value's neighbour in memory is in
// the column that the tensor cores have next.
template <typename T>
__device__ __forceinline__ void store_row(T* to, const float (&sums)[32], int i, float factor, bool is_inside) {
  float low[8], high[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    low[j] = sums[j / 2 * 4 + 2 * i + j % 2] * factor;
    high[j] = sums[16 + j / 2 * 4 + 2 * i + j % 2] * factor;
  }
  if (is_inside) {
    store<T, 8>(to, narrow<T, 8>(low));
    store<T, 8>(to + 32, narrow<T, 8>(high));
  }
}

#endif

}  // namespace linear
}  // namespace fastrpe
