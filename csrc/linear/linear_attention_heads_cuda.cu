#include <cuda_runtime.h>

#include <algorithm>

#include "linear_attention.cuh"

// Attention of heads of at most 64 queries and 64 keys, without a state. A warpgroup takes several key heads, one after
// another, each with its query heads; all of a head is in registers and shared memory, so that no maximum is a running
// one. What the next head needs is copied while this one is computed, as soon as its place is free: values when the
// means have been made, keys and queries when the last queries' exponents have.
namespace fastrpe {
namespace linear {
namespace {

// Shared memory is in units of 16 bytes; with 128 features the blocks leave none of it, and no registers.
template <int M>
struct Plan {
  static constexpr int threads = 128;
  static constexpr int blocks = M == 64 ? 5 : 4;                 // of a multiprocessor
  static constexpr int matrix = M * pieces, tile = 64 * pieces;  // of features; of tokens
  static constexpr size_t bytes = 16 * (2 * matrix + 3 * tile);
  static_assert(blocks * (bytes + 1024) <= 228 * 1024);
};

// Key heads in the order that blocks take them in: those with the same projection side by side.
struct Head {
  int b, h;

  template <typename T>
  __device__ __forceinline__ Head(const Args<T>& args, int n) {
    const uint32_t number = n, inner = args.projection.head != 0 ? args.heads / args.Hk : args.Hk;
    const int outer = static_cast<int>(number / inner), rest = static_cast<int>(number - outer * inner);
    b = args.projection.head != 0 ? rest : outer;
    h = args.projection.head != 0 ? outer : rest;
  }

  template <typename T>
  __device__ __forceinline__ void next(const Args<T>& args) {
    if (args.projection.head != 0) {
      if (++b * args.Hk == args.heads) {
        b = 0;
        ++h;
      }
    } else if (++h == args.Hk) {
      h = 0;
      ++b;
    }
  }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// sums (= or +=) weights values, in the background, and the sums of the weights as they are rounded.
template <typename T>
__device__ __forceinline__ void add_values(float (&sums)[32], float (&total)[4], const uint32_t (&weights)[4][4],
                                           uint64_t values, bool add) {
  products_begin();
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    multiply<T, Inner::b>(sums, weights[n], further(values, n * 16 * 128), add || n > 0);
  }
  products_end();
  const uint32_t ones = pack<T>(1, 1);
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    multiply_warp<T>(total, weights[n], ones, ones);
  }
}

#endif

template <typename T, int M>
__global__ void __launch_bounds__(Plan<M>::threads, Plan<M>::blocks) head_attention_kernel(const Args<T> args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Of = Plan<M>;
  constexpr int parts = M / 64;  // in which features are taken
  extern __shared__ __align__(1024) uint4 memory[];
  uint4 *omega = memory, *means = omega + Of::matrix;  // rows of features
  uint4 *keys = means + Of::matrix, *values = keys + Of::tile, *queries = values + Of::tile;
  float* exponents = reinterpret_cast<float*>(keys);  // of features, when the keys have been read
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = warp * 16 + lane / 4, t = lane % 4;
  // A warp's copy of what keys add to exponents, where it will have its last means.
  const auto biases_of = [&](int warp) { return reinterpret_cast<float*>(means + (M - 64 + warp * 16) * pieces); };
  const uint64_t of_omega = operand(omega), of_means = operand(means), of_keys = operand(keys),
                 of_values = operand(values), of_queries = operand(queries);
  const auto start = [&](const Rows<T>& from, const Head& of, uint4* to) {  // keys or values
    fetch<Of::threads, 64>(from.at(of.b, of.h), from.l, 0, to, [&](int key) { return takes_part(args, of.b, key); });
  };
  const auto start_queries = [&](const Head& of, int i) {
    fetch<Of::threads, 64>(args.q.at(of.b, of.h * args.queries + i), args.q.l, 0, queries,
                           [&](int row) { return row < args.L; });
  };
  const auto await = [](auto under_way) {  // until at most so many groups of copies are under way
    copies_wait<under_way>();
    copies_visible();
    __syncthreads();
  };
  constexpr std::integral_constant<int, 0> none{};
  constexpr float tiny = 1e-30f;  // a sum of weights that are all 0, of exponents far below `masked`

  // The first blocks, which are on different multiprocessors, have one head more than the others.
  const int share = static_cast<uint32_t>(args.heads) / gridDim.x, more = args.heads - share * gridDim.x;
  Head at(args, this_block() * share + min(this_block(), more));
  wait_for_previous();
  let_next_begin();
  const bool is_copied = args.projection.omega != nullptr && !args.projection.wide;
  start(args.k, at, keys);
  if (is_copied) {
    fill_projection<T, M, Of::threads>(args.projection, at.h, omega);
  }
  copies_end();
  start(args.v, at, values);
  start_queries(at, 0);
  copies_end();
  if (!is_copied) {
    fill_projection<T, M, Of::threads>(args.projection, at.h, omega);
  }
  await(std::integral_constant<int, 1>{});
  constexpr int first = 1 << 30;  // added to the number of heads left until the first one's values have come
  int left = first + share + (this_block() < more ? 1 : 0);
  for (; left > 0; --left) {
    float s[parts][32], mean[parts][32], top[parts][2], total[parts][4] = {};
    products_begin();
#pragma unroll
    for (int part = 0; part < parts; ++part) {
#pragma unroll
      for (int step = 0; step < width / 16; ++step) {
        multiply<T>(s[part], further(of_omega, part * 64 * 128 + step * 32), further(of_keys, step * 32), step > 0);
      }
      products_end();
    }
    each_key_bias<Of::threads, 64>(args, keys, at.b, 0, [&](int key, int i, float bias) {
      biases_of(2 * i)[key] = bias;
      biases_of(2 * i + 1)[key] = bias;
    });
    __syncthreads();
#pragma unroll
    for (int part = 0; part < parts; ++part) {
      products_wait<(parts > 1)>(s[part]);  // the other part's may be under way, or the means' of the first
      top[part][0] = top[part][1] = masked;
      add_exponents(s[part], args.scale, biases_of(warp), top[part]);
      largest_of_four(top[part]);
      uint32_t weights[4][4];
      make_weights<T>(weights, s[part], top[part]);
      if (part == 0 && left >= first) {
        await(none);
        left -= first;
      }
      add_values<T>(mean[part], total[part], weights, of_values, false);
    }
    // Four threads share 2 parts features: this one has the sums, and makes what queries add, of number t of them.
    const int feature = row + t / 2 * 64 + t % 2 * 8;
    float exponent = t < 2 * parts ? 2 * feature_bias(args, at.h, feature) : 0;
    float own_top = top[0][0], own_total = total[0][0];
#pragma unroll
    for (int i = 1; i < 2 * parts; ++i) {
      own_top = t == i ? top[i / 2][i % 2] : own_top;
      own_total = t == i ? total[i / 2][i % 2 * 2] : own_total;
    }
    exponent += own_top + __log2f(fmaxf(own_total, tiny));
    uint4* const own[2] = {means + piece(row, 2 * t), means + piece(row, 2 * t + 1)};
    __syncwarp();  // the biases have been read
#pragma unroll
    for (int part = 0; part < parts; ++part) {
      if (part + 1 < parts) {
        products_wait<1>(mean[part]);
      } else {
        products_wait(mean[part]);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float inverse = __fdividef(1.0f, fmaxf(total[part][2 * i], tiny));
        // Values are in such an order that a thread comes to have 8 neighbours of a query's row: piece 2 t + half has
        // columns 32 half + 2 t + 8 p and the next, for p < 4.
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t pairs[4];
#pragma unroll
          for (int p = 0; p < 4; ++p) {
            const float* pair = mean[part] + 16 * half + 4 * p + 2 * i;
            pairs[p] = pack<T>(pair[0] * inverse, pair[1] * inverse);
          }
          // A step of 8 rows keeps the swizzle.
          own[half][(part * 64 + 8 * i) * pieces] = {pairs[0], pairs[1], pairs[2], pairs[3]};
        }
      }
    }
    copies_visible();
    __syncthreads();  // the means are there, and everyone has left keys and values
    Head next = at;
    next.next(args);
    if (left > 1) {
      start(args.v, next, values);
    }
    for (int n = 0; n < args.queries; ++n) {
      float s[M / 2], top[2] = {masked, masked}, sums[32], total[4] = {};
      products_begin();
#pragma unroll
      for (int step = 0; step < width / 16; ++step) {
        multiply<T>(s, further(of_queries, step * 32), further(of_omega, step * 32), step > 0);
      }
      products_end();
      if (n == 0) {
        if (t < 2 * parts) {
          exponents[feature] = exponent;
        }
        __syncthreads();
      }
      products_wait(s);
      add_exponents(s, args.scale, exponents, top);
      __syncthreads();  // everyone has left the queries, and at last omega and the exponents
      if (n + 1 < args.queries) {
        start_queries(at, n + 1);
      } else if (left > 1) {
        start(args.k, next, keys);
        start_queries(next, 0);
      }
      copies_end();
      largest_of_four(top);
#pragma unroll
      for (int part = 0; part < parts; ++part) {
        uint32_t weights[4][4];
        make_weights<T>(weights, s + part * 32, top);
        add_values<T>(sums, total, weights, further(of_means, part * 64 * 128), part > 0);
      }
      products_wait(sums);
      Vec<T, 8> y[2][2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float inverse = __fdividef(1.0f, total[2 * i]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float x[8];
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            x[j] = sums[8 * (j / 2) + 4 * half + 2 * i + j % 2] * inverse;
          }
          y[i][half] = narrow<T, 8>(x);
        }
      }
      if (args.projection.head != 0 && n + 1 == args.queries && next.b == 0 && left > 1) {
        fill_projection<T, M, Of::threads>(args.projection, next.h, omega);
        copies_end();
      }
      await(none);  // and everyone has left the means
      // Only now: the barrier would wait for the rows' way to global memory.
      const int64_t head = (static_cast<int64_t>(at.b) * args.Hk + at.h) * args.queries + n;
      T* to = args.out + (head * args.L + row) * width + 8 * t;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (row + 8 * i < args.L) {
          store<T, 8>(to + 8 * i * width, y[i][0]);
          store<T, 8>(to + 8 * i * width + 32, y[i][1]);
        }
      }
    }
    at = next;
  }
#endif
}

}  // namespace

template <typename T, int M>
void head_attention(const Args<T>& args, int multiprocessors, int device, cudaStream_t stream) {
  using Of = Plan<M>;
  const auto kernel = head_attention_kernel<T, M>;
  allow_memory<Of>(kernel, device);
  launch(kernel, std::min(args.heads, multiprocessors * Of::blocks), Of::threads, Of::bytes, stream, true, args);
}

#define FASTRPE_HEADS(T)                                                       \
  template void head_attention<T, 64>(const Args<T>&, int, int, cudaStream_t); \
  template void head_attention<T, 128>(const Args<T>&, int, int, cudaStream_t);
FASTRPE_HEADS(BFloat16)
FASTRPE_HEADS(Half)
#undef FASTRPE_HEADS

}  // namespace linear
}  // namespace fastrpe
