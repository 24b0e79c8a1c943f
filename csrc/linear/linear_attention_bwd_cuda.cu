#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>

#include "../common/cuda.cuh"
#include "../common/hopper.cuh"
#include "linear_attention_cuda.h"
#include "shared.cuh"

// Gradients of bidirectional, normalised attention by exponential features. It is softmax attention twice: feature f
// has the mean U_f of the values over keys, with weights a_jf = phi_f(k_j) / sum_j phi_f(k_j), and a query has the mean
// of U over features, with weights w_if. Backwards as forwards, both have weights of at most 1, whatever the exponents:
//
//   queries   dS = dout U^T,  delta = sum_f w dS,  ds = w (dS - delta),  dq = scale ds W
//   features  dU_f = sum_i w_if dout_i,  r_f = sum_i ds_if,  y_f = U_f dU_f - r_f
//   keys      dv = a dU,  ds = a (v dU^T - y),  dk = scale ds W - scale^2 k sum_f ds
//
// U and dU are rounded to 16 bits, which must not show where differences are small. Queries do not see a vector common
// to all U_f: it is taken off before. A key with nearly all of a feature's weight has v = U_f, and its v dU_f - U_f
// dU_f is to cancel: y_f takes the rounded dU_f, and r_f the rounded U_f. Other roundings are relative to differences;
// where shared memory has room, queries take U as the sum of two numbers all the same (alone, for short heads).
//
// One kernel takes queries, another keys, each in one pass over memory. Tiles of a head side by side are a unit, which
// leaves its part of dU and r in a slot of its own. Where dW = scale (ds^T q + ds^T k) is wanted too, a block takes
// several units whose heads have the same projection, and leaves the sum over them in a slot. Slots are added in order,
// so the result is deterministic. With 256 features the registers do not hold all of that, and dW takes another pass.
//
// Of short heads U and dU are more than the rows. A third kernel takes a key head at a time, its queries and then its
// keys, and dU stays in shared memory; of heads of one tile it makes U again, so that they need no state.
namespace fastrpe {
namespace linear {
namespace {

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
  static constexpr int groups = M > 64 ? 2 : 1, features = M / groups;
  static constexpr int threads = 128 * groups, stages = 3, blocks = M > 64 ? 1 : 2;
  static constexpr int matrix = M * width / 8;
  static constexpr int halves = all && groups > 1 ? 2 * 16 * 128 : 0;  // numbers between warpgroups
  static constexpr size_t bytes = 16 * ((all ? 4 : 3) * matrix + stages * 2 * slab + (all ? slab : 0)) +
                                  4 * (M * (width + 3) + groups * tile * 4 + halves + 8 + (all ? 4 * M : 0));
};

// Of whole heads, with dW or without; Fresh, from keys and values instead of a state.
template <int M, bool Omega, bool Fresh>
struct HeadLayout {
  static constexpr int groups = Omega && M > 64 ? 2 : 1, features = M / groups, threads = 128 * groups;
  static constexpr int stages = M > 64 || Fresh ? 3 : 2, blocks = M > 64 ? 2 - Omega : Omega || Fresh ? 2 : 3;
  static constexpr int matrix = M * width / 8;
  static constexpr int mean_parts = 2;  // U as it is
  static constexpr int halves = groups > 1 ? 2 * groups * 16 * 128 : 0, rows = groups > 1 ? groups * tile : 0;
  static constexpr size_t bytes = 16 * ((2 + mean_parts) * matrix + stages * 2 * slab) + 4 * (M + tile) +
                                  (Omega ? 16 * (matrix + slab) + 4 * (halves + 2 * rows + 8) : 0);
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr float none = -1e30f;  // the exponent of what takes no part

// float16 holds 2^key_shift a, which is small where there are many keys.
template <typename T>
constexpr float key_shift = std::is_same_v<T, Half> ? 8.0f : 0.0f;

// Starts to copy a tile of which `count` rows are there, those that the mask leaves out as zeros.
template <int Threads, typename T>
__device__ __forceinline__ void fetch(const T* from, int64_t step, int count, uint4* to, const bool* mask = nullptr) {
  const int u = threadIdx.x % 8, i = threadIdx.x / 8;
  const T* source = from + i * step + u * 8;
#pragma unroll
  for (int n = 0; n < tile; n += Threads / 8) {
    const bool inside = n + i < count && (mask == nullptr || mask[n + i]);
    copy_async<16>(to + piece(n + i, u), inside ? source : from, inside);
    source += Threads / 8 * step;
  }
}

// Copies pieces [u, u + Pieces) of a warp's 16 rows from `first` on to memory, as far as the tile's `count` rows are
// there.
template <int Pieces, typename T>
__device__ __forceinline__ void store_rows(const uint4* from, int first, int u, int count, T* to) {
  u += threadIdx.x % Pieces;
#pragma unroll
  for (int n = 0; n < 16; n += 32 / Pieces) {
    const int row = first + n + threadIdx.x % 32 / Pieces;
    if (row < count) {
      *reinterpret_cast<uint4*>(to + row * width + u * 8) = from[piece(row, u)];
    }
  }
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)};
  } else {
    return __half22float2(*reinterpret_cast<const __half2*>(&x));
  }
}

// Four matrices of 8 x 8 16-bit values, of which lane 8 m + i names row i of matrix m. As a left operand in registers
// has them: a warp's 16 rows, 16 columns.
template <bool Transposed = false>
__device__ __forceinline__ void store_matrices(uint4* to, const uint32_t (&x)[4]) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (Transposed) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x[0]),
                 "r"(x[1]), "r"(x[2]), "r"(x[3])
                 : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x[0]),
                 "r"(x[1]), "r"(x[2]), "r"(x[3])
                 : "memory");
  }
}

template <bool Transposed>
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], const uint4* from) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(from));
  if constexpr (Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
  }
}

// c (16 x 8) += a (16 x 16) b (16 x 8) of a warp.
template <typename T>
__device__ __forceinline__ void multiply_warp(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
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
#pragma unroll
  for (int i = 0; i < R; ++i) {
    part[(base + i / 4 * 8 + 2 * t + i % 2) * width + warp * 16 + g + i / 2 % 2 * 8] = scaled(x[i]);
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
      norm[r] = -none;
    }
  }
}

// Starts p = x W^T and ds = y U^T of a tile's rows and F features, each a group of products. U is the sum of Parts
// matrices of M rows.
template <typename T, int Parts = 1, int M = 0, int R>
__device__ __forceinline__ void start_products(float (&p)[R], float (&ds)[R], const uint4* x, const uint4* omega,
                                               const uint4* y, const uint4* means) {
  products_begin();
#pragma unroll
  for (int s = 0; s < width / 16; ++s) {
    multiply<T>(p, operand(x + s * 2), operand(omega + s * 2), s > 0);
  }
  products_end();
#pragma unroll
  for (int s = 0; s < Parts * width / 16; ++s) {
    const int part = s / (width / 16), step = s % (width / 16);
    multiply<T>(ds, operand(y + step * 2), operand(means + part * M * pieces + step * 2), s > 0);
  }
  products_end();
}

#endif

// Queries -------------------------------------------------------------------------------------------------------------

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A thread's part of the sum for dW^T, 64 x F, divided by `common`, and the shared memory on the way there.
template <typename T, int F>
struct OmegaSum {
  float sum[F / 2] = {};
  float common = std::is_same_v<T, Half> ? 0.0f : 1.0f;
  float of_rows[F / 4] = {};   // a head's r, as far as it comes from this thread's rows
  uint4 *gradients, *results;  // ds, as weights; dq
  float* sizes;                // of each warp

  __device__ __forceinline__ OmegaSum(uint4* gradients, uint4* results, float* sizes)
      : gradients(gradients), results(results), sizes(sizes) {}

  // Makes it relative to a number that may be larger.
  __device__ __forceinline__ void grow(float largest) {
#pragma unroll
    for (float& x : sum) {
      x *= common / largest;
    }
    common = largest;
  }

  __device__ __forceinline__ void store(float* part, int base, float scale) const {
    store_features(part, base, sum, [&](float x) { return x * (scale * common); });
  }
};

struct NoSum {  // where there is no dW
  __device__ __forceinline__ NoSum() {}
  __device__ __forceinline__ NoSum(uint4*, uint4*, float*) {}
};

template <typename Sum>
constexpr bool sums_omega = !std::is_same_v<Sum, NoSum>;

// What a block's queries share.
template <typename T>
struct QueryMemory {
  const uint4 *omega, *means;  // rows of features
  uint4* weights;              // w, rows of queries, a slab for 64 features
  const float* exponents;
  T* deltas;             // delta as the sum of two numbers of 16 bits, (2, tile)
  float2* row_sums;      // (groups, tile)
  float* half_products;  // (groups, 16, 128)
};

// dq of a tile of which `count` rows are there; adds to dU^T, 64 x F, and to r: with dW in
// omega_sum, else in columns 0 and 1 of dy what is to be taken off U dU, of this warp's F / 4 features. Of::groups
// warpgroups have all rows, each F features.
template <typename T, int M, typename Of, typename Sum, typename Next>
__device__ __forceinline__ void query_tile(const QueryMemory<T>& shared, uint4* tile_q, const uint4* tile_dout,
                                           int count, float scale, T* to, float (&dmeans)[Of::features / 2],
                                           float (&dy)[Of::features / 64][4], Sum& omega_sum, Next&& start_next) {
  constexpr bool is_half = std::is_same_v<T, Half>;
  constexpr int F = Of::features;
  const int group = Of::groups > 1 ? threadIdx.x / 128 : 0, base = group * F;
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32, g = lane / 4, t = lane % 4;
  // Of the 16 bytes that this thread names to matrix instructions: the row, and the piece of the first 16 columns.
  const int named = warp * 16 + lane % 16, half = lane / 16;
  const float exponent = scale * log2e;
  float w[F / 2], ds[F / 2];
  start_products<T, Of::mean_parts, M>(w, ds, tile_q, shared.omega + base * 8, tile_dout, shared.means + base * 8);
  start_next();
  products_wait<1>(w);

  float top[2] = {-INFINITY, -INFINITY}, total[2] = {};
  add_exponents(w, exponent, shared.exponents + base, top);
  top[0] = largest_of_four(top[0]);
  top[1] = largest_of_four(top[1]);
#pragma unroll
  for (int i = 0; i < F / 2; ++i) {
    w[i] = exp2_approximate(w[i] - top[i / 2 % 2]);
    total[i / 2 % 2] += w[i];
  }
  float inverse[2];  // of the sum of a row
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    total[r] = sum_of_four(total[r]);
    if (Of::groups > 1 && t == 0) {
      shared.row_sums[group * tile + warp * 16 + g + 8 * r] = {top[r], total[r]};
    }
  }
  if constexpr (Of::groups > 1) {
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float factor = 1.0f;
    if constexpr (Of::groups > 1) {
      const float2 other = shared.row_sums[(1 - group) * tile + warp * 16 + g + 8 * r];
      const float all = fmaxf(top[r], other.x);
      factor = exp2_approximate(top[r] - all);
      total[r] = total[r] * factor + other.y * exp2_approximate(other.x - all);
    }
    inverse[r] = __fdividef(factor, total[r]);
  }
#pragma unroll
  for (int s = 0; s < F / 16; ++s) {
    uint32_t x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      w[8 * s + 2 * i] *= inverse[i % 2];
      w[8 * s + 2 * i + 1] *= inverse[i % 2];
      x[i] = pack<T>(w[8 * s + 2 * i], w[8 * s + 2 * i + 1]);
    }
    store_matrices(shared.weights + (base / 64 + s / 4) * slab + piece(named, s % 4 * 2 + half), x);
  }
  copies_visible();
  __syncthreads();  // all weights are there
  products_begin();
#pragma unroll
  for (int s = 0; s < tile / 16; ++s) {
    multiply<T, Inner::both>(dmeans, operand(tile_dout + s * 128),
                             operand(shared.weights + base / 64 * slab + s * 128, 16 * slab), true);
  }
  products_end();
  products_wait<1>(ds);

  float delta[2] = {}, size[2] = {1.0f, 1.0f};
#pragma unroll
  for (int i = 0; i < F / 2; ++i) {
    delta[i / 2 % 2] = fmaf(w[i], ds[i], delta[i / 2 % 2]);
  }
  delta[0] = sum_of_four(delta[0]);
  delta[1] = sum_of_four(delta[1]);
  if constexpr (is_half) {  // relative to the largest of a row, since float16 holds no small numbers
    size[0] = size[1] = 1e-30f;
#pragma unroll
    for (int i = 0; i < F / 2; ++i) {
      size[i / 2 % 2] = fmaxf(size[i / 2 % 2], fabsf(ds[i]));
    }
    size[0] = largest_of_four(size[0]);
    size[1] = largest_of_four(size[1]);
    if constexpr (sums_omega<Sum>) {
      float largest = fmaxf(size[0], size[1]);
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, lanes));
      }
      if (lane == 0) {
        omega_sum.sizes[threadIdx.x / 32] = largest;
      }
      if (Of::groups == 1) {
        __syncthreads();
      }
    }
  }
  if constexpr (Of::groups > 1) {
    if (t == 0) {
      shared.row_sums[group * tile + warp * 16 + g] = {delta[0], size[0]};
      shared.row_sums[group * tile + warp * 16 + g + 8] = {delta[1], size[1]};
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float2 other = shared.row_sums[(1 - group) * tile + warp * 16 + g + 8 * r];
      delta[r] += other.x;
      size[r] = fmaxf(size[r], other.y);
    }
  }
  if (!sums_omega<Sum> && group == 0 && t == 0) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const T high = static_cast<T>(delta[r]);
      shared.deltas[warp * 16 + g + 8 * r] = high;
      shared.deltas[tile + warp * 16 + g + 8 * r] = static_cast<T>(delta[r] - static_cast<float>(high));
    }
  }
  const float row_scale[2] = {1.0f / size[0], 1.0f / size[1]};
  float common_scale = 1.0f;
  if constexpr (is_half && sums_omega<Sum>) {  // the sum over rows is relative to the largest so far
    float largest = omega_sum.common;
#pragma unroll
    for (int i = 0; i < 4 * Of::groups; ++i) {
      largest = fmaxf(largest, omega_sum.sizes[i]);
    }
    omega_sum.grow(largest);
    common_scale = 1.0f / largest;
  }
  uint32_t fragments[F / 16][4];
#pragma unroll
  for (int s = 0; s < F / 16; ++s) {
    uint32_t shares[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x0 = w[8 * s + 2 * i] * (ds[8 * s + 2 * i] - delta[i % 2]);
      const float x1 = w[8 * s + 2 * i + 1] * (ds[8 * s + 2 * i + 1] - delta[i % 2]);
      if constexpr (is_half) {
        fragments[s][i] = pack<T>(x0 * row_scale[i % 2], x1 * row_scale[i % 2]);
        shares[i] = pack<T>(x0 * common_scale, x1 * common_scale);
      } else {
        fragments[s][i] = shares[i] = pack<T>(x0, x1);
      }
    }
    if constexpr (sums_omega<Sum>) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        omega_sum.of_rows[4 * s + i / 4 * 2 + i % 2] += w[8 * s + i] * (ds[8 * s + i] - delta[i / 2 % 2]);
      }
      store_matrices(omega_sum.gradients + (base / 64 + s / 4) * slab + piece(named, s % 4 * 2 + half), shares);
    }
  }
  float dq[32];
  products_begin();
#pragma unroll
  for (int s = 0; s < F / 16; ++s) {
    multiply<T, Inner::b>(dq, fragments[s], operand(shared.omega + base * 8 + s * 128), s > 0);
  }
  products_end();
  if constexpr (sums_omega<Sum>) {
    copies_visible();
  }
  __syncthreads();  // all deltas are there, and gradients
  if constexpr (sums_omega<Sum>) {
    products_begin();
#pragma unroll
    for (int s = 0; s < tile / 16; ++s) {
      multiply<T, Inner::both>(omega_sum.sum, operand(tile_q + s * 128),
                               operand(omega_sum.gradients + base / 64 * slab + s * 128, 16 * slab), true);
    }
    products_end();
  } else {
#pragma unroll
    for (int s = 0; s < tile / 16; ++s) {
      // Columns of b other than 0 and 1 are zero.
      const uint32_t* pairs = reinterpret_cast<const uint32_t*>(shared.deltas) + g % 2 * (tile / 2) + s * 8 + t;
      const uint32_t b0 = g < 2 ? pairs[0] : 0, b1 = g < 2 ? pairs[4] : 0;
#pragma unroll
      for (int n = 0; n < F / 64; ++n) {
        const int f = base + warp * (F / 4) + n * 16;
        uint32_t a[4];
        load_matrices<true>(
            a, shared.weights + f / 64 * slab + piece(s * 16 + half * 8 + lane % 8, f % 64 / 8 + lane / 8 % 2));
        multiply_warp<T>(dy[n], a, b0, b1);
      }
    }
  }
  products_wait<sums_omega<Sum>>(dq);
  products_wait<sums_omega<Sum>>(dmeans);
  uint4* results = tile_q;
  if constexpr (sums_omega<Sum>) {
    results = omega_sum.results;
  }
  const float factor[2] = {scale * size[0], scale * size[1]};
  // Of two warpgroups with half a sum each, either finishes 32 columns.
  constexpr int columns = width / Of::groups;
  float y[columns / 2];
  if constexpr (Of::groups > 1) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      shared.half_products[(group * 16 + i) * 128 + threadIdx.x % 128] = group == 0 ? dq[16 + i] : dq[i];
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < columns / 2; ++i) {
    if constexpr (Of::groups > 1) {
      y[i] = (group == 0 ? dq[i] : dq[16 + i]) + shared.half_products[((1 - group) * 16 + i) * 128 + threadIdx.x % 128];
    } else {
      y[i] = dq[i];
    }
  }
#pragma unroll
  for (int s = 0; s < columns / 16; ++s) {
    uint32_t x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[i] = pack<T>(y[8 * s + 2 * i] * factor[i % 2], y[8 * s + 2 * i + 1] * factor[i % 2]);
    }
    store_matrices(results + piece(named, group * 4 + s * 2 + half), x);
  }
  __syncwarp();
  store_rows<columns / 8>(results, warp * 16, group * 4, count, to);
  if constexpr (sums_omega<Sum>) {
    products_wait(omega_sum.sum);
  }
}

#endif

template <typename T, int M>
__global__ void __launch_bounds__(Layout<M>::query_threads, Layout<M>::query_blocks)
    query_gradient_kernel(const Args<T> args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Of = Layout<M>;
  constexpr int F = Of::features;
  extern __shared__ __align__(1024) uint4 memory[];
  uint4* omega = memory;                                 // rows of features
  uint4* means = omega + Of::matrix;                     // U, rows of features
  uint4* weights = means + Of::mean_parts * Of::matrix;  // w, rows of queries, a slab for 64 features
  uint4* stages = weights + Of::matrix;
  float* exponents = reinterpret_cast<float*>(stages + Of::query_stages * 2 * slab);
  T* deltas = reinterpret_cast<T*>(exponents + M);  // delta as the sum of two numbers of 16 bits, (2, tile)
  float2* row_sums = reinterpret_cast<float2*>(deltas + 2 * tile);                // (groups, tile)
  float* half_products = reinterpret_cast<float*>(row_sums + Of::groups * tile);  // (groups, 16, 128)

  const Place at(args, blockIdx.x);
  // A warpgroup has all rows of a tile, and of the features those from `base` on.
  const int group = Of::groups > 1 ? threadIdx.x / 128 : 0, base = group * F;
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32, g = lane / 4, t = lane % 4;
  const int i_k = at.i_h / args.groups;
  const T *q = args.x.at(at.i_b, at.i_h), *dout = args.y.at(at.i_b, at.i_h);
  int ahead = at.begin, next_stage = 0, stage = 0;
  const auto start_next = [&] {
    if (ahead < at.end) {
      const int64_t first = static_cast<int64_t>(ahead) * tile;
      const int count = static_cast<int>(min(static_cast<int64_t>(tile), args.length - first));
      uint4* to = stages + next_stage * 2 * slab;
      fetch<Of::query_threads>(q + first * args.x.l, args.x.l, count, to);
      fetch<Of::query_threads>(dout + first * args.y.l, args.y.l, count, to + slab);
      ++ahead;
      next_stage = next_stage + 1 == Of::query_stages ? 0 : next_stage + 1;
    }
    copies_end();
  };
  fill_projection<T, M, Of::query_threads>(args.projection, i_k, omega);
#pragma unroll
  for (int i = 1; i < Of::query_stages; ++i) {
    start_next();
  }
  const int64_t state = (at.i_b * (args.heads / args.groups) + i_k) * M;
  fill_means<T, M, Of::query_threads, Of::mean_parts>(args.kv + state * width, args.z + state, means);
  if (threadIdx.x < M) {
    const float z = args.z[state + threadIdx.x];
    const float bias = args.bias == nullptr ? 0.0f : args.bias[i_k * args.bias_h + threadIdx.x];
    exponents[threadIdx.x] = z > 0.0f ? (args.log_scale[state + threadIdx.x] + bias) * log2e + log2f(z) : none;
  }

  const QueryMemory<T> shared{omega, means, weights, exponents, deltas, row_sums, half_products};
  float dmeans[F / 2] = {};  // dU^T, 64 x F
  let_next_begin();
  float dy[F / 64][4] = {};  // columns 0 and 1 add to y of this warp's F / 4 features
  for (int i_tile = at.begin; i_tile < at.end; ++i_tile) {
    uint4 *tile_q = stages + stage * 2 * slab, *tile_dout = tile_q + slab;
    stage = stage + 1 == Of::query_stages ? 0 : stage + 1;
    copies_wait<Of::query_stages - 2>();
    copies_visible();
    __syncthreads();  // this stage is there, and everyone has left the one before
    const int64_t first = static_cast<int64_t>(i_tile) * tile;
    const int count = static_cast<int>(min(static_cast<int64_t>(tile), args.length - first));
    NoSum none_summed;
    query_tile<T, M, Of>(shared, tile_q, tile_dout, count, args.scale,
                         args.dx + (at.head * args.length + first) * width, dmeans, dy, none_summed, start_next);
  }

  float* part = args.parts + static_cast<int64_t>(blockIdx.x) * (M * (width + 1));
  store_features(part, base, dmeans, [](float x) { return x; });
  // r_f = U_f dU_f - y_f, of U in 16 bits.
  float products[F / 4];
#pragma unroll
  for (int i = 0; i < F / 4; ++i) {
    const int f = base + i / 2 * 8 + 2 * t + i % 2;
    const auto of = [&](int r) {
      float u = 0.0f;
#pragma unroll
      for (int n = 0; n < Of::mean_parts; ++n) {
        u += static_cast<float>(reinterpret_cast<const T*>(means + n * Of::matrix + piece(f, warp * 2 + r))[g]);
      }
      return dmeans[i / 2 * 4 + 2 * r + i % 2] * u;
    };
    products[i] = of(0) + of(1);
  }
  float* sums = reinterpret_cast<float*>(stages);  // of each of four warps, and y
  __syncthreads();                                 // everyone has left the stages
  store_column_sums(products, sums + warp * M + base);
  if (t == 0) {
#pragma unroll
    for (int n = 0; n < F / 64; ++n) {
      const int f = base + warp * (F / 4) + n * 16 + g;
      sums[4 * M + f] = dy[n][0] + dy[n][1];
      sums[4 * M + f + 8] = dy[n][2] + dy[n][3];
    }
  }
  __syncthreads();
  if (threadIdx.x < M) {
    const float* sum = sums + threadIdx.x;
    part[M * width + threadIdx.x] = (sum[0] + sum[M]) + (sum[2 * M] + sum[3 * M]) - sum[4 * M];
  }
#endif
}

// The same with dW, or for 256 features dW alone. Products of the next tile begin before those of this one end: there
// are few other warps on the multiprocessor to hide them.
template <typename T, int M>
__global__ void __launch_bounds__(OmegaLayout<M>::threads, OmegaLayout<M>::blocks)
    query_omega_kernel(const Args<T> args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Of = OmegaLayout<M>;
  constexpr bool is_half = std::is_same_v<T, Half>;
  constexpr int F = Of::features;
  extern __shared__ __align__(1024) uint4 memory[];
  uint4* omega = memory;                    // rows of features
  uint4* means = omega + Of::matrix;        // U, rows of features
  uint4* gradients = means + Of::matrix;    // ds, rows of queries, a slab for 64 features
  uint4* weights = gradients + Of::matrix;  // w, the same
  uint4* stages = Of::all ? weights + Of::matrix : weights;
  uint4* results = stages + Of::stages * 2 * slab;                            // dq
  float* next_kv = reinterpret_cast<float*>(results + (Of::all ? slab : 0));  // of the next unit, as its z and scale
  float* next_z = next_kv + M * width;
  float* next_scale = next_z + M;
  float* exponents = next_scale + M;
  float4* rows = reinterpret_cast<float4*>(exponents + M);                    // (groups, tile)
  float* half_products = reinterpret_cast<float*>(rows + Of::groups * tile);  // (groups, 16, 128)
  float* sizes = half_products + Of::halves;                                  // of each warp
  float* sums = sizes + 8;                                                    // of ds over a warp's rows, (4, M)

  // A warpgroup has all rows of a tile, and of the features those from `base` on.
  const int group = Of::groups > 1 ? threadIdx.x / 128 : 0, base = group * F;
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32, g = lane / 4, t = lane % 4;
  const Units units(args);
  uint32_t unit_ahead = units.begin;
  Place ahead = units.place(args, unit_ahead);  // what is copied next
  int next_stage = 0, stage = 0;
  const auto start_next = [&] {
    if (ahead.begin < ahead.end) {
      const int64_t first = static_cast<int64_t>(ahead.begin) * tile;
      const int count = static_cast<int>(min(static_cast<int64_t>(tile), args.length - first));
      uint4* to = stages + next_stage * 2 * slab;
      fetch<Of::threads>(args.x.at(ahead.i_b, ahead.i_h) + first * args.x.l, args.x.l, count, to);
      fetch<Of::threads>(args.y.at(ahead.i_b, ahead.i_h) + first * args.y.l, args.y.l, count, to + slab);
      next_stage = next_stage + 1 == Of::stages ? 0 : next_stage + 1;
      if (++ahead.begin == ahead.end && unit_ahead + 1 < units.end) {
        ahead = units.place(args, ++unit_ahead);
      }
    }
    copies_end();
  };
  // Starts to copy what unit n needs of its key head.
  const auto start_state = [&](uint32_t n) {
    if (n < units.end) {
      const Place at = units.place(args, n);
      const int64_t state = (at.i_b * (args.heads / args.groups) + at.i_h / args.groups) * M;
#pragma unroll
      for (int i = 0; i < M * width / 4; i += Of::threads) {
        const int x = (i + threadIdx.x) * 4;
        copy_async<16>(next_kv + x, args.kv + state * width + x, true);
      }
      if (threadIdx.x < M) {
        copy_async<4>(next_z + threadIdx.x, args.z + state + threadIdx.x, true);
        copy_async<4>(next_scale + threadIdx.x, args.log_scale + state + threadIdx.x, true);
      }
    }
    copies_end();
  };
  // Makes U and the exponents of unit n of that.
  const auto take_state = [&](uint32_t n) {
    fill_means<T, M, Of::threads, 1>(next_kv, next_z, means);
    if (threadIdx.x < M) {
      const float z = next_z[threadIdx.x];
      const float bias =
          args.bias == nullptr ? 0.0f : args.bias[units.place(args, n).i_h / args.groups * args.bias_h + threadIdx.x];
      exponents[threadIdx.x] = z > 0.0f ? (next_scale[threadIdx.x] + bias) * log2e + log2f(z) : none;
    }
  };
  start_state(units.begin);
  fill_projection<T, M, Of::threads>(args.projection, ahead.i_h / args.groups, omega);
#pragma unroll
  for (int i = 1; i < Of::stages; ++i) {
    start_next();
  }
  let_next_begin();

  const float exponent = args.scale * log2e;
  // Of the 16 bytes that this thread names to matrix instructions: the row, and the piece of the first 16 columns.
  const int named = warp * 16 + lane % 16, half = lane / 16;
  float domega[F / 2] = {};              // dW^T, 64 x F
  float common = is_half ? 0.0f : 1.0f;  // what it is divided by
  float w[F / 2], ds[F / 2];
  const auto project = [&](const uint4* tile_q) {
    start_products<T>(w, ds, tile_q, omega + base * 8, tile_q + slab, means + base * 8);
  };
  copies_wait<0>();
  __syncthreads();  // the state and the first tile are there
  take_state(units.begin);
  copies_visible();
  __syncthreads();  // U is there, and the state has been read
  start_state(units.begin + 1);
  if constexpr (Of::all) {
    project(stages);
    products_wait(w);
    products_wait(ds);
  }
  for (uint32_t n_unit = units.begin; n_unit < units.end; ++n_unit) {
    const Place at = units.place(args, n_unit);
    float dmeans[F / 2] = {};   // dU^T, 64 x F
    float of_rows[F / 4] = {};  // r, as far as it comes from this thread's rows
    for (int i_tile = at.begin; i_tile < at.end; ++i_tile) {
      const uint4 *tile_q = stages + stage * 2 * slab, *tile_dout = tile_q + slab;
      stage = stage + 1 == Of::stages ? 0 : stage + 1;
      const bool last = i_tile + 1 == at.end && n_unit + 1 < units.end;
      if constexpr (!Of::all) {  // no registers for the next tile's products beside this one's
        project(tile_q);
        products_wait(w);
        products_wait(ds);
      }
      // What a row needs to know of a warpgroup's features: the largest exponent, the sum of weights relative to that
      // and the same with ds, and the largest of ds.
      float top[2] = {-INFINITY, -INFINITY}, total[2] = {}, delta[2] = {}, size[2] = {1e-30f, 1e-30f};
      add_exponents(w, exponent, exponents + base, top);
      top[0] = largest_of_four(top[0]);
      top[1] = largest_of_four(top[1]);
#pragma unroll
      for (int i = 0; i < F / 2; ++i) {
        w[i] = exp2_approximate(w[i] - top[i / 2 % 2]);
        total[i / 2 % 2] += w[i];
      }
#pragma unroll
      for (int i = 0; i < F / 2; ++i) {
        delta[i / 2 % 2] = fmaf(w[i], ds[i], delta[i / 2 % 2]);
        if constexpr (is_half) {  // relative to the largest of a row, since float16 holds no small numbers
          size[i / 2 % 2] = fmaxf(size[i / 2 % 2], fabsf(ds[i]));
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        total[r] = sum_of_four(total[r]);
        delta[r] = sum_of_four(delta[r]);
        size[r] = is_half ? largest_of_four(size[r]) : 1.0f;
        if (Of::groups > 1 && t == 0) {
          rows[group * tile + warp * 16 + g + 8 * r] = {top[r], total[r], delta[r], size[r]};
        }
      }
      if constexpr (is_half) {
        float largest = fmaxf(size[0], size[1]);
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) {
          largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, lanes));
        }
        if (lane == 0) {
          sizes[threadIdx.x / 32] = largest;
        }
      }
      if (last) {
        copies_wait<0>();
      }
      // The other's rows and the next unit's state are there, and no product reads U, the tile before, its weights or
      // its gradients any more.
      __syncthreads();
      start_next();
      if (last) {
        take_state(n_unit + 1);
      }
      float inverse[2];  // of the sum of a row
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float factor = 1.0f;
        if constexpr (Of::groups > 1) {
          const float4 other = rows[(1 - group) * tile + warp * 16 + g + 8 * r];
          const float all = fmaxf(top[r], other.x), other_factor = exp2_approximate(other.x - all);
          factor = exp2_approximate(top[r] - all);
          total[r] = total[r] * factor + other.y * other_factor;
          delta[r] = delta[r] * factor + other.z * other_factor;
          size[r] = fmaxf(size[r], other.w);
        }
        inverse[r] = __fdividef(factor, total[r]);
        delta[r] = __fdividef(delta[r], total[r]);
      }
      if constexpr (is_half) {  // the sum over rows is relative to the largest so far
        float largest = common;
#pragma unroll
        for (int i = 0; i < 4 * Of::groups; ++i) {
          largest = fmaxf(largest, sizes[i]);
        }
#pragma unroll
        for (float& x : domega) {
          x *= common / largest;
        }
        common = largest;
      }
      const float row_scale[2] = {1.0f / size[0], 1.0f / size[1]}, common_scale = 1.0f / common;
      uint32_t fragments[F / 16][4];
#pragma unroll
      for (int s = 0; s < F / 16; ++s) {
        uint32_t x[4], y[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float w0 = w[8 * s + 2 * i] * inverse[i % 2], w1 = w[8 * s + 2 * i + 1] * inverse[i % 2];
          const float x0 = w0 * (ds[8 * s + 2 * i] - delta[i % 2]), x1 = w1 * (ds[8 * s + 2 * i + 1] - delta[i % 2]);
          x[i] = pack<T>(w0, w1);
          if constexpr (Of::all) {
            of_rows[4 * s + i / 2 * 2] += x0;
            of_rows[4 * s + i / 2 * 2 + 1] += x1;
          }
          if constexpr (is_half) {
            fragments[s][i] = pack<T>(x0 * row_scale[i % 2], x1 * row_scale[i % 2]);
            y[i] = pack<T>(x0 * common_scale, x1 * common_scale);
          } else {
            y[i] = fragments[s][i] = pack<T>(x0, x1);
          }
        }
        const int place = (base / 64 + s / 4) * slab + piece(named, s % 4 * 2 + half);
        store_matrices(gradients + place, y);
        if constexpr (Of::all) {
          store_matrices(weights + place, x);
        }
      }
      float dq[32];
      if constexpr (Of::all) {
        products_begin();
#pragma unroll
        for (int s = 0; s < F / 16; ++s) {
          multiply<T, Inner::b>(dq, fragments[s], operand(omega + base * 8 + s * 128), s > 0);
        }
        products_end();
      }
      copies_wait<Of::stages - 2>();
      copies_visible();
      __syncthreads();  // all weights and gradients are there, and the next tile and its U
      if (last) {
        start_state(n_unit + 2);
      }
      products_begin();
      if constexpr (Of::all) {
#pragma unroll
        for (int s = 0; s < tile / 16; ++s) {
          multiply<T, Inner::both>(dmeans, operand(tile_dout + s * 128),
                                   operand(weights + base / 64 * slab + s * 128, 16 * slab), true);
        }
      }
#pragma unroll
      for (int s = 0; s < tile / 16; ++s) {
        multiply<T, Inner::both>(domega, operand(tile_q + s * 128),
                                 operand(gradients + base / 64 * slab + s * 128, 16 * slab), true);
      }
      products_end();
      if constexpr (!Of::all) {
        products_wait(domega);
        continue;
      }
      // Of two warpgroups with half a sum each, either finishes 32 columns.
      constexpr int columns = width / Of::groups;
      products_wait<1>(dq);
      // After the last tile in vain: a branch would keep the products from running in the background.
      project(stages + stage * 2 * slab);
      float y[columns / 2];
      if constexpr (Of::groups > 1) {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          half_products[(group * 16 + i) * 128 + threadIdx.x % 128] = group == 0 ? dq[16 + i] : dq[i];
        }
        __syncthreads();
      }
#pragma unroll
      for (int i = 0; i < columns / 2; ++i) {
        if constexpr (Of::groups > 1) {
          y[i] = (group == 0 ? dq[i] : dq[16 + i]) + half_products[((1 - group) * 16 + i) * 128 + threadIdx.x % 128];
        } else {
          y[i] = dq[i];
        }
      }
      const float factor[2] = {args.scale * size[0], args.scale * size[1]};
#pragma unroll
      for (int s = 0; s < columns / 16; ++s) {
        uint32_t x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          x[i] = pack<T>(y[8 * s + 2 * i] * factor[i % 2], y[8 * s + 2 * i + 1] * factor[i % 2]);
        }
        store_matrices(results + piece(named, group * 4 + s * 2 + half), x);
      }
      __syncwarp();
      const int64_t first = static_cast<int64_t>(i_tile) * tile;
      const int count = static_cast<int>(min(static_cast<int64_t>(tile), args.length - first));
      store_rows<columns / 8>(results, warp * 16, group * 4, count, args.dx + (at.head * args.length + first) * width);
      products_wait(domega);
      products_wait(dmeans);
      products_wait(w);
      products_wait(ds);
    }
    if constexpr (Of::all) {
      float* part = args.parts + static_cast<int64_t>(units[n_unit]) * (M * (width + 1));
      store_features(part, base, dmeans, [](float x) { return x; });
      store_column_sums(of_rows, sums + warp * M + base);
      __syncthreads();
      if (threadIdx.x < M) {
        const float* sum = sums + threadIdx.x;
        part[M * width + threadIdx.x] = (sum[0] + sum[M]) + (sum[2 * M] + sum[3 * M]);
      }
    }
  }

  float* part = args.omega_parts + static_cast<int64_t>(blockIdx.x) * (M * width);
  store_features(part, base, domega, [&](float x) { return x * (args.scale * common); });
#endif
}

// Adds the slots of every key head, (heads, count, size) in units of 16 bytes.
__global__ void __launch_bounds__(128)
    add_parts_kernel(const float4* parts, float4* sums, int64_t heads, int count, int size) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 128 + threadIdx.x;
  if (i >= heads * size) {
    return;
  }
  let_next_begin();
  wait_for_previous();
  const float4* part = parts + i / size * count * size + i % size;
  float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 8
  for (int n = 0; n < count; ++n) {
    const float4 x = part[static_cast<int64_t>(n) * size];
    sum = {sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w};
  }
  sums[i] = sum;
}

// Keys ----------------------------------------------------------------------------------------------------------------

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// What a block's keys share.
struct KeyMemory {
  const uint4 *omega, *dmeans;  // rows of features
  const float *exponents, *dy;
  float2* row_sums;      // (groups, tile)
  float* half_products;  // (2, groups, 16, 128)
};

// dk and dv of a tile of which `count` rows are there. Each of Groups warpgroups has all rows and takes, one after
// another, Count times F features from `base` on. `square` is scale^2 where exponents have -|x|^2 / 2, else 0; `back`
// undoes the scaling of float16. Without Inputs, dW alone.
template <typename T, int F, int Count, int Groups, bool Inputs, typename Sum, typename Next>
__device__ __forceinline__ void key_tile(const KeyMemory& shared, int start, uint4* tile_k, uint4* tile_v, int count,
                                         const bool* mask, float scale, float square, float back, T* to_k, T* to_v,
                                         Sum& omega_sum, Next&& start_next) {
  constexpr bool is_half = std::is_same_v<T, Half>, omega = sums_omega<Sum>;
  static_assert(!omega || Count == 1);
  const int group = Groups > 1 ? threadIdx.x / 128 : 0;
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32, g = lane / 4, t = lane % 4;
  const int named = warp * 16 + lane % 16, half = lane / 16;
  const float exponent = scale * log2e;
  float p[F / 2], ds[F / 2];
  const auto project = [&](int base) {
    start_products<T>(p, ds, tile_k, shared.omega + base * 8, tile_v, shared.dmeans + base * 8);
  };
  project(start);
  start_next();
  float norm[2];
  half_norms<T>(norm, tile_k, warp, g, t, square, count, mask);
  float share = 1.0f;
  if constexpr (is_half && omega) {
    share = back / omega_sum.common;
  }
  float dk[32], dv[32], sums[2] = {};
  uint32_t a[F / 16][4], fragments[F / 16][4];
#pragma unroll
  for (int n = 0; n < Count; ++n) {
    const int base = start + n * F;
    if (n > 0) {
      products_wait(dk);
      products_wait(dv);
      project(base);
    }
    products_wait<1>(p);
    key_weights<T>(a, p, exponent, shared.exponents + base, norm, t);
    if constexpr (Inputs) {
      products_begin();
#pragma unroll
      for (int s = 0; s < F / 16; ++s) {
        multiply<T, Inner::b>(dv, a[s], operand(shared.dmeans + base * 8 + s * 128), n > 0 || s > 0);
      }
      products_end();
    }
    products_wait<Inputs>(ds);
#pragma unroll
    for (int s = 0; s < F / 16; ++s) {
      uint32_t shares[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 y = reinterpret_cast<const float2*>(shared.dy + base)[8 * s + i / 2 * 4 + t];
        const float2 weight = unpack<T>(a[s][i]);
        const float x0 = weight.x * (ds[8 * s + 2 * i] - y.x), x1 = weight.y * (ds[8 * s + 2 * i + 1] - y.y);
        sums[i % 2] += x0 + x1;
        fragments[s][i] = pack<T>(x0, x1);
        shares[i] = is_half ? pack<T>(x0 * share, x1 * share) : fragments[s][i];
      }
      if constexpr (omega) {
        store_matrices(omega_sum.gradients + group * (F / 64) * slab + s / 4 * slab + piece(named, s % 4 * 2 + half),
                       shares);
      }
    }
    if constexpr (Inputs) {
      products_begin();
#pragma unroll
      for (int s = 0; s < F / 16; ++s) {
        multiply<T, Inner::b>(dk, fragments[s], operand(shared.omega + base * 8 + s * 128), n > 0 || s > 0);
      }
      products_end();
    }
  }
  sums[0] = sum_of_four(sums[0]);
  sums[1] = sum_of_four(sums[1]);
  if constexpr (Groups > 1) {
    products_wait<1>(dv);
    products_wait(dk);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      shared.half_products[(group * 16 + i) * 128 + threadIdx.x % 128] = group == 0 ? dv[16 + i] : dv[i];
      shared.half_products[((2 + group) * 16 + i) * 128 + threadIdx.x % 128] = group == 0 ? dk[16 + i] : dk[i];
    }
    if (t == 0) {
      shared.row_sums[group * tile + warp * 16 + g].x = sums[0];
      shared.row_sums[group * tile + warp * 16 + g + 8].x = sums[1];
    }
  }
  if constexpr (omega) {
    copies_visible();
  }
  __syncthreads();  // all of ds is there, and no product before reads this stage any more
  if constexpr (omega) {
    products_begin();
#pragma unroll
    for (int s = 0; s < tile / 16; ++s) {
      multiply<T, Inner::both>(omega_sum.sum, operand(tile_k + s * 128),
                               operand(omega_sum.gradients + group * (F / 64) * slab + s * 128, 16 * slab), true);
    }
    products_end();
    if constexpr (!Inputs) {
      products_wait(omega_sum.sum);
      return;
    }
  }
  products_wait<1 + omega>(dv);
  // Of two warpgroups with half a sum each, either finishes 32 columns.
  constexpr int columns = width / Groups;
  const auto whole = [&](const float (&x)[32], int n, int i) {
    if constexpr (Groups > 1) {
      return (group == 0 ? x[i] : x[16 + i]) +
             shared.half_products[((2 * n + 1 - group) * 16 + i) * 128 + threadIdx.x % 128];
    } else {
      return x[i];
    }
  };
#pragma unroll
  for (int s = 0; s < columns / 16; ++s) {
    uint32_t x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x0 = whole(dv, 0, 8 * s + 2 * i), x1 = whole(dv, 0, 8 * s + 2 * i + 1);
      x[i] = is_half ? pack<T>(x0 * back, x1 * back) : pack<T>(x0, x1);
    }
    store_matrices(tile_v + piece(named, group * 4 + s * 2 + half), x);
  }
  __syncwarp();
  store_rows<columns / 8>(tile_v, warp * 16, group * 4, count, to_v);
  products_wait<omega>(dk);
  const float factor = scale * back;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if constexpr (Groups > 1) {
      sums[r] += shared.row_sums[(1 - group) * tile + warp * 16 + g + 8 * r].x;
    }
    sums[r] *= square * back;
  }
  uint4* results = omega ? tile_v : tile_k;
#pragma unroll
  for (int s = 0; s < columns / 16; ++s) {
    uint32_t x[4];
    load_matrices<false>(x, tile_k + piece(named, group * 4 + s * 2 + half));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 key = unpack<T>(x[i]);
      x[i] = pack<T>(fmaf(whole(dk, 1, 8 * s + 2 * i), factor, -key.x * sums[i % 2]),
                     fmaf(whole(dk, 1, 8 * s + 2 * i + 1), factor, -key.y * sums[i % 2]));
    }
    __syncwarp();
    store_matrices(results + piece(named, group * 4 + s * 2 + half), x);
  }
  __syncwarp();
  store_rows<columns / 8>(results, warp * 16, group * 4, count, to_k);
  if constexpr (omega) {
    products_wait(omega_sum.sum);
  }
}

#endif

template <typename T, int M>
__global__ void __launch_bounds__(Layout<M>::key_threads, Layout<M>::key_blocks)
    key_gradient_kernel(const Args<T> args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Of = Layout<M>;
  constexpr int F = Of::features, threads = Of::key_threads;
  constexpr bool is_half = std::is_same_v<T, Half>;
  extern __shared__ __align__(1024) uint4 memory[];
  uint4* omega = memory;                // rows of features
  uint4* dmeans = omega + Of::matrix;   // dU, rows of features
  uint4* stages = dmeans + Of::matrix;  // k and v of each
  float* exponents = reinterpret_cast<float*>(stages + Of::key_stages * 2 * slab);
  float* dy = exponents + M;
  float* largest = dy + M;  // of each warp

  const Place at(args, blockIdx.x);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const T *k = args.x.at(at.i_b, at.i_h), *v = args.y.at(at.i_b, at.i_h);
  const bool* mask = args.mask == nullptr ? nullptr : args.mask + at.i_b * args.length;
  int ahead = at.begin, next_stage = 0, stage = 0;
  const auto start_next = [&] {
    if (ahead < at.end) {
      const int64_t first = static_cast<int64_t>(ahead) * tile;
      const int count = static_cast<int>(min(static_cast<int64_t>(tile), args.length - first));
      const bool* tile_mask = mask == nullptr ? nullptr : mask + first;
      uint4* to = stages + next_stage * 2 * slab;
      fetch<threads>(k + first * args.x.l, args.x.l, count, to, tile_mask);
      fetch<threads>(v + first * args.y.l, args.y.l, count, to + slab, tile_mask);
      ++ahead;
      next_stage = next_stage + 1 == Of::key_stages ? 0 : next_stage + 1;
    }
    copies_end();
  };
  fill_projection<T, M, threads>(args.projection, at.i_h, omega);
#pragma unroll
  for (int i = 1; i < Of::key_stages; ++i) {
    start_next();
  }
  float back = 1.0f;  // what undoes the scaling of float16
  {
    // Row i of this thread's pieces is feature 16 i + threadIdx.x / 8; it finishes rows 8 n + threadIdx.x % 8.
    constexpr int own = (M + threads - 1) / threads, held = M > 128 ? 4 : M / 16;
    const auto feature = [](int n) { return (8 * n + threadIdx.x % 8) * 16 + threadIdx.x / 8; };
    const auto* kv = reinterpret_cast<const float4*>(args.kv + at.head * (M * width)) + 2 * threadIdx.x;
    float4 state[held][2];
#pragma unroll
    for (int i = 0; i < held; ++i) {
      state[i][0] = kv[i * threads * 2];
      state[i][1] = kv[i * threads * 2 + 1];
    }
    float inverse[own];  // of z
#pragma unroll
    for (int i = 0; i < own; ++i) {
      const int f = feature(i);
      if (f < M) {
        const float z = args.z[at.head * M + f], c = args.log_scale[at.head * M + f];
        const float bias = args.bias == nullptr ? 0.0f : args.bias[at.i_h * args.bias_h + f];
        inverse[i] = z > 0.0f ? 1.0f / z : 0.0f;
        exponents[f] = z > 0.0f ? (bias - c) * log2e - log2f(z) + key_shift<T> : none;
      }
    }
    wait_for_previous();  // which sums dU and r; the state, k, v and omega are older
    const float* part = args.parts + at.head * args.count * (M * (width + 1));
    float sums[M / 16][8] = {}, r[own] = {}, products[own];
    for (int n = 0; n < args.count; ++n, part += M * (width + 1)) {
#pragma unroll
      for (int i = 0; i < M / 16; ++i) {
        float x[8];
        widen<float, 8>(x, *reinterpret_cast<const Vec<float, 8>*>(part + (i * threads + threadIdx.x) * 8));
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          sums[i][e] += x[e];
        }
      }
#pragma unroll
      for (int i = 0; i < own; ++i) {
        r[i] += feature(i) < M ? part[M * width + feature(i)] : 0.0f;
      }
    }
    float factor = 1.0f;
    if constexpr (is_half) {
      float top = 1e-30f;
#pragma unroll
      for (int i = 0; i < own; ++i) {
        top = fmaxf(top, fabsf(r[i]) / 16);
      }
#pragma unroll
      for (int i = 0; i < M / 16; ++i) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          top = fmaxf(top, fabsf(sums[i][e]));
        }
      }
#pragma unroll
      for (int lanes = 1; lanes < 32; lanes *= 2) {
        top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, lanes));
      }
      if (lane == 0) {
        largest[warp] = top;
      }
      __syncthreads();
      top = fmaxf(fmaxf(largest[0], largest[1]), fmaxf(largest[2], largest[3]));
      factor = 1.0f / top;
      back = top * exp2f(-key_shift<T>);
    }
#pragma unroll
    for (int i = 0; i < M / 16; ++i) {
      const float4 first = i < held ? state[i % held][0] : kv[i * threads * 2];
      const float4 second = i < held ? state[i % held][1] : kv[i * threads * 2 + 1];
      uint4* to = dmeans + piece(i * (threads / 8) + threadIdx.x / 8, threadIdx.x % 8);
      const float product = fill_dmeans<T>(to, sums[i], factor, first, second);
      if (i % 8 == threadIdx.x % 8) {
        products[i / 8] = product;
      }
    }
#pragma unroll
    for (int i = 0; i < own; ++i) {
      if (feature(i) < M) {
        dy[feature(i)] = products[i] * inverse[i] - r[i] * factor;
      }
    }
  }

  const float square = args.norm * args.scale * args.scale;
  const KeyMemory shared{omega, dmeans, exponents, dy, nullptr, nullptr};
  for (int i_tile = at.begin; i_tile < at.end; ++i_tile) {
    uint4 *tile_k = stages + stage * 2 * slab, *tile_v = tile_k + slab;
    stage = stage + 1 == Of::key_stages ? 0 : stage + 1;
    const int64_t first = static_cast<int64_t>(i_tile) * tile;
    const int count = static_cast<int>(min(static_cast<int64_t>(tile), args.length - first));
    copies_wait<Of::key_stages - 2>();
    copies_visible();
    __syncthreads();  // this stage is there, and everyone has left the one before
    const int64_t at_tile = (at.head * args.length + first) * width;
    NoSum none_summed;
    key_tile<T, F, M / F, 1, true>(shared, 0, tile_k, tile_v, count, mask == nullptr ? nullptr : mask + first,
                                   args.scale, square, back, args.dx + at_tile, args.dy + at_tile, none_summed,
                                   start_next);
  }
#endif
}

// The same with dW, or for more features than a warpgroup takes dW alone, of F features that blockIdx.y counts. dU and
// r have one slot.
template <typename T, int M>
__global__ void __launch_bounds__(Layout<M>::key_threads, Layout<M>::omega_blocks)
    key_omega_kernel(const Args<T> args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Of = Layout<M>;
  constexpr int F = Of::features, threads = Of::key_threads;
  constexpr bool is_half = std::is_same_v<T, Half>, inputs = M == F;
  extern __shared__ __align__(1024) uint4 memory[];
  uint4* omega = memory;                                                  // rows of features
  uint4* dmeans = omega + Of::matrix;                                     // dU, rows of features
  uint4* stages = dmeans + Of::matrix;                                    // k and v of each
  uint4* gradients = stages + Of::key_stages * 2 * slab;                  // ds, rows of keys, a slab for 64 features
  float* next_part = reinterpret_cast<float*>(gradients + tile * F / 8);  // the sum of dU for the next unit
  float* exponents = next_part + M * width;
  float* dy = exponents + M;
  float* largest = reinterpret_cast<float*>(gradients);  // of each warp, while there is no ds

  const Units units(args);
  uint32_t unit_ahead = units.begin;
  Place ahead = units.place(args, unit_ahead);  // what is copied next
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int next_stage = 0, stage = 0;
  const auto start_next = [&] {
    if (ahead.begin < ahead.end) {
      const int64_t first = static_cast<int64_t>(ahead.begin) * tile;
      const int count = static_cast<int>(min(static_cast<int64_t>(tile), args.length - first));
      const bool* mask = args.mask == nullptr ? nullptr : args.mask + ahead.i_b * args.length + first;
      uint4* to = stages + next_stage * 2 * slab;
      fetch<threads>(args.x.at(ahead.i_b, ahead.i_h) + first * args.x.l, args.x.l, count, to, mask);
      fetch<threads>(args.y.at(ahead.i_b, ahead.i_h) + first * args.y.l, args.y.l, count, to + slab, mask);
      next_stage = next_stage + 1 == Of::key_stages ? 0 : next_stage + 1;
      if (++ahead.begin == ahead.end && unit_ahead + 1 < units.end) {
        ahead = units.place(args, ++unit_ahead);
      }
    }
    copies_end();
  };
  fill_projection<T, M, threads>(args.projection, ahead.i_h, omega);
#pragma unroll
  for (int i = 1; i < Of::key_stages; ++i) {
    start_next();
  }
  // Each thread copies what it will read.
  const auto start_part = [&](uint32_t n) {
    if (n < units.end) {
      const float* part = args.parts + units.place(args, n).head * (M * (width + 1));
#pragma unroll
      for (int i = 0; i < M / 16; ++i) {
        const int at = (i * threads + threadIdx.x) * 8;
        copy_async<16>(next_part + at, part + at, args.count > 0);
        copy_async<16>(next_part + at + 4, part + at + 4, args.count > 0);
      }
    }
    copies_end();
  };
  wait_for_previous();  // which sums dU and r; k, v and omega are older
  start_part(units.begin);

  const float square = args.norm * args.scale * args.scale;
  const int base = inputs ? 0 : blockIdx.y * F;
  const KeyMemory shared{omega, dmeans, exponents, dy, nullptr, nullptr};
  OmegaSum<T, F> omega_sum(gradients, nullptr, nullptr);
  for (uint32_t n_unit = units.begin; n_unit < units.end; ++n_unit) {
    const Place at = units.place(args, n_unit);
    const bool* mask = args.mask == nullptr ? nullptr : args.mask + at.i_b * args.length;
    float back = 1.0f;  // what undoes the scaling of float16
    {
      constexpr int own = (M + threads - 1) / threads;  // features that this thread finishes, as above
      const auto feature = [](int n) { return (8 * n + threadIdx.x % 8) * 16 + threadIdx.x / 8; };
      const auto* kv = reinterpret_cast<const float4*>(args.kv + at.head * (M * width)) + 2 * threadIdx.x;
      float r[own] = {}, c[own] = {}, inverse[own] = {}, products[own];
#pragma unroll
      for (int i = 0; i < own; ++i) {
        const int f = feature(i);
        if (f < M) {
          r[i] = args.count > 0 ? args.parts[at.head * (M * (width + 1)) + M * width + f] : 0.0f;
          const float z = args.z[at.head * M + f], log_scale = args.log_scale[at.head * M + f];
          const float bias = args.bias == nullptr ? 0.0f : args.bias[at.i_h * args.bias_h + f];
          inverse[i] = z > 0.0f ? 1.0f / z : 0.0f;
          c[i] = z > 0.0f ? (bias - log_scale) * log2e - log2f(z) + key_shift<T> : none;
        }
      }
      copies_wait<0>();
      const auto* pieces = reinterpret_cast<const Vec<float, 8>*>(next_part);
      float factor = 1.0f;
      if constexpr (is_half) {
        float top = 1e-30f;
#pragma unroll
        for (int i = 0; i < own; ++i) {
          top = fmaxf(top, fabsf(r[i]) / 16);
        }
#pragma unroll
        for (int i = 0; i < M / 16; ++i) {
          float x[8];
          widen<float, 8>(x, pieces[i * threads + threadIdx.x]);
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            top = fmaxf(top, fabsf(x[e]));
          }
        }
#pragma unroll
        for (int lanes = 1; lanes < 32; lanes *= 2) {
          top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, lanes));
        }
        if (lane == 0) {
          largest[warp] = top;
        }
        __syncthreads();
        top = fmaxf(fmaxf(largest[0], largest[1]), fmaxf(largest[2], largest[3]));
        factor = 1.0f / top;
        back = top * exp2f(-key_shift<T>);
      }
#pragma unroll
      for (int i = 0; i < M / 16; ++i) {
        float x[8];
        widen<float, 8>(x, pieces[i * threads + threadIdx.x]);
        uint4* to = dmeans + piece(i * (threads / 8) + threadIdx.x / 8, threadIdx.x % 8);
        const float product = fill_dmeans<T>(to, x, factor, kv[i * threads * 2], kv[i * threads * 2 + 1]);
        if (i % 8 == threadIdx.x % 8) {
          products[i / 8] = product;
        }
      }
#pragma unroll
      for (int i = 0; i < own; ++i) {
        const int f = feature(i);
        if (f < M) {
          dy[f] = products[i] * inverse[i] - r[i] * factor;
          exponents[f] = c[i];
        }
      }
    }
    start_part(n_unit + 1);
    if constexpr (is_half) {  // the sum over units is relative to the largest so far
      omega_sum.grow(fmaxf(omega_sum.common, back));
    }
    for (int i_tile = at.begin; i_tile < at.end; ++i_tile) {
      uint4 *tile_k = stages + stage * 2 * slab, *tile_v = tile_k + slab;
      stage = stage + 1 == Of::key_stages ? 0 : stage + 1;
      const int64_t first = static_cast<int64_t>(i_tile) * tile;
      const int count = static_cast<int>(min(static_cast<int64_t>(tile), args.length - first));
      copies_wait<Of::key_stages - 2>();
      copies_visible();
      __syncthreads();  // this stage is there, and everyone has left the one before
      const int64_t at_tile = (at.head * args.length + first) * width;
      key_tile<T, F, 1, 1, inputs>(shared, base, tile_k, tile_v, count, mask == nullptr ? nullptr : mask + first,
                                   args.scale, square, back, args.dx + at_tile, args.dy + at_tile, omega_sum,
                                   start_next);
    }
    __syncthreads();  // everyone has left dU and y
  }
  omega_sum.store(args.omega_parts + static_cast<int64_t>(blockIdx.x) * (M * width), base, args.scale);
#endif
}

// Slots of dW, (outer, sets, inner, M, D), and of r for the bias, (outer, sets, inner, count, step).
struct OmegaSlots {
  const float* data;
  int64_t outer, inner;

  // Calls f with each lanes-th slot of a set, from slot `lane` on.
  template <typename F>
  __device__ __forceinline__ void each(int set, int sets, int lane, int lanes, F&& f) const {
#pragma unroll 4
    for (int64_t n = lane; n < outer * inner; n += lanes) {
      f((n / inner * sets + set) * inner + n % inner);
    }
  }
};

template <int M>
struct OmegaArgs {
  OmegaSlots queries, keys, states;
  int count, step;        // slots of a key head, and numbers from one to the next
  float *domega, *dbias;  // (sets, M, D), (sets, M) or null
};

// Adds the slots of a set of heads; a block for each feature. Exponents of queries and keys have the same bias, each
// with the gradient r_f.
template <int M>
__global__ void __launch_bounds__(256) add_omega_kernel(const OmegaArgs<M> args) {
  constexpr int columns = width / 4, lanes = 256 / columns;
  __shared__ float4 sums[lanes][columns];
  __shared__ float bias_sums[lanes];
  const int x = threadIdx.x % columns, lane = threadIdx.x / columns;
  const int f = blockIdx.x % M, set = blockIdx.x / M, sets = gridDim.x / M;
  float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
  const auto add = [&sum](const float4& y) { sum = {sum.x + y.x, sum.y + y.y, sum.z + y.z, sum.w + y.w}; };
  args.queries.each(set, sets, lane, lanes, [&](int64_t slot) {
    add(reinterpret_cast<const float4*>(args.queries.data)[(slot * M + f) * columns + x]);
  });
  args.keys.each(set, sets, lane, lanes, [&](int64_t slot) {
    add(reinterpret_cast<const float4*>(args.keys.data)[(slot * M + f) * columns + x]);
  });
  sums[lane][x] = sum;
  if (args.dbias != nullptr && x == 0) {
    float bias = 0.0f;
    args.states.each(set, sets, lane, lanes, [&](int64_t head) {
      for (int n = 0; n < args.count; ++n) {
        bias += args.states.data[(head * args.count + n) * args.step + f];
      }
    });
    bias_sums[lane] = bias;
  }
  __syncthreads();
  if (lane == 0) {
#pragma unroll
    for (int i = 1; i < lanes; ++i) {
      add(sums[i][x]);
    }
    reinterpret_cast<float4*>(args.domega)[blockIdx.x * columns + x] = sum;
  }
  if (args.dbias != nullptr && threadIdx.x == 0) {
    float bias = 0.0f;
#pragma unroll
    for (int i = 0; i < lanes; ++i) {
      bias += bias_sums[i];
    }
    args.dbias[blockIdx.x] = 2.0f * bias;
  }
}

// Heads of few tokens -------------------------------------------------------------------------------------------------

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ void prefetch(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// Makes U of one tile of keys as the sum of two matrices, and what features add to queries' exponents. `norms` are 64
// numbers of shared memory.
template <typename T, int M, typename Of>
__device__ __forceinline__ void sum_values(const uint4* omega, const uint4* tile_k, const uint4* tile_v, int count,
                                           const bool* mask, float scale, float square, const float* bias, uint4* means,
                                           float* exponents, float* norms) {
  constexpr int parts = Of::features / 64;
  const int base = Of::groups > 1 ? threadIdx.x / 128 * Of::features : 0;
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32, g = lane / 4, t = lane % 4;
  float p[parts][32], u[parts][32];  // a warp has 16 features of each part
  products_begin();
#pragma unroll
  for (int n = 0; n < parts; ++n) {
#pragma unroll
    for (int s = 0; s < width / 16; ++s) {
      multiply<T>(p[n], operand(omega + (base + n * 64) * 8 + s * 2), operand(tile_k + s * 2), s > 0);
    }
    products_end();
  }
  if (threadIdx.x < 2 * tile) {
    const int key = threadIdx.x / 2;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float x[8];
      widen<T, 8>(x, *reinterpret_cast<const Vec<T, 8>*>(tile_k + piece(key, threadIdx.x % 2 * 4 + i)));
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        sum = fmaf(x[e], x[e], sum);
      }
    }
    sum += __shfl_xor_sync(~0u, sum, 1);
    if (threadIdx.x % 2 == 0) {
      norms[key] = key < count && (mask == nullptr || mask[key]) ? sum * (-0.5f * log2e * square) : none;
    }
  }
  __syncthreads();          // all norms are there
  float inverse[parts][2];  // of the sum of a feature's weights
#pragma unroll
  for (int n = 0; n < parts; ++n) {
    float top[2] = {-INFINITY, -INFINITY}, z[2] = {};
    products_wait<(parts > 1)>(p[n]);
    add_exponents(p[n], scale * log2e, norms, top);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = largest_of_four(top[r]) - key_shift<T>;
    }
    uint32_t a[4][4];
#pragma unroll
    for (int s = 0; s < 4; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = exp2_approximate(p[n][8 * s + 2 * i] - top[i % 2]);
        const float y = exp2_approximate(p[n][8 * s + 2 * i + 1] - top[i % 2]);
        z[i % 2] += x + y;
        a[s][i] = pack<T>(x, y);
      }
    }
    products_begin();
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      multiply<T, Inner::b>(u[n], a[s], operand(tile_v + s * 128), s > 0);
    }
    products_end();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      z[r] = sum_of_four(z[r]);
      inverse[n][r] = 1.0f / z[r];
      const int f = base + n * 64 + warp * 16 + g + 8 * r;
      if (t == 0) {
        const float b = bias == nullptr ? 0.0f : bias[f];
        exponents[f] = top[r] > 0.5f * none ? top[r] + log2f(z[r]) + 2.0f * log2e * b : none;
      }
    }
  }
#pragma unroll
  for (int n = 0; n < parts; ++n) {
    if (n + 1 < parts) {
      products_wait<1>(u[n]);
    } else {
      products_wait(u[n]);
    }
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      uint32_t high[4], low[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = u[n][8 * s + 2 * i] * inverse[n][i % 2], y = u[n][8 * s + 2 * i + 1] * inverse[n][i % 2];
        high[i] = pack<T>(x, y);
        const float2 rounded = unpack<T>(high[i]);
        low[i] = pack<T>(x - rounded.x, y - rounded.y);
      }
      uint4* to = means + (base + n * 64) * 8 + piece(warp * 16 + lane % 16, s * 2 + lane / 16);
      store_matrices(to, high);
      store_matrices(to + Of::matrix, low);
    }
  }
}

// Makes dU in 16 bits where U's first part is, and y = U dU_16 - r of the same features, where r = U dU - sum_i w
// delta, and the sum is what query_tile leaves in dy; with dW, r is there. `sums` are 8 M + 8 numbers of shared memory.
// Stores r where that is not null. Returns what undoes the scaling of float16.
template <typename T, int M, typename Of, typename Sum>
__device__ __forceinline__ float take_dmeans(uint4* means, const float (&dmeans)[Of::features / 2],
                                             const float (&dy)[Of::features / 64][4], Sum& omega_sum, float* sums,
                                             float* y, float* r) {
  constexpr bool is_half = std::is_same_v<T, Half>, omega = sums_omega<Sum>;
  constexpr int F = Of::features;
  const int group = Of::groups > 1 ? threadIdx.x / 128 : 0, base = group * F;
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32, g = lane / 4, t = lane % 4;
  uint4* own = means + piece(base + lane / 16 * 8 + lane % 8, warp * 2 + lane / 8 % 2);  // a step of 16 rows keeps it
  float *of_queries = sums + 4 * M, *largest = of_queries + 4 * M;
  if constexpr (omega) {
    store_column_sums(omega_sum.of_rows, of_queries + warp * M + base);
#pragma unroll
    for (float& x : omega_sum.of_rows) {
      x = 0.0f;
    }
  } else if (t == 0) {
#pragma unroll
    for (int n = 0; n < F / 64; ++n) {
      const int f = base + warp * (F / 4) + n * 16 + g;
      of_queries[f] = dy[n][0] + dy[n][1];
      of_queries[f + 8] = dy[n][2] + dy[n][3];
    }
  }
  const auto sum_of = [](const float* x) {
    return (x[threadIdx.x] + x[M + threadIdx.x]) + (x[2 * M + threadIdx.x] + x[3 * M + threadIdx.x]);
  };
  // r, or without dW r less U dU.
  const auto r_of_queries = [&] { return omega ? sum_of(of_queries) : -of_queries[threadIdx.x]; };
  // Calls f for an element of dU that this thread holds and of U, and for the number of its column of the thread's.
  const auto each_pair = [&](int s, auto&& f) {
    uint32_t a[4], b[4];
    load_matrices<true>(a, own + s * 128);
    load_matrices<true>(b, own + s * 128 + Of::matrix);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 high = unpack<T>(a[i]), low = unpack<T>(b[i]);
      f(i, 4 * s + i / 2 * 2, dmeans[8 * s + 2 * i], dmeans[8 * s + 2 * i + 1], high.x + low.x, high.y + low.y);
    }
  };
  float factor = 1.0f, back = 1.0f;
  if constexpr (is_half) {
    float products[F / 4] = {}, top = 1e-30f;
#pragma unroll
    for (int s = 0; s < F / 16; ++s) {
      each_pair(s, [&](int, int column, float x0, float x1, float u0, float u1) {
        top = fmaxf(top, fmaxf(fabsf(x0), fabsf(x1)));
        products[column] += u0 * x0;
        products[column + 1] += u1 * x1;
      });
    }
    if constexpr (!omega) {
      store_column_sums(products, sums + warp * M + base);
    }
    __syncthreads();
    if (threadIdx.x < M) {
      top = fmaxf(top, fabsf(r_of_queries() + (omega ? 0.0f : sum_of(sums))) / 16);
    }
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, lanes));
    }
    if (lane == 0) {
      largest[threadIdx.x / 32] = top;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Of::threads / 32; ++i) {
      top = fmaxf(top, largest[i]);
    }
    factor = 1.0f / top;
    back = top * exp2f(-key_shift<T>);
  }
  float products[F / 4] = {};
#pragma unroll
  for (int s = 0; s < F / 16; ++s) {
    uint32_t x[4];
    each_pair(s, [&](int i, int column, float x0, float x1, float u0, float u1) {
      x0 *= factor;
      x1 *= factor;
      x[i] = pack<T>(x0, x1);
      const float2 rounded = unpack<T>(x[i]);
      products[column] += u0 * (rounded.x - (omega ? 0.0f : x0));
      products[column + 1] += u1 * (rounded.y - (omega ? 0.0f : x1));
    });
    __syncwarp();
    store_matrices<true>(own + s * 128, x);
  }
  store_column_sums(products, sums + warp * M + base);
  __syncthreads();
  if (threadIdx.x < M) {
    const float x = r_of_queries();
    y[threadIdx.x] = sum_of(sums) - x * factor;
    if (omega && r != nullptr) {
      r[threadIdx.x] = x;
    }
  }
  return back;
}

#endif

// Queries and then keys of several key heads with the same projection, each without a trip of dU through memory;
// where Fresh, of heads of one tile, nor of U.
template <typename T, int M, bool Omega, bool Fresh>
__global__ void __launch_bounds__(HeadLayout<M, Omega, Fresh>::threads, HeadLayout<M, Omega, Fresh>::blocks)
    head_gradient_kernel(const Args<T> queries, const Args<T> keys) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Of = HeadLayout<M, Omega, Fresh>;
  constexpr int F = Of::features, threads = Of::threads;
  const int base = Of::groups > 1 ? threadIdx.x / 128 * F : 0;
  extern __shared__ __align__(1024) uint4 memory[];
  uint4* omega = memory;                                 // rows of features
  uint4* means = omega + Of::matrix;                     // U and then dU, rows of features
  uint4* weights = means + Of::mean_parts * Of::matrix;  // w, rows of queries, a slab for 64 features
  uint4* stages = weights + Of::matrix;
  uint4* gradients = stages + Of::stages * 2 * slab;      // with dW: ds, as weights
  uint4* results = gradients + (Omega ? Of::matrix : 0);  // dq
  float* exponents = reinterpret_cast<float*>(results + (Omega ? slab : 0));
  T* deltas = reinterpret_cast<T*>(exponents + M);                           // (2, tile)
  float* half_products = reinterpret_cast<float*>(deltas + 2 * tile);        // (2, groups, 16, 128)
  float2* row_sums = reinterpret_cast<float2*>(half_products + Of::halves);  // (groups, tile)
  float* sizes = reinterpret_cast<float*>(row_sums + Of::rows);              // of each warp
  float *dy = reinterpret_cast<float*>(weights), *sums = dy + M;             // while there are no weights

  const Units units(keys);
  const int groups = keys.groups;
  const int query_tiles = Fresh ? 1 : static_cast<int>((queries.length + tile - 1) / tile);
  const int key_tiles = Fresh ? 1 : static_cast<int>((keys.length + tile - 1) / tile);
  const auto count_of = [](const Args<T>& args, int i_tile) {
    const int64_t left = args.length - static_cast<int64_t>(i_tile) * tile;
    return static_cast<int>(Fresh ? left : min(static_cast<int64_t>(tile), left));
  };
  const auto start_queries = [&](const Place& of, int group, int i_tile, uint4* to) {
    const int i_h = of.i_h * groups + group, count = count_of(queries, i_tile);
    const int64_t first = static_cast<int64_t>(i_tile) * tile;
    fetch<threads>(queries.x.at(of.i_b, i_h) + first * queries.x.l, queries.x.l, count, to);
    fetch<threads>(queries.y.at(of.i_b, i_h) + first * queries.y.l, queries.y.l, count, to + slab);
  };
  const auto mask_of = [&](const Place& of, int i_tile) {
    return keys.mask == nullptr ? nullptr : keys.mask + of.i_b * keys.length + static_cast<int64_t>(i_tile) * tile;
  };
  const auto start_keys = [&](const Place& of, int i_tile, uint4* to) {
    const int count = count_of(keys, i_tile);
    const bool* mask = mask_of(of, i_tile);
    const int64_t first = static_cast<int64_t>(i_tile) * tile;
    fetch<threads>(keys.x.at(of.i_b, of.i_h) + first * keys.x.l, keys.x.l, count, to, mask);
    fetch<threads>(keys.y.at(of.i_b, of.i_h) + first * keys.y.l, keys.y.l, count, to + slab, mask);
  };
  // What is copied next: a tile of one of the key head's query heads, or of its keys. Where Fresh, keys have the first
  // two stages in turn and queries the third.
  uint32_t unit_ahead = units.begin;
  Place ahead = units.place(keys, unit_ahead);
  int group_ahead = 0, tile_ahead = 0, next_stage = 0, stage = 0;
  const auto start_next = [&] {
    if constexpr (!Fresh) {
      if (unit_ahead < units.end) {
        uint4* to = stages + next_stage * 2 * slab;
        if (group_ahead < groups) {
          start_queries(ahead, group_ahead, tile_ahead, to);
          if (++tile_ahead == query_tiles) {
            tile_ahead = 0;
            ++group_ahead;
          }
        } else {
          start_keys(ahead, tile_ahead, to);
          if (++tile_ahead == key_tiles) {
            tile_ahead = group_ahead = 0;
            if (++unit_ahead < units.end) {
              ahead = units.place(keys, unit_ahead);
            }
          }
        }
        next_stage = next_stage + 1 == Of::stages ? 0 : next_stage + 1;
      }
      copies_end();
    }
  };
  const auto next_tile = [&] {
    uint4* rows = stages + stage * 2 * slab;
    stage = stage + 1 == Of::stages ? 0 : stage + 1;
    copies_wait<Of::stages - 2>();
    copies_visible();
    __syncthreads();  // this stage is there, and everyone has left the one before
    return rows;
  };
  uint4* query_stage = stages + 2 * 2 * slab;
  const auto key_stage = [&](uint32_t n) { return stages + (n - units.begin) % 2 * 2 * slab; };
  fill_projection<T, M, threads>(keys.projection, ahead.i_h, omega);
  if constexpr (Fresh) {
    start_keys(ahead, 0, key_stage(units.begin));
    copies_end();
    start_queries(ahead, 0, 0, query_stage);
    copies_end();
  } else {
#pragma unroll
    for (int i = 1; i < Of::stages; ++i) {
      start_next();
    }
  }
  const float square = keys.norm * keys.scale * keys.scale;
  const QueryMemory<T> of_queries{omega, means, weights, exponents, deltas, row_sums, half_products};
  const KeyMemory of_keys{omega, means, exponents, dy, row_sums, half_products};
  std::conditional_t<Omega, OmegaSum<T, F>, NoSum> omega_sum{gradients, results, sizes};
  for (uint32_t n_unit = units.begin; n_unit < units.end; ++n_unit) {
    const Place at = units.place(keys, n_unit);
    const float* bias = keys.bias == nullptr ? nullptr : keys.bias + at.i_h * keys.bias_h;
    float key_exponent = none;  // of this thread's feature
    if constexpr (Fresh) {
      copies_wait<1>();
      copies_visible();
      __syncthreads();  // keys are there, and everyone has left those before, dU and y
      if (n_unit + 1 < units.end) {
        start_keys(units.place(keys, n_unit + 1), 0, key_stage(n_unit + 1));
      }
      copies_end();
      sum_values<T, M, Of>(omega, key_stage(n_unit), key_stage(n_unit) + slab, count_of(keys, 0), mask_of(at, 0),
                           keys.scale, square, bias, means, exponents, reinterpret_cast<float*>(weights));
    } else {
      fill_means<T, M, threads, Of::mean_parts, false>(keys.kv + at.head * (M * width), keys.z + at.head * M, means);
      if (threadIdx.x < M) {
        const float z = keys.z[at.head * M + threadIdx.x], c = keys.log_scale[at.head * M + threadIdx.x];
        const float b = bias == nullptr ? 0.0f : bias[threadIdx.x];
        exponents[threadIdx.x] = z > 0.0f ? (c + b) * log2e + log2f(z) : none;
        key_exponent = z > 0.0f ? (b - c) * log2e - log2f(z) + key_shift<T> : none;
      }
      if (n_unit + 1 < units.end) {
        const int64_t state = units.place(keys, n_unit + 1).head * M;
#pragma unroll
        for (int i = threadIdx.x * 32; i < M * width; i += threads * 32) {
          prefetch(keys.kv + state * width + i);
        }
        if (threadIdx.x < M && threadIdx.x % 32 == 0) {
          prefetch(keys.z + state + threadIdx.x);
          prefetch(keys.log_scale + state + threadIdx.x);
        }
      }
    }

    float dmeans[F / 2] = {}, of_deltas[F / 64][4] = {};
    for (int i_h = at.i_h * groups; i_h < (at.i_h + 1) * groups; ++i_h) {
      T* to = queries.dx + (at.i_b * queries.heads + i_h) * queries.length * width;
      for (int i_tile = 0; i_tile < query_tiles; ++i_tile, to += tile * width) {
        uint4* rows = query_stage;
        if constexpr (!Fresh) {
          rows = next_tile();
        } else if (i_h == at.i_h * groups) {
          copies_wait<1>();
          copies_visible();
          __syncthreads();  // queries, U and what goes with it are there
        } else {
          __syncthreads();  // everyone has left the queries before
          start_queries(at, i_h - at.i_h * groups, 0, rows);
          copies_end();
          copies_wait<0>();
          copies_visible();
          __syncthreads();
        }
        query_tile<T, M, Of>(of_queries, rows, rows + slab, count_of(queries, i_tile), queries.scale, to, dmeans,
                             of_deltas, omega_sum, start_next);
      }
    }
    __syncthreads();  // everyone has left U, the weights and the last queries
    if constexpr (Fresh) {
      if (n_unit + 1 < units.end) {
        start_queries(units.place(keys, n_unit + 1), 0, 0, query_stage);
      }
      copies_end();
    }
    if (threadIdx.x < M) {
      if (Fresh && exponents[threadIdx.x] > none) {
        const float b = bias == nullptr ? 0.0f : bias[threadIdx.x];
        key_exponent = 2.0f * log2e * b - exponents[threadIdx.x] + key_shift<T>;
      }
      exponents[threadIdx.x] = key_exponent;
    }
    float* r = Omega && keys.parts != nullptr ? keys.parts + at.head * M : nullptr;
    const float back = take_dmeans<T, M, Of>(means, dmeans, of_deltas, omega_sum, sums, dy, r);
    if constexpr (Omega && std::is_same_v<T, Half>) {  // the sum over heads is relative to the largest so far
      omega_sum.grow(fmaxf(omega_sum.common, back));
    }
    for (int i_tile = 0; i_tile < key_tiles; ++i_tile) {
      uint4* rows = key_stage(n_unit);
      if constexpr (Fresh) {
        copies_visible();
        __syncthreads();  // dU and y are there
      } else {
        rows = next_tile();
      }
      const int64_t to = (at.head * keys.length + static_cast<int64_t>(i_tile) * tile) * width;
      key_tile<T, F, 1, Of::groups, true>(of_keys, base, rows, rows + slab, count_of(keys, i_tile), mask_of(at, i_tile),
                                          keys.scale, square, back, keys.dx + to, keys.dy + to, omega_sum, start_next);
    }
    if constexpr (!Fresh) {
      __syncthreads();  // everyone has left dU and y
    }
  }
  if constexpr (Omega) {
    omega_sum.store(keys.omega_parts + static_cast<int64_t>(blockIdx.x) * (M * width), base, keys.scale);
  }
#endif
}

// Launches ------------------------------------------------------------------------------------------------------------

// Tiles of `heads` in shares of so many to blocks of which `resident` run at a time: how long, in tiles, with `start`
// for a block's beginning.
int64_t time_of(int64_t share, int64_t tiles, int64_t heads, int64_t resident, int64_t start) {
  return ceil_div(heads * ceil_div(tiles, share), resident) * (share + start);
}

// Tiles of a head that a block takes, for the least time.
int share_of(int64_t tiles, int64_t heads, int64_t resident, int64_t start) {
  int64_t best = tiles, least = INT64_MAX;
  const int64_t most = std::min(tiles, std::max<int64_t>(1, 2 * resident / heads));
  for (int64_t n = 1; n <= most; ++n) {
    const int64_t share = (tiles + n - 1) / n, time = (heads * n + resident - 1) / resident * (share + start);
    if (time < least) {
      least = time;
      best = share;
    }
  }
  return static_cast<int>(best);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention_bwd_cuda(
    const Tensor& dout, const std::optional<Tensor>& dkv, const std::optional<Tensor>& dz, const Tensor& q,
    const Tensor& k, const Tensor& v, const std::optional<Tensor>& omega, int64_t kind, bool causal, double scale,
    const std::optional<Tensor>& bias, double eps, bool normalize, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& kv, const std::optional<Tensor>& z,
    const std::optional<Tensor>& log_scale, const Tensor& last_kv, const Tensor& last_z, const Tensor& last_log_scale,
    bool need_omega) {
  const char* op = "linear_attention_bwd";
  constexpr int64_t positive = 0, exp = 5;
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && dout.dim() == 4, op,
                  ": q, k, v and dout must have 4 dimensions");
  const int64_t B = q.size(0), H = q.size(1), L = q.size(2), Hk = k.size(1), S = k.size(2);
  const ScalarType dtype = q.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op,
                  ": q must have dtype float16 or bfloat16");
  STD_TORCH_CHECK((kind == exp || (kind == positive && omega)) && eps == 0 && normalize && !cu_seqlens && !kv && !z &&
                      !log_scale && !dkv && !dz,
                  op, ": on a GPU attention must be normalised, by positive features or exp, and without a state");
  need_omega &= omega.has_value();
  if (causal) {
    return linear_attention_causal_bwd_cuda(dout, q, k, v, omega, kind, scale, bias, mask, need_omega);
  }
  for (const auto& [argument, x] : {std::pair{"k", &k}, {"v", &v}, {"dout", &dout}}) {
    check_like(op, argument, *x, dtype, q);
  }
  STD_TORCH_CHECK(q.size(3) == width && k.size(3) == width && v.size(3) == width && dout.size(3) == width, op,
                  ": D and V must be 64");
  STD_TORCH_CHECK(Hk > 0 ? H % Hk == 0 : H == 0, op, ": H must be a multiple of Hk");
  STD_TORCH_CHECK(k.size(0) == B && v.size(0) == B && v.size(1) == Hk && v.size(2) == S && dout.size(0) == B &&
                      dout.size(1) == H && dout.size(2) == L,
                  op, ": shapes of q, k, v and dout must agree");
  const Projection projection = projection_of(op, omega, q, Hk);
  const int64_t M = projection.features;
  const bool per_head = omega && omega->dim() == 3;
  const auto check_floats = [&](const char* argument, const Tensor& x, int64_t count) {
    check_like(op, argument, x, ScalarType::Float, q);
    STD_TORCH_CHECK(x.is_contiguous() && x.numel() == count, op, ": ", argument, " must be contiguous, of ", count,
                    " numbers");
  };
  // Heads of one tile need no state.
  const bool one_tile = L > 0 && S > 0 && L <= tile && S <= tile && M <= 128,
             has_state = !one_tile || last_z.numel() > 0;
  check_floats("last_kv", last_kv, has_state ? B * Hk * M * width : 0);
  check_floats("last_z", last_z, has_state ? B * Hk * M : 0);
  check_floats("last_log_scale", last_log_scale, has_state ? B * Hk * M : 0);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(last_kv.const_data_ptr()) % 16 == 0, op,
                  ": last_kv must be aligned to 16 bytes");
  if (bias) {
    check_floats("bias", *bias, per_head ? Hk * M : M);
  }
  if (mask) {
    check_like(op, "mask", *mask, ScalarType::Bool, q);
    STD_TORCH_CHECK(mask->is_contiguous() && mask->numel() == B * S, op, ": mask must be contiguous, of shape (B, S)");
  }
  const Device gpu = device(q.get_device_index());
  STD_TORCH_CHECK(gpu.capability == 9, op, ": q must be on a GPU of compute capability 9");

  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Tensor dq = new_empty(q, {B, H, L, width}, dtype), dk = new_empty(q, {B, Hk, S, width}, dtype),
         dv = new_empty(q, {B, Hk, S, width}, dtype);
  const Tensor empty = new_empty(q, {0}, dtype);
  const auto like = [&](const std::optional<Tensor>& x) {
    return need_omega && x ? new_empty(q, std::vector<int64_t>(x->sizes().begin(), x->sizes().end()), ScalarType::Float)
                           : empty;
  };
  Tensor domega = like(omega), dbias = like(bias);
  const int64_t multiprocessors = gpu.multiprocessors;
  const int64_t query_tiles = ceil_div(L, tile), key_tiles = ceil_div(S, tile);
  const cudaStream_t stream = current_stream(q);
  const auto run = [&](auto zero, auto features) {
    using T = decltype(zero);
    constexpr int M = features;
    using Of = Layout<M>;
    constexpr int size = M * (width + 1);
    Args<T> args{};
    args.projection = projection;
    args.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
    args.bias_h = per_head ? M : 0;
    args.kv = static_cast<const float*>(last_kv.const_data_ptr());
    args.z = static_cast<const float*>(last_z.const_data_ptr());
    args.log_scale = static_cast<const float*>(last_log_scale.const_data_ptr());
    args.groups = Hk > 0 ? static_cast<int>(H / Hk) : 1;
    args.scale = static_cast<float>(scale);
    args.norm = kind == positive ? 1.0f : 0.0f;
    bool overlaps = false;  // the kernel before is one of these, and may end while the next begins
    const auto run_blocks = [&](auto kernel, int64_t blocks, int chunks, int threads, size_t bytes, auto... arguments) {
      STD_TORCH_CHECK(blocks <= INT32_MAX, op, ": B and H must be smaller");
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
      launch(kernel, dim3(static_cast<uint32_t>(blocks), chunks), threads, bytes, stream, overlaps, arguments...);
    };
    Args<T> queries = args, keys = args;
    queries.x = rows_of<T>(op, q);
    queries.y = rows_of<T>(op, dout);
    queries.dx = static_cast<T*>(dq.mutable_data_ptr());
    queries.length = L;
    queries.heads = static_cast<int>(H);
    keys.x = rows_of<T>(op, k);
    keys.y = rows_of<T>(op, v);
    keys.mask = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
    keys.dx = static_cast<T*>(dk.mutable_data_ptr());
    keys.dy = static_cast<T*>(dv.mutable_data_ptr());
    keys.length = S;
    keys.heads = static_cast<int>(Hk);
    // Blocks walk over units of each set of heads that share a projection.
    const int64_t sets = per_head ? Hk : 1, outer = per_head ? B : 1;
    const auto walk = [&](Args<T>& args, int64_t resident) {
      const int64_t units = B * args.heads * args.blocks / sets;
      STD_TORCH_CHECK(units * sets <= INT32_MAX, op, ": B and H must be smaller");
      args.sets = static_cast<int>(sets);
      args.inner = static_cast<int>(units / outer);
      args.units = static_cast<int>(units);
      args.taken = share_of(units, sets, resident, 1);
      args.walkers = ceil_div(units, args.taken);
    };
    // For dW, with a slot for each.
    Tensor parts = empty, query_omega = empty, key_omega = empty;
    OmegaArgs<M> sums{};
    const auto start_slots = [&](Args<T>& args, Tensor& slots) {
      slots = new_empty(q, {sets * args.walkers, M, width}, ScalarType::Float);
      args.omega_parts = static_cast<float*>(slots.mutable_data_ptr());
      return OmegaSlots{args.omega_parts, 1, args.walkers};
    };
    const int64_t query_places = multiprocessors * Of::query_blocks, key_places = multiprocessors * Of::key_blocks;
    const auto add_slots = [&](const float* r, int64_t count, int step) {
      if (bias && count > 0) {
        sums.states = {r, outer, B * Hk / (outer * sets)};
        sums.count = static_cast<int>(count);
        sums.step = step;
      }
      sums.domega = static_cast<float*>(domega.mutable_data_ptr());
      sums.dbias = bias ? static_cast<float*>(dbias.mutable_data_ptr()) : nullptr;
      overlaps = false;
      run_blocks(add_omega_kernel<M>, sets * M, 1, 256, 0, sums);
    };
    const auto try_whole = [&](auto with_omega, auto is_fresh) {
      constexpr bool omega = with_omega, fresh = is_fresh;
      using Whole = HeadLayout<M, omega, fresh>;
      const int64_t places = multiprocessors * Whole::blocks;
      keys.share = static_cast<int>(key_tiles);
      keys.blocks = 1;
      walk(keys, places);
      // How long it takes, in tiles: a block's beginning is worth 3 and a head 1, two warpgroups need two thirds for
      // each. Apart, as share_of has it; with dW about the same.
      const int64_t whole = ceil_div(sets * keys.walkers, places) *
                            (keys.taken * (keys.groups * query_tiles + key_tiles + 1) + 3) * 2 / (1 + Whole::groups);
      const int64_t apart =
          time_of(share_of(query_tiles, B * H, query_places, 4), query_tiles, B * H, query_places, 4) +
          time_of(share_of(key_tiles, B * Hk, key_places, 2), key_tiles, B * Hk, key_places, 2);
      if (has_state && whole > apart) {
        return false;
      }
      if constexpr (omega) {
        sums.keys = start_slots(keys, key_omega);
        if (bias) {
          parts = new_empty(q, {B * Hk, M}, ScalarType::Float);
          keys.parts = static_cast<float*>(parts.mutable_data_ptr());
        }
      }
      run_blocks(head_gradient_kernel<T, M, omega, fresh>, sets * keys.walkers, 1, Whole::threads, Whole::bytes,
                 queries, keys);
      if constexpr (omega) {
        add_slots(keys.parts, 1, M);
      }
      return true;
    };
    if constexpr (M <= 128) {
      const auto try_tiles = [&](auto with_omega) {
        return one_tile ? try_whole(with_omega, std::true_type{}) : try_whole(with_omega, std::false_type{});
      };
      if (B * H * query_tiles > 0 && B * Hk * key_tiles > 0 &&
          (need_omega ? try_tiles(std::true_type{}) : try_tiles(std::false_type{}))) {
        return;
      }
    }
    int64_t count = 0;  // slots of a key head
    if (B * H * query_tiles > 0) {
      using Walk = OmegaLayout<M>;
      const bool together = need_omega && Walk::all;
      queries.share = share_of(query_tiles, B * H, together ? multiprocessors * Walk::blocks : query_places, 4);
      queries.blocks = ceil_div(query_tiles, queries.share);
      count = static_cast<int64_t>(queries.groups) * queries.blocks;
      const int64_t slots = B * H * queries.blocks, more = count > (need_omega ? 1 : 2) ? B * Hk : 0;
      parts = new_empty(q, {slots + more, size}, ScalarType::Float);
      queries.parts = static_cast<float*>(parts.mutable_data_ptr());
      if (need_omega) {
        walk(queries, multiprocessors * Walk::blocks);
        sums.queries = start_slots(queries, query_omega);
        run_blocks(query_omega_kernel<T, M>, sets * queries.walkers, 1, Walk::threads, Walk::bytes, queries);
      }
      if (!together) {
        run_blocks(query_gradient_kernel<T, M>, B * H * queries.blocks, 1, Of::query_threads, Of::query_bytes, queries);
      }
      overlaps = true;
      if (more > 0) {
        const auto* from = reinterpret_cast<const float4*>(queries.parts);
        queries.parts += slots * size;
        run_blocks(add_parts_kernel, ceil_div(more * (size / 4), 128), 1, 128, 0, from,
                   reinterpret_cast<float4*>(queries.parts), more, static_cast<int>(count), size / 4);
        count = 1;
      }
    }
    if (B * Hk * key_tiles > 0) {
      constexpr int chunks = M / Of::features;
      const bool together = need_omega && chunks == 1;
      keys.share = share_of(key_tiles, B * Hk, together ? multiprocessors * Of::omega_blocks : key_places, 2);
      keys.blocks = ceil_div(key_tiles, keys.share);
      keys.parts = queries.parts;
      keys.count = static_cast<int>(count);
      if (!together) {
        run_blocks(key_gradient_kernel<T, M>, B * Hk * keys.blocks, 1, Of::key_threads, Of::key_bytes, keys);
        overlaps = false;
      }
      if (need_omega) {
        walk(keys, multiprocessors * Of::omega_blocks / chunks);
        sums.keys = start_slots(keys, key_omega);
        run_blocks(key_omega_kernel<T, M>, sets * keys.walkers, chunks, Of::key_threads, Of::omega_bytes, keys);
      }
    }
    if (need_omega && sets > 0) {
      add_slots(queries.parts + M * width, count, size);
    }
  };
  const auto with_features = [&](auto zero) {
    switch (M) {
      case 64:
        return run(zero, std::integral_constant<int, 64>{});
      case 128:
        return run(zero, std::integral_constant<int, 128>{});
      default:
        return run(zero, std::integral_constant<int, 256>{});
    }
  };
  dtype == ScalarType::BFloat16 ? with_features(BFloat16{}) : with_features(Half{});
  return {dq, dk, dv, domega, dbias, empty, empty};
}

}  // namespace linear
}  // namespace fastrpe
