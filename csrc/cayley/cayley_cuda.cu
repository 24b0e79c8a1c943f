#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../common/cuda.cuh"
#include "cayley_cuda.h"

// All arithmetic is float64, most of it on the tensor cores, whose rate for it is that of float32 elsewhere. A warp's
// lanes are 4 g + t, with g < 8 and t < 4.
namespace fastrpe {
namespace cayley {
namespace {

constexpr int largest = 128;  // d

// Of params: the entry in row i, column j > i.
__device__ __forceinline__ int entry(int i, int j, int d) {
  return i * (2 * d - i - 1) / 2 + j - i - 1;
}

// c += a b for a (16, 4), b (4, 8) and c (16, 8). A lane holds a at (g, t) and (g + 8, t), b at (t, g), and c at
// (g, 2 t), (g, 2 t + 1), (g + 8, 2 t) and (g + 8, 2 t + 1).
__device__ __forceinline__ void multiply_add(double (&c)[4], double a0, double a1, double b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm("mma.sync.aligned.m16n8k4.row.col.f64.f64.f64.f64 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+d"(c[0]), "+d"(c[1]), "+d"(c[2]), "+d"(c[3])
      : "d"(a0), "d"(a1), "d"(b));
#else
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
      : "+d"(c[0]), "+d"(c[1])
      : "d"(a0), "d"(b));
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
      : "+d"(c[2]), "+d"(c[3])
      : "d"(a1), "d"(b));
#endif
}

// 1 / x to 1 ulp, for x that are not denormal, from the hardware's 20 bits; everything else waits for it.
__device__ __forceinline__ double reciprocal(double x) {
  double r;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(r) : "d"(x));
  const double e = fma(-x, r, 1.0);
  return fma(r, fma(e, e, e), r);
}

struct Block {  // 2 x 2
  double a, b, c, d;
};

__device__ __forceinline__ Block operator*(double x, const Block& y) {
  return {x * y.a, x * y.b, x * y.c, x * y.d};
}

__device__ __forceinline__ Block operator*(const Block& x, const Block& y) {
  return {fma(x.a, y.a, x.b * y.c), fma(x.a, y.b, x.b * y.d), fma(x.c, y.a, x.d * y.c), fma(x.c, y.b, x.d * y.d)};
}

// x - y z
__device__ __forceinline__ Block subtract(const Block& x, double y, const Block& z) {
  return {fma(-y, z.a, x.a), fma(-y, z.b, x.b), fma(-y, z.c, x.c), fma(-y, z.d, x.d)};
}

__device__ __forceinline__ Block adjugate(const Block& x) {
  return {x.d, -x.b, -x.c, x.a};
}

__device__ __forceinline__ double determinant(const Block& x) {
  return fma(x.a, x.d, -x.b * x.c);
}

struct Pivots {  // 4 x 4, as blocks
  Block a, b, c, d;
};

// -x^{-1} for an x whose symmetric part is positive definite. All waits for two reciprocals, and little besides.
__device__ __forceinline__ Pivots negative_inverse(const Pivots& x) {
  const double r = -reciprocal(determinant(x.a));
  const Block a = adjugate(x.a), ca = x.c * a;
  const Block z = subtract(x.d, -r, ca * x.b);  // the Schur complement
  const double s = reciprocal(determinant(z));
  const Block u = r * a, cu = r * ca, ub = r * (a * x.b), v = adjugate(z), vcu = v * cu;
  return {subtract(u, s, ub * vcu), -s * (ub * v), -s * vcu, -s * v};
}

// Gauss-Jordan elimination in place, one head a block. The matrix is in registers: a warp holds 16 rows of 32 or 64
// columns, Tiles tiles of 8. There is no need to look for pivots, since the symmetric part of I + S is I and that of
// every Schur complement is no less. Four pivots K are eliminated at a time; with W = A_KK^{-1} and i, j outside K,
//
//   A_ij -= A_iK W A_Kj,  A_iK = -A_iK W,  A_Kj = W A_Kj,  A_KK = W.
//
// All of it is one product A += (C -W) R, once K's rows and columns are zero in A: R and C hold the rows and columns as
// they were, with the identity and its negative in place of A_KK. While the warps add the product, the one with the
// next pivots does so there first, and inverts them.
template <int Tiles>
__global__ void __launch_bounds__(64 * Tiles)
    cayley_basis_fwd_kernel(const float* __restrict__ params,  // (H, d (d - 1) / 2)
                            float* __restrict__ basis,         // (H, d, d)
                            double* __restrict__ inverse,      // (H, d, d)
                            int d) {
  constexpr int D = 16 * Tiles, width = 8 * Tiles;  // the largest d, columns of a warp
  // R, C and, transposed, -W: of the pivots that are added, and of those that come next.
  __shared__ struct {
    __align__(16) double rows[4][D + 2], columns[D][4], weights[4][4];
  } shared[2];
  const int64_t head = blockIdx.x;
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4, i_row = threadIdx.z, i_column = threadIdx.y;
  // A product minds not the order of its rows and columns: a lane has two neighbouring rows, and of every 32 columns 8
  // neighbours, two of each tile.
  const int first_row = i_row * 16 + 2 * g, first_column = i_column * width + 8 * t;
  const auto column = [&](int j) { return first_column + j / 4 * 32 + j % 4 * 2; };

  double x[Tiles][4];
  params += head * (d * (d - 1) / 2);
#pragma unroll
  for (int j = 0; j < Tiles; ++j) {
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const int row = first_row + v / 2, col = column(j) + v % 2;
      const bool upper = row < col, inside = row != col && max(row, col) < d;
      const float s = inside ? params[upper ? entry(row, col, d) : entry(col, row, d)] : 0.0f;
      x[j][v] = row == col ? 1.0f : upper ? s : -s;
    }
  }
  // There are no pivots before the first.
  const int thread = (i_row * blockDim.y + i_column) * 32 + lane;
  for (int i = thread; i < 4 * D; i += 32 * blockDim.y * blockDim.z) {
    shared[1].rows[i / D][i % D] = 0;
    shared[1].columns[i / 4][i % 4] = 0;
  }
  if (thread < 16) {
    shared[1].weights[thread / 4][thread % 4] = 0;
  }
  __syncthreads();

  // Adds the product of the pivots before k, and publishes [k, k + 4), which lie in a warp's given pair of tiles.
  const auto step = [&](int k, auto pair) {
    constexpr int first = 2 * pair;
    const auto& from = shared[1 - pair % 2];
    auto& to = shared[pair % 2];
    double a[2] = {}, b[Tiles];
    const double* r = &from.rows[t][i_column * width + g / 2 * 8 + g % 2];
#pragma unroll
    for (int j = 0; j < Tiles; ++j) {
      b[j] = r[j / 4 * 32 + j % 4 * 2];
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {  // C -W
      a[0] = fma(from.columns[first_row][c], from.weights[t][c], a[0]);
      a[1] = fma(from.columns[first_row + 1][c], from.weights[t][c], a[1]);
    }
    const bool was_row = first_row / 4 == k / 4 - 1;  // published before
#pragma unroll
    for (int j = 0; j < Tiles; ++j) {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        x[j][v] = was_row ? 0.0 : x[j][v];
      }
    }
    const bool has_rows = k < d && k / 16 == i_row, has_columns = k < d && k / width == i_column;
    if (has_columns) {
      multiply_add(x[first], a[0], a[1], b[first]);
      multiply_add(x[first + 1], a[0], a[1], b[first + 1]);
      if (t == k / 8 % 4) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int c = 0; c < 4; c += 2) {
            double* values = &x[first + c / 2][2 * h];
            store(&to.columns[first_row + h][c], Vec<double, 2>{values[0], values[1]});
            values[0] = first_row + h == k + c ? 1.0 : 0.0;
            values[1] = first_row + h == k + c + 1 ? 1.0 : 0.0;
          }
        }
      }
    }
#pragma unroll
    for (int j = 0; j < Tiles; ++j) {
      if (j / 2 != pair || !has_columns) {
        multiply_add(x[j], a[0], a[1], b[j]);
      }
    }
    if (has_rows) {
      if (has_columns) {
        __syncwarp();
        const auto block = [&](int i, int j) {
          const auto u = load<double, 2>(&to.columns[k + i][j]), v = load<double, 2>(&to.columns[k + i + 1][j]);
          return Block{u.at[0], u.at[1], v.at[0], v.at[1]};
        };
        const Pivots p{block(0, 0), block(0, 2), block(2, 0), block(2, 2)};
        __syncwarp();
        if (lane < 16) {
          to.columns[k + lane / 4][lane % 4] = lane / 4 == lane % 4 ? -1.0 : 0.0;
        }
        const Pivots w = negative_inverse(p);
        const auto put = [&](int i, int j, const Block& block) {
          store(&to.weights[j][i], Vec<double, 2>{block.a, block.c});
          store(&to.weights[j + 1][i], Vec<double, 2>{block.b, block.d});
        };
        if (lane == 0) {
          put(0, 0, w.a);
          put(0, 2, w.b);
          put(2, 0, w.c);
          put(2, 2, w.d);
        }
      }
      if (first_row / 4 == k / 4) {
#pragma unroll
        for (int j = 0; j < Tiles; ++j) {
          store(&to.rows[first_row % 4][column(j)], Vec<double, 2>{x[j][0], x[j][1]});
          store(&to.rows[first_row % 4 + 1][column(j)], Vec<double, 2>{x[j][2], x[j][3]});
        }
      }
    }
    __syncthreads();
  };
  const auto span = [&](int k, auto group) {
    for (const int end = min(k + 32, d + 4); k < end; k += 8) {
      step(k, std::integral_constant<int, 2 * group>{});
      if (k < d) {
        step(k + 4, std::integral_constant<int, 2 * group + 1>{});
      }
    }
  };
  for (int k = 0; k < d + 4; k += width) {
    span(k, std::integral_constant<int, 0>{});
    if constexpr (Tiles > 4) {
      span(k + 32, std::integral_constant<int, 1>{});
    }
  }

  basis += head * d * d;
  inverse += head * d * d;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = first_row + h;
#pragma unroll
    for (int j = 0; j < Tiles; j += 2) {
      const int col = column(j), at = row * d + col;
      Vec<double, 4> u;
      Vec<float, 4> p;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        u.at[n] = x[j + n / 2][2 * h + n % 2];
        p.at[n] = static_cast<float>(fma(2.0, u.at[n], row == col + n ? -1.0 : 0.0));
      }
      if (row < d && col < d && d % 4 == 0) {
        store(basis + at, p);
        store(inverse + at, u);
      } else if (row < d) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          if (col + n < d) {
            basis[at + n] = p.at[n];
            inverse[at + n] = u.at[n];
          }
        }
      }
    }
  }
}

constexpr int stripe = 16;  // rows of the result that a block of the backward computes
constexpr int warps = 16, threads = 32 * warps;

// Shared memory of the backward: X and dy, which may stay in global memory, and the products in dy's place.
template <int D>
struct Memory {
  static constexpr int stride = D + 4;  // no two lanes on one bank
  static constexpr size_t x = D * stride * sizeof(double), dy = D * stride * sizeof(float);
  static constexpr size_t products = 2 * stripe * stride * sizeof(double);
  static constexpr size_t bytes(bool staged) {
    return staged ? x + (dy > products ? dy : products) : products;
  }
};

// dparams_ij = T_ji - T_ij, i < j, for T = 2 X^T dy X^T with X = (I + S)^{-1}: 16 rows of T and of its transpose,
// 2 (X^T dy) X^T and 2 (X dy^T) X, as four products.
template <int D, bool Staged>
__global__ void __launch_bounds__(threads, 1)
    cayley_basis_bwd_kernel(const float* __restrict__ dy,        // (H, d, d)
                            const double* __restrict__ inverse,  // (H, d, d)
                            float* __restrict__ dparams,         // (H, d (d - 1) / 2)
                            int d) {
  using Of = Memory<D>;
  extern __shared__ __align__(16) char memory[];
  double (*xs)[Of::stride] = reinterpret_cast<double (*)[Of::stride]>(memory);
  float (*dys)[Of::stride] = reinterpret_cast<float (*)[Of::stride]>(memory + Of::x);
  double (*products)[stripe][Of::stride] =
      reinterpret_cast<double (*)[stripe][Of::stride]>(memory + (Staged ? Of::x : 0));
  const int64_t head = blockIdx.x;
  const int first = blockIdx.y * stripe;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  dy += head * d * d;
  inverse += head * d * d;
  const auto at = [&](const auto* p, int i, int j) { return i < d && j < d ? p[i * d + j] : 0; };
  const auto x_at = [&](int i, int j) { return Staged ? xs[i][j] : at(inverse, i, j); };
  const auto dy_at = [&](int i, int j) { return static_cast<double>(Staged ? dys[i][j] : at(dy, i, j)); };

  if constexpr (Staged) {
#pragma unroll 8
    for (int n = 0; n < D * D / threads; ++n) {
      const int i = n * (threads / D) + threadIdx.x / D, j = threadIdx.x % D;
      xs[i][j] = at(inverse, i, j);
      dys[i][j] = at(dy, i, j);
    }
    __syncthreads();
  }

  // X^T dy by one half of the warps, X dy^T by the other; tiles of 8 columns.
  constexpr int tiles = D / 4 / warps;
  const int half = warp / (warps / 2);
  const auto column_of = [&](int m) { return (warp % (warps / 2) * tiles + m) * 8; };
  double sums[tiles][4] = {};
  if (half) {
#pragma unroll 8
    for (int k = t; k < D; k += 4) {
      const double a[2] = {x_at(first + g, k), x_at(first + g + 8, k)};
#pragma unroll
      for (int m = 0; m < tiles; ++m) {
        multiply_add(sums[m], a[0], a[1], dy_at(column_of(m) + g, k));
      }
    }
  } else {
#pragma unroll 8
    for (int k = t; k < D; k += 4) {
      const double a[2] = {x_at(k, first + g), x_at(k, first + g + 8)};
#pragma unroll
      for (int m = 0; m < tiles; ++m) {
        multiply_add(sums[m], a[0], a[1], dy_at(k, column_of(m) + g));
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < tiles; ++m) {
    const int column = column_of(m) + 2 * t;
    store(&products[half][g][column], Vec<double, 2>{sums[m][0], sums[m][1]});
    store(&products[half][g + 8][column], Vec<double, 2>{sums[m][2], sums[m][3]});
  }
  __syncthreads();

  const int column = first + warp * 8;
  if (column < d) {
    double ours[4] = {}, theirs[4] = {};  // of T / 2 and its transpose
#pragma unroll 8
    for (int k = t; k < D; k += 4) {
      multiply_add(ours, products[0][g][k], products[0][g + 8][k], x_at(column + g, k));
      multiply_add(theirs, products[1][g][k], products[1][g + 8][k], x_at(k, column + g));
    }
    dparams += head * (d * (d - 1) / 2);
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const int i = first + g + v / 2 * 8, j = column + 2 * t + v % 2;
      if (i < j && j < d) {
        dparams[entry(i, j, d)] = static_cast<float>(2.0 * (theirs[v] - ours[v]));
      }
    }
  }
}

void check_values(const char* op, const Tensor& x, ScalarType dtype, int64_t dims) {
  STD_TORCH_CHECK(x.scalar_type() == dtype && x.dim() == dims && x.is_contiguous(), op,
                  ": values must be contiguous, of the right dtype and ", dims, " dimensions");
  STD_TORCH_CHECK(x.size(0) < (int64_t{1} << 31), op, ": values must be of fewer than 2^31 heads");
}

}  // namespace

std::tuple<Tensor, Tensor> cayley_basis_cuda(const Tensor& params) {
  const char* op = "cayley_basis";
  check_values(op, params, ScalarType::Float, 2);
  const int64_t H = params.size(0);
  int d = 1;
  while (d < largest && d * (d - 1) / 2 < params.size(1)) {
    ++d;
  }
  STD_TORCH_CHECK(d * (d - 1) / 2 == params.size(1), op, ": params must have d (d - 1) / 2 entries for some d up to ",
                  largest);
  const torch::stable::accelerator::DeviceGuard guard(params.get_device_index());
  Tensor basis = new_empty(params, {H, d, d}, ScalarType::Float);
  Tensor inverse = new_empty(params, {H, d, d}, ScalarType::Double);
  if (H > 0) {
    const auto launch = [&](auto tiles) {
      cayley_basis_fwd_kernel<tiles>
          <<<H, dim3(32, ceil_div(d, 8 * tiles), ceil_div(d, 16)), 0, current_stream(params)>>>(
              static_cast<const float*>(params.const_data_ptr()), static_cast<float*>(basis.mutable_data_ptr()),
              static_cast<double*>(inverse.mutable_data_ptr()), d);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    };
    d <= 64 ? launch(std::integral_constant<int, 4>{}) : launch(std::integral_constant<int, 8>{});
  }
  return {basis, inverse};
}

Tensor cayley_basis_bwd_cuda(const Tensor& dy, const Tensor& inverse) {
  const char* op = "cayley_basis_bwd";
  check_values(op, dy, ScalarType::Float, 3);
  check_values(op, inverse, ScalarType::Double, 3);
  check_like(op, "dy", dy, ScalarType::Float, inverse);
  const int64_t H = inverse.size(0), d = inverse.size(1);
  STD_TORCH_CHECK(
      0 < d && d <= largest && inverse.size(2) == d && dy.size(0) == H && dy.size(1) == d && dy.size(2) == d, op,
      ": dy and inverse must have shape (H, d, d), d up to ", largest);
  const torch::stable::accelerator::DeviceGuard guard(inverse.get_device_index());
  Tensor dparams = new_empty(dy, {H, d * (d - 1) / 2}, ScalarType::Float);
  if (H == 0 || d == 1) {
    return dparams;
  }
  int available;  // bytes of shared memory
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&available, cudaDevAttrMaxSharedMemoryPerBlockOptin, dy.get_device_index()));
  const auto launch = [&](auto size) {
    using Of = Memory<size>;
    const bool staged = Of::bytes(true) <= static_cast<size_t>(available);
    const auto kernel = staged ? cayley_basis_bwd_kernel<size, true> : cayley_basis_bwd_kernel<size, false>;
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Of::bytes(staged)));
    kernel<<<dim3(H, ceil_div(d, stripe)), threads, Of::bytes(staged), current_stream(dy)>>>(
        static_cast<const float*>(dy.const_data_ptr()), static_cast<const double*>(inverse.const_data_ptr()),
        static_cast<float*>(dparams.mutable_data_ptr()), static_cast<int>(d));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
  d <= 64 ? launch(std::integral_constant<int, 64>{}) : launch(std::integral_constant<int, 128>{});
  return dparams;
}

}  // namespace cayley
}  // namespace fastrpe
