// Hopper's warpgroup matrix product, and the loads, barriers and clusters that feed it.
//
// Operands are tiles in shared memory as TMA writes them with 128-byte swizzle: a row has 64 elements of
// 16 bits, eight rows are an atom of 1,024 bytes, atoms follow each other. linear_division.h says the
// layout in numbers, and a test holds it against PTX's.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/linear_division.h"

namespace disagg::cuda {

__device__ __forceinline__ std::uint32_t shared_address_of(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

// ---- barriers in shared memory ----

__device__ __forceinline__ void barrier_init(std::uint32_t barrier, std::uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// After the inits, before other threads, other CTAs of the cluster or TMA use them.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(std::uint32_t barrier, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// `barrier` is the address in this CTA of a barrier that all of the cluster have there. Orders no ordinary
// writes of this thread for the other CTA: that scope would cost a fence of the whole GPU.
__device__ __forceinline__ void barrier_arrive_at(std::uint32_t barrier, std::uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// Waits until the phase of that parity has ended.
__device__ __forceinline__ void barrier_wait(std::uint32_t barrier, std::uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// ---- loads by TMA ----

// Read once a step: it leaves L2 first.
constexpr std::uint64_t kEvictFirst = 0x12f0000000000000, kEvictLast = 0x14f0000000000000,
                        kEvictNormal = 0x1000000000000000;

__device__ __forceinline__ void load_box(std::uint32_t to, const CUtensorMap* map, int column, int row,
                                         std::uint32_t barrier, std::uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "l"(policy)
      : "memory");
}

// The same to all CTAs of `ranks` (bits), each at this address and telling its own barrier.
__device__ __forceinline__ void load_box_for(std::uint16_t ranks, std::uint32_t to, const CUtensorMap* map, int column,
                                             int row, std::uint32_t barrier, std::uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
      ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(ranks), "l"(policy)
      : "memory");
}

// ---- clusters ----

__device__ __forceinline__ std::uint32_t cluster_rank() {
  std::uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Of all threads of the cluster that have not exited; writes before it are seen after it. That costs a fence
// of the whole GPU; without `kOrdersWrites` it only says that all have come here.
template <bool kOrdersWrites>
__device__ __forceinline__ void cluster_sync() {
  __syncwarp();
  if constexpr (kOrdersWrites) {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  } else {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  }
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ std::uint32_t address_at(std::uint32_t here, std::uint32_t rank) {
  std::uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  return there;
}

__device__ __forceinline__ void store_at(std::uint32_t there, float a, float b, float c, float d) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(there), "f"(a), "f"(b), "f"(c), "f"(d)
               : "memory");
}

// The same, telling `barrier` of that CTA, at its address there, that 16 bytes have come.
__device__ __forceinline__ void send_to(std::uint32_t there, std::uint32_t barrier, float a, float b, float c, float d) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(there),
      "f"(a), "f"(b), "f"(c), "f"(d), "r"(barrier)
      : "memory");
}

// ---- products ----

__device__ __forceinline__ void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// c [64, N] = (adds ? c : 0) + a [64, 16] b [N, 16]^T, in bfloat16 and float32. A thread of the warpgroup
// has, of columns 8 j + 2 (lane % 4) and the next, rows 16 warp + lane / 4 in c[4 j], c[4 j + 1], and eight
// rows further down in c[4 j + 2], c[4 j + 3]. Runs on: products_commit() and products_wait().
template <int N>
__device__ __forceinline__ void multiply(float (&c)[N / 2], std::uint64_t a, std::uint64_t b, bool adds);

// Keeps the compiler from touching accumulators before the wait that is written before this.
template <int N>
__device__ __forceinline__ void products_done(float (&c)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(c[i])::"memory");
}

// clang-format off
#define DISAGG_C8(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define DISAGG_C16(c, i) DISAGG_C8(c, i), DISAGG_C8(c, i + 8)
#define DISAGG_C32(c, i) DISAGG_C16(c, i), DISAGG_C16(c, i + 16)
#define DISAGG_C64(c, i) DISAGG_C32(c, i), DISAGG_C32(c, i + 32)
#define DISAGG_R16_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define DISAGG_R16_1 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define DISAGG_R16_2 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define DISAGG_R16_3 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define DISAGG_R16_4 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define DISAGG_R16_5 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define DISAGG_R16_6 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define DISAGG_R16_7 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define DISAGG_MULTIPLY(N, LIST, A, B, ADDS, ...)                                                          \
  template <>                                                                                              \
  __device__ __forceinline__ void multiply<N>(float (&c)[N / 2], std::uint64_t a, std::uint64_t b, bool adds) { \
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " ADDS ", 0;\n"                                   \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" LIST "}, " A ", " B            \
                 ", adds, 1, 1, 0, 0;\n}"                                                                  \
                 : __VA_ARGS__ : "l"(a), "l"(b), "r"(static_cast<int>(adds)));                             \
  }
DISAGG_MULTIPLY(16, "%0, %1, %2, %3, %4, %5, %6, %7", "%8", "%9", "%10", DISAGG_C8(c, 0))
DISAGG_MULTIPLY(32, DISAGG_R16_0, "%16", "%17", "%18", DISAGG_C16(c, 0))
DISAGG_MULTIPLY(64, DISAGG_R16_0 ", " DISAGG_R16_1, "%32", "%33", "%34", DISAGG_C32(c, 0))
DISAGG_MULTIPLY(96, DISAGG_R16_0 ", " DISAGG_R16_1 ", " DISAGG_R16_2, "%48", "%49", "%50", DISAGG_C32(c, 0), DISAGG_C16(c, 32))
DISAGG_MULTIPLY(128, DISAGG_R16_0 ", " DISAGG_R16_1 ", " DISAGG_R16_2 ", " DISAGG_R16_3, "%64", "%65", "%66", DISAGG_C64(c, 0))
DISAGG_MULTIPLY(160, DISAGG_R16_0 ", " DISAGG_R16_1 ", " DISAGG_R16_2 ", " DISAGG_R16_3 ", " DISAGG_R16_4, "%80", "%81", "%82", DISAGG_C64(c, 0), DISAGG_C16(c, 64))
DISAGG_MULTIPLY(192, DISAGG_R16_0 ", " DISAGG_R16_1 ", " DISAGG_R16_2 ", " DISAGG_R16_3 ", " DISAGG_R16_4 ", " DISAGG_R16_5, "%96", "%97", "%98", DISAGG_C64(c, 0), DISAGG_C32(c, 64))
DISAGG_MULTIPLY(224, DISAGG_R16_0 ", " DISAGG_R16_1 ", " DISAGG_R16_2 ", " DISAGG_R16_3 ", " DISAGG_R16_4 ", " DISAGG_R16_5 ", " DISAGG_R16_6, "%112", "%113", "%114", DISAGG_C64(c, 0), DISAGG_C32(c, 64), DISAGG_C16(c, 96))
DISAGG_MULTIPLY(256, DISAGG_R16_0 ", " DISAGG_R16_1 ", " DISAGG_R16_2 ", " DISAGG_R16_3 ", " DISAGG_R16_4 ", " DISAGG_R16_5 ", " DISAGG_R16_6 ", " DISAGG_R16_7, "%128", "%129", "%130", DISAGG_C64(c, 0), DISAGG_C64(c, 64))
#undef DISAGG_MULTIPLY
#undef DISAGG_C8
#undef DISAGG_C16
#undef DISAGG_C32
#undef DISAGG_C64
#undef DISAGG_R16_0
#undef DISAGG_R16_1
#undef DISAGG_R16_2
#undef DISAGG_R16_3
#undef DISAGG_R16_4
#undef DISAGG_R16_5
#undef DISAGG_R16_6
#undef DISAGG_R16_7
// clang-format on

}  // namespace disagg::cuda
