// A cluster of eight blocks takes a row, and keeps it in its shared memory: whatever a row asks for,
// its logits are read once. The blocks meet by pushing 8-byte words into each other's memory.
//
// 256 rows of 151,936 bfloat16 are 78 MB: 18 us at an H200's 4.3 TB/s. Drawing hashes every token that
// could still win, with 13 operations of the integer units, which do 64 a cycle and multiprocessor: 33 us
// where the logits are so flat that none can be left out. A group of 8 tokens is compared with one bound;
// the noise itself is computed for the few whose hash is low enough.
//
// A block spends three times as long waiting (for its logits, twice for its cluster) as it computes, so
// five share a multiprocessor.
#include "cuda/sample.h"

#include <algorithm>
#include <limits>

#include "cuda/device.cuh"
#include "cuda/draw.h"

namespace disagg::cuda {
namespace {

constexpr int kBlocks = 8;
constexpr int kThreads = 256;
constexpr int kSeeds = 64;  // threads that find the first scores
constexpr int kWarps = kThreads / kWarp;
constexpr int kGroup = 8;  // tokens that a thread looks at together
constexpr int kSums = 3;   // pivots of a round of the search
constexpr int kMaxSharedBytes = 220 * 1024;
constexpr float kLog2e = 1.44269504f;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

using Word = unsigned long long;
static_assert(kSums * sizeof(double) == kSums * sizeof(Word));

// Blocks of a multiprocessor; more float32 logits do not fit.
template <class T>
constexpr int kBlocksAtOnce = sizeof(T) == 2 ? 5 : 2;

// Bits of an ordered float that are the same in all values of a type, rounded down to an even number.
template <class T>
constexpr int kSpareBits = 0;
template <>
constexpr int kSpareBits<__half> = 12;
template <>
constexpr int kSpareBits<__nv_bfloat16> = 16;

template <class T>
struct alignas(16) Group {
  T items[kGroup];

  __device__ __forceinline__ float operator[](int i) const { return to_float(items[i]); }
  __device__ __forceinline__ float max() const {
    float x = to_float(items[0]);
    for (int i = 1; i < kGroup; ++i) x = fmaxf(x, to_float(items[i]));
    return x;
  }
};
template <>
__device__ __forceinline__ float Group<__nv_bfloat16>::max() const {
  const auto* two = reinterpret_cast<const __nv_bfloat162*>(items);
  const __nv_bfloat162 x = __hmax2(__hmax2(two[0], two[1]), __hmax2(two[2], two[3]));
  return fmaxf(__low2float(x), __high2float(x));
}
template <>
__device__ __forceinline__ float Group<__half>::max() const {
  const auto* two = reinterpret_cast<const __half2*>(items);
  const __half2 x = __hmax2(__hmax2(two[0], two[1]), __hmax2(two[2], two[3]));
  return fmaxf(__low2float(x), __high2float(x));
}

// 2^x, to 2 units in the last place.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- the cluster ----

__device__ __forceinline__ void arrive_in_cluster() {
  __syncwarp();  // aligned: all of a warp at once
  asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
}
__device__ __forceinline__ void wait_in_cluster() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

// Writes to the same variable of another block of the cluster.
__device__ __forceinline__ void push(Word* own, unsigned block, Word word) {
  const auto local = static_cast<unsigned>(__cvta_generic_to_shared(own));
  unsigned remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(block));
  asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(remote), "l"(word) : "memory");
}

struct Shared {
  Word inbox[2][kSums][kBlocks];  // what each block has found, by turns, so that nobody waits for readers
  Word found[kSums][kWarps];
  unsigned threshold;  // ordered: a score that some token of this block has
};

__device__ __forceinline__ Word to_word(Word x) { return x; }
__device__ __forceinline__ Word to_word(double x) { return static_cast<Word>(__double_as_longlong(x)); }
template <class V>
__device__ __forceinline__ V from_word(Word x);
template <>
__device__ __forceinline__ Word from_word(Word x) {
  return x;
}
template <>
__device__ __forceinline__ double from_word(Word x) {
  return __longlong_as_double(static_cast<long long>(x));
}

// The kernel's state that all of a cluster's threads share, and how they combine what they find.
class Cluster {
 public:
  // Threads of every block call this before their first `combine`.
  __device__ Cluster(Shared& shared, unsigned rank) : shared_(shared), rank_(rank) { arrive_in_cluster(); }

  // Reduces over all threads of the cluster in an order that is always the same.
  template <int N, class V, class Op>
  __device__ void combine(V (&values)[N], Op op) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      for (int offset = kWarp / 2; offset > 0; offset /= 2)
        values[i] = op(values[i], __shfl_xor_sync(0xffffffffu, values[i], offset));
      if (lane == 0) shared_.found[i][warp] = to_word(values[i]);
    }
    __syncthreads();
    if (is_first_) wait_in_cluster();  // a block that has not started has no memory to push to
    is_first_ = false;
    if (warp == 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        V value = from_word<V>(shared_.found[i][lane % kWarps]);
        for (int offset = kWarps / 2; offset > 0; offset /= 2)
          value = op(value, __shfl_xor_sync(0xffffffffu, value, offset));
        if (lane < kBlocks) push(&shared_.inbox[turn_][i][rank_], lane, to_word(value));
      }
    }
    arrive_in_cluster();
    wait_in_cluster();
#pragma unroll
    for (int i = 0; i < N; ++i) {
      values[i] = from_word<V>(shared_.inbox[turn_][i][0]);
      for (int block = 1; block < kBlocks; ++block)
        values[i] = op(values[i], from_word<V>(shared_.inbox[turn_][i][block]));
    }
    turn_ ^= 1;
  }

  __device__ Word max(Word value) {
    Word values[1] = {value};
    combine(values, [](Word a, Word b) { return a > b ? a : b; });
    return values[0];
  }

 private:
  Shared& shared_;
  unsigned rank_;
  int turn_ = 0;
  bool is_first_ = true;
};

// ---- a block's part of a row ----

template <class T>
struct Part {
  T* logits;        // in shared memory; minus infinity from `count` to the end of the last group
  int first, count;  // token ids

  __device__ int num_groups() const { return (count + kGroup - 1) / kGroup; }
  __device__ const Group<T>& group(int i) const { return reinterpret_cast<const Group<T>*>(logits)[i]; }
};

template <class T>
__device__ void load(const Part<T>& part, const T* row, bool is_aligned) {
  const T* from = row + part.first;
  int done = 0;
  if (is_aligned) {
    done = part.count / kVector<T> * kVector<T>;
    for (int i = threadIdx.x * kVector<T>; i < done; i += kThreads * kVector<T>) {
      const auto to = static_cast<unsigned>(__cvta_generic_to_shared(part.logits + i));
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from + i) : "memory");
    }
  }
  for (int i = done + threadIdx.x; i < part.num_groups() * kGroup; i += kThreads)
    part.logits[i] = i < part.count ? from[i] : from_float<T>(kMinusInfinity);
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
}

template <class T>
__device__ float highest(const Part<T>& part, Cluster& cluster) {
  float found = kMinusInfinity;
  for (int i = threadIdx.x; i < part.num_groups(); i += kThreads) found = fmaxf(found, part.group(i).max());
  return unordered(static_cast<unsigned>(cluster.max(ordered(found))));
}

// The lowest id of a logit.
template <class T>
__device__ std::int32_t find(const Part<T>& part, float logit, Cluster& cluster) {
  unsigned id = ~0u;
  for (int i = threadIdx.x; i < part.num_groups(); i += kThreads) {
    if (part.group(i).max() != logit) continue;
    for (int j = kGroup - 1; j >= 0; --j)
      if (part.group(i)[j] == logit) id = min(id, static_cast<unsigned>(part.first + i * kGroup + j));
  }
  id = ~static_cast<unsigned>(cluster.max(~id));
  return id == ~0u ? 0 : static_cast<std::int32_t>(id);  // none: they are all NaN
}

// ---- which tokens are kept ----

// Counts tokens, or sums up their probabilities (that of the likeliest is 1).
template <class T>
class Weigher {
 public:
  __device__ Weigher(const Part<T>& part, const Scale& scale, Cluster& cluster)
      : part_(part), scale_(scale), per_logit_(kLog2e / scale.temperature), cluster_(cluster) {}

  __device__ double weight(float logit) const { return exp2_fast((logit - scale_.max) * per_logit_); }

  // `sums[i]`: of the tokens from `from[i]` on. `from` ascends.
  __device__ void sum_from(const float (&from)[kSums], bool by_mass, double (&sums)[kSums]) {
    float found[kSums] = {};
    for (int i = threadIdx.x; i < part_.num_groups(); i += kThreads) {
      const Group<T> group = part_.group(i);
      if (group.max() < from[0]) continue;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const float logit = group[j], one = by_mass ? exp2_fast((logit - scale_.max) * per_logit_) : 1.0f;
#pragma unroll
        for (int p = 0; p < kSums; ++p) found[p] += logit >= from[p] ? one : 0.0f;
      }
    }
#pragma unroll
    for (int p = 0; p < kSums; ++p) sums[p] = found[p];
    cluster_.combine(sums, [](double a, double b) { return a + b; });
  }

  // The highest logit from which on the tokens, those below `lowest` left out, sum up to `target`: two bits
  // of its ordered bits a round.
  __device__ float reach(double target, bool by_mass, float lowest) {
    unsigned prefix = 0;
#pragma unroll 1
    for (int shift = 30; shift >= kSpareBits<T>; shift -= 2) {
      float pivots[kSums];
      double sums[kSums];
#pragma unroll
      for (int p = 0; p < kSums; ++p) pivots[p] = fmaxf(pivot(prefix | (p + 1u) << shift), lowest);
      sum_from(pivots, by_mass, sums);
      unsigned step = 0;
#pragma unroll
      for (int p = 0; p < kSums; ++p)
        if (sums[p] >= target) step = p + 1;
      prefix |= step << shift;
    }
    return value_of(prefix, kSpareBits<T>);
  }

 private:
  const Part<T>& part_;
  const Scale& scale_;
  float per_logit_;
  Cluster& cluster_;
};

// The lowest logit that min_p, then top_k, then top_p keep; as host_sampler.py's keep_above.
template <class T>
__device__ float lowest_of_row(const Part<T>& part, const Scale& scale, int vocab, int top_k, float top_p, float min_p,
                               Cluster& cluster) {
  float floor = kMinusInfinity, lowest = kMinusInfinity;
  if (min_p > 0.0f) {
    floor = fminf(logf(min_p), 0.0f);
    lowest = lowest_kept(scale, floor);
  }
  const int k = top_k > 0 && top_k < vocab ? top_k : vocab;
  if (k == vocab && !(top_p < 1.0f)) return lowest;
  Weigher<T> weigher(part, scale, cluster);
  float kth = kMinusInfinity;
  if (k < vocab) {
    kth = weigher.reach(k, false, kMinusInfinity);
    floor = fmaxf(floor, scale(kth));
  }
  if (top_p < 1.0f) {
    // What top_k keeps of the tokens that tie with its last one are as many as make k.
    const bool cuts_ties = k < vocab && kth >= lowest;
    const float from = cuts_ties ? unordered(ordered(kth) + 1u) : fmaxf(kth, lowest);
    const float pivots[kSums] = {from, from, from};
    double mass[kSums], count[kSums];
    weigher.sum_from(pivots, true, mass);
    if (cuts_ties) {
      weigher.sum_from(pivots, false, count);
      mass[0] += (k - count[0]) * weigher.weight(kth);
    }
    const float last = weigher.reach(static_cast<double>(top_p) * mass[0], true, fmaxf(kth, lowest));
    floor = fmaxf(floor, fminf(scale(last), 0.0f));
  }
  return lowest_kept(scale, floor);
}

// ---- the draw ----

// Not inlined: few tokens come here.
__device__ __noinline__ float score_of(float scaled, unsigned bits) { return scaled - log_exponential(bits); }

// Scores and finds the token of the highest, of those from `lowest` on.
template <class T>
class Draw {
 public:
  __device__ Draw(const Part<T>& part, const Scale& scale, float lowest, unsigned key_lower, unsigned key_upper,
                  unsigned& threshold)
      : part_(part),
        scale_(scale),
        lowest_(lowest),
        key_lower_(key_lower),
        key_upper_(key_upper),
        threshold_(threshold),
        per_logit_(kLog2e / scale.temperature) {
    // A token's score is at most scaled - log(u), where u are its 31 bits, so it can reach a threshold only
    // if its bits are below 2^(31 + (scaled - threshold) log2(e)). This is the exponent for a logit and a
    // threshold of 0, with more than the rounding errors of all that added.
    const float of_max = scale.max * per_logit_;
    exponent_ = 31.01f + 0x1p-21f * fabsf(of_max) - of_max;
  }

  __device__ Word best() {
    const int groups = part_.num_groups();
    // The first scores give the threshold that leaves most others out.
    if (threadIdx.x < min(kSeeds, groups)) score(threadIdx.x * kGroup + likeliest_of(threadIdx.x));
    __syncthreads();
    for (int i = threadIdx.x; i < groups; i += kThreads) {
      const float threshold = unordered(*const_cast<volatile unsigned*>(&threshold_));
      const float exponent = fmaf(-threshold, kLog2e, exponent_);
      const Group<T> group = part_.group(i);
      const float top = group.max();
      // Even bits of 0, which stand for half a unit, would not do.
      const float top_exponent = fmaf(top, per_logit_, exponent);
      if (top < lowest_ || top_exponent < -1.0f) continue;
      const unsigned start = start_of(i * kGroup);
      unsigned least = ~0u;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) least = min(least, noise_top(start + j * kTokenFactor, key_upper_));
      if (least >= top_limit(__float2uint_ru(exp2_fast(top_exponent)))) continue;
#pragma unroll 1
      for (int j = 0; j < kGroup; ++j)
        if (may_win(start + j * kTokenFactor, to_float(part_.logits[i * kGroup + j]), exponent)) score(i * kGroup + j);
    }
    return best_;
  }

 private:
  __device__ unsigned start_of(int i) const {
    return static_cast<unsigned>(part_.first + i) * kTokenFactor + key_lower_;
  }

  // The token of a group that has, about, the highest score.
  __device__ int likeliest_of(int i) const {
    const Group<T> group = part_.group(i);
    const unsigned start = start_of(i * kGroup);
    float highest = kMinusInfinity;
    int likeliest = 0;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const auto bits = static_cast<float>(static_cast<int>(noise_bits(start + j * kTokenFactor, key_upper_)));
      const float about = fmaf(group[j], per_logit_, -__log2f(bits + 0.5f));
      if (about > highest) highest = about, likeliest = j;
    }
    return likeliest;
  }

  __device__ bool may_win(unsigned start, float logit, float exponent) const {
    return static_cast<float>(static_cast<int>(noise_bits(start, key_upper_))) <
           exp2_fast(fmaf(logit, per_logit_, exponent));
  }

  __device__ __forceinline__ void score(int i) {
    const float logit = to_float(part_.logits[i]);
    if (!(logit >= lowest_) || i >= part_.count) return;
    const float score = score_of(scale_(logit), noise_bits(start_of(i), key_upper_));
    if (score != score) return;
    const unsigned key = ordered(score);
    const Word found = static_cast<Word>(key) << 32 | ~static_cast<unsigned>(part_.first + i);
    if (found > best_) best_ = found;
    atomicMax(&threshold_, key);
  }

  const Part<T>& part_;
  const Scale& scale_;
  float lowest_;
  unsigned key_lower_, key_upper_;
  unsigned& threshold_;
  float per_logit_, exponent_;
  Word best_ = 0;  // ordered score, then the complement of the id: ties go to the lowest id
};

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<T>)
    sample_kernel(const SampleArgs args, int part_size, bool is_aligned) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ Shared shared;
  const int row = blockIdx.x / kBlocks, rank = blockIdx.x % kBlocks;
  begin();
  const std::int32_t slot = args.slots[row];
  const float temperature = args.temperature[row], top_p = args.top_p[row], min_p = args.min_p[row];
  const int top_k = args.top_k[row];
  const unsigned key_lower = args.keys[2 * row], key_upper = args.keys[2 * row + 1];
  if (slot < 0) return;  // the whole cluster
  if (threadIdx.x == 0) shared.threshold = kOrderedMinusInfinity;
  Cluster cluster(shared, rank);
  const int first = min(rank * part_size, args.vocab);
  const Part<T> part{reinterpret_cast<T*>(memory), first, min(part_size, args.vocab - first)};
  load(part, static_cast<const T*>(args.logits) + row * args.stride, is_aligned);
  const Scale scale{highest(part, cluster), temperature};
  std::int32_t token;
  if (scale.temperature < kGreedyBelow) {
    token = find(part, scale.max, cluster);
  } else {
    const float lowest = lowest_of_row(part, scale, args.vocab, top_k, top_p, min_p, cluster);
    Draw<T> draw(part, scale, lowest, key_lower, key_upper, shared.threshold);
    const Word best = cluster.max(draw.best());
    token = best == 0 ? 0 : static_cast<std::int32_t>(~static_cast<unsigned>(best));  // none: NaN
  }
  if (rank == 0 && threadIdx.x == 0) {
    args.out[row] = token;
    args.last_tokens[slot] = token;
  }
}

}  // namespace

std::int64_t max_vocab(DType dtype) {
  return std::int64_t{kMaxSharedBytes} / item_bytes(dtype) / kGroup * kGroup * kBlocks;
}

cudaError_t sample(DType dtype, const SampleArgs& args, std::int64_t rows, cudaStream_t stream) {
  if (args.vocab < 1 || args.vocab > max_vocab(dtype) || rows > std::numeric_limits<int>::max() / kBlocks)
    return cudaErrorInvalidValue;
  return with_type(dtype, [&]<class T>() {
    const int part_size = div_up(args.vocab, kBlocks * kGroup) * kGroup;
    const auto shared_bytes = static_cast<unsigned>(part_size * sizeof(T));
    const cudaError_t error = cudaFuncSetAttribute(sample_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
    const Launch how{.blocks = static_cast<unsigned>(rows * kBlocks),
                     .threads = kThreads,
                     .stream = stream,
                     .shared_bytes = shared_bytes,
                     .cluster = kBlocks};
    return launch(sample_kernel<T>, how, args, part_size,
                  is_aligned(args.logits) && args.stride % kVector<T> == 0);
  });
}

}  // namespace disagg::cuda
