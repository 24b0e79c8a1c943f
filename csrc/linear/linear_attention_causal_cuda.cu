#include <cuda_runtime.h>

#include <algorithm>

#include "linear_attention.cuh"
#include "tensor_map.h"

// Causal attention of exponential features on Hopper's tensor cores. A block walks along tokens in tiles of 64. A
// warpgroup has tiles copied in the background. Others, for keys, divide the features: each keeps the sums over the
// keys so far of its own in registers, and leaves in shared memory, as an item, what a tile's queries need: the
// features of the tile's keys and the sums over the keys before. Those for queries, behind them, take tiles in turn,
// with all features, and make rows. Keys, values and items are rings, with barriers in shared memory.
//
// Features of a tile are relative to the maximum c of a feature's exponents over all keys up to the tile's last. Where
// that is far above what an early row of the tile sees, the row's own weights would vanish: such a tile becomes several
// items, parts of which one row is always right. Where exponents are bounded, c is a constant.
//
// With few heads, their tokens are divided among blocks: a kernel sums the keys of each share that others of its head
// follow, in pieces, as many as run at once, a second one those before each. Exponents are in base 2.
namespace fastrpe {
namespace linear {
namespace {

template <int Features>
struct Plan {
  static constexpr int M = Features;
  static constexpr int key_groups = M == 64 ? 1 : 2, query_groups = M == 128 ? 2 : 1;  // warpgroups
  static constexpr int key_threads = 128 * key_groups, walkers = key_threads + 128 * query_groups;
  static constexpr int threads = walkers + 128;           // those who copy come last
  static constexpr int blocks = M == 64 ? 2 : 1;          // of a multiprocessor
  static constexpr int parts = M / (64 * key_groups);     // of 64 features, of a warpgroup for keys
  static constexpr int query_part = M == 128 ? 128 : 64;  // features that a warpgroup for queries has at once
  // Of a thread, at first and on average; then of those who copy, for keys and for queries.
  static constexpr int registers = M == 64 ? 80 : M == 128 ? 96 : 128, copy_registers = 32;
  static constexpr int key_registers = M == 256 ? 160 : 96;
  static constexpr int query_registers = M == 64 ? 112 : M == 128 ? 128 : 160;
  static constexpr int rows = 64;               // tokens of a tile
  static constexpr int matrix = rows * pieces;  // in units of 16 bytes, as all of these
  static constexpr int features = M * pieces;   // omega
  static constexpr int item = 2 * features;     // keys' features and the sums before them
  static constexpr int items = query_groups + 1;
  static constexpr int stages = M == 128 ? 3 : 2;  // tiles of keys
  static constexpr int values = M == 64 ? 4 : M == 128 ? 6 : 3, queries = 2 * query_groups;
  static constexpr int preparers = 2;  // warps of those who copy; one more has keys, and one queries
  static constexpr int units = features + items * item + (stages + values + queries) * matrix;
  static constexpr int floats = (M + M / 2) * items + stages * rows + walkers - key_threads;
  static constexpr size_t bytes =
      16 * units + sizeof(float) * floats + 8 * (3 * items + 3 * stages + values + 2 * queries);
  static_assert(blocks * (bytes + 1024) <= 228 * 1024 && blocks * threads * registers <= 65536);
  static_assert(64 * parts * key_groups == M && M % query_part == 0 && preparers + 2 == 4);
  static_assert(key_threads * key_registers + (walkers - key_threads) * query_registers + 128 * copy_registers <=
                threads * registers);
};

// Where number n of a ring of N lies, and the parity of how often all of the ring was used before.
template <int N>
__device__ __forceinline__ int place(uint32_t n) {
  return n % N;
}

template <int N>
__device__ __forceinline__ uint32_t parity(uint32_t n) {
  return n / N % 2;
}

// An item also has what features add to queries' exponents, the sums of their weights before it, as the right operand
// of a warp's product, and the rows [x, y) of the tile that it is for; x is -1 where keys' exponents are bounded.
template <typename Of>
struct Memory {
  uint4 *omega, *items, *k, *v, *q;
  float *exponents, *key_bias;
  uint4* z;
  int2* ranges;
  int* until;                  // the head's end, of each thread for queries
  uint64_t *full, *read;       // an item is there; it is no longer needed
  uint64_t *landed, *ready;    // keys and their values are there; their biases are, too
  uint64_t *projected, *left;  // keys are no longer needed; values are not, by queries
  uint64_t *asked, *answered;  // queries are there; they are no longer needed

  __device__ __forceinline__ explicit Memory(char* at)
      : omega(reinterpret_cast<uint4*>(at)),
        items(omega + Of::features),
        k(items + Of::items * Of::item),
        v(k + Of::stages * Of::matrix),
        q(v + Of::values * Of::matrix),
        exponents(reinterpret_cast<float*>(q + Of::queries * Of::matrix)),
        key_bias(exponents + Of::items * Of::M),
        z(reinterpret_cast<uint4*>(key_bias + Of::stages * Of::rows)),
        ranges(reinterpret_cast<int2*>(z + Of::items * (Of::M / 8))),
        until(reinterpret_cast<int*>(ranges + Of::items)),
        full(reinterpret_cast<uint64_t*>(until + Of::walkers - Of::key_threads)),
        read(full + Of::items),
        landed(read + Of::items),
        ready(landed + Of::stages),
        projected(ready + Of::stages),
        left(projected + Of::stages),
        asked(left + Of::values),
        answered(asked + Of::queries) {}
};

// A tile, which begins with token `first` of key head number `head` of all.
struct Tile {
  int head, first;

  template <typename T>
  __device__ __forceinline__ int b(const Args<T>& args) const {
    return static_cast<uint32_t>(head) / static_cast<uint32_t>(args.Hk);
  }

  template <typename T>
  __device__ __forceinline__ int h(const Args<T>& args) const {
    return static_cast<uint32_t>(head) % static_cast<uint32_t>(args.Hk);
  }

  // How many tiles of its head there are from it on.
  template <typename T>
  __device__ __forceinline__ int left(const Args<T>& args) const {
    return max((args.L - first + 63) / 64, 1);
  }

  template <typename T>
  __device__ __forceinline__ void next(const Args<T>& args) {
    first += 64;
    if (first >= args.L) {
      next_head();
    }
  }

  __device__ __forceinline__ void next_head() {
    ++head;
    first = 0;
  }
};

// A block's tiles: a share of those of all key heads, for one of a group's query heads.
struct Share {
  int number, query, count;
  Tile begin;

  template <typename T>
  __device__ __forceinline__ explicit Share(const Args<T>& args) {
    query = static_cast<uint32_t>(this_block()) / static_cast<uint32_t>(args.key_blocks);
    number = this_block() - query * args.key_blocks;
    begin = tile(args, number);
    const Tile end = tile(args, number + 1);
    count = (end.head - begin.head) * Tile{0, 0}.left(args) + (end.first - begin.first) / 64;
  }

  // Where a share begins.
  template <typename T>
  static __device__ __forceinline__ Tile tile(const Args<T>& args, int share) {
    const int at = static_cast<int>(static_cast<int64_t>(args.heads) * args.key_tiles * share / args.key_blocks);
    const int head = static_cast<uint32_t>(at) / static_cast<uint32_t>(args.key_tiles);
    return {head, (at - head * args.key_tiles) * args.key_tile};
  }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Barriers of a block beside those in shared memory: of the warpgroups for keys, and of these and those for queries.
constexpr int key_barrier = 1, walk_barrier = 2;

// x, which is the same in all threads of a warp: the compiler then knows.
__device__ __forceinline__ int uniform(int x) {
  return __shfl_sync(~0u, x, 0);
}

// The first of the two rows that a thread has of a warpgroup's product of 64 rows; the second is 8 further.
__device__ __forceinline__ int first_row() {
  return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
}

// 64 x 64 values, as registers of a product hold them, to rows of shared memory.
__device__ __forceinline__ void store_matrix(uint4* to, const uint32_t (&values)[4][4]) {
  const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16;
  const uint32_t at = shared_address(to + piece(row, lane / 16));
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    store_matrices(at ^ 32 * n, values[n]);  // piece 2 n + lane / 16
  }
}

// How far a maximum may be above what a row sees: the row's sum is at least 2^-reach, and its small terms, products of
// two weights that may be as much smaller again, are far from what a float32 flushes to 0.
constexpr float reach = 48;

// Exponents of keys are less by `shift`, here and in c. Where a head's features are such that no key has one above
// `room` and the sums of weights so far are at least `least`, relative to 2^0, maxima are no longer looked for: c is 0.
// Most features' maxima are far below |w|^2 / 2, which room + shift has to exceed.
constexpr float shift = 24, room = 72, least = 1.f / (1ull << 48);

// The sums over the keys before a tile, of a thread's two features; of those of weights, z, a feature's four threads
// have parts.
template <int M, typename T>
__device__ __forceinline__ void load_state(const Args<T>& args, const Tile& tile, int share, int feature,
                                           float (&kv)[32], float (&z)[2], float (&c)[2]) {
  const bool is_part = tile.first > 0;
  const float *from_kv = is_part ? args.part_kv : args.kv0, *from_z = is_part ? args.part_z : args.z0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row = static_cast<int64_t>(is_part ? share - 1 : tile.head) * M + feature + 8 * i;
    z[i] = from_kv == nullptr || threadIdx.x % 4 != 0 ? 0 : from_z[row];
    c[i] = empty;
    if (is_part) {
      c[i] = args.part_c[row] - shift;
    } else if (from_kv != nullptr) {
      c[i] = fmaxf(args.log_scale0[row] * log2e - feature_bias(args, tile.h(args), feature + 8 * i) - shift, empty);
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
__device__ __forceinline__ void store_state(const Args<T>& args, const Tile& tile, int feature, const float (&kv)[32],
                                            const float (&z)[2], const float (&c)[2]) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row = static_cast<int64_t>(tile.head) * M + feature + 8 * i;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      *reinterpret_cast<float2*>(args.kv + row * width + 8 * j + 2 * t) = {kv[4 * j + 2 * i], kv[4 * j + 2 * i + 1]};
    }
    const float sum = sum_of_four(z[i]);
    if (t == 0) {
      args.z[row] = sum;
      args.log_scale[row] = (c[i] + shift + feature_bias(args, tile.h(args), feature + 8 * i)) * ln2;
    }
  }
}

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
  largest_of_four(seen);
  return next[0] > seen[0] + reach || next[1] > seen[1] + reach;
}

// By one thread. All threads arrive, not one for each warp: tools that look for races then see what the barriers order.
template <typename Of>
__device__ __forceinline__ void prepare_barriers(const Memory<Of>& memory) {
  for (int i = 0; i < Of::items; ++i) {
    barrier_prepare(memory.full + i, Of::key_threads);
    barrier_prepare(memory.read + i, Of::walkers - Of::key_threads);
  }
  for (int i = 0; i < Of::stages; ++i) {
    barrier_prepare(memory.landed + i, 1);
    barrier_prepare(memory.ready + i, 32);
    barrier_prepare(memory.projected + i, Of::key_threads);
  }
  for (int i = 0; i < Of::values; ++i) {
    barrier_prepare(memory.left + i, 128);  // of the warpgroup that has had the tile
  }
  for (int i = 0; i < Of::queries; ++i) {
    barrier_prepare(memory.asked + i, 1);
    barrier_prepare(memory.answered + i, 128);
  }
  barriers_visible();
}

// Another head's omega, where each has its own; for keys and queries, when all have left the old one.
template <typename Of, typename T>
__device__ __forceinline__ void change_projection(const Args<T>& args, const Memory<Of>& memory, const Tile& tile) {
  if (args.projection.head != 0) {
    barrier_sync<walk_barrier, Of::walkers>();
    fill_projection<T, Of::M, Of::walkers>(args.projection, tile.h(args), memory.omega);
    copies_end();
    copies_wait<0>();
    copies_visible();
    barrier_sync<walk_barrier, Of::walkers>();
  }
}

// A share's keys and values, by a warp: tile by tile, as places become free. Without any they are zeros, from past the
// end.
template <typename Of, typename T>
__device__ __forceinline__ void copy_keys(const Args<T>& args, const Memory<Of>& memory, const CUtensorMap& k,
                                          const CUtensorMap& v, const Share& share) {
  Tile tile = share.begin;
  for (int i = 0; i < share.count; ++i) {
    const int stage = place<Of::stages>(i), value = place<Of::values>(i);
    barrier_wait(memory.projected + stage, parity<Of::stages>(i) ^ 1);
    barrier_wait(memory.left + value, parity<Of::values>(i) ^ 1);
    if (threadIdx.x % 32 == 0) {
      const int b = tile.b(args), h = tile.h(args), first = max(tile.first, 1 - args.L);
      uint64_t* landed = memory.landed + stage;
      barrier_expect(landed, 2 * 16 * Of::matrix);
      copy_tile(memory.k + stage * Of::matrix, k, b, h, first, landed);
      copy_tile(memory.v + value * Of::matrix, v, b, h, first, landed);
    }
    __syncwarp();
    tile.next(args);
  }
}

// The same for its queries.
template <typename Of, typename T>
__device__ __forceinline__ void copy_queries(const Args<T>& args, const Memory<Of>& memory, const CUtensorMap& q,
                                             const Share& share) {
  Tile tile = share.begin;
  for (int i = 0; i < share.count; ++i) {
    const int at = place<Of::queries>(i);
    barrier_wait(memory.answered + at, parity<Of::queries>(i) ^ 1);
    if (threadIdx.x % 32 == 0) {
      barrier_expect(memory.asked + at, 16 * Of::matrix);
      copy_tile(memory.q + at * Of::matrix, q, tile.b(args), tile.h(args) * args.queries + share.query,
                max(tile.first, 1 - args.L), memory.asked + at);
    }
    __syncwarp();
    tile.next(args);
  }
}

// The biases of a share's keys, by warps that take tiles in turn, this one being number i of them.
template <typename Of, typename T>
__device__ __forceinline__ void prepare_keys(const Args<T>& args, const Memory<Of>& memory, const Share& share, int i) {
  Tile tile = share.begin;
  const auto next = [&](int tiles) {
    for (int n = 0; n < tiles; ++n) {
      tile.next(args);
    }
  };
  next(i);
  for (; i < share.count; i += Of::preparers) {
    const int stage = place<Of::stages>(i), value = place<Of::values>(i);
    // What the copy has waited for, too: so that checkers see it.
    barrier_wait(memory.projected + stage, parity<Of::stages>(i) ^ 1);
    barrier_wait(memory.left + value, parity<Of::values>(i) ^ 1);
    barrier_wait(memory.landed + stage, parity<Of::stages>(i));
    fill_bias<Of::rows>(args, memory.k + stage * Of::matrix, memory.v + value * Of::matrix, tile.b(args), tile.first,
                        -shift, memory.key_bias + stage * Of::rows);
    barrier_arrive(memory.ready + stage);
    next(Of::preparers);
  }
}

// The warpgroups for keys.
template <typename Of, typename T>
__device__ __forceinline__ void walk_keys(const Args<T>& args, const Memory<Of>& memory, const Share& share) {
  const int t = threadIdx.x % 4, features = uniform(threadIdx.x / 128) * (64 * Of::parts),
            feature = features + first_row();
  constexpr uint32_t row_bytes = 16 * pieces, bytes = 16 * Of::matrix;
  const uint64_t of_omega = operand(memory.omega + features * pieces), all_keys = operand(memory.k),
                 all_values = operand(memory.v);
  // Of 32 features a thread of the right operand has pairs 2 t, 2 t + 8, 2 t + 16 and 2 t + 24 together.
  const int place_of_sum = feature / 32 * 32 + feature % 8 / 2 * 8 + feature / 16 % 2 * 4 + t % 2 * 2 + feature % 2;
  float kv[Of::parts][32], z[Of::parts][2] = {}, c[Of::parts][2] = {};
  float bias[Of::parts] = {};  // what feature (t % 2) adds to keys' and to queries' exponents, for t < 2
  float s[32];                 // features x keys
  int i = 0, item = 0;
  // The products of this block's tile number i, which is there.
  const auto project = [&](int part) {
    const uint64_t of_k = further(all_keys, place<Of::stages>(i) * bytes);
    products_begin();
#pragma unroll
    for (int step = 0; step < width / 16; ++step) {
      multiply<T>(s, further(of_omega, part * bytes + 32 * step), further(of_k, 32 * step), step > 0);
    }
    products_end();
  };
  const auto wait_for_keys = [&] { barrier_wait(memory.ready + place<Of::stages>(i), parity<Of::stages>(i)); };
  const auto bias_of_keys = [&] { return memory.key_bias + place<Of::stages>(i) * Of::rows; };
  const auto wait_for_item = [&] { barrier_wait(memory.read + place<Of::items>(item), parity<Of::items>(item) ^ 1); };
  // Leaves the sums before the item's keys.
  const auto leave_state = [&](int part) {
    const int slot = place<Of::items>(item);
    uint32_t state[4][4];
#pragma unroll
    for (int n = 0; n < 16; ++n) {
      state[n / 4][n % 4] = pack<T>(kv[part][2 * n], kv[part][2 * n + 1]);
    }
    store_matrix(memory.items + slot * Of::item + Of::features + features * pieces + part * Of::matrix, state);
    // Of the four lanes that have two features two store exponents and two sums of weights.
    const bool is_odd = t % 2;
    float sum = (is_odd ? z[part][1] : z[part][0]) + __shfl_xor_sync(~0u, is_odd ? z[part][0] : z[part][1], 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (t < 2) {
      memory.exponents[slot * Of::M + feature + 64 * part + 8 * t] = (is_odd ? c[part][1] : c[part][0]) + bias[part];
    } else {
      reinterpret_cast<uint16_t*>(memory.z)[slot * Of::M + place_of_sum + 64 * part] =
          static_cast<uint16_t>(pack<T>(sum, 0));
    }
  };
  // Leaves the features of the item's keys, whose exponents s are relative to c, and starts to add them to the sums.
  const auto add_keys = [&](int part) {
    uint32_t weights[4][4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const float x = exp2_approximate(s[8 * n + 2 * m]), y = exp2_approximate(s[8 * n + 2 * m + 1]);
        z[part][m % 2] += x + y;
        weights[n][m] = pack<T>(x, y);
      }
    }
    store_matrix(memory.items + place<Of::items>(item) * Of::item + features * pieces + part * Of::matrix, weights);
    const uint64_t of_v = further(all_values, place<Of::values>(i) * bytes);
    products_begin();
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      multiply<T, Inner::b>(kv[part], weights[n], further(of_v, n * 16 * row_bytes), true);
    }
    products_end();
  };
  const auto end_item = [&](int begin, int end) {
    const int slot = place<Of::items>(item);
    if (threadIdx.x == 0) {
      memory.ranges[slot] = {begin, end};
    }
    copies_visible();
    barrier_arrive(memory.full + slot);
    ++item;
  };
  // The sums before these keys, relative to `next`.
  const auto change_maxima = [&](int part, const float (&next)[2]) {
    const float factor[2] = {exp2_approximate(c[part][0] - next[0]), exp2_approximate(c[part][1] - next[1])};
    rescale(kv[part], factor);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      z[part][n] *= factor[n];
      c[part][n] = next[n];
    }
  };
  for (Tile tile = share.begin; i < share.count; tile.next_head()) {
    if (i > 0) {
      change_projection(args, memory, tile);
    }
    bool bounded = true;
#pragma unroll
    for (int part = 0; part < Of::parts; ++part) {
      const int row = feature + 64 * part;
      load_state<Of::M>(args, tile, share.number, row, kv[part], z[part], c[part]);
      bias[part] = t < 2 ? 2 * feature_bias(args, tile.h(args), row + 8 * t) : 0;
      float squares[2];
      find_squares<T>(memory.omega, row, t, squares);
      bounded = fmaxf(squares[0], squares[1]) * (log2e / 2) - shift <= room && bounded;
    }
    const int last = i + tile.left(args), until = min(last, share.count);
    for (int begin = 0, end = Of::rows; i < until;) {
      const auto add = [&](float (&next)[2]) {
        next[0] = next[1] = masked;
        add_exponents(s, args.scale, bias_of_keys(), next);
        if (end - begin < Of::rows) {
          next[0] = next[1] = masked;
#pragma unroll
          for (int n = 0; n < 32; ++n) {
            const int key = n / 4 * 8 + 2 * t + n % 2;
            s[n] = key >= begin && key < end ? s[n] : masked;
            next[n / 2 % 2] = fmaxf(next[n / 2 % 2], s[n]);
          }
        }
      };
      if (begin == 0 && end == Of::rows) {
        wait_for_keys();
        if (args.norm != 0) {
          bool fits = bounded;
#pragma unroll
          for (int part = 0; part < Of::parts; ++part) {
#pragma unroll
            for (int n = 0; n < 2; ++n) {
              const float sum = sum_of_four(z[part][n]);
              fits = fits && c[part][n] <= room && sum * exp2_approximate(c[part][n]) >= least;
            }
          }
          if (!__any_sync(~0u, barrier_or<key_barrier, Of::key_threads>(!fits))) {
            break;
          }
        }
      }
      float next[Of::parts][2];
      bool far = false;
#pragma unroll
      for (int part = 0; part < Of::parts; ++part) {
        project(part);
        products_wait(s);
        add(next[part]);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          next[part][n] = fmaxf(c[part][n], largest_of_four(next[part][n]));
        }
        far |= is_far(s, c[part], next[part], bias_of_keys(), begin, end);
      }
      far = barrier_or<key_barrier, Of::key_threads>(far);
      if (__any_sync(~0u, far) && end - begin > 1) {  // which tells the compiler that a warp's threads agree
        end = begin + (end - begin) / 2;
        continue;
      }

      const bool is_last = end == Of::rows;
      wait_for_item();
#pragma unroll
      for (int part = Of::parts - 1; part >= 0; --part) {
        if (part < Of::parts - 1) {
          float ignored[2];
          project(part);
          products_wait(s);
          add(ignored);
        }
        if (part == 0 && is_last) {
          barrier_arrive(memory.projected + place<Of::stages>(i));
        }
        if (__any_sync(~0u, next[part][0] > c[part][0] || next[part][1] > c[part][1])) {
          change_maxima(part, next[part]);
        }
        leave_state(part);
#pragma unroll
        for (int n = 0; n < 32; ++n) {
          s[n] -= c[part][n / 2 % 2];
        }
        add_keys(part);
      }
      end_item(begin, end);
#pragma unroll
      for (int part = 0; part < Of::parts; ++part) {
        products_wait(kv[part]);
      }
      if (!is_last) {
        const int rows = end - begin;
        begin = end;
        end = min(begin + 2 * rows, Of::rows);
        continue;
      }
      begin = 0;
      ++i;
    }
    if (i < until) {  // no more maxima; the keys of the first of these tiles are there
#pragma unroll
      for (int part = 0; part < Of::parts; ++part) {
        change_maxima(part, {0, 0});
      }
      project(0);
      while (true) {
        wait_for_item();
#pragma unroll
        for (int part = 0; part < Of::parts; ++part) {
          leave_state(part);
          products_wait(s);
          add_exponents(s, args.scale, bias_of_keys());
          if (part == Of::parts - 1) {
            barrier_arrive(memory.projected + place<Of::stages>(i));
          }
          add_keys(part);
          if (part < Of::parts - 1) {
            products_wait(kv[part]);
            project(part + 1);
          }
        }
        end_item(-1, Of::rows);
        if (++i < until) {
          wait_for_keys();
        }
        products_wait(kv[Of::parts - 1]);
        if (i == until) {
          break;
        }
        project(0);
      }
    }
    if (i == last && share.query == 0 && args.kv != nullptr) {
#pragma unroll
      for (int part = 0; part < Of::parts; ++part) {
        store_state<Of::M>(args, tile, feature + 64 * part, kv[part], z[part], c[part]);
      }
    }
  }
}

// An item's rows, of all features. Calls `release` with the end of the rows when the item is no longer needed.
//
// Weights of a row's features are relative to the largest. Where keys' exponents are bounded, a warp tries 2^reference
// instead, which is as good if the sums before the item show that its rows' weights are neither too large nor too
// small.
template <typename Of, typename T, typename Release>
__device__ __forceinline__ void make_rows(const Args<T>& args, const Memory<Of>& memory, const uint4* q, const uint4* v,
                                          int item, T* out, int rows, float& reference, Release&& release) {
  constexpr int part = Of::query_part;
  constexpr uint32_t row_bytes = 16 * pieces;
  constexpr float low = 1.f / (1 << 30), high = 1, middle = 12;  // of sums, which are below 2^-middle at first
  const int slot = uniform(place<Of::items>(item)), t = threadIdx.x % 4, row = first_row();
  const uint64_t of_q = operand(q), of_v = operand(v), of_omega = operand(memory.omega),
                 of_keys = operand(memory.items + slot * Of::item), of_state = further(of_keys, 16 * Of::features);
  float a[32], y[32];                              // queries x keys, and rows
  float top[2] = {masked, masked}, total[4] = {};  // total[0] and total[2] are of the two rows
  int2 range = {0, 0};
#pragma unroll 1
  for (int from = 0; from < Of::M; from += part) {
    float p[part / 2];  // queries x features
    if (from > 0) {
      products_wait(a);
      products_wait(y);
    }
    products_begin();
#pragma unroll
    for (int step = 0; step < width / 16; ++step) {
      multiply<T>(p, further(of_q, 32 * step), further(of_omega, from * row_bytes + 32 * step), step > 0);
    }
    products_end();
    if (from == 0) {
      barrier_wait(memory.full + slot, parity<Of::items>(item));
      range = memory.ranges[slot];
    }
    products_wait(p);
    const bool bounded = range.x < 0;
    if (bounded && args.bias == nullptr) {  // exponents are 0
#pragma unroll
      for (float& x : p) {
        x = fmaf(x, args.scale, -reference);
      }
    } else {
      const float2* exponents = reinterpret_cast<const float2*>(memory.exponents + slot * Of::M + from) + t;
#pragma unroll
      for (int n = 0; n < part / 2; n += 2) {
        p[n] = fmaf(p[n], args.scale, exponents[n / 4 * 4].x - reference);
        p[n + 1] = fmaf(p[n + 1], args.scale, exponents[n / 4 * 4].y - reference);
      }
    }
    uint32_t queries[part / 16][4];
    const auto weigh = [&] {
      const uint4* z = memory.z + slot * (Of::M / 8) + from / 8 + t;
#pragma unroll
      for (int n = 0; n < part / 16; ++n) {
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          queries[n][m] = pack<T>(exp2_approximate(p[8 * n + 2 * m]), exp2_approximate(p[8 * n + 2 * m + 1]));
        }
        const uint4 sums = z[n / 2 * 4];
        multiply_warp<T>(total, queries[n], n % 2 == 0 ? sums.x : sums.z, n % 2 == 0 ? sums.y : sums.w);
      }
    };
    bool is_good = part == Of::M && bounded;
    if (is_good) {
      weigh();
      is_good = total[0] >= low && total[2] >= low && total[0] <= high && total[2] <= high;  // no NaN either
    }
    if (!__all_sync(~0u, is_good)) {
      const float old[2] = {top[0], top[1]};
      find_largest(p, top);
      largest_of_four(top);
      if (from > 0) {
        const float factor[2] = {exp2_approximate(old[0] - top[0]), exp2_approximate(old[1] - top[1])};
        rescale(a, factor);
        rescale(y, factor);
        rescale(total, factor);
      } else {
        total[0] = total[1] = total[2] = total[3] = 0;
      }
#pragma unroll
      for (int n = 0; n < part / 2; ++n) {
        p[n] -= top[n / 2 % 2];
      }
      weigh();
      if (part == Of::M) {
        float sum = masked;  // the largest of the warp's rows, a logarithm
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          sum = total[2 * i] > 0 ? fmaxf(sum, top[i] + __log2f(total[2 * i])) : sum;
        }
#pragma unroll
        for (int other = 4; other < 32; other *= 2) {
          sum = fmaxf(sum, __shfl_xor_sync(~0u, sum, other));
        }
        reference += sum > masked ? sum + middle : 0;
      }
    }
    products_begin();
#pragma unroll
    for (int n = 0; n < part / 16; ++n) {
      multiply<T, Inner::b>(a, queries[n], further(of_keys, (from + n * 16) * row_bytes), from + n > 0);
    }
    products_end();
#pragma unroll
    for (int n = 0; n < part / 16; ++n) {
      multiply<T, Inner::b>(y, queries[n], further(of_state, (from + n * 16) * row_bytes), from + n > 0);
    }
    products_end();
  }
  products_wait<1>(a);
  uint32_t weights[4][4];
  // A warp's 16 rows see the keys before them, and of their own 16 those up to the row.
  const uint32_t own = row % 8 > 2 * t ? ~0u : row % 8 == 2 * t ? 0xffffu : 0;  // of 8 rows and their keys
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const uint32_t before = 16 * n < row / 16 * 16 ? ~0u : 0, upto = 16 * n <= row ? ~0u : 0;
    const uint32_t seen[4] = {before | (upto & own), upto, before, before | (upto & own)};
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      weights[n][m] = pack<T>(a[8 * n + 2 * m], a[8 * n + 2 * m + 1]) & seen[m];
    }
  }
  products_begin();
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    multiply<T, Inner::b>(y, weights[n], further(of_v, n * 16 * row_bytes), true);
  }
  products_end();
  float sums[2] = {0, 0};
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const float2 pair = unpack<T>(weights[n][m]);
      sums[m % 2] += pair.x + pair.y;
    }
  }
  sum_of_four(sums);
  total[0] += sums[0];
  total[2] += sums[1];
  products_wait(y);
  release(range.y);

  // Of two neighbouring pieces of 8 columns a thread of an even number stores half of the first, its neighbour half of
  // the second.
  const bool is_odd = t % 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float inverse = total[2 * i] == 0 ? 0 : __fdividef(1, total[2 * i]);  // 0 where there is no key yet
    const int at = row + 8 * i;
    uint2* to = reinterpret_cast<uint2*>(out + at * width) + 2 * (t % 2) + t / 2;
    const bool is_inside = at >= range.x && at < min(range.y, rows);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float* values = y + 8 * j + 2 * i;
      const uint32_t first = pack<T>(values[0] * inverse, values[1] * inverse);
      const uint32_t second = pack<T>(values[4] * inverse, values[5] * inverse);
      const uint32_t other = __shfl_xor_sync(~0u, is_odd ? first : second, 1);
      if (is_inside) {
        to[4 * j] = is_odd ? uint2{other, second} : uint2{first, other};
      }
    }
  }
}

// The warpgroups for queries.
template <typename Of, typename T>
__device__ __forceinline__ void walk_queries(const Args<T>& args, const Memory<Of>& memory, const Share& share) {
  bool is_own = uniform(threadIdx.x / 128) == Of::key_groups;  // the tile; otherwise it is another warpgroup's
  int i = 0, item = 0;
  float reference = 0;
  // A register that does not fit would take the threads' own memory 200 cycles.
  volatile int* const until = memory.until + (threadIdx.x - Of::key_threads);
  for (Tile tile = share.begin; i < share.count; tile.next_head()) {
    if (i > 0) {
      change_projection(args, memory, tile);
    }
    *until = min(i + tile.left(args), share.count);
    T* const end = args.out + (static_cast<int64_t>(tile.head) * args.queries + share.query + 1) * args.L * width;
    for (int rows = args.L - tile.first; i < uniform(*until); ++i, rows -= Of::rows) {
      if (is_own) {
        const int at = place<Of::queries>(i), value = place<Of::values>(i);
        barrier_wait(memory.asked + at, parity<Of::queries>(i));
        for (int last = 0; last < Of::rows; ++item) {
          make_rows<Of>(args, memory, memory.q + at * Of::matrix, memory.v + value * Of::matrix, item,
                        end - int64_t{rows} * width, rows, reference, [&](int row) {
                          last = row;
                          barrier_arrive(memory.read + place<Of::items>(item));
                          if (last == Of::rows) {
                            barrier_arrive(memory.left + value);
                            barrier_arrive(memory.answered + at);
                          }
                        });
        }
      } else {
        for (int last = 0; last < Of::rows; ++item) {
          const int slot = place<Of::items>(item);
          barrier_wait(memory.full + slot, parity<Of::items>(item));
          last = memory.ranges[slot].y;
          barrier_arrive(memory.read + slot);
        }
      }
      is_own = Of::query_groups == 1 || !is_own;
    }
  }
}

#endif

template <typename T, typename Of>
__global__ void __launch_bounds__(Of::threads, Of::blocks)
    causal_kernel(const Args<T> args, const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
                  const __grid_constant__ CUtensorMap v) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char bytes[];
  const Memory<Of> memory(bytes);
  const Share share(args);
  if (threadIdx.x == 0) {
    prepare_barriers(memory);
  }
  __syncthreads();
  if (threadIdx.x >= Of::walkers) {  // what they copy was there when the kernels before began
    change_registers<Of::registers, Of::copy_registers>();
    const int warp = uniform(threadIdx.x % 128 / 32);
    if (warp < Of::preparers) {
      prepare_keys(args, memory, share, warp);
    } else if (warp == Of::preparers) {
      copy_keys(args, memory, k, v, share);
    } else {
      copy_queries(args, memory, q, share);
    }
    return;
  }
  fill_projection<T, Of::M, Of::walkers>(args.projection, share.begin.h(args), memory.omega);
  copies_end();
  copies_wait<0>();
  copies_visible();
  wait_for_previous();  // for the sums before shares
  barrier_sync<walk_barrier, Of::walkers>();
  if (threadIdx.x < Of::key_threads) {
    change_registers<Of::registers, Of::key_registers>();
    walk_keys<Of>(args, memory, share);
  } else {
    change_registers<Of::registers, Of::query_registers>();
    walk_queries<Of>(args, memory, share);
  }
#endif
}

// Adds the sums of all keys before a share, for each that begins inside a head; a warp has a feature.
template <typename T, int M>
__global__ void __launch_bounds__(128) add_before_kernel(const Args<T> args) {
  let_next_begin();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / 32;
  const int head = static_cast<int>(i / M), row = i % M, column = threadIdx.x % 32 * 2;
  // The shares that have the head's first and last tile, as in add_parts_kernel; those behind `begin` begin inside it.
  const uint32_t heads = args.heads, blocks = args.key_blocks;
  const int begin = (static_cast<uint32_t>(head) * blocks + (blocks - 1) / args.key_tiles) / heads;
  const int last = ((head + 1u) * blocks - 1) / heads, count = (last - begin) * args.share_pieces;
  const auto slot = [&](int share, int piece) {
    return (static_cast<int64_t>(piece) * (blocks - 1) + begin + share) * M + row;
  };
  float2 kv = {0, 0};
  float z = 0, c = empty;
  if (args.kv0 != nullptr) {
    kv = *reinterpret_cast<const float2*>(args.kv0 + i * width + column);
    z = args.z0[i];
    c = fmaxf(args.log_scale0[i] * log2e - feature_bias(args, head % args.Hk, row), empty);
  }
  wait_for_previous();
  constexpr int at_once = 8;  // loads that do not wait for one another
  for (int n = 0; n < count; n += at_once) {
    float2 part_kv[at_once] = {};
    float part_z[at_once] = {}, part_c[at_once] = {};
#pragma unroll
    for (int j = 0; j < at_once; ++j) {
      if (n + j < count) {
        const int64_t at = slot((n + j) / args.share_pieces, (n + j) % args.share_pieces);
        part_kv[j] = *reinterpret_cast<const float2*>(args.part_kv + at * width + column);
        part_z[j] = args.part_z[at];
        part_c[j] = args.part_c[at];
      }
    }
    __syncwarp();  // all have read what is overwritten
#pragma unroll
    for (int j = 0; j < at_once; ++j) {
      if (n + j < count) {
        const float next = fmaxf(c, part_c[j]);
        const float old = exp2_approximate(c - next), added = exp2_approximate(part_c[j] - next);
        kv = {fmaf(kv.x, old, part_kv[j].x * added), fmaf(kv.y, old, part_kv[j].y * added)};
        z = fmaf(z, old, part_z[j] * added);
        c = next;
        if ((n + j + 1) % args.share_pieces == 0) {
          const int64_t at = slot((n + j) / args.share_pieces, 0);
          *reinterpret_cast<float2*>(args.part_kv + at * width + column) = kv;
          if (column == 0) {
            args.part_z[at] = z;
            args.part_c[at] = c;
          }
        }
      }
    }
  }
}

}  // namespace

// In units of the time that a block takes for a tile: a block's start and end take as long as 2 of them, shares 3/5 of
// the time again for their keys (with 64 features all of it), and two launches as long as 5 tiles.
template <int M>
int causal_shares(int64_t heads, int64_t queries, int64_t L, int64_t key_tiles, int64_t multiprocessors) {
  const int64_t resident = multiprocessors * Plan<M>::blocks, tiles = ceil_div(L, 64) + 2;
  const int64_t shares = std::min(std::max(resident / queries, int64_t{1}), heads * key_tiles);
  const int64_t rounds = ceil_div(heads * queries, resident), fifths = M == 64 ? 10 : 8;
  const bool one = 5 * rounds * tiles * shares <= fifths * heads * tiles + 35 * shares;
  return static_cast<int>(one || queries > resident ? heads : shares);
}

template <typename T, int M>
void causal_attention(const Args<T>& args, int device, cudaStream_t stream) {
  using Of = Plan<M>;
  if (args.L == 0 && args.kv == nullptr) {
    return;
  }
  const auto map = [&](Rows<T> x, int heads) {
    x.data = args.L > 0 ? x.data : reinterpret_cast<const T*>(args.kv);  // any address; there is nothing to read
    CUtensorMap tiles;
    STD_TORCH_CHECK(map_tiles(tiles, x, args.heads / args.Hk, heads, std::max(args.L, 1), Of::rows),
                    "linear_attention: q, k and v cannot be copied as they lie in memory; use backend='triton'");
    return tiles;
  };
  const bool divided = args.key_blocks != args.heads;
  if (divided) {
    launch(add_before_kernel<T, M>, int64_t{args.heads} * M / 4, 128, 0, stream, true, args);
  }
  const auto kernel = causal_kernel<T, Of>;
  allow_memory<Of>(kernel, device);
  launch(kernel, int64_t{args.key_blocks} * args.queries, Of::threads, Of::bytes, stream, divided, args,
         map(args.q, args.Hk * args.queries), map(args.k, args.Hk), map(args.v, args.Hk));
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
