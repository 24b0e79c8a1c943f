#include <cuda_runtime.h>

#include "linear_attention_sums.cuh"
#include "tensor_map.h"

// Attention of exponential features with a block for each key head, in one launch: a warpgroup for each 64 features
// sums over all keys, then makes rows of queries, 64 at a time. What a head needs is copied by the copy engine, started
// by one thread as soon as a place is free. Where heads leave places for blocks free, two blocks of a cluster share
// some heads, or all: each takes half of the keys, they tell one another what these add up to, and each takes half of
// the queries.
namespace fastrpe {
namespace linear {
namespace {

// Shared memory is in units of 16 bytes; rows of 128 bytes are swizzled.
template <int Features>
struct Plan {
  static constexpr int M = Features;
  static constexpr int threads = 2 * M;         // a warpgroup for each 64 features
  static constexpr int groups = threads / 128;  // warpgroups
  static constexpr int blocks = 4 / groups;     // of a multiprocessor
  static constexpr int features = M * pieces;   // of a matrix of M rows
  static constexpr int keys = M;                // of a tile
  static constexpr int matrix = keys * pieces;  // keys, or values
  static constexpr int stage = 2 * matrix;
  static constexpr int stages = 2;
  static constexpr int rows = 64;             // queries of a tile
  static constexpr int tile = rows * pieces;  // of queries
  static constexpr int ring = 2 * stages;     // tiles of a warpgroup, two in a stage
  static constexpr int barriers = stages + groups * ring;
  static constexpr int floats = M + 2 * keys + threads / 32;
  static constexpr size_t bytes =
      16 * (2 * features + stages * stage + slab_of_ones) + sizeof(float) * floats + sizeof(uint64_t) * barriers;
  static_assert(2 * groups * tile == stage && floats % 2 == 0 && blocks * (bytes + 1024) <= 228 * 1024);
};

template <typename Of>
struct Memory {
  uint4 *omega, *means, *stages, *ones;
  float *exponents, *key_bias;  // biases of two tiles
  uint32_t* norms;              // the bits of the projection's largest squared ones, of each warp
  uint64_t *keys_landed, *queries_landed;

  __device__ __forceinline__ explicit Memory(char* at)
      : omega(reinterpret_cast<uint4*>(at)),
        means(omega + Of::features),
        stages(means + Of::features),
        ones(stages + Of::stages * Of::stage),
        exponents(reinterpret_cast<float*>(ones + slab_of_ones)),
        key_bias(exponents + Of::M),
        norms(reinterpret_cast<uint32_t*>(key_bias + 2 * Of::keys)),
        keys_landed(reinterpret_cast<uint64_t*>(norms + Of::threads / 32)),
        queries_landed(keys_landed + Of::stages) {}
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A head, and the part of it that is this block's: all of it, or half. Blocks begin in their order, the two of a
// cluster on two multiprocessors, so that wholes spread before halves fill what is left.
struct Part {
  Place at;
  int number, count;     // of the parts
  int first, key_tiles;  // of keys

  template <typename T>
  __device__ __forceinline__ explicit Part(const Args<T>& args) : Part(args, this_block() - args.wholes) {}

  template <typename T>
  __device__ __forceinline__ Part(const Args<T>& args, int half)
      : at(args, args.wholes + (half < 0 ? half : half / 2)), number(half < 0 ? 0 : half % 2), count(half < 0 ? 1 : 2) {
    first = args.key_tiles * number / count;
    key_tiles = args.key_tiles * (number + 1) / count - first;
  }
};

// Half of what s becomes: weights 2^s, or 2^(s - top).
template <typename T, int Half, int R>
__device__ __forceinline__ void weigh_half(uint32_t (&weights)[R / 16][4], const float (&s)[R], const float (&top)[2],
                                           bool is_bounded) {
  const auto each = [&](auto&& exponent) {
#pragma unroll
    for (int n = 0; n < R / 4; ++n) {
      const int at = Half * (R / 2) + 2 * n;
      const float x = exp2_approximate(exponent(s[at], n % 2)), y = exp2_approximate(exponent(s[at + 1], n % 2));
      weights[n / 4][n % 4] = pack<T>(x, y);
    }
  };
  if (is_bounded) {
    each([&](float x, int) { return x; });
  } else {
    each([&](float x, int i) { return x - top[i]; });
  }
}

template <typename T, int N>
__device__ __forceinline__ void start_values(float (&sums)[32], float (&total)[4], const uint32_t (&weights)[N][4],
                                             uint64_t values, bool add) {
  products_begin();
#pragma unroll
  for (int n = 0; n < N; ++n) {
    multiply_and_sum<T>(sums, total, weights[n], further_to_slab(values, n * 16 * 16 * pieces), add || n > 0);
  }
  products_end();
}

// sums (= or +=) weights values, and total the weights, in the background, those of the first half while the second
// half's weights are made. `values` has a row for each column of s.
template <typename T, int R>
__device__ __forceinline__ void add_by_halves(float (&sums)[32], float (&total)[4], const float (&s)[R],
                                              const float (&top)[2], bool is_bounded, const uint4* values,
                                              const uint4* ones, bool add) {
  const uint64_t of_values = operand_with_ones(values, ones);
  uint32_t low[R / 16][4], high[R / 16][4];
  weigh_half<T, 0>(low, s, top, is_bounded);
  start_values<T>(sums, total, low, of_values, add);
  weigh_half<T, 1>(high, s, top, is_bounded);
  start_values<T>(sums, total, high, further_to_slab(of_values, R * 16 * pieces), true);
}

// A part's keys and values, tile by tile; the last lies in the first stage.
template <typename Of, typename T>
struct Keys {
  const Args<T>& args;
  const Memory<Of>& memory;
  const Part& part;

  __device__ __forceinline__ int stage(int i) const {
    return (part.key_tiles - 1 - i) % Of::stages;
  }

  __device__ __forceinline__ uint4* place(int i) const {
    return memory.stages + stage(i) * Of::stage;
  }

  __device__ __forceinline__ int key(int i) const {
    return (part.first + i) * Of::keys;
  }

  __device__ __forceinline__ void start_copy(const CUtensorMap& k, const CUtensorMap& v, int i) const {
    if (threadIdx.x == 0 && i < part.key_tiles) {
      uint64_t* landed = memory.keys_landed + stage(i);
      barrier_expect(landed, 16 * Of::stage);
      copy_tile(place(i), k, part.at.b, part.at.h, key(i), landed);
      copy_tile(place(i) + Of::matrix, v, part.at.b, part.at.h, key(i), landed);
    }
  }

  // Until tile i is there, keys that take no part as zeros, whatever they were.
  __device__ __forceinline__ void wait(int i) const {
    barrier_wait(memory.keys_landed + stage(i), i / Of::stages % 2);
    if (args.mask != nullptr) {
      for (int n = threadIdx.x; n < 2 * Of::keys; n += Of::threads) {
        if (!takes_part(args, part.at.b, key(i) + n % Of::keys)) {
#pragma unroll
          for (int u = 0; u < pieces; ++u) {
            place(i)[n * pieces + u] = {};
          }
        }
      }
      copies_visible();
      __syncthreads();
    }
  }
};

// The sums over a part's keys of a warpgroup's 64 features, relative to 2^c. `last` is called when all but the first
// stage is free.
template <typename Of, typename T, typename Last>
__device__ __forceinline__ void sum_keys(const Args<T>& args, const Memory<Of>& memory, const Part& part,
                                         const CUtensorMap& k, const CUtensorMap& v, float (&kv)[32], float (&z)[4],
                                         float (&c)[2], Last&& last) {
  const Keys<Of, T> tiles{args, memory, part};
#pragma unroll
  for (float& x : kv) {
    x = 0;
  }
  z[0] = z[1] = z[2] = z[3] = 0;
  c[0] = c[1] = empty;
  if (part.key_tiles == 0) {
    last();
  }
  bool is_bounded = false;  // whether the part's weights need no largest exponent
  for (int i = 0; i < part.key_tiles; ++i) {
    const uint4* place = tiles.place(i);
    float* key_bias = memory.key_bias + i % 2 * Of::keys;
    tiles.wait(i);
    float s[Of::keys / 2];
    project<T>(s, memory.omega + threadIdx.x / 128 * 64 * pieces, place);
    each_key_bias<Of::threads, Of::keys>(args, place, part.at.b, tiles.key(i), [&](int key, int part, float bias) {
      if (part == 0) {
        key_bias[key] = bias;
      }
    });
    __syncthreads();  // the biases are there, and everyone has left the tile before
    if (i > 0) {
      tiles.start_copy(k, v, i - 1 + Of::stages);
    }
    if (i == part.key_tiles - 1) {
      last();
    }
    products_wait(s);
    add_exponents(s, args.scale, key_bias);
    if (!is_bounded) {
      float top[2] = {masked, masked};
      find_largest(s, top);
      largest_of_four(top);
      if (std::is_same_v<T, BFloat16> && i == 0 && args.norm != 0) {
        is_bounded = !__any_sync(~0u, need_largest<T>(memory.omega, top));
      }
      if (is_bounded) {
        c[0] = c[1] = 0;
      } else if (__any_sync(~0u, top[0] > c[0] + Range<T>::limit || top[1] > c[1] + Range<T>::limit)) {
        float factor[2];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const float next = fmaxf(c[n], top[n] - Range<T>::shift);
          factor[n] = exp2_approximate(c[n] - next);
          c[n] = next;
        }
        rescale(kv, factor);
        rescale(z, factor);
      }
    }
    add_by_halves<T>(kv, z, s, c, is_bounded, place + Of::matrix, memory.ones, true);
    products_wait(kv, z);
  }
}

// The sums over a head's keys of those over its halves', which the two blocks of a cluster have; a thread's place in
// them is the same in both.
template <typename Of>
__device__ __forceinline__ void add_other_half(const Memory<Of>& memory, int other, float (&kv)[32], float (&z)[2],
                                               float (&c)[2]) {
  float4* sums = reinterpret_cast<float4*>(memory.stages) + threadIdx.x;
  float4* scales = reinterpret_cast<float4*>(memory.means) + threadIdx.x;
  cluster_sync();  // both have left their keys
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    store_to_block(other, sums + n * Of::threads, {kv[4 * n], kv[4 * n + 1], kv[4 * n + 2], kv[4 * n + 3]});
  }
  store_to_block(other, scales, {z[0], z[1], c[0], c[1]});
  cluster_sync();
  const float4 of = *scales;
  const float c_other[2] = {of.z, of.w}, z_other[2] = {of.x, of.y};
  float factor[2], factor_other[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float next = fmaxf(c[i], c_other[i]);
    factor[i] = exp2_approximate(c[i] - next);
    factor_other[i] = exp2_approximate(c_other[i] - next);
    c[i] = next;
    z[i] = fmaf(z[i], factor[i], z_other[i] * factor_other[i]);
  }
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const float4 x = sums[n * Of::threads];
    kv[4 * n] = fmaf(kv[4 * n], factor[0], x.x * factor_other[0]);
    kv[4 * n + 1] = fmaf(kv[4 * n + 1], factor[0], x.y * factor_other[0]);
    kv[4 * n + 2] = fmaf(kv[4 * n + 2], factor[1], x.z * factor_other[1]);
    kv[4 * n + 3] = fmaf(kv[4 * n + 3], factor[1], x.w * factor_other[1]);
  }
  __syncthreads();  // before others write there
}

// Exponents become relative to the largest, which is the reference for queries within the bound that is left with them.
template <typename Of, typename T>
__device__ __forceinline__ void make_relative(const Args<T>& args, const Memory<Of>& memory) {
  const int lane = threadIdx.x % 32;
  float top = masked;
#pragma unroll
  for (int n = 0; n < Of::M; n += 32) {
    top = fmaxf(top, memory.exponents[n + lane]);
  }
#pragma unroll
  for (int other = 1; other < 32; other *= 2) {
    top = fmaxf(top, __shfl_xor_sync(~0u, top, other));
  }
  const uint32_t norm = largest_norm<16>(memory.omega + threadIdx.x / 32 * 16 * pieces);
  if (lane == 0) {
    memory.norms[threadIdx.x / 32] = norm;
  }
  __syncthreads();  // everyone has read exponents
  if (threadIdx.x < Of::M) {
    memory.exponents[threadIdx.x] = memory.exponents[threadIdx.x] - top - reference_shift;
  }
  __syncthreads();
}

// The means and exponents of a head, to shared memory, and its state. A thread holds pieces t and 4 + t of two rows.
template <typename Of, typename T>
__device__ __forceinline__ void share_sums(const Args<T>& args, const Memory<Of>& memory, const Part& part,
                                           const float (&kv)[32], const float (&z)[2], const float (&c)[2]) {
  const int t = threadIdx.x % 4, feature = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  const auto each = [&](auto&& take) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int i = n / 2, half = n % 2;
      float2 sums[4];
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        const int from = 16 * half + 4 * p + 2 * i;
        sums[p] = {kv[from], kv[from + 1]};
      }
      take(feature + 8 * i, 4 * half + t, sums, z[i], c[i]);
    }
  };
  each([&](int row, int u, const float2(&sums)[4], float z, float c) {
    memory.means[piece(row, u)] = mean_value<T>(sums, z);
    if (u == 0) {
      memory.exponents[row] = query_exponent(args, part.at.h, row, z, c);
    }
  });
  copies_visible();
  __syncthreads();
  if constexpr (std::is_same_v<T, BFloat16>) {
    make_relative(args, memory);
  }
  if (args.kv == nullptr || part.number > 0) {
    return;
  }
  // Only now: the barrier would wait for the state's way to global memory.
  each([&](int row, int u, const float2(&sums)[4], float z, float c) {
    store_state<Of::M>(args, part.at, row, u, sums, z, c);
  });
}

// A part's tiles of queries, one for each warpgroup at a time.
template <typename Of, typename T>
struct Queries {
  const Args<T>& args;
  const Memory<Of>& memory;
  const Part& part;
  const int group;               // this thread's warpgroup
  const int first, step, tiles;  // its first tile, to the next one, and how many there are of all query heads
  uint64_t* const landed;

  __device__ __forceinline__ Queries(const Args<T>& args, const Memory<Of>& memory, const Part& part)
      : args(args),
        memory(memory),
        part(part),
        group(threadIdx.x / 128),
        first(part.number * Of::groups + group),
        step(part.count * Of::groups),
        tiles(args.queries * args.row_tiles),
        landed(memory.queries_landed + group * Of::ring) {}

  // Where tile n of this warpgroup lies: the first two in the stage that keys leave first.
  __device__ __forceinline__ uint4* place(int n) const {
    const int i = n % Of::ring;
    return memory.stages + (1 - i / 2) * Of::stage + (2 * group + i % 2) * Of::tile;
  }

  __device__ __forceinline__ void start_copy(const CUtensorMap& q, int n) const {
    const int number = first + n * step;
    if (threadIdx.x % 128 == 0 && number < tiles) {
      const int head = static_cast<uint32_t>(number) / static_cast<uint32_t>(args.row_tiles);
      barrier_expect(landed + n % Of::ring, 16 * Of::tile);
      copy_tile(place(n), q, part.at.b, part.at.h * args.queries + head, (number - head * args.row_tiles) * Of::rows,
                landed + n % Of::ring);
    }
  }

  __device__ __forceinline__ void run(const CUtensorMap& q) const {
    [[maybe_unused]] uint32_t bound = 0;  // of queries' squared norms
    if constexpr (std::is_same_v<T, BFloat16>) {
      const uint32_t norm = __reduce_max_sync(~0u, memory.norms[threadIdx.x % (Of::threads / 32)]);
      bound = __shfl_sync(~0u, query_bound(args.scale, __uint_as_float(norm)), 0);
    }
    // A key head's query heads are neighbours; rows are counted as if all tiles were full.
    const int all = args.row_tiles * Of::rows;
    int row = first * Of::rows + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    T* y = args.out + (static_cast<int64_t>(part.at.head) * args.queries * args.L + row) * width + threadIdx.x % 4 * 8;
    for (int n = 0; first + n * step < tiles; ++n) {
      while (row >= all) {
        row -= all;
        y -= (all - args.L) * width;
      }
      barrier_wait(landed + n % Of::ring, n / Of::ring % 2);
      if (n > 0) {
        warpgroup_sync(group);  // everyone has left the tile before
        start_copy(q, n - 1 + Of::ring);
      }
      float s[Of::M / 2], sums[32], total[4];
      project<T>(s, place(n), memory.omega);
      bool is_bounded = false;
      if constexpr (std::is_same_v<T, BFloat16>) {
        is_bounded = largest_norm<16>(place(n) + threadIdx.x % 128 / 32 * 16 * pieces) <= bound;
      }
      products_wait(s);
      float top[2] = {masked, masked};
      add_exponents(s, args.scale, memory.exponents);
      if (!is_bounded) {
        find_largest(s, top);
        largest_of_four(top);
      }
      add_by_halves<T>(sums, total, s, top, is_bounded, memory.means, memory.ones, false);
      products_wait(sums, total);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        store_row(y + 8 * i * width, sums, i, reciprocal_approximate(total[2 * i]), row + 8 * i < args.L);
      }
      row += step * Of::rows;
      y += step * Of::rows * width;
    }
  }
};

#endif

template <typename T, typename Of>
__global__ void __launch_bounds__(Of::threads, Of::blocks)
    whole_head_kernel(const Args<T> args, const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
                      const __grid_constant__ CUtensorMap v) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char bytes[];
  const Memory<Of> memory(bytes);
  const Part part(args);
  const Keys<Of, T> keys{args, memory, part};
  if (threadIdx.x == 0) {
    for (int i = 0; i < Of::barriers; ++i) {
      barrier_prepare(memory.keys_landed + i, 1);
    }
    barriers_visible();
  }
  fill_ones<T>(memory.ones);
  wait_for_previous();
  // The next kernel's blocks would take the first places that are free, not those that wholes are to have.
  const bool is_mixed = args.wholes > 0 && args.wholes < args.heads;
  if (!is_mixed) {
    let_next_begin();
  }
  // What is needed first comes first.
  keys.start_copy(k, v, 0);
  fill_projection<T, Of::M, Of::threads>(args.projection, part.at.h, memory.omega);
  copies_end();
  static_assert(Of::stages == 2);
  keys.start_copy(k, v, 1);
  copies_wait<0>();
  copies_visible();
  __syncthreads();
  const Queries<Of, T> queries(args, memory, part);
  const auto start_queries = [&](int from) {
    queries.start_copy(q, from);
    queries.start_copy(q, from + 1);
  };
  float kv[32], sums[4], c[2];
  sum_keys(args, memory, part, k, v, kv, sums, c, [&] { start_queries(0); });
  float z[2] = {sums[0], sums[2]};
  if (part.count > 1) {
    add_other_half(memory, 1 - part.number, kv, z, c);
  }
  share_sums(args, memory, part, kv, z, c);
  start_queries(2);  // everyone has left the first stage
  queries.run(q);
#endif
}

}  // namespace

template <typename T, int M>
bool whole_attention(Args<T> args, int device, cudaStream_t stream) {
  using Of = Plan<M>;
  const int64_t B = args.heads / args.Hk;
  CUtensorMap q, k, v;
  if (!map_tiles(q, args.q, B, args.Hk * args.queries, args.L, Of::rows) ||
      !map_tiles(k, args.k, B, args.Hk, args.S, Of::keys) || !map_tiles(v, args.v, B, args.Hk, args.S, Of::keys)) {
    return false;
  }
  args.key_tiles = ceil_div(args.S, Of::keys);
  const int cluster = args.wholes < args.heads ? 2 : 1;
  const auto kernel = whole_head_kernel<T, Of>;
  allow_memory<Of>(kernel, device);
  launch_clusters(kernel, cluster, 2 * args.heads - args.wholes, Of::threads, Of::bytes, stream, true, args, q, k, v);
  return true;
}

template bool whole_attention<BFloat16, 64>(Args<BFloat16>, int, cudaStream_t);
template bool whole_attention<BFloat16, 128>(Args<BFloat16>, int, cudaStream_t);
template bool whole_attention<Half, 64>(Args<Half>, int, cudaStream_t);
template bool whole_attention<Half, 128>(Args<Half>, int, cudaStream_t);

}  // namespace linear
}  // namespace fastrpe
