// The two walks: forwards for dq, backwards for dk and dv.
#pragma once

#include "linear_attention_causal_bwd.cuh"

namespace fastrpe {
namespace linear {
namespace causal {

// dq, lse and delta of a segment, forwards; with Omega a part of dW too.
template <int M, bool Omega>
__global__ void __launch_bounds__(Layout<M>::threads, Omega ? 1 : Layout<M>::blocks)
    query_walk_kernel(const Args args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Of = Layout<M>;
  constexpr int G = Of::groups;
  extern __shared__ __align__(1024) uint4 memory[];
  const Thread at;
  // This warpgroup's features, in rows of D, of V and of keys.
  uint4 *omega = memory + at.group * slab, *state = omega + Of::matrix, *phi = state + Of::matrix;
  uint4 *tile_q = memory + 3 * Of::matrix, *tile_k = tile_q + slab, *stages = tile_k + slab;  // v and dout of each
  float* exponents = reinterpret_cast<float*>(stages + 4 * slab) + at.group * 64;
  float* weights = exponents + M;
  float* key_bias = reinterpret_cast<float*>(stages + 4 * slab) + 2 * M;
  float4* row_sums = reinterpret_cast<float4*>(key_bias + tile);  // (groups, tile)

  Heads* heads = reinterpret_cast<Heads*>(row_sums + G * tile);

  const Place place(args, false, heads);
  const auto start_projected = [&](int i_tile) {
    forget(i_tile);
    if (i_tile < place.end) {
      const int first = i_tile * tile, count = rows_of_tile(args, i_tile);
      fetch<Of::threads>(heads->q, args.q.l, first, count, tile_q);
      fetch<Of::threads>(heads->k, args.k.l, first, count, tile_k, heads->mask);
    }
    copies_end();
  };
  const auto start_values = [&](int i_tile) {
    forget(i_tile);
    if (i_tile < place.end) {
      const int first = i_tile * tile, count = rows_of_tile(args, i_tile);
      uint4* to = stages + i_tile % 2 * 2 * slab;
      fetch<Of::threads>(heads->v, args.v.l, first, count, to, heads->mask);
      fetch<Of::threads>(heads->dout, args.dout.l, first, count, to + slab);
    }
    copies_end();
  };
  fill_projection<T, M, Of::threads>(args.projection, place.i_k, memory);
  start_values(place.begin);
  start_projected(place.begin);
  let_next_begin();
  wait_for_previous();  // which sums keys; all that is copied is older

  const float exponent = args.scale * log2e, square = args.norm * 0.5f * log2e * args.scale * args.scale;
  State keys;
  keys.load<M>(at, args.sums,
               static_cast<int64_t>(place.i_b * (args.heads / args.groups) + place.i_k) * args.segments +
                   blockIdx.x % args.segments);
  float bias[2];
  load_bias(args, at, place, bias);
  float domega[Omega ? values : 1] = {}, dbias[Omega ? 16 : 1] = {};

  for (int i_tile = place.begin; i_tile < place.end; ++i_tile) {
    const uint4 *tile_v = stages + i_tile % 2 * 2 * slab, *tile_dout = tile_v + slab;
    uint4* rests = stages + (1 - i_tile % 2) * 2 * slab + at.group * slab;  // of the sums, until values come there
    const int first = i_tile * tile, count = rows_of_tile(args, i_tile);
    copies_wait<0>();
    copies_visible();
    __syncthreads();  // this tile is there, and everyone has left the one before
    fill_key_bias<Of::threads>(tile_k, count, heads->mask, first, square, key_bias);
    int begin = 0;
    do {
      float s[values];
      products_begin();
      project(s, omega, tile_k);
      products_end();
      __syncthreads();  // key_bias is there
      products_wait<0>(s);
      float top[2] = {keys.tops[0], keys.tops[1]};
      make_exponents(s, exponent, key_bias, top);
      int end = tile;
      if (any_thread(begin > 0 || is_wide(top, keys.tops))) {
        end = narrow<true>(at, s, top, keys.tops, begin, tile, key_bias);
      }
      keys.move(top);
      store_split(at, state, rests, keys.sums);
      Operand a;
      make_weights<T>(a, s, top);
      store_operand(at, phi, a);
      float p[values];
      products_begin();
      project(p, tile_q, omega);
      products_end();
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float before = sum_of_four(keys.weights[r]);
        if (at.t == 0) {
          exponents[at.row(r)] = top[r] + bias[r];
          weights[at.row(r)] = before;
        }
      }
      keys.add(at, a, nullptr);
      copies_visible();
      warpgroup_sync();  // all features' sums and weights are there

      // Weights of queries, relative to the largest of a row's features here.
      Operand w, pairs, rest;
      float largest[2] = {-INFINITY, -INFINITY}, den[2] = {}, delta[2] = {};
      products_wait<0>(p);
      make_exponents(p, exponent, exponents, largest);
      make_weights<T>(w, p, largest);
      float scores[values];
      products_begin();
      add_product(scores, w, phi, false);
      products_end();
#pragma unroll
      for (int s = 0; s < 4; ++s) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 x = unpack<T>(w[s][i]), z = pair_of(weights, column_of(at, s, i));
          den[i % 2] = fmaf(x.x, z.x, fmaf(x.y, z.y, den[i % 2]));
        }
      }
      float dscores[values];
      products_begin();
      project(dscores, tile_dout, tile_v);
      products_end();
      products_wait<1>(scores);
      const int behind = at.row(0) - 2 * at.t;
#pragma unroll
      for (int i = 0; i < values; ++i) {
        scores[i] = i / 4 * 8 + i % 2 - i / 2 % 2 * 8 <= behind ? scores[i] : 0.0f;
        den[i / 2 % 2] += scores[i];
      }
      products_wait<0>(dscores);
      forget(w);
#pragma unroll
      for (int i = 0; i < values; ++i) {
        delta[i / 2 % 2] = fmaf(scores[i], dscores[i], delta[i / 2 % 2]);
      }
      float dw[values];  // of the keys before this part, at first
      products_begin();
      project(dw, tile_dout, state);
      project(dw, tile_dout, rests, true);
      products_end();
      products_wait<0>(dw);
#pragma unroll
      for (int s = 0; s < 4; ++s) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 x = unpack<T>(w[s][i]);
          delta[i % 2] = fmaf(x.x, dw[8 * s + 2 * i], fmaf(x.y, dw[8 * s + 2 * i + 1], delta[i % 2]));
        }
      }
      forget(w);
      float factor[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        den[r] = sum_of_four(den[r]);
        delta[r] = sum_of_four(delta[r]);
        if (G > 1 && at.t == 0) {
          row_sums[at.group * tile + at.row(r)] = {largest[r], den[r], delta[r], 0.0f};
        }
      }
      if constexpr (G > 1 || !Omega) {
        __syncthreads();
      }
      if (!Omega && end == tile) {
        start_projected(i_tile + 1);  // everyone has projected this one
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = at.row(r);
        factor[r] = 1.0f;
        if constexpr (G > 1) {
          const float4 other = row_sums[(1 - at.group) * tile + row];
          const float all = fmaxf(largest[r], other.x), more = exp2_approximate(other.x - all);
          factor[r] = exp2_approximate(largest[r] - all);
          den[r] = den[r] * factor[r] + other.y * more;
          delta[r] = delta[r] * factor[r] + other.z * more;
          largest[r] = all;
        }
        const bool there = den[r] > 0.0f && row >= begin && row < end;
        const float inverse = there ? 1.0f / den[r] : 0.0f;
        factor[r] *= inverse;
        delta[r] *= inverse;
        if (at.group == 0 && at.t == 0 && row >= begin && row < min(end, count)) {
          int i = first + row;
          forget(i);
          args.lse[heads->rows + i] = there ? largest[r] + log2f(den[r]) : masked;
          args.delta[heads->rows + i] = delta[r];
        }
      }

#pragma unroll
      for (int i = 0; i < values; ++i) {
        dscores[i] -= delta[i / 2 % 2];
      }
      split(pairs, rest, dscores);
      keep_pairs<true>(at, pairs);
      keep_pairs<true>(at, rest);
      products_begin();
      add_columns(dw, pairs, phi);
      add_columns(dw, rest, phi);
      products_end();
      products_wait<0>(dw);
#pragma unroll
      for (int s = 0; s < 4; ++s) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 x = unpack<T>(w[s][i]), z = pair_of(weights, column_of(at, s, i));
          const float x0 = x.x * factor[i % 2] * fmaf(-delta[i % 2], z.x, dw[8 * s + 2 * i]);
          const float x1 = x.y * factor[i % 2] * fmaf(-delta[i % 2], z.y, dw[8 * s + 2 * i + 1]);
          if constexpr (Omega) {
            dbias[(2 * s + i / 2) * 2] += x0;
            dbias[(2 * s + i / 2) * 2 + 1] += x1;
          }
          pairs[s][i] = pack<T>(x0, x1);
        }
      }
      float dq[values];
      products_begin();
      add_product(dq, pairs, omega, false);
      products_end();
      load_split(at, keys.sums, state, rests);
      products_begin();
      add_product(keys.sums, phi, tile_v);
      products_end();
      products_wait<0>(keys.sums);
      __syncthreads();  // nobody reads phi any more, nor what the sums' rounding left
      if (end == tile) {
        start_values(i_tile + 1);
      }
      if constexpr (Omega) {
        store_operand(at, phi, pairs);
        copies_visible();
        warpgroup_sync();
        products_begin();
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          multiply<T, Inner::both>(domega, operand(phi + s * 128), operand(tile_q + s * 128), true);
        }
        products_end();
        products_wait<0>(domega);
        warpgroup_sync();
      }
      products_wait<0>(dq);
      give<G>(at, dq, phi);
      __syncthreads();
      float y[own<G>];
      keep<G>(at, y, dq);
      take<G>(at, y, memory + 2 * Of::matrix + (G - 1 - at.group) * slab);
#pragma unroll
      for (float& x : y) {
        x *= args.scale;
      }
      store_columns<G>(at, y, begin, min(end, count), args.dq + (heads->rows + first) * width);
      begin = end;
    } while (begin < tile);
    if constexpr (Omega) {
      start_projected(i_tile + 1);
    }
  }
  if constexpr (Omega) {
    __syncthreads();
    store_slot<M>(args, at, domega, dbias, reinterpret_cast<float*>(memory));
  }
#endif
}

// Keys ----------------------------------------------------------------------------------------------------------------

// dk and dv of a segment, backwards; with Omega a part of dW too.
template <int M, bool Omega>
__global__ void __launch_bounds__(Layout<M>::threads, Omega ? 1 : Layout<M>::key_blocks)
    key_walk_kernel(const Args args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Of = Layout<M>;
  constexpr int G = Of::groups;
  extern __shared__ __align__(1024) uint4 memory[];
  const Thread at;
  // This warpgroup's features, in rows of D, of V and of queries.
  uint4 *omega = memory + at.group * slab, *state = omega + Of::matrix, *phi = state + Of::matrix;
  uint4 *tile_v = memory + 3 * Of::matrix, *stages = tile_v + slab;  // q, k and dout of each
  float* floats = reinterpret_cast<float*>(stages + 6 * slab);
  float *exponents = floats + at.group * 64, *weights = exponents + M;
  float *key_bias = floats + 2 * M, *query_bias = key_bias + tile;
  float* rows = query_bias + tile;  // lse and delta of each stage
  float* norms = rows + 4 * tile;   // (groups, tile)

  Heads* heads = reinterpret_cast<Heads*>(norms + G * tile);

  const Place place(args, false, heads);
  const auto start_values = [&](int i_tile) {
    forget(i_tile);
    if (i_tile >= place.begin) {
      fetch<Of::threads>(heads->v, args.v.l, i_tile * tile, rows_of_tile(args, i_tile), tile_v, heads->mask);
    }
    copies_end();
  };
  const auto start_others = [&](int i_tile) {
    forget(i_tile);
    if (i_tile >= place.begin) {
      const int first = i_tile * tile, count = rows_of_tile(args, i_tile);
      uint4* to = stages + i_tile % 2 * 3 * slab;
      fetch<Of::threads>(heads->q, args.q.l, first, count, to);
      fetch<Of::threads>(heads->k, args.k.l, first, count, to + slab, heads->mask);
      fetch<Of::threads>(heads->dout, args.dout.l, first, count, to + 2 * slab);
      fetch_rows(args, heads->rows + first, count, rows + i_tile % 2 * 2 * tile);
    }
    copies_end();
  };
  fill_projection<T, M, Of::threads>(args.projection, place.i_k, memory);
  let_next_begin();
  wait_for_previous();  // which sums queries, or finds their lse and delta
  start_others(place.end - 1);
  start_values(place.end - 1);

  const float exponent = args.scale * log2e, square = args.norm * args.scale * args.scale;
  State queries;
  queries.load<M>(at, args.sums, blockIdx.x);
  float bias[2];
  load_bias(args, at, place, bias);
  float domega[Omega ? values : 1] = {}, dbias[Omega ? 16 : 1] = {};

  for (int i_tile = place.end - 1; i_tile >= place.begin; --i_tile) {
    uint4* tile_q = stages + i_tile % 2 * 3 * slab;
    const uint4 *tile_k = tile_q + slab, *tile_dout = tile_k + slab;
    uint4* rests = stages + (1 - i_tile % 2) * 3 * slab + at.group * slab;  // of the sums, until queries come there
    const float *lse = rows + i_tile % 2 * 2 * tile, *deltas = lse + tile;
    const int first = i_tile * tile, count = rows_of_tile(args, i_tile);
    copies_wait<1>();
    copies_visible();
    __syncthreads();  // all but the values is there, and everyone has left the tile before
    fill_key_bias<Of::threads>(tile_k, count, heads->mask, first, 0.5f * log2e * square, key_bias);
    fill_query_bias(lse, count, query_bias);
    int end = tile;
    do {
      float s[values];
      products_begin();
      project(s, omega, tile_q);
      products_end();
      __syncthreads();  // key_bias and query_bias are there
      products_wait<0>(s);
      float top[2] = {queries.tops[0], queries.tops[1]};
      make_exponents(s, exponent, query_bias, top);
      copies_wait<0>();  // the values
      copies_visible();
      int begin = 0;
      if (any_thread(end < tile || is_wide(top, queries.tops))) {
        begin = narrow<false>(at, s, top, queries.tops, 0, end, query_bias);
      }
      queries.move(top);
      store_split(at, state, rests, queries.sums);
      Operand a;
      make_weights<T>(a, s, top);
      store_operand(at, phi, a);
      float p[values];
      products_begin();
      project(p, tile_k, omega);
      products_end();
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float before = sum_of_four(queries.weights[r]);
        if (at.t == 0) {
          exponents[at.row(r)] = top[r] + bias[r];
          weights[at.row(r)] = before;
        }
      }
      queries.add(at, a, deltas);
      copies_visible();
      warpgroup_sync();  // all features' sums and weights are there
      products_wait<0>(p);

      Operand w, pairs, slopes, rest;
      {
        float key[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          key[r] = at.row(r) >= begin && at.row(r) < end ? key_bias[at.row(r)] : masked;
        }
#pragma unroll
        for (int s = 0; s < 4; ++s) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float2 c = pair_of(exponents, column_of(at, s, i));
            w[s][i] = pack<T>(exp2_approximate(fmaf(p[8 * s + 2 * i], exponent, c.x) + key[i % 2]),
                              exp2_approximate(fmaf(p[8 * s + 2 * i + 1], exponent, c.y) + key[i % 2]));
          }
        }
      }
      float scores[values];
      products_begin();
      add_product(scores, w, phi, false);
      products_end();
      products_wait<0>(scores);
      round_to(pairs, scores);
      keep_pairs<false>(at, pairs);
      float dv[values];
      products_begin();
      add_product(dv, w, state, false);
      add_product(dv, pairs, tile_dout, true);
      products_end();
      products_wait<0>(dv);
      const int64_t offset = (heads->rows + first) * width;
      const int last = min(end, count);
      // What the warpgroups give each other of dv goes the one way and then the other, where q was.
      float y[own<G>];
      keep<G>(at, y, dv);
      if (G > 1 && at.group == 0) {
        give<G>(at, dv, tile_q);
      }
      if constexpr (G > 1) {
        __syncthreads();
        if (at.group == 1) {
          take<G>(at, y, tile_q);
          give<G>(at, dv, tile_q);
        }
      }
      float dscores[values];
      products_begin();
      project(dscores, tile_v, tile_dout);
      products_end();
      products_wait<0>(dscores);
#pragma unroll
      for (int s = 0; s < 4; ++s) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 delta = pair_of(deltas, column_of(at, s, i));
          dscores[8 * s + 2 * i] -= delta.x;
          dscores[8 * s + 2 * i + 1] -= delta.y;
        }
      }
      split(slopes, rest, dscores);
      keep_pairs<false>(at, slopes);
      keep_pairs<false>(at, rest);
      if constexpr (G > 1) {
        __syncthreads();
        if (at.group == 0) {
          take<G>(at, y, tile_q);
        }
      }
      if (args.group_dv == nullptr) {
        store_columns<G>(at, y, begin, last, args.dv + offset);
      } else {
        store_columns<G>(at, y, begin, last, args.group_dv + offset);
      }
      float dw[values];
      products_begin();
      project(dw, tile_v, state);
      project(dw, tile_v, rests, true);
      add_columns(dw, slopes, phi);
      add_columns(dw, rest, phi);
      products_end();
      products_wait<0>(dw);
      float total[2] = {};
#pragma unroll
      for (int s = 0; s < 4; ++s) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 x = unpack<T>(w[s][i]), y = pair_of(weights, column_of(at, s, i));
          const float x0 = x.x * (dw[8 * s + 2 * i] - y.x), x1 = x.y * (dw[8 * s + 2 * i + 1] - y.y);
          if constexpr (Omega) {
            dbias[(2 * s + i / 2) * 2] += x0;
            dbias[(2 * s + i / 2) * 2 + 1] += x1;
          }
          dw[8 * s + 2 * i] = x0;
          dw[8 * s + 2 * i + 1] = x1;
          total[i % 2] += x0 + x1;
        }
      }
      split(slopes, rest, dw);
      float dk[values];
      products_begin();
      add_product(dk, slopes, omega, false);
      add_product(dk, rest, omega, true);
      products_end();
      load_split(at, queries.sums, state, rests);
      products_begin();
      add_product(queries.sums, phi, tile_dout);
      products_end();
      products_wait<0>(queries.sums);
      __syncthreads();  // nobody reads phi any more, nor what the sums' rounding left
      if (begin == 0) {
        start_others(i_tile - 1);
      }
      if constexpr (Omega) {
        store_operand(at, phi, slopes);
        copies_visible();
        warpgroup_sync();
        products_begin();
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          multiply<T, Inner::both>(domega, operand(phi + s * 128), operand(tile_k + s * 128), true);
        }
        products_end();
        products_wait<0>(domega);
        warpgroup_sync();
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        total[r] = sum_of_four(total[r]);
        if (G > 1 && at.t == 0) {
          norms[at.group * tile + at.row(r)] = total[r];
        }
      }
      products_wait<0>(dk);
      keep<G>(at, y, dk);
      give<G>(at, dk, phi);
      __syncthreads();  // the other warpgroup's part is there, and no product reads values any more
      if (begin == 0) {
        start_values(i_tile - 1);
      }
      take<G>(at, y, memory + 2 * Of::matrix + (G - 1 - at.group) * slab);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        total[r] = (G > 1 ? total[r] + norms[(1 - at.group) * tile + at.row(r)] : total[r]) * square;
      }
      const uint32_t own_k = pairs_of(at, tile_k) ^ 16 * (at.group * (8 / G));
#pragma unroll
      for (int i = 0; i < own<G>; i += 2) {
        const float2 x = unpack<T>(load_pair((own_k ^ 16 * (i / 4)) + 1024 * (i / 2 % 2)));
        y[i] = fmaf(y[i], args.scale, -x.x * total[i / 2 % 2]);
        y[i + 1] = fmaf(y[i + 1], args.scale, -x.y * total[i / 2 % 2]);
      }
      if (args.group_dk == nullptr) {
        store_columns<G>(at, y, begin, last, args.dk + offset);
      } else {
        store_columns<G>(at, y, begin, last, args.group_dk + offset);
      }
      if (G > 1 && begin > 0) {
        fetch<Of::threads>(heads->q, args.q.l, first, count, tile_q);
        copies_end();
        copies_wait<0>();
        copies_visible();
        __syncthreads();
      }
      end = begin;
    } while (end > 0);
  }
  if constexpr (Omega) {
    __syncthreads();
    store_slot<M>(args, at, domega, dbias, reinterpret_cast<float*>(memory));
  }
#endif
}

}  // namespace causal
}  // namespace linear
}  // namespace fastrpe
