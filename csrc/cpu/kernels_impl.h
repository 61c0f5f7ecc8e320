// The source of every kernel, compiled once an instruction level. Include it after a vec_*.h, with
// DISAGG_ISA naming the level's namespace.
//
// Everything here has internal linkage and nothing of the standard library is instantiated: a
// function shared between levels would be kept in the copy of one of them, maybe of one that this
// processor cannot run.
#pragma once

#include "cpu/kernels.h"

namespace disagg::cpu::DISAGG_ISA {
namespace {

constexpr int kTileCols = kTileVecs * W;
constexpr int kLineWords = 16;  // of a cache line
static_assert(kPanel == 2 * kLineWords && kPanel % kTileCols == 0 && kKvTile % kPanel == 0 && kKvChunk % kKvTile == 0);

template <class T>
constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));

template <class T>
const std::uint32_t* words(const T* p) {
  return reinterpret_cast<const std::uint32_t*>(p);
}

inline std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// e^x to about 1 ulp; 0 below -87.3, so that e^-inf is 0, and infinite from 88.8 on, in some levels
// from 88.4. (Cephes' expf.)
inline V vexp(V x) {
  const V lowest = vset1(-87.33654f);
  const V inside = vmin(vmax(x, lowest), vset1(89.0f));
  const V n = vround(vmul(inside, vset1(1.44269504088896341f)));
  V r = vfma(n, vset1(-0.693359375f), inside);
  r = vfma(n, vset1(2.12194440e-4f), r);
  V y = vset1(1.9875691500e-4f);
  y = vfma(y, r, vset1(1.3981999507e-3f));
  y = vfma(y, r, vset1(8.3334519073e-3f));
  y = vfma(y, r, vset1(4.1665795894e-2f));
  y = vfma(y, r, vset1(1.6666665459e-1f));
  y = vfma(y, r, vset1(5.0000001201e-1f));
  y = vadd(vfma(y, vmul(r, r), r), vset1(1.0f));
  return vzero_below(x, lowest, vscale2(y, n));
}

inline float exp_one(float x) {
  float lanes[W];
  vstore(lanes, vexp(vset1(x)));
  return lanes[0];
}

// sums[r][j] += a row r times the panel columns of b, k in ascending order. Row r of `a` begins
// `a_stride` words after row r - 1; b is `[k][kPanel]` words, already moved to the tile's columns.
// Meanwhile kLines cache lines a step are fetched from `ahead` on.
template <class T, int R, int kLines = 0>
inline __attribute__((always_inline)) void tile(const std::uint32_t* a, std::int64_t a_stride,
                                                const std::uint32_t* b, std::int64_t k,
                                                V (&sums)[R][kTileVecs], const std::uint32_t* ahead = nullptr) {
  for (std::int64_t i = 0; i < k; ++i) {
    for (int line = 0; line < kLines; ++line) prefetch(ahead + (i * kLines + line) * kLineWords);
    V cols[kTileVecs];
    for (int j = 0; j < kTileVecs; ++j) cols[j] = wload(b + i * kPanel + j * W);
    for (int r = 0; r < R; ++r) {
      const V x = wset1(a + r * a_stride + i);
      for (int j = 0; j < kTileVecs; ++j) sums[r][j] = vdot<T>(sums[r][j], x, cols[j]);
    }
  }
}

// Calls body<R>() for a run-time row count in [1, kMaxRows].
template <int R = kMaxRows, class Body>
inline __attribute__((always_inline)) void with_rows(std::int64_t rows, Body&& body) {
  if (rows == R) {
    body.template operator()<R>();
  } else if constexpr (R > 1) {
    with_rows<R - 1>(rows, body);
  }
}

// ---- linear ----

// Words of W rows of the weight, transposed: to[i][c] is word i of row c.
inline void pack_columns(const std::uint32_t* const* rows, std::int64_t k_words, std::uint32_t* to) {
  std::int64_t i = 0;
  for (; i + 4 <= k_words; i += 4) {
    V v[4];
    for (int j = 0; j < 4; ++j) v[j] = wgather4(rows, j, i);
    wtranspose4(v);
    for (int j = 0; j < 4; ++j) wstore(to + (i + j) * kPanel, v[j]);
  }
  for (; i < k_words; ++i)
    for (int c = 0; c < W; ++c) __builtin_memcpy(to + i * kPanel + c, rows[c] + i, 4);
}

template <class T>
void pack_panel(const void* weight, std::int64_t n, std::int64_t k_words, std::int64_t panel, std::uint32_t* to) {
  const std::uint32_t* from = words(static_cast<const T*>(weight));
  for (int c = 0; c < kPanel; c += W) {
    const std::uint32_t* rows[W];
    const std::int64_t first = panel * kPanel + c, present = n - first;
    // Absent columns repeat the last row and are cleared after.
    for (int j = 0; j < W; ++j) rows[j] = from + least(first + j, n - 1) * k_words;
    pack_columns(rows, k_words, to + c);
    for (std::int64_t j = present < 0 ? 0 : present; j < W; ++j)
      for (std::int64_t i = 0; i < k_words; ++i) to[i * kPanel + c + j] = 0;
  }
}

template <class T>
void store_columns(T* to, V v, int n, const void* bias, std::int64_t col) {
  const T* b = static_cast<const T*>(bias);
  if (n >= W) {
    if (b != nullptr) v = vadd(v, vload(b + col));
    vstore(to, v);
  } else if (n > 0) {
    if (b != nullptr) v = vadd(v, vload_n(b + col, n));
    vstore_n(to, v, n);
  }
}

template <int R>
inline void zero(V (&sums)[R][kTileVecs]) {
  for (auto& sum : sums)
    for (V& v : sum) v = vzero();
}

// As tile(), from zero; float32 is summed in blocks of kSumBlock, whose sums are added then. The
// error grows with the length of what is summed: 2.3 times less at k = 1536, for no time.
template <class T, int R, int kLines>
inline __attribute__((always_inline)) void dot_columns(const std::uint32_t* x, std::int64_t x_stride,
                                                       const std::uint32_t* b, std::int64_t k,
                                                       const std::uint32_t* ahead, V (&sums)[R][kTileVecs]) {
  zero(sums);
  const std::int64_t block = kPerWord<T> == 1 ? kSumBlock : k;
  tile<T, R, kLines>(x, x_stride, b, least(block, k), sums, ahead);
  for (std::int64_t i = block; i < k; i += block) {
    V more[R][kTileVecs];
    zero(more);
    tile<T, R, kLines>(x + i, x_stride, b + i * kPanel, least(block, k - i), more, ahead + i * kLines * kLineWords);
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < kTileVecs; ++j) sums[r][j] = vadd(sums[r][j], more[r][j]);
  }
}

template <class T, int R, int kLines>
void linear_tile(const LinearArgs& args, const std::uint32_t* panel, const std::uint32_t* ahead,
                 std::int64_t first_col, std::int64_t row) {
  const std::uint32_t* x = words(static_cast<const T*>(args.x) + row * args.x_stride);
  for (int at = 0; at < kPanel; at += kTileCols) {
    V sums[R][kTileVecs];
    dot_columns<T, R, kLines>(x, args.x_stride / kPerWord<T>, panel + at, args.k_words, ahead, sums);
    for (int r = 0; r < R; ++r) {
      T* out = static_cast<T*>(args.out) + (row + r) * args.out_stride;
      for (int j = 0; j < kTileVecs; ++j) {
        const std::int64_t col = first_col + at + j * W;
        store_columns(out + col, sums[r][j], static_cast<int>(args.n - col), args.bias, col);
      }
    }
  }
}

// One panel's columns of all rows. The panel stays in cache while the tiles of rows pass over it, so
// weights come from memory once; `next`, if any, is fetched by the first two tiles: a step of them
// takes long enough for a line each, so memory and multipliers work at the same time.
template <class T>
void linear_panel(const LinearArgs& args, const std::uint32_t* panel, const std::uint32_t* next,
                  std::int64_t first_col) {
  const std::int64_t num_tiles = (args.rows + kMaxRows - 1) / kMaxRows;
  // Even tiles: 16 rows are 8 + 8, not 12 + 4.
  for (std::int64_t i = 0; i < num_tiles; ++i) {
    const std::int64_t row = args.rows * i / num_tiles;
    with_rows(args.rows * (i + 1) / num_tiles - row, [&]<int R>() {
      // With few rows there is but one tile, memory is the limit and the hardware fetches ahead well.
      if (next != nullptr && num_tiles > 1 && i < 2) {
        linear_tile<T, R, 1>(args, panel, next + i * args.k_words * kLineWords, first_col, row);
      } else {
        linear_tile<T, R, 0>(args, panel, nullptr, first_col, row);
      }
    });
  }
}

template <class T>
void linear(const LinearArgs& args, const std::uint32_t* panels, std::int64_t panel_begin,
            std::int64_t panel_end) {
  const std::int64_t size = args.k_words * kPanel;
  for (std::int64_t panel = panel_begin; panel < panel_end; ++panel, panels += size)
    linear_panel<T>(args, panels, panel + 1 < panel_end ? panels + size : nullptr, panel * kPanel);
}

// ---- attention ----

// Hands out 64-byte aligned pieces of the scratch; its size is attention_scratch_bytes().
struct Scratch {
  std::byte* at;
  template <class U>
  U* take(std::int64_t count) {
    U* piece = reinterpret_cast<U*>(at);
    at += (count * static_cast<std::int64_t>(sizeof(U)) + 63) / 64 * 64;
    return piece;
  }
};

// Running softmax of some rows over one chunk: maximum, sum of weights by lane, and output.
struct Partial {
  float* m;
  float* l;
  float* o;
};

inline Partial partial_at(float* base, std::int64_t rows) {
  const std::int64_t column = whole_vectors(rows);
  return {base, base + column, base + 2 * column};
}

// K and V of up to kKvTile tokens, packed. `keys` is `[2 panels][dim words][kPanel tokens]`;
// `values` is `[dim panels][kKvTile / per word][kPanel columns]`.
struct KvTile {
  std::uint32_t* keys;
  std::uint32_t* values;
};

// Rows of K and V of the tile after this one, fetched line by line while this one is packed: pages
// lie scattered, so the hardware sees no stream to fetch ahead of, and memory is 100 ns away.
struct Ahead {
  const std::byte* const* keys = nullptr;
  std::int64_t count = 0, row_bytes = 0, value_offset = 0, row = 0, line = 0;
  void fetch(int lines) {
    for (; lines > 0 && row < 2 * count; --lines) {
      prefetch((row < count ? keys[row] : keys[row - count] + value_offset) + line);
      if ((line += 64) >= row_bytes) {
        line = 0;
        ++row;
      }
    }
  }
};

// Rows of K of a tile; those of V are `value_offset` further. The last is repeated past `count`.
struct TileRows {
  const std::byte* keys[kKvTile];
  int count;
};

template <class T>
void pack_keys(const TileRows& rows, std::int64_t dim_words, std::uint32_t* to, Ahead& ahead) {
  for (int t = 0; t < rows.count; t += W) {
    const std::uint32_t* from[W];
    for (int j = 0; j < W; ++j) from[j] = reinterpret_cast<const std::uint32_t*>(rows.keys[t + j]);
    std::uint32_t* column = to + t / kPanel * kPanel * dim_words + t % kPanel;
    for (std::int64_t i = 0; i < dim_words; i += 4) {
      ahead.fetch(W / 4);  // as many lines as four words of W rows are
      V v[4];
      for (int j = 0; j < 4; ++j) v[j] = wgather4(from, j, i);
      wtranspose4(v);
      for (int j = 0; j < 4; ++j) wstore(column + (i + j) * kPanel, v[j]);
    }
  }
}

// Words of columns `c` on of one token (fp32) or two (bf16).
inline V value_words(const float* a, const float*, std::int64_t c) { return wload(words(a + c)); }
inline V value_words(const BF16* a, const BF16* b, std::int64_t c) { return winterleave(a + c, b + c); }
inline std::uint32_t value_word(const float* a, const float*, std::int64_t c) {
  return __builtin_bit_cast(std::uint32_t, a[c]);
}
inline std::uint32_t value_word(const BF16* a, const BF16* b, std::int64_t c) {
  return a[c].bits | static_cast<std::uint32_t>(b[c].bits) << 16;
}

template <class T>
void pack_values(const TileRows& rows, std::int64_t value_offset, std::int64_t dim, std::uint32_t* to,
                 Ahead& ahead) {
  constexpr int step = kPerWord<T>;
  const auto value = [&](int t) {
    return reinterpret_cast<const T*>(rows.keys[t < kKvTile ? t : kKvTile - 1] + value_offset);
  };
  for (int t = 0; t < rows.count; t += step) {
    const T* a = value(t);
    const T* b = value(t + step - 1);
    std::uint32_t* row = to + t / step * kPanel;
    for (std::int64_t c = 0; c < dim; c += W) {
      ahead.fetch(1);
      std::uint32_t* column = row + c / kPanel * (kKvTile / step) * kPanel + c % kPanel;
      if (c + W <= dim) {
        wstore(column, value_words(a, b, c));
      } else {
        for (int i = 0; i < W; ++i) column[i] = c + i < dim ? value_word(a, b, c + i) : 0;
      }
    }
  }
}

// Loads the tiles of a task one after the other. Nothing outside of [kv_begin, kv_end) is read.
template <class T>
struct Feed {
  const AttentionArgs& args;
  const AttentionTask& task;
  const AttentionTask* next;  // what this thread does afterwards, or nullptr
  TileRows rows, later;

  static void find(const AttentionArgs& args, const AttentionTask& task, std::int64_t begin, TileRows& to) {
    const KvPool& pool = args.pool;
    const T* base = static_cast<const T*>(pool.base) + task.kv_head * pool.head_stride;
    std::int64_t page = begin / pool.page_size, offset = begin % pool.page_size;
    to.count = static_cast<int>(least(kKvTile, task.kv_end - begin));
    for (int t = 0; t < to.count; ++t) {
      to.keys[t] = reinterpret_cast<const std::byte*>(base + task.pages[page] * pool.page_stride +
                                                      offset * pool.head_dim);
      if (++offset == pool.page_size) {
        offset = 0;
        ++page;
      }
    }
    // Columns of absent tokens repeat the last one, and are masked; an absent value has weight 0.
    for (int t = to.count; t < kKvTile; ++t) to.keys[t] = to.keys[to.count - 1];
  }

  Feed(const AttentionArgs& a, const AttentionTask& t, const AttentionTask* n) : args(a), task(t), next(n) {
    find(args, task, task.kv_begin, later);
  }

  // Packs the tile that begins at `begin`, and returns its tokens. Requires: it follows the last one.
  int load(std::int64_t begin, KvTile tile) {
    constexpr auto item = static_cast<std::int64_t>(sizeof(T));
    rows = later;
    Ahead ahead;
    if (begin + kKvTile < task.kv_end) {
      find(args, task, begin + kKvTile, later);
      ahead.keys = later.keys;
    } else if (next != nullptr) {
      find(args, *next, next->kv_begin, later);
      ahead.keys = later.keys;
    }
    ahead.count = ahead.keys == nullptr ? 0 : later.count;
    ahead.row_bytes = args.pool.head_dim * item;
    ahead.value_offset = args.pool.value_offset * item;
    pack_keys<T>(rows, args.pool.head_dim / kPerWord<T>, tile.keys, ahead);
    pack_values<T>(rows, ahead.value_offset, args.pool.head_dim, tile.values, ahead);
    return rows.count;
  }
};

constexpr float kLowest = -__builtin_inff();

// Replaces scores past `valid` by -inf, whatever they hold, and returns the highest.
inline float mask_row(float* scores, int valid) {
  const V low = vset1(kLowest);
  V highest = low;
  for (int i = 0; i < kKvTile; i += W) {
    const int lanes = valid - i;
    V s = vload(scores + i);
    if (lanes < W) vstore(scores + i, s = vfirst(s, lanes < 0 ? 0 : lanes, low));
    highest = vmax(highest, s);
  }
  return vhighest(highest);
}

// Turns a row's scores into weights e^(scale (score - pivot)), in place (fp32) or as bf16 from the
// row's start; adds them to the sums by lane `l`, which `alpha` scales first.
template <class T>
void weigh_row(float* scores, float pivot, float scale, float alpha, float* l) {
  const V pivots = vset1(pivot), scales = vset1(scale);
  V sum = vmul(vload(l), vset1(alpha));
  T* weights = reinterpret_cast<T*>(scores);
  for (int i = 0; i < kKvTile; i += W) {
    const V p = vexp(vmul(vsub(vload(scores + i), pivots), scales));
    sum = vadd(sum, p);
    vstore(weights + i, p);
  }
  vstore(l, sum);
}

// Updates the rows' running maxima `m`, their sums `l` and `alpha`, the factor for what was summed
// before, and turns scores into weights. `valid[r]` scores of row r count.
template <class T, int R>
void softmax(float* scores, const int (&valid)[R], float scale, float* m, float* l, float* alpha) {
  float pivots[R];
  for (int r = 0; r < R; ++r) {
    const float highest = mask_row(scores + r * kKvTile, valid[r]);
    const float new_max = highest > m[r] ? highest : m[r];
    // A row that has seen nothing yet subtracts 0: -inf - -inf is no number.
    pivots[r] = new_max == kLowest ? 0.0f : new_max;
    alpha[r] = (m[r] - pivots[r]) * scale;
    m[r] = new_max;
  }
  for (int r = 0; r < R; r += W) vstore(alpha + r, vexp(vload(alpha + r)));
  for (int r = 0; r < R; ++r) weigh_row<T>(scores + r * kKvTile, pivots[r], scale, alpha[r], l + r * W);
}

template <class T, int R>
void attend_block(const AttentionArgs& args, const AttentionTask& task, const std::uint32_t* q, std::int64_t row,
                  std::int64_t begin, int count, KvTile kv, float* scores, Partial part) {
  const std::int64_t dim_words = args.pool.head_dim / kPerWord<T>, dim = padded_dim(args.pool.head_dim);
  const auto limit = [&](std::int64_t r) { return task.first_position + r / args.group + 1 - begin; };
  if (limit(row + R - 1) <= 0) return;
  for (int at = 0; at < count; at += kTileCols) {
    V sums[R][kTileVecs];
    zero(sums);
    const std::uint32_t* keys = kv.keys + at / kPanel * kPanel * dim_words + at % kPanel;
    tile<T, R>(q + row * dim_words, dim_words, keys, dim_words, sums);
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < kTileVecs; ++j) vstore(scores + r * kKvTile + at + j * W, sums[r][j]);
  }
  float alpha[(R + W - 1) / W * W] = {};
  int valid[R];
  for (int r = 0; r < R; ++r) valid[r] = static_cast<int>(least(limit(row + r), count));
  softmax<T, R>(scores, valid, args.scale, part.m + row, part.l + row * W, alpha);
  const int value_rows = (count + kPerWord<T> - 1) / kPerWord<T>;
  for (std::int64_t at = 0; at < dim; at += kTileCols) {
    V sums[R][kTileVecs];
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < kTileVecs; ++j)
        sums[r][j] = vmul(vload(part.o + (row + r) * dim + at + j * W), vset1(alpha[r]));
    const std::uint32_t* values = kv.values + at / kPanel * (kKvTile / kPerWord<T>)*kPanel + at % kPanel;
    tile<T, R>(words(scores), kKvTile, values, value_rows, sums);
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < kTileVecs; ++j) vstore(part.o + (row + r) * dim + at + j * W, sums[r][j]);
  }
}

// One chunk, into `to`, whose l is one sum a row; `lanes` holds the sums by lane meanwhile.
template <class T>
void attend_chunk(const AttentionArgs& args, const AttentionTask& task, const std::uint32_t* q, std::int64_t begin,
                  std::int64_t end, Feed<T>& feed, KvTile kv, float* scores, float* lanes, Partial to) {
  const std::int64_t rows = task.num_tokens * args.group, dim = padded_dim(args.pool.head_dim);
  for (std::int64_t i = 0; i < rows; ++i) to.m[i] = kLowest;
  for (std::int64_t i = 0; i < rows * W; i += W) vstore(lanes + i, vzero());
  for (std::int64_t i = 0; i < rows * dim; i += W) vstore(to.o + i, vzero());
  const Partial running{to.m, lanes, to.o};
  for (std::int64_t at = begin; at < end; at += kKvTile) {
    const int count = feed.load(at, kv);
    for (std::int64_t row = 0; row < rows; row += kMaxRows) {
      with_rows(least(kMaxRows, rows - row),
                [&]<int R>() { attend_block<T, R>(args, task, q, row, at, count, kv, scores, running); });
    }
  }
  for (std::int64_t r = 0; r < rows; ++r) to.l[r] = vsum(vload(lanes + r * W));
}

// into = into merged with `from`, which covers the chunk after it.
void merge_partial(Partial into, Partial from, std::int64_t rows, std::int64_t dim, float scale) {
  for (std::int64_t r = 0; r < rows; ++r) {
    const float high = into.m[r] > from.m[r] ? into.m[r] : from.m[r];
    const V a = vset1(exp_one((into.m[r] - high) * scale)), b = vset1(exp_one((from.m[r] - high) * scale));
    float l[W];
    vstore(l, vfma(vset1(from.l[r]), b, vmul(vset1(into.l[r]), a)));
    into.l[r] = l[0];
    into.m[r] = high;
    for (std::int64_t i = r * dim; i < (r + 1) * dim; i += W)
      vstore(into.o + i, vfma(vload(from.o + i), b, vmul(vload(into.o + i), a)));
  }
}

template <class T>
void write_rows(const AttentionArgs& args, const AttentionTask& task, Partial part) {
  const std::int64_t head_dim = args.pool.head_dim, dim = padded_dim(head_dim);
  for (std::int64_t r = 0; r < task.num_tokens * args.group; ++r) {
    const std::int64_t head = task.kv_head * args.group + r % args.group;
    T* out = static_cast<T*>(args.out) + (task.first_token + r / args.group) * args.out_stride + head * head_dim;
    const V total = vset1(part.l[r]);
    for (std::int64_t i = 0; i < head_dim; i += W) {
      const V y = vdiv(vload(part.o + r * dim + i), total);
      if (i + W <= head_dim) {
        vstore(out + i, y);
      } else {
        vstore_n(out + i, y, static_cast<int>(head_dim - i));
      }
    }
  }
}

template <class T>
void copy_queries(const AttentionArgs& args, const AttentionTask& task, std::uint32_t* to) {
  const std::int64_t n = args.group * args.pool.head_dim;
  for (std::int64_t i = 0; i < task.num_tokens; ++i) {
    const T* from = static_cast<const T*>(args.q) + (task.first_token + i) * args.q_stride + task.kv_head * n;
    __builtin_memcpy(to + i * (n / kPerWord<T>), from, static_cast<std::size_t>(n) * sizeof(T));
  }
}

template <class T>
void attend(const AttentionArgs& args, const AttentionTask& task, const AttentionTask* next,
            float* partials, std::byte* memory) {
  const std::int64_t rows = task.num_tokens * args.group, dim = padded_dim(args.pool.head_dim);
  Scratch scratch{memory};
  std::uint32_t* q = scratch.take<std::uint32_t>(rows * dim);
  float* lanes = scratch.take<float>(rows * W);
  float* scores = scratch.take<float>(kMaxRows * kKvTile);
  KvTile kv;
  kv.keys = scratch.take<std::uint32_t>(kKvTile * dim);
  kv.values = scratch.take<std::uint32_t>(kKvTile * dim);
  const Partial first = partial_at(scratch.take<float>(partial_floats(rows, args.pool.head_dim)), rows);
  const Partial second = partial_at(scratch.take<float>(partial_floats(rows, args.pool.head_dim)), rows);
  copy_queries<T>(args, task, q);
  Feed<T> feed(args, task, next);
  for (std::int64_t at = task.kv_begin; at < task.kv_end; at += kKvChunk) {
    const std::int64_t end = least(at + kKvChunk, task.kv_end), index = (at - task.kv_begin) / kKvChunk;
    Partial to = index == 0 ? first : second;
    if (task.partials_at >= 0)
      to = partial_at(partials + task.partials_at + index * partial_floats(rows, args.pool.head_dim), rows);
    attend_chunk<T>(args, task, q, at, end, feed, kv, scores, lanes, to);
    if (task.partials_at < 0 && index > 0) merge_partial(first, second, rows, dim, args.scale);
  }
  if (task.partials_at < 0) write_rows<T>(args, task, first);
}

template <class T>
void merge(const AttentionArgs& args, const AttentionTask& task, float* partials, std::int64_t num_chunks) {
  const std::int64_t rows = task.num_tokens * args.group, size = partial_floats(rows, args.pool.head_dim);
  const Partial first = partial_at(partials, rows);
  for (std::int64_t i = 1; i < num_chunks; ++i)
    merge_partial(first, partial_at(partials + i * size, rows), rows, padded_dim(args.pool.head_dim), args.scale);
  write_rows<T>(args, task, first);
}

// ---- row kernels ----

// Calls body(offset, lanes) over n elements, W at a time.
template <class Body>
inline __attribute__((always_inline)) void each(std::int64_t n, Body&& body) {
  std::int64_t i = 0;
  for (; i + W <= n; i += W) body(i, W);
  if (i < n) body(i, static_cast<int>(n - i));
}

template <class T>
V get(const T* p, int n) {
  return n == W ? vload(p) : vload_n(p, n);
}
template <class T>
void put(T* p, V v, int n) {
  if (n == W) {
    vstore(p, v);
  } else {
    vstore_n(p, v, n);
  }
}
// What reading back a stored vector gives: the reference models round here.
template <class T>
V rounded(V v) {
  T buffer[W];
  vstore(buffer, v);
  return vload(buffer);
}
template <>
inline V rounded<float>(V v) {
  return v;
}

// out = x / rms(x) * weight; x is rounded to T before it is weighted, as the reference models do.
template <class T>
void norm_row(const T* x, const T* weight, T* out, std::int64_t n, float eps) {
  V squares = vzero();
  each(n, [&](std::int64_t i, int lanes) {
    const V v = get(x + i, lanes);
    squares = vfma(v, v, squares);
  });
  const float mean = vsum(squares) / static_cast<float>(n);
  const V factor = vset1(1.0f / __builtin_sqrtf(mean + eps));
  each(n, [&](std::int64_t i, int lanes) {
    put(out + i, vmul(rounded<T>(vmul(get(x + i, lanes), factor)), get(weight + i, lanes)), lanes);
  });
}

template <class T>
void rms_norm(const RmsNormArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
    if (args.residual != nullptr) {
      T* residual = static_cast<T*>(args.residual) + row * args.n;
      each(args.n, [&](std::int64_t i, int lanes) {
        put(residual + i, vadd(get(residual + i, lanes), get(x + i, lanes)), lanes);
      });
      x = residual;
    }
    norm_row(x, static_cast<const T*>(args.weight), static_cast<T*>(args.out) + row * args.n, args.n, args.eps);
  }
}

// Rotates pairs (i, i + n / 2) of the first `rotary_dim` elements.
template <class T>
void rotate(T* x, const float* cos_sin, std::int64_t rotary_dim) {
  const std::int64_t half = rotary_dim / 2;
  each(half, [&](std::int64_t i, int lanes) {
    const V cos = get(cos_sin + i, lanes), sin = get(cos_sin + half + i, lanes);
    const V a = get(x + i, lanes), b = get(x + half + i, lanes);
    put(x + i, vsub(vmul(a, cos), vmul(b, sin)), lanes);
    put(x + half + i, vadd(vmul(b, cos), vmul(a, sin)), lanes);
  });
}

template <class T>
void rope_and_store(const RopeArgs& args, std::int64_t begin, std::int64_t end) {
  const std::int64_t dim = args.pool.head_dim;
  const auto prepare = [&](T* x, const void* norm, const float* cos_sin) {
    if (norm != nullptr) norm_row(x, static_cast<const T*>(norm), x, dim, args.eps);
    rotate(x, cos_sin, args.rotary_dim);
  };
  for (std::int64_t token = begin; token < end; ++token) {
    const std::int64_t position = args.wide_positions ? static_cast<const std::int64_t*>(args.positions)[token]
                                                      : static_cast<const std::int32_t*>(args.positions)[token];
    const float* cos_sin = args.cos_sin + position * args.rotary_dim;
    T* q = static_cast<T*>(args.q) + token * args.q_stride;
    T* k = static_cast<T*>(args.k) + token * args.k_stride;
    const T* v = static_cast<const T*>(args.v) + token * args.v_stride;
    T* slot = static_cast<T*>(args.pool.base) + args.token_pages[token] * args.pool.page_stride +
              args.token_offsets[token] * dim;
    for (std::int64_t h = 0; h < args.num_heads; ++h) prepare(q + h * dim, args.q_norm, cos_sin);
    for (std::int64_t h = 0; h < args.num_kv_heads; ++h, slot += args.pool.head_stride) {
      prepare(k + h * dim, args.k_norm, cos_sin);
      __builtin_memcpy(slot, k + h * dim, static_cast<std::size_t>(dim) * sizeof(T));
      __builtin_memcpy(slot + args.pool.value_offset, v + h * dim, static_cast<std::size_t>(dim) * sizeof(T));
    }
  }
}

template <class T>
void silu_and_mul(const SiluArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(args.gate_up) + row * args.stride;
    T* out = static_cast<T*>(args.out) + row * args.n;
    each(args.n, [&](std::int64_t i, int lanes) {
      const V x = get(gate + i, lanes);
      const V silu = vdiv(x, vadd(vset1(1.0f), vexp(vsub(vzero(), x))));
      put(out + i, vmul(rounded<T>(silu), get(gate + args.n + i, lanes)), lanes);
    });
  }
}

template <class T>
constexpr Kernels kTable = {pack_panel<T>, linear<T>,         attend<T>,      merge<T>,
                            rms_norm<T>,    rope_and_store<T>, silu_and_mul<T>};

}  // namespace

const Kernels& kernels(DType dtype) { return dtype == DType::kFloat32 ? kTable<float> : kTable<BF16>; }

}  // namespace disagg::cpu::DISAGG_ISA
