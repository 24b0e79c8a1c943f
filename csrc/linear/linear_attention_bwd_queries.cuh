// dq, and what queries sum up for keys: dU, r, and dW.
#pragma once

#include "linear_attention_bwd.cuh"

namespace fastrpe {
namespace linear {
namespace bidirectional {

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
// warpgroups have all rows, each F features. Where Of::late, dU is the tile's alone and r as without dW; everyone has
// left the tile and the weights at the end.
template <typename T, int M, typename Of, typename Sum, typename Next>
__device__ __forceinline__ void query_tile(const QueryMemory<T>& shared, uint4* tile_q, const uint4* tile_dout,
                                           int count, float scale, T* to, float (&dmeans)[Of::features / 2],
                                           float (&dy)[Of::features / 64][4], Sum& omega_sum, Next&& start_next) {
  constexpr bool is_half = std::is_same_v<T, Half>, late = Of::late, by_deltas = !sums_omega<Sum> || late;
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
  largest_of_four(top);
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
  const auto start_dmeans = [&] {
    const uint64_t of_dout = operand(tile_dout), of_weights = operand(shared.weights + base / 64 * slab, 16 * slab);
    products_begin();
#pragma unroll
    for (int s = 0; s < tile / 16; ++s) {
      multiply<T, Inner::both>(dmeans, further(of_dout, s * 2048), further(of_weights, s * 2048), !late || s > 0);
    }
    products_end();
  };
  if constexpr (!late) {
    copies_visible();
    __syncthreads();  // all weights are there
    start_dmeans();
  }
  products_wait<!late>(ds);

  float delta[2] = {}, size[2] = {1.0f, 1.0f};
#pragma unroll
  for (int i = 0; i < F / 2; ++i) {
    delta[i / 2 % 2] = fmaf(w[i], ds[i], delta[i / 2 % 2]);
  }
  sum_of_four(delta);
  if constexpr (is_half) {  // relative to the largest of a row, since float16 holds no small numbers
    size[0] = size[1] = 1e-30f;
#pragma unroll
    for (int i = 0; i < F / 2; ++i) {
      size[i / 2 % 2] = fmaxf(size[i / 2 % 2], fabsf(ds[i]));
    }
    largest_of_four(size);
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
  if (by_deltas && group == 0 && t == 0) {
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
      if constexpr (!late) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          omega_sum.of_rows[4 * s + i / 4 * 2 + i % 2] += w[8 * s + i] * (ds[8 * s + i] - delta[i / 2 % 2]);
        }
      }
      store_matrices(omega_sum.gradients + (base / 64 + s / 4) * slab + piece(named, s % 4 * 2 + half), shares);
    }
  }
  float dq[32];
  const uint64_t of_omega = operand(shared.omega + base * 8);
  products_begin();
#pragma unroll
  for (int s = 0; s < F / 16; ++s) {
    multiply<T, Inner::b>(dq, fragments[s], further(of_omega, s * 2048), s > 0);
  }
  products_end();
  if constexpr (sums_omega<Sum>) {
    copies_visible();
  }
  __syncthreads();  // all deltas are there, and gradients, and weights
  if constexpr (late) {
    start_dmeans();
  }
  if constexpr (sums_omega<Sum>) {
    const uint64_t of_q = operand(tile_q), of_gradients = operand(omega_sum.gradients + base / 64 * slab, 16 * slab);
    products_begin();
#pragma unroll
    for (int s = 0; s < tile / 16; ++s) {
      multiply<T, Inner::both>(omega_sum.sum, further(of_q, s * 2048), further(of_gradients, s * 2048), true);
    }
    products_end();
  }
  if constexpr (by_deltas) {
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
  products_wait<sums_omega<Sum> && !late>(dq);
  products_wait<sums_omega<Sum> && !late>(dmeans);
  if constexpr (late) {
    products_wait(omega_sum.sum);
    __syncthreads();  // everyone has left U, the tile and the weights
  }
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
  if constexpr (sums_omega<Sum> && !late) {
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
    exponents[threadIdx.x] = z > 0.0f ? (args.log_scale[state + threadIdx.x] + bias) * log2e + log2f(z) : masked;
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
      exponents[threadIdx.x] = z > 0.0f ? (next_scale[threadIdx.x] + bias) * log2e + log2f(z) : masked;
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
      largest_of_four(top);
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

}  // namespace bidirectional
}  // namespace linear
}  // namespace fastrpe
