// What the forward's kernels for Hopper's tensor cores share.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>

#include <atomic>
#include <vector>

#include "projection.cuh"

namespace fastrpe {
namespace linear {

constexpr float log2e = 1.4426950408889634f, ln2 = 0.6931471805599453f;
constexpr float empty = -1e20f;   // the maximum of no exponent at all
constexpr float masked = -1e30f;  // the exponent of a key that takes no part: no infinity to subtract

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
struct Args {
  Rows<T> q, k, v;
  Projection projection;
  const float* bias;  // (M,) or (Hk, M), or null
  const bool* mask;   // (B, S), or null
  T* out;             // (B, H, L, V)
  float *kv, *z, *log_scale;
  const float *kv0, *z0, *log_scale0;  // the state before the first key, or null
  // With three kernels: the sums of keys, logarithms to base 2, of block i and head j in slot i + j, and what queries
  // read, the means' columns in the order of the product.
  float *part_kv, *part_z, *part_c;  // (slots, M, V), (slots, M)
  T* means;                          // (B Hk, M, V)
  float* exponents;                  // (B Hk, M)
  float scale, norm;                 // what turns projections and squared norms into exponents
  int Hk, queries, L, S;             // H is Hk times queries
  int heads;                         // B Hk
  int row_tiles;                     // of L
  int key_tiles, query_steps;        // of a key head
  int key_tile;                      // keys of a tile
  int key_blocks;                    // of the kernel for keys
  int bias_h;
};

// Where the 16 bytes number u of a row lie, as the tensor cores read them.
__device__ __forceinline__ int piece(int row, int u) {
  return row * pieces + (u ^ row % 8);
}

__device__ __forceinline__ int this_block() {
  uint32_t block;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
  return static_cast<int>(block);
}

template <typename T>
__device__ __forceinline__ bool takes_part(const Args<T>& args, int b, int key) {
  return key < args.S && (args.mask == nullptr || args.mask[static_cast<int64_t>(b) * args.S + key]);
}

// Starts to copy rows [first, first + Count), zero where they are not inside.
template <int Threads, int Count, typename T, typename Inside>
__device__ __forceinline__ void fetch(const T* rows, int64_t stride, int first, uint4* to, Inside&& inside) {
  constexpr int step = Threads / pieces;
  const int i = threadIdx.x % Threads / pieces, u = threadIdx.x % pieces;
  const T* from = rows + (first + i) * stride + u * 8;
  to += piece(i, u);  // a step of 8 rows keeps the swizzle
#pragma unroll
  for (int n = 0; n < Count; n += step) {
    copy_async<16>(to + n * pieces, from, inside(first + n + i));
    from += step * stride;
  }
}

template <typename T>
__device__ __forceinline__ float feature_bias(const Args<T>& args, int h, int row) {
  return args.bias == nullptr ? 0 : args.bias[static_cast<int64_t>(h) * args.bias_h + row] * log2e;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// The largest and the sum of a row, which four neighbouring threads hold.
__device__ __forceinline__ float largest_of_four(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float sum_of_four(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// s scaled, with the exponents of its columns; the largest of this thread's two rows.
template <int R>
__device__ __forceinline__ void add_exponents(float (&s)[R], float scale, const float* exponents, float (&top)[2]) {
  const float2* pairs = reinterpret_cast<const float2*>(exponents) + threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < R / 4; ++j) {
    const float2 e = pairs[4 * j];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float &x = s[4 * j + 2 * i], &y = s[4 * j + 2 * i + 1];
      x = fmaf(x, scale, e.x);
      y = fmaf(y, scale, e.y);
      top[i] = fmaxf(top[i], fmaxf(x, y));
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

template <typename... Parameters>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t bytes, cudaStream_t stream,
            bool overlaps, const Parameters&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<uint32_t>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlaps ? 1 : 0;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
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

// How many equal shares of the tiles of all key heads causal attention takes, each with the sums of the keys before it:
// as many as heads where one launch is as good.
template <int M>
int causal_shares(int64_t heads, int64_t queries, int64_t L, int64_t key_tiles, int64_t multiprocessors);

// Causal attention, of args.key_blocks shares; where these are not the heads, args.part_* hold the sums of each, which
// become those of all before it.
template <typename T, int M>
void causal_attention(const Args<T>& args, int device, cudaStream_t stream);

}  // namespace linear
}  // namespace fastrpe
