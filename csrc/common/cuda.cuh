// What CUDA kernels share: N values loaded and stored in one access and computed with in float32 (float64 for float64).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>

#include <atomic>

#include "checks.h"

namespace fastrpe {

// Pairs of 16-bit values stay packed in 32-bit registers until they are used.
template <typename T, int N, bool Packed = sizeof(T) == 2 && N % 2 == 0>
struct alignas(sizeof(T) * N) Vec {
  T at[N];
};
template <typename T, int N>
struct alignas(sizeof(T) * N) Vec<T, N, true> {
  uint32_t at[N / 2];
};

template <typename T, int N>
__device__ __forceinline__ Vec<T, N> load(const T* p) {
  return *reinterpret_cast<const Vec<T, N>*>(p);
}

template <typename T, int N>
__device__ __forceinline__ void store(T* p, const Vec<T, N>& v) {
  *reinterpret_cast<Vec<T, N>*>(p) = v;
}

template <typename T, int N>
__device__ __forceinline__ void widen(acc_t<T> (&to)[N], const Vec<T, N>& from) {
  if constexpr (sizeof(from.at[0]) == sizeof(T)) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      to[j] = static_cast<acc_t<T>>(from.at[j]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < N / 2; ++j) {
      float2 pair;
      if constexpr (std::is_same_v<T, BFloat16>) {
        pair = {__uint_as_float(from.at[j] << 16), __uint_as_float(from.at[j] & 0xffff0000u)};
      } else {
        pair = __half22float2(*reinterpret_cast<const __half2*>(&from.at[j]));
      }
      to[2 * j] = pair.x;
      to[2 * j + 1] = pair.y;
    }
  }
}

template <typename T, int N>
__device__ __forceinline__ Vec<T, N> narrow(const acc_t<T> (&from)[N]) {
  Vec<T, N> to;
  if constexpr (sizeof(to.at[0]) == sizeof(T)) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      to.at[j] = static_cast<T>(from[j]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < N / 2; ++j) {
      if constexpr (std::is_same_v<T, BFloat16>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(from[2 * j], from[2 * j + 1]);
        to.at[j] = *reinterpret_cast<const uint32_t*>(&pair);
      } else {
        const __half2 pair = __floats2half2_rn(from[2 * j], from[2 * j + 1]);
        to.at[j] = *reinterpret_cast<const uint32_t*>(&pair);
      }
    }
  }
  return to;
}

inline cudaStream_t current_stream(const Tensor& x) {
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Lets a kernel have that much shared memory; Of tells kernels of one type apart.
template <typename Of, typename Kernel>
void allow_memory(Kernel kernel, int device) {
  static std::atomic<uint64_t> prepared{0};  // devices
  const uint64_t bit = uint64_t{1} << device % 64;
  if (device >= 64 || (prepared.load() & bit) == 0) {
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Of::bytes));
    prepared.fetch_or(bit);
  }
}

inline int ceil_div(int64_t a, int64_t b) {
  return static_cast<int>((a + b - 1) / b);
}

}  // namespace fastrpe
