// Hopper's asynchronous copies and warpgroup products, as far as the kernels here use them.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "dtype.h"

namespace fastrpe {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies N bytes to shared memory in the background, or zeros.
template <int N>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool inside) {
  const uint32_t address = shared_address(to);
  if constexpr (N == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(inside ? 16 : 0));
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(from), "r"(inside ? 4 : 0));
  }
}

__device__ __forceinline__ void copies_end() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most N groups of this thread's copies are under way.
template <int N>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Lets the tensor cores see what this thread wrote to shared memory; a barrier brings the other threads' share.
__device__ __forceinline__ void copies_visible() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A barrier for the 128 threads of this thread's warpgroup, one of two. A number that the compiler does not know would
// reserve all of a block's barriers.
__device__ __forceinline__ void warpgroup_sync() {
  if (threadIdx.x < 128) {
    asm volatile("bar.sync 1, 128;" ::: "memory");
  } else {
    asm volatile("bar.sync 2, 128;" ::: "memory");
  }
}

// Stores four matrices of 8 rows of 16 bytes: lane l gives the shared address of row l % 8 of number l / 8, and lane
// (g, t) = (lane / 4, lane % 4) holds bytes 4 t and on of row g of each.
__device__ __forceinline__ void store_matrices(uint32_t row, const uint32_t (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3])
               : "memory");
}

// An operand in shared memory: rows of 64 16-bit values along the inner index, the 16-byte piece u of row i at
// u ^ i % 8. `p` is aligned to 1024 bytes, or lies 32 bytes further for each step of 16 values.
__device__ __forceinline__ uint64_t operand(const void* p) {
  constexpr uint64_t eight_rows = 1024 / 16, swizzle_128 = 1;
  const uint64_t address = __cvta_generic_to_shared(p);
  return address / 16 | uint64_t{1} << 16 | eight_rows << 32 | swizzle_128 << 62;
}

// Before the first product, and where other instructions have written a product's registers.
__device__ __forceinline__ void products_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void products_end() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits for all products; c, which they wrote, may be read from here on.
__device__ __forceinline__ void products_wait(float (&c)[32]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (float& x : c) {
    asm volatile("" : "+f"(x)::"memory");
  }
}

// clang-format off
#define FASTRPE_WGMMA(TYPE, A, B, ADD, TRANSPOSE, ...)                                                                \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\n"                                                       \
               "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                                            \
               " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "    \
               "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, " A ", " B ", p, 1, 1" TRANSPOSE ";\n}"       \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),      \
                 "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]),             \
                 "+f"(c[15]), "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]),           \
                 "+f"(c[22]), "+f"(c[23]), "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]),           \
                 "+f"(c[29]), "+f"(c[30]), "+f"(c[31])                                                                \
               : __VA_ARGS__)
// clang-format on

// c (64 x 64) = a b, or c + a b if `add`, over 16 of the inner index, in the background until products_wait. Thread
// (g, t) = (lane / 4, lane % 4) of warp w holds rows 16 w + g (registers 4 j and 4 j + 1) and 16 w + g + 8 (4 j + 2 and
// 4 j + 3), columns 8 j + 2 t and the next. The rows of an operand in memory are those of c's rows or columns; of an
// operand named here, those of the inner index: it holds 16 rows of 64 values.
enum class Inner { none, b, both };

template <typename T, Inner Rows = Inner::none>
__device__ __forceinline__ void multiply(float (&c)[32], uint64_t a, uint64_t b, bool add) {
#define FASTRPE_MULTIPLY(TYPE)                                                                      \
  if constexpr (Rows == Inner::none) {                                                              \
    FASTRPE_WGMMA(TYPE, "%32", "%33", "%34", ", 0, 0", "l"(a), "l"(b), "r"(static_cast<int>(add))); \
  } else if constexpr (Rows == Inner::b) {                                                          \
    FASTRPE_WGMMA(TYPE, "%32", "%33", "%34", ", 0, 1", "l"(a), "l"(b), "r"(static_cast<int>(add))); \
  } else {                                                                                          \
    FASTRPE_WGMMA(TYPE, "%32", "%33", "%34", ", 1, 1", "l"(a), "l"(b), "r"(static_cast<int>(add))); \
  }
  if constexpr (std::is_same_v<T, BFloat16>) {
    FASTRPE_MULTIPLY("bf16")
  } else {
    FASTRPE_MULTIPLY("f16")
  }
#undef FASTRPE_MULTIPLY
}

#undef FASTRPE_WGMMA
#endif

}  // namespace fastrpe
