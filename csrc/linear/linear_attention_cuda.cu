#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>

#include "linear_attention_cuda.h"
#include "linear_attention_sums.cuh"

// Attention of exponential features on Hopper's tensor cores: softmax attention twice. Features attend over keys,
// a warpgroup for each 64 features, with the running maximum of a feature's exponents kept out of its sums; then
// queries attend over features, 64 rows to a warpgroup, with the mean value of each feature and the logarithm of its
// weight.
//
// Three kernels, each of which may begin while whatever is before it ends: one for the keys of all heads, as many tiles
// to a block as to another, across heads, with a slot for the sums that a block has of a head; one that adds them; one
// for the queries of all heads, divided in the same way. Short heads take one kernel with a block for each; those
// of one tile that need no state, head_attention. Exponents are in base 2.
namespace fastrpe {
namespace linear {
namespace {

enum class Pass { keys, queries };

// Shared memory is in units of 16 bytes; rows of 128 bytes are swizzled.
template <Pass Kernel, int Features>
struct Plan {
  static constexpr Pass pass = Kernel;
  static constexpr int M = Features;
  static constexpr int threads = 2 * M;         // a warpgroup for each 64 features
  static constexpr int groups = threads / 128;  // warpgroups
  static constexpr int blocks = 4 / groups;     // of a multiprocessor
  static constexpr int features = M * pieces;   // of a matrix of M rows
  static constexpr int matrices = pass == Pass::keys ? 1 : 3;
  static constexpr int keys = M == 64 ? 64 : 128;  // of a tile
  static constexpr int stage = 2 * keys * pieces;
  static constexpr int stages = M == 64 ? 2 : M == 128 ? 3 : 6;
  static constexpr int rows = 64;               // queries of a tile
  static constexpr int ring = M == 64 ? 3 : 4;  // tiles of a warpgroup
  static constexpr int rings = groups * ring * rows * pieces;
  static constexpr int pool = pass == Pass::queries ? rings : stages * stage;
  // Whether a tile's biases are made during the tile before.
  static constexpr bool ahead = pass == Pass::keys && M == 128;
  static constexpr int biases = ahead ? 2 * keys : keys;
  static constexpr int floats = pass == Pass::keys ? biases : 2 * M;
  static constexpr size_t bytes = 16 * (matrices * features + pool) + sizeof(float) * floats;
  static_assert(blocks * (bytes + 1024) <= 228 * 1024);
};

// Queries have two sets of means and exponents, of neighbouring heads.
template <typename Of>
struct Memory {
  uint4 *omega, *means, *pool;
  float *exponents, *key_bias;

  __device__ __forceinline__ explicit Memory(char* at)
      : omega(reinterpret_cast<uint4*>(at)),
        means(omega + Of::features),
        pool(omega + Of::matrices * Of::features),
        exponents(reinterpret_cast<float*>(pool + Of::pool)),
        key_bias(exponents) {}

  __device__ __forceinline__ uint4* means_of(int head) const {
    return means + head % 2 * Of::features;
  }

  __device__ __forceinline__ float* exponents_of(int head) const {
    return exponents + head % 2 * Of::M;
  }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ void rescale(float (&sums)[32], float (&total)[2], const float (&factor)[2]) {
  linear::rescale(sums, factor);
  total[0] *= factor[0];
  total[1] *= factor[1];
}

// sums (= or +=) 2^(s - top) values, in the background, and total += the weights, as they are rounded if so; `values`
// has a row for each column of s.
template <typename T, bool Rounded, int R>
__device__ __forceinline__ void add_values(float (&sums)[32], float (&total)[2], const float (&s)[R],
                                           const float (&top)[2], const uint4* values, bool add) {
  const uint64_t of_values = operand(values);
  uint32_t weights[R / 8][4];
#pragma unroll
  for (int n = 0; n < R / 8; ++n) {
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const float x = exp2_approximate(s[8 * n + 2 * m] - top[m % 2]);
      const float y = exp2_approximate(s[8 * n + 2 * m + 1] - top[m % 2]);
      weights[n][m] = pack<T>(x, y);
      total[m % 2] += Rounded ? sum_of_pair<T>(weights[n][m]) : x + y;
    }
  }
  products_begin();
#pragma unroll
  for (int n = 0; n < R / 8; ++n) {
    multiply<T, Inner::b>(sums, weights[n], further(of_values, n * 16 * 16 * pieces), add || n > 0);
  }
  products_end();
}

// Copies of this block's keys and values, tile by tile; a thread has a piece of each step-th row. Where biases are made
// ahead, a warp copies the 16 rows whose biases it makes.
template <typename Of, typename T>
struct KeyCopies {
  static constexpr int step = Of::ahead ? 4 : Of::threads / pieces, count = Of::keys * pieces / Of::threads;
  static_assert(!Of::ahead || step * count == 16);

  const Args<T>& args;
  Place at;        // the next tile's head
  int first, row;  // its first key, and this thread's first row of a tile
  const T *k, *v;  // this thread's first pieces

  __device__ __forceinline__ KeyCopies(const Args<T>& args, const Place& at)
      : args(args),
        at(at),
        first(at.tile * Of::keys),
        row(Of::ahead ? threadIdx.x / 32 * 16 + threadIdx.x % 32 / pieces : threadIdx.x / pieces) {
    find();
  }

  __device__ __forceinline__ void find() {
    const int64_t key = first + row;
    const int u = threadIdx.x % pieces;
    k = args.k.at(at.b, at.h) + key * args.k.l + u * 8;
    v = args.v.at(at.b, at.h) + key * args.v.l + u * 8;
  }

  __device__ __forceinline__ void start(uint4* stage) {
    uint32_t inside = ~0u;
    if (first + Of::keys > args.S || args.mask != nullptr) {
      inside = 0;
#pragma unroll
      for (int n = 0; n < count; ++n) {
        inside |= takes_part(args, at.b, first + row + n * step) ? 1u << n : 0u;
      }
    }
    copy(k, args.k.l, inside, stage);
    copy(v, args.v.l, inside, stage + Of::stage / 2);
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
    // A step of 8 rows keeps the swizzle; one of 4 changes a bit, since the first row is then less than 4 modulo 8.
    const int even = piece(row, threadIdx.x % pieces), odd = step % 8 == 0 ? even : even ^ 4;
#pragma unroll
    for (int n = 0; n < count; ++n) {
      copy_async<16>(to + (n % 2 == 0 ? even : odd) + n * step * pieces, from, inside >> n & 1);
      from += step * stride;
    }
  }
};

// Squared norms of 16 rows by a warp: lane (g, t) = (lane / 4, lane % 4), with t = g / 2, has those of rows g and g
// + 8. They are the diagonal of the rows' products with one another.
template <typename T>
__device__ __forceinline__ void find_norms(const uint4* rows, float (&norms)[2]) {
  const int lane = threadIdx.x % 32;
  const bool is_odd = lane / 4 % 2;
  float low[4] = {}, high[4] = {};  // with rows 0 to 7, and with 8 to 15
#pragma unroll
  for (int n = 0; n < width / 16; ++n) {
    uint32_t a[4];
    load_matrices<false>(a, rows + piece(lane % 16, 2 * n + lane / 16));
    multiply_warp<T>(low, a, a[0], a[2]);
    multiply_warp<T>(high, a, a[1], a[3]);
  }
  norms[0] = is_odd ? low[1] : low[0];
  norms[1] = is_odd ? high[3] : high[2];
}

// The exponents that keys add to their projections, for 16 keys that this warp has copied.
template <typename T>
__device__ __forceinline__ void fill_key_bias(const Args<T>& args, const uint4* k, int b, int first, float* to) {
  const int own = threadIdx.x / 32 * 16, key = own + threadIdx.x % 32 / 4;
  float norms[2] = {0, 0};
  if (args.norm != 0) {
    find_norms<T>(k + own * pieces, norms);
  }
  if (threadIdx.x % 4 == threadIdx.x % 32 / 8) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      to[key + 8 * i] = takes_part(args, b, first + key + 8 * i) ? norms[i] * args.norm : masked;
    }
  }
}

// The sums of this block's tiles of keys over a warpgroup's 64 features, relative to 2^c, stored where a head ends.
template <typename Of, typename T>
__device__ __forceinline__ void sum_keys(const Args<T>& args, const Memory<Of>& memory) {
  Place at = args.share_pieces > 0 ? Place::before_share(args) : Place::share(args, args.key_tiles);
  const int count = at.count;
  float kv[32], z[2] = {0, 0}, c[2] = {empty, empty};
#pragma unroll
  for (float& x : kv) {
    x = 0;
  }
  if (count == 0) {
    store_part<Of::M>(args, at.head, kv, z, c);
    return;
  }
  KeyCopies<Of, T> copies(args, at);
  int first = copies.first;  // of the products' tile
  // Whether no exponent of the head is far above c; whether the head has just begun.
  bool is_bounded = false, is_fresh = true;
  const auto stage_of = [&](int i) { return memory.pool + i % Of::stages * Of::stage; };
  const auto start_copy = [&](int i) {
    if (i < count) {
      copies.start(stage_of(i));
    }
  };
  // Of tile i, from this head's key `first` on.
  const auto fill_bias_ahead = [&](int i) {
    __syncwarp();  // all of the warp's copies have landed
    fill_key_bias(args, stage_of(i), at.b, first, memory.key_bias + i % 2 * Of::keys);
    copies_visible();
  };
  start_copy(0);
  fill_projection<T, Of::M, Of::threads>(args.projection, at.h, memory.omega);
  copies_end();
  for (int i = 1; i < Of::stages; ++i) {
    start_copy(i);
    copies_end();
  }
  if constexpr (Of::ahead) {
    copies_wait<Of::stages - 1>();
    fill_bias_ahead(0);
  }
  for (int i = 0; i < count; ++i) {
    const uint4* stage = stage_of(i);
    float* key_bias = memory.key_bias + (Of::ahead ? i % 2 * Of::keys : 0);
    if constexpr (!Of::ahead) {
      if (i == 0) {
        copies_wait<Of::stages - 1>();
      } else {
        copies_wait<Of::stages - 2>();
      }
      copies_visible();
    }
    __syncthreads();  // this stage is there, and everyone has left the one before
    if (args.projection.head != 0 && first == 0 && i > 0) {
      fill_projection<T, Of::M, Of::threads>(args.projection, at.h, memory.omega);
      copies_end();
      copies_wait<0>();
      copies_visible();
      __syncthreads();
    }
    if (i > 0) {
      start_copy(i - 1 + Of::stages);
      copies_end();
    }
    float s[Of::keys / 2];
    project<T>(s, memory.omega + threadIdx.x / 128 * 64 * pieces, stage);
    if constexpr (!Of::ahead) {
      each_key_bias<Of::threads, Of::keys>(args, stage, at.b, first, [&](int key, int part, float bias) {
        if (part == 0) {
          key_bias[key] = bias;
        }
      });
      __syncthreads();
    }
    products_wait(s);
    add_exponents(s, args.scale, key_bias);
    if (!is_bounded) {
      float top[2] = {masked, masked};
      find_largest(s, top);
      largest_of_four(top);
      if (__any_sync(~0u, top[0] > c[0] + Range<T>::limit || top[1] > c[1] + Range<T>::limit)) {
        float factor[2];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const float next = fmaxf(c[n], top[n] - Range<T>::shift);
          factor[n] = exp2_approximate(c[n] - next);
          c[n] = next;
        }
        rescale(kv, z, factor);
      }
      if (std::is_same_v<T, BFloat16> && is_fresh && args.norm != 0) {
        // bfloat16 has room for what is not far above c, so that maxima need not be looked for any more.
        constexpr float room = 64;
        float bounds[2];
        find_bounds<T>(memory.omega, bounds);
        is_bounded = !__any_sync(~0u, c[0] < bounds[0] - room || c[1] < bounds[1] - room);
      }
      is_fresh = false;
    }
    add_values<T, true>(kv, z, s, c, stage + Of::stage / 2, true);
    const int head = at.head;
    first += Of::keys;
    const bool is_end = first >= args.S || i == count - 1;
    if (is_end) {
      first = 0;
      at.next_head(args);
    }
    if (Of::ahead && i + 1 < count) {
      copies_wait<Of::stages - 2>();
      fill_bias_ahead(i + 1);
    }
    products_wait(kv);
    if (is_end) {
      sum_of_four(z);
      store_part<Of::M>(args, head, kv, z, c);
      is_bounded = false;
      is_fresh = true;
      c[0] = c[1] = empty;
      z[0] = z[1] = 0;
#pragma unroll
      for (float& x : kv) {
        x = 0;
      }
    }
  }
}

// A tile of a key head's queries: rows from 64 `row` on of one of its query heads; none past the last of these.
struct QueryTile {
  int head, row;

  template <typename T>
  __device__ __forceinline__ QueryTile(const Args<T>& args, int number) : head(0), row(number) {
    move(args, 0);
  }

  template <typename T>
  __device__ __forceinline__ void move(const Args<T>& args, int tiles) {
    row += tiles;
    while (row >= args.row_tiles && head < args.queries) {
      row -= args.row_tiles;
      ++head;
    }
  }
};

// This block's tiles of queries, one of a head for each warpgroup at a time; a ring of them in shared memory.
template <typename Of, typename T>
struct Queries {
  const Args<T>& args;
  uint4* ring;
  int head, step, count;  // where the products are
  Place at;               // where the copies are
  QueryTile tile, next;   // of the products, and of the copies

  __device__ __forceinline__ Queries(const Args<T>& args, uint4* rings)
      : args(args),
        ring(rings + threadIdx.x / 128 * Of::ring * Of::rows * pieces),
        at(Place::share(args, args.query_steps)),
        tile(args, at.tile * Of::groups + threadIdx.x / 128),
        next(tile) {
    head = at.head;
    step = at.tile;
    count = at.count;
  }

  // Copies come in order.
  __device__ __forceinline__ void start_copy(int n) {
    if (n < count) {
      if (next.head < args.queries) {
        fetch<128, Of::rows>(args.q.at(at.b, at.h * args.queries + next.head), args.q.l, next.row * Of::rows,
                             ring + n % Of::ring * Of::rows * pieces, [&](int row) { return row < args.L; });
      }
      ++at.tile;
      next.move(args, Of::groups);
      if (at.tile == args.query_steps) {
        at.tile = 0;
        at.next_head(args);
        next = QueryTile(args, threadIdx.x / 128);
      }
    }
  }

  __device__ __forceinline__ void start_copies(int from, int to) {
    for (int n = from; n < to; ++n) {
      start_copy(n);
      copies_end();
    }
  }

  __device__ __forceinline__ void start_means(const Memory<Of>& memory, int head) const {
    const T* from = args.means + static_cast<int64_t>(head) * Of::M * width;
    uint4* to = memory.means_of(head);
#pragma unroll
    for (int n = threadIdx.x; n < Of::features; n += Of::threads) {
      copy_async<16>(to + piece(n / pieces, n % pieces), from + n * 8, true);
    }
    if (threadIdx.x < Of::M) {
      copy_async<4>(memory.exponents_of(head) + threadIdx.x,
                    args.exponents + static_cast<int64_t>(head) * Of::M + threadIdx.x, true);
    }
  }

  __device__ __forceinline__ void run(const Memory<Of>& memory) {
    constexpr int part = Of::M < 128 ? Of::M : 128;  // features at a time
    for (int n = 0; n < count; ++n) {
      if (n == 0) {
        copies_wait<Of::ring - 2>();
      } else if (step == 0) {  // the next tile's alone may be under way
        copies_wait<1>();
      } else {
        copies_wait<2 * (Of::ring - 2) - 1>();  // two groups for each tile
      }
      copies_visible();
      if (n == 0 || step == 0) {
        __syncthreads();  // the head's means are there, and everyone has left those of the head before
        if (args.projection.head != 0 && n > 0) {
          fill_projection<T, Of::M, Of::threads>(args.projection, head % args.Hk, memory.omega);
          copies_end();
          copies_wait<0>();
          copies_visible();
          __syncthreads();
        }
      } else if constexpr (Of::groups == 1) {
        __syncthreads();
      } else {
        warpgroup_sync(threadIdx.x / 128);
      }
      if (step == args.query_steps - 1 && n < count - 1) {
        start_means(memory, head + 1);
      }
      copies_end();
      if (n > 0) {
        start_copy(n - 1 + Of::ring);
      }
      copies_end();
      if (tile.head < args.queries) {
        const uint4* means = memory.means_of(head);
        const float* exponents = memory.exponents_of(head);
        float sums[32], total[2] = {0, 0}, top[2] = {masked, masked};
#pragma unroll 1
        for (int from = 0; from < Of::M; from += part) {
          float s[part / 2];
          project<T>(s, ring + n % Of::ring * Of::rows * pieces, memory.omega + from * pieces);
          products_wait(s);
          const float old[2] = {top[0], top[1]};
          add_exponents(s, args.scale, exponents + from, top);
          largest_of_four(top);
          if (from > 0) {
            rescale(sums, total, {exp2_approximate(old[0] - top[0]), exp2_approximate(old[1] - top[1])});
          }
          add_values<T, false>(sums, total, s, top, means + from * pieces, from > 0);
          products_wait(sums);
        }
        const int row = tile.row * Of::rows + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
        T* y = args.out + ((static_cast<int64_t>(head) * args.queries + tile.head) * args.L + row) * width +
               threadIdx.x % 4 * 8;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          store_row(y + 8 * i * width, sums, i, __fdividef(1, sum_of_four(total[i])), row + 8 * i < args.L);
        }
      }
      tile.move(args, Of::groups);
      ++step;
      if (step == args.query_steps) {
        step = 0;
        ++head;
        tile = QueryTile(args, threadIdx.x / 128);
      }
    }
  }
};

#endif

template <typename T, typename Of>
__global__ void __launch_bounds__(Of::threads, Of::blocks) linear_attention_kernel(const Args<T> args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char bytes[];
  const Memory<Of> memory(bytes);
  if constexpr (Of::pass == Pass::queries) {
    Queries<Of, T> queries(args, memory.pool);
    queries.start_copy(0);
    fill_projection<T, Of::M, Of::threads>(args.projection, queries.head % args.Hk, memory.omega);
    copies_end();
    queries.start_copies(1, 2);
    wait_for_previous();
    queries.start_means(memory, queries.head);
    copies_end();
    queries.start_copies(2, Of::ring);
    queries.run(memory);
  } else {
    // In this order: the next kernels read queries before they wait, for this one alone.
    wait_for_previous();
    let_next_begin();
    sum_keys(args, memory);
  }
#endif
}

__device__ __forceinline__ void add(float2& to, float x, float y, float factor) {
  to = {fmaf(x, factor, to.x), fmaf(y, factor, to.y)};
}

// Adds the sums of all blocks that had keys of a head; a thread has a piece of a row.
template <typename T, int M>
__global__ void __launch_bounds__(128) add_parts_kernel(const Args<T> args) {
  let_next_begin();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 128 + threadIdx.x;
  const int row = i / pieces % M, u = i % pieces;
  const Place place(args, static_cast<int>(i / (M * pieces)));
  // Block n has the tiles from [n T / N] on, of T in all: tile t is block [((t + 1) N - 1) / T]'s.
  const uint32_t head = place.head, heads = args.heads, blocks = args.key_blocks;
  const int begin = (head * blocks + (blocks - 1) / args.key_tiles) / heads;
  const int count = ((head + 1) * blocks - 1) / heads - begin + 1;
  const int64_t first = (static_cast<int64_t>(place.head) + begin) * M + row;
  wait_for_previous();
  float c = empty, z = 0;
  // Loads that do not wait for one another; a head of medium length has as many slots.
  constexpr int at_once = 3;
  for (int n = 0; n < count; n += at_once) {
#pragma unroll
    for (int j = 0; j < at_once; ++j) {
      c = fmaxf(c, n + j < count ? args.part_c[first + (n + j) * M] : empty);
    }
  }
  float2 sum[4] = {};
  for (int n = 0; n < count; n += at_once) {
    float2 x[at_once][4] = {};
    float part_z[at_once] = {}, part_c[at_once] = {};
#pragma unroll
    for (int j = 0; j < at_once; ++j) {
      if (n + j < count) {
        const int64_t at = first + (n + j) * M;
        part_z[j] = args.part_z[at];
        part_c[j] = args.part_c[at];
#pragma unroll
        for (int p = 0; p < 4; ++p) {
          x[j][p] = *reinterpret_cast<const float2*>(args.part_kv + at * width + u / 4 * 32 + u % 4 * 2 + 8 * p);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < at_once; ++j) {
      const float factor = n + j < count ? exp2_approximate(part_c[j] - c) : 0;
      z = fmaf(part_z[j], factor, z);
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        add(sum[p], x[j][p].x, x[j][p].y, factor);
      }
    }
  }
  if (args.kv != nullptr) {
    store_state<M>(args, place, row, u, sum, z, c);
  }
  reinterpret_cast<uint4*>(args.means)[i] = mean_value<T>(sum, z);
  if (u == 0) {
    args.exponents[i / pieces] = query_exponent(args, place.h, row, z, c);
  }
}

// Whether a block for each head, or two, take less time than equal shares of the work, which go through memory. `work`
// is a head's, in units of 64 x 64 weights, and `resident` how many blocks a multiprocessor has room for. By times
// measured on an H100, equal shares take 10 / 7 as long for the same work, and their launches as long as 9 units on
// every multiprocessor; the kernels for many tiles take 4 / 5 as long (on an H200; on an H100 they wait for memory),
// and their launches as long as 140.
bool takes_one_launch(int64_t heads, int64_t wholes, int64_t work, int64_t resident, int64_t multiprocessors,
                      bool many) {
  // Half of the time that blocks take on a multiprocessor is the same for any number that it has room for at once.
  const int64_t blocks = ceil_div(2 * heads - wholes, multiprocessors), most = ceil_div(wholes, multiprocessors);
  const int64_t quarters =
      blocks + std::max(blocks, resident) + (wholes < heads ? 2 * most : most + std::max(most, resident));
  return many ? 5 * quarters * work * multiprocessors <= 16 * (heads * work + 140 * multiprocessors)
              : 7 * quarters * work * multiprocessors <= 40 * (heads * work + 9 * multiprocessors);
}

template <typename Of, typename T>
void launch(const Args<T>& args, int64_t blocks, int device, cudaStream_t stream) {
  const auto kernel = linear_attention_kernel<T, Of>;
  allow_memory<Of>(kernel, device);
  launch(kernel, blocks, Of::threads, Of::bytes, stream, true, args);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_attention_cuda(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& omega, int64_t kind, bool causal,
    double scale, const std::optional<Tensor>& bias, double eps, bool normalize, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& kv, const std::optional<Tensor>& z,
    const std::optional<Tensor>& log_scale, bool need_state) {
  const char* op = "linear_attention";
  constexpr int64_t positive = 0, exp = 5;
  const ScalarType dtype = q.scalar_type();
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, op, ": q, k and v must have 4 dimensions");
  const int64_t B = q.size(0), H = q.size(1), L = q.size(2), Hk = k.size(1), S = k.size(2);
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op,
                  ": q must have dtype float16 or bfloat16");
  check_like(op, "k", k, dtype, q);
  check_like(op, "v", v, dtype, q);
  STD_TORCH_CHECK(q.size(3) == width && k.size(3) == width && v.size(3) == width, op, ": D and V must be 64");
  STD_TORCH_CHECK(k.size(0) == B && v.size(0) == B && v.size(1) == Hk && v.size(2) == S, op,
                  ": k and v must have the B of q, and the same heads and tokens");
  STD_TORCH_CHECK(H == Hk || (Hk > 0 && H % Hk == 0), op, ": H must be a multiple of Hk");
  STD_TORCH_CHECK((kind == exp || (kind == positive && omega)) && eps == 0 && normalize && !cu_seqlens, op,
                  ": the CUDA kernel takes normalised exponential features");
  STD_TORCH_CHECK(!causal || (dtype == ScalarType::BFloat16 && S == L && (H > 0 || Hk == 0)), op,
                  ": causal q must have dtype bfloat16, a head, and as many tokens as k");
  const Projection projection = projection_of(op, omega, q, Hk);
  const int64_t M = projection.features;
  if (bias) {
    check_like(op, "bias", *bias, ScalarType::Float, q);
    STD_TORCH_CHECK(bias->is_contiguous() && (bias->numel() == M || bias->numel() == Hk * M), op,
                    ": bias must have shape (M,) or (Hk, M)");
  }
  if (mask) {
    check_like(op, "mask", *mask, ScalarType::Bool, q);
    STD_TORCH_CHECK(mask->is_contiguous() && mask->numel() == B * S, op, ": mask must have shape (B, S)");
  }
  const bool starts = kv && z && log_scale;
  STD_TORCH_CHECK(starts ? causal : !(kv || z || log_scale), op,
                  ": kv, z and log_scale come together, and causal alone");
  if (starts) {
    const std::pair<const char*, const Tensor*> state[] = {{"kv", &*kv}, {"z", &*z}, {"log_scale", &*log_scale}};
    for (const auto& [name, x] : state) {
      check_like(op, name, *x, ScalarType::Float, q);
      STD_TORCH_CHECK(x->is_contiguous() && x->numel() == B * Hk * M * (x == &*kv ? width : 1), op, ": ", name,
                      " must be contiguous, (B, Hk, M, V) or (B, Hk, M)");
    }
  }
  constexpr int64_t limit = int64_t{1} << 30, heads_limit = int64_t{1} << 22;
  const int64_t heads = B * Hk;
  STD_TORCH_CHECK(
      L < limit && S < limit && heads < heads_limit && heads * (S / 64 + 1) < limit && B * H * (L / 64 + 1) < limit, op,
      ": the native kernel takes fewer than 2^36 tokens; use backend='reference'");

  const int index = q.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  Tensor out = new_empty(q, {B, H, L, width}, dtype);
  const auto of_state = [&](std::vector<int64_t> sizes) {
    return new_empty(q, need_state ? sizes : std::vector<int64_t>{0}, ScalarType::Float);
  };
  Tensor new_kv = of_state({B, Hk, M, width}), new_z = of_state({B, Hk, M}), new_log_scale = of_state({B, Hk, M});
  if (heads == 0) {
    return {out, new_kv, new_z, new_log_scale};
  }
  const Device gpu = device(index);
  STD_TORCH_CHECK(gpu.capability == 9, op,
                  ": the CUDA kernel needs a GPU of compute capability 9; use backend='triton'");
  const cudaStream_t stream = current_stream(q);
  const auto run = [&](auto zero, auto features) {
    using T = decltype(zero);
    constexpr int F = features;
    Args<T> args{};
    args.q = rows_of<T>(op, q);
    args.k = rows_of<T>(op, k);
    args.v = rows_of<T>(op, v);
    args.projection = projection;
    args.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
    args.bias_h = bias && bias->numel() == Hk * M && bias->dim() > 1 ? F : 0;
    args.mask = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
    args.out = static_cast<T*>(out.mutable_data_ptr());
    if (need_state) {
      args.kv = static_cast<float*>(new_kv.mutable_data_ptr());
      args.z = static_cast<float*>(new_z.mutable_data_ptr());
      args.log_scale = static_cast<float*>(new_log_scale.mutable_data_ptr());
    }
    if (starts) {
      args.kv0 = static_cast<const float*>(kv->const_data_ptr());
      args.z0 = static_cast<const float*>(z->const_data_ptr());
      args.log_scale0 = static_cast<const float*>(log_scale->const_data_ptr());
    }
    args.scale = static_cast<float>(scale * log2e);
    args.norm = kind == positive ? static_cast<float>(-0.5 * log2e * scale * scale) : 0;
    args.Hk = static_cast<int>(Hk);
    args.L = static_cast<int>(L);
    args.S = static_cast<int>(S);
    args.queries = static_cast<int>(H / Hk);
    args.heads = static_cast<int>(heads);
    args.row_tiles = ceil_div(L, 64);
    const auto divide = [&](auto plan) {
      args.key_tiles = std::max(ceil_div(S, plan.keys), 1);  // no keys: one tile of none
      args.query_steps = ceil_div(int64_t{args.queries} * args.row_tiles, plan.groups);
    };
    constexpr bool has_many = F == 128 && std::is_same_v<T, BFloat16>;  // kernels for many tiles
    constexpr int64_t many = 8;                                         // of a warpgroup
    const int64_t row_tiles = int64_t{args.queries} * args.row_tiles;
    const bool many_keys = has_many && heads * ceil_div(S, 128) >= many * gpu.multiprocessors;
    const bool many_queries = has_many && heads * row_tiles >= 2 * many * gpu.multiprocessors;
    if constexpr (F < 256) {
      const bool is_short = !causal && !need_state && H > 0 && L > 0 && L <= 64 && S > 0 && S <= 64;
      // These blocks wait less for one another than those below: alone, one takes as long as if there were room for 2.
      if (is_short && takes_one_launch(heads, heads, (1 + H / Hk) * (F / 64), 2, gpu.multiprocessors, false)) {
        head_attention<T, F>(args, gpu.multiprocessors, index, stream);
        return;
      }
      constexpr int groups = F / 64;  // warpgroups of a block, of four that a multiprocessor has room for
      const int key_tiles = ceil_div(S, F);
      const int64_t work = (key_tiles + ceil_div(row_tiles, groups)) * groups * groups;
      args.wholes = whole_heads<F>(heads, key_tiles, gpu.multiprocessors);
      if (!causal &&
          takes_one_launch(heads, args.wholes, work, 4 / groups, gpu.multiprocessors, many_keys && many_queries) &&
          whole_attention<T, F>(args, index, stream)) {
        return;
      }
    }
    using Of = Plan<Pass::keys, F>;
    divide(Of{});
    args.key_tile = Of::keys;
    const int64_t resident = gpu.multiprocessors * Of::blocks;
    const int64_t at_once = std::min(heads * args.key_tiles, many_keys ? int64_t{gpu.multiprocessors} : resident);
    args.key_blocks = causal ? causal_shares<F>(heads, args.queries, L, args.key_tiles, gpu.multiprocessors)
                             : static_cast<int>(at_once);
    // As many pieces as run at once, of 8 tiles or more: what is summed in pieces has to be added.
    const int64_t pieces_at_once = std::min(at_once, heads * args.key_tiles / 8);
    args.share_pieces = causal ? static_cast<int>(std::max(pieces_at_once / args.key_blocks, int64_t{1})) : 0;
    const int64_t blocks = causal ? int64_t{args.key_blocks - 1} * args.share_pieces : args.key_blocks;
    const int64_t of_parts = (causal ? blocks : heads + blocks - 1) * F, of_heads = causal ? 0 : heads * F;
    Tensor scratch;
    if (!causal || args.key_blocks != heads) {
      scratch = new_empty(q, {of_parts * (width + 2) + of_heads * (width / 2 + 1)}, ScalarType::Float);
      args.part_kv = static_cast<float*>(scratch.mutable_data_ptr());
      args.means = reinterpret_cast<T*>(args.part_kv + of_parts * width);
      args.exponents = args.part_kv + of_parts * width + of_heads * (width / 2);
      args.part_z = args.exponents + of_heads;
      args.part_c = args.part_z + of_parts;
      if constexpr (has_many) {
        if (!many_keys || !sum_many_keys<T, F>(args, static_cast<int>(blocks), index, stream)) {
          launch<Of>(args, blocks, index, stream);
        }
      } else {
        launch<Of>(args, blocks, index, stream);
      }
    }
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (causal) {
        causal_attention<T, F>(args, index, stream);
        return;
      }
    }
    launch(add_parts_kernel<T, F>, of_heads * pieces / 128, 128, 0, stream, true, args);
    if constexpr (has_many) {
      if (many_queries) {
        attend_many<T, F>(args, gpu.multiprocessors, index, stream);
        return;
      }
    }
    if (args.query_steps > 0) {
      launch<Plan<Pass::queries, F>>(args, std::min(heads * args.query_steps, resident), index, stream);
    }
  };
  const auto dispatch = [&](auto zero) {
    switch (M) {
      case 64:
        return run(zero, std::integral_constant<int, 64>{});
      case 128:
        return run(zero, std::integral_constant<int, 128>{});
      default:
        return run(zero, std::integral_constant<int, 256>{});
    }
  };
  dtype == ScalarType::BFloat16 ? dispatch(BFloat16{}) : dispatch(Half{});
  return {out, new_kv, new_z, new_log_scale};
}

}  // namespace linear
}  // namespace fastrpe
