#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#include "linear_attention.cuh"

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
constexpr uint32_t row_bytes = 16 * pieces;

// In units of 16 bytes but for the last.
template <int Features>
struct KeyPlan {
  static constexpr int M = Features;
  static constexpr int features = M * pieces;  // of a matrix of M rows
  static constexpr int keys = 128;             // of a tile
  static constexpr int matrix = keys * pieces;
  static constexpr int stage = 2 * matrix;
  static constexpr int stages = 6, ahead = 3;  // tiles, and of them under way
  static constexpr size_t bytes =
      16 * (features + stages * stage) + sizeof(float) * stages * keys + sizeof(uint64_t) * 2 * stages;
  static_assert(M == 64 * groups && bytes + 1024 <= 228 * 1024);
};

template <int Features>
struct QueryPlan {
  static constexpr int M = Features;
  static constexpr int features = M * pieces;
  static constexpr int rows = 64;  // queries of a tile
  static constexpr int matrix = rows * pieces;
  static constexpr int stages = 16, ahead = 10;
  static constexpr size_t bytes =
      16 * (4 * features + stages * matrix) + sizeof(float) * 2 * M + sizeof(uint64_t) * (2 * stages + 2);
  static_assert(M == 128 && stages % groups == 0 && bytes + 1024 <= 228 * 1024);
};

template <typename Of>
struct KeyMemory {
  uint4 *omega, *stages;
  float* key_bias;
  uint64_t *landed, *left;  // a tile is there, with its biases; it is no longer needed

  __device__ __forceinline__ explicit KeyMemory(char* at)
      : omega(reinterpret_cast<uint4*>(at)),
        stages(omega + Of::features),
        key_bias(reinterpret_cast<float*>(stages + Of::stages * Of::stage)),
        landed(reinterpret_cast<uint64_t*>(key_bias + Of::stages * Of::keys)),
        left(landed + Of::stages) {}
};

// Two projections and sets of means and exponents, of neighbouring heads.
template <typename Of>
struct QueryMemory {
  uint4 *omega, *means, *ring;
  float* exponents;
  uint64_t *landed, *left;  // a tile is there, with what its head needs; it is no longer needed
  uint64_t* done;           // what a head needs is no longer needed

  __device__ __forceinline__ explicit QueryMemory(char* at)
      : omega(reinterpret_cast<uint4*>(at)),
        means(omega + 2 * Of::features),
        ring(means + 2 * Of::features),
        exponents(reinterpret_cast<float*>(ring + Of::stages * Of::matrix)),
        landed(reinterpret_cast<uint64_t*>(exponents + 2 * Of::M)),
        left(landed + Of::stages),
        done(left + Of::stages) {}
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// This thread's warpgroup, in a way that tells the compiler that a warp's threads agree.
__device__ __forceinline__ int warpgroup() {
  return __shfl_sync(~0u, threadIdx.x / 128, 0);
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

// sums (= or +=) weights values, in the background.
template <typename T, bool Add>
__device__ __forceinline__ void start_values(float (&sums)[32], const uint32_t (&weights)[8][4], uint64_t values) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    multiply<T, Inner::b>(sums, weights[n], further(values, n * 16 * row_bytes), Add || n > 0);
  }
  products_end();
}

// s becomes the weights 2^(s - top); total += what they add up to.
__device__ __forceinline__ void weigh(float (&s)[64], const float (&top)[2], float (&total)[2]) {
#pragma unroll
  for (int n = 0; n < 32; ++n) {
    float &x = s[2 * n], &y = s[2 * n + 1];
    x = exp2_approximate(x - top[n % 2]);
    y = exp2_approximate(y - top[n % 2]);
    total[n % 2] += x + y;
  }
  pin(s);
}

template <typename T>
__device__ __forceinline__ void round_weights(uint32_t (&weights)[8][4], const float (&s)[64]) {
#pragma unroll
  for (int n = 0; n < 32; ++n) {
    weights[n / 4][n % 4] = pack<T>(s[2 * n], s[2 * n + 1]);
  }
}

// The warpgroup that copies a block's keys and values, tile by tile. A warp has 32 rows, a thread a piece of each
// fourth.
template <typename Of, typename T>
struct KeyCopies {
  static constexpr int step = 32 / pieces, count = 32 / step;

  const Args<T>& args;
  const KeyMemory<Of>& memory;
  Place at;        // the next tile's head
  int first, row;  // its first key, and this thread's first row of a tile
  const T *k, *v;  // this thread's first pieces

  __device__ __forceinline__ KeyCopies(const Args<T>& args, const KeyMemory<Of>& memory, const Place& at)
      : args(args),
        memory(memory),
        at(at),
        first(at.tile * Of::keys),
        row(threadIdx.x % 128 / 32 * 32 + threadIdx.x % 32 / pieces) {
    find();
  }

  __device__ __forceinline__ void find() {
    const int64_t key = first + row;
    const int u = threadIdx.x % pieces;
    k = args.k.at(at.b, at.h) + key * args.k.l + u * 8;
    v = args.v.at(at.b, at.h) + key * args.v.l + u * 8;
  }

  __device__ __forceinline__ void start(int stage) {
    uint32_t inside = ~0u;
    if (first + Of::keys > args.S || args.mask != nullptr) {
      inside = 0;
#pragma unroll
      for (int n = 0; n < count; ++n) {
        inside |= takes_part(args, at.b, first + row + n * step) ? 1u << n : 0u;
      }
    }
    uint4* to = memory.stages + stage * Of::stage;
    copy(k, args.k.l, inside, to);
    copy(v, args.v.l, inside, to + Of::matrix);
    first += Of::keys;
    if (first >= args.S) {
      first = 0;
      at.next_head(args);
      find();
    } else {
      k += Of::keys * args.k.l;
      v += Of::keys * args.v.l;
    }
  }

  __device__ __forceinline__ void copy(const T* from, int64_t stride, uint32_t inside, uint4* to) const {
    // A step of 4 rows changes a bit of the swizzle, since the first row is less than 4 modulo 8.
    const int even = piece(row, threadIdx.x % pieces), odd = even ^ 4;
#pragma unroll
    for (int n = 0; n < count; ++n) {
      copy_async<16>(to + (n % 2 == 0 ? even : odd) + n * step * pieces, from, inside >> n & 1);
      from += step * stride;
    }
  }

  // The exponents that a warp's keys add to their projections.
  __device__ __forceinline__ void fill_bias(int stage, int b, int first) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int own = threadIdx.x % 128 / 32 * 32 + half * 16, key = own + lane / 4;
      float norms[2] = {0, 0};
      if (args.norm != 0) {
        find_norms<T>(memory.stages + stage * Of::stage + own * pieces, norms);
      }
      if (lane % 4 == lane / 8) {
        float* to = memory.key_bias + stage * Of::keys + key;
        to[0] = takes_part(args, b, first + key) ? norms[0] * args.norm : masked;
        to[8] = takes_part(args, b, first + key + 8) ? norms[1] * args.norm : masked;
      }
    }
  }

  // The first tiles' copies are under way, a group for each.
  __device__ __forceinline__ void walk(const Place& begin) {
    Turn<Of::stages> turn, next;
    next.move(Of::ahead);
    Place place = begin;
    for (int i = 0; i < begin.count; ++i) {
      copies_wait<Of::ahead - 1>();
      copies_visible();
      __syncwarp();
      fill_bias(turn.at, place.b, place.tile * Of::keys);
      warp_arrive(memory.landed + turn.at);
      turn.move();
      if (++place.tile == args.key_tiles) {
        place.tile = 0;
        place.next_head(args);
      }
      if (i + Of::ahead < begin.count) {
        barrier_wait(memory.left + next.at, next.parity ^ 1);
        start(next.at);
        next.move();
      }
      copies_end();
    }
  }
};

// A warpgroup for 64 features: their sums over a block's tiles of keys, relative to 2^c.
template <typename Of, typename T>
struct KeySums {
  const Args<T>& args;
  const KeyMemory<Of>& memory;
  const uint64_t of_omega, all_keys, all_values;
  int before = 0, now = 0;  // stages
  Turn<Of::stages> next;
  float kv[32], z[2], c[2];
  uint32_t weights[8][4];  // of the tile before

  __device__ __forceinline__ KeySums(const Args<T>& args, const KeyMemory<Of>& memory)
      : args(args),
        memory(memory),
        of_omega(operand(memory.omega + warpgroup() * 64 * pieces)),
        all_keys(operand(memory.stages)),
        all_values(operand(memory.stages + Of::matrix)) {}

  __device__ __forceinline__ void move() {
    before = now;
    now = next.at;
    next.move();
  }

  __device__ __forceinline__ void wait_for_next() const {
    barrier_wait(memory.landed + next.at, next.parity);
  }

  __device__ __forceinline__ void project_next(float (&s)[64]) const {
    start_projection<T>(s, of_omega, further(all_keys, next.at * (16 * Of::stage)));
  }

  __device__ __forceinline__ void add_values(int stage) {
    start_values<T, true>(kv, weights, further(all_values, stage * (16 * Of::stage)));
  }

  __device__ __forceinline__ void begin_next(float (&s)[64]) {
    wait_for_next();
    products_begin();
    project_next(s);
    products_wait(s);
    move();
  }

  // The weights of this tile. What comes to factor is for kv, which may not be there yet, if `grows`.
  template <bool Bounded>
  __device__ __forceinline__ void make_weights(float (&s)[64], float limit, bool& grows, float (&factor)[2]) {
    add_exponents(s, args.scale, memory.key_bias + now * Of::keys);
    if constexpr (!Bounded) {
      float top[2] = {masked, masked};
      find_largest(s, top);
      largest_of_four(top);
      grows = __any_sync(~0u, top[0] > c[0] + limit || top[1] > c[1] + limit);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float next = grows ? fmaxf(c[n], top[n]) : c[n];
        factor[n] = exp2_approximate(c[n] - next);
        c[n] = next;
        z[n] *= factor[n];
      }
    }
    weigh(s, c, z);
  }

  // The values of the tile before, the weights of this one, the next one's projection; its place becomes this one's.
  template <bool Bounded, bool Last>
  __device__ __forceinline__ void step(float (&s)[64], float (&ahead)[64], float limit) {
    if constexpr (!Last) {
      wait_for_next();
    }
    products_begin();
    add_values(before);
    if constexpr (!Last) {
      project_next(ahead);
    }
    bool grows = false;
    float factor[2];
    make_weights<Bounded>(s, limit, grows, factor);
    products_wait(kv);
    pin(s);
    if constexpr (!Last) {
      pin(ahead);
    }
    warp_arrive(memory.left + before);
    round_weights<T>(weights, s);
    if (!Bounded && grows) {
      rescale(kv, factor);
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

  // The sums over a head's next `count` tiles, to this block's slot.
  __device__ __forceinline__ void sum(int head, int count) {
#pragma unroll
    for (float& x : kv) {
      x = 0;
    }
    z[0] = z[1] = 0;
    c[0] = c[1] = empty;
    float a[64], b[64];
    begin_next(a);
    bool grows;
    float factor[2];
    make_weights<false>(a, Range<T>::limit, grows, factor);
    round_weights<T>(weights, a);
    // The warps of a warpgroup take the same way, since they start products together.
    bool is_far = args.norm == 0 || !bounds<T>(memory.omega, c);
    if (threadIdx.x < 128) {
      is_far = barrier_or<1, 128>(is_far);
    } else {
      is_far = barrier_or<2, 128>(is_far);
    }
    is_far = __any_sync(~0u, is_far);  // which tells the compiler that a warp's threads agree
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
    products_wait(kv);
    warp_arrive(memory.left + now);
    store_part<Of::M>(args, head, kv, z, c);
  }
};

// The warpgroup that copies a block's queries, and what a head's need. A thread has a piece of each sixteenth row.
template <typename Of, typename T>
struct QueryCopies {
  const Args<T>& args;
  const QueryMemory<Of>& memory;
  Place at;        // of the next tile
  QueryTile tile;  // the same
  int number = 0;  // of its head, in this block

  __device__ __forceinline__ QueryCopies(const Args<T>& args, const QueryMemory<Of>& memory, const Place& at)
      : args(args), memory(memory), at(at), tile(args, at.tile) {}

  // The means are there when the kernel before has ended.
  __device__ __forceinline__ void start_head() const {
    const int set = number % 2;
    fill_projection<T, Of::M, 128>(args.projection, at.h, memory.omega + set * Of::features);
    const T* from = args.means + static_cast<int64_t>(at.head) * Of::features * 8;
    uint4* to = memory.means + set * Of::features;
#pragma unroll
    for (int n = threadIdx.x; n < Of::features; n += 128) {
      copy_async<16>(to + piece(n / pieces, n % pieces), from + n * 8, true);
    }
    copy_async<4>(memory.exponents + set * Of::M + threadIdx.x,
                  args.exponents + static_cast<int64_t>(at.head) * Of::M + threadIdx.x, true);
  }

  __device__ __forceinline__ void start(int stage) {
    fetch<128, Of::rows>(args.q.at(at.b, at.h * args.queries + tile.head), args.q.l, tile.row * Of::rows,
                         memory.ring + stage * Of::matrix, [&](int row) { return row < args.L; });
    tile.move(args, 1);
    if (++at.tile == args.query_steps) {
      at.tile = 0;
      at.next_head(args);
      tile = QueryTile(args, 0);
      ++number;
    }
  }

  // The same, of a tile that may be a head's first. All tiles of the head before the last have landed then, for a head
  // has as many as are under way.
  __device__ __forceinline__ void start_next(int stage) {
    if (at.tile == 0) {
      if (number > 1) {
        barrier_wait(memory.done + number % 2, (number / 2 + 1) % 2);
      }
      start_head();
    }
    start(stage);
  }

  __device__ __forceinline__ void walk(int count) {
    const QueryCopies first = *this;
    int started = 0;
    for (; started < min(Of::ahead, count) && number == 0; ++started) {
      start(started);
    }
    wait_for_previous();
    first.start_head();
    for (; started < min(Of::ahead, count); ++started) {
      start_next(started);
    }
    copies_end();
    Turn<Of::stages> turn, next;
    next.move(Of::ahead);
    for (int i = 0; i < count; ++i) {
      if (i == 0) {
        copies_wait<0>();
      } else {
        copies_wait<Of::ahead - 1>();
      }
      copies_visible();
      warp_arrive(memory.landed + turn.at);
      turn.move();
      if (i + Of::ahead < count) {
        barrier_wait(memory.left + next.at, next.parity ^ 1);
        start_next(next.at);
        next.move();
      }
      copies_end();
    }
  }
};

// A warpgroup that makes the rows of every second tile of a block's.
template <typename Of, typename T>
struct QueryRows {
  const Args<T>& args;
  const QueryMemory<Of>& memory;
  const uint64_t all_rows;
  uint64_t of_omega, of_means;
  const float* exponents;
  Turn<Of::stages> next;
  int row;  // of the tile before, this thread's first, and where it goes
  T* y;
  float sums[32], total[2];
  uint32_t weights[8][4];

  __device__ __forceinline__ QueryRows(const Args<T>& args, const QueryMemory<Of>& memory, int group)
      : args(args), memory(memory), all_rows(operand(memory.ring)) {
    next.move(group);
  }

  __device__ __forceinline__ void wait_for_next() const {
    barrier_wait(memory.landed + next.at, next.parity);
  }

  __device__ __forceinline__ void project_next(float (&s)[64]) const {
    start_projection<T>(s, further(all_rows, next.at * (16 * Of::matrix)), of_omega);
  }

  __device__ __forceinline__ void leave_next() {
    warp_arrive(memory.left + next.at);
    next.move(groups);
  }

  __device__ __forceinline__ void begin_next(float (&s)[64]) {
    wait_for_next();
    products_begin();
    project_next(s);
    products_wait(s);
    leave_next();
  }

  __device__ __forceinline__ void make_weights(float (&s)[64], float (&sum)[2]) const {
    float top[2] = {masked, masked};
    add_exponents(s, args.scale, exponents, top);
    largest_of_four(top);
    sum[0] = sum[1] = 0;
    weigh(s, top, sum);
  }

  // The rows of the tile before, the weights of this one, the projection of the next.
  template <bool Last>
  __device__ __forceinline__ void step(float (&s)[64], float (&ahead)[64]) {
    if constexpr (!Last) {
      wait_for_next();
    }
    products_begin();
    start_values<T, false>(sums, weights, of_means);
    if constexpr (!Last) {
      project_next(ahead);
    }
    float sum[2];
    make_weights(s, sum);
    products_wait(sums);
    pin(s);
    if constexpr (!Last) {
      pin(ahead);
      leave_next();
    }
    round_weights<T>(weights, s);
    store_rows();
    total[0] = sum[0];
    total[1] = sum[1];
  }

  // Of the tile before, which becomes the next of this warpgroup's.
  __device__ __forceinline__ void store_rows() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float inverse = __fdividef(1, sum_of_four(total[i]));
      float low[8], high[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        low[j] = sums[j / 2 * 4 + 2 * i + j % 2] * inverse;
        high[j] = sums[16 + j / 2 * 4 + 2 * i + j % 2] * inverse;
      }
      if (row + 8 * i < args.L) {
        store<T, 8>(y + 8 * i * width, narrow<T, 8>(low));
        store<T, 8>(y + 8 * i * width + 32, narrow<T, 8>(high));
      }
    }
    move(groups * Of::rows);
  }

  // By a number of rows as if all tiles were full; a key head's query heads are neighbours.
  __device__ __forceinline__ void move(int rows) {
    const int all = args.row_tiles * Of::rows;
    row += rows;
    y += rows * width;
    while (row >= all) {
      row -= all;
      y -= (all - args.L) * width;
    }
  }

  // Of `count` tiles of a head's queries, each second from number `tile` on, with the block's head `number`.
  __device__ __forceinline__ void attend(int head, int number, int tile, int count) {
    const int set = number % 2;
    of_omega = operand(memory.omega + set * Of::features);
    of_means = operand(memory.means + set * Of::features);
    exponents = memory.exponents + set * Of::M;
    row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    y = args.out + (static_cast<int64_t>(head) * args.queries * args.L + row) * width + threadIdx.x % 4 * 8;
    const int query = static_cast<uint32_t>(tile) / static_cast<uint32_t>(args.row_tiles);
    y += static_cast<int64_t>(query) * args.L * width;
    move((tile - query * args.row_tiles) * Of::rows);
    float a[64], b[64];
    begin_next(a);
    make_weights(a, total);
    round_weights<T>(weights, a);
    if (count > 1) {
      begin_next(a);
      if (count % 2 != 0) {  // the next ones come in pairs, and one more
        step<true>(a, a);
        begin_next(a);
      }
#pragma unroll 1
      for (int i = 0; i < (count - 2) / 2; ++i) {
        step<false>(a, b);
        step<false>(b, a);
      }
      step<true>(a, a);
    }
    products_begin();
    start_values<T, false>(sums, weights, of_means);
    products_wait(sums);
    store_rows();
  }
};

#endif

template <typename T, typename Of>
__global__ void __launch_bounds__(threads, 1) many_keys_kernel(const Args<T> args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char bytes[];
  const KeyMemory<Of> memory(bytes);
  Place at = Place::share(args, args.key_tiles);
  // In this order: the next kernels read queries before they wait, for this one alone.
  wait_for_previous();
  let_next_begin();
  if (threadIdx.x >= walkers) {
    KeyCopies<Of, T> copies(args, memory, at);
    for (int i = 0; i < Of::ahead; ++i) {
      if (i < at.count) {
        copies.start(i);
      }
      copies_end();
    }
    __syncthreads();
    change_registers<registers, copy_registers>();
    copies.walk(at);
    return;
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < Of::stages; ++i) {
      barrier_prepare(memory.landed + i, (threads - walkers) / 32);
      barrier_prepare(memory.left + i, walkers / 32);
    }
  }
  const auto fill = [&] {
    fill_projection<T, Of::M, walkers>(args.projection, at.h, memory.omega);
    copies_end();
    copies_wait<0>();
    copies_visible();
  };
  fill();
  __syncthreads();
  change_registers<registers, walk_registers>();
  KeySums<Of, T> sums(args, memory);
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
      barrier_prepare(memory.landed + i, (threads - walkers) / 32);
      barrier_prepare(memory.left + i, 128 / 32);  // of the warpgroup that has had the tile
    }
    barrier_prepare(memory.done, walkers / 32);
    barrier_prepare(memory.done + 1, walkers / 32);
  }
  __syncthreads();
  if (threadIdx.x < threads - walkers) {
    change_registers<registers, copy_registers>();
    QueryCopies<Of, T>(args, memory, at).walk(at.count);
    return;
  }
  change_registers<registers, walk_registers>();
  wait_for_previous();
  const int group = warpgroup() - 1;
  QueryRows<Of, T> rows(args, memory, group);
  for (int i = 0, number = 0; i < at.count; ++number) {
    const int count = min(args.query_steps - at.tile, at.count - i), skipped = (i + group) % groups;
    const int own = (count - skipped + groups - 1) / groups;
    if (own > 0) {
      rows.attend(at.head, number, at.tile + skipped, own);
    }
    i += count;
    if (i < at.count) {  // not for a last head that this warpgroup may have nothing of: it would not have waited for it
      warp_arrive(memory.done + number % 2);
    }
    at.tile = 0;
    at.next_head(args);
  }
#endif
}

}  // namespace

template <typename T, int M>
void sum_many_keys(const Args<T>& args, int device, cudaStream_t stream) {
  using Of = KeyPlan<M>;
  static_assert(Of::keys == 128);
  const auto kernel = many_keys_kernel<T, Of>;
  allow_memory<Of>(kernel, device);
  launch(kernel, args.key_blocks, threads, Of::bytes, stream, true, args);
}

template <typename T, int M>
void attend_many(Args<T> args, int multiprocessors, int device, cudaStream_t stream) {
  using Of = QueryPlan<M>;
  static_assert(Of::ahead <= least_row_tiles);
  args.query_steps = args.queries * args.row_tiles;
  const auto kernel = many_queries_kernel<T, Of>;
  allow_memory<Of>(kernel, device);
  launch(kernel, std::min(int64_t{args.heads} * args.query_steps, int64_t{multiprocessors}), threads, Of::bytes, stream,
         true, args);
}

template void sum_many_keys<BFloat16, 128>(const Args<BFloat16>&, int, cudaStream_t);
template void attend_many<BFloat16, 128>(Args<BFloat16>, int, int, cudaStream_t);

}  // namespace linear
}  // namespace fastrpe
