#include <algorithm>

#include "linear_attention.cuh"

// Causal attention of exponential features on Hopper's tensor cores. A block walks along tokens in tiles of 64, with a
// warpgroup for each 64 features: it keeps their sums over the keys so far in registers, and makes rows as if there
// were no other features; what the warpgroups have of a row, each relative to its own largest exponent, is then added.
//
// Features of a tile are relative to the maximum c of a feature's exponents over all keys up to the tile's last. Where
// that is far above what an early row of the tile sees, the row's own weights would vanish: such a tile is walked in
// parts, of which one row is always right.
//
// With few heads, their tokens are divided among blocks: a kernel sums the keys of each share, a second one the shares
// before each. Exponents are in base 2.
namespace fastrpe {
namespace linear {
namespace {

template <int Features>
struct Plan {
  static constexpr int M = Features;
  static constexpr int threads = 2 * M;
  static constexpr int groups = M / 64;                          // warpgroups
  static constexpr int blocks = M == 64 ? 3 : M == 128 ? 2 : 1;  // of a multiprocessor
  static constexpr int rows = 64;                                // tokens of a tile
  static constexpr int matrix = rows * pieces;                   // in units of 16 bytes, as all of these
  static constexpr int features = M * pieces;                    // omega
  static constexpr int stage = 3 * matrix;                       // q, k and v
  static constexpr int stages = 2;
  static constexpr int work = 2 * matrix;  // of a warpgroup: keys' features and their sums, then 64 x 64 in float32
  static constexpr int floats = rows + 2 * M + 2 * groups * rows;
  static constexpr size_t bytes = 16 * (features + stages * stage + groups * work) + sizeof(float) * floats;
  static_assert(blocks * (bytes + 1024) <= 228 * 1024);
};

template <typename Of>
struct Memory {
  uint4 *omega, *stages, *work;
  float *key_bias, *exponents, *z;
  float2* rows;  // of each warpgroup: a row's largest exponent, and the sum of its weights

  __device__ __forceinline__ explicit Memory(char* at)
      : omega(reinterpret_cast<uint4*>(at)),
        stages(omega + Of::features),
        work(stages + Of::stages * Of::stage),
        key_bias(reinterpret_cast<float*>(work + Of::groups * Of::work)),
        exponents(key_bias + Of::rows),
        z(exponents + Of::M),
        rows(reinterpret_cast<float2*>(z + Of::M)) {}
};

// A tile, which begins with token `first` of a key head.
struct Tile {
  int head, first;

  template <typename T>
  __device__ __forceinline__ bool is_last(const Args<T>& args) const {
    return first + 64 >= args.L;
  }

  template <typename T>
  __device__ __forceinline__ int key_head(const Args<T>& args) const {
    return static_cast<uint32_t>(head) % static_cast<uint32_t>(args.Hk);
  }
};

// Where share n of the tiles of all heads begins.
template <typename T>
__device__ __forceinline__ Tile begin_of(const Args<T>& args, int n) {
  const int at = static_cast<int>(static_cast<int64_t>(args.heads) * args.key_tiles * n / args.key_blocks);
  const int head = static_cast<uint32_t>(at) / static_cast<uint32_t>(args.key_tiles);
  return {head, (at - head * args.key_tiles) * args.key_tile};
}

// Copies of a share's tiles, in order; a thread has piece u of every step-th row from row i on.
template <typename Of, typename T>
struct Copies {
  static constexpr int step = Of::threads / pieces, count = Of::rows / step;

  Tile tile;
  const T *q, *k, *v;

  __device__ __forceinline__ Copies(const Args<T>& args, const Tile& tile, int query) : tile(tile) {
    find(args, query);
  }

  __device__ __forceinline__ void find(const Args<T>& args, int query) {
    const int h = tile.key_head(args), b = static_cast<uint32_t>(tile.head) / static_cast<uint32_t>(args.Hk);
    const int row = tile.first + threadIdx.x / pieces, u = threadIdx.x % pieces;
    q = args.q.at(b, static_cast<int64_t>(h) * args.queries + query) + row * args.q.l + u * 8;
    k = args.k.at(b, h) + row * args.k.l + u * 8;
    v = args.v.at(b, h) + row * args.v.l + u * 8;
  }

  __device__ __forceinline__ void next(const Args<T>& args, int query) {
    if (tile.is_last(args)) {
      tile = {tile.head + 1, 0};
      find(args, query);
    } else {
      tile.first += Of::rows;
      q += Of::rows * args.q.l;
      k += Of::rows * args.k.l;
      v += Of::rows * args.v.l;
    }
  }

  // Which of this thread's rows have a key that takes part: bit n for that of row i + n step.
  __device__ __forceinline__ uint32_t start(const Args<T>& args, uint4* to) const {
    const int i = threadIdx.x / pieces;
    uint32_t rows = ~0u, keys = ~0u;
    if (tile.first + Of::rows > args.L || args.mask != nullptr) {
      const int b = static_cast<uint32_t>(tile.head) / static_cast<uint32_t>(args.Hk);
      rows = keys = 0;
#pragma unroll
      for (int n = 0; n < count; ++n) {
        const int token = tile.first + i + n * step;
        rows |= token < args.L ? 1u << n : 0u;
        keys |= takes_part(args, b, token) ? 1u << n : 0u;
      }
    }
    to += piece(i, threadIdx.x % pieces);  // a step of 8 rows keeps the swizzle
    copy(k, args.k.l, to + Of::matrix, keys);
    copy(q, args.q.l, to, rows);
    copy(v, args.v.l, to + 2 * Of::matrix, keys);
    return keys;
  }

  static __device__ __forceinline__ void copy(const T* from, int64_t stride, uint4* to, uint32_t inside) {
#pragma unroll
    for (int n = 0; n < count; ++n) {
      copy_async<16>(to + n * step * pieces, from + n * step * stride, inside >> n & 1);
    }
  }
};

// The exponents that keys add to their projections; a thread looks at what it has copied itself.
template <typename Of, typename T>
__device__ __forceinline__ void fill_key_bias(const Args<T>& args, const uint4* k, uint32_t inside, float* to) {
  using Copy = Copies<Of, T>;
  const int i = threadIdx.x / pieces, u = threadIdx.x % pieces;
#pragma unroll
  for (int n = 0; n < Copy::count; ++n) {
    float sum = 0;
    if (args.norm != 0) {
      float x[8];
      widen<T, 8>(x, *reinterpret_cast<const Vec<T, 8>*>(k + n * Copy::step * pieces + piece(i, u)));
#pragma unroll
      for (float value : x) {
        sum = fmaf(value, value, sum);
      }
#pragma unroll
      for (int other = 1; other < pieces; other *= 2) {
        sum += __shfl_xor_sync(~0u, sum, other);
      }
    }
    if (u == 0) {
      to[i + n * Copy::step] = inside >> n & 1 ? sum * args.norm : masked;
    }
  }
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Rows 8 i + g of a warp's 16, of a matrix of 64 rows a warpgroup, with i = 0 and 1.
__device__ __forceinline__ int first_row() {
  return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
}

// 64 x 64 values, as registers of a product hold them, to rows of shared memory.
__device__ __forceinline__ void store_matrix(uint4* to, const uint32_t (&values)[4][4]) {
  const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    store_matrices(shared_address(to + piece(row, 2 * n + lane / 16)), values[n]);
  }
}

// The sums over the keys before a tile, of a thread's two features.
template <int M, typename T>
__device__ __forceinline__ void load_state(const Args<T>& args, const Tile& tile, int share, int feature,
                                           const float (&bias)[2], float (&kv)[32], float (&z)[2], float (&c)[2]) {
  const bool is_part = tile.first > 0;
  const float *from_kv = is_part ? args.part_kv : args.kv0, *from_z = is_part ? args.part_z : args.z0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row = (static_cast<int64_t>(tile.head) + (is_part ? share : 0)) * M + feature + 8 * i;
    z[i] = from_kv == nullptr ? 0 : from_z[row];
    c[i] = empty;
    if (is_part) {
      c[i] = args.part_c[row];
    } else if (from_kv != nullptr) {
      c[i] = fmaxf(args.log_scale0[row] * log2e - bias[i], empty);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float2 pair = {0, 0};
      if (from_kv != nullptr) {
        pair = *reinterpret_cast<const float2*>(from_kv + row * width + 8 * j + threadIdx.x % 4 * 2);
      }
      kv[4 * j + 2 * i] = pair.x;
      kv[4 * j + 2 * i + 1] = pair.y;
    }
  }
}

template <int M, typename T>
__device__ __forceinline__ void store_state(const Args<T>& args, const Tile& tile, int feature, const float (&bias)[2],
                                            const float (&kv)[32], const float (&z)[2], const float (&c)[2]) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row = static_cast<int64_t>(tile.head) * M + feature + 8 * i;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      *reinterpret_cast<float2*>(args.kv + row * width + 8 * j + 2 * t) = {kv[4 * j + 2 * i], kv[4 * j + 2 * i + 1]};
    }
    if (t == 0) {
      args.z[row] = z[i];
      args.log_scale[row] = (c[i] + bias[i]) * ln2;
    }
  }
}

// How far a maximum may be above what a row sees: the row's sum is at least 2^-reach, and its small terms, products of
// two weights that may be as much smaller again, are far from what a float32 flushes to 0.
constexpr float reach = 48;

// Whether the maxima `next` over keys [begin, end) are out of reach for the first row that has a key.
__device__ __forceinline__ bool is_far(const float (&s)[32], const float (&c)[2], const float (&next)[2],
                                       const float* key_bias, int begin, int end) {
  if (!__any_sync(~0u, next[0] > c[0] + reach || next[1] > c[1] + reach)) {
    return false;
  }
  int own = begin;  // the key of that row
  if (c[0] == empty && c[1] == empty) {
    while (own + 1 < end && key_bias[own] == masked) {
      ++own;
    }
  }
  float seen[2] = {c[0], c[1]};
#pragma unroll
  for (int n = 0; n < 32; ++n) {
    if (n / 4 * 8 + threadIdx.x % 4 * 2 + n % 2 <= own) {
      seen[n / 2 % 2] = fmaxf(seen[n / 2 % 2], s[n]);
    }
  }
  seen[0] = largest_of_four(seen[0]);
  seen[1] = largest_of_four(seen[1]);
  return next[0] > seen[0] + reach || next[1] > seen[1] + reach;
}

// Where 16 bytes of a row of 64 x 64 values in float32 lie, the first or the second of piece u: neither those that a
// warp stores nor those that it loads share banks.
__device__ __forceinline__ int part(int row, int u, int second) {
  return (2 * row + second) * pieces + (u ^ row % 8 ^ 4 * second);
}

// The rows of all features from those of each warpgroup's.
template <typename Of, typename T>
__device__ __forceinline__ void store_rows(const Args<T>& args, const Memory<Of>& memory, const Tile& tile, int query,
                                           int begin, int end) {
  T* out = args.out + ((static_cast<int64_t>(tile.head) * args.queries + query) * args.L + tile.first) * width;
  end = min(end, args.L - tile.first);
#pragma unroll
  for (int n = 0; n < Of::matrix / Of::threads; ++n) {
    const int row = n * (Of::threads / pieces) + threadIdx.x / pieces, u = threadIdx.x % pieces;
    float top = masked, total = 0, y[8] = {};
#pragma unroll
    for (int group = 0; group < Of::groups; ++group) {
      top = fmaxf(top, memory.rows[group * Of::rows + row].x);
    }
#pragma unroll
    for (int group = 0; group < Of::groups; ++group) {
      const float2 of_row = memory.rows[group * Of::rows + row];
      const float factor = exp2_approximate(of_row.x - top);
      const float4* from = reinterpret_cast<const float4*>(memory.work + group * Of::work);
      const float4 low = from[part(row, u, 0)], high = from[part(row, u, 1)];
      const float x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      total = fmaf(of_row.y, factor, total);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        y[j] = fmaf(x[j], factor, y[j]);
      }
    }
    const float inverse = total == 0 ? 0 : __fdividef(1, total);  // 0 where there is no key yet
#pragma unroll
    for (float& value : y) {
      value *= inverse;
    }
    if (row >= begin && row < end) {
      store<T, 8>(out + row * width + u * 8, narrow<T, 8>(y));
    }
  }
}

// Rows [begin, end) of a tile, or of the part of it that is walked first, and the sums with its keys.
template <typename Of, typename T>
__device__ __forceinline__ void walk(const Args<T>& args, const Memory<Of>& memory, const Tile& tile, int query,
                                     const uint4* q, const float (&bias)[2], float (&kv)[32], float (&z)[2],
                                     float (&c)[2]) {
  const int group = threadIdx.x / 128, t = threadIdx.x % 4, row = first_row();
  uint4 *keys = memory.work + group * Of::work, *state = keys + Of::matrix;
  constexpr uint32_t row_bytes = 16 * pieces, bytes = 16 * Of::matrix;
  const uint64_t of_omega = operand(memory.omega + group * Of::matrix), of_q = operand(q), of_k = further(of_q, bytes),
                 of_v = further(of_k, bytes), of_keys = operand(keys), of_state = further(of_keys, bytes);
  float *exponents = memory.exponents + group * 64, *sums = memory.z + group * 64;
  for (int begin = 0, end = Of::rows; begin < Of::rows;) {
    float s[32], p[32];  // features x keys, queries x features
    products_begin();
#pragma unroll
    for (int step = 0; step < width / 16; ++step) {
      multiply<T>(s, further(of_omega, 32 * step), further(of_k, 32 * step), step > 0);
    }
    products_end();
#pragma unroll
    for (int step = 0; step < width / 16; ++step) {
      multiply<T>(p, further(of_q, 32 * step), further(of_omega, 32 * step), step > 0);
    }
    products_end();
    products_wait<1>(s);
    float next[2] = {masked, masked};
    add_exponents(s, args.scale, memory.key_bias, next);
    if (end - begin < Of::rows) {
      next[0] = next[1] = masked;
#pragma unroll
      for (int n = 0; n < 32; ++n) {
        const int key = n / 4 * 8 + 2 * t + n % 2;
        s[n] = key >= begin && key < end ? s[n] : masked;
        next[n / 2 % 2] = fmaxf(next[n / 2 % 2], s[n]);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      next[i] = fmaxf(c[i], largest_of_four(next[i]));
    }
    if (__syncthreads_or(is_far(s, c, next, memory.key_bias, begin, end)) && end - begin > 1) {
      products_wait(p);
      end = begin + (end - begin) / 2;
      continue;
    }

    // The state before these keys, relative to their maxima.
    if (__any_sync(~0u, next[0] > c[0] || next[1] > c[1])) {
      const float factor[2] = {exp2_approximate(c[0] - next[0]), exp2_approximate(c[1] - next[1])};
#pragma unroll
      for (int n = 0; n < 32; ++n) {
        kv[n] *= factor[n / 2 % 2];
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        z[i] *= factor[i];
        c[i] = next[i];
      }
    }
    uint32_t weights[4][4];
#pragma unroll
    for (int n = 0; n < 16; ++n) {
      weights[n / 4][n % 4] = pack<T>(kv[2 * n], kv[2 * n + 1]);
    }
    store_matrix(state, weights);
    if (t == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        exponents[row + 8 * i] = c[i] + 2 * bias[i];  // the bias counts for keys and for queries
        sums[row + 8 * i] = z[i];
      }
    }
    float total[2] = {0, 0};
#pragma unroll
    for (int n = 0; n < 16; ++n) {
      const float x = exp2_approximate(s[2 * n] - c[n % 2]), y = exp2_approximate(s[2 * n + 1] - c[n % 2]);
      total[n % 2] += x + y;
      weights[n / 4][n % 4] = pack<T>(x, y);
    }
    store_matrix(keys, weights);
    z[0] += sum_of_four(total[0]);
    z[1] += sum_of_four(total[1]);
    copies_visible();
    warpgroup_barrier(group);
    products_begin();
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      multiply<T, Inner::b>(kv, weights[n], further(of_v, n * 16 * row_bytes), true);
    }
    products_end();

    products_wait<1>(p);
    float top[2] = {masked, masked};
    add_exponents(p, args.scale, exponents, top);
    top[0] = largest_of_four(top[0]);
    top[1] = largest_of_four(top[1]);
    total[0] = total[1] = 0;
    uint32_t queries[4][4];
    const float2* pairs = reinterpret_cast<const float2*>(sums) + t;
#pragma unroll
    for (int n = 0; n < 16; ++n) {
      const float2 z_pair = pairs[n / 2 * 4];
      queries[n / 4][n % 4] =
          pack<T>(exp2_approximate(p[2 * n] - top[n % 2]), exp2_approximate(p[2 * n + 1] - top[n % 2]));
      float x[2];  // as rounded, so that what a row's weights add up to is what they are divided by
      widen<T, 2>(x, {queries[n / 4][n % 4]});
      total[n % 2] = fmaf(x[0], z_pair.x, fmaf(x[1], z_pair.y, total[n % 2]));
    }
    float a[32];  // queries x keys
    products_begin();
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      multiply<T, Inner::b>(a, queries[n], further(of_keys, n * 16 * row_bytes), n > 0);
    }
    products_end();
    products_wait(a);
    products_wait(kv);
#pragma unroll
    for (int n = 0; n < 16; ++n) {
      const int key = (n / 2 - n % 2) * 8;  // less the same for all
      weights[n / 4][n % 4] = pack<T>(key <= row - 2 * t ? a[2 * n] : 0, key < row - 2 * t ? a[2 * n + 1] : 0);
      float x[2];
      widen<T, 2>(x, {weights[n / 4][n % 4]});
      total[n % 2] += x[0] + x[1];
    }
    float y[32];
    products_begin();
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      multiply<T, Inner::b>(y, queries[n], further(of_state, n * 16 * row_bytes), n > 0);
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      multiply<T, Inner::b>(y, weights[n], further(of_v, n * 16 * row_bytes), true);
    }
    products_end();
    total[0] = sum_of_four(total[0]);
    total[1] = sum_of_four(total[1]);
    products_wait(y);

    warpgroup_barrier(group);  // all have left the matrices that the rows now take the place of
    float2* shares = reinterpret_cast<float2*>(keys);
#pragma unroll
    for (int n = 0; n < 16; ++n) {
      const int at = row + n % 2 * 8;
      shares[2 * part(at, n / 2, t / 2) + t % 2] = {y[2 * n], y[2 * n + 1]};
    }
    if (t == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        memory.rows[group * Of::rows + row + 8 * i] = {top[i], total[i]};
      }
    }
    __syncthreads();
    store_rows(args, memory, tile, query, begin, end);
    const int count = end - begin;
    begin = end;
    end = min(begin + 2 * count, Of::rows);
  }
}

#endif

template <typename T, typename Of>
__global__ void __launch_bounds__(Of::threads, Of::blocks) causal_kernel(const Args<T> args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char bytes[];
  const Memory<Of> memory(bytes);
  const int query = static_cast<uint32_t>(this_block()) / static_cast<uint32_t>(args.key_blocks);
  const int share = this_block() - query * args.key_blocks, feature = threadIdx.x / 128 * 64 + first_row();
  Tile tile = begin_of(args, share);
  const Tile end = begin_of(args, share + 1);
  const int of_head = max((args.L + Of::rows - 1) / Of::rows, 1);
  const int count = (end.head - tile.head) * of_head + (end.first - tile.first) / Of::rows;
  Copies<Of, T> copies(args, tile, query);
  uint32_t inside = copies.start(args, memory.stages);
  fill_projection<T, Of::M, Of::threads>(args.projection, tile.key_head(args), memory.omega);
  copies_end();
  wait_for_previous();
  float kv[32], z[2], c[2], bias[2];
  for (int i = 0; i < count; ++i) {
    if (i == 0 || tile.first == 0) {
      bias[0] = feature_bias(args, tile.key_head(args), feature);
      bias[1] = feature_bias(args, tile.key_head(args), feature + 8);
      load_state<Of::M>(args, tile, share, feature, bias, kv, z, c);
    }
    uint4* stage = memory.stages + i % Of::stages * Of::stage;
    copies_wait<0>();
    fill_key_bias<Of>(args, stage + Of::matrix, inside, memory.key_bias);
    copies_visible();
    __syncthreads();  // this tile is there, and everyone has left the one before
    if (args.projection.head != 0 && i > 0 && tile.first == 0) {
      fill_projection<T, Of::M, Of::threads>(args.projection, tile.key_head(args), memory.omega);
      copies_end();
      copies_wait<0>();
      copies_visible();
      __syncthreads();
    }
    if (i + 1 < count) {
      copies.next(args, query);
      inside = copies.start(args, memory.stages + (i + 1) % Of::stages * Of::stage);
    }
    copies_end();
    walk<Of>(args, memory, tile, query, stage, bias, kv, z, c);
    if (query == 0 && args.kv != nullptr && tile.is_last(args)) {
      store_state<Of::M>(args, tile, feature, bias, kv, z, c);
    }
    tile = copies.tile;
  }
#endif
}

// Makes the sums of a head's shares those of all keys before each; a warp has a feature.
template <typename T, int M>
__global__ void __launch_bounds__(128) add_before_kernel(const Args<T> args) {
  let_next_begin();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / 32;
  const int head = static_cast<int>(i / M), row = i % M, column = threadIdx.x % 32 * 2;
  // As in add_parts_kernel.
  const uint32_t heads = args.heads, blocks = args.key_blocks;
  const int begin = (static_cast<uint32_t>(head) * blocks + (blocks - 1) / args.key_tiles) / heads;
  const int count = ((head + 1u) * blocks - 1) / heads - begin + 1;
  const int64_t first = (static_cast<int64_t>(head) + begin) * M + row;
  float2 kv = {0, 0};
  float z = 0, c = empty;
  if (args.kv0 != nullptr) {
    kv = *reinterpret_cast<const float2*>(args.kv0 + i * width + column);
    z = args.z0[i];
    c = fmaxf(args.log_scale0[i] * log2e - feature_bias(args, head % args.Hk, row), empty);
  }
  wait_for_previous();
  constexpr int at_once = 4;  // loads that do not wait for one another
  for (int n = 0; n < count; n += at_once) {
    float2 part_kv[at_once] = {};
    float part_z[at_once] = {}, part_c[at_once] = {};
#pragma unroll
    for (int j = 0; j < at_once; ++j) {
      if (n + j < count) {
        const int64_t at = first + (n + j) * M;
        part_kv[j] = *reinterpret_cast<const float2*>(args.part_kv + at * width + column);
        part_z[j] = args.part_z[at];
        part_c[j] = args.part_c[at];
      }
    }
    __syncwarp();  // all have read what is overwritten
#pragma unroll
    for (int j = 0; j < at_once; ++j) {
      if (n + j < count) {
        const int64_t at = first + (n + j) * M;
        *reinterpret_cast<float2*>(args.part_kv + at * width + column) = kv;
        if (column == 0) {
          args.part_z[at] = z;
          args.part_c[at] = c;
        }
        const float next = fmaxf(c, part_c[j]);
        const float old = exp2_approximate(c - next), added = exp2_approximate(part_c[j] - next);
        kv = {fmaf(kv.x, old, part_kv[j].x * added), fmaf(kv.y, old, part_kv[j].y * added)};
        z = fmaf(z, old, part_z[j] * added);
        c = next;
      }
    }
  }
}

}  // namespace

// Shares take half as long again for their keys, with twice the blocks of a multiprocessor, and two launches take as
// long as 5 tiles.
template <int M>
int causal_shares(int64_t heads, int64_t queries, int64_t L, int64_t key_tiles, int64_t multiprocessors) {
  const int64_t resident = multiprocessors * Plan<M>::blocks, tiles = ceil_div(L, 64);
  const int64_t shares = std::min(std::max(resident / queries, int64_t{1}), heads * key_tiles);
  const bool one = 2 * tiles * shares <= 5 * tiles * heads + 10 * shares;
  return static_cast<int>(one || shares <= heads ? heads : shares);
}

template <typename T, int M>
void causal_attention(const Args<T>& args, int device, cudaStream_t stream) {
  using Of = Plan<M>;
  const bool divided = args.key_blocks != args.heads;
  if (divided) {
    launch(add_before_kernel<T, M>, int64_t{args.heads} * M / 4, 128, 0, stream, true, args);
  }
  const auto kernel = causal_kernel<T, Of>;
  allow_memory<Of>(kernel, device);
  launch(kernel, int64_t{args.key_blocks} * args.queries, Of::threads, Of::bytes, stream, divided, args);
}

#define FASTRPE_CAUSAL(M)                                                     \
  template int causal_shares<M>(int64_t, int64_t, int64_t, int64_t, int64_t); \
  template void causal_attention<BFloat16, M>(const Args<BFloat16>&, int, cudaStream_t);
FASTRPE_CAUSAL(64)
FASTRPE_CAUSAL(128)
FASTRPE_CAUSAL(256)
#undef FASTRPE_CAUSAL

}  // namespace linear
}  // namespace fastrpe
