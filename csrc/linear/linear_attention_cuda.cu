#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>

#include "../common/cuda.cuh"
#include "../common/hopper.cuh"
#include "linear_attention_cuda.h"

// Attention of exponential features on Hopper's tensor cores: softmax attention twice. Features attend over keys,
// a warpgroup for each 64 features, with the running maximum of a feature's exponents kept out of its sums; then
// queries attend over features, 64 rows to a warpgroup, with the mean value of each feature and the logarithm of its
// weight.
//
// One kernel does both where there are heads enough for all multiprocessors, a block for each. Fewer heads take three
// kernels, with the sums of each block's share of the keys in global memory. Exponents are in base 2.
namespace fastrpe {
namespace linear {
namespace {

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
  const void* omega;  // (M, D) or (Hk, M, D), of T or float
  const float* bias;  // (M,) or (Hk, M), or null
  const bool* mask;   // (B, S), or null
  T* out;             // (B, H, L, V)
  float *kv, *z, *log_scale;
  // With kernels of their own for keys and queries: the sums of each share of the keys, logarithms to base 2, and what
  // queries read, the means' columns in the order of the product.
  float *part_kv, *part_z, *part_c;  // (B Hk, share, M, V), (B Hk, share, M)
  T* means;                          // (B Hk, M, V)
  float* exponents;                  // (B Hk, M)
  float scale, norm;                 // what turns projections and squared norms into exponents
  int Hk, queries, L, S;             // H is Hk times queries
  int row_tiles;                     // of L
  int heads, share;                  // B Hk; the blocks of each
  int omega_h, bias_h;
  bool wide_omega;
};

enum class Pass { both, keys, queries };

template <typename T>
struct Range {
  // A running maximum may lag behind: weights reach 2^limit, and 2^shift where it has just been taken. float16 has room
  // for small ones only where the large are far above 1.
  static constexpr float shift = std::is_same_v<T, Half> ? 12.f : 0.f;
  static constexpr float limit = std::is_same_v<T, Half> ? 15.f : 8.f;
};

// Shared memory in units of 16 bytes; rows of 128 bytes are swizzled.
template <int M>
struct Plan {
  static constexpr int groups = M / 64;  // warpgroups
  static constexpr int threads = 128 * groups;
  static constexpr int blocks = 4 / groups;  // of a multiprocessor
  static constexpr int keys = M == 64 ? 64 : 128;
  static constexpr int features = M * pieces;  // of a matrix of M rows
  static constexpr int stage = 2 * keys * pieces;
  static constexpr int stages = M == 256 ? 4 : 2;
  static constexpr int pool = stages * stage;
  static constexpr int exchange = M * width / 4;  // sums in float32, at the beginning of the pool
  static constexpr int rows = 64;                 // queries of a tile
  static constexpr size_t bytes = 16 * (2 * features + pool) + sizeof(float) * (3 * M + keys);
  static_assert(pool == exchange + groups * 2 * rows * pieces);
};

template <int M>
struct Memory {
  uint4 *omega, *means, *pool;
  float *exponents, *z, *c, *key_bias;

  __device__ __forceinline__ explicit Memory(char* at)
      : omega(reinterpret_cast<uint4*>(at)),
        means(omega + Plan<M>::features),
        pool(means + Plan<M>::features),
        exponents(reinterpret_cast<float*>(pool + Plan<M>::pool)),
        z(exponents + M),
        c(z + M),
        key_bias(c + M) {}
};

// Where the 16 bytes number u of a row lie, as the tensor cores read them.
__device__ __forceinline__ int piece(int row, int u) {
  return row * pieces + (u ^ row % 8);
}

// Where a block stands. Read again when it is needed again, since registers are scarce in between.
struct Place {
  int rank, b, h;

  template <typename T>
  __device__ __forceinline__ explicit Place(const Args<T>& args) {
    uint32_t block;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
    const uint32_t item = block / static_cast<uint32_t>(args.share);
    rank = block - item * args.share;
    b = item / static_cast<uint32_t>(args.Hk);
    h = item - b * args.Hk;
  }
};

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

template <typename T, int M>
__device__ __forceinline__ void fill_omega(const Args<T>& args, int h, uint4* to) {
  const int64_t start = static_cast<int64_t>(h) * args.omega_h;
#pragma unroll
  for (int n = threadIdx.x; n < Plan<M>::features; n += Plan<M>::threads) {
    const int row = n / pieces, u = n % pieces;
    if (args.wide_omega) {
      const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(args.omega) + start) + 2 * n;
      const float4 x = from[0], y = from[1];
      to[piece(row, u)] = {pack<T>(x.x, x.y), pack<T>(x.z, x.w), pack<T>(y.x, y.y), pack<T>(y.z, y.w)};
    } else {
      copy_async<16>(to + piece(row, u), static_cast<const T*>(args.omega) + start + n * 8, true);
    }
  }
}

// The exponents that a tile of keys adds to its projections.
template <typename T, int M>
__device__ __forceinline__ void fill_key_bias(const Args<T>& args, const uint4* k, int b, int first, float* to) {
  constexpr int parts = Plan<M>::threads / Plan<M>::keys, keys = 32 / parts;  // of a key; of a warp
  const int key = threadIdx.x / 32 * keys + threadIdx.x % keys, part = threadIdx.x % 32 / keys;
  float sum = 0;
  if (args.norm != 0) {
#pragma unroll
    for (int u = 0; u < pieces / parts; ++u) {
      float x[8];
      widen<T, 8>(x, *reinterpret_cast<const Vec<T, 8>*>(k + piece(key, part * (pieces / parts) + u)));
#pragma unroll
      for (float value : x) {
        sum = fmaf(value, value, sum);
      }
    }
#pragma unroll
    for (int other = keys; other < 32; other *= 2) {
      sum += __shfl_xor_sync(~0u, sum, other);
    }
  }
  if (part == 0) {
    to[key] = takes_part(args, b, first + key) ? sum * args.norm : masked;
  }
}

template <typename T>
__device__ __forceinline__ float feature_bias(const Args<T>& args, int h, int row) {
  return args.bias == nullptr ? 0 : args.bias[static_cast<int64_t>(h) * args.bias_h + row] * log2e;
}

// Of piece u of a row of the product a thread holds pairs p: columns 32 (u / 4) + 8 p + 2 (u % 4) and the next of the
// values.
template <typename T, int M>
__device__ __forceinline__ void store_state(const Args<T>& args, int b, int h, int row, int u, const float2 (&kv)[4],
                                            float z, float c) {
  const int64_t feature = (static_cast<int64_t>(b) * args.Hk + h) * M + row;
  float* to = args.kv + feature * width + u / 4 * 32 + u % 4 * 2;
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    *reinterpret_cast<float2*>(to + 8 * p) = kv[p];
  }
  if (u == 0) {
    args.z[feature] = z;
    args.log_scale[feature] = (c + feature_bias(args, h, row)) * ln2;
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

__device__ __forceinline__ void add(float2& to, float x, float y, float factor) {
  to = {fmaf(x, factor, to.x), fmaf(y, factor, to.y)};
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ void swap_if(bool condition, float2& a, float2& b) {
  const float2 first = a;
  a = condition ? b : first;
  b = condition ? first : b;
}

// The largest and the sum of a row, which four neighbouring threads hold.
__device__ __forceinline__ float largest_of_four(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float sum_of_four(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// c (64 rows x 2 R) = a b^T over the width.
template <typename T, int R>
__device__ __forceinline__ void project(float (&c)[R], const uint4* a, const uint4* b) {
  products_begin();
#pragma unroll
  for (int step = 0; step < width / 16; ++step) {
    multiply<T>(c, operand(a + 2 * step), operand(b + 2 * step), step > 0);
  }
  products_end();
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

// sums += 2^(s - top) values, and the sums of the weights; `values` has a row for each column of s.
template <typename T, int R>
__device__ __forceinline__ void add_values(float (&sums)[32], float (&total)[2], float (&s)[R], const float (&top)[2],
                                           const uint4* values) {
  uint32_t weights[R / 8][4];
#pragma unroll
  for (int n = 0; n < R / 8; ++n) {
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const float x = exp2_approximate(s[8 * n + 2 * m] - top[m % 2]);
      const float y = exp2_approximate(s[8 * n + 2 * m + 1] - top[m % 2]);
      total[m % 2] += x + y;
      weights[n][m] = pack<T>(x, y);
    }
  }
  products_begin();
#pragma unroll
  for (int n = 0; n < R / 8; ++n) {
    multiply<T, Inner::b>(sums, weights[n], operand(values + n * 16 * pieces), true);
  }
  products_end();
  products_wait(sums);
}

__device__ __forceinline__ void rescale(float (&sums)[32], float (&total)[2], const float (&factor)[2]) {
#pragma unroll
  for (int n = 0; n < 32; ++n) {
    sums[n] *= factor[n / 2 % 2];
  }
  total[0] *= factor[0];
  total[1] *= factor[1];
}

// The sums of this block's share of a head's keys over a warpgroup's 64 features, relative to 2^c. `last` is called
// when the pool but for the first stages is free.
template <typename T, int M, typename Last>
__device__ __forceinline__ void sum_keys(const Args<T>& args, const Memory<M>& memory, const Place& place,
                                         float (&kv)[32], float (&z)[2], float (&c)[2], Last&& last) {
  using Of = Plan<M>;
  const int64_t all = (args.S + Of::keys - 1) / Of::keys;
  const int start = static_cast<int>(all * place.rank / args.share);
  const int tiles = static_cast<int>(all * (place.rank + 1) / args.share) - start;
  const int b = place.b;
  const T *k = args.k.at(b, place.h), *v = args.v.at(b, place.h);
  // The last tile lies in the first stage.
  const auto stage_of = [&](int i) { return memory.pool + (tiles - 1 - i) % Of::stages * Of::stage; };
  const auto start_copy = [&](int i) {
    if (i < tiles) {
      uint4* stage = stage_of(i);
      const int first = (start + i) * Of::keys;
      const auto inside = [&](int key) { return takes_part(args, b, key); };
      fetch<Of::threads, Of::keys>(k, args.k.l, first, stage, inside);
      fetch<Of::threads, Of::keys>(v, args.v.l, first, stage + Of::stage / 2, inside);
    }
  };
  start_copy(0);
  fill_omega<T, M>(args, place.h, memory.omega);
  copies_end();
  for (int i = 1; i < Of::stages - 1; ++i) {
    start_copy(i);
    copies_end();
  }
#pragma unroll
  for (float& x : kv) {
    x = 0;
  }
  for (int i = 0; i < tiles; ++i) {
    const uint4* stage = stage_of(i);
    copies_wait<Of::stages - 2>();
    copies_visible();
    __syncthreads();  // this stage is there, and everyone has left the one before
    start_copy(i + Of::stages - 1);
    copies_end();
    if (i == tiles - 1) {
      last();
    }
    float s[Of::keys / 2];
    project<T>(s, memory.omega + threadIdx.x / 128 * 64 * pieces, stage);
    fill_key_bias<T, M>(args, stage, b, (start + i) * Of::keys, memory.key_bias);
    __syncthreads();
    products_wait(s);
    float top[2] = {masked, masked};
    add_exponents(s, args.scale, memory.key_bias, top);
    top[0] = largest_of_four(top[0]);
    top[1] = largest_of_four(top[1]);
    if (__any_sync(~0u, top[0] > c[0] + Range<T>::limit || top[1] > c[1] + Range<T>::limit)) {
      float factor[2];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float next = fmaxf(c[n], top[n] - Range<T>::shift);
        factor[n] = exp2_approximate(c[n] - next);
        c[n] = next;
      }
      rescale(kv, z, factor);
    }
    add_values<T>(kv, z, s, c, stage + Of::stage / 2);
  }
  if (tiles == 0) {
    copies_wait<0>();
    copies_visible();
    last();
  }
  z[0] = sum_of_four(z[0]);
  z[1] = sum_of_four(z[1]);
}

// From the sums of all keys, in the warpgroups' registers: the state, and what queries read.
template <typename T, int M>
__device__ __forceinline__ void share_sums(const Args<T>& args, const Memory<M>& memory, const float (&kv)[32],
                                           const float (&z)[2], const float (&c)[2]) {
  using Of = Plan<M>;
  float* sums = reinterpret_cast<float*>(memory.pool);
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, feature = threadIdx.x / 32 * 16 + g;
  __syncthreads();  // everyone has left the last stage
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float* to = sums + (feature + 8 * i) * width + 8 * t;
#pragma unroll
    for (int j = 0; j < 8; ++j) {  // pair j % 4 of piece 4 (j / 4) + t, spread over the banks
      *reinterpret_cast<float2*>(to + j / 4 * 32 + (j % 4 ^ g % 4) * 2) = {kv[4 * j + 2 * i], kv[4 * j + 2 * i + 1]};
    }
    if (t == 0) {
      memory.z[feature + 8 * i] = z[i];
      memory.c[feature + 8 * i] = c[i];
    }
  }
  __syncthreads();
  const Place place(args);
  for (int n = threadIdx.x; n < Of::features; n += Of::threads) {
    const int row = n / pieces, u = n % pieces;
    const float4* from = reinterpret_cast<const float4*>(sums + row * width + u * 8);
    const float4 x = from[0], y = from[1];
    float2 sum[4] = {{x.x, x.y}, {x.z, x.w}, {y.x, y.y}, {y.z, y.w}};
    swap_if(row & 1, sum[0], sum[1]);
    swap_if(row & 1, sum[2], sum[3]);
    swap_if(row & 2, sum[0], sum[2]);
    swap_if(row & 2, sum[1], sum[3]);
    const float all_z = memory.z[row], all_c = memory.c[row];
    memory.means[piece(row, u)] = mean_value<T>(sum, all_z);
    if (u == 0) {
      memory.exponents[row] = query_exponent(args, place.h, row, all_z, all_c);
    }
    store_state<T, M>(args, place.b, place.h, row, u, sum, all_z, all_c);
  }
  copies_visible();
  __syncthreads();
}

// The tiles of queries of a warpgroup; a ring of `Ring` of them in shared memory.
template <typename T, int M, int Ring>
struct Queries {
  using Of = Plan<M>;
  const Args<T>& args;
  uint4* ring;
  int b, h, first, step, count;

  __device__ __forceinline__ Queries(const Args<T>& args, uint4* rings) : args(args) {
    const Place place(args);
    const int group = threadIdx.x / 128;
    b = place.b;
    h = place.h * args.queries;
    ring = rings + group * Ring * Of::rows * pieces;
    first = place.rank * Of::groups + group;
    step = args.share * Of::groups;
    count = max(0, (args.queries * args.row_tiles - first + step - 1) / step);
  }

  __device__ __forceinline__ void start_copy(int n) const {
    if (n < count) {
      const int tile = first + n * step, head = tile / args.row_tiles;
      fetch<128, Of::rows>(args.q.at(b, h + head), args.q.l, (tile - head * args.row_tiles) * Of::rows,
                           ring + n % Ring * Of::rows * pieces, [&](int row) { return row < args.L; });
    }
  }

  // Other copies go with those of the first tile.
  template <typename Others>
  __device__ __forceinline__ void start(Others&& others) const {
    start_copy(0);
    others();
    copies_end();
    for (int n = 1; n < Ring; ++n) {
      start_copy(n);
      copies_end();
    }
  }

  __device__ __forceinline__ void run(const Memory<M>& memory) const {
    constexpr int part = M < 128 ? M : 128;  // features at a time
    for (int n = 0; n < count; ++n) {
      if (n == 0) {
        copies_wait<Ring - 1>();
      } else {
        copies_wait<Ring - 2>();
      }
      copies_visible();
      warpgroup_barrier(threadIdx.x / 128);
      if (n > 0) {
        start_copy(n - 1 + Ring);
        copies_end();
      }
      float sums[32] = {}, total[2] = {0, 0}, top[2] = {masked, masked};
#pragma unroll 1
      for (int from = 0; from < M; from += part) {
        float s[part / 2];
        project<T>(s, ring + n % Ring * Of::rows * pieces, memory.omega + from * pieces);
        products_wait(s);
        const float old[2] = {top[0], top[1]};
        add_exponents(s, args.scale, memory.exponents + from, top);
        top[0] = largest_of_four(top[0]);
        top[1] = largest_of_four(top[1]);
        if constexpr (part < M) {
          rescale(sums, total, {exp2_approximate(old[0] - top[0]), exp2_approximate(old[1] - top[1])});
        }
        add_values<T>(sums, total, s, top, memory.means + from * pieces);
      }
      const int tile = first + n * step, head = tile / args.row_tiles, t = threadIdx.x % 4;
      const int row = (tile - head * args.row_tiles) * Of::rows + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
      const int64_t row_of_all = (static_cast<int64_t>(b) * args.Hk * args.queries + h + head) * args.L + row;
      T* y = args.out + row_of_all * width + t * 8;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float inverse = 1 / sum_of_four(total[i]);
        float low[8], high[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          low[j] = sums[j / 2 * 4 + 2 * i + j % 2] * inverse;
          high[j] = sums[16 + j / 2 * 4 + 2 * i + j % 2] * inverse;
        }
        if (row + 8 * i < args.L) {
          store<T, 8>(y + 8 * i * width, narrow<T, 8>(low));
          store<T, 8>(y + 8 * i * width + 32, narrow<T, 8>(high));
        }
      }
    }
  }
};

#endif

template <typename T, int M, Pass Of>
__global__ void __launch_bounds__(Plan<M>::threads, Plan<M>::blocks) linear_attention_kernel(const Args<T> args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int ring = Of == Pass::both ? 2 : 4;
  extern __shared__ __align__(1024) char bytes[];
  const Memory<M> memory(bytes);
  uint4* rings = memory.pool + (Of == Pass::both ? Plan<M>::exchange : 0);
  const Place place(args);
  if constexpr (Of == Pass::queries) {
    const int64_t first = (static_cast<int64_t>(place.b) * args.Hk + place.h) * M;
    Queries<T, M, ring>(args, rings).start([&] {
      fill_omega<T, M>(args, place.h, memory.omega);
      for (int n = threadIdx.x; n < Plan<M>::features; n += Plan<M>::threads) {
        copy_async<16>(memory.means + piece(n / pieces, n % pieces), args.means + first * width + n * 8, true);
      }
      for (int n = threadIdx.x; n < M; n += Plan<M>::threads) {
        copy_async<4>(memory.exponents + n, args.exponents + first + n, true);
      }
    });
    copies_wait<ring - 1>();
    copies_visible();
    __syncthreads();
  } else {
    float kv[32], z[2] = {0, 0}, c[2] = {empty, empty};
    sum_keys<T, M>(args, memory, place, kv, z, c, [&] {
      if constexpr (Of == Pass::both) {
        Queries<T, M, ring>(args, rings).start([] {});
      }
    });
    if constexpr (Of == Pass::both) {
      share_sums<T, M>(args, memory, kv, z, c);
    } else {
      const int t = threadIdx.x % 4, feature = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t row = static_cast<int64_t>(blockIdx.x) * M + feature + 8 * i;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          *reinterpret_cast<float2*>(args.part_kv + row * width + 8 * j + 2 * t) = {kv[4 * j + 2 * i],
                                                                                    kv[4 * j + 2 * i + 1]};
        }
        if (t == 0) {
          args.part_z[row] = z[i];
          args.part_c[row] = c[i];
        }
      }
    }
  }
  if constexpr (Of != Pass::keys) {
    Queries<T, M, ring>(args, rings).run(memory);
  }
#endif
}

// Adds the sums of all shares of the keys; a thread has a piece of a row.
template <typename T, int M>
__global__ void __launch_bounds__(256) add_shares_kernel(const Args<T> args) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  const int item = static_cast<int>(i / Plan<M>::features), row = i / pieces % M, u = i % pieces;
  const int64_t first = static_cast<int64_t>(item) * args.share * M + row;
  float c = empty, z = 0;
#pragma unroll 8
  for (int n = 0; n < args.share; ++n) {
    c = fmaxf(c, args.part_c[first + n * M]);
  }
  float2 sum[4] = {};
#pragma unroll 4
  for (int n = 0; n < args.share; ++n) {
    const int64_t at = first + n * M;
    const float factor = exp2_approximate(args.part_c[at] - c);
    z = fmaf(args.part_z[at], factor, z);
    const float* from = args.part_kv + at * width + u / 4 * 32 + u % 4 * 2;
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const float2 x = *reinterpret_cast<const float2*>(from + 8 * p);
      add(sum[p], x.x, x.y, factor);
    }
  }
  const int b = item / args.Hk, h = item % args.Hk;
  store_state<T, M>(args, b, h, row, u, sum, z, c);
  reinterpret_cast<uint4*>(args.means)[i] = mean_value<T>(sum, z);
  if (u == 0) {
    args.exponents[i / pieces] = query_exponent(args, h, row, z, c);
  }
}

// How many blocks share a head's keys, and its queries: all that are resident. Where it is one alone, one launch does
// it. (Clusters of blocks that exchange their sums through shared memory were slower at every size measured.)
template <int M>
int share_of(int64_t heads, int64_t S, int multiprocessors) {
  const int64_t key_tiles = (S + Plan<M>::keys - 1) / Plan<M>::keys;
  return static_cast<int>(
      std::clamp<int64_t>(multiprocessors * Plan<M>::blocks / heads, 1, std::max<int64_t>(key_tiles, 1)));
}

template <typename T, int M, Pass Of>
void launch(const Args<T>& args, cudaStream_t stream) {
  const auto kernel = linear_attention_kernel<T, M, Of>;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Plan<M>::bytes));
  kernel<<<args.heads * args.share, Plan<M>::threads, Plan<M>::bytes, stream>>>(args);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
Rows<T> rows_of(const char* op, const Tensor& x) {
  const auto* data = static_cast<const T*>(x.const_data_ptr());
  const bool even = x.stride(0) % 8 == 0 && x.stride(1) % 8 == 0 && x.stride(2) % 8 == 0;
  STD_TORCH_CHECK(x.numel() == 0 || (x.stride(3) == 1 && even && reinterpret_cast<uintptr_t>(data) % 16 == 0), op,
                  ": rows of q, k and v must be aligned to 16 bytes");
  return {data, x.stride(0), x.stride(1), x.stride(2)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_attention_cuda(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& omega, int64_t kind, bool causal,
    double scale, const std::optional<Tensor>& bias, double eps, bool normalize, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& kv, const std::optional<Tensor>& z,
    const std::optional<Tensor>& log_scale) {
  const char* op = "linear_attention";
  constexpr int64_t positive = 0, exp = 5;
  const ScalarType dtype = q.scalar_type();
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, op, ": q, k and v must have 4 dimensions");
  const int64_t B = q.size(0), H = q.size(1), L = q.size(2), Hk = k.size(1), S = k.size(2);
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op,
                  ": q must have dtype float16 or bfloat16");
  check_like(op, "k", k, dtype, q);
  check_like(op, "v", v, dtype, q);
  STD_TORCH_CHECK(q.size(3) == width && k.size(3) == width && v.size(3) == width, op, ": D and V must be 64");
  STD_TORCH_CHECK(k.size(0) == B && v.size(0) == B && v.size(1) == Hk && v.size(2) == S, op,
                  ": k and v must have the B of q, and the same heads and tokens");
  STD_TORCH_CHECK(H == Hk || (Hk > 0 && H % Hk == 0), op, ": H must be a multiple of Hk");
  STD_TORCH_CHECK((kind == positive || kind == exp) && omega && !causal && eps == 0 && normalize && !cu_seqlens &&
                      !kv && !z && !log_scale,
                  op, ": the CUDA kernel takes normalised, bidirectional, exponential features of a projection");
  const int64_t n = omega->dim();
  const bool wide_omega = omega->scalar_type() == ScalarType::Float;
  check_like(op, "omega", *omega, wide_omega ? ScalarType::Float : dtype, q);
  STD_TORCH_CHECK((n == 2 || (n == 3 && omega->size(0) == Hk)) && omega->size(n - 1) == width, op,
                  ": omega must have shape (M, D) or (Hk, M, D)");
  STD_TORCH_CHECK(omega->is_contiguous() && reinterpret_cast<uintptr_t>(omega->const_data_ptr()) % 16 == 0, op,
                  ": omega must be contiguous and aligned to 16 bytes");
  const int64_t M = omega->size(n - 2);
  STD_TORCH_CHECK(M == 64 || M == 128 || M == 256, op, ": omega must have 64, 128 or 256 rows");
  if (bias) {
    check_like(op, "bias", *bias, ScalarType::Float, q);
    STD_TORCH_CHECK(bias->is_contiguous() && (bias->numel() == M || bias->numel() == Hk * M), op,
                    ": bias must have shape (M,) or (Hk, M)");
  }
  if (mask) {
    check_like(op, "mask", *mask, ScalarType::Bool, q);
    STD_TORCH_CHECK(mask->is_contiguous() && mask->numel() == B * S, op, ": mask must have shape (B, S)");
  }
  constexpr int64_t limit = int64_t{1} << 30;
  STD_TORCH_CHECK(L < limit && S < limit && B * Hk < limit && (Hk == 0 || H / Hk * (L / 64 + 1) < limit), op,
                  ": the native kernel takes fewer than 2^30 tokens; use backend='reference'");

  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Tensor out = new_empty(q, {B, H, L, width}, dtype);
  Tensor new_kv = new_empty(q, {B, Hk, M, width}, ScalarType::Float);
  Tensor new_z = new_empty(q, {B, Hk, M}, ScalarType::Float), new_log_scale = new_empty_like(new_z);
  if (B * Hk == 0) {
    return {out, new_kv, new_z, new_log_scale};
  }
  int multiprocessors, capability;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, q.get_device_index()));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&capability, cudaDevAttrComputeCapabilityMajor, q.get_device_index()));
  STD_TORCH_CHECK(capability == 9, op, ": the CUDA kernel needs a GPU of compute capability 9; use backend='triton'");
  const cudaStream_t stream = current_stream(q);
  const auto run = [&](auto zero, auto features) {
    using T = decltype(zero);
    constexpr int F = features;
    Args<T> args{};
    args.q = rows_of<T>(op, q);
    args.k = rows_of<T>(op, k);
    args.v = rows_of<T>(op, v);
    args.omega = omega->const_data_ptr();
    args.wide_omega = wide_omega;
    args.omega_h = n == 3 ? F * width : 0;
    args.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
    args.bias_h = bias && bias->numel() == Hk * M && bias->dim() > 1 ? F : 0;
    args.mask = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
    args.out = static_cast<T*>(out.mutable_data_ptr());
    args.kv = static_cast<float*>(new_kv.mutable_data_ptr());
    args.z = static_cast<float*>(new_z.mutable_data_ptr());
    args.log_scale = static_cast<float*>(new_log_scale.mutable_data_ptr());
    args.scale = static_cast<float>(scale * log2e);
    args.norm = kind == positive ? static_cast<float>(-0.5 * log2e * scale * scale) : 0;
    args.Hk = static_cast<int>(Hk);
    args.L = static_cast<int>(L);
    args.S = static_cast<int>(S);
    args.queries = static_cast<int>(H / Hk);
    args.row_tiles = ceil_div(L, Plan<F>::rows);
    args.heads = static_cast<int>(B * Hk);
    args.share = share_of<F>(args.heads, S, multiprocessors);
    if (args.share == 1) {
      launch<T, F, Pass::both>(args, stream);
      return;
    }
    const int64_t parts = static_cast<int64_t>(args.heads) * args.share;
    Tensor part_kv = new_empty(q, {parts, F, width}, ScalarType::Float);
    Tensor part_z = new_empty(q, {2, parts, F}, ScalarType::Float);
    Tensor means = new_empty(q, {args.heads, F, width}, dtype);
    Tensor exponents = new_empty(q, {args.heads, F}, ScalarType::Float);
    args.part_kv = static_cast<float*>(part_kv.mutable_data_ptr());
    args.part_z = static_cast<float*>(part_z.mutable_data_ptr());
    args.part_c = args.part_z + parts * F;
    args.means = static_cast<T*>(means.mutable_data_ptr());
    args.exponents = static_cast<float*>(exponents.mutable_data_ptr());
    launch<T, F, Pass::keys>(args, stream);
    add_shares_kernel<T, F><<<args.heads*(F * pieces / 256), 256, 0, stream>>>(args);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    launch<T, F, Pass::queries>(args, stream);
  };
  const auto dispatch = [&](auto zero) {
    switch (M) {
      case 64:
        return run(zero, std::integral_constant<int, 64>{});
      case 128:
        return run(zero, std::integral_constant<int, 128>{});
      default:
        return run(zero, std::integral_constant<int, 256>{});
    }
  };
  dtype == ScalarType::BFloat16 ? dispatch(BFloat16{}) : dispatch(Half{});
  return {out, new_kv, new_z, new_log_scale};
}

}  // namespace linear
}  // namespace fastrpe
