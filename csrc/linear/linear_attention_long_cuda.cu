#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#include "linear_attention.cuh"
#include "tensor_map.h"

// Attention of exponential features over many tokens on Hopper's tensor cores: keys and queries as in
// linear_attention_cuda.cu, with one block to a multiprocessor. A warpgroup copies; two others have the registers for
// three tiles at a time. While the tensor cores add the values of the tile before, and project the next, a warpgroup
// takes the exponents of this one. What is copied lies in a ring, with barriers in shared memory.
namespace fastrpe {
namespace linear {
namespace {

constexpr int groups = 2, walkers = 128 * groups, threads = walkers + 128;
constexpr int registers = 168, walk_registers = 232, copy_registers = 40;  // of a thread: at first, and then
static_assert(walkers * walk_registers + 128 * copy_registers <= threads * registers);

// Of a place in the ring: its tile is there; the tile's biases are, too; it is no longer needed.
struct Barriers {
  uint64_t landed, ready, left;
};

// In units of 16 bytes but for the last.
template <int Features>
struct KeyPlan {
  static constexpr int M = Features;
  static constexpr int features = M * pieces;  // of a matrix of M rows
  static constexpr int keys = 128;             // of a tile
  static constexpr int matrix = keys * pieces;
  static constexpr int stage = 2 * matrix;
  static constexpr int stages = 6;     // tiles
  static constexpr int preparers = 3;  // warps
  static constexpr size_t bytes =
      16 * (features + stages * stage + slab_of_ones) + sizeof(float) * stages * keys + sizeof(Barriers) * stages;
  static_assert(M == 64 * groups && stages % preparers == 0 && bytes + 1024 <= 228 * 1024);
};

template <int Features>
struct QueryPlan {
  static constexpr int M = Features;
  static constexpr int features = M * pieces;
  static constexpr int rows = 64;  // queries of a tile
  static constexpr int matrix = rows * pieces;
  static constexpr int stages = 16;
  static constexpr size_t bytes = 16 * (4 * features + stages * matrix + slab_of_ones) +
                                  sizeof(float) * (2 * M + 4 + stages) + sizeof(uint64_t) * 2 * stages;
  static_assert(M == 128 && stages == 16 && bytes + 1024 <= 228 * 1024);
};

template <typename Of>
struct KeyMemory {
  uint4 *omega, *stages, *ones;
  float* key_bias;
  Barriers* barriers;

  __device__ __forceinline__ explicit KeyMemory(char* at)
      : omega(reinterpret_cast<uint4*>(at)),
        stages(omega + Of::features),
        ones(stages + Of::stages * Of::stage),
        key_bias(reinterpret_cast<float*>(ones + slab_of_ones)),
        barriers(reinterpret_cast<Barriers*>(key_bias + Of::stages * Of::keys)) {}
};

// Two projections and sets of means and exponents, of neighbouring heads.
template <typename Of>
struct QueryMemory {
  uint4 *omega, *means, *ring, *ones;
  float* exponents;
  uint32_t *feature_norms, *norms;  // the largest squared ones of 32 features, and of a tile's queries
  uint64_t *landed, *left;          // a tile is there; it is no longer needed

  __device__ __forceinline__ explicit QueryMemory(char* at)
      : omega(reinterpret_cast<uint4*>(at)),
        means(omega + 2 * Of::features),
        ring(means + 2 * Of::features),
        ones(ring + Of::stages * Of::matrix),
        exponents(reinterpret_cast<float*>(ones + slab_of_ones)),
        feature_norms(reinterpret_cast<uint32_t*>(exponents + 2 * Of::M)),
        norms(feature_norms + 4),
        landed(reinterpret_cast<uint64_t*>(norms + Of::stages)),
        left(landed + Of::stages) {}
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// This thread's warpgroup, in a way that tells the compiler that a warp's threads agree.
__device__ __forceinline__ int warpgroup() {
  return __shfl_sync(~0u, threadIdx.x / 128, 0);
}

__device__ __forceinline__ int warp_of_four() {
  return __shfl_sync(~0u, threadIdx.x % 128 / 32, 0);
}

// Of all threads of a warp, whose count is one.
__device__ __forceinline__ void warp_arrive(uint64_t* barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    barrier_arrive(barrier);
  }
}

// A ring's next place, and the parity of how often all of the ring was used before.
template <int N>
struct Turn {
  int at = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void move(int step = 1) {
    at += step;
    if (at >= N) {
      at -= N;
      parity ^= 1;
    }
  }
};

// What c becomes before is made before, and what is made of it after, after.
template <int R>
__device__ __forceinline__ void pin(float (&c)[R]) {
#pragma unroll
  for (int i = 0; i < R; ++i) {
    asm volatile("" : "+f"(c[i])::"memory");
  }
}

// s (64 x 128) = a b^T over the width, in the background.
template <typename T>
__device__ __forceinline__ void start_projection(float (&s)[64], uint64_t a, uint64_t b) {
#pragma unroll
  for (int step = 0; step < width / 16; ++step) {
    multiply<T>(s, further(a, 32 * step), further(b, 32 * step), step > 0);
  }
  products_end();
}

// sums (= or +=) weights values, and total the weights, in the background.
template <typename T, bool Add>
__device__ __forceinline__ void start_values(float (&sums)[32], float (&total)[4], const uint32_t (&weights)[8][4],
                                             uint64_t values) {
  constexpr uint32_t row_bytes = 16 * pieces;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    multiply_and_sum<T>(sums, total, weights[n], further_to_slab(values, n * 16 * row_bytes), Add || n > 0);
  }
  products_end();
}

// A half of s becomes the weights 2^(s - top).
template <int Half>
__device__ __forceinline__ void weigh_half(float (&s)[64], const float (&top)[2]) {
#pragma unroll
  for (int n = 16 * Half; n < 16 * Half + 16; ++n) {
    float &x = s[2 * n], &y = s[2 * n + 1];
    x = exp2_approximate(x - top[n % 2]);
    y = exp2_approximate(y - top[n % 2]);
  }
}

// The same of a projection, with what columns add, and without a largest.
template <int Half>
__device__ __forceinline__ void weigh_half(float (&s)[64], float scale, const float* exponents) {
  const float2* pairs = reinterpret_cast<const float2*>(exponents) + threadIdx.x % 4;
#pragma unroll
  for (int n = 16 * Half; n < 16 * Half + 16; ++n) {
    const float2 e = pairs[n / 2 * 4];
    float &x = s[2 * n], &y = s[2 * n + 1];
    x = exp2_approximate(fmaf(x, scale, e.x));
    y = exp2_approximate(fmaf(y, scale, e.y));
  }
}

template <int Half, typename T>
__device__ __forceinline__ void round_half(uint32_t (&weights)[8][4], const float (&s)[64]) {
#pragma unroll
  for (int n = 16 * Half; n < 16 * Half + 16; ++n) {
    weights[n / 4][n % 4] = pack<T>(s[2 * n], s[2 * n + 1]);
  }
}

// A warp starts to copy rows, zero where a bit of `inside` is: a lane has a piece of each fourth.
template <int Rows, typename T>
__device__ __forceinline__ void copy_rows(const T* rows, int64_t stride, uint32_t inside, uint4* to) {
  constexpr int step = 32 / pieces;
  const int row = threadIdx.x % 32 / pieces, u = threadIdx.x % pieces;
  // A step of 4 rows changes a bit of the swizzle, since the first row is less than 4.
  const int even = piece(row, u), odd = even ^ 4;
  const T* from = rows + row * stride + u * 8;
#pragma unroll
  for (int n = 0; n < Rows / step; ++n) {
    copy_async<16>(to + (n % 2 == 0 ? even : odd) + n * step * pieces, from, inside >> n & 1);
    from += step * stride;
  }
}

// Which of a lane's rows of a tile take part.
template <int Rows, typename Takes>
__device__ __forceinline__ uint32_t rows_inside(Takes&& takes) {
  uint32_t inside = 0;
#pragma unroll 4
  for (int n = 0; n < Rows / 4; ++n) {
    inside |= takes(threadIdx.x % 32 / pieces + 4 * n) ? 1u << n : 0u;
  }
  return inside;
}

// A block's keys and values, by a warp: tile by tile, as places become free.
template <typename Of, typename T>
__device__ __forceinline__ void copy_keys(const Args<T>& args, const KeyMemory<Of>& memory, const CUtensorMap& k,
                                          const CUtensorMap& v, Place at) {
  Turn<Of::stages> turn;
  for (int i = 0; i < at.count; ++i) {
    barrier_wait(&memory.barriers[turn.at].left, turn.parity ^ 1);
    if (threadIdx.x % 32 == 0) {
      uint4* stage = memory.stages + turn.at * Of::stage;
      uint64_t* landed = &memory.barriers[turn.at].landed;
      barrier_expect(landed, 16 * Of::stage);
      copy_tile(stage, k, at.b, at.h, at.tile * Of::keys, landed);
      copy_tile(stage + Of::matrix, v, at.b, at.h, at.tile * Of::keys, landed);
    }
    __syncwarp();
    turn.move();
    if (++at.tile == args.key_tiles) {
      at.tile = 0;
      at.next_head(args);
    }
  }
}

// The biases of a block's keys, by warps that take tiles in turn, this one being number i of them.
template <typename Of, typename T>
__device__ __forceinline__ void prepare_keys(const Args<T>& args, const KeyMemory<Of>& memory, Place at, int i) {
  Turn<Of::stages> turn;
  turn.move(i);
  at.tile += i;
  for (; i < at.count; i += Of::preparers) {
    while (at.tile >= args.key_tiles) {
      at.tile -= args.key_tiles;
      at.next_head(args);
    }
    Barriers& barriers = memory.barriers[turn.at];
    barrier_wait(&barriers.left, turn.parity ^ 1);  // which the copy has waited for, too: so that checkers see it
    barrier_wait(&barriers.landed, turn.parity);
    uint4* stage = memory.stages + turn.at * Of::stage;
    fill_bias<Of::keys>(args, stage, stage + Of::matrix, at.b, at.tile * Of::keys, 0,
                        memory.key_bias + turn.at * Of::keys);
    barrier_arrive(&barriers.ready);
    at.tile += Of::preparers;
    turn.move(Of::preparers);
  }
}

// A warpgroup for 64 features: their sums over a block's tiles of keys, relative to 2^c.
template <typename Of, typename T>
struct KeySums {
  const Args<T>& args;
  const KeyMemory<Of>& memory;
  const uint64_t of_omega, all_keys, all_values;
  int before = 0, now = 0;  // stages
  Turn<Of::stages> next;
  float kv[32], z[4], c[2];  // z[1] and z[3] are z[0] and z[2]
  uint32_t weights[8][4];    // of the tile before

  __device__ __forceinline__ KeySums(const Args<T>& args, const KeyMemory<Of>& memory)
      : args(args),
        memory(memory),
        of_omega(operand(memory.omega + warpgroup() * 64 * pieces)),
        all_keys(operand(memory.stages)),
        all_values(operand_with_ones(memory.stages + Of::matrix, memory.ones)) {}

  __device__ __forceinline__ void move() {
    before = now;
    now = next.at;
    next.move();
  }

  __device__ __forceinline__ void wait_for_next() const {
    barrier_wait(&memory.barriers[next.at].ready, next.parity);
  }

  __device__ __forceinline__ void project_next(float (&s)[64]) const {
    start_projection<T>(s, of_omega, further(all_keys, next.at * (16 * Of::stage)));
  }

  __device__ __forceinline__ void add_values(int stage) {
    start_values<T, true>(kv, z, weights, further_to_slab(all_values, stage * (16 * Of::stage)));
  }

  __device__ __forceinline__ void begin_next(float (&s)[64]) {
    wait_for_next();
    products_begin();
    project_next(s);
    move();
  }

  // This tile's exponents and, for each feature, the largest.
  __device__ __forceinline__ void find_exponents(float (&s)[64], float (&top)[2]) const {
    add_exponents(s, args.scale, memory.key_bias + now * Of::keys);
    top[0] = top[1] = masked;
    find_largest(s, top);
    largest_of_four(top);
  }

  template <bool Bounded, int Half>
  __device__ __forceinline__ void weigh_half(float (&s)[64]) {
    if constexpr (Bounded) {
      linear::weigh_half<Half>(s, args.scale, memory.key_bias + now * Of::keys);
    } else {
      linear::weigh_half<Half>(s, c);
    }
  }

  // The values of the tile before, the weights of this one, the next one's projection; its place becomes this one's.
  template <bool Bounded, bool Last>
  __device__ __forceinline__ void step(float (&s)[64], float (&ahead)[64], float limit) {
    if constexpr (!Last) {
      wait_for_next();
    }
    products_wait(s);
    products_begin();
    add_values(before);
    if constexpr (!Last) {
      project_next(ahead);
    }
    bool grows = false;
    float factor[2];
    if constexpr (!Bounded) {
      float top[2];
      find_exponents(s, top);
      grows = __any_sync(~0u, top[0] > c[0] + limit || top[1] > c[1] + limit);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float next = grows ? fmaxf(c[n], top[n]) : c[n];
        factor[n] = exp2_approximate(c[n] - next);
        c[n] = next;
      }
    }
    weigh_half<Bounded, 0>(s);
    pin(s);
    products_wait<Last ? 0 : 1>(kv, z);
    barrier_arrive(&memory.barriers[before].left);
    round_half<0, T>(weights, s);
    weigh_half<Bounded, 1>(s);
    round_half<1, T>(weights, s);
    if (!Bounded && grows) {
      rescale(kv, factor);
      rescale(z, factor);
    }
    if constexpr (!Last) {
      move();
    }
  }

  template <bool Bounded>
  __device__ __forceinline__ void steps(float (&a)[64], float (&b)[64], int pairs) {
#pragma unroll 1
    for (int i = 0; i < pairs; ++i) {
      step<Bounded, false>(a, b, Range<T>::limit);
      step<Bounded, false>(b, a, Range<T>::limit);
    }
  }

  __device__ __forceinline__ void store_none(int head) {
#pragma unroll
    for (float& x : kv) {
      x = 0;
    }
    c[0] = c[1] = empty;
    store_part<Of::M>(args, head, kv, {0, 0}, c);
  }

  // The sums over a head's next `count` tiles, to this block's slot.
  __device__ __forceinline__ void sum(int head, int count) {
#pragma unroll
    for (float& x : kv) {
      x = 0;
    }
    z[0] = z[1] = z[2] = z[3] = 0;
    float a[64], b[64];
    begin_next(a);
    products_wait(a);
    float top[2];
    find_exponents(a, top);
    // The warps of a warpgroup take the same way, since they start products together.
    bool is_far = args.norm == 0 || need_largest<T>(memory.omega, top);
    if (threadIdx.x < 128) {
      is_far = barrier_or<1, 128>(is_far);
    } else {
      is_far = barrier_or<2, 128>(is_far);
    }
    is_far = __any_sync(~0u, is_far);  // which tells the compiler that a warp's threads agree
    c[0] = is_far ? fmaxf(top[0], empty) : 0;
    c[1] = is_far ? fmaxf(top[1], empty) : 0;
    weigh_half<false, 0>(a);
    weigh_half<false, 1>(a);
    round_half<0, T>(weights, a);
    round_half<1, T>(weights, a);
    if (count > 1) {
      const float limit = is_far ? Range<T>::limit : INFINITY;
      begin_next(a);
      if (count % 2 != 0) {  // the next ones come in pairs, and one more
        step<false, true>(a, a, limit);
        begin_next(a);
      }
      is_far ? steps<false>(a, b, (count - 2) / 2) : steps<true>(a, b, (count - 2) / 2);
      step<false, true>(a, a, limit);
    }
    products_begin();
    add_values(now);
    products_wait(kv, z);
    barrier_arrive(&memory.barriers[now].left);
    store_part<Of::M>(args, head, kv, {z[0], z[2]}, c);
  }
};

// A block's queries, by the warpgroup that copies: each warp takes two tiles in turn, and finds norms of the two before
// while they come.
template <typename Of, typename T>
__device__ __forceinline__ void copy_queries(const Args<T>& args, const QueryMemory<Of>& memory, Place at) {
  const int warp = warp_of_four();
  Turn<Of::stages> turn;
  turn.move(2 * warp);
  at.tile += 2 * warp;
  for (int i = 2 * warp; i < at.count + 8; i += 8) {
    copies_wait<0>();
    copies_visible();  // which would wait for others under way
    __syncwarp();
    const int tiles = min(at.count - i, 2);
    for (int n = 0; n < tiles; ++n) {
      while (at.tile >= args.query_steps) {
        at.tile -= args.query_steps;
        at.next_head(args);
      }
      const int query = static_cast<uint32_t>(at.tile) / static_cast<uint32_t>(args.row_tiles);
      const int first = (at.tile - query * args.row_tiles) * Of::rows;
      uint32_t inside = ~0u;
      if (first + Of::rows > args.L) {
        inside = rows_inside<Of::rows>([&](int row) { return first + row < args.L; });
      }
      barrier_wait(memory.left + turn.at + n, turn.parity ^ 1);
      copy_rows<Of::rows>(args.q.at(at.b, at.h * args.queries + query) + first * args.q.l, args.q.l, inside,
                          memory.ring + (turn.at + n) * Of::matrix);
      ++at.tile;
    }
    copies_end();
#pragma unroll 1
    for (int n = 0; i >= 8 && n < min(at.count - i + 8, 2); ++n) {
      const int before = (turn.at + Of::stages / 2) % Of::stages + n;
      const uint32_t norm = largest_norm<Of::rows>(memory.ring + before * Of::matrix);
      if (threadIdx.x % 32 == 0) {
        memory.norms[before] = norm;
      }
      warp_arrive(memory.landed + before);
    }
    turn.move(8);
    at.tile += 6;
  }
}

// What a head's queries need, by the others: the projection, and the means and exponents, which are there when the
// kernel before has ended.
template <typename Of, typename T>
__device__ __forceinline__ void start_projection_of(const Args<T>& args, const QueryMemory<Of>& memory, const Place& at,
                                                    int set) {
  fill_projection<T, Of::M, walkers>(args.projection, at.h, memory.omega + set * Of::features);
}

template <typename Of, typename T>
__device__ __forceinline__ void start_means(const Args<T>& args, const QueryMemory<Of>& memory, int head, int set) {
  const T* from = args.means + static_cast<int64_t>(head) * Of::features * 8;
  uint4* to = memory.means + set * Of::features;
#pragma unroll
  for (int n = threadIdx.x; n < Of::features; n += walkers) {
    copy_async<16>(to + piece(n / pieces, n % pieces), from + n * 8, true);
  }
  if (threadIdx.x < Of::M) {
    copy_async<4>(memory.exponents + set * Of::M + threadIdx.x,
                  args.exponents + static_cast<int64_t>(head) * Of::M + threadIdx.x, true);
  }
}

// Without a branch, where products are under way.
template <typename T>
__device__ __forceinline__ void store_if(bool inside, T* to, const Vec<T, 8>& x) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %0, 0;\n@p st.global.v4.b32 [%1], {%2, %3, %4, %5};\n}" ::"r"(
                   static_cast<uint32_t>(inside)),
               "l"(to), "r"(x.at[0]), "r"(x.at[1]), "r"(x.at[2]), "r"(x.at[3])
               : "memory");
}

// A warpgroup that makes the rows of every second tile of a block's.
template <typename Of, typename T>
struct QueryRows {
  const Args<T>& args;
  const QueryMemory<Of>& memory;
  const uint64_t all_rows;
  uint64_t of_omega, of_means;
  const float* exponents;
  uint32_t bound;  // of queries' squared norms
  int now;         // stages
  Turn<Of::stages> next;
  bool is_bounded;  // the next tile
  int first;        // of the rows of the tile before the last
  T* y;             // where this thread's go
  float sums[32], total[4];
  uint32_t weights[8][4];

  __device__ __forceinline__ QueryRows(const Args<T>& args, const QueryMemory<Of>& memory, int group)
      : args(args), memory(memory), all_rows(operand(memory.ring)) {
    next.move(group);
  }

  __device__ __forceinline__ void wait_for_next() {
    barrier_wait(memory.landed + next.at, next.parity);
    // The lane that arrives reads.
    is_bounded = __reduce_max_sync(~0u, threadIdx.x % 32 == 0 ? memory.norms[next.at] : 0) <= bound;
  }

  __device__ __forceinline__ void project_next(float (&s)[64]) {
    start_projection<T>(s, further(all_rows, next.at * (16 * Of::matrix)), of_omega);
    now = next.at;
    next.move(groups);
  }

  __device__ __forceinline__ void begin_next(float (&s)[64]) {
    wait_for_next();
    products_begin();
    project_next(s);
  }

  __device__ __forceinline__ void end_projection(float (&s)[64]) const {
    products_wait(s);
    warp_arrive(memory.left + now);
  }

  template <bool Bounded, int Half>
  __device__ __forceinline__ void weigh_half(float (&s)[64], const float (&top)[2]) const {
    if constexpr (Bounded) {
      linear::weigh_half<Half>(s, args.scale, exponents);
    } else {
      linear::weigh_half<Half>(s, top);
    }
  }

  __device__ __forceinline__ void find_top(float (&s)[64], float (&top)[2]) const {
    top[0] = top[1] = masked;
    add_exponents(s, args.scale, exponents, top);
    largest_of_four(top);
  }

  // The rows of the tile before, the weights of this one, the projection of the next.
  template <bool Bounded, bool Last>
  __device__ __forceinline__ void step(float (&s)[64], float (&ahead)[64]) {
    move();
    if constexpr (!Last) {
      wait_for_next();
    }
    end_projection(s);
    products_begin();
    start_values<T, false>(sums, total, weights, of_means);
    if constexpr (!Last) {
      project_next(ahead);
    }
    float top[2];
    if constexpr (!Bounded) {
      find_top(s, top);
    }
    weigh_half<Bounded, 0>(s, top);
    pin(s);
    products_wait<Last ? 0 : 1>(sums, total);
    store_rows();
    round_half<0, T>(weights, s);
    weigh_half<Bounded, 1>(s, top);
    round_half<1, T>(weights, s);
  }

  // Of the tile before.
  __device__ __forceinline__ void store_rows() const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float inverse = reciprocal_approximate(total[2 * i]);
      float low[8], high[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        low[j] = sums[j / 2 * 4 + 2 * i + j % 2] * inverse;
        high[j] = sums[16 + j / 2 * 4 + 2 * i + j % 2] * inverse;
      }
      const bool inside = first + row() + 8 * i < args.L;
      store_if<T>(inside, y + 8 * i * width, narrow<T, 8>(low));
      store_if<T>(inside, y + 8 * i * width + 32, narrow<T, 8>(high));
    }
  }

  // This thread's first of a tile.
  static __device__ __forceinline__ int row() {
    return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  }

  // To this warpgroup's next tile, as if all were full; a key head's query heads are neighbours.
  __device__ __forceinline__ void move() {
    const int all = args.row_tiles * Of::rows;
    first += groups * Of::rows;
    y += groups * Of::rows * width;
    while (first >= all) {
      first -= all;
      y -= (all - args.L) * width;
    }
  }

  // By all walkers, when a head's features are there: exponents become relative to the largest.
  __device__ __forceinline__ void begin_head(int set) {
    float* const to = memory.exponents + set * Of::M;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float top = masked;
    if (threadIdx.x < Of::M) {
      const uint32_t norm = largest_norm<32>(memory.omega + set * Of::features + warp * 32 * pieces);
      if (lane == 0) {
        memory.feature_norms[warp] = norm;
      }
#pragma unroll
      for (int n = 0; n < Of::M; n += 32) {
        top = fmaxf(top, to[n + lane]);
      }
#pragma unroll
      for (int other = 1; other < 32; other *= 2) {
        top = fmaxf(top, __shfl_xor_sync(~0u, top, other));
      }
    }
    barrier_sync<1, walkers>();
    if (threadIdx.x < Of::M) {
      to[threadIdx.x] = to[threadIdx.x] - top - reference_shift;
    }
    const float norm = __uint_as_float(__reduce_max_sync(~0u, memory.feature_norms[lane % 4]));
    bound = __shfl_sync(~0u, query_bound(args.scale, norm), 0);
    of_omega = operand(memory.omega + set * Of::features);
    of_means = operand_with_ones(memory.means + set * Of::features, memory.ones);
    exponents = to;
    barrier_sync<1, walkers>();
  }

  // Of `count` tiles of a head's queries, each second from number `tile` on.
  __device__ __forceinline__ void attend(int head, int tile, int count) {
    const int query = static_cast<uint32_t>(tile) / static_cast<uint32_t>(args.row_tiles);
    first = (tile - query * args.row_tiles - groups) * Of::rows;
    y = args.out + ((static_cast<int64_t>(head) * args.queries + query) * args.L + first + row()) * width +
        threadIdx.x % 4 * 8;
    float a[64], b[64], top[2];
    begin_next(a);
    end_projection(a);
    find_top(a, top);
    weigh_half<false, 0>(a, top);
    weigh_half<false, 1>(a, top);
    round_half<0, T>(weights, a);
    round_half<1, T>(weights, a);
    if (count > 1) {
      begin_next(a);
      if (count % 2 != 0) {  // the next ones come in pairs, and one more
        step<false, true>(a, a);
        begin_next(a);
      }
#pragma unroll 1
      for (int i = 0; i < (count - 2) / 2; ++i) {
        is_bounded ? step<true, false>(a, b) : step<false, false>(a, b);
        is_bounded ? step<true, false>(b, a) : step<false, false>(b, a);
      }
      step<false, true>(a, a);
    }
    move();
    products_begin();
    start_values<T, false>(sums, total, weights, of_means);
    products_wait(sums, total);
    store_rows();
  }
};

#endif

template <typename T, typename Of>
__global__ void __launch_bounds__(threads, 1)
    many_keys_kernel(const Args<T> args, const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char bytes[];
  const KeyMemory<Of> memory(bytes);
  Place at = args.share_pieces > 0 ? Place::before_share(args) : Place::share(args, args.key_tiles);
  // In this order: the next kernels read queries before they wait, for this one alone.
  wait_for_previous();
  let_next_begin();
  if (threadIdx.x == 0) {
    for (int i = 0; i < Of::stages; ++i) {
      Barriers& of_stage = memory.barriers[i];
      barrier_prepare(&of_stage.landed, 1);
      barrier_prepare(&of_stage.ready, 32);
      barrier_prepare(&of_stage.left, walkers);
    }
    barriers_visible();
  }
  fill_ones<T>(memory.ones);
  copies_visible();
  __syncthreads();
  if (threadIdx.x >= walkers) {
    change_registers<registers, copy_registers>();
    const int warp = warp_of_four();
    if (warp == Of::preparers) {
      copy_keys(args, memory, k, v, at);
    } else {
      prepare_keys(args, memory, at, warp);
    }
    return;
  }
  change_registers<registers, walk_registers>();
  const auto fill = [&] {
    fill_projection<T, Of::M, walkers>(args.projection, at.h, memory.omega);
    copies_end();
    copies_wait<0>();
    copies_visible();
  };
  fill();
  barrier_sync<3, walkers>();
  KeySums<Of, T> sums(args, memory);
  if (at.count == 0) {
    sums.store_none(at.head);
  }
  for (int i = 0; i < at.count;) {
    if (i > 0 && args.projection.head != 0) {
      barrier_sync<3, walkers>();
      fill();
      barrier_sync<3, walkers>();
    }
    const int count = min(args.key_tiles - at.tile, at.count - i);
    sums.sum(at.head, count);
    i += count;
    at.tile = 0;
    at.next_head(args);
  }
#endif
}

template <typename T, typename Of>
__global__ void __launch_bounds__(threads, 1) many_queries_kernel(const Args<T> args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char bytes[];
  const QueryMemory<Of> memory(bytes);
  Place at = Place::share(args, args.query_steps);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Of::stages; ++i) {
      barrier_prepare(memory.landed + i, 1);       // of the warp that has copied the tile
      barrier_prepare(memory.left + i, 128 / 32);  // of the warpgroup that has had it
    }
  }
  fill_ones<T>(memory.ones);
  copies_visible();
  __syncthreads();
  if (threadIdx.x >= walkers) {
    change_registers<registers, copy_registers>();
    copy_queries(args, memory, at);
    return;
  }
  change_registers<registers, walk_registers>();
  start_projection_of(args, memory, at, 0);
  wait_for_previous();
  start_means(args, memory, at.head, 0);
  copies_end();
  const int group = warpgroup();
  QueryRows<Of, T> rows(args, memory, group);
  for (int i = 0, set = 0; i < at.count; set ^= 1) {
    copies_wait<0>();
    copies_visible();
    barrier_sync<1, walkers>();  // this head's are there, and everyone has left those of the head before
    rows.begin_head(set);
    const int count = min(args.query_steps - at.tile, at.count - i), skipped = (i + group) % groups;
    const int head = at.head, tile = at.tile + skipped, own = (count - skipped + groups - 1) / groups;
    i += count;
    at.tile = 0;
    at.next_head(args);
    if (i < at.count) {
      start_projection_of(args, memory, at, set ^ 1);
      start_means(args, memory, at.head, set ^ 1);
      copies_end();
    }
    if (own > 0) {
      rows.attend(head, tile, own);
    }
  }
#endif
}

}  // namespace

template <typename T, int M>
bool sum_many_keys(const Args<T>& args, int blocks, int device, cudaStream_t stream) {
  using Of = KeyPlan<M>;
  static_assert(Of::keys == 128);
  CUtensorMap k, v;
  const int64_t B = args.heads / args.Hk;
  if (!map_tiles(k, args.k, B, args.Hk, args.S, Of::keys) || !map_tiles(v, args.v, B, args.Hk, args.S, Of::keys)) {
    return false;
  }
  const auto kernel = many_keys_kernel<T, Of>;
  allow_memory<Of>(kernel, device);
  launch(kernel, blocks, threads, Of::bytes, stream, true, args, k, v);
  return true;
}

template <typename T, int M>
void attend_many(Args<T> args, int multiprocessors, int device, cudaStream_t stream) {
  using Of = QueryPlan<M>;
  args.query_steps = args.queries * args.row_tiles;
  const auto kernel = many_queries_kernel<T, Of>;
  allow_memory<Of>(kernel, device);
  launch(kernel, std::min(int64_t{args.heads} * args.query_steps, int64_t{multiprocessors}), threads, Of::bytes, stream,
         true, args);
}

template bool sum_many_keys<BFloat16, 128>(const Args<BFloat16>&, int, int, cudaStream_t);
template void attend_many<BFloat16, 128>(Args<BFloat16>, int, int, cudaStream_t);

}  // namespace linear
}  // namespace fastrpe
