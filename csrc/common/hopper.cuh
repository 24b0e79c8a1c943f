// Hopper's asynchronous copies, barriers and products, as far as the kernels here use them.
#pragma once

#include <cuda.h>
#include <cuda_fp16.h>
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

// A kernel may begin while the one before it on the stream ends: where it waits, all of that one is done and visible.
__device__ __forceinline__ void let_next_begin() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_previous() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// 2^x within 2 ulp; tiny results are 0.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two neighbouring 16-bit values, the first in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float first, float second) {
  uint32_t y;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(second), "f"(first));
  }
  return y;
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)};
  } else {
    return __half22float2(*reinterpret_cast<const __half2*>(&x));
  }
}

template <typename T>
__device__ __forceinline__ float sum_of_pair(uint32_t x) {
  const float2 pair = unpack<T>(x);
  return pair.x + pair.y;
}

// What fill_ones fills, in units of 16 bytes: 16 rows, of which the tensor cores see 8 columns.
constexpr int slab_of_ones = 16 * 8;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Barrier Number of a block, from 1 on, for Threads of its threads.
template <int Number, int Threads>
__device__ __forceinline__ void barrier_sync() {
  asm volatile("bar.sync %0, %1;" ::"n"(Number), "n"(Threads) : "memory");
}

// The same, and whether any of the threads has x.
template <int Number, int Threads>
__device__ __forceinline__ bool barrier_or(bool x) {
  uint32_t any;
  asm volatile("{\n.reg .pred p, q;\nsetp.ne.u32 p, %1, 0;\nbar.red.or.pred q, %2, %3, p;\nselp.u32 %0, 1, 0, q;\n}"
               : "=r"(any)
               : "r"(static_cast<uint32_t>(x)), "n"(Number), "n"(Threads)
               : "memory");
  return any != 0;
}

// A barrier for the 128 threads of this thread's warpgroup, one of two. A number that the compiler does not know would
// reserve all of a block's barriers.
__device__ __forceinline__ void warpgroup_sync() {
  if (threadIdx.x < 128) {
    barrier_sync<1, 128>();
  } else {
    barrier_sync<2, 128>();
  }
}

// The same for any number of warpgroups, this thread's being number i.
__device__ __forceinline__ void warpgroup_sync(int i) {
  asm volatile("bar.sync %0, 128;" ::"r"(i + 1) : "memory");
}

// A barrier in shared memory, whose phases, numbered from 0 on, each end with the arrival number `count`. What threads
// did before they arrived is seen after the wait for a phase of that parity; of the phase before the first one, too.
__device__ __forceinline__ void barrier_prepare(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

// Lets background copies of tiles see the barriers that this thread has prepared.
__device__ __forceinline__ void barriers_visible() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and has the phase wait for copies of so many bytes.
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t is_over;
  do {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(is_over)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
  } while (is_over == 0);
  __syncwarp();
}

// Copies a tile of the (B, H, rows, 64) tensor behind a map in the background, rows from `row` on, zeros for those past
// its end, swizzled as the tensor cores read them; the barrier is told of its bytes.
__device__ __forceinline__ void copy_tile(void* to, const CUtensorMap& map, int b, int h, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(shared_address(to)),
      "l"(&map), "r"(0), "r"(row), "r"(h), "r"(b), "r"(shared_address(barrier))
      : "memory");
}

// All threads of a cluster's blocks arrive, and see what others did before.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// To where `to` is in the shared memory of another block of the cluster.
__device__ __forceinline__ void store_to_block(int block, float4* to, const float4& x) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "st.shared::cluster.v4.f32 [there], {%2, %3, %4, %5};\n}" ::"r"(shared_address(to)),
      "r"(block), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
      : "memory");
}

// All threads of a warpgroup change how many registers each has; more come when others have left them.
template <int From, int To>
__device__ __forceinline__ void change_registers() {
  if constexpr (To > From) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(To));
  } else if constexpr (To < From) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(To));
  }
}

// Stores four matrices of 8 x 8 16-bit values, or each one's transpose: lane l gives where row l % 8 of number l / 8
// is, a pointer or a shared address, and lane (g, t) = (lane / 4, lane % 4) holds columns 2 t and the next of row g of
// each.
template <bool Transposed = false, typename Place>
__device__ __forceinline__ void store_matrices(Place to, const uint32_t (&x)[4]) {
  uint32_t address;
  if constexpr (std::is_pointer_v<Place>) {
    address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  } else {
    address = to;
  }
  if constexpr (Transposed) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x[0]),
                 "r"(x[1]), "r"(x[2]), "r"(x[3])
                 : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x[0]),
                 "r"(x[1]), "r"(x[2]), "r"(x[3])
                 : "memory");
  }
}

// Loads what store_matrices stores.
template <bool Transposed = false>
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], const uint4* from) {
  const uint32_t address = shared_address(from);
  if constexpr (Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
  }
}

// c (16 x 8) += a (16 x 16) b (16 x 8) of a warp. Thread (g, t) = (lane / 4, lane % 4) holds of c rows g (c[0] and
// c[1]) and g + 8, columns 2 t and the next; of a pairs of columns 2 t and 2 t + 8, in the order (g, 2 t), (g + 8, 2
// t), (g, 2 t + 8), (g + 8, 2 t + 8); and of column g of b pairs of rows 2 t and 2 t + 8.
template <typename T>
__device__ __forceinline__ void multiply_warp(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// An operand in shared memory: rows of 64 16-bit values along the inner index, the 16-byte piece u of row i at
// u ^ i % 8. `p` is aligned to 1024 bytes, or lies 32 bytes further for each step of 16 values. An operand named in
// Inner, below, of 128 rows or columns of the product has the second 64 of them `slab` bytes further.
__device__ __forceinline__ uint64_t operand(const void* p, uint32_t slab = 16) {
  constexpr uint64_t eight_rows = 1024 / 16, swizzle_128 = 1;
  const uint64_t address = __cvta_generic_to_shared(p);
  return address / 16 | static_cast<uint64_t>(slab / 16) << 16 | eight_rows << 32 | swizzle_128 << 62;
}

// No carry leaves the lower half, and the compiler is not to make room for one.
__device__ __forceinline__ uint64_t add_to_lower(uint64_t operand, uint32_t x) {
  uint64_t y;
  asm("mov.b64 %0, {%1, %2};"
      : "=l"(y)
      : "r"(static_cast<uint32_t>(operand) + x), "r"(static_cast<uint32_t>(operand >> 32)));
  return y;
}

// The operand that lies `bytes` further.
__device__ __forceinline__ uint64_t further(uint64_t operand, uint32_t bytes) {
  return add_to_lower(operand, bytes / 16);
}

// The same where the slab, behind all of it, stays where it is.
__device__ __forceinline__ uint64_t further_to_slab(uint64_t operand, uint32_t bytes) {
  return add_to_lower(operand, bytes / 16 - (bytes / 16 << 16));
}

// Rows of the inner index, and their sums' slab. Of a cluster's shared memory, an address has the block's number above
// its lower 18 bits, where the slab's distance goes.
__device__ __forceinline__ uint64_t operand_with_ones(const uint4* rows, const uint4* ones) {
  constexpr uint64_t block = 0x3fff << 14;
  return (operand(rows, 0) & ~block) | static_cast<uint64_t>(ones - rows) << 16;
}

// Before the first product, and where other instructions have written a product's registers.
__device__ __forceinline__ void products_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void products_end() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most N groups of products are under way; what older ones wrote, c, may be read from here on.
template <int N = 0, int... R>
__device__ __forceinline__ void products_wait(float (&... c)[R]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
  const auto changes = [](auto& of) {
#pragma unroll
    for (float& x : of) {
      asm volatile("" : "+f"(x)::"memory");
    }
  };
  (changes(c), ...);
}

// clang-format off
#define FASTRPE_REGISTERS_64                                                                                          \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "                   \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTRPE_OUTPUTS_64                                                                                            \
  "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]),                                 \
  "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]),                             \
  "+f"(c[14]), "+f"(c[15]), "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]),                                       \
  "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), "+f"(c[24]), "+f"(c[25]),                                       \
  "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31])
#define FASTRPE_REGISTERS_72 FASTRPE_REGISTERS_64 ", %32, %33, %34, %35"
#define FASTRPE_OUTPUTS_72                                                                                            \
  FASTRPE_OUTPUTS_64, "+f"(total[0]), "+f"(total[1]), "+f"(total[2]), "+f"(total[3])
#define FASTRPE_REGISTERS_128                                                                                         \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "                   \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "                   \
  "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "                   \
  "%59, %60, %61, %62, %63"
#define FASTRPE_OUTPUTS_128                                                                                           \
  "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]),                                 \
  "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]),                             \
  "+f"(c[14]), "+f"(c[15]), "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]),                                       \
  "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), "+f"(c[24]), "+f"(c[25]),                                       \
  "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]),                                       \
  "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]), "+f"(c[37]),                                       \
  "+f"(c[38]), "+f"(c[39]), "+f"(c[40]), "+f"(c[41]), "+f"(c[42]), "+f"(c[43]),                                       \
  "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]), "+f"(c[48]), "+f"(c[49]),                                       \
  "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]),                                       \
  "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]),                                       \
  "+f"(c[62]), "+f"(c[63])
#define FASTRPE_WGMMA(COLUMNS, TYPE, A, B, ADD, TRANSPOSE, ...)                                                       \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\n"                                                       \
               "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE                                  \
               " {" FASTRPE_REGISTERS_##COLUMNS "}, " A ", " B ", p, 1, 1" TRANSPOSE ";\n}"                           \
               : FASTRPE_OUTPUTS_##COLUMNS                                                                            \
               : __VA_ARGS__)
#define FASTRPE_MEMORY_64(TYPE, TRANSPOSE)                                                                            \
  FASTRPE_WGMMA(64, TYPE, "%32", "%33", "%34", TRANSPOSE, "l"(a), "l"(b), "r"(static_cast<int>(add)))
#define FASTRPE_MEMORY_128(TYPE, TRANSPOSE)                                                                           \
  FASTRPE_WGMMA(128, TYPE, "%64", "%65", "%66", TRANSPOSE, "l"(a), "l"(b), "r"(static_cast<int>(add)))
#define FASTRPE_FRAGMENT_64(TYPE, TRANSPOSE)                                                                          \
  FASTRPE_WGMMA(64, TYPE, "{%32, %33, %34, %35}", "%36", "%37", TRANSPOSE,                                            \
                "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))
#define FASTRPE_FRAGMENT_128(TYPE, TRANSPOSE)                                                                         \
  FASTRPE_WGMMA(128, TYPE, "{%64, %65, %66, %67}", "%68", "%69", TRANSPOSE,                                           \
                "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))
#define FASTRPE_FRAGMENT_72(TYPE, TRANSPOSE)                                                                          \
  FASTRPE_WGMMA(72, TYPE, "{%36, %37, %38, %39}", "%40", "%41", TRANSPOSE,                                            \
                "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))
// clang-format on

// An operand in memory has the rows of c's rows or columns; one named here, those of the inner index: it holds 16 rows
// of 64 values (and 16 more a slab away).
enum class Inner { none, a, b, both };

// c (64 x 2 R) = a b, or c + a b if `add`, over 16 of the inner index, in the background until products_wait. Thread
// (g, t) = (lane / 4, lane % 4) of warp w holds rows 16 w + g (registers 4 j and 4 j + 1) and 16 w + g + 8 (4 j + 2 and
// 4 j + 3), columns 8 j + 2 t and the next.
template <typename T, Inner Rows = Inner::none, int R>
__device__ __forceinline__ void multiply(float (&c)[R], uint64_t a, uint64_t b, bool add) {
  static_assert(R == 32 || R == 64);
#define FASTRPE_MULTIPLY(TYPE, COLUMNS)       \
  if constexpr (Rows == Inner::none) {        \
    FASTRPE_MEMORY_##COLUMNS(TYPE, ", 0, 0"); \
  } else if constexpr (Rows == Inner::a) {    \
    FASTRPE_MEMORY_##COLUMNS(TYPE, ", 1, 0"); \
  } else if constexpr (Rows == Inner::b) {    \
    FASTRPE_MEMORY_##COLUMNS(TYPE, ", 0, 1"); \
  } else {                                    \
    FASTRPE_MEMORY_##COLUMNS(TYPE, ", 1, 1"); \
  }
  if constexpr (std::is_same_v<T, BFloat16> && R == 32) {
    FASTRPE_MULTIPLY("bf16", 64)
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    FASTRPE_MULTIPLY("bf16", 128)
  } else if constexpr (R == 32) {
    FASTRPE_MULTIPLY("f16", 64)
  } else {
    FASTRPE_MULTIPLY("f16", 128)
  }
#undef FASTRPE_MULTIPLY
}

// The same with a in registers, of 16 columns, where c's own would be: pairs of columns 2 t and 2 t + 8 of rows g and
// g + 8, in the order (g, 2 t), (g + 8, 2 t), (g, 2 t + 8), (g + 8, 2 t + 8). They may not change before products_wait.
template <typename T, Inner Rows = Inner::none, int R>
__device__ __forceinline__ void multiply(float (&c)[R], const uint32_t (&a)[4], uint64_t b, bool add) {
  static_assert((R == 32 || R == 64) && (Rows == Inner::none || Rows == Inner::b));
#define FASTRPE_MULTIPLY(TYPE, COLUMNS)      \
  if constexpr (Rows == Inner::none) {       \
    FASTRPE_FRAGMENT_##COLUMNS(TYPE, ", 0"); \
  } else {                                   \
    FASTRPE_FRAGMENT_##COLUMNS(TYPE, ", 1"); \
  }
  if constexpr (std::is_same_v<T, BFloat16> && R == 32) {
    FASTRPE_MULTIPLY("bf16", 64)
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    FASTRPE_MULTIPLY("bf16", 128)
  } else if constexpr (R == 32) {
    FASTRPE_MULTIPLY("f16", 64)
  } else {
    FASTRPE_MULTIPLY("f16", 128)
  }
#undef FASTRPE_MULTIPLY
}

// The same with a 64-column b named in Inner, and the sums of a's rows (or of total and these): of row g in total[0],
// of row g + 8 in total[2]. The slab of b is fill_ones'.
template <typename T>
__device__ __forceinline__ void multiply_and_sum(float (&c)[32], float (&total)[4], const uint32_t (&a)[4], uint64_t b,
                                                 bool add) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    FASTRPE_FRAGMENT_72("bf16", ", 1");
  } else {
    FASTRPE_FRAGMENT_72("f16", ", 1");
  }
}

// `to` is aligned to 1024 bytes.
template <typename T>
__device__ __forceinline__ void fill_ones(uint4* to) {
  const uint32_t one = pack<T>(1, 1);
  for (int n = threadIdx.x; n < slab_of_ones; n += blockDim.x) {
    to[n] = {one, one, one, one};
  }
}

#undef FASTRPE_FRAGMENT_128
#undef FASTRPE_FRAGMENT_64
#undef FASTRPE_FRAGMENT_72
#undef FASTRPE_MEMORY_128
#undef FASTRPE_MEMORY_64
#undef FASTRPE_OUTPUTS_128
#undef FASTRPE_OUTPUTS_64
#undef FASTRPE_OUTPUTS_72
#undef FASTRPE_REGISTERS_128
#undef FASTRPE_REGISTERS_64
#undef FASTRPE_REGISTERS_72
#undef FASTRPE_WGMMA
#endif

}  // namespace fastrpe
