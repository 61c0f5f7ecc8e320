// See decode_attention.h for what, decode_division.h for who does which part.
//
// Every warp has a ring of stages in shared memory, loads its units by bulk copies and consumes them itself:
// no barrier between warps until the end. 192 KB an SM are in flight, six times what 4.3 TB/s and 1 us
// of latency need, so that a warp may stop for a new row's query (about 1 us) with its loads still
// running: its fair share is one unit of 8 KB in 2 us, of which computing takes about a sixth.
//
//   S^T [16 tokens, 8 heads] = K [16, d] Q^T [d, 8]        m16n8k16; query heads padded to 8
//   O^T [d, 8 heads]        += V^T [d, 16] P^T [16, 8]
//
// A unit lies in shared memory as in the pool, [k/v][token][d]: one copy in order of address, and no tensor
// map, which would swizzle it on its way and is 1.5 % slower (and 10 % where it promotes loads to 256 bytes
// of L2). So equal chunks of 16 bytes of all tokens have the same banks, and lanes that would meet there take
// each other's chunks first: of K, odd rows load the second four chunks before the first; of V, token t the
// chunk i ^ t in step i. Selects and byte permutes then put each chunk where its factor wants it. The terms
// of a product of Q and K are taken in an order in which a lane's 16 bytes stay together. A row's maximum is
// raised only when a score exceeds it by 2^8.
//
// E4M3 is widened in registers to float16, which is exact, and multiplied as such; what ldmatrix takes for
// an element of 16 bits is two neighbours: the even ones become the first eight rows of a factor, the odd
// ones the others.
//
// A warp that has a whole (row, head) writes it. Pieces of several warps are merged in the CTA at its
// end. A CTA's part of what crosses CTAs is left in the workspace as soon as it is complete: what an
// earlier CTA began usually early, by the one warp that has it. The last to arrive merges, head by head,
// and mostly waits for nobody: the next CTA has long left its part. Always in the order of the tokens,
// so that it does not matter who merges.
#include "cuda/decode_attention.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numbers>
#include <type_traits>

#include "cuda/decode_division.h"
#include "cuda/decode_trace.cuh"
#include "cuda/device.cuh"

namespace disagg::cuda {
namespace {

using std::int64_t;
using std::uint32_t;
using std::uint64_t;

constexpr int kThreads = 32 * kDecodeWarps;
constexpr int kHeads = 8;      // query heads of a KV head, padded
constexpr int kPieces = 2;     // unfinished ones of a warp or a CTA
constexpr int kAtOnce = 8;     // parts of CTAs whose loads are on their way together
constexpr float kRaiseAt = 8;  // log2 by which a score may exceed the maximum that it is taken relative to
constexpr uint32_t kAll = 0xffffffffu;

// ---- instructions ----

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void init_barrier(uint32_t barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void wait_barrier(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (done == 0);
}

__device__ __forceinline__ void expect_bytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// KV is read once, so it goes from L2 first.
__device__ __forceinline__ void copy_bulk(uint32_t to, const char* from, uint32_t bytes, uint32_t barrier) {
  constexpr uint64_t kEvictFirst = 0x12f0000000000000;
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(kEvictFirst)
      : "memory");
}

__device__ __forceinline__ uint4 load_chunk(uint32_t from) {
  uint4 chunk;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(chunk.x), "=r"(chunk.y), "=r"(chunk.z), "=r"(chunk.w)
               : "r"(from)
               : "memory");
  return chunk;
}

__device__ __forceinline__ void load_transposed(uint32_t (&to)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

__device__ __forceinline__ uint32_t transpose(uint32_t matrix) {
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(matrix));
  return result;
}

__device__ __forceinline__ float exp2_of(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Adds one, and tells what was there. Orders what this thread knows to be written before it, and what
// whoever added earlier had written before what this thread reads after it.
__device__ __forceinline__ uint32_t arrive(uint32_t* counter) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

template <class T>
struct Math;

template <>
struct Math<__nv_bfloat16> {
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  static __device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

template <>
struct Math<__half> {
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  static __device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

// Two elements as float16; what is too large becomes the largest.
template <class T>
__device__ __forceinline__ uint32_t to_halves(uint32_t pair) {
  if constexpr (std::is_same_v<T, __half>) {
    return pair;
  } else {
    constexpr float kLargest = 65504;
    const auto& items = reinterpret_cast<const Pack<T, 2>&>(pair).items;
    const auto bounded = [](T x) { return fminf(fmaxf(to_float(x), -kLargest), kLargest); };
    return Math<__half>::pack(bounded(items[0]), bounded(items[1]));
  }
}

__device__ __forceinline__ uint32_t widened(uint32_t pairs, int half) {
  return halves_of_e4m3s(static_cast<std::uint16_t>(half == 0 ? pairs : pairs >> 16));
}

// Past L1: it is not coherent, and these are written by other SMs or earlier kernels.
template <class Record>
__device__ __forceinline__ Record load_record(const Record* from) {
  static_assert(sizeof(Record) % 16 == 0 && alignof(Record) == 16);
  Record record;
#pragma unroll
  for (unsigned i = 0; i < sizeof(Record) / 16; ++i)
    reinterpret_cast<int4*>(&record)[i] = __ldcg(reinterpret_cast<const int4*>(from) + i);
  return record;
}

// ---- workspace ----

// Of the grid that a shape asks for. All parts are multiples of 16 bytes.
struct Workspace {
  uint32_t* arrived;      // [num_sms, kHeads] CTAs that have left their part of what CTA i began; 0 between runs
  DecodeStart* starts;    // [num_sms, kDecodeWarps]
  DecodeRow* rows;        // [max_rows + 1] the last is followed by one without KV
  float2* weights;        // [num_sms, kPieces, kHeads] maximum (log2) and sum of a piece
  float* sums;            // [num_sms, kPieces, kHeads, head_dim]
  std::size_t bytes;

  Workspace(const DecodeAttention::Shape& shape, void* base) {
    const auto sms = static_cast<std::size_t>(shape.num_sms);
    char* next = static_cast<char*>(base);
    const auto take = [&next]<class Item>(Item*& part, std::size_t count) {
      part = reinterpret_cast<Item*>(next);
      next += (count * sizeof(Item) + 15) / 16 * 16;
    };
    take(arrived, sms * kHeads);
    take(starts, sms * kDecodeWarps);
    take(rows, static_cast<std::size_t>(shape.max_rows) + 1);
    take(weights, sms * kPieces * kHeads);
    take(sums, sms * kPieces * kHeads * static_cast<std::size_t>(shape.head_dim));
    bytes = static_cast<std::size_t>(next - static_cast<char*>(base));
  }
};

// ---- plan ----

constexpr int kPlanThreads = 512;

// Each block lists the rows that have KV, in shared memory, then looks up where some of the warps begin.
__global__ void __launch_bounds__(kPlanThreads)
    plan_kernel(const int* kv_lens, const int* page_indptr, int rows, int num_kv_heads, int max_ctas, Workspace space) {
  extern __shared__ DecodeRow listed[];
  __shared__ uint64_t warp_totals[kPlanThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int me = static_cast<int>(blockIdx.x * kPlanThreads + threadIdx.x);
  wait_for_earlier_kernels();

  for (int i = me; i < max_ctas * kHeads; i += static_cast<int>(gridDim.x) * kPlanThreads) space.arrived[i] = 0;
  // Both sums at once: rows that have KV in the upper half, their units in the lower.
  uint64_t before = 0;
  for (int base = 0; base < rows; base += kPlanThreads) {
    const int row = base + static_cast<int>(threadIdx.x);
    const int kv_len = row < rows ? kv_lens[row] : 0, page_begin = row < rows ? page_indptr[row] : 0;
    const uint64_t mine = kv_len > 0 ? (uint64_t{1} << 32) + static_cast<uint64_t>(units_of(kv_len)) : 0;
    uint64_t sum = mine;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint64_t other = __shfl_up_sync(kAll, sum, step);
      if (lane >= step) sum += other;
    }
    if (lane == 31) warp_totals[warp] = sum;
    __syncthreads();
    uint64_t earlier = before;
#pragma unroll
    for (int i = 0; i < kPlanThreads / 32; ++i) {
      const uint64_t total = warp_totals[i];
      earlier += i < warp ? total : 0;
      before += total;
    }
    if (mine != 0) {
      const uint64_t place = earlier + sum - mine;
      const auto entry = static_cast<unsigned>(place >> 32);
      listed[entry] = {row, kv_len, page_begin, static_cast<int>(place & kAll)};
      if (blockIdx.x == 0) space.rows[entry] = listed[entry];
    }
    __syncthreads();
  }
  const int entries = static_cast<int>(before >> 32);
  const auto units = static_cast<int64_t>(before & kAll) * num_kv_heads;
  const DecodeDivision division = DecodeDivision::of(units, entries, max_ctas);
  if (me == 0) space.rows[entries] = {};
  if (me < max_ctas * kDecodeWarps)
    space.starts[me] = start_of(division, me / kDecodeWarps, me % kDecodeWarps, listed, num_kv_heads);
  // `run` reads this before it waits for its own predecessor, but not before these blocks have ended.
  __threadfence();
}

// ---- run ----

struct Params {
  Workspace space;
  const char* q;
  int64_t q_stride;  // bytes, as out_stride
  char* out;
  int64_t out_stride;
  const int* page_indices;
  const int* kv_lens;
  int rows, num_heads, num_kv_heads, group, num_layers, layer;
  int page_shift;  // log2 of units a page
  const char* pool;
  int64_t run_bytes;  // one layer of one head of one page: K, then V
  float scale;     // of scores, to base 2
};

template <class Kv, int kDim>
struct Layout {
  static constexpr int kTokenBytes = kDim * static_cast<int>(sizeof(Kv));  // of K, as of V
  static constexpr int kUnitBytes = 2 * kUnitTokens * kTokenBytes;
  static constexpr int kStages = 24 * 1024 / kUnitBytes;  // of a warp
  static constexpr int kRow = kDim + 4;                   // padded: a fragment's stores meet no bank twice

  alignas(128) unsigned char ring[kDecodeWarps][kStages][kUnitBytes];
  float2 weights[kDecodeWarps][kPieces][kHeads];
  DecodePiece pieces[kDecodeWarps][kPieces];
  uint64_t barriers[kDecodeWarps][kStages];
  // Then [kDecodeWarps, group, kRow]: the sums of the piece that a warp ends but did not begin. The one
  // that it began is its last, and takes the ring's place.

  static_assert(kHeads * kRow * sizeof(float) <= kStages * kUnitBytes);
  static constexpr std::size_t bytes(int group) {
    return sizeof(Layout) + sizeof(float) * static_cast<std::size_t>(kDecodeWarps * group * kRow);
  }
  // [group, kRow]
  __device__ float* sums_of(int warp, int slot, int group) {
    return slot == 0 ? reinterpret_cast<float*>(this + 1) + warp * group * kRow
                     : reinterpret_cast<float*>(&ring[warp][0][0]);
  }
};

// The loads of a warp: walks its units ahead of the computing, and fetches page ids and rows ahead of
// itself. All of it is uniform in the warp but `pages` and `pages_ahead`, of which each lane has one.
template <class Shared>
class Loads {
 public:
  __device__ Loads(const Params& p, const DecodeStart& start, uint32_t ring, uint32_t barriers)
      : p_(p), ring_(ring), barriers_(barriers), row_(start.row), entry_(start.entry), head_(start.head),
        unit_(start.unit), left_(start.count) {
    if (left_ == 0) return;
    following_ = load_record(p_.space.rows + entry_ + 1);
    window_ = unit_ >> p_.page_shift;
    pages_ = window(row_.kv_len, row_.page_begin, window_);
    pages_ahead_ = next_window();
  }

  __device__ bool pending() const { return left_ > 0; }
  // Whether the next unit holds its row's newest token, which a kernel just before may still be writing.
  __device__ bool is_newest() const { return unit_ + 1 == units_of(row_.kv_len); }

  // Loads the next unit. Requires: pending(), and all lanes are done with the stage.
  __device__ void issue(int stage) {
    const int page = unit_ >> p_.page_shift;
    const int id = __shfl_sync(kAll, pages_, page - window_);
    const uint32_t barrier = barriers_ + stage * 8, lane = threadIdx.x % 32;
    if (lane == 0) expect_bytes(barrier, Shared::kUnitBytes);
    const uint32_t copies = p_.page_shift == 0 ? 1 : 2;  // K and V are neighbours, or not
    if (lane < copies) {
      const int64_t run = static_cast<int64_t>(id * p_.num_kv_heads + head_) * p_.num_layers + p_.layer;
      const int token = (unit_ & ((1 << p_.page_shift) - 1)) * kUnitTokens;
      copy_bulk(ring_ + stage * Shared::kUnitBytes + lane * (Shared::kUnitBytes / 2),
                p_.pool + run * p_.run_bytes + lane * (p_.run_bytes / 2) + token * Shared::kTokenBytes,
                Shared::kUnitBytes / copies, barrier);
    }
    if (--left_ > 0) step();
  }

 private:
  __device__ void step() {
    if (++unit_ == units_of(row_.kv_len)) {
      unit_ = 0;
      if (++head_ == p_.num_kv_heads) {
        head_ = 0;
        row_ = following_;
        following_ = load_record(p_.space.rows + ++entry_ + 1);
      }
    }
    const int page = unit_ >> p_.page_shift;
    if (unit_ != 0 && page != window_ + 32) return;
    window_ = page;
    pages_ = pages_ahead_;
    pages_ahead_ = next_window();
  }

  __device__ int pages_of(int kv_len) const {
    return (units_of(kv_len) + (1 << p_.page_shift) - 1) >> p_.page_shift;
  }
  __device__ int window(int kv_len, int page_begin, int first) const {
    const int page = first + static_cast<int>(threadIdx.x % 32);
    return page < pages_of(kv_len) ? __ldcg(p_.page_indices + page_begin + page) : 0;
  }
  // What `pages_` will be next: the row's next 32, or the first of the next head or row.
  __device__ int next_window() const {
    const bool same_head = window_ + 32 < pages_of(row_.kv_len), same_row = same_head || head_ + 1 < p_.num_kv_heads;
    return window(same_row ? row_.kv_len : following_.kv_len, same_row ? row_.page_begin : following_.page_begin,
                  same_head ? window_ + 32 : 0);
  }

  const Params& p_;
  uint32_t ring_, barriers_;
  DecodeRow row_, following_{};
  int entry_, head_, unit_, left_;
  int window_ = 0, pages_ = 0, pages_ahead_ = 0;
};

// Where in a stage a lane's loads are: those of its first 128 bytes of a token, and of tokens 0 to 7 of K.
// Row and column of a factor's fragment are lane / 4 and lane % 4.
struct Fragments {
  uint32_t k[2], v[4];
  bool is_odd;       // its row of K
  bool has_bits[2];  // 1 and 2 of a chunk's number in V that its tokens, 2 * (lane % 4) and the next, turn

  template <class Shared>
  static __device__ Fragments of(int lane) {
    Fragments result;
    result.is_odd = lane / 4 % 2 != 0;
    result.k[0] = lane / 4 * Shared::kTokenBytes + lane % 4 * 16 + (result.is_odd ? 64 : 0);
    result.k[1] = result.k[0] ^ 64;
    const int token = lane % 8 + lane / 16 * 8, turned = lane / 8 % 2 ^ lane % 8;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      result.v[i] = Shared::kUnitBytes / 2 + token * Shared::kTokenBytes + ((2 * i ^ turned) << 4);
    result.has_bits[0] = lane % 2 != 0;
    result.has_bits[1] = lane / 2 % 2 != 0;
    return result;
  }
};

__device__ __forceinline__ void swap_if(bool condition, uint32_t& a, uint32_t& b) {
  const uint32_t first = condition ? b : a, second = condition ? a : b;
  a = first, b = second;
}

__device__ __forceinline__ void swap_if(bool condition, uint4& a, uint4& b) {
  swap_if(condition, a.x, b.x), swap_if(condition, a.y, b.y);
  swap_if(condition, a.z, b.z), swap_if(condition, a.w, b.w);
}

// What is known of a (row, head) after some of its tokens. A lane has heads 2 * (lane % 4) and the next.
template <class T, class Kv, int kDim>
struct State {
  static constexpr bool kIsNarrow = sizeof(Kv) == 1;
  static constexpr int kTokenBytes = Layout<Kv, kDim>::kTokenBytes;
  static constexpr int kPitch = Layout<Kv, kDim>::kRow;
  using Factors = Math<std::conditional_t<kIsNarrow, __half, T>>;

  float sums[kDim / 16][4] = {};
  float maximum[2] = {-INFINITY, -INFINITY};
  float total[2] = {};  // of this lane's tokens until complete() adds the others'

  // Where of a factor's 16 elements of head_dim a lane's first or second one is.
  static __device__ int dim_of(int row, int second) { return kIsNarrow ? 2 * row + second : row + 8 * second; }

  // Adds a unit. kPartial: only its first `valid` tokens are there, the rest of the page may be anything.
  template <bool kPartial>
  __device__ __forceinline__ void add(uint32_t stage, const Fragments& at, const uint32_t (&q)[kDim / 16][2],
                                      float scale, int valid) {
    const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
    float even[4] = {}, odd[4] = {};
#pragma unroll
    for (int base = 0; base < kTokenBytes; base += 128) {
      uint4 k[2][2];  // tokens and the eight after, chunks and the four after
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) k[i][j] = load_chunk(stage + at.k[j] + i * 8 * kTokenBytes + base);
        swap_if(at.is_odd, k[i][0], k[i][1]);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t low[4] = {k[0][j].x, k[0][j].y, k[0][j].z, k[0][j].w};
        const uint32_t high[4] = {k[1][j].x, k[1][j].y, k[1][j].z, k[1][j].w};
        const auto* terms = q + (base / 64 + j) * (kIsNarrow ? 4 : 2);
        if constexpr (kIsNarrow) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const uint32_t a[4] = {widened(low[i], 0), widened(high[i], 0), widened(low[i], 1), widened(high[i], 1)};
            Factors::multiply_add(i % 2 == 0 ? even : odd, a, terms[i][0], terms[i][1]);
          }
        } else {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint32_t a[4] = {low[2 * i], high[2 * i], low[2 * i + 1], high[2 * i + 1]};
            Factors::multiply_add(i % 2 == 0 ? even : odd, a, terms[i][0], terms[i][1]);
          }
        }
      }
    }
    float s[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[i] = even[i] + odd[i];
      if (kPartial && row + i / 2 * 8 >= valid) s[i] = -INFINITY;
    }
    const float top[2] = {fmaxf(s[0], s[2]) * scale, fmaxf(s[1], s[3]) * scale};
    if (__any_sync(kAll, top[0] > maximum[0] + kRaiseAt || top[1] > maximum[1] + kRaiseAt)) raise(top);
    float p[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) p[i] = exp2_of(fmaf(s[i], scale, -maximum[i % 2]));
    total[0] += p[0] + p[2];
    total[1] += p[1] + p[3];
    const uint32_t b0 = transpose(Factors::pack(p[0], p[1])), b1 = transpose(Factors::pack(p[2], p[3]));
    // Zero times a NaN is one: tokens that are not there must be zeros too.
    const auto mask = [valid](int token) {
      return (token < valid ? 0x0000ffffu : 0u) | (token + 1 < valid ? 0xffff0000u : 0u);
    };
    constexpr uint32_t kFirstOfBoth = kIsNarrow ? 0x7160 : 0x7610;  // of E4M3 then the evens before the odds
#pragma unroll
    for (int base = 0; base < kTokenBytes; base += 128) {
      uint32_t v[2][8];  // of tokens and the eight after: chunks
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t pair[4];
        load_transposed(pair, stage + at.v[i] + base);
        if (kPartial) {
          pair[0] &= mask(column), pair[1] &= mask(column);
          pair[2] &= mask(column + 8), pair[3] &= mask(column + 8);
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          v[j][2 * i] = __byte_perm(pair[2 * j], pair[2 * j + 1], kFirstOfBoth);
          v[j][2 * i + 1] = __byte_perm(pair[2 * j + 1], pair[2 * j], kFirstOfBoth);
        }
      }
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int bit = 2; bit < 8; bit *= 2)
#pragma unroll
          for (int i = 0; i < 8; ++i)
            if ((i & bit) == 0) swap_if(at.has_bits[bit / 4], v[j][i], v[j][i | bit]);
      if constexpr (kIsNarrow) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const uint32_t a[4] = {widened(v[0][i], 0), widened(v[0][i], 1), widened(v[1][i], 0), widened(v[1][i], 1)};
          Factors::multiply_add(sums[base / 16 + i], a, b0, b1);
        }
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t a[4] = {v[0][2 * i], v[0][2 * i + 1], v[1][2 * i], v[1][2 * i + 1]};
          Factors::multiply_add(sums[base / 32 + i], a, b0, b1);
        }
      }
    }
  }

  __device__ __forceinline__ void complete() {
#pragma unroll
    for (int step = 4; step < 32; step *= 2)
#pragma unroll
      for (int i = 0; i < 2; ++i) total[i] += __shfl_xor_sync(kAll, total[i], step);
  }

  // Requires: complete().
  __device__ __forceinline__ void write(char* out, int group) const {
    const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
    const float by[2] = {1 / total[0], 1 / total[1]};
    if constexpr (kIsNarrow) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (column + j >= group) continue;
        char* to = out + ((column + j) * kDim + 2 * row) * 2;
#pragma unroll
        for (int i = 0; i < kDim / 16; ++i)
          *reinterpret_cast<uint32_t*>(to + i * 32) = Math<T>::pack(sums[i][j] * by[j], sums[i][2 + j] * by[j]);
      }
      return;
    }
    char* to = out + (row * kDim + column) * 2;
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      const uint32_t low = transpose(Math<T>::pack(sums[i][0] * by[0], sums[i][1] * by[1]));
      const uint32_t high = transpose(Math<T>::pack(sums[i][2] * by[0], sums[i][3] * by[1]));
      if (row >= group) continue;
      *reinterpret_cast<uint32_t*>(to + i * 32) = low;
      *reinterpret_cast<uint32_t*>(to + i * 32 + 16) = high;
    }
  }

  // Requires: complete().
  __device__ __forceinline__ void leave(float* to, float2 (&weights)[kHeads], int group) const {
    const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (column + j % 2 < group) to[(column + j % 2) * kPitch + i * 16 + dim_of(row, j / 2)] = sums[i][j];
    if (row == 0) {
      weights[column] = {maximum[0], total[0]};
      weights[column + 1] = {maximum[1], total[1]};
    }
  }

 private:
  __device__ __forceinline__ void raise(const float (&top)[2]) {
    float by[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float highest = top[i];
#pragma unroll
      for (int step = 4; step < 32; step *= 2) highest = fmaxf(highest, __shfl_xor_sync(kAll, highest, step));
      highest = fmaxf(highest, maximum[i]);
      by[i] = exp2_of(maximum[i] - highest);
      maximum[i] = highest;
      total[i] *= by[i];
    }
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i][j] *= by[j % 2];
  }
};

// Query heads of a KV head as the right factor: rows of head_dim, a column a head; absent ones are zeros.
template <class T, class Kv, int kDim>
__device__ __forceinline__ void load_query(uint32_t (&q)[kDim / 16][2], const char* from, int group) {
  const int head = threadIdx.x % 32 / 4, lane = threadIdx.x % 4;
  from += head * kDim * 2;
  constexpr int kPacks = 2 / static_cast<int>(sizeof(Kv));  // of 8 elements, that a chunk of K has
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) {  // a lane has the elements of every fourth chunk
    const int pack = (i / kPacks * 4 + lane) * kPacks + i % kPacks;
    const uint4 items = head < group ? __ldcg(reinterpret_cast<const uint4*>(from + pack * 16)) : uint4{};
    const uint32_t pairs[4] = {items.x, items.y, items.z, items.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) q[2 * i + j / 2][j % 2] = sizeof(Kv) == 1 ? to_halves<T>(pairs[j]) : pairs[j];
  }
}

// A lane's share of a head: kDim / 32 elements, and what pieces before this one came to.
template <class T, int kDim>
struct Merged {
  static constexpr int kWidth = kDim / 32;
  float sums[kWidth] = {};
  float total = 0;

  __device__ __forceinline__ void add(const float (&piece)[kWidth], float piece_total, float by) {
    total += piece_total * by;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sums[i] += piece[i] * by;
  }
  __device__ __forceinline__ void scale(float by) {
    total *= by;
#pragma unroll
    for (float& sum : sums) sum *= by;
  }
  __device__ __forceinline__ void write(char* head) const {
    const float by = 1 / total;
    uint32_t* to = reinterpret_cast<uint32_t*>(head) + threadIdx.x % 32 * (kWidth / 2);
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) to[i] = Math<T>::pack(sums[2 * i] * by, sums[2 * i + 1] * by);
  }
};

template <int kWidth>
__device__ __forceinline__ void copy(float (&to)[kWidth], const float* from) {
#pragma unroll
  for (int i = 0; i < kWidth / 2; ++i) {
    const float2 pair = reinterpret_cast<const float2*>(from)[i];
    to[2 * i] = pair.x, to[2 * i + 1] = pair.y;
  }
}

template <int kWidth>
__device__ __forceinline__ void copy_past_l1(float (&to)[kWidth], const float* from) {
#pragma unroll
  for (int i = 0; i < kWidth / 2; ++i) {
    const float2 pair = __ldcg(reinterpret_cast<const float2*>(from) + i);
    to[2 * i] = pair.x, to[2 * i + 1] = pair.y;
  }
}

template <class T, class Kv, int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    decode_kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  using Shared = Layout<Kv, kDim>;
  using Result = Merged<T, kDim>;
  constexpr int kWidth = Result::kWidth;
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
  const int lane = threadIdx.x % 32;
  const int warp = __shfl_sync(kAll, threadIdx.x / 32, 0);
  const int cta = static_cast<int>(blockIdx.x);

  let_next_kernel_start();
  Trace trace(p.layer, cta, warp);
  const DecodeStart start = load_record(p.space.starts + cta * kDecodeWarps + warp);
  const uint32_t ring = shared_address(&shared.ring[warp][0][0]);
  const uint32_t barriers = shared_address(&shared.barriers[warp][0]);
  if (lane == 0) {
    for (int i = 0; i < Shared::kStages; ++i) init_barrier(barriers + i * 8);
    fence_barriers();
    for (int i = 0; i < kPieces; ++i) shared.pieces[warp][i] = {};
  }
  __syncwarp();

  const int own = cta * kDecodeWarps + warp, own_kv_len = own < p.rows ? __ldcg(p.kv_lens + own) : 0;
  Loads<Shared> loads(p, start, ring, barriers);
  int loaded = 0;
  for (; loaded < Shared::kStages && loads.pending() && !loads.is_newest(); ++loaded) loads.issue(loaded);
  wait_for_earlier_kernels();
  trace.mark(Point::kReleased);
  for (; loaded < Shared::kStages && loads.pending(); ++loaded) loads.issue(loaded);

  const auto out_of = [&p](int row, int kv_head, int head) {
    return p.out + row * p.out_stride + static_cast<int64_t>(kv_head * p.group + head) * (kDim * 2);
  };
  for (int row = own; row < p.rows; row += static_cast<int>(gridDim.x) * kDecodeWarps) {
    if ((row == own ? own_kv_len : __ldcg(p.kv_lens + row)) > 0) continue;
    uint4* to = reinterpret_cast<uint4*>(out_of(row, 0, 0));
    for (int i = lane; i < p.num_heads * kDim / 8; i += 32) to[i] = uint4{};
  }

  // Where a CTA leaves its part of a query head of what crosses its border.
  const auto place_of = [](int part, int slot, int head) {
    return (static_cast<int64_t>(part) * kPieces + slot) * kHeads + head;
  };
  const auto leave_part = [&](int slot, int head, const float (&sums)[kWidth], float2 weight) {
    const int64_t place = place_of(cta, slot, head);
    float2* to = reinterpret_cast<float2*>(p.space.sums + place * kDim + lane * kWidth);
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) to[i] = {sums[2 * i], sums[2 * i + 1]};
    if (lane == 0) p.space.weights[place] = weight;
  };
  // Tells that this CTA's parts of these query heads are left, and merges those that are complete by
  // that. The other lanes' stores come before a lane's release by __syncwarp, as do the acquire before
  // the other lanes' loads. The counter's 0 is for the next run, which waits for the end of this grid.
  const auto publish = [&](int slot, uint32_t heads, int row, int kv_head) {
    const int first = start.borders.first(slot), parts = start.borders.parts(slot);
    __syncwarp();
    bool is_last = false;
    if ((heads >> lane & 1) != 0) {
      uint32_t* counter = p.space.arrived + first * kHeads + lane;
      is_last = arrive(counter) == static_cast<uint32_t>(parts - 1);
      if (is_last) *counter = 0;
    }
    uint32_t complete = __ballot_sync(kAll, is_last);
    __syncwarp();
    for (; complete != 0; complete &= complete - 1) {
      const int head = __ffs(static_cast<int>(complete)) - 1;
      Result result;
      float maximum = -INFINITY;
#pragma unroll 1
      for (int base = 0; base < parts; base += kAtOnce) {
        float sums[kAtOnce][kWidth];
        float2 weights[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          weights[i] = {-INFINITY, 0};
#pragma unroll
          for (float& sum : sums[i]) sum = 0;
          if (base + i >= parts) continue;
          const int64_t place = place_of(first + base + i, base + i == 0 ? 1 : 0, head);
          weights[i] = __ldcg(p.space.weights + place);
          copy_past_l1(sums[i], p.space.sums + place * kDim + lane * kWidth);
        }
        float highest = maximum;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) highest = fmaxf(highest, weights[i].x);
        if (base != 0) result.scale(exp2_of(maximum - highest));
        maximum = highest;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) result.add(sums[i], weights[i].y, exp2_of(weights[i].x - maximum));
      }
      result.write(out_of(row, kv_head, head));
    }
  };

  const Fragments at = Fragments::of<Shared>(lane);
  DecodeRow row = start.row;
  int entry = start.entry, head = start.head, unit = start.unit;
  int stage = 0;
  uint32_t parity = 0;
  for (int left = start.count; left > 0;) {
    uint32_t q[kDim / 16][2];
    load_query<T, Kv, kDim>(q, p.q + row.row * p.q_stride + static_cast<int64_t>(head * p.group) * (kDim * 2), p.group);
    State<T, Kv, kDim> state;
    const int units = units_of(row.kv_len), begin = unit, end = min(units, begin + left);
    left -= end - begin;
    for (; unit < end; ++unit) {
      wait_barrier(barriers + stage * 8, parity);
      trace.mark_first(Point::kFirstUnit);
      const uint32_t from = ring + stage * Shared::kUnitBytes;
      const int valid = row.kv_len - unit * kUnitTokens;
      if (valid >= kUnitTokens) {
        state.template add<false>(from, at, q, p.scale, valid);
      } else {
        state.template add<true>(from, at, q, p.scale, valid);
      }
      __syncwarp();
      if (loads.pending()) loads.issue(stage);
      if (++stage == Shared::kStages) stage = 0, parity ^= 1;
    }
    state.complete();
    const DecodePiece piece{row.row, head, units, begin, end};
    if (piece.is_whole()) {
      state.write(out_of(row.row, head, 0), p.group);
    } else {
      const int slot = piece.slot();
      float* left_sums = shared.sums_of(warp, slot, p.group);
      state.leave(left_sums, shared.weights[warp][slot], p.group);
      if (!start.has_all(slot)) {
        if (lane == 0) shared.pieces[warp][slot] = piece;
      } else {
        __syncwarp();
        for (int i = 0; i < p.group; ++i) {
          float sums[kWidth];
          copy(sums, left_sums + i * Shared::kRow + lane * kWidth);
          leave_part(slot, i, sums, shared.weights[warp][slot][i]);
        }
        publish(slot, (1u << p.group) - 1, row.row, head);
      }
    }
    if (left == 0) break;
    unit = 0;
    if (++head == p.num_kv_heads) {
      head = 0;
      row = load_record(p.space.rows + ++entry);
    }
  }
  trace.mark(Point::kLastUnit);
  __syncthreads();

  // Merge the warps' pieces, in order: a piece that has a beginning starts one to be merged, as does the
  // first. A lane looks at each; the warps take query heads in turn.
  DecodePiece piece{};
  if (lane < kDecodeWarps * kPieces) piece = shared.pieces[lane / kPieces][lane % kPieces];
  const bool is_there = piece.begin != piece.end;
  const uint32_t pieces = __ballot_sync(kAll, is_there);
  const uint32_t starts = __ballot_sync(kAll, is_there && piece.begin == 0) | (pieces & -pieces);
  for (int item = warp; item < __popc(starts) * p.group; item += kDecodeWarps) {
    const int head = item % p.group;
    uint32_t from = starts;
    for (int i = item / p.group; i > 0; --i) from &= from - 1;
    const uint32_t later = from & (from - 1);
    const uint32_t members = pieces & ~((from & -from) - 1) & (later != 0 ? (later & -later) - 1 : kAll);
    const int first = __ffs(static_cast<int>(members)) - 1, last = 31 - __clz(static_cast<int>(members));

    float2 weight{-INFINITY, 0};
    if ((members >> lane & 1) != 0) weight = shared.weights[lane / kPieces][lane % kPieces][head];
    float maximum = weight.x;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) maximum = fmaxf(maximum, __shfl_xor_sync(kAll, maximum, step));
    const float by = exp2_of(weight.x - maximum);
    Result result;
    for (uint32_t rest = members; rest != 0; rest &= rest - 1) {
      const int i = __ffs(static_cast<int>(rest)) - 1;
      float sums[kWidth];
      copy(sums, shared.sums_of(i / kPieces, i % kPieces, p.group) + head * Shared::kRow + lane * kWidth);
      result.add(sums, __shfl_sync(kAll, weight.y, i), __shfl_sync(kAll, by, i));
    }
    const DecodePiece whole{__shfl_sync(kAll, piece.row, first), __shfl_sync(kAll, piece.head, first),
                            __shfl_sync(kAll, piece.units, first), __shfl_sync(kAll, piece.begin, first),
                            __shfl_sync(kAll, piece.end, last)};
    if (whole.is_whole()) {
      result.write(out_of(whole.row, whole.head, head));
    } else {
      leave_part(whole.slot(), head, result.sums, {maximum, result.total});
      publish(whole.slot(), 1u << head, whole.row, whole.head);
    }
  }
  trace.mark(Point::kMerged);
}

// ---- the plain way ----

struct PlainParams {
  const void *q, *pool;
  void* out;
  int64_t q_stride, out_stride;
  int64_t page_stride, head_stride, layer_offset, value_offset;  // of the pool, elements
  const int *page_indices, *kv_lens, *page_indptr;
  int num_heads, group, head_dim, page_size;
  float scale;
};

// One warp a (row, head): a lane a token for the scores, a lane every 32nd element for the sums.
template <class T, class Kv>
__global__ void __launch_bounds__(32) plain_kernel(const __grid_constant__ PlainParams p) {
  constexpr int kItems = DecodeAttention::kMaxHeadDim / 32;
  __shared__ float q[DecodeAttention::kMaxHeadDim];
  const int lane = threadIdx.x, head = blockIdx.x, row = blockIdx.y;
  begin();
  const int kv_len = p.kv_lens[row];
  const int* pages = p.page_indices + p.page_indptr[row];
  const Kv* pool = static_cast<const Kv*>(p.pool) + head / p.group * p.head_stride + p.layer_offset;
  const T* query = static_cast<const T*>(p.q) + row * p.q_stride + static_cast<int64_t>(head) * p.head_dim;
  for (int i = lane; i < p.head_dim; i += 32) q[i] = to_float(query[i]) * p.scale;
  __syncwarp();

  float sums[kItems] = {}, maximum = -INFINITY, total = 0;
  for (int base = 0; base < kv_len; base += 32) {
    const int token = base + lane;
    const Kv* key = pool;
    float score = -INFINITY;
    if (token < kv_len) {
      key += pages[token / p.page_size] * p.page_stride + static_cast<int64_t>(token % p.page_size) * p.head_dim;
      score = 0;
      for (int i = 0; i < p.head_dim; ++i) score += q[i] * to_float(key[i]);
    }
    float highest = score;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) highest = fmaxf(highest, __shfl_xor_sync(kAll, highest, step));
    highest = fmaxf(highest, maximum);
    const float by = exp2f(maximum - highest), weight = exp2f(score - highest);
    maximum = highest;
    total = total * by + weight;
#pragma unroll
    for (int i = 0; i < kItems; ++i) sums[i] *= by;
    const uint64_t value = reinterpret_cast<uint64_t>(key + p.value_offset);
    for (int other = 0; other < min(32, kv_len - base); ++other) {
      const float w = __shfl_sync(kAll, weight, other);
      const Kv* v = reinterpret_cast<const Kv*>(__shfl_sync(kAll, value, other));
#pragma unroll
      for (int i = 0; i < kItems; ++i)
        if (lane + 32 * i < p.head_dim) sums[i] += w * to_float(v[lane + 32 * i]);
    }
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) total += __shfl_xor_sync(kAll, total, step);
  T* out = static_cast<T*>(p.out) + row * p.out_stride + static_cast<int64_t>(head) * p.head_dim;
#pragma unroll
  for (int i = 0; i < kItems; ++i)
    if (lane + 32 * i < p.head_dim) out[lane + 32 * i] = from_float<T>(kv_len > 0 ? sums[i] / total : 0);
}

// ---- host ----

float scale_of(const DecodeAttention::Shape& shape) {
  return std::numbers::log2e_v<float> / std::sqrt(static_cast<float>(shape.head_dim));
}

template <class T, class Kv, int kDim>
cudaError_t run_fast(const DecodeAttention::Shape& shape, const DecodeAttention::Run& run, cudaStream_t stream) {
  static_assert(Layout<Kv, kDim>::bytes(kHeads) <= 227 * 1024);
  // With fewer heads there is room for blocks of the kernel before, each of which takes a KB at least.
  const std::size_t bytes = Layout<Kv, kDim>::bytes(shape.group());
  const cudaError_t error = cudaFuncSetAttribute(
      decode_kernel<T, Kv, kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  const Params params{.space = Workspace(shape, run.workspace),
                      .q = static_cast<const char*>(run.q),
                      .q_stride = run.q_stride * 2,
                      .out = static_cast<char*>(run.out),
                      .out_stride = run.out_stride * 2,
                      .page_indices = run.page_indices,
                      .kv_lens = run.kv_lens,
                      .rows = run.rows,
                      .num_heads = shape.num_heads,
                      .num_kv_heads = shape.num_kv_heads,
                      .group = shape.group(),
                      .num_layers = run.num_layers,
                      .layer = run.layer,
                      .page_shift = std::countr_zero(static_cast<unsigned>(shape.page_size / kUnitTokens)),
                      .pool = static_cast<const char*>(run.pool),
                      .run_bytes = int64_t{2} * shape.page_size * shape.head_dim * shape.kv_bytes(),
                      .scale = scale_of(shape)};
  const Launch how{.blocks = static_cast<unsigned>(shape.num_sms),
                   .threads = kThreads,
                   .stream = stream,
                   .shared_bytes = static_cast<unsigned>(bytes)};
  return launch(decode_kernel<T, Kv, kDim>, how, params);
}

template <class T, class Kv>
cudaError_t run_plain(const DecodeAttention::Shape& shape, const DecodeAttention::Run& run, cudaStream_t stream) {
  const int64_t half = static_cast<int64_t>(shape.page_size) * shape.head_dim;
  const PlainParams params{.q = run.q,
                           .pool = run.pool,
                           .out = run.out,
                           .q_stride = run.q_stride,
                           .out_stride = run.out_stride,
                           .page_stride = 2 * half * run.num_layers * shape.num_kv_heads,
                           .head_stride = 2 * half * run.num_layers,
                           .layer_offset = 2 * half * run.layer,
                           .value_offset = half,
                           .page_indices = run.page_indices,
                           .kv_lens = run.kv_lens,
                           .page_indptr = run.page_indptr,
                           .num_heads = shape.num_heads,
                           .group = shape.group(),
                           .head_dim = shape.head_dim,
                           .page_size = shape.page_size,
                           .scale = scale_of(shape)};
  const Launch how{.blocks = static_cast<unsigned>(shape.num_heads),
                   .threads = kWarp,
                   .stream = stream,
                   .blocks_y = static_cast<unsigned>(run.rows)};
  return launch(plain_kernel<T, Kv>, how, params);
}

}  // namespace

bool DecodeAttention::Shape::is_fast() const {
  return (head_dim == 128 || (head_dim == 64 && !kv_is_e4m3)) && item_bytes(dtype) == 2 && group() <= kHeads &&
         page_size % kUnitTokens == 0 && std::has_single_bit(static_cast<unsigned>(page_size / kUnitTokens));
}

const char* DecodeAttention::check(const Shape& shape) {
  if (shape.num_kv_heads < 1) return "num_kv_heads must be at least 1";
  if (shape.num_heads < 1 || shape.num_heads % shape.num_kv_heads != 0)
    return "num_heads must be a multiple of num_kv_heads";
  if (shape.head_dim < 8 || shape.head_dim % 8 != 0 || shape.head_dim > kMaxHeadDim)
    return "head_dim must be a multiple of 8, at most 256";
  if (shape.page_size < 1) return "page_size must be at least 1";
  if (shape.max_rows < 1 || shape.max_rows > kMaxRows) return "max_rows must be in 1..8192";
  if (shape.num_sms < 1 || shape.num_sms > 1024) return "num_sms must be in 1..1024";
  return nullptr;
}

std::size_t DecodeAttention::workspace_bytes() const { return shape_.is_fast() ? Workspace(shape_, nullptr).bytes : 0; }

cudaError_t DecodeAttention::plan(const int* kv_lens, const int* page_indptr, int rows, void* workspace,
                                  cudaStream_t stream) const {
  if (!shape_.is_fast()) return cudaSuccess;
  const std::size_t bytes = static_cast<std::size_t>(rows) * sizeof(DecodeRow);
  const cudaError_t error = cudaFuncSetAttribute(plan_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 kMaxRows * static_cast<int>(sizeof(DecodeRow)));
  if (error != cudaSuccess) return error;
  const Launch how{.blocks = static_cast<unsigned>(div_up(shape_.num_sms * kDecodeWarps, kPlanThreads)),
                   .threads = kPlanThreads,
                   .stream = stream,
                   .shared_bytes = static_cast<unsigned>(bytes)};
  return launch(plan_kernel, how, kv_lens, page_indptr, rows, shape_.num_kv_heads, shape_.num_sms,
                Workspace(shape_, workspace));
}

cudaError_t DecodeAttention::run(const Run& run, cudaStream_t stream) const {
  if (run.rows == 0) return cudaSuccess;
  return with_type(shape_.dtype, [&]<class T>() {
    if constexpr (sizeof(T) == 2) {
      if (shape_.is_fast()) {
        if (shape_.kv_is_e4m3) return run_fast<T, E4M3, 128>(shape_, run, stream);
        return shape_.head_dim == 64 ? run_fast<T, T, 64>(shape_, run, stream)
                                     : run_fast<T, T, 128>(shape_, run, stream);
      }
    }
    return shape_.kv_is_e4m3 ? run_plain<T, E4M3>(shape_, run, stream) : run_plain<T, T>(shape_, run, stream);
  });
}

}  // namespace disagg::cuda
