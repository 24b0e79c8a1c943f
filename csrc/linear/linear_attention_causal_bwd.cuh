// What the kernels of causal gradients share: layouts of shared memory, places, tiles, sums over what was before.
#pragma once

#include <cuda_runtime.h>

#include "../common/cuda.cuh"
#include "../common/hopper.cuh"
#include "shared.cuh"

namespace fastrpe {
namespace linear {
namespace causal {

using T = BFloat16;

constexpr int tile = 64;                // queries and keys that a block takes at a time
constexpr int slab = tile * width / 8;  // 16-byte pieces of a tile
constexpr int values = 32;              // of a thread, of a product of 64 x 64

// Sums over rows of each feature: of values, of weights (of queries: of weights times delta), and what both are
// relative to; (heads, segments, M, V) and (heads, segments, M).
struct Sums {
  float *values, *weights, *tops;
};

struct Args {
  Rows<T> q, k, v, dout;
  Projection projection;
  const float* bias;  // (M,) or (Hk, M), or null
  int64_t bias_h;
  const bool* mask;            // (B, L), or null
  float *lse, *delta;          // (B, H, L)
  Sums sums;                   // of a segment's rows, or of all before it; null with one segment
  float* slots;                // of dW and the bias's gradient, (B, H, segments, M (D + 1))
  T *dq, *dk, *dv;             // contiguous
  float *group_dk, *group_dv;  // (B, H, L, D), of heads that share keys, or null
  int length, heads, groups;   // of queries, and query heads of a key head
  int segments, share, tiles;  // of a head; of tiles, a segment's and a head's
  float scale, norm;           // norm is 1 where exponents have -|x|^2 / 2, else 0
};

template <int M>
struct Layout {
  static constexpr int groups = M / 64;  // warpgroups
  static constexpr int threads = 128 * groups;
  static constexpr int matrix = M * width / 8;   // pieces of (M, 64) 16-bit values
  static constexpr int blocks = M > 64 ? 2 : 3;  // of a multiprocessor
  static constexpr int key_blocks = 2;           // which take more memory
  static constexpr size_t heads = 48;            // bytes, see Heads
  static constexpr size_t query_bytes = 16 * (3 * matrix + 6 * slab) + 4 * (2 * M + tile + 4 * groups * tile) + heads;
  static constexpr size_t key_bytes = 16 * (3 * matrix + 7 * slab) + 4 * (2 * M + 6 * tile + groups * tile) + heads;
  static constexpr size_t sum_bytes = 16 * (matrix + 4 * slab) + 4 * 5 * tile + heads;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr float limit = 48.0f;  // weights and 1 / their sum stay far within what bfloat16 holds

// The place of a thread. Of a product, as of an operand in registers, it has rows row(0) and row(1), and columns
// 8 j + 2 t and the next.
struct Thread {
  int group, warp, g, t;

  __device__ __forceinline__ Thread()
      : group(__shfl_sync(0xffffffff, threadIdx.x / 128, 0)),
        warp(__shfl_sync(0xffffffff, threadIdx.x % 128 / 32, 0)),
        g(threadIdx.x % 32 / 4),
        t(threadIdx.x % 4) {}

  __device__ __forceinline__ int row(int r) const {
    return warp * 16 + g + 8 * r;
  }

  // Where in a tile are the 16 bytes that this thread names to a matrix instruction, of the first 16 columns; those of
  // step s are 32 s off, which no sum carries, so that XOR finds them.
  __device__ __forceinline__ uint32_t named() const {
    return 16 * piece(warp * 16 + threadIdx.x % 16, threadIdx.x % 32 / 16);
  }
};

using Operand = uint32_t[4][4];  // 64 x 64 values as a left operand in registers

// The column of the first of pair i of step s, and the row; see Operand.
__device__ __forceinline__ int column_of(const Thread& at, int s, int i) {
  return 16 * s + i / 2 * 8 + 2 * at.t;
}

// Leaves of pairs of rows and columns those that count: with Lower, columns up to the row, otherwise from it on. Of 16
// x 16 blocks those on the diagonal alone have some of both, in two quarters.
template <bool Lower>
__device__ __forceinline__ void keep_pairs(const Thread& at, Operand& x) {
  const int past = 2 * at.t - at.g;  // columns behind the diagonal
  const uint32_t first = Lower ? past <= 0 : past >= 0, second = Lower ? past < 0 : past >= -1;
  const uint32_t diagonal = (first ? 0x0000ffffu : 0u) | (second ? 0xffff0000u : 0u);
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    const bool all = Lower ? s < at.warp : s > at.warp, some = all || s == at.warp;
    const uint32_t quarter = all ? ~0u : some ? diagonal : 0u;
    x[s][0] &= quarter;
    x[s][Lower ? 1 : 2] &= some ? ~0u : 0u;
    x[s][Lower ? 2 : 1] &= all ? ~0u : 0u;
    x[s][3] &= quarter;
  }
}

__device__ __forceinline__ void round_to(Operand& x, const float (&from)[values]) {
#pragma unroll
  for (int s = 0; s < 4; ++s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[s][i] = pack<T>(from[8 * s + 2 * i], from[8 * s + 2 * i + 1]);
    }
  }
}

// A pair of 16-bit values in shared memory.
__device__ __forceinline__ uint32_t load_pair(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}

// Where row(0) of a tile has columns 2 t and the next; 8 columns are a piece further, by XOR, row(1) is 1024 bytes on.
__device__ __forceinline__ uint32_t pairs_of(const Thread& at, const uint4* from) {
  return shared_address(from) + 16 * piece(at.row(0), 0) + 4 * at.t;
}

// Has the compiler forget how x came about: it would keep what it makes of x in registers, which are scarce.
template <typename X>
__device__ __forceinline__ void forget(X& x) {
  asm volatile("" : "+r"(x));
}

__device__ __forceinline__ void forget(Operand& x) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    forget(x[i / 4][i % 4]);
  }
}

__device__ __forceinline__ float2 pair_of(const float* columns, int column) {
  return *reinterpret_cast<const float2*>(columns + column);
}

// Starts to copy a tile from row `first` on, of which `count` rows are there, those that the mask leaves out as zeros.
template <int Threads>
__device__ __forceinline__ void fetch(const T* from, int64_t step, int first, int count, uint4* to,
                                      const bool* mask = nullptr) {
  const int u = threadIdx.x % 8, i = threadIdx.x / 8;
  const T* source = from + static_cast<int64_t>(first + i) * step + u * 8;
  to += piece(i, u);  // a step of 8 rows keeps the swizzle
#pragma unroll
  for (int n = 0; n < tile; n += Threads / 8) {
    const bool inside = n + i < count && (mask == nullptr || mask[first + n + i]);
    copy_async<16>(to + n * 8, source, inside);  // which reads nothing outside
    source += Threads / 8 * step;
  }
}

// lse and delta of a tile's queries.
__device__ __forceinline__ void fetch_rows(const Args& args, int64_t first, int count, float* to) {
  if (threadIdx.x < 2 * tile) {
    const float* from = (threadIdx.x < tile ? args.lse : args.delta) + first;
    const int i = threadIdx.x % tile;
    copy_async<4>(to + threadIdx.x, from + i, i < count);
  }
}

// What each key of a tile adds to its exponents.
template <int Threads>
__device__ __forceinline__ void fill_key_bias(const uint4* k, int count, const bool* mask, int first, float square,
                                              float* to) {
  constexpr int parts = Threads / tile;
  const int key = threadIdx.x / parts, part = threadIdx.x % parts;
  float sum = 0.0f;
  if (square != 0.0f) {
#pragma unroll
    for (int n = 0; n < 8 / parts; ++n) {
      float x[8];
      widen<T, 8>(x, *reinterpret_cast<const Vec<T, 8>*>(k + piece(key, part * (8 / parts) + n)));
#pragma unroll
      for (float value : x) {
        sum = fmaf(value, value, sum);
      }
    }
#pragma unroll
    for (int other = 1; other < parts; other *= 2) {
      sum += __shfl_xor_sync(0xffffffff, sum, other);
    }
  }
  if (part == 0) {
    to[key] = key < count && (mask == nullptr || mask[first + key]) ? -sum * square : masked;
  }
}

// What each query of a tile adds to its exponents; one that sees no key has an lse of `masked`.
__device__ __forceinline__ void fill_query_bias(const float* lse, int count, float* to) {
  if (threadIdx.x < tile) {
    const float x = lse[threadIdx.x];
    to[threadIdx.x] = threadIdx.x < count && x > 0.5f * masked ? -x : masked;
  }
}

// The operand some pieces further: one addition, where the compiler would make each from its address.
__device__ __forceinline__ uint64_t pieces_further(uint64_t operand, uint32_t by) {
  return (operand >> 32 << 32) | (static_cast<uint32_t>(operand) + by);
}

// c = a b^T, or c + a b^T, over the inner index of 64, both in memory.
__device__ __forceinline__ void project(float (&c)[values], const uint4* a, const uint4* b, bool add = false) {
  const uint64_t first = operand(a), second = operand(b);
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    multiply<T>(c, pieces_further(first, s * 2), pieces_further(second, s * 2), add || s > 0);
  }
}

// c + a b, both in memory; b has a row for each of the inner index.
__device__ __forceinline__ void add_product(float (&c)[values], const uint4* a, const uint4* b) {
  const uint64_t first = operand(a), second = operand(b);
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    multiply<T, Inner::b>(c, pieces_further(first, s * 2), pieces_further(second, s * 128), true);
  }
}

// c = a b, or c + a b; b has a row for each of the inner index.
__device__ __forceinline__ void add_product(float (&c)[values], const Operand& a, const uint4* b, bool add) {
  const uint64_t second = operand(b);
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    multiply<T, Inner::b>(c, a[s], pieces_further(second, s * 128), add || s > 0);
  }
}

// c + a b^T.
__device__ __forceinline__ void add_columns(float (&c)[values], const Operand& a, const uint4* b) {
  const uint64_t second = operand(b);
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    multiply<T>(c, a[s], pieces_further(second, s * 2), true);
  }
}

// x scaled, with what its columns add; the largest of each row, and of what `top` was.
__device__ __forceinline__ void make_exponents(float (&x)[values], float exponent, const float* columns,
                                               float (&top)[2]) {
  add_exponents(x, exponent, columns, top);
  largest_of_four(top);
}

// Numbers in two parts: rounded, and what that leaves, rounded.
__device__ __forceinline__ void split(uint32_t (&first)[4], uint32_t (&rest)[4], const float* x) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    first[i] = pack<T>(x[2 * i], x[2 * i + 1]);
    const float2 y = unpack<T>(first[i]);
    rest[i] = pack<T>(x[2 * i] - y.x, x[2 * i + 1] - y.y);
  }
}

__device__ __forceinline__ void split(Operand& first, Operand& rest, const float (&x)[values]) {
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    split(first[s], rest[s], x + 8 * s);
  }
}

__device__ __forceinline__ void store_operand(const Thread& at, uint4* to, const Operand& a) {
  const uint32_t named = shared_address(to) + at.named();
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    store_matrices(named ^ 32 * s, a[s]);
  }
}

// Both parts to memory.
__device__ __forceinline__ void store_split(const Thread& at, uint4* first, uint4* rest, const float (&x)[values]) {
  uint32_t named = shared_address(first) + at.named(), apart = shared_address(rest) - shared_address(first);
  forget(named);
  forget(apart);
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    uint32_t y[4], z[4];
    split(y, z, x + 8 * s);
    store_matrices(named ^ 32 * s, y);
    store_matrices((named ^ 32 * s) + apart, z);
  }
}

// And back: they are off by at most 2^-17.
__device__ __forceinline__ void load_split(const Thread& at, float (&x)[values], const uint4* first,
                                           const uint4* rest) {
  uint32_t own = pairs_of(at, first), apart = shared_address(rest) - shared_address(first);
  forget(own);
  forget(apart);
#pragma unroll
  for (int s = 0; s < 4; ++s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t from = (own ^ 16 * (2 * s + i / 2)) + 1024 * (i % 2);
      const float2 y = unpack<T>(load_pair(from)), z = unpack<T>(load_pair(from + apart));
      x[8 * s + 2 * i] = y.x + z.x;
      x[8 * s + 2 * i + 1] = y.y + z.y;
    }
  }
}

// A barrier; what it returns is the same for all threads, and the compiler is to know: it has products wait for each
// other where it sees a branch that may divide a warp.
__device__ __forceinline__ bool any_thread(bool x) {
  return __shfl_sync(0xffffffff, __syncthreads_or(x), 0) != 0;
}

// Whether a maximum has grown too much for one pass.
__device__ __forceinline__ bool is_wide(const float (&top)[2], const float (&least)[2]) {
  return top[0] - least[0] > limit || top[1] - least[1] > limit;
}

// Of columns [begin, end) of x, the largest part at their beginning (or end) within which no row's maximum grows by
// more than `limit` from the first column that counts (or the last) on. All others are left out; the result is the
// other end of the part. One column always is such a part.
template <bool Forwards>
__device__ __forceinline__ int narrow(const Thread& at, float (&x)[values], float (&top)[2], const float (&before)[2],
                                      int begin, int end, const float* columns) {
  while (true) {
    int edge = Forwards ? begin : end - 1;
    while (edge != (Forwards ? end - 1 : begin) && columns[edge] < 0.5f * masked) {
      edge += Forwards ? 1 : -1;
    }
    float least[2] = {before[0], before[1]};
    top[0] = before[0];
    top[1] = before[1];
#pragma unroll
    for (int i = 0; i < values; ++i) {
      const int column = i / 4 * 8 + 2 * at.t + i % 2, r = i / 2 % 2;
      top[r] = column >= begin && column < end ? fmaxf(top[r], x[i]) : top[r];
      least[r] = column == edge ? fmaxf(least[r], x[i]) : least[r];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = largest_of_four(top[r]);
      least[r] = largest_of_four(least[r]);
    }
    if (!any_thread(is_wide(top, least))) {
      break;
    }
    const int half = (end - begin) / 2;
    (Forwards ? end : begin) = Forwards ? begin + half : end - half;
  }
#pragma unroll
  for (int i = 0; i < values; ++i) {
    const int column = i / 4 * 8 + 2 * at.t + i % 2;
    x[i] = column >= begin && column < end ? x[i] : masked;
  }
  return __shfl_sync(0xffffffff, Forwards ? end : begin, 0);
}

// The heads of a block: in shared memory, since registers are scarce.
struct Heads {
  const T *q, *k, *v, *dout;
  const bool* mask;
  int64_t rows;  // of earlier heads of queries

  __device__ __forceinline__ void set(const Args& args, int head, int i_b, int i_h, int i_k) {
    q = args.q.at(i_b, i_h);
    k = args.k.at(i_b, i_k);
    v = args.v.at(i_b, i_k);
    dout = args.dout.at(i_b, i_h);
    mask = args.mask == nullptr ? nullptr : args.mask + static_cast<int64_t>(i_b) * args.length;
    rows = static_cast<int64_t>(head) * args.length;
  }
};

// What a block works on: a segment of a head.
struct Place {
  int i_b, i_h, i_k, begin, end;  // the last two are tiles

  // With Keys alone, of a key head.
  __device__ __forceinline__ Place(const Args& args, bool keys, Heads* heads) {
    const int head = blockIdx.x / args.segments, all = keys ? args.heads / args.groups : args.heads;
    i_b = head / all;
    i_h = head % all;
    i_k = keys ? i_h : i_h / args.groups;
    begin = blockIdx.x % args.segments * args.share;
    end = min(begin + args.share, args.tiles);
    if (threadIdx.x == 0) {
      heads->set(args, head, i_b, i_h, i_k);
    }
    __syncthreads();
  }
};

__device__ __forceinline__ int rows_of_tile(const Args& args, int i_tile) {
  return min(tile, args.length - i_tile * tile);
}

// The sums of 64 features, in registers; a thread has its part of those of the weights.
struct State {
  float sums[values], weights[2], tops[2];

  // Those before segment i of a head, or none at all.
  template <int M>
  __device__ __forceinline__ void load(const Thread& at, const Sums& from, int64_t i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t feature = i * M + at.group * 64 + at.row(r);
      const bool there = from.values != nullptr;
      weights[r] = there && at.t == 0 ? from.weights[feature] : 0.0f;
      tops[r] = there ? from.tops[feature] : empty;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 x = there ? pair_of(from.values + feature * width, 8 * j + 2 * at.t) : float2{0.0f, 0.0f};
        sums[4 * j + 2 * r] = x.x;
        sums[4 * j + 2 * r + 1] = x.y;
      }
    }
  }

  // Makes them relative to `top`.
  __device__ __forceinline__ void move(const float (&top)[2]) {
    const float factor[2] = {exp2_approximate(tops[0] - top[0]), exp2_approximate(tops[1] - top[1])};
    rescale(sums, factor);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      weights[r] *= factor[r];
      tops[r] = top[r];
    }
  }

  // Adds weights as the products have them, times what their columns have.
  __device__ __forceinline__ void add(const Thread& at, const Operand& a, const float* columns) {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 x = unpack<T>(a[s][i]);
        const float2 y = columns == nullptr ? float2{1.0f, 1.0f} : pair_of(columns, column_of(at, s, i));
        weights[i % 2] = fmaf(x.x, y.x, fmaf(x.y, y.y, weights[i % 2]));
      }
    }
  }
};

// Of two threads, which differ in a bit of t, the first gives y for the other's x.
__device__ __forceinline__ void exchange(uint32_t& x, uint32_t& y, int t, int bit) {
  const uint32_t other = __shfl_xor_sync(0xffffffff, t & bit ? x : y, bit);
  x = t & bit ? other : x;
  y = t & bit ? y : other;
}

// Columns [32 group, 32 group + 32) of a sum over both warpgroups, of which each has a part, or all columns of one.
template <int Groups>
constexpr int own = values / Groups;

// A warp's part of what it gives lies in the 2 KiB of its own rows of `to`.
template <int Groups>
__device__ __forceinline__ void give(const Thread& at, const float (&x)[values], uint4* to) {
  if constexpr (Groups > 1) {
    __syncwarp();
    float4* at_lane = reinterpret_cast<float4*>(to) + at.warp * (own<Groups> * 8) + threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < own<Groups>; i += 4) {
      at_lane[8 * i] = at.group == 0 ? float4{x[16 + i], x[17 + i], x[18 + i], x[19 + i]}
                                     : float4{x[i], x[i + 1], x[i + 2], x[i + 3]};
    }
  }
}

template <int Groups>
__device__ __forceinline__ void keep(const Thread& at, float (&y)[own<Groups>], const float (&x)[values]) {
#pragma unroll
  for (int i = 0; i < own<Groups>; ++i) {
    y[i] = Groups > 1 && at.group == 1 ? x[(values - own<Groups>)+i] : x[i];
  }
}

template <int Groups>
__device__ __forceinline__ void take(const Thread& at, float (&y)[own<Groups>], const uint4* from) {
  if constexpr (Groups > 1) {
    const float4* at_lane = reinterpret_cast<const float4*>(from) + at.warp * (own<Groups> * 8) + threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < own<Groups>; i += 4) {
      const float4 x = at_lane[8 * i];
      y[i] += x.x;
      y[i + 1] += x.y;
      y[i + 2] += x.z;
      y[i + 3] += x.w;
    }
  }
}

// Rows [begin, end) of a tile to memory. Four threads that hold a row exchange what they have of 32 columns for 16
// bytes each.
template <int Groups>
__device__ __forceinline__ void store_columns(const Thread& at, const float (&y)[own<Groups>], int begin, int end,
                                              T* to) {
#pragma unroll
  for (int n = 0; n < 2 / Groups; ++n) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t x[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        x[j] = pack<T>(y[16 * n + 4 * j + 2 * r], y[16 * n + 4 * j + 2 * r + 1]);
      }
      exchange(x[0], x[1], at.t, 1);
      exchange(x[2], x[3], at.t, 1);
      exchange(x[0], x[2], at.t, 2);
      exchange(x[1], x[3], at.t, 2);
      const int row = at.row(r), column = (Groups > 1 ? at.group : n) * 32 + at.t * 8;
      if (row >= begin && row < end) {
        *reinterpret_cast<uint4*>(to + row * width + column) = {x[0], x[1], x[2], x[3]};
      }
    }
  }
}

// The same in float32, and straight.
template <int Groups>
__device__ __forceinline__ void store_columns(const Thread& at, const float (&y)[own<Groups>], int begin, int end,
                                              float* to) {
#pragma unroll
  for (int i = 0; i < own<Groups>; i += 2) {
    const int row = at.row(i / 2 % 2), column = at.group * (width / Groups) + i / 4 * 8 + 2 * at.t;
    if (row >= begin && row < end) {
      *reinterpret_cast<float2*>(to + row * width + column) = {y[i], y[i + 1]};
    }
  }
}

// A block's part of dW, and of the bias's gradient, of which a thread has a part of columns 8 j + 2 t and the next.
template <int M>
__device__ __forceinline__ void store_slot(const Args& args, const Thread& at, const float (&domega)[values],
                                           float (&dbias)[16], float* exchange) {
  float* slot = args.slots + static_cast<int64_t>(blockIdx.x) * (M * (width + 1));
#pragma unroll
  for (int i = 0; i < values; i += 2) {
    const int64_t feature = at.group * 64 + at.row(i / 2 % 2);
    *reinterpret_cast<float2*>(slot + feature * width + i / 4 * 8 + 2 * at.t) = {domega[i] * args.scale,
                                                                                 domega[i + 1] * args.scale};
  }
  exchange += at.group * 256;  // (4, 64), of each warp
#pragma unroll
  for (int i = 0; i < 16; ++i) {
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) {
      dbias[i] += __shfl_xor_sync(0xffffffff, dbias[i], lanes);
    }
    if (at.g == 0) {
      exchange[at.warp * 64 + i / 2 * 8 + 2 * at.t + i % 2] = dbias[i];
    }
  }
  __syncthreads();
  const int f = threadIdx.x % 128;
  if (f < 64) {
    slot[M * width + at.group * 64 + f] = exchange[f] + exchange[64 + f] + exchange[128 + f] + exchange[192 + f];
  }
}

// What a thread's two features add to exponents, of queries and of keys together.
__device__ __forceinline__ void load_bias(const Args& args, const Thread& at, const Place& place, float (&bias)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t f = place.i_k * args.bias_h + at.group * 64 + at.row(r);
    bias[r] = args.bias == nullptr ? 0.0f : 2.0f * log2e * args.bias[f];
  }
}

#endif

}  // namespace causal
}  // namespace linear
}  // namespace fastrpe
