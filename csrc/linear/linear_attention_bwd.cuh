// What the kernels of bidirectional gradients share: layouts of shared memory, tiles, units, means.
#pragma once

#include <cuda_runtime.h>

#include "../common/cuda.cuh"
#include "../common/hopper.cuh"
#include "shared.cuh"

namespace fastrpe {
namespace linear {
namespace bidirectional {

constexpr int tile = 64;                // queries or keys that a block takes at a time
constexpr int slab = tile * width / 8;  // 16-byte pieces of a tile

template <typename T>
struct Args {
  Rows<T> x, y;  // q and dout, or k and v
  Projection projection;
  const float* bias;  // (M,) or (Hk, M), or null
  int64_t bias_h;
  const float *kv, *z, *log_scale;  // (B, Hk, M, V) and (B, Hk, M)
  const bool* mask;                 // of keys, (B, S), or null
  float* parts;                     // slots of dU and r, (B, H, blocks, M (V + 1)), or (B, Hk, count, M (V + 1))
  float* omega_parts;               // slots of dW, (sets, walkers, M, D)
  T *dx, *dy;                       // dq, or dk and dv; contiguous
  int64_t length;
  int heads, groups;  // heads of x, and query heads of a key head
  int blocks, share;  // units of a head, and the tiles of one
  int count;
  float scale, norm;  // norm is 1 where exponents have -|x|^2 / 2, else 0
  // For dW, units are (outer, sets, inner); each of a set's `walkers` blocks takes `taken` of the set's `units`.
  int sets, inner, units, walkers, taken;
};

template <int M>
struct Layout {
  static constexpr int features = M > 128 ? 128 : M;  // of a warpgroup's products
  static constexpr int groups = M / features;         // warpgroups that share a tile of queries
  static constexpr bool late = false;
  static constexpr int query_threads = 128 * groups, key_threads = 128;
  static constexpr int matrix = M * width / 8;  // pieces of (M, 64) 16-bit values
  static constexpr int query_stages = 3, key_stages = 2;
  static constexpr int mean_parts = M > 64 ? 2 : 1;  // numbers of 16 bits that U is the sum of
  static constexpr int query_blocks = M > 64 ? 256 / M : 3, key_blocks = M > 128 ? 2 : 3;  // of a multiprocessor
  static constexpr int exchange = groups > 1 ? groups * tile * (2 + width / 2) : 0;        // numbers between warpgroups
  static constexpr size_t query_bytes =
      16 * ((2 + mean_parts) * matrix + query_stages * 2 * slab) + 4 * (M + tile) + 4 * exchange;
  static constexpr int omega_blocks = M > 64 ? M > 128 ? 1 : 2 : 3;  // of keys with dW
  static constexpr size_t key_bytes = 16 * (2 * matrix + key_stages * 2 * slab) + 4 * (2 * M + 4);
  static constexpr size_t omega_bytes =
      16 * (2 * matrix + key_stages * 2 * slab + tile * features / 8) + 4 * (M * width + 2 * M);
};

// Of queries with dW: two warpgroups share a tile where one would have too few registers.
template <int M>
struct OmegaLayout {
  static constexpr bool all = M <= 128;  // else dW alone
  static constexpr bool late = false;
  static constexpr int groups = M > 64 ? 2 : 1, features = M / groups;
  static constexpr int threads = 128 * groups, stages = 3, blocks = M > 64 ? 1 : 2;
  static constexpr int matrix = M * width / 8;
  static constexpr int halves = all && groups > 1 ? 2 * 16 * 128 : 0;  // numbers between warpgroups
  static constexpr size_t bytes = 16 * ((all ? 4 : 3) * matrix + stages * 2 * slab + (all ? slab : 0)) +
                                  4 * (M * (width + 3) + groups * tile * 4 + halves + 8 + (all ? 4 * M : 0));
};

// Of whole heads, with dW or without; Fresh, from keys and values instead of a state. Where Single, a key head has one
// query head.
template <int M, bool Omega, bool Fresh, bool Single>
struct HeadLayout {
  // The sum for dU begins when dS is done with, and its registers are then free: one warpgroup has enough for dW too.
  static constexpr bool late = Omega && Fresh && Single && M > 64;
  static constexpr int groups = Omega && M > 64 && !late ? 2 : 1, features = M / groups, threads = 128 * groups;
  static constexpr int stages = M > 64 || Fresh ? 3 : 2, blocks = M > 64 ? 3 - groups : Omega || Fresh ? 2 : 3;
  static constexpr int matrix = M * width / 8;
  static constexpr int mean_parts = 2;  // U as it is
  static constexpr int halves = groups > 1 ? 2 * groups * 16 * 128 : 0, rows = groups > 1 ? groups * tile : 0;
  static constexpr size_t bytes = 16 * ((2 + mean_parts) * matrix + stages * 2 * slab) + 4 * (M + tile) +
                                  (Omega ? 16 * (late ? 0 : matrix + slab) + 4 * (halves + 2 * rows + 8) : 0);
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// float16 holds 2^key_shift a, which is small where there are many keys.
template <typename T>
constexpr float key_shift = std::is_same_v<T, Half> ? 8.0f : 0.0f;

// Starts to copy a tile of which `count` rows are there, those that the mask leaves out as zeros.
template <int Threads, typename T>
__device__ __forceinline__ void fetch(const T* from, int64_t step, int count, uint4* to, const bool* mask = nullptr) {
  const int u = threadIdx.x % 8, i = threadIdx.x / 8;
  const T* source = from + i * step + u * 8;
  to += piece(i, u);  // a step of 8 rows keeps the swizzle
#pragma unroll
  for (int n = 0; n < tile; n += Threads / 8) {
    const bool inside = n + i < count && (mask == nullptr || mask[n + i]);
    copy_async<16>(to + n * 8, inside ? source : from, inside);
    source += Threads / 8 * step;
  }
}

// Copies pieces [u, u + Pieces) of a warp's 16 rows from `first` on to memory, as far as the tile's `count` rows are
// there.
template <int Pieces, typename T>
__device__ __forceinline__ void store_rows(const uint4* from, int first, int u, int count, T* to) {
  constexpr int steps = Pieces / 2, rows = 32 / Pieces;
  u += threadIdx.x % Pieces;
  first += threadIdx.x % 32 / Pieces;
  uint4 x[steps];
#pragma unroll
  for (int n = 0; n < steps; ++n) {
    x[n] = from[piece(first + n * rows, u)];
    asm volatile("" : "+r"(x[n].x), "+r"(x[n].y), "+r"(x[n].z), "+r"(x[n].w));  // no load waits for a store
  }
  to += first * width + u * 8;
#pragma unroll
  for (int n = 0; n < steps; ++n) {
    if (first + n * rows < count) {
      *reinterpret_cast<uint4*>(to + n * rows * width) = x[n];
    }
  }
}

// The place of a unit: its head, and tiles [begin, end) of it.
struct Place {
  int64_t head, i_b;
  int i_h, begin, end;

  template <typename T>
  __device__ __forceinline__ Place(const Args<T>& args, uint32_t unit) {
    head = unit / args.blocks;
    i_b = head / args.heads;
    i_h = static_cast<int>(head % args.heads);
    begin = unit % args.blocks * args.share;
    end = static_cast<int>(min(static_cast<int64_t>(begin) + args.share, (args.length + tile - 1) / tile));
  }

  __device__ __forceinline__ Place(int64_t head, int64_t i_b, int i_h, int begin, int end)
      : head(head), i_b(i_b), i_h(i_h), begin(begin), end(end) {}
};

// The units that a block takes in turn for dW: numbers [begin, end) of a set's.
struct Units {
  uint32_t set, sets, inner, begin, end;

  template <typename T>
  __device__ __forceinline__ explicit Units(const Args<T>& args) {
    set = blockIdx.x / args.walkers;
    sets = args.sets;
    inner = args.inner;
    begin = blockIdx.x % args.walkers * args.taken;
    end = min(begin + args.taken, static_cast<uint32_t>(args.units));
  }

  __device__ __forceinline__ uint32_t operator[](uint32_t n) const {
    return (n / inner * sets + set) * inner + n % inner;
  }

  // In 32 bits, since blocks ask for it over and over.
  template <typename T>
  __device__ __forceinline__ Place place(const Args<T>& args, uint32_t n) const {
    const uint32_t unit = (*this)[n], head = unit / args.blocks, i_b = head / args.heads;
    const int begin = unit % args.blocks * args.share;
    const int64_t tiles = (args.length + tile - 1) / tile;
    return {head, i_b, static_cast<int>(head - i_b * args.heads), begin,
            static_cast<int>(min(static_cast<int64_t>(begin) + args.share, tiles))};
  }
};

// Stores a thread's part of x^T, 64 x F, as rows of features from `base` on.
template <int R, typename Scaled>
__device__ __forceinline__ void store_features(float* part, int base, const float (&x)[R], Scaled&& scaled) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32, g = lane / 4, t = lane % 4;
  part += (base + 2 * t) * width + warp * 16 + g;
#pragma unroll
  for (int i = 0; i < R; ++i) {
    part[(i / 4 * 8 + i % 2) * width + i / 2 % 2 * 8] = scaled(x[i]);
  }
}

// Makes U as the sum of Parts matrices; where Centred, less the mean of the first 16 features.
template <typename T, int M, int Threads, int Parts, bool Centred = true>
__device__ __forceinline__ void fill_means(const float* kv, const float* z, uint4* means) {
  const int u = threadIdx.x % 8;
  const auto mean = [&](float (&x)[8], int f) {
    const float sum = z[f], factor = sum > 0.0f ? 1.0f / sum : 0.0f;
    const auto* from = reinterpret_cast<const float4*>(kv + f * width + u * 8);
    const float4 a = from[0], b = from[1];
    const float y[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      x[e] = y[e] * factor;
    }
  };
  float common[8] = {};
  if constexpr (Centred) {
#pragma unroll
    for (int f = 0; f < 16; f += 4) {
      float x[8];
      mean(x, f + threadIdx.x % 32 / 8);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        common[e] += x[e] / 16;
      }
    }
#pragma unroll
    for (float& x : common) {
      x += __shfl_xor_sync(~0u, x, 8);
      x += __shfl_xor_sync(~0u, x, 16);
    }
  }
#pragma unroll
  for (int n = 0; n < M * pieces; n += Threads) {
    const int f = (n + threadIdx.x) / 8;
    float x[8];
    mean(x, f);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      x[e] -= common[e];
    }
#pragma unroll
    for (int part = 0; part < Parts; ++part) {
      uint32_t y[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        y[e] = pack<T>(x[2 * e], x[2 * e + 1]);
        const float2 z = unpack<T>(y[e]);
        x[2 * e] -= z.x;
        x[2 * e + 1] -= z.y;
      }
      means[part * M * pieces + piece(f, u)] = {y[0], y[1], y[2], y[3]};
    }
  }
}

// The largest of all threads' numbers; `largest` is shared memory for one of each warp's.
template <int Threads>
__device__ __forceinline__ float largest_of_block(float x, float* largest) {
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, lanes));
  }
  if (threadIdx.x % 32 == 0) {
    largest[threadIdx.x / 32] = x;
  }
  __syncthreads();
  x = largest[0];
#pragma unroll
  for (int i = 1; i < Threads / 32; ++i) {
    x = fmaxf(x, largest[i]);
  }
  return x;
}

// Sums of columns over a warp's rows, of which a thread's x have columns i / 2 * 8 + 2 t + i % 2 of its own. Half of
// them goes to the thread that is Lanes apart, until the first N / 8 are left, those of i from N / 8 g on.
template <int Lanes, int Half, int N>
__device__ __forceinline__ void halve_columns(float (&x)[N]) {
  const bool upper = threadIdx.x & Lanes;
#pragma unroll
  for (int i = 0; i < Half; ++i) {
    const float given = upper ? x[i] : x[i + Half], kept = upper ? x[i + Half] : x[i];
    x[i] = kept + __shfl_xor_sync(~0u, given, Lanes);
  }
}

template <int N>
__device__ __forceinline__ void store_column_sums(float (&x)[N], float* to) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  halve_columns<16, N / 2>(x);
  halve_columns<8, N / 4>(x);
  halve_columns<4, N / 8>(x);
#pragma unroll
  for (int i = 0; i < N / 8; ++i) {
    const int n = N / 8 * g + i;
    to[n / 2 * 8 + 2 * t + n % 2] = x[i];
  }
}

// A piece of dU in 16 bits, and the product of its row with U's z.
template <typename T>
__device__ __forceinline__ float fill_dmeans(uint4* to, const float (&x)[8], float factor, const float4& a,
                                             const float4& b) {
  uint32_t y[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    y[e] = pack<T>(x[2 * e] * factor, x[2 * e + 1] * factor);
  }
  *to = {y[0], y[1], y[2], y[3]};
  const float2 c = unpack<T>(y[0]), d = unpack<T>(y[1]), e = unpack<T>(y[2]), f = unpack<T>(y[3]);
  const float sum =
      sum_of_four((a.x * c.x + a.y * c.y + a.z * d.x + a.w * d.y) + (b.x * e.x + b.y * e.y + b.z * f.x + b.w * f.y));
  return sum + __shfl_xor_sync(~0u, sum, 4);
}

// A thread's weights of two keys, as a left operand.
template <typename T, int Steps>
__device__ __forceinline__ void key_weights(uint32_t (&a)[Steps][4], const float (&p)[8 * Steps], float exponent,
                                            const float* exponents, const float (&norm)[2], int t) {
#pragma unroll
  for (int s = 0; s < Steps; ++s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 c = reinterpret_cast<const float2*>(exponents)[8 * s + i / 2 * 4 + t];
      a[s][i] = pack<T>(exp2_approximate(fmaf(p[8 * s + 2 * i], exponent, c.x) - norm[i % 2]),
                        exp2_approximate(fmaf(p[8 * s + 2 * i + 1], exponent, c.y) - norm[i % 2]));
    }
  }
}

// What |x|^2 / 2 takes from the exponents of a thread's two keys, of one that takes no part all.
template <typename T>
__device__ __forceinline__ void half_norms(float (&norm)[2], const uint4* tile_k, int warp, int g, int t, float square,
                                           int count, const bool* mask) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = warp * 16 + g + 8 * r;
    norm[r] = 0.0f;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float x[8];
      widen<T, 8>(x, *reinterpret_cast<const Vec<T, 8>*>(tile_k + piece(row, t + (n + g) % 2 * 4)));
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        norm[r] = fmaf(x[e], x[e], norm[r]);
      }
    }
    norm[r] = sum_of_four(norm[r]) * (0.5f * log2e * square);
    if (row >= count || (mask != nullptr && !mask[row])) {
      norm[r] = -masked;
    }
  }
}

// Starts p = x W^T and ds = y U^T of a tile's rows and F features, each a group of products. U is the sum of Parts
// matrices of M rows.
template <typename T, int Parts = 1, int M = 0, int R>
__device__ __forceinline__ void start_products(float (&p)[R], float (&ds)[R], const uint4* x, const uint4* omega,
                                               const uint4* y, const uint4* means) {
  const uint64_t of_x = operand(x), of_omega = operand(omega), of_y = operand(y), of_means = operand(means);
  products_begin();
#pragma unroll
  for (int s = 0; s < width / 16; ++s) {
    multiply<T>(p, further(of_x, s * 32), further(of_omega, s * 32), s > 0);
  }
  products_end();
#pragma unroll
  for (int s = 0; s < Parts * width / 16; ++s) {
    const int part = s / (width / 16), step = s % (width / 16);
    multiply<T>(ds, further(of_y, step * 32), further(of_means, part * M * pieces * 16 + step * 32), s > 0);
  }
  products_end();
}

#endif

}  // namespace bidirectional
}  // namespace linear
}  // namespace fastrpe
