// What the forward's kernels for Hopper's tensor cores share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "shared.cuh"

namespace fastrpe {
namespace linear {

constexpr float ln2 = 0.6931471805599453f;

template <typename T>
struct Args {
  Rows<T> q, k, v;
  Projection projection;
  const float* bias;                   // (M,) or (Hk, M), or null
  const bool* mask;                    // (B, S), or null
  T* out;                              // (B, H, L, V)
  float *kv, *z, *log_scale;           // the state behind the last key, or null
  const float *kv0, *z0, *log_scale0;  // the state before the first key, or null
  // With three kernels: the sums of keys, logarithms to base 2, of block i and head j in slot i + j, when causal of
  // block i, and what queries read, the means' columns in the order of the product.
  float *part_kv, *part_z, *part_c;  // (slots, M, V), (slots, M)
  T* means;                          // (B Hk, M, V)
  float* exponents;                  // (B Hk, M)
  float scale, norm;                 // what turns projections and squared norms into exponents
  int Hk, queries, L, S;             // H is Hk times queries
  int heads;                         // B Hk
  int row_tiles;                     // of L
  int key_tiles, query_steps;        // of a key head
  int key_tile;                      // keys of a tile
  int wholes;                        // with one launch: the first heads, a block for each; two share each other one
  int key_blocks;                    // of the kernel for keys; when causal, shares
  int share_pieces;                  // when causal: of the keys between two shares' beginnings; otherwise 0
  int bias_h;
};

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

// Calls take with a key of a tile, a part of it and what the key adds to its exponents, for each key and part once:
// Threads / Keys lanes of a warp have parts of the same key.
template <int Threads, int Keys, typename T, typename Take>
__device__ __forceinline__ void each_key_bias(const Args<T>& args, const uint4* k, int b, int first, Take&& take) {
  constexpr int parts = Threads / Keys, keys = 32 / parts;  // of a key; of a warp
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
  take(key, part, takes_part(args, b, first + key) ? sum * args.norm : masked);
}

template <typename T>
struct Range {
  // A running maximum may lag behind: weights reach 2^limit, and 2^shift where it has just been taken. float16 has room
  // for small ones only where the large are far above 1.
  static constexpr float shift = std::is_same_v<T, Half> ? 12.f : 0.f;
  static constexpr float limit = std::is_same_v<T, Half> ? 15.f : 8.f;
};

// A place among the tiles of all heads, and how many from there on are this block's.
struct Place {
  int head, b, h, tile, count;

  template <typename T>
  __device__ __forceinline__ Place(const Args<T>& args, int head) : head(head), tile(0), count(0) {
    b = static_cast<uint32_t>(head) / static_cast<uint32_t>(args.Hk);
    h = head - b * args.Hk;
  }

  // An equal share of all tiles, of which a head has `tiles`.
  template <typename T>
  static __device__ __forceinline__ Place share(const Args<T>& args, int tiles) {
    const int64_t all = static_cast<int64_t>(args.heads) * tiles;
    const int block = this_block();
    const int first = static_cast<int>(all * block / gridDim.x);
    Place place(args, static_cast<uint32_t>(first) / static_cast<uint32_t>(tiles));
    place.tile = first - place.head * tiles;
    place.count = static_cast<int>(all * (block + 1) / gridDim.x) - first;
    return place;
  }

  // A piece of the tiles between where two shares of causal attention begin, of those of the second's head; none where
  // it begins with a head. Neighbouring blocks have different shares, so that those without tiles spread.
  template <typename T>
  static __device__ __forceinline__ Place before_share(const Args<T>& args) {
    const int64_t all = static_cast<int64_t>(args.heads) * args.key_tiles;
    const int block = this_block(), between = args.key_blocks - 1, piece = block / between,
              share = block - piece * between;
    const int end = static_cast<int>(all * (share + 1) / args.key_blocks);
    Place place(args, static_cast<uint32_t>(end) / static_cast<uint32_t>(args.key_tiles));
    const int begin = max(static_cast<int>(all * share / args.key_blocks) - place.head * args.key_tiles, 0);
    const int64_t tiles = end - place.head * args.key_tiles - begin;
    place.tile = begin + static_cast<int>(tiles * piece / args.share_pieces);
    place.count = begin + static_cast<int>(tiles * (piece + 1) / args.share_pieces) - place.tile;
    return place;
  }

  template <typename T>
  __device__ __forceinline__ void next_head(const Args<T>& args) {
    ++head;
    if (++h == args.Hk) {
      h = 0;
      ++b;
    }
  }
};

template <typename T>
__device__ __forceinline__ float feature_bias(const Args<T>& args, int h, int row) {
  return args.bias == nullptr ? 0 : args.bias[static_cast<int64_t>(h) * args.bias_h + row] * log2e;
}

// Attention of M = 64 or 128 features for heads of 1 to 64 queries and keys, without a state.
template <typename T, int M>
void head_attention(const Args<T>& args, int multiprocessors, int device, cudaStream_t stream);

// Of how many heads a block takes all, the first ones, if two share each of the others where these leave places free:
// either has a multiprocessor for itself, or many keys, M to a tile. With two places to a multiprocessor, a whole and a
// half on each take less time than two wholes on some.
template <int M>
int whole_heads(int64_t heads, int64_t key_tiles, int64_t multiprocessors) {
  constexpr int64_t resident = 256 / M;
  const int64_t wholes = std::max(2 * heads - resident * multiprocessors, int64_t{0});
  const bool has_room = wholes == 0 || (resident == 2 && wholes <= multiprocessors);
  const bool pays = key_tiles * M > 384 || (2 * heads <= multiprocessors && key_tiles > 1);
  return static_cast<int>(has_room && pays ? wholes : heads);
}

// Attention of M = 64 or 128 features with a block for each key head, or two. False where q, k and v cannot be copied
// so.
template <typename T, int M>
bool whole_attention(Args<T> args, int device, cudaStream_t stream);

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Squared norms of the projection's rows `feature` and 8 further, by the four threads t that have them. Exponents of
// keys with a feature, scale w k - |scale k|^2 / 2, are at most |w|^2 / 2.
template <typename T>
__device__ __forceinline__ void find_squares(const uint4* omega, int feature, int t, float (&squares)[2]) {
  squares[0] = squares[1] = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x[8];
      widen<T, 8>(x, *reinterpret_cast<const Vec<T, 8>*>(omega + piece(feature + 8 * i, 4 * half + t)));
#pragma unroll
      for (float value : x) {
        squares[i] = fmaf(value, value, squares[i]);
      }
    }
  }
  sum_of_four(squares);
}

// The largest exponents that keys can have with this thread's features.
template <typename T>
__device__ __forceinline__ void find_bounds(const uint4* omega, float (&bounds)[2]) {
  uint32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));  // so that no address is made ahead, and kept
  float squares[2];
  find_squares<T>(omega, thread / 32 * 16 + thread % 32 / 4, thread % 4, squares);
  bounds[0] = squares[0] * (log2e / 2);
  bounds[1] = squares[1] * (log2e / 2);
}

// Whether keys' weights 2^s may be too large to be summed as they are, or all too small, those of a head's first keys
// being at most 2^top.
template <typename T>
__device__ __forceinline__ bool need_largest(const uint4* omega, const float (&top)[2]) {
  constexpr float large = 88, small = -40;
  float bounds[2];
  find_bounds<T>(omega, bounds);
  return fmaxf(bounds[0], bounds[1]) > large || fminf(top[0], top[1]) < small;
}

// Rows of queries are normalised, so that any reference within some powers of two of a row's largest exponent is as
// good as that one: the largest of what features add, and `reference_shift`, where queries add no more than 2^72.
// Weights of 2^-88 leave 22 bits below them, and those of 2^56 leave room for sums with large values.
constexpr float reference_shift = 16;

// 1 / x within 1 ulp; tiny x are 0.
__device__ __forceinline__ float reciprocal_approximate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The bits of the largest squared norm of queries that add no more, `norm` being that of the projection's rows.
__device__ __forceinline__ uint32_t query_bound(float scale, float norm) {
  constexpr float room = 72;
  return __float_as_uint(room * room * reciprocal_approximate(scale * scale * norm));
}

// The largest squared norm of rows in bfloat16, by a warp, within two percent: the squares of a piece are added in 16
// bits. These are the number's bits, which are ordered as the numbers, with NaN above.
template <int Rows>
__device__ __forceinline__ uint32_t largest_norm(const uint4* rows) {
  static_assert(Rows == 16 || Rows % 32 == 0);
  constexpr int parts = Rows == 16 ? 2 : 1;  // of a row, each in a lane
  constexpr int count = Rows * parts / 32;
  const int row = threadIdx.x % (32 / parts), part = threadIdx.x % 32 / (32 / parts);
  float squares[count] = {};
#pragma unroll
  for (int u = 0; u < pieces / parts; ++u) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const auto* x =
          reinterpret_cast<const __nv_bfloat162*>(rows + piece(row, part * (pieces / parts) + u) + 32 * i * pieces);
      __nv_bfloat162 sum = __hmul2(x[0], x[0]);
#pragma unroll
      for (int n = 1; n < 4; ++n) {
        sum = __hfma2(x[n], x[n], sum);
      }
      const float2 both = unpack<BFloat16>(*reinterpret_cast<const uint32_t*>(&sum));
      squares[i] += both.x + both.y;
    }
  }
  uint32_t largest = 0;
#pragma unroll
  for (float square : squares) {
    square = parts == 1 ? square : square + __shfl_xor_sync(~0u, square, 16);
    largest = max(largest, __float_as_uint(square));
  }
  return __reduce_max_sync(~0u, largest);
}

// What a tile's keys add to the exponents of their projections, and `more`, by a warp; a lane has each 32nd key. Keys
// that take no part become zero with their values, whatever they were.
template <int Keys, typename T>
__device__ __forceinline__ void fill_bias(const Args<T>& args, uint4* k, uint4* v, int b, int first, float more,
                                          float* to) {
  constexpr int own = Keys / 32;
  const int lane = threadIdx.x % 32;
  float squares[own] = {};
  if (args.norm != 0) {
#pragma unroll
    for (int u = 0; u < pieces; ++u) {
#pragma unroll
      for (int n = 0; n < own; ++n) {
        float x[8];
        widen<T, 8>(x, *reinterpret_cast<const Vec<T, 8>*>(k + piece(lane, u) + 32 * n * pieces));
#pragma unroll
        for (float value : x) {
          squares[n] = fmaf(value, value, squares[n]);
        }
      }
    }
  }
#pragma unroll
  for (int n = 0; n < own; ++n) {
    const int key = lane + 32 * n;
    const bool takes = takes_part(args, b, first + key);
    to[key] = takes ? fmaf(squares[n], args.norm, more) : masked;
    if (args.mask != nullptr && !takes) {
#pragma unroll
      for (int u = 0; u < pieces; ++u) {
        k[key * pieces + u] = v[key * pieces + u] = {};
      }
    }
  }
  if (args.mask != nullptr) {
    copies_visible();
  }
}

// A thread's share of the sums over a head's keys, to this block's slot; z and c are its two features'.
template <int M, typename T>
__device__ __forceinline__ void store_part(const Args<T>& args, int head, const float (&kv)[32], const float (&z)[2],
                                           const float (&c)[2]) {
  const int t = threadIdx.x % 4, feature = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  const int64_t slot = static_cast<int64_t>(this_block()) + (args.share_pieces > 0 ? 0 : head);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row = slot * M + feature + 8 * i;
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

#endif

// With three kernels, those for keys and for queries where a multiprocessor has many tiles: of 128 keys, shared by
// blocks, one to a multiprocessor; and of 64 queries. False where keys and values cannot be copied so.

template <typename T, int M>
bool sum_many_keys(const Args<T>& args, int blocks, int device, cudaStream_t stream);

template <typename T, int M>
void attend_many(Args<T> args, int multiprocessors, int device, cudaStream_t stream);

// How many equal shares of the tiles of all key heads causal attention takes, each with the sums of the keys before it:
// as many as heads where one launch is as good.
template <int M>
int causal_shares(int64_t heads, int64_t queries, int64_t L, int64_t key_tiles, int64_t multiprocessors);

// Causal attention, of args.key_blocks shares. Where these are not the heads, args.part_* hold the sums of the keys
// from a share's beginning, or its last head's, to the next's, piece n of share i in slot i + n (args.key_blocks - 1);
// the slot of the first piece comes to hold those of all keys of the head before the next share.
template <typename T, int M>
void causal_attention(const Args<T>& args, int device, cudaStream_t stream);

}  // namespace linear
}  // namespace fastrpe
