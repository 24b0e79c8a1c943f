#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>

#include "../common/cuda.cuh"
#include "reflection_cuda.h"

// P = F_1 ... F_K one row at a time: row i is F_K ... F_1 e_i. Rows lie in shared memory, a lane each, and a warp takes
// a block of a layer: s columns of all rows. Columns never move; a shuffle changes which of them a block has. All
// arithmetic is float64.
namespace fastrpe {
namespace reflection {
namespace {

constexpr int largest = 128, most_places = 2048;  // D, K D
constexpr double least_norm = 1e-6;               // as in the reference

struct Layers {
  int K, D, block;
  uint8_t coordinates[most_places];  // (K, D): which one a place holds

  __host__ __device__ int blocks() const {
    return D / block;
  }

  __device__ __forceinline__ int coordinate(int layer, int place) const {
    return coordinates[layer * D + place];
  }
};

__device__ __forceinline__ double add_lanes(double x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    x += __shfl_xor_sync(0xffffffff, x, lanes);
  }
  return x;
}

__device__ __forceinline__ int warp_of() {
  return threadIdx.x / 32;
}

__device__ __forceinline__ int warps_of() {
  return blockDim.x / 32;
}

// u = v / max(|v|, least) of every block of every layer, both (K, D); whether every |v| is at least that.
template <typename T>
__device__ bool normalise(const Layers& layers, const T* v, double* u) {
  bool regular = true;
  for (int i = warp_of(); i < layers.K * layers.blocks(); i += warps_of()) {
    double squares = 0;
    for (int n = threadIdx.x % 32; n < layers.block; n += 32) {
      const double x = v[i * layers.block + n];
      squares += x * x;
    }
    const double norm = sqrt(add_lanes(squares));
    regular = regular && norm >= least_norm;
    for (int n = threadIdx.x % 32; n < layers.block; n += 32) {
      u[i * layers.block + n] = v[i * layers.block + n] / fmax(norm, least_norm);
    }
  }
  return __syncthreads_and(regular);
}

// y = F y for rows y (Rows, D), `stride` apart; one barrier at the end.
template <int Rows>
__device__ void reflect(const Layers& layers, int layer, const double* u, double* y, int stride) {
  u += layer * layers.D;
  for (int b = warp_of(); b < layers.blocks(); b += warps_of()) {
    const int first = b * layers.block;
#pragma unroll
    for (int row = threadIdx.x % 32; row < Rows; row += 32) {
      double* of_row = y + row * stride;
      double product = 0;
#pragma unroll 4
      for (int i = first; i < first + layers.block; ++i) {
        product = fma(u[i], of_row[layers.coordinate(layer, i)], product);
      }
#pragma unroll 4
      for (int i = first; i < first + layers.block; ++i) {
        double& x = of_row[layers.coordinate(layer, i)];
        x = fma(-2 * product, u[i], x);
      }
    }
  }
  __syncthreads();
}

// Rows [first, first + Rows) of the identity.
template <int Rows>
__device__ void fill_identity(double* y, int first, int D, int stride) {
  for (int i = threadIdx.x; i < Rows * D; i += blockDim.x) {
    y[i / D * stride + i % D] = first + i / D == i % D;
  }
  __syncthreads();
}

// Grid (H, rows / 32).
template <typename T>
__global__ void __launch_bounds__(1024) reflection_basis_fwd_kernel(const T* __restrict__ v,  // (H, K, D)
                                                                    T* __restrict__ basis,    // (H, D, D)
                                                                    const __grid_constant__ Layers layers) {
  constexpr int rows = 32;
  extern __shared__ double memory[];
  const int D = layers.D, stride = D | 1, first = blockIdx.y * rows;
  const int64_t head = blockIdx.x;
  double *y = memory, *u = y + rows * stride;
  fill_identity<rows>(y, first, D, stride);
  normalise(layers, v + head * layers.K * D, u);
  for (int layer = 0; layer < layers.K; ++layer) {
    reflect<rows>(layers, layer, u, y, stride);
  }
  basis += (head * D + first) * D;
  for (int i = threadIdx.x; i < min(rows, D - first) * D; i += blockDim.x) {
    basis[i] = static_cast<T>(y[i / D * stride + i % D]);
  }
}

// With rows y before a layer and g of the gradient behind it, dF = sum g^T y over the rows, and for F = I - 2 u u^T
//
//   du = -2 sum (u.g) y + (u.y) g,   dv = (du - u (u.du)) / |v|.
//
// From the last layer to the first, g is reflected, and so is y, which that takes one layer back; unless a v is too
// short for its F to be its own inverse, when y starts again from the identity. Grid (H).
template <typename T, int Rows>
__global__ void __launch_bounds__(1024) reflection_basis_bwd_kernel(const T* __restrict__ dy,  // (H, D, D)
                                                                    const T* __restrict__ v,   // (H, K, D)
                                                                    T* __restrict__ dv,        // (H, K, D)
                                                                    const __grid_constant__ Layers layers) {
  extern __shared__ double memory[];
  const int D = layers.D, stride = D | 1, places = layers.K * D, lane = threadIdx.x % 32;
  const int64_t head = blockIdx.x;
  double *y = memory, *g = y + Rows * stride, *u = g + Rows * stride, *du = u + places;
  dy += head * D * D;
  v += head * places;
  dv += head * places;
  for (int i = threadIdx.x; i < places; i += blockDim.x) {
    du[i] = 0;
  }
  const bool regular = normalise(layers, v, u);
  for (int first = 0; first < D; first += Rows) {
    for (int i = threadIdx.x; i < Rows * D; i += blockDim.x) {
      g[i / D * stride + i % D] = first + i / D < D ? static_cast<double>(dy[first * D + i]) : 0.0;
    }
    for (int layer = layers.K - 1; layer >= 0; --layer) {
      if (regular && layer < layers.K - 1) {
        reflect<Rows>(layers, layer, u, y, stride);
      } else {
        fill_identity<Rows>(y, first, D, stride);
        for (int before = 0; before < layer; ++before) {
          reflect<Rows>(layers, before, u, y, stride);
        }
      }
      const double* u_of = u + layer * D;
      for (int b = warp_of(); b < layers.blocks(); b += warps_of()) {
        const int begin = b * layers.block, end = begin + layers.block;
        double with_y[Rows / 32] = {}, with_g[Rows / 32] = {};
#pragma unroll 4
        for (int i = begin; i < end; ++i) {
          const int at = layers.coordinate(layer, i);
#pragma unroll
          for (int r = 0; r < Rows / 32; ++r) {
            const int row = lane + 32 * r;
            with_y[r] = fma(u_of[i], y[row * stride + at], with_y[r]);
            with_g[r] = fma(u_of[i], g[row * stride + at], with_g[r]);
          }
        }
#pragma unroll 4
        for (int i = begin; i < end; ++i) {
          const int at = layers.coordinate(layer, i);
          double sum = 0;
#pragma unroll
          for (int r = 0; r < Rows / 32; ++r) {
            const int row = lane + 32 * r;
            double& to = g[row * stride + at];
            sum += with_g[r] * y[row * stride + at] + with_y[r] * to;
            to = fma(-2 * with_g[r], u_of[i], to);
          }
          sum = add_lanes(sum);
          if (lane == 0) {
            du[layer * D + i] -= 2 * sum;
          }
        }
      }
      __syncthreads();
    }
  }
  for (int i = warp_of(); i < layers.K * layers.blocks(); i += warps_of()) {
    double squares = 0, along = 0;
    for (int n = i * layers.block + lane; n < (i + 1) * layers.block; n += 32) {
      const double x = v[n];
      squares += x * x;
      along += u[n] * du[n];
    }
    const double norm = sqrt(add_lanes(squares));
    along = norm >= least_norm ? add_lanes(along) : 0.0;
    for (int n = i * layers.block + lane; n < (i + 1) * layers.block; n += 32) {
      dv[n] = static_cast<T>((du[n] - along * u[n]) / fmax(norm, least_norm));
    }
  }
}

Layers layers_of(const char* op, const Tensor& v, int64_t block, const std::vector<int64_t>& shuffles) {
  STD_TORCH_CHECK(v.dim() == 3 && v.is_contiguous() && v.size(0) < (int64_t{1} << 31), op,
                  ": v must be contiguous, of shape (H, K, D)");
  const int64_t K = v.size(1), D = v.size(2);
  STD_TORCH_CHECK(0 < D && D <= largest && K * D <= most_places, op, ": D must be 1 to ", largest, ", and K D at most ",
                  most_places);
  STD_TORCH_CHECK(0 < block && D % block == 0 && static_cast<int64_t>(shuffles.size()) == K, op,
                  ": block must divide D, and shuffles have K numbers");
  Layers layers{static_cast<int>(K), static_cast<int>(D), static_cast<int>(block), {}};
  for (int64_t i = 0; i < K; ++i) {
    STD_TORCH_CHECK(shuffles[i] >= 0, op, ": shuffles must not be negative");
    // A shuffle multiplies a place by D / s modulo D - 1, and leaves the last.
    int64_t by = 1;
    for (int64_t n = 0; n < shuffles[i] && D > 2; ++n) {
      by = by * block % (D - 1);
    }
    for (int64_t place = 0; place < D; ++place) {
      layers.coordinates[i * D + place] = static_cast<uint8_t>(place < D - 1 ? place * by % (D - 1) : place);
    }
  }
  return layers;
}

template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, dim3 grid, int rows, int copies, const Layers& layers, const Tensor& v,
            Arguments... arguments) {
  const size_t bytes = sizeof(double) * copies * (rows * (layers.D | 1) + layers.K * layers.D);
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  kernel<<<grid, 32 * std::min(layers.blocks(), 32), bytes, current_stream(v)>>>(arguments..., layers);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename F>
void dispatch(const char* op, const Tensor& v, F&& f) {
  STD_TORCH_CHECK(v.scalar_type() == ScalarType::Float || v.scalar_type() == ScalarType::Double, op,
                  ": v must have dtype float32 or float64");
  v.scalar_type() == ScalarType::Float ? f(float{}) : f(double{});
}

}  // namespace

Tensor reflection_basis_cuda(const Tensor& v, int64_t block, std::vector<int64_t> shuffles) {
  const char* op = "reflection_basis";
  const Layers layers = layers_of(op, v, block, shuffles);
  const torch::stable::accelerator::DeviceGuard guard(v.get_device_index());
  const int64_t H = v.size(0), D = v.size(2);
  Tensor basis = new_empty(v, {H, D, D}, v.scalar_type());
  dispatch(op, v, [&](auto zero) {
    using T = decltype(zero);
    if (H > 0) {
      launch(reflection_basis_fwd_kernel<T>, dim3(H, ceil_div(D, 32)), 32, 1, layers, v,
             static_cast<const T*>(v.const_data_ptr()), static_cast<T*>(basis.mutable_data_ptr()));
    }
  });
  return basis;
}

Tensor reflection_basis_bwd_cuda(const Tensor& dy, const Tensor& v, int64_t block, std::vector<int64_t> shuffles) {
  const char* op = "reflection_basis_bwd";
  const Layers layers = layers_of(op, v, block, shuffles);
  const int64_t H = v.size(0), D = v.size(2);
  check_like(op, "dy", dy, v.scalar_type(), v);
  STD_TORCH_CHECK(dy.dim() == 3 && dy.is_contiguous() && dy.size(0) == H && dy.size(1) == D && dy.size(2) == D, op,
                  ": dy must be contiguous, of shape (H, D, D)");
  const torch::stable::accelerator::DeviceGuard guard(v.get_device_index());
  Tensor dv = new_empty_like(v);
  dispatch(op, v, [&](auto zero) {
    using T = decltype(zero);
    // As many rows at a time as find room in the shared memory of every GPU.
    const bool more = 32 < D && D <= 64;
    const auto kernel = more ? reflection_basis_bwd_kernel<T, 64> : reflection_basis_bwd_kernel<T, 32>;
    if (H > 0) {
      launch(kernel, dim3(H), more ? 64 : 32, 2, layers, v, static_cast<const T*>(dy.const_data_ptr()),
             static_cast<const T*>(v.const_data_ptr()), static_cast<T*>(dv.mutable_data_ptr()));
    }
  });
  return dv;
}

}  // namespace reflection
}  // namespace fastrpe
