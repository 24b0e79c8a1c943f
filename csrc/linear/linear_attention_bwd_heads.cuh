// All gradients of heads of few tokens.
#pragma once

#include "linear_attention_bwd_keys.cuh"

namespace fastrpe {
namespace linear {
namespace bidirectional {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ void prefetch(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// Makes U of one tile of keys as the sum of two matrices, what features add to queries' exponents, and own_norms for
// key_tile. `norms` are 64 numbers of shared memory.
template <typename T, typename Of>
__device__ __forceinline__ void sum_values(const uint4* omega, const uint4* tile_k, const uint4* tile_v, int count,
                                           const bool* mask, float scale, float square, const float* bias, uint4* means,
                                           float* exponents, float* norms, float (&own_norms)[2]) {
  constexpr int parts = Of::features / 64;
  const int base = Of::groups > 1 ? threadIdx.x / 128 * Of::features : 0;
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32, g = lane / 4, t = lane % 4;
  float p[parts][32], u[parts][32];  // a warp has 16 features of each part
  const uint64_t of_omega = operand(omega + base * 8), of_k = operand(tile_k), of_v = operand(tile_v);
  products_begin();
#pragma unroll
  for (int n = 0; n < parts; ++n) {
#pragma unroll
    for (int s = 0; s < width / 16; ++s) {
      multiply<T>(p[n], further(of_omega, n * 64 * 128 + s * 32), further(of_k, s * 32), s > 0);
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
      norms[key] = key < count && (mask == nullptr || mask[key]) ? sum * (-0.5f * log2e * square) : masked;
    }
  }
  __syncthreads();  // all norms are there
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    own_norms[r] = -norms[warp * 16 + g + 8 * r];
  }
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
      multiply<T, Inner::b>(u[n], a[s], further(of_v, s * 2048), s > 0);
    }
    products_end();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      z[r] = sum_of_four(z[r]);
      inverse[n][r] = __fdividef(1.0f, z[r]);
      const int f = base + n * 64 + warp * 16 + g + 8 * r;
      if (t == 0) {
        const float b = bias == nullptr ? 0.0f : bias[f];
        exponents[f] = top[r] > 0.5f * masked ? top[r] + __log2f(z[r]) + 2.0f * log2e * b : masked;
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
// delta, and the sum is what query_tile leaves in dy; with dW, r is there unless Of::late. `sums` are 8 M + 8 numbers
// of shared memory. Stores r where that is not null. Returns what undoes the scaling of float16.
template <typename T, int M, typename Of, typename Sum>
__device__ __forceinline__ float take_dmeans(uint4* means, const float (&dmeans)[Of::features / 2],
                                             const float (&dy)[Of::features / 64][4], Sum& omega_sum, float* sums,
                                             float* y, float* r) {
  constexpr bool is_half = std::is_same_v<T, Half>, omega = sums_omega<Sum> && !Of::late;
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
  // Calls f for an element of dU that this thread holds and of U, the sum of so many parts, and for the number of its
  // column of the thread's.
  const auto each_pair = [&](int s, auto parts, auto&& f) {
    uint32_t a[4], b[4] = {};
    load_matrices<true>(a, own + s * 128);
    if constexpr (parts > 1) {
      load_matrices<true>(b, own + s * 128 + Of::matrix);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 high = unpack<T>(a[i]), low = parts > 1 ? unpack<T>(b[i]) : float2{0.0f, 0.0f};
      f(i, 4 * s + i / 2 * 2, dmeans[8 * s + 2 * i], dmeans[8 * s + 2 * i + 1], high.x + low.x, high.y + low.y);
    }
  };
  float factor = 1.0f, back = 1.0f;
  const bool finds_r = Of::late && r != nullptr;
  if (is_half || finds_r) {
    float products[F / 4] = {}, top = 1e-30f;
#pragma unroll
    for (int s = 0; s < F / 16; ++s) {
      each_pair(s, std::integral_constant<int, 2>{}, [&](int, int column, float x0, float x1, float u0, float u1) {
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
      const float x = r_of_queries() + (omega ? 0.0f : sum_of(sums));
      top = fmaxf(top, fabsf(x) / 16);
      if (finds_r) {
        r[threadIdx.x] = x;
      }
    }
    if constexpr (is_half) {
      top = largest_of_block<Of::threads>(top, largest);
      factor = 1.0f / top;
      back = top * exp2f(-key_shift<T>);
    } else {
      __syncthreads();
    }
  }
  float products[F / 4] = {};
#pragma unroll
  for (int s = 0; s < F / 16; ++s) {
    uint32_t x[4];
    // Where U is for what dU loses alone, its first part is enough.
    each_pair(s, std::integral_constant<int, omega ? 2 : 1>{},
              [&](int i, int column, float x0, float x1, float u0, float u1) {
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
template <typename T, int M, bool Omega, bool Fresh, bool Single>
__global__ void __launch_bounds__(HeadLayout<M, Omega, Fresh, Single>::threads,
                                  HeadLayout<M, Omega, Fresh, Single>::blocks)
    head_gradient_kernel(const Args<T> queries, const Args<T> keys) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Of = HeadLayout<M, Omega, Fresh, Single>;
  constexpr bool late = Of::late, apart = Omega && !late;
  constexpr int F = Of::features, threads = Of::threads;
  const int base = Of::groups > 1 ? threadIdx.x / 128 * F : 0;
  extern __shared__ __align__(1024) uint4 memory[];
  uint4* omega = memory;                                 // rows of features
  uint4* means = omega + Of::matrix;                     // U and then dU, rows of features
  uint4* weights = means + Of::mean_parts * Of::matrix;  // w, rows of queries, a slab for 64 features
  uint4* stages = weights + Of::matrix;
  // With dW, ds, as weights, and dq. Where late, ds has the stage of the next keys, which come when it is done with, or
  // U's second part, and dq the weights' second slab.
  uint4* gradients = stages + Of::stages * 2 * slab;
  uint4* results = late ? weights + slab : gradients + (apart ? Of::matrix : 0);
  float* exponents = reinterpret_cast<float*>(late ? gradients : results + (apart ? slab : 0));
  T* deltas = reinterpret_cast<T*>(exponents + M);                           // (2, tile)
  float* half_products = reinterpret_cast<float*>(deltas + 2 * tile);        // (2, groups, 16, 128)
  float2* row_sums = reinterpret_cast<float2*>(half_products + Of::halves);  // (groups, tile)
  float* sizes = reinterpret_cast<float*>(row_sums + Of::rows);              // of each warp
  float *dy = reinterpret_cast<float*>(weights), *sums = dy + M;             // while there are no weights

  const Units units(keys);
  // The head that is taken next: sets are heads, of which a sequence has one each, or there is one set.
  const auto after = [&](const Place& of) {
    const bool turns = keys.sets > 1 || of.i_h + 1 == keys.heads;
    const int i_b = static_cast<int>(of.i_b) + turns, i_h = keys.sets > 1 ? of.i_h : turns ? 0 : of.i_h + 1;
    return Place(static_cast<int64_t>(i_b) * keys.heads + i_h, i_b, i_h, 0, 0);
  };
  const int groups = Single ? 1 : keys.groups;
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
              ahead = after(ahead);
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
  Place next = units.place(keys, units.begin);
  for (uint32_t n_unit = units.begin; n_unit < units.end; ++n_unit) {
    const Place at = next;
    next = after(at);
    const auto start_next_keys = [&] {
      if (n_unit + 1 < units.end) {
        start_keys(next, 0, key_stage(n_unit + 1));
      }
      copies_end();
    };
    const float* bias = keys.bias == nullptr ? nullptr : keys.bias + at.i_h * keys.bias_h;
    float key_exponent = masked;  // of this thread's feature
    float norms[2];
    if constexpr (Fresh) {
      copies_wait<1>();
      copies_visible();
      __syncthreads();  // keys are there, and everyone has left those before, dU and y
      if constexpr (!late) {
        start_next_keys();
      }
      sum_values<T, Of>(omega, key_stage(n_unit), key_stage(n_unit) + slab, count_of(keys, 0), mask_of(at, 0),
                        keys.scale, square, bias, means, exponents, reinterpret_cast<float*>(weights), norms);
    } else {
      fill_means<T, M, threads, Of::mean_parts, false>(keys.kv + at.head * (M * width), keys.z + at.head * M, means);
      if (threadIdx.x < M) {
        const float z = keys.z[at.head * M + threadIdx.x], c = keys.log_scale[at.head * M + threadIdx.x];
        const float b = bias == nullptr ? 0.0f : bias[threadIdx.x];
        exponents[threadIdx.x] = z > 0.0f ? (c + b) * log2e + log2f(z) : masked;
        key_exponent = z > 0.0f ? (b - c) * log2e - log2f(z) + key_shift<T> : masked;
      }
      if (n_unit + 1 < units.end) {
        const int64_t state = next.head * M;
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

    float dmeans[F / 2], of_deltas[F / 64][4] = {};
    if constexpr (late) {
      omega_sum.gradients = key_stage(n_unit + 1);
    } else {
#pragma unroll
      for (float& x : dmeans) {
        x = 0.0f;
      }
    }
    for (int i_h = at.i_h * groups; i_h < (at.i_h + 1) * groups; ++i_h) {
      T* to = queries.dx + (at.i_b * queries.heads + i_h) * queries.length * width;
      for (int i_tile = 0; i_tile < query_tiles; ++i_tile, to += tile * width) {
        uint4* rows = query_stage;
        if constexpr (!Fresh) {
          rows = next_tile();
        } else if (i_h == at.i_h * groups) {
          copies_wait<!late>();
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
    if constexpr (late) {
      start_next_keys();
      omega_sum.gradients = means + Of::matrix;
    } else {
      __syncthreads();  // everyone has left U, the weights and the last queries
    }
    if constexpr (Fresh) {
      if (n_unit + 1 < units.end) {
        start_queries(next, 0, 0, query_stage);
      }
      copies_end();
    }
    if (threadIdx.x < M) {
      if (Fresh && exponents[threadIdx.x] > masked) {
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
                                          keys.scale, square, back, keys.dx + to, keys.dy + to, omega_sum, start_next,
                                          Fresh ? norms : nullptr);
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

}  // namespace bidirectional
}  // namespace linear
}  // namespace fastrpe
