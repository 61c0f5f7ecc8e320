// See linear.h for what, linear_division.h for who does which part.
//
//   C [64 rows of w, tokens] += W [64, 64] X [tokens, 64]^T       four m64nNk16 of a warpgroup, both from
//                                                                 shared memory
//
// One warp loads the weights, as far ahead as there is room and before the kernel before this has ended;
// another loads x after that. x comes in parts, each loaded by one of the CTAs that share it and sent to
// all. Warpgroups multiply. Sums of a tile whose k is split meet in the shared memory of the cluster, each
// CTA taking some tokens, or, where slices are cut anywhere, in the workspace, at the CTA that has the
// tile's end.
#include "cuda/linear.h"

#include "cuda/device.cuh"
#include "cuda/wgmma.cuh"

namespace disagg::cuda {
namespace {

using std::int64_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;

constexpr uint32_t kAll = 0xffffffffu;
constexpr int kAtOnce = 4;  // groups of eight tokens whose residuals are loaded together

struct Params {
  LinearPlan plan;
  LinearShared shared;
  int units, depth, rows, n;
  __nv_bfloat16* out;
  int64_t out_stride;
  const __nv_bfloat16* bias;
  const __nv_bfloat16* residual;
  int64_t residual_stride;
  const float* squares;
  float inverse_k, eps;
  float* squares_out;
  const __nv_bfloat16* norm;
  __nv_bfloat16* normed;
  int64_t normed_stride;
  bool gated;
  uint32_t* flags;  // [ctas, kLinearMaxWarps]; 0 between launches
  float4* parts;    // [ctas, tokens / 8, threads]
};

__device__ __forceinline__ uint32_t transposed(uint32_t matrix) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(matrix));
  return result;
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ float low_of(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_of(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ __forceinline__ float gate_times(float gate, float up) {
  gate = rounded<__nv_bfloat16>(gate);
  return rounded<__nv_bfloat16>(__fdividef(gate, 1.0f + __expf(-gate))) * rounded<__nv_bfloat16>(up);
}

// What becomes of a warp's sums of 16 features: rows `feature` to `feature + 15` of the weight.
class Output {
 public:
  // `factors`, in shared memory, are of all tokens.
  __device__ Output(const Params& p, int feature, int first_token, const float* factors)
      : p_(p), factors_(factors), feature_(feature), first_(first_token), row_(threadIdx.x % 32 / 4), column_(threadIdx.x % 4 * 2) {
    if (p.bias != nullptr && feature < p.n) {
      bias_[0] = to_float(p.bias[feature + row_]);
      bias_[1] = to_float(p.bias[feature + 8 + row_]);
    }
    if (p.norm != nullptr && feature < p.n) {
      norm_[0] = to_float(p.norm[feature + row_]);
      norm_[1] = to_float(p.norm[feature + 8 + row_]);
    }
  }

  // The residual of eight tokens, as memory has it: token row_, features column_ and the next, and eight on.
  __device__ __forceinline__ void load(uint32_t (&residual)[2], int group) const {
    residual[0] = residual[1] = 0;
    const int token = first_ + group * 8 + row_;
    if (p_.residual == nullptr || token >= p_.rows || feature_ >= p_.n) return;
    const auto* from =
        reinterpret_cast<const uint32_t*>(p_.residual + token * p_.residual_stride + feature_ + column_);
    residual[0] = __ldcg(from);
    residual[1] = __ldcg(from + 4);
  }

  // Sums as `multiply` has them, of tokens 8 * group to 8 * group + 7. For the whole warp. Returns the
  // squares of what it writes: of tokens column_ and the next, summed over this thread's features.
  __device__ __forceinline__ float2 write(float a, float b, float c, float d, const uint32_t (&residual)[2],
                                          int group) const {
    if (p_.squares != nullptr) {
      const float2 factor = *reinterpret_cast<const float2*>(factors_ + group * 8 + column_);
      a *= factor.x, b *= factor.y, c *= factor.x, d *= factor.y;
    }
    a += bias_[0], b += bias_[0], c += bias_[1], d += bias_[1];
    const int token = first_ + group * 8 + row_;
    const bool is_live = token < p_.rows && feature_ < p_.n;
    __nv_bfloat16* to = p_.out + token * p_.out_stride + column_;
    if (p_.gated) {
      const uint32_t pair = transposed(pack(gate_times(a, c), gate_times(b, d)));
      if (is_live) *reinterpret_cast<uint32_t*>(to + feature_ / 2) = pair;
      return {};
    }
    if (p_.residual != nullptr) {
      const uint32_t low = transposed(residual[0]), high = transposed(residual[1]);
      a += low_of(low), b += high_of(low), c += low_of(high), d += high_of(high);
    }
    const uint32_t low = pack(a, b), high = pack(c, d);
    store(to, low, high, is_live);
    if (p_.normed == nullptr) return {};
    a = low_of(low), b = high_of(low), c = low_of(high), d = high_of(high);
    store(p_.normed + token * p_.normed_stride + column_, pack(a * norm_[0], b * norm_[0]),
          pack(c * norm_[1], d * norm_[1]), is_live);
    return {a * a + c * c, b * b + d * d};
  }

 private:
  __device__ __forceinline__ void store(__nv_bfloat16* to, uint32_t low, uint32_t high, bool is_live) const {
    low = transposed(low), high = transposed(high);
    if (!is_live) return;
    *reinterpret_cast<uint32_t*>(to + feature_) = low;
    *reinterpret_cast<uint32_t*>(to + feature_ + 8) = high;
  }

  const Params& p_;
  const float* factors_;
  int feature_, first_, row_, column_;
  float bias_[2] = {}, norm_[2] = {};
};

// A place in a ring of stages, and the parity of the round, in one register.
class Stage {
 public:
  __device__ __forceinline__ int index() const { return static_cast<int>(bits_ & 0xffff); }
  __device__ __forceinline__ uint32_t parity() const { return bits_ >> 16; }
  __device__ __forceinline__ int before(int stages) const { return (index() == 0 ? stages : index()) - 1; }
  __device__ __forceinline__ void advance(int stages) {
    bits_ = index() + 1 == stages ? ~bits_ & 0x10000 : bits_ + 1;
  }

 private:
  uint32_t bits_ = 0;
};

// Of the threads that multiply.
template <int kThreads>
__device__ __forceinline__ void consumers_sync() {
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}

template <int kTokens, int kGroups>
__global__ void __launch_bounds__(128 * kGroups + 64, kGroups == 1 && kTokens <= 128 ? 2 : 1)
    linear_kernel(const __grid_constant__ CUtensorMap w_map, const __grid_constant__ CUtensorMap x_map,
                  const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) unsigned char dynamic_shared[];
  constexpr int kWarps = 4 * kGroups, kThreads = 32 * kWarps, kColumns = kTokens / 8;
  constexpr int kWBytes = kGroups * kLinearTile * 128, kXBytes = kTokens * 128;
  const int lane = threadIdx.x % 32, warp = __shfl_sync(kAll, threadIdx.x / 32, 0);
  const int multicast = p.plan.multicast, splits = p.plan.splits, cta = static_cast<int>(blockIdx.x);
  const int rank = static_cast<int>(cluster_rank()), split = rank / multicast, member = rank - split * multicast;
  const int slice = cta / (multicast * splits) * splits + split;
  const int first_token = static_cast<int>(blockIdx.y) * kTokens, rows = min(kTokens, p.rows - first_token);
  LinearWalk walk(p.units, p.depth, slice, p.plan.slices);

  const uint32_t w_ring = shared_address_of(dynamic_shared), x_ring = w_ring + p.plan.w_stages * kWBytes;
  const uint32_t w_full = w_ring + p.shared.barriers_at, w_empty = w_full + 8 * p.plan.w_stages;
  const uint32_t x_full = w_empty + 8 * p.plan.w_stages, x_empty = x_full + 8 * p.plan.x_stages;
  const uint32_t partials = w_ring + p.shared.partials_at, sent = x_empty + 8 * p.plan.x_stages;
  // One tile, if `splits`. CTA i of its slices adds columns [i * per, (i + 1) * per), in groups of eight tokens.
  const int per = LinearShared::slice_columns(p.plan), columns = (rows + 7) / 8;
  let_next_kernel_start();

  // The other roles keep the cluster's barriers company.
  const auto finish = [&] {
    if (splits > 1 && !p.shared.partials_apart) cluster_sync<false>();
    if (splits > 1 && p.plan.sends == 0) {
      cluster_sync<true>();
    } else if (multicast > 1) {  // nobody leaves while others may still tell it that x has been read
      cluster_sync<false>();
    }
  };

  if (warp == kWarps) {  // weights
    Stage stage;
    const auto row_of = [&] { return (walk.tile() * multicast + member) * (kLinearTile * kGroups); };
    int k = walk.first, row = row_of(), loaded = 0;
    const auto load = [&] {
      const uint32_t full = w_full + 8 * stage.index();
      barrier_expect(full, kWBytes);
      load_box(w_ring + stage.index() * kWBytes, &w_map, k * kLinearDepth, row, full, gridDim.y > 1 ? kEvictNormal : kEvictFirst);
      stage.advance(p.plan.w_stages);
      ++loaded;
      if (++k == walk.last) {
        walk.next_tile();
        k = walk.first, row = row_of();
      }
    };
    if (lane == 0) {
      for (int i = 0; i < p.plan.w_stages; ++i) {
        barrier_init(w_full + 8 * i, 1);
        barrier_init(w_empty + 8 * i, kWarps);
      }
      for (int i = 0; i < p.plan.x_stages; ++i) {
        barrier_init(x_full + 8 * i, 1);
        barrier_init(x_empty + 8 * i, kWarps * multicast);
      }
      barrier_init(sent, 1);
      barrier_init_fence();
      if (splits > 1) barrier_expect(sent, splits * max(0, min(per, columns - split * per)) * (kThreads * 16));
      while (!walk.is_over() && loaded < p.plan.w_stages) load();
    }
    cluster_sync<false>();
    if (lane == 0) {
      while (!walk.is_over()) {
        barrier_wait(w_empty + 8 * stage.index(), stage.parity() ^ 1);
        load();
      }
    }
    finish();
  } else if (warp == kWarps + 1) {  // x
    if (lane == 0) asm volatile("prefetch.tensormap [%0];" ::"l"(&x_map) : "memory");
    cluster_sync<false>();
    if (lane == 0) {
      Stage stage;
      const int part = kTokens / multicast;
      const auto everybody = static_cast<uint16_t>(((1 << multicast) - 1) << (split * multicast));
      wait_for_earlier_kernels();
      for (int loaded = 0; !walk.is_over(); walk.next_tile()) {
        for (int k = walk.first; k < walk.last; ++k, ++loaded) {
          const uint32_t full = x_full + 8 * stage.index();
          if (loaded >= p.plan.x_stages) barrier_wait(x_empty + 8 * stage.index(), stage.parity() ^ 1);
          barrier_expect(full, kXBytes);
          const uint32_t to = x_ring + stage.index() * kXBytes + member * part * 128;
          if (multicast == 1) {
            load_box(to, &x_map, k * kLinearDepth, first_token, full, kEvictLast);
          } else {
            load_box_for(everybody, to, &x_map, k * kLinearDepth, first_token + member * part, full,
                         kEvictLast);
          }
          stage.advance(p.plan.x_stages);
        }
      }
    }
    finish();
  } else {
    cluster_sync<false>();
    wait_for_earlier_kernels();
    float* factors = reinterpret_cast<float*>(dynamic_shared + p.shared.factors_at);
    if (p.squares != nullptr) {
      for (int token = threadIdx.x; token < rows; token += kThreads) {
        float sum = 0;
#pragma unroll 16
        for (int part = 0; part < p.depth; ++part) sum += __ldcg(p.squares + part * kLinearMaxRows + first_token + token);
        factors[token] = 1.0f / sqrtf(sum * p.inverse_k + p.eps);
      }
      consumers_sync<kThreads>();
    }
    const int group = warp / 4;
    const auto feature_of = [&](int tile) {
      return ((tile * multicast + member) * kGroups + group) * kLinearTile + warp % 4 * 16;
    };
    Stage w_stage, x_stage;
    float sums[kTokens / 2];
    // The stages before the current ones.
    const auto release = [&] {
      if (lane == 0) barrier_arrive(w_empty + 8 * w_stage.before(p.plan.w_stages));
      if (lane < multicast) barrier_arrive_at(x_empty + 8 * x_stage.before(p.plan.x_stages), split * multicast + lane);
    };
#pragma unroll 1
    for (; !walk.is_over(); walk.next_tile()) {
#pragma unroll 1
      for (int k = walk.first; k < walk.last; ++k) {
        barrier_wait(w_full + 8 * w_stage.index(), w_stage.parity());
        barrier_wait(x_full + 8 * x_stage.index(), x_stage.parity());
        const uint64_t w = tile_descriptor(w_ring + w_stage.index() * kWBytes + group * (kLinearTile * 128));
        const uint64_t x = tile_descriptor(x_ring + x_stage.index() * kXBytes);
        products_fence();
#pragma unroll
        for (int i = 0; i < kLinearDepth / 16; ++i)
          multiply<kTokens>(sums, w + 2 * i, x + 2 * i, i > 0 || k > walk.first);
        products_commit();
        products_wait<1>();
        if (k > walk.first) release();
        w_stage.advance(p.plan.w_stages);
        x_stage.advance(p.plan.x_stages);
      }
      products_wait<0>();
      products_done(sums);
      release();

      if (splits > 1) {  // and then there is one tile
        if (!p.shared.partials_apart) cluster_sync<false>();
        const uint32_t mine = partials + (split * per * kThreads + threadIdx.x) * 16;
        uint32_t to = address_at(mine, member), told = address_at(sent, member);
        int owner = 0, at = 0;
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          if (j >= columns) continue;
          const uint32_t there = to + at * (kThreads * 16);
          if (p.plan.sends != 0) {
            send_to(there, told, sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]);
          } else {
            store_at(there, sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]);
          }
          if (++at == per) {
            at = 0;
            if (++owner < splits) {
              to = address_at(mine, owner * multicast + member);
              told = address_at(sent, owner * multicast + member);
            }
          }
        }
        const int first = split * per, last = min(first + per, columns);
        const Output output(p, feature_of(walk.tile()), first_token, factors);
        uint32_t residual[kAtOnce][2];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) output.load(residual[i], first + i);
        if (p.plan.sends != 0) {
          barrier_wait(sent, 0);
        } else {
          cluster_sync<true>();
        }
        float4* from = reinterpret_cast<float4*>(dynamic_shared + p.shared.partials_at) + threadIdx.x;
#pragma unroll 1
        for (int base = first; base < last; base += kAtOnce) {
          if (base > first) {
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) output.load(residual[i], base + i);
          }
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            if (base + i >= last) continue;
            float4 sum = from[(base + i - first) * kThreads];
            for (int other = 1; other < splits; ++other) {
              const float4 part = from[(other * per + base + i - first) * kThreads];
              sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
            }
            float2 squares = output.write(sum.x, sum.y, sum.z, sum.w, residual[i], base + i);
            if (p.squares_out == nullptr) continue;
#pragma unroll
            for (int step = 4; step < 32; step *= 2) {
              squares.x += __shfl_xor_sync(kAll, squares.x, step);
              squares.y += __shfl_xor_sync(kAll, squares.y, step);
            }
            // In this thread's own place of the first slice's part, which it has read.
            *reinterpret_cast<float2*>(from + (base + i - first) * kThreads) = squares;
          }
        }
        if (p.squares_out != nullptr) {
          consumers_sync<kThreads>();
          // A thread a token: four warps have 16 features each, and four lanes two tokens each.
          const int part = feature_of(walk.tile()) / kLinearTile, of_group = threadIdx.x % 128;
          const float* warps = reinterpret_cast<const float*>(dynamic_shared + p.shared.partials_at) + group * 128 * 4;
          for (int i = of_group; i < (last - first) * 8; i += 128) {
            const float* at = warps + (i / 8 * kThreads + i % 8 / 2) * 4 + i % 2;
            const int token = first_token + first * 8 + i;
            if (token < p.rows && part * kLinearTile < p.n)
              p.squares_out[part * kLinearMaxRows + token] = at[0] + at[32 * 4] + at[64 * 4] + at[96 * 4];
          }
        }
        if (p.plan.sends != 0 && multicast > 1) cluster_sync<false>();
        return;
      }

      const auto place_of = [&](int of_slice) { return (static_cast<int>(blockIdx.y) * p.plan.slices + of_slice) * multicast + member; };
      const auto parts_of = [&](int place) {
        return p.parts + static_cast<int64_t>(place) * (kColumns * kThreads) + threadIdx.x;
      };
      if (walk.last < walk.depth) {  // a later slice ends this tile
        float4* to = parts_of(place_of(slice));
#pragma unroll
        for (int j = 0; j < kColumns; ++j)
          if (j * 8 < rows)
            __stcg(to + j * kThreads, float4{sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]});
        // The other lanes' stores come before this by __syncwarp.
        __syncwarp();
        uint32_t* flag = p.flags + place_of(slice) * kLinearMaxWarps + warp;
        if (lane == 0) asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flag) : "memory");
        continue;
      }
      // Earlier slices began it: each warp adds what the same warp there has left.
      const int tile_begin = walk.end - walk.depth;
      for (int other = slice, begin = walk.begin; begin > tile_begin;) {
        begin = LinearWalk::begin_of(p.units, --other, p.plan.slices);
        uint32_t* flag = p.flags + place_of(other) * kLinearMaxWarps + warp;
        uint32_t is_left = 0;
        while (is_left == 0) asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(is_left) : "l"(flag) : "memory");
        __syncwarp();
        const float4* from = parts_of(place_of(other));
#pragma unroll
        for (int base = 0; base < kColumns; base += kAtOnce, from += kAtOnce * kThreads) {
          if (base * 8 >= rows) continue;
          float4 parts[kAtOnce];  // of columns past the rows whatever is there: nobody reads those sums
#pragma unroll
          for (int i = 0; i < kAtOnce && base + i < kColumns; ++i) parts[i] = __ldcg(from + i * kThreads);
#pragma unroll
          for (int i = 0; i < kAtOnce && base + i < kColumns; ++i) {
            float* sum = sums + 4 * (base + i);
            sum[0] += parts[i].x, sum[1] += parts[i].y, sum[2] += parts[i].z, sum[3] += parts[i].w;
          }
        }
        __syncwarp();
        if (lane == 0) *flag = 0;  // for the next launch, which waits for the end of this grid
      }
      const Output output(p, feature_of(walk.tile()), first_token, factors);
      constexpr int kNow = kTokens > 224 ? 2 : kAtOnce;  // beside all sums, registers are few
#pragma unroll
      for (int base = 0; base < kColumns; base += kNow) {
        uint32_t residual[kNow][2];
#pragma unroll
        for (int i = 0; i < kNow; ++i) output.load(residual[i], base + i);
#pragma unroll
        for (int i = 0; i < kNow; ++i) {
          const int j = base + i;
          if (j < kColumns && j * 8 < rows)
            output.write(sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3], residual[i], j);
        }
      }
    }
    finish();
  }
}

// A matrix [rows, columns] of 16-bit elements in boxes of 64 columns, swizzled. Encoded by the driver, which
// this asks for at run time instead of linking it.
cudaError_t encode(const void* base, int64_t rows, int64_t columns, int64_t stride, int box_rows, CUtensorMap* map) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
  if (error != cudaSuccess) return error;
  if (result != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[] = {kLinearDepth, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const auto encode_tiled = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  const CUresult status =
      encode_tiled(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(base), sizes, strides, box, steps,
                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <int kTokens, int kGroups>
cudaError_t run(const LinearArgs& args, const LinearPlan& plan, cudaStream_t stream) {
  CUtensorMap w_map, x_map;
  cudaError_t error = encode(args.w, args.n, args.k, args.k, kLinearTile * kGroups, &w_map);
  if (error == cudaSuccess) error = encode(args.x, args.rows, args.k, args.x_stride, kTokens / plan.multicast, &x_map);
  const LinearShared shared = LinearShared::of(plan, kLinearSharedLimit);
  const auto kernel = linear_kernel<kTokens, kGroups>;
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared.bytes);
  if (error != cudaSuccess) return error;
  const Params params{.plan = plan,
                      .shared = shared,
                      .units = linear_units(args.n, args.k, plan),
                      .depth = args.k / kLinearDepth,
                      .rows = args.rows,
                      .n = args.n,
                      .out = static_cast<__nv_bfloat16*>(args.out),
                      .out_stride = args.out_stride,
                      .bias = static_cast<const __nv_bfloat16*>(args.bias),
                      .residual = static_cast<const __nv_bfloat16*>(args.residual),
                      .residual_stride = args.residual_stride,
                      .squares = args.squares,
                      .inverse_k = 1.0f / static_cast<float>(args.k),
                      .eps = args.eps,
                      .squares_out = args.squares_out,
                      .norm = static_cast<const __nv_bfloat16*>(args.norm),
                      .normed = static_cast<__nv_bfloat16*>(args.normed),
                      .normed_stride = args.normed_stride,
                      .gated = args.gated,
                      .flags = static_cast<uint32_t*>(args.workspace),
                      .parts = reinterpret_cast<float4*>(static_cast<char*>(args.workspace) + kLinearFlagBytes)};
  const Launch how{.blocks = static_cast<unsigned>(plan.ctas()),
                   .threads = 128 * kGroups + 64,
                   .stream = stream,
                   .blocks_y = static_cast<unsigned>(plan.token_tiles(args.rows)),
                   .shared_bytes = static_cast<unsigned>(shared.bytes),
                   .cluster = static_cast<unsigned>(plan.cluster())};
  return launch(kernel, how, w_map, x_map, params);
}

template <int kTokens>
cudaError_t run(const LinearArgs& args, const LinearPlan& plan, cudaStream_t stream) {
  return plan.groups == 1 ? run<kTokens, 1>(args, plan, stream) : run<kTokens, 2>(args, plan, stream);
}

}  // namespace

cudaError_t linear(const LinearArgs& args, const LinearPlan& plan, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  switch (plan.tokens) {
    case 16: return run<16>(args, plan, stream);
    case 32: return run<32>(args, plan, stream);
    case 64: return run<64>(args, plan, stream);
    case 96: return run<96>(args, plan, stream);
    case 128: return run<128>(args, plan, stream);
    case 160: return run<160>(args, plan, stream);
    case 192: return run<192>(args, plan, stream);
    case 224: return run<224>(args, plan, stream);
    case 256: return run<256>(args, plan, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace disagg::cuda
