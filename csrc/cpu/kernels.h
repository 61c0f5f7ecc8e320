// The table of CPU kernels that each instruction level fills, and the records they take.
//
// One templated source (kernels_impl.h) is compiled once a level (kernels_baseline.cpp,
// kernels_avx2.cpp, kernels_avx512.cpp); kernels_for() picks a table at run time. Kernels are
// single-threaded, allocate nothing and touch no global state; linear.h, attention.h and rows.h
// split work over threads.
//
// Numerics. A "row" is one token's vector, or one (token, query head) in attention. The bits of a
// row's result depend on that row's inputs alone: not on how many rows share the call, their order,
// the thread count, how a prompt was cut into chunks, or whether the token came as decode or as
// prefill. For this each reduction has one fixed order: along k in ascending order in matrix
// products (float32 in blocks of kSumBlock), and in attention over KV tiles and chunks that begin
// at multiples of kKvTile and kKvChunk from the start of the sequence. Between levels bits differ.
#pragma once

#include <cstddef>
#include <cstdint>

namespace disagg::cpu {

enum class Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };
enum class DType : int { kFloat32 = 0, kBFloat16 = 1 };

// Columns of one packed panel; the unit in which matrix products are split.
inline constexpr int kPanel = 32;
inline constexpr int kSumBlock = 128;
// Tokens whose K and V are packed at a time, and tokens whose softmax is one partial result.
inline constexpr int kKvTile = 64;
inline constexpr int kKvChunk = 256;
// Most (token, query head) rows of one attention task.
inline constexpr int kMaxQueryRows = 96;
inline constexpr int kMaxHeadDim = 256;

// Bytes of an element, and elements of one 32-bit word of a packed operand.
constexpr int item_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }
constexpr int items_per_word(DType dtype) { return 4 / item_bytes(dtype); }

// y = x W^T + bias. Packed W is `[ceil(n / 32)][k_words][32]` words: word (p, i, c) holds, of row
// 32 p + c of W, element i (fp32) or elements 2i and 2i + 1 (bf16); columns past n are zero. A panel
// takes the bytes of its 32 rows, so a weight of whole panels is packed where it lies.
struct LinearArgs {
  const void* x;           // [rows, k], rows `x_stride` elements apart
  std::int64_t x_stride;
  const std::uint32_t* packed;  // nullptr: not packed beforehand
  const void* bias;        // [n] in the element type, or nullptr
  void* out;               // [rows, n], rows `out_stride` elements apart
  std::int64_t out_stride;
  std::int64_t rows, n, k_words;
};

// The paged pool `[page, kv_head, layer, 2, token, head_dim]` as one layer sees it, in elements.
struct KvPool {
  void* base;              // of this layer's K in page 0, head 0
  std::int64_t page_stride, head_stride, value_offset;
  std::int64_t page_size, head_dim;
};

struct AttentionArgs {
  const void* q;           // [tokens, kv_heads * group, head_dim], tokens `q_stride` elements apart
  std::int64_t q_stride;
  void* out;               // the same shape, tokens `out_stride` elements apart
  std::int64_t out_stride;
  KvPool pool;
  std::int64_t group;      // query heads of one KV head
  float scale;
};

// Some consecutive new tokens of one sequence, one KV head, and a range of its KV.
struct AttentionTask {
  const std::int32_t* pages;              // page table of the sequence
  std::int64_t kv_begin, kv_end;          // kv_begin is a multiple of kKvChunk
  std::int64_t first_token, num_tokens;   // rows of q and out; num_tokens * group <= kMaxQueryRows
  std::int64_t first_position;            // position of first_token in its sequence
  std::int64_t kv_head;
  // Negative: write out. Else each chunk's partial result goes from there on, partial_floats() apart.
  std::int64_t partials_at;
};

// A partial result is, for each row, its maximum score and sum of weights, then its unnormalised
// output: m[rows], l[rows], o[rows][head_dim rounded up to a panel], each on a 64-byte boundary.
constexpr std::int64_t padded_dim(std::int64_t head_dim) { return (head_dim + kPanel - 1) / kPanel * kPanel; }
constexpr std::int64_t whole_vectors(std::int64_t floats) { return (floats + 15) / 16 * 16; }
constexpr std::int64_t partial_floats(std::int64_t rows, std::int64_t head_dim) {
  return 2 * whole_vectors(rows) + rows * padded_dim(head_dim);
}
// Bytes of scratch that attend() needs for any task of this head size, on a 64-byte boundary.
// Zeroed once, for what pads a head is read and dropped.
std::size_t attention_scratch_bytes(std::int64_t head_dim);

struct RmsNormArgs {
  const void* x;           // [rows, n], rows `x_stride` elements apart
  std::int64_t x_stride;
  void* residual;          // nullptr, or [rows, n] contiguous: residual += x first, norm of the sum
  const void* weight;      // [n]
  void* out;               // [rows, n] contiguous
  std::int64_t n;
  float eps;
};

struct RopeArgs {
  void* q;                 // [tokens, num_heads, head_dim], tokens `q_stride` elements apart
  void* k;                 // [tokens, num_kv_heads, head_dim]
  const void* v;
  std::int64_t q_stride, k_stride, v_stride;
  std::int64_t num_heads, num_kv_heads, rotary_dim;
  const float* cos_sin;    // [positions, rotary_dim]: rotary_dim / 2 cosines, then as many sines
  const void* positions;   // int32 or int64, one a token
  bool wide_positions;
  const std::int32_t* token_pages;
  const std::int32_t* token_offsets;
  const void* q_norm;      // [head_dim] or nullptr
  const void* k_norm;
  float eps;
  KvPool pool;
};

struct SiluArgs {
  const void* gate_up;     // [rows, 2 n], rows `stride` elements apart
  std::int64_t stride;
  void* out;               // [rows, n] contiguous
  std::int64_t n;
};

// Kernels of one instruction level and element type. Row kernels work on rows [begin, end).
struct Kernels {
  // Packs one panel of a contiguous weight `[n, k_words]` into `to`.
  void (*pack_panel)(const void* weight, std::int64_t n, std::int64_t k_words, std::int64_t panel,
                     std::uint32_t* to);
  // Columns of out that belong to panels [panel_begin, panel_end), of which `panels` is the first.
  void (*linear)(const LinearArgs& args, const std::uint32_t* panels, std::int64_t panel_begin,
                 std::int64_t panel_end);
  // `next` is the task that this thread does afterwards, or nullptr: its first KV is fetched early.
  void (*attend)(const AttentionArgs& args, const AttentionTask& task, const AttentionTask* next,
                 float* partials, std::byte* scratch);
  // Merges `num_chunks` consecutive partial results in order and writes out.
  void (*merge)(const AttentionArgs& args, const AttentionTask& task, float* partials, std::int64_t num_chunks);
  void (*rms_norm)(const RmsNormArgs& args, std::int64_t begin, std::int64_t end);
  void (*rope_and_store)(const RopeArgs& args, std::int64_t begin, std::int64_t end);
  void (*silu_and_mul)(const SiluArgs& args, std::int64_t begin, std::int64_t end);
};

// The best level that this processor runs, and whether it runs a given one.
Isa best_isa();
bool supports(Isa isa);
const Kernels& kernels_for(Isa isa, DType dtype);

namespace baseline {
const Kernels& kernels(DType dtype);
}
namespace avx2 {
const Kernels& kernels(DType dtype);
}
namespace avx512 {
const Kernels& kernels(DType dtype);
}

}  // namespace disagg::cpu
