#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>

#include "../common/cuda.cuh"
#include "../common/hopper.cuh"
#include "linear_attention_cuda.h"
#include "shared.cuh"

// Gradients of causal, normalised attention by exponential features, in bfloat16. With s_jf and t_if the exponents of
// keys and queries, p_ij = sum_f 2^(t_if + s_jf - lse_i) for j <= i sums to 1 over j, and
//
//   delta_i = dout_i . out_i,   dp_ij = dout_i . v_j - delta_i   for j <= i, else 0
//   dt_if = sum_j 2^(t_if + s_jf - lse_i) dp_ij,   dq = scale dt W
//   ds_jf = sum_i 2^(t_if + s_jf - lse_i) dp_ij,   dk = scale ds W - scale^2 k sum_f ds,   dv_j = sum_i p_ij dout_i
//
// and dW = scale (dt^T q + ds^T k). One walk goes forwards, with the sums over the keys of earlier tiles, and finds
// lse, delta and dq; another goes backwards, with the sums over the queries of later tiles, and finds dk and dv. Within
// a tile all pairs are products of 64 x 64. A warpgroup has 64 features, of all 64 rows of a tile.
//
// Few heads are divided into segments of tiles, each a block: the sums of each are taken first, and those of all before
// it (for queries, behind it) added. A block leaves its part of dW in a slot; slots are added in order, so the result
// is deterministic.
//
// What cancels is not rounded to 8 bits: delta_i is a sum of unrounded products, dp and the sums over other tiles enter
// a product in two parts, as ds does where it makes dk. Where few keys or features have most of the weight, the error
// of one rounding would be as large as a gradient's tolerance.
//
// Sums over keys are relative to 2^c_f, with c_f the largest exponent of the feature so far, those over queries
// relative to the largest t_if - lse_i from the last row on. A tile has one such maximum where it ends: rows that do
// not see it lose what is far below, so that a tile in which a maximum grows by more than `limit` is done a part at a
// time. Exponents are in base 2.
namespace fastrpe {
namespace linear {
namespace {

using T = BFloat16;

constexpr int tile = 64;                // queries and keys that a block takes at a time
constexpr int slab = tile * width / 8;  // 16-byte pieces of a tile
constexpr int values = 32;              // of a thread, of a product of 64 x 64
constexpr float empty = -1e20f;         // the maximum of no exponent at all

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

constexpr float none = -1e30f;  // the exponent of what takes no part
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

__device__ __forceinline__ float2 unpack(uint32_t x) {
  return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)};
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
    to[key] = key < count && (mask == nullptr || mask[first + key]) ? -sum * square : none;
  }
}

// What each query of a tile adds to its exponents; one that sees no key has an lse of none.
__device__ __forceinline__ void fill_query_bias(const float* lse, int count, float* to) {
  if (threadIdx.x < tile) {
    const float x = lse[threadIdx.x];
    to[threadIdx.x] = threadIdx.x < count && x > 0.5f * none ? -x : none;
  }
}

// The operand some pieces further: one addition, where the compiler would make each from its address.
__device__ __forceinline__ uint64_t further(uint64_t operand, uint32_t by) {
  return (operand >> 32 << 32) | (static_cast<uint32_t>(operand) + by);
}

// c = a b^T, or c + a b^T, over the inner index of 64, both in memory.
__device__ __forceinline__ void project(float (&c)[values], const uint4* a, const uint4* b, bool add = false) {
  const uint64_t first = operand(a), second = operand(b);
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    multiply<T>(c, further(first, s * 2), further(second, s * 2), add || s > 0);
  }
}

// c + a b, both in memory; b has a row for each of the inner index.
__device__ __forceinline__ void add_product(float (&c)[values], const uint4* a, const uint4* b) {
  const uint64_t first = operand(a), second = operand(b);
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    multiply<T, Inner::b>(c, further(first, s * 2), further(second, s * 128), true);
  }
}

// c = a b, or c + a b; b has a row for each of the inner index.
__device__ __forceinline__ void add_product(float (&c)[values], const Operand& a, const uint4* b, bool add) {
  const uint64_t second = operand(b);
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    multiply<T, Inner::b>(c, a[s], further(second, s * 128), add || s > 0);
  }
}

// c + a b^T.
__device__ __forceinline__ void add_columns(float (&c)[values], const Operand& a, const uint4* b) {
  const uint64_t second = operand(b);
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    multiply<T>(c, a[s], further(second, s * 2), true);
  }
}

// x scaled, with what its columns add; the largest of each row, and of what `top` was.
__device__ __forceinline__ void make_exponents(float (&x)[values], float exponent, const float* columns,
                                               float (&top)[2]) {
  add_exponents(x, exponent, columns, top);
  top[0] = largest_of_four(top[0]);
  top[1] = largest_of_four(top[1]);
}

__device__ __forceinline__ void weigh(Operand& a, const float (&x)[values], const float (&top)[2]) {
#pragma unroll
  for (int s = 0; s < 4; ++s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[s][i] =
          pack<T>(exp2_approximate(x[8 * s + 2 * i] - top[i % 2]), exp2_approximate(x[8 * s + 2 * i + 1] - top[i % 2]));
    }
  }
}

// Numbers in two parts: rounded, and what that leaves, rounded.
__device__ __forceinline__ void split(uint32_t (&first)[4], uint32_t (&rest)[4], const float* x) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    first[i] = pack<T>(x[2 * i], x[2 * i + 1]);
    const float2 y = unpack(first[i]);
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
      const float2 y = unpack(load_pair(from)), z = unpack(load_pair(from + apart));
      x[8 * s + 2 * i] = y.x + z.x;
      x[8 * s + 2 * i + 1] = y.y + z.y;
    }
  }
}

__device__ __forceinline__ void rescale(float (&sums)[values], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < values; ++i) {
    sums[i] *= factor[i / 2 % 2];
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
    while (edge != (Forwards ? end - 1 : begin) && columns[edge] < 0.5f * none) {
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
    x[i] = column >= begin && column < end ? x[i] : none;
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
        const float2 x = unpack(a[s][i]);
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

#endif

// Queries -------------------------------------------------------------------------------------------------------------

// dq, lse and delta of a segment, forwards; with Omega a part of dW too.
template <int M, bool Omega>
__global__ void __launch_bounds__(Layout<M>::threads, Omega ? 1 : Layout<M>::blocks)
    query_walk_kernel(const Args args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Of = Layout<M>;
  constexpr int G = Of::groups;
  extern __shared__ __align__(1024) uint4 memory[];
  const Thread at;
  // This warpgroup's features, in rows of D, of V and of keys.
  uint4 *omega = memory + at.group * slab, *state = omega + Of::matrix, *phi = state + Of::matrix;
  uint4 *tile_q = memory + 3 * Of::matrix, *tile_k = tile_q + slab, *stages = tile_k + slab;  // v and dout of each
  float* exponents = reinterpret_cast<float*>(stages + 4 * slab) + at.group * 64;
  float* weights = exponents + M;
  float* key_bias = reinterpret_cast<float*>(stages + 4 * slab) + 2 * M;
  float4* row_sums = reinterpret_cast<float4*>(key_bias + tile);  // (groups, tile)

  Heads* heads = reinterpret_cast<Heads*>(row_sums + G * tile);

  const Place place(args, false, heads);
  const auto start_projected = [&](int i_tile) {
    forget(i_tile);
    if (i_tile < place.end) {
      const int first = i_tile * tile, count = rows_of_tile(args, i_tile);
      fetch<Of::threads>(heads->q, args.q.l, first, count, tile_q);
      fetch<Of::threads>(heads->k, args.k.l, first, count, tile_k, heads->mask);
    }
    copies_end();
  };
  const auto start_values = [&](int i_tile) {
    forget(i_tile);
    if (i_tile < place.end) {
      const int first = i_tile * tile, count = rows_of_tile(args, i_tile);
      uint4* to = stages + i_tile % 2 * 2 * slab;
      fetch<Of::threads>(heads->v, args.v.l, first, count, to, heads->mask);
      fetch<Of::threads>(heads->dout, args.dout.l, first, count, to + slab);
    }
    copies_end();
  };
  fill_projection<T, M, Of::threads>(args.projection, place.i_k, memory);
  start_values(place.begin);
  start_projected(place.begin);
  let_next_begin();
  wait_for_previous();  // which sums keys; all that is copied is older

  const float exponent = args.scale * log2e, square = args.norm * 0.5f * log2e * args.scale * args.scale;
  State keys;
  keys.load<M>(at, args.sums,
               static_cast<int64_t>(place.i_b * (args.heads / args.groups) + place.i_k) * args.segments +
                   blockIdx.x % args.segments);
  float bias[2];  // of queries and of keys
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t f = place.i_k * args.bias_h + at.group * 64 + at.row(r);
    bias[r] = args.bias == nullptr ? 0.0f : 2.0f * log2e * args.bias[f];
  }
  float domega[Omega ? values : 1] = {}, dbias[Omega ? 16 : 1] = {};

  for (int i_tile = place.begin; i_tile < place.end; ++i_tile) {
    const uint4 *tile_v = stages + i_tile % 2 * 2 * slab, *tile_dout = tile_v + slab;
    uint4* rests = stages + (1 - i_tile % 2) * 2 * slab + at.group * slab;  // of the sums, until values come there
    const int first = i_tile * tile, count = rows_of_tile(args, i_tile);
    copies_wait<0>();
    copies_visible();
    __syncthreads();  // this tile is there, and everyone has left the one before
    fill_key_bias<Of::threads>(tile_k, count, heads->mask, first, square, key_bias);
    int begin = 0;
    do {
      float s[values];
      products_begin();
      project(s, omega, tile_k);
      products_end();
      __syncthreads();  // key_bias is there
      products_wait<0>(s);
      float top[2] = {keys.tops[0], keys.tops[1]};
      make_exponents(s, exponent, key_bias, top);
      int end = tile;
      if (any_thread(begin > 0 || is_wide(top, keys.tops))) {
        end = narrow<true>(at, s, top, keys.tops, begin, tile, key_bias);
      }
      keys.move(top);
      store_split(at, state, rests, keys.sums);
      Operand a;
      weigh(a, s, top);
      store_operand(at, phi, a);
      float p[values];
      products_begin();
      project(p, tile_q, omega);
      products_end();
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float before = sum_of_four(keys.weights[r]);
        if (at.t == 0) {
          exponents[at.row(r)] = top[r] + bias[r];
          weights[at.row(r)] = before;
        }
      }
      keys.add(at, a, nullptr);
      copies_visible();
      warpgroup_sync();  // all features' sums and weights are there

      // Weights of queries, relative to the largest of a row's features here.
      Operand w, pairs, rest;
      float largest[2] = {-INFINITY, -INFINITY}, den[2] = {}, delta[2] = {};
      products_wait<0>(p);
      make_exponents(p, exponent, exponents, largest);
      weigh(w, p, largest);
      float scores[values];
      products_begin();
      add_product(scores, w, phi, false);
      products_end();
#pragma unroll
      for (int s = 0; s < 4; ++s) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 x = unpack(w[s][i]), z = pair_of(weights, column_of(at, s, i));
          den[i % 2] = fmaf(x.x, z.x, fmaf(x.y, z.y, den[i % 2]));
        }
      }
      float dscores[values];
      products_begin();
      project(dscores, tile_dout, tile_v);
      products_end();
      products_wait<1>(scores);
      const int behind = at.row(0) - 2 * at.t;
#pragma unroll
      for (int i = 0; i < values; ++i) {
        scores[i] = i / 4 * 8 + i % 2 - i / 2 % 2 * 8 <= behind ? scores[i] : 0.0f;
        den[i / 2 % 2] += scores[i];
      }
      products_wait<0>(dscores);
      forget(w);
#pragma unroll
      for (int i = 0; i < values; ++i) {
        delta[i / 2 % 2] = fmaf(scores[i], dscores[i], delta[i / 2 % 2]);
      }
      float dw[values];  // of the keys before this part, at first
      products_begin();
      project(dw, tile_dout, state);
      project(dw, tile_dout, rests, true);
      products_end();
      products_wait<0>(dw);
#pragma unroll
      for (int s = 0; s < 4; ++s) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 x = unpack(w[s][i]);
          delta[i % 2] = fmaf(x.x, dw[8 * s + 2 * i], fmaf(x.y, dw[8 * s + 2 * i + 1], delta[i % 2]));
        }
      }
      forget(w);
      float factor[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        den[r] = sum_of_four(den[r]);
        delta[r] = sum_of_four(delta[r]);
        if (G > 1 && at.t == 0) {
          row_sums[at.group * tile + at.row(r)] = {largest[r], den[r], delta[r], 0.0f};
        }
      }
      if constexpr (G > 1 || !Omega) {
        __syncthreads();
      }
      if (!Omega && end == tile) {
        start_projected(i_tile + 1);  // everyone has projected this one
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = at.row(r);
        factor[r] = 1.0f;
        if constexpr (G > 1) {
          const float4 other = row_sums[(1 - at.group) * tile + row];
          const float all = fmaxf(largest[r], other.x), more = exp2_approximate(other.x - all);
          factor[r] = exp2_approximate(largest[r] - all);
          den[r] = den[r] * factor[r] + other.y * more;
          delta[r] = delta[r] * factor[r] + other.z * more;
          largest[r] = all;
        }
        const bool there = den[r] > 0.0f && row >= begin && row < end;
        const float inverse = there ? 1.0f / den[r] : 0.0f;
        factor[r] *= inverse;
        delta[r] *= inverse;
        if (at.group == 0 && at.t == 0 && row >= begin && row < min(end, count)) {
          int i = first + row;
          forget(i);
          args.lse[heads->rows + i] = there ? largest[r] + log2f(den[r]) : none;
          args.delta[heads->rows + i] = delta[r];
        }
      }

#pragma unroll
      for (int i = 0; i < values; ++i) {
        dscores[i] -= delta[i / 2 % 2];
      }
      split(pairs, rest, dscores);
      keep_pairs<true>(at, pairs);
      keep_pairs<true>(at, rest);
      products_begin();
      add_columns(dw, pairs, phi);
      add_columns(dw, rest, phi);
      products_end();
      products_wait<0>(dw);
#pragma unroll
      for (int s = 0; s < 4; ++s) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 x = unpack(w[s][i]), z = pair_of(weights, column_of(at, s, i));
          const float x0 = x.x * factor[i % 2] * fmaf(-delta[i % 2], z.x, dw[8 * s + 2 * i]);
          const float x1 = x.y * factor[i % 2] * fmaf(-delta[i % 2], z.y, dw[8 * s + 2 * i + 1]);
          if constexpr (Omega) {
            dbias[(2 * s + i / 2) * 2] += x0;
            dbias[(2 * s + i / 2) * 2 + 1] += x1;
          }
          pairs[s][i] = pack<T>(x0, x1);
        }
      }
      float dq[values];
      products_begin();
      add_product(dq, pairs, omega, false);
      products_end();
      load_split(at, keys.sums, state, rests);
      products_begin();
      add_product(keys.sums, phi, tile_v);
      products_end();
      products_wait<0>(keys.sums);
      __syncthreads();  // nobody reads phi any more, nor what the sums' rounding left
      if (end == tile) {
        start_values(i_tile + 1);
      }
      if constexpr (Omega) {
        store_operand(at, phi, pairs);
        copies_visible();
        warpgroup_sync();
        products_begin();
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          multiply<T, Inner::both>(domega, operand(phi + s * 128), operand(tile_q + s * 128), true);
        }
        products_end();
        products_wait<0>(domega);
        warpgroup_sync();
      }
      products_wait<0>(dq);
      give<G>(at, dq, phi);
      __syncthreads();
      float y[own<G>];
      keep<G>(at, y, dq);
      take<G>(at, y, memory + 2 * Of::matrix + (G - 1 - at.group) * slab);
#pragma unroll
      for (float& x : y) {
        x *= args.scale;
      }
      store_columns<G>(at, y, begin, min(end, count), args.dq + (heads->rows + first) * width);
      begin = end;
    } while (begin < tile);
    if constexpr (Omega) {
      start_projected(i_tile + 1);
    }
  }
  if constexpr (Omega) {
    __syncthreads();
    store_slot<M>(args, at, domega, dbias, reinterpret_cast<float*>(memory));
  }
#endif
}

// Keys ----------------------------------------------------------------------------------------------------------------

// dk and dv of a segment, backwards; with Omega a part of dW too.
template <int M, bool Omega>
__global__ void __launch_bounds__(Layout<M>::threads, Omega ? 1 : Layout<M>::key_blocks)
    key_walk_kernel(const Args args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Of = Layout<M>;
  constexpr int G = Of::groups;
  extern __shared__ __align__(1024) uint4 memory[];
  const Thread at;
  // This warpgroup's features, in rows of D, of V and of queries.
  uint4 *omega = memory + at.group * slab, *state = omega + Of::matrix, *phi = state + Of::matrix;
  uint4 *tile_v = memory + 3 * Of::matrix, *stages = tile_v + slab;  // q, k and dout of each
  float* floats = reinterpret_cast<float*>(stages + 6 * slab);
  float *exponents = floats + at.group * 64, *weights = exponents + M;
  float *key_bias = floats + 2 * M, *query_bias = key_bias + tile;
  float* rows = query_bias + tile;  // lse and delta of each stage
  float* norms = rows + 4 * tile;   // (groups, tile)

  Heads* heads = reinterpret_cast<Heads*>(norms + G * tile);

  const Place place(args, false, heads);
  const auto start_values = [&](int i_tile) {
    forget(i_tile);
    if (i_tile >= place.begin) {
      fetch<Of::threads>(heads->v, args.v.l, i_tile * tile, rows_of_tile(args, i_tile), tile_v, heads->mask);
    }
    copies_end();
  };
  const auto start_others = [&](int i_tile) {
    forget(i_tile);
    if (i_tile >= place.begin) {
      const int first = i_tile * tile, count = rows_of_tile(args, i_tile);
      uint4* to = stages + i_tile % 2 * 3 * slab;
      fetch<Of::threads>(heads->q, args.q.l, first, count, to);
      fetch<Of::threads>(heads->k, args.k.l, first, count, to + slab, heads->mask);
      fetch<Of::threads>(heads->dout, args.dout.l, first, count, to + 2 * slab);
      fetch_rows(args, heads->rows + first, count, rows + i_tile % 2 * 2 * tile);
    }
    copies_end();
  };
  fill_projection<T, M, Of::threads>(args.projection, place.i_k, memory);
  let_next_begin();
  wait_for_previous();  // which sums queries, or finds their lse and delta
  start_others(place.end - 1);
  start_values(place.end - 1);

  const float exponent = args.scale * log2e, square = args.norm * args.scale * args.scale;
  State queries;
  queries.load<M>(at, args.sums, blockIdx.x);
  float bias[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t f = place.i_k * args.bias_h + at.group * 64 + at.row(r);
    bias[r] = args.bias == nullptr ? 0.0f : 2.0f * log2e * args.bias[f];
  }
  float domega[Omega ? values : 1] = {}, dbias[Omega ? 16 : 1] = {};

  for (int i_tile = place.end - 1; i_tile >= place.begin; --i_tile) {
    uint4* tile_q = stages + i_tile % 2 * 3 * slab;
    const uint4 *tile_k = tile_q + slab, *tile_dout = tile_k + slab;
    uint4* rests = stages + (1 - i_tile % 2) * 3 * slab + at.group * slab;  // of the sums, until queries come there
    const float *lse = rows + i_tile % 2 * 2 * tile, *deltas = lse + tile;
    const int first = i_tile * tile, count = rows_of_tile(args, i_tile);
    copies_wait<1>();
    copies_visible();
    __syncthreads();  // all but the values is there, and everyone has left the tile before
    fill_key_bias<Of::threads>(tile_k, count, heads->mask, first, 0.5f * log2e * square, key_bias);
    fill_query_bias(lse, count, query_bias);
    int end = tile;
    do {
      float s[values];
      products_begin();
      project(s, omega, tile_q);
      products_end();
      __syncthreads();  // key_bias and query_bias are there
      products_wait<0>(s);
      float top[2] = {queries.tops[0], queries.tops[1]};
      make_exponents(s, exponent, query_bias, top);
      copies_wait<0>();  // the values
      copies_visible();
      int begin = 0;
      if (any_thread(end < tile || is_wide(top, queries.tops))) {
        begin = narrow<false>(at, s, top, queries.tops, 0, end, query_bias);
      }
      queries.move(top);
      store_split(at, state, rests, queries.sums);
      Operand a;
      weigh(a, s, top);
      store_operand(at, phi, a);
      float p[values];
      products_begin();
      project(p, tile_k, omega);
      products_end();
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float before = sum_of_four(queries.weights[r]);
        if (at.t == 0) {
          exponents[at.row(r)] = top[r] + bias[r];
          weights[at.row(r)] = before;
        }
      }
      queries.add(at, a, deltas);
      copies_visible();
      warpgroup_sync();  // all features' sums and weights are there
      products_wait<0>(p);

      Operand w, pairs, slopes, rest;
      {
        float key[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          key[r] = at.row(r) >= begin && at.row(r) < end ? key_bias[at.row(r)] : none;
        }
#pragma unroll
        for (int s = 0; s < 4; ++s) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float2 c = pair_of(exponents, column_of(at, s, i));
            w[s][i] = pack<T>(exp2_approximate(fmaf(p[8 * s + 2 * i], exponent, c.x) + key[i % 2]),
                              exp2_approximate(fmaf(p[8 * s + 2 * i + 1], exponent, c.y) + key[i % 2]));
          }
        }
      }
      float scores[values];
      products_begin();
      add_product(scores, w, phi, false);
      products_end();
      products_wait<0>(scores);
      round_to(pairs, scores);
      keep_pairs<false>(at, pairs);
      float dv[values];
      products_begin();
      add_product(dv, w, state, false);
      add_product(dv, pairs, tile_dout, true);
      products_end();
      products_wait<0>(dv);
      const int64_t offset = (heads->rows + first) * width;
      const int last = min(end, count);
      // What the warpgroups give each other of dv goes the one way and then the other, where q was.
      float y[own<G>];
      keep<G>(at, y, dv);
      if (G > 1 && at.group == 0) {
        give<G>(at, dv, tile_q);
      }
      if constexpr (G > 1) {
        __syncthreads();
        if (at.group == 1) {
          take<G>(at, y, tile_q);
          give<G>(at, dv, tile_q);
        }
      }
      float dscores[values];
      products_begin();
      project(dscores, tile_v, tile_dout);
      products_end();
      products_wait<0>(dscores);
#pragma unroll
      for (int s = 0; s < 4; ++s) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 delta = pair_of(deltas, column_of(at, s, i));
          dscores[8 * s + 2 * i] -= delta.x;
          dscores[8 * s + 2 * i + 1] -= delta.y;
        }
      }
      split(slopes, rest, dscores);
      keep_pairs<false>(at, slopes);
      keep_pairs<false>(at, rest);
      if constexpr (G > 1) {
        __syncthreads();
        if (at.group == 0) {
          take<G>(at, y, tile_q);
        }
      }
      if (args.group_dv == nullptr) {
        store_columns<G>(at, y, begin, last, args.dv + offset);
      } else {
        store_columns<G>(at, y, begin, last, args.group_dv + offset);
      }
      float dw[values];
      products_begin();
      project(dw, tile_v, state);
      project(dw, tile_v, rests, true);
      add_columns(dw, slopes, phi);
      add_columns(dw, rest, phi);
      products_end();
      products_wait<0>(dw);
      float total[2] = {};
#pragma unroll
      for (int s = 0; s < 4; ++s) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 x = unpack(w[s][i]), y = pair_of(weights, column_of(at, s, i));
          const float x0 = x.x * (dw[8 * s + 2 * i] - y.x), x1 = x.y * (dw[8 * s + 2 * i + 1] - y.y);
          if constexpr (Omega) {
            dbias[(2 * s + i / 2) * 2] += x0;
            dbias[(2 * s + i / 2) * 2 + 1] += x1;
          }
          dw[8 * s + 2 * i] = x0;
          dw[8 * s + 2 * i + 1] = x1;
          total[i % 2] += x0 + x1;
        }
      }
      split(slopes, rest, dw);
      float dk[values];
      products_begin();
      add_product(dk, slopes, omega, false);
      add_product(dk, rest, omega, true);
      products_end();
      load_split(at, queries.sums, state, rests);
      products_begin();
      add_product(queries.sums, phi, tile_dout);
      products_end();
      products_wait<0>(queries.sums);
      __syncthreads();  // nobody reads phi any more, nor what the sums' rounding left
      if (begin == 0) {
        start_others(i_tile - 1);
      }
      if constexpr (Omega) {
        store_operand(at, phi, slopes);
        copies_visible();
        warpgroup_sync();
        products_begin();
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          multiply<T, Inner::both>(domega, operand(phi + s * 128), operand(tile_k + s * 128), true);
        }
        products_end();
        products_wait<0>(domega);
        warpgroup_sync();
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        total[r] = sum_of_four(total[r]);
        if (G > 1 && at.t == 0) {
          norms[at.group * tile + at.row(r)] = total[r];
        }
      }
      products_wait<0>(dk);
      keep<G>(at, y, dk);
      give<G>(at, dk, phi);
      __syncthreads();  // the other warpgroup's part is there, and no product reads values any more
      if (begin == 0) {
        start_values(i_tile - 1);
      }
      take<G>(at, y, memory + 2 * Of::matrix + (G - 1 - at.group) * slab);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        total[r] = (G > 1 ? total[r] + norms[(1 - at.group) * tile + at.row(r)] : total[r]) * square;
      }
      const uint32_t own_k = pairs_of(at, tile_k) ^ 16 * (at.group * (8 / G));
#pragma unroll
      for (int i = 0; i < own<G>; i += 2) {
        const float2 x = unpack(load_pair((own_k ^ 16 * (i / 4)) + 1024 * (i / 2 % 2)));
        y[i] = fmaf(y[i], args.scale, -x.x * total[i / 2 % 2]);
        y[i + 1] = fmaf(y[i + 1], args.scale, -x.y * total[i / 2 % 2]);
      }
      if (args.group_dk == nullptr) {
        store_columns<G>(at, y, begin, last, args.dk + offset);
      } else {
        store_columns<G>(at, y, begin, last, args.group_dk + offset);
      }
      if (G > 1 && begin > 0) {
        fetch<Of::threads>(heads->q, args.q.l, first, count, tile_q);
        copies_end();
        copies_wait<0>();
        copies_visible();
        __syncthreads();
      }
      end = begin;
    } while (end > 0);
  }
  if constexpr (Omega) {
    __syncthreads();
    store_slot<M>(args, at, domega, dbias, reinterpret_cast<float*>(memory));
  }
#endif
}

// Segments ------------------------------------------------------------------------------------------------------------

// The sums over a segment's keys that later segments take, or over its queries, for earlier ones.
template <int M, bool Keys>
__global__ void __launch_bounds__(Layout<M>::threads, Layout<M>::blocks) sum_kernel(const Args args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Of = Layout<M>;
  extern __shared__ __align__(1024) uint4 memory[];
  const Thread at;
  uint4 *omega = memory + at.group * slab, *stages = memory + Of::matrix;  // rows and values of each
  float* rows = reinterpret_cast<float*>(stages + 4 * slab);               // lse and delta of each
  float* bias = rows + 4 * tile;

  if (blockIdx.x % args.segments == (Keys ? args.segments - 1 : 0)) {
    return;
  }
  Heads* heads = reinterpret_cast<Heads*>(bias + tile);
  const Place place(args, Keys, heads);
  const auto start = [&](int i_tile) {
    if (i_tile < place.end) {
      const int first = i_tile * tile, count = rows_of_tile(args, i_tile);
      const bool* mask = Keys ? heads->mask : nullptr;
      uint4* to = stages + i_tile % 2 * 2 * slab;
      fetch<Of::threads>(Keys ? heads->k : heads->q, Keys ? args.k.l : args.q.l, first, count, to, mask);
      fetch<Of::threads>(Keys ? heads->v : heads->dout, Keys ? args.v.l : args.dout.l, first, count, to + slab, mask);
      if constexpr (!Keys) {
        fetch_rows(args, heads->rows + first, count, rows + i_tile % 2 * 2 * tile);
      }
    }
    copies_end();
  };
  fill_projection<T, M, Of::threads>(args.projection, place.i_k, memory);
  let_next_begin();
  wait_for_previous();  // which finds lse and delta
  start(place.begin);

  const float exponent = args.scale * log2e, square = args.norm * 0.5f * log2e * args.scale * args.scale;
  State state;
  state.load<M>(at, {}, 0);
  for (int i_tile = place.begin; i_tile < place.end; ++i_tile) {
    const uint4 *tile_x = stages + i_tile % 2 * 2 * slab, *tile_y = tile_x + slab;
    const float *lse = rows + i_tile % 2 * 2 * tile, *deltas = lse + tile;
    const int first = i_tile * tile, count = rows_of_tile(args, i_tile);
    copies_wait<0>();
    copies_visible();
    __syncthreads();  // this tile is there, and everyone has left the one before
    start(i_tile + 1);
    float s[values];
    products_begin();
    project(s, omega, tile_x);
    products_end();
    if constexpr (Keys) {
      fill_key_bias<Of::threads>(tile_x, count, heads->mask, first, square, bias);
    } else {
      fill_query_bias(lse, count, bias);
    }
    __syncthreads();  // bias is there
    products_wait<0>(s);
    float top[2] = {state.tops[0], state.tops[1]};
    make_exponents(s, exponent, bias, top);
    state.move(top);
    Operand a;
    weigh(a, s, top);
    products_begin();
    add_product(state.sums, a, tile_y, true);
    products_end();
    state.add(at, a, Keys ? nullptr : deltas);
    products_wait<0>(state.sums);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t feature = static_cast<int64_t>(blockIdx.x) * M + at.group * 64 + at.row(r);
    const float weight = sum_of_four(state.weights[r]);
    if (at.t == 0) {
      args.sums.weights[feature] = weight;
      args.sums.tops[feature] = state.tops[r];
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      *reinterpret_cast<float2*>(args.sums.values + feature * width + 8 * j + 2 * at.t) = {
          state.sums[4 * j + 2 * r], state.sums[4 * j + 2 * r + 1]};
    }
  }
#endif
}

// Of every segment the sums of all before it, or behind it; 16 threads for each of `features` of all heads.
__global__ void __launch_bounds__(128)
    scan_kernel(const Sums from, const Sums to, int64_t features, int segments, int M, bool backwards) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 128 + threadIdx.x, feature = i / 16;
  if (feature >= features) {
    return;
  }
  let_next_begin();
  wait_for_previous();
  const int u = static_cast<int>(i % 16);
  float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
  float weight = 0.0f, top = empty;
#pragma unroll 4
  for (int n = 0; n < segments; ++n) {
    const int segment = backwards ? segments - 1 - n : n;
    const int64_t row = (feature / M * segments + segment) * M + feature % M;
    reinterpret_cast<float4*>(to.values)[row * 16 + u] = sum;
    if (u == 0) {
      to.weights[row] = weight;
      to.tops[row] = top;
    }
    if (n + 1 < segments) {
      const float4 x = reinterpret_cast<const float4*>(from.values)[row * 16 + u];
      const float other = from.tops[row], all = fmaxf(top, other);
      const float a = exp2_approximate(top - all), b = exp2_approximate(other - all);
      sum = {sum.x * a + x.x * b, sum.y * a + x.y * b, sum.z * a + x.z * b, sum.w * a + x.w * b};
      weight = weight * a + from.weights[row] * b;
      top = all;
    }
  }
}

// dk or dv of key heads from those of their query heads, 4 numbers to a thread of `count`; a head has `size` such.
__global__ void __launch_bounds__(256)
    add_groups_kernel(const float4* from, uint2* to, int64_t count, int groups, int64_t size) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= count) {
    return;
  }
  let_next_begin();
  wait_for_previous();
  const float4* x = from + i / size * groups * size + i % size;
  float4 sum = x[0];
  for (int n = 1; n < groups; ++n) {
    const float4 y = x[n * size];
    sum = {sum.x + y.x, sum.y + y.y, sum.z + y.z, sum.w + y.w};
  }
  to[i] = {pack<T>(sum.x, sum.y), pack<T>(sum.z, sum.w)};
}

struct SlotArgs {
  const float *queries, *keys;  // (outer, sets, inner, M (D + 1))
  float *domega, *dbias;        // (sets, M, D), (sets, M) or null
  int64_t outer, inner;
  int sets, M;
};

// Adds the slots of each set of heads, 64 numbers to a block.
__global__ void __launch_bounds__(256) add_slots_kernel(const SlotArgs args) {
  __shared__ float4 sums[16][16];
  const int x = threadIdx.x % 16, lane = threadIdx.x / 16, chunks = args.M / 64 * (width + 1);
  const int set = blockIdx.x / chunks, i = blockIdx.x % chunks * 16 + x, size = args.M * (width + 1) / 4;
  let_next_begin();
  wait_for_previous();
  float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
  const auto add = [&sum](const float4& y) { sum = {sum.x + y.x, sum.y + y.y, sum.z + y.z, sum.w + y.w}; };
#pragma unroll 4
  for (int64_t n = lane; n < args.outer * args.inner; n += 16) {
    const int64_t slot = (n / args.inner * args.sets + set) * args.inner + n % args.inner;
    add(reinterpret_cast<const float4*>(args.queries)[slot * size + i]);
    add(reinterpret_cast<const float4*>(args.keys)[slot * size + i]);
  }
  sums[lane][x] = sum;
  __syncthreads();
  if (lane == 0) {
#pragma unroll
    for (int n = 1; n < 16; ++n) {
      add(sums[n][x]);
    }
    const int weights = args.M * width / 4;
    if (i < weights) {
      reinterpret_cast<float4*>(args.domega)[static_cast<int64_t>(set) * weights + i] = sum;
    } else if (args.dbias != nullptr) {
      reinterpret_cast<float4*>(args.dbias)[set * (args.M / 4) + i - weights] = sum;
    }
  }
}

// Launches ------------------------------------------------------------------------------------------------------------

// Tiles of a segment, for the least time; one to a head costs no sums beforehand.
int share_of(int64_t tiles, int64_t heads, int64_t resident) {
  int64_t best = tiles, least = INT64_MAX;
  const int64_t most = std::min(tiles, std::max<int64_t>(1, 2 * resident / heads));
  for (int64_t n = 1; n <= most; ++n) {
    constexpr int64_t start = 3;  // that a block's beginning takes, in tiles
    const int64_t share = (tiles + n - 1) / n;
    const int64_t time = (heads * n + resident - 1) / resident * (share + start) * (n > 1 ? 5 : 4);
    if (time < least) {
      least = time;
      best = share;
    }
  }
  return static_cast<int>(best);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention_causal_bwd_cuda(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& omega,
    int64_t kind, double scale, const std::optional<Tensor>& bias, const std::optional<Tensor>& mask, bool need_omega) {
  const char* op = "linear_attention_bwd";
  constexpr int64_t positive = 0, exp = 5;
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && dout.dim() == 4, op,
                  ": q, k, v and dout must have 4 dimensions");
  const int64_t B = q.size(0), H = q.size(1), L = q.size(2), Hk = k.size(1);
  const ScalarType dtype = q.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16, op, ": q must have dtype bfloat16 where attention is causal");
  STD_TORCH_CHECK(kind == exp || (kind == positive && omega), op, ": on a GPU features must be positive or exp");
  for (const auto& [argument, x] : {std::pair{"k", &k}, {"v", &v}, {"dout", &dout}}) {
    check_like(op, argument, *x, dtype, q);
  }
  STD_TORCH_CHECK(q.size(3) == width && k.size(3) == width && v.size(3) == width && dout.size(3) == width, op,
                  ": D and V must be 64");
  STD_TORCH_CHECK(Hk > 0 ? H % Hk == 0 : H == 0, op, ": H must be a multiple of Hk");
  STD_TORCH_CHECK(k.size(0) == B && k.size(2) == L && v.size(0) == B && v.size(1) == Hk && v.size(2) == L &&
                      dout.size(0) == B && dout.size(1) == H && dout.size(2) == L,
                  op, ": shapes of q, k, v and dout must agree");
  const Projection projection = projection_of(op, omega, q, Hk);
  const int64_t M = projection.features;
  STD_TORCH_CHECK(M <= 128, op, ": causal omega must have 64 or 128 rows");
  const bool per_head = omega && omega->dim() == 3;
  if (bias) {
    check_like(op, "bias", *bias, ScalarType::Float, q);
    STD_TORCH_CHECK(bias->is_contiguous() && bias->numel() == (per_head ? Hk * M : M), op,
                    ": bias must be contiguous, of omega's shape without D");
  }
  if (mask) {
    check_like(op, "mask", *mask, ScalarType::Bool, q);
    STD_TORCH_CHECK(mask->is_contiguous() && mask->numel() == B * L, op, ": mask must be contiguous, of shape (B, S)");
  }
  const Device gpu = device(q.get_device_index());
  STD_TORCH_CHECK(gpu.capability == 9, op, ": q must be on a GPU of compute capability 9");

  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const cudaStream_t stream = current_stream(q);
  const auto new_floats = [&](int64_t count) { return new_empty(q, {count}, ScalarType::Float); };
  const auto floats = [](const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); };
  const auto like = [&](const std::optional<Tensor>& x) {
    return need_omega && x ? new_empty(q, std::vector<int64_t>(x->sizes().begin(), x->sizes().end()), ScalarType::Float)
                           : new_empty(q, {0}, ScalarType::Float);
  };
  Tensor dq = new_empty(q, {B, H, L, width}, dtype), dk = new_empty(q, {B, Hk, L, width}, dtype),
         dv = new_empty(q, {B, Hk, L, width}, dtype), domega = like(omega), dbias = like(bias);
  const int64_t tiles = ceil_div(L, tile), heads = B * H, sets = per_head ? Hk : 1;
  bool overlaps = false;  // the kernel before is one of these, and may end while the next begins
  const auto run_blocks = [&](auto kernel, int64_t blocks, int threads, size_t bytes, auto... arguments) {
    STD_TORCH_CHECK(blocks <= INT32_MAX, op, ": B, H and L must be smaller");
    if (blocks == 0) {
      return;
    }
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    launch(kernel, dim3(static_cast<uint32_t>(blocks)), threads, bytes, stream, overlaps, arguments...);
    overlaps = true;
  };
  const auto run = [&](auto features, auto with_omega) {
    constexpr int F = features;
    constexpr bool Omega = with_omega;
    using Of = Layout<F>;
    Args args{};
    args.q = rows_of<T>(op, q);
    args.k = rows_of<T>(op, k);
    args.v = rows_of<T>(op, v);
    args.dout = rows_of<T>(op, dout);
    args.projection = projection;
    args.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
    args.bias_h = per_head ? F : 0;
    args.mask = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
    args.dq = static_cast<T*>(dq.mutable_data_ptr());
    args.dk = static_cast<T*>(dk.mutable_data_ptr());
    args.dv = static_cast<T*>(dv.mutable_data_ptr());
    args.length = static_cast<int>(L);
    args.heads = static_cast<int>(H);
    args.groups = Hk > 0 ? static_cast<int>(H / Hk) : 1;
    args.tiles = static_cast<int>(tiles);
    args.scale = static_cast<float>(scale);
    args.norm = kind == positive ? 1.0f : 0.0f;
    args.share = heads > 0 && tiles > 0 ? share_of(tiles, heads, gpu.multiprocessors * (Omega ? 1 : 2)) : 1;
    args.segments = ceil_div(tiles, args.share);
    const int64_t blocks = heads * args.segments;
    const Tensor rows = new_floats(2 * heads * L);
    args.lse = floats(rows);
    args.delta = args.lse + heads * L;
    // Sums of segments, and of all before them; those of keys need not be kept longer than theirs.
    const int64_t parts = args.segments > 1 ? blocks * F : 0;
    const Tensor sums = new_floats(2 * parts * (width + 2));
    const auto sums_at = [&](float* at) { return Sums{at, at + parts * width, at + parts * (width + 1)}; };
    const Sums own_sums = sums_at(floats(sums)), others = sums_at(floats(sums) + parts * (width + 2));
    const auto add_segments = [&](auto kernel, int64_t heads, bool backwards) {
      if (parts > 0) {
        args.sums = own_sums;
        run_blocks(kernel, heads * args.segments, Of::threads, Of::sum_bytes, args);
        run_blocks(scan_kernel, ceil_div(heads * F * 16, 128), 128, 0, own_sums, others, heads * F, args.segments, F,
                   backwards);
        args.sums = others;
      }
    };
    const int64_t slot = F * (width + 1);
    const Tensor slots = new_floats(Omega ? 2 * blocks * slot : 0);
    const Tensor of_groups = new_floats(args.groups > 1 ? 2 * heads * L * width : 0);

    args.slots = floats(slots);
    add_segments(sum_kernel<F, true>, B * Hk, false);
    run_blocks(query_walk_kernel<F, Omega>, blocks, Of::threads, Of::query_bytes, args);
    add_segments(sum_kernel<F, false>, heads, true);
    args.slots += Omega ? blocks * slot : 0;
    if (args.groups > 1) {
      args.group_dk = floats(of_groups);
      args.group_dv = args.group_dk + heads * L * width;
    }
    run_blocks(key_walk_kernel<F, Omega>, blocks, Of::threads, Of::key_bytes, args);
    if (args.groups > 1) {
      const int64_t size = L * width / 4, count = B * Hk * size;
      for (const auto& [from, to] : {std::pair{args.group_dk, args.dk}, {args.group_dv, args.dv}}) {
        run_blocks(add_groups_kernel, (count + 255) / 256, 256, 0, reinterpret_cast<const float4*>(from),
                   reinterpret_cast<uint2*>(to), count, args.groups, size);
      }
    }
    if (Omega && sets > 0) {
      const int64_t outer = per_head ? B : 1;
      const SlotArgs to_add{floats(slots),
                            floats(slots) + blocks * slot,
                            floats(domega),
                            bias ? floats(dbias) : nullptr,
                            outer,
                            blocks / (outer > 0 ? outer * sets : 1),
                            static_cast<int>(sets),
                            F};
      run_blocks(add_slots_kernel, sets * (F / 64) * (width + 1), 256, 0, to_add);
    }
  };
  const auto with_features = [&](auto with_omega) {
    M == 64 ? run(std::integral_constant<int, 64>{}, with_omega) : run(std::integral_constant<int, 128>{}, with_omega);
  };
  need_omega ? with_features(std::true_type{}) : with_features(std::false_type{});
  const Tensor nothing = new_empty(q, {0}, dtype);
  return {dq, dk, dv, domega, dbias, nothing, nothing};
}

}  // namespace linear
}  // namespace fastrpe
