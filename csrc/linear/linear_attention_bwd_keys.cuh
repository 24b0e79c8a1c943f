// dk, dv, and the keys' part of dW.
#pragma once

#include "linear_attention_bwd_queries.cuh"

namespace fastrpe {
namespace linear {
namespace bidirectional {

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
// undoes the scaling of float16. `norms` are half_norms' where known. Without Inputs, dW alone.
template <typename T, int F, int Count, int Groups, bool Inputs, typename Sum, typename Next>
__device__ __forceinline__ void key_tile(const KeyMemory& shared, int start, uint4* tile_k, uint4* tile_v, int count,
                                         const bool* mask, float scale, float square, float back, T* to_k, T* to_v,
                                         Sum& omega_sum, Next&& start_next, const float* norms = nullptr) {
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
  if (norms != nullptr) {
    norm[0] = norms[0];
    norm[1] = norms[1];
  } else {
    half_norms<T>(norm, tile_k, warp, g, t, square, count, mask);
  }
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
      const uint64_t of_dmeans = operand(shared.dmeans + base * 8);
      products_begin();
#pragma unroll
      for (int s = 0; s < F / 16; ++s) {
        multiply<T, Inner::b>(dv, a[s], further(of_dmeans, s * 2048), n > 0 || s > 0);
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
      const uint64_t of_omega = operand(shared.omega + base * 8);
      products_begin();
#pragma unroll
      for (int s = 0; s < F / 16; ++s) {
        multiply<T, Inner::b>(dk, fragments[s], further(of_omega, s * 2048), n > 0 || s > 0);
      }
      products_end();
    }
  }
  sum_of_four(sums);
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
    const uint64_t of_k = operand(tile_k),
                   of_gradients = operand(omega_sum.gradients + group * (F / 64) * slab, 16 * slab);
    products_begin();
#pragma unroll
    for (int s = 0; s < tile / 16; ++s) {
      multiply<T, Inner::both>(omega_sum.sum, further(of_k, s * 2048), further(of_gradients, s * 2048), true);
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
    load_matrices(x, tile_k + piece(named, group * 4 + s * 2 + half));
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
        exponents[f] = z > 0.0f ? (bias - c) * log2e - log2f(z) + key_shift<T> : masked;
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
      top = largest_of_block<threads>(top, largest);
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
          c[i] = z > 0.0f ? (bias - log_scale) * log2e - log2f(z) + key_shift<T> : masked;
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
        top = largest_of_block<threads>(top, largest);
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

}  // namespace bidirectional
}  // namespace linear
}  // namespace fastrpe
