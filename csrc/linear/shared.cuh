// What all kernels of linear attention for Hopper's tensor cores share.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "../common/cuda.cuh"
#include "../common/hopper.cuh"

namespace fastrpe {
namespace linear {

constexpr float log2e = 1.4426950408889634f;
constexpr float empty = -1e20f;   // the maximum of no exponent at all
constexpr float masked = -1e30f;  // the exponent of what takes no part: no infinity to subtract

constexpr int width = 64;          // D and V
constexpr int pieces = width / 8;  // of 16 bytes, of a row

// Rows of width neighbouring values, each aligned to 16 bytes.
template <typename T>
struct Rows {
  const T* data;
  int64_t b, h, l;  // strides

  __device__ __forceinline__ const T* at(int64_t i_b, int64_t i_h) const {
    return data + i_b * b + i_h * h;
  }
};

template <typename T>
Rows<T> rows_of(const char* op, const Tensor& x) {
  const auto* data = static_cast<const T*>(x.const_data_ptr());
  const bool even = x.stride(0) % 8 == 0 && x.stride(1) % 8 == 0 && x.stride(2) % 8 == 0;
  STD_TORCH_CHECK(x.numel() == 0 || (x.stride(3) == 1 && even && reinterpret_cast<uintptr_t>(data) % 16 == 0), op,
                  ": rows of q, k, v and dout must be aligned to 16 bytes");
  return {data, x.stride(0), x.stride(1), x.stride(2)};
}

// Where the 16 bytes number u of a row lie, as the tensor cores read them.
__device__ __forceinline__ int piece(int row, int u) {
  return row * pieces + (u ^ row % 8);
}

// The projection of features.
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
  for (int n = threadIdx.x; n < M * pieces; n += Threads) {
    const int row = n / pieces, u = n % pieces;
    uint4* at = to + row * pieces + (u ^ row % 8);
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
  if (!omega) {
    return {nullptr, 0, false, width};
  }
  const int64_t dims = omega->dim();
  const bool wide = omega->scalar_type() == ScalarType::Float;
  check_like(op, "omega", *omega, wide ? ScalarType::Float : q.scalar_type(), q);
  STD_TORCH_CHECK((dims == 2 || (dims == 3 && omega->size(0) == Hk)) && omega->size(dims - 1) == width, op,
                  ": omega must have shape (M, D) or (Hk, M, D)");
  STD_TORCH_CHECK(omega->is_contiguous() && reinterpret_cast<uintptr_t>(omega->const_data_ptr()) % 16 == 0, op,
                  ": omega must be contiguous and aligned to 16 bytes");
  const int64_t M = omega->size(dims - 2);
  STD_TORCH_CHECK(M == 64 || M == 128 || M == 256, op, ": omega must have 64, 128 or 256 rows");
  return {omega->const_data_ptr(), dims == 3 ? M * width : 0, wide, static_cast<int>(M)};
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// The largest and the sum of a row, which four neighbouring threads hold; of one row or of two.
__device__ __forceinline__ float largest_of_four(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float sum_of_four(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

__device__ __forceinline__ void largest_of_four(float (&x)[2]) {
  x[0] = largest_of_four(x[0]);
  x[1] = largest_of_four(x[1]);
}

__device__ __forceinline__ void sum_of_four(float (&x)[2]) {
  x[0] = sum_of_four(x[0]);
  x[1] = sum_of_four(x[1]);
}

// A thread's two rows, each times a factor.
template <int R>
__device__ __forceinline__ void rescale(float (&rows)[R], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < R; ++i) {
    rows[i] *= factor[i / 2 % 2];
  }
}

// s scaled, with the exponents of its columns. Calls take with each pair of values and the number of its row.
template <int R, typename Take>
__device__ __forceinline__ void each_exponent(float (&s)[R], float scale, const float* exponents, Take&& take) {
  const float2* pairs = reinterpret_cast<const float2*>(exponents) + threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < R / 4; ++j) {
    const float2 e = pairs[4 * j];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float &x = s[4 * j + 2 * i], &y = s[4 * j + 2 * i + 1];
      x = fmaf(x, scale, e.x);
      y = fmaf(y, scale, e.y);
      take(i, x, y);
    }
  }
}

template <int R>
__device__ __forceinline__ void add_exponents(float (&s)[R], float scale, const float* exponents) {
  each_exponent(s, scale, exponents, [](int, float, float) {});
}

// The same, and the largest of this thread's two rows.
template <int R>
__device__ __forceinline__ void add_exponents(float (&s)[R], float scale, const float* exponents, float (&top)[2]) {
  each_exponent(s, scale, exponents, [&](int i, float x, float y) { top[i] = fmaxf(top[i], fmaxf(x, y)); });
}

// The largest of this thread's two rows.
template <int R>
__device__ __forceinline__ void find_largest(const float (&s)[R], float (&top)[2]) {
#pragma unroll
  for (int i = 0; i < R; i += 2) {
    top[i / 2 % 2] = fmaxf(top[i / 2 % 2], fmaxf(s[i], s[i + 1]));
  }
}

// Weights 2^(s - top) of 64 columns, as a left operand.
template <typename T>
__device__ __forceinline__ void make_weights(uint32_t (&weights)[4][4], const float* s, const float (&top)[2]) {
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const float* pair = s + 8 * n + 2 * m;
      weights[n][m] = pack<T>(exp2_approximate(pair[0] - top[m % 2]), exp2_approximate(pair[1] - top[m % 2]));
    }
  }
}

#endif

struct Device {
  int capability, multiprocessors;
};

inline Device device(int index) {
  static const std::vector<Device> all = [] {
    int count;
    STD_CUDA_CHECK(cudaGetDeviceCount(&count));
    std::vector<Device> found(count);
    for (int i = 0; i < count; ++i) {
      STD_CUDA_CHECK(cudaDeviceGetAttribute(&found[i].capability, cudaDevAttrComputeCapabilityMajor, i));
      STD_CUDA_CHECK(cudaDeviceGetAttribute(&found[i].multiprocessors, cudaDevAttrMultiProcessorCount, i));
    }
    return found;
  }();
  return all.at(index);
}

// With so many blocks to a cluster.
template <typename... Parameters>
void launch_clusters(void (*kernel)(Parameters...), int cluster, dim3 blocks, int threads, size_t bytes,
                     cudaStream_t stream, bool overlaps, const Parameters&... arguments) {
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = overlaps;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = cluster;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
}

template <typename... Parameters>
void launch(void (*kernel)(Parameters...), dim3 blocks, int threads, size_t bytes, cudaStream_t stream, bool overlaps,
            const Parameters&... arguments) {
  launch_clusters(kernel, 1, blocks, threads, bytes, stream, overlaps, arguments...);
}

}  // namespace linear
}  // namespace fastrpe
