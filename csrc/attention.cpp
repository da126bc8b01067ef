// Causal attention over the paged KV cache, one kernel for prefill and decode.
//
// One call handles a tile of query tokens of one sequence and the heads of one kv head: up to a few dozen rows that share every
// load and conversion of K and V, which are float16 or int8 (T below: uint16_t, int8_t). K and V come in tiles of 64 tokens
// aligned to absolute positions:
//   scores   tokens in lanes (K blocks are [head_dim][block_size]), so a score is one lane's sum over head_dim, in order;
//   softmax  online: the row's maximum and sum follow tile after tile, and sums stay in lanes until the end;
//   values   head_dim in lanes, tokens one after another.
// Segments of kAttentionSegment tokens start afresh and are merged in order, so that threads can share a long context.
// Register tiles (rows x vectors) only group independent sums: a row's bits depend on its query and its sequence's cache alone.
// Lanes past a row's position are replaced before use and never multiplied: stale NaN in a block cannot leak. So are those before
// its window; tiles and segments that lie before it are skipped, and a row begins with the first that it sees.
// int8: a token's scale of K multiplies its scores, its scale of V its weights, so that elements are used as they lie.
// Sources: Kwon et al. 2023 (PagedAttention), section 4; Milakov and Gimelshein 2018 (online softmax).
#include "kernel_functions.h"

namespace octavo {
namespace OCTAVO_NS {
namespace {

constexpr int64_t kTile = 64;                // tokens of K and V of one softmax step
constexpr int64_t kVectors = kTile / kLanes;  // of a tile
constexpr int64_t kMostBlocks = kTile / 8;   // of a tile

// Vector accumulators that fit the registers beside one operand or two.
#if defined(OCTAVO_ISA_AVX512)
constexpr int kAccumulators = 12;
#else
constexpr int kAccumulators = 6;
#endif
constexpr int kMostRows = kAccumulators;
constexpr int kMostValueRows = 6;

// A tile of K and V: where each of its blocks begins for one kv head, and what multiplies a token's scores and weights.
template <typename T>
struct Blocks {
  const T* k[kMostBlocks];
  const T* v[kMostBlocks];
  const T* next[kMostBlocks];  // K of the tile that follows, if one does
  float score_scales[kTile];   // with AttentionArgs::scale inside
  float weight_scales[kTile];  // int8 alone
};

// What rows keep between tiles of K and V: the outcome of a segment.
struct Partial {
  float* sums;     // [rows][head_dim]: the weighted values
  float* lanes;    // [rows][16]: the sum of exponentials, in lanes
  float* maximum;  // [rows]
};

// The caller's scratch.
struct Scratch {
  float* query;    // [rows / tile][head_dim][rows of the tile]
  float* weights;  // [rows][kTile]: scores, then their exponentials
  float* rest;     // room for two partials
};

OCTAVO_INLINE f32x16 load_elements(const uint16_t* p) { return load_f16(p); }
OCTAVO_INLINE f32x16 load_elements(const int8_t* p) { return load_i8(p); }

#if defined(OCTAVO_ISA_AVX512)
OCTAVO_INLINE f32x16 load_halves(const uint16_t* low, const uint16_t* high) {
  const __m256i both = _mm256_inserti128_si256(
      _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low))),
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(high)), 1);
  return {_mm512_cvtph_ps(both)};
}
OCTAVO_INLINE f32x16 load_halves(const int8_t* low, const int8_t* high) {
  const __m128i both = _mm_unpacklo_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(low)),
                                          _mm_loadl_epi64(reinterpret_cast<const __m128i*>(high)));
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(both))};
}
#elif defined(OCTAVO_ISA_AVX2)
OCTAVO_INLINE f32x16 load_halves(const uint16_t* low, const uint16_t* high) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(high)))};
}
OCTAVO_INLINE f32x16 load_halves(const int8_t* low, const int8_t* high) { return {load_i8x8(low), load_i8x8(high)}; }
#else
template <typename T>
OCTAVO_INLINE f32x16 load_halves(const T* low, const T* high) {
  T both[16];
  memcpy(both, low, 8 * sizeof(T));
  memcpy(both + 8, high, 8 * sizeof(T));
  return load_elements(both);
}
#endif

// Sixteen tokens of one row of head_dim; with blocks of 8 they lie in two blocks.
template <bool kHalves, typename T>
OCTAVO_INLINE f32x16 load_tokens(const T* low, const T* high) {
  if constexpr (kHalves) return load_halves(low, high);
  return load_elements(low);
}

// The same pointer, but GCC reads what it points to anew for each vector: AVX2 has no register left to keep it.
template <int kCount>
OCTAVO_INLINE const float* again(const float* p) {
#if defined(OCTAVO_ISA_AVX2)
  if constexpr (kCount > 1) asm volatile("" : "+r"(p));
#endif
  return p;
}

// Where 16 tokens of a tile lie, of which the latter eight may be in another block, and their V, which scores ask for.
template <typename T>
struct Tokens {
  const T *low, *high;
  const T *v_low, *v_high;
};

// Scores of kRows rows against kCount vectors of tokens.
template <int kRows, int kCount, bool kHalves, typename T>
void score(const float* query, const Tokens<T>* tokens, int64_t stride, int64_t head_dim, float* out) {
  f32x16 sums[kRows][kCount];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kCount; ++c) sums[r][c] = set1(0.0f);
  }
  for (int64_t d = 0; d < head_dim; ++d) {
    for (int c = 0; c < kCount; ++c) {
      const f32x16 k = load_tokens<kHalves>(tokens[c].low + d * stride, tokens[c].high + d * stride);
      __builtin_prefetch(tokens[c].v_low + d * stride);
      if constexpr (kHalves) __builtin_prefetch(tokens[c].v_high + d * stride);
      const float* q = again<kCount>(query + d * kRows);
      for (int r = 0; r < kRows; ++r) sums[r][c] = fma(set1(q[r]), k, sums[r][c]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kCount; ++c) store(out + r * kTile + c * kLanes, sums[r][c]);
  }
}

template <int kRows, typename T, bool kHalves>
void score_tile(const float* query, const Tokens<T>* tokens, int64_t count, int64_t stride, int64_t head_dim, float* out) {
  constexpr int kWide = kAccumulators / kRows >= 4 ? 4 : kAccumulators / kRows >= 2 ? 2 : 1;
  int64_t c = 0;
  for (; c + kWide <= count; c += kWide) {
    score<kRows, kWide, kHalves>(query, tokens + c, stride, head_dim, out + c * kLanes);
  }
  if constexpr (kWide > 2) {
    for (; c + 2 <= count; c += 2) score<kRows, 2, kHalves>(query, tokens + c, stride, head_dim, out + c * kLanes);
  }
  for (; c < count; ++c) score<kRows, 1, kHalves>(query, tokens + c, stride, head_dim, out + c * kLanes);
}

// sums[row][features of kCount vectors, from d on] += weights[row][token] * v[token], tokens begin to end in order. Asks for the
// next tile's K meanwhile.
template <int kRows, int kCount, typename T>
void add_values(const float* weights, const Blocks<T>& blocks, int64_t block_size, int64_t begin, int64_t end, int64_t d,
                int64_t head_dim, float* out) {
  f32x16 sums[kRows][kCount];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kCount; ++c) sums[r][c] = load(out + r * head_dim + c * kLanes);
  }
  for (int64_t token = begin; token < end;) {
    const int64_t block = token / block_size, stop = (block + 1) * block_size < end ? (block + 1) * block_size : end;
    const int64_t at = (token - block * block_size) * head_dim + d;
    const T *v = blocks.v[block] + at, *next = blocks.next[block] + at;
    for (; token < stop; ++token, v += head_dim, next += head_dim) {
      __builtin_prefetch(next);
      for (int c = 0; c < kCount; ++c) {
        const f32x16 value = load_elements(v + c * kLanes);
        const float* weight = again<kCount>(weights + token);
        for (int r = 0; r < kRows; ++r) sums[r][c] = fma(set1(weight[r * kTile]), value, sums[r][c]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kCount; ++c) store(out + r * head_dim + c * kLanes, sums[r][c]);
  }
}

template <int kRows, typename T>
void add_values_tile(const float* weights, const Blocks<T>& blocks, int64_t block_size, int64_t begin, int64_t end,
                     int64_t head_dim, float* out) {
  constexpr int kWide = kAccumulators / kRows >= 4 ? 4 : kAccumulators / kRows >= 2 ? 2 : 1;
  int64_t d = 0;
  for (; d + kWide * kLanes <= head_dim; d += kWide * kLanes) {
    add_values<kRows, kWide>(weights, blocks, block_size, begin, end, d, head_dim, out + d);
  }
  for (; d < head_dim; d += kLanes) add_values<kRows, 1>(weights, blocks, block_size, begin, end, d, head_dim, out + d);
}

template <typename T>
using ScoreTile = void (*)(const float*, const Tokens<T>*, int64_t, int64_t, int64_t, float*);
template <typename T>
using ValueTile = void (*)(const float*, const Blocks<T>&, int64_t, int64_t, int64_t, int64_t, float*);

#if defined(OCTAVO_ISA_AVX512)
#define OCTAVO_TILES(name, ...)                                                                                        \
  {name<1 __VA_ARGS__>, name<2 __VA_ARGS__>, name<3 __VA_ARGS__>, name<4 __VA_ARGS__>,  name<5 __VA_ARGS__>,           \
   name<6 __VA_ARGS__>, name<7 __VA_ARGS__>, name<8 __VA_ARGS__>, name<9 __VA_ARGS__>,  name<10 __VA_ARGS__>,          \
   name<11 __VA_ARGS__>, name<12 __VA_ARGS__>}
#else
#define OCTAVO_TILES(name, ...)                                                                                        \
  {name<1 __VA_ARGS__>, name<2 __VA_ARGS__>, name<3 __VA_ARGS__>, name<4 __VA_ARGS__>, name<5 __VA_ARGS__>,            \
   name<6 __VA_ARGS__>}
#endif
#define OCTAVO_COMMA ,
template <typename T, bool kHalves>
constexpr ScoreTile<T> kScoreTiles[kMostRows] = OCTAVO_TILES(score_tile, OCTAVO_COMMA T OCTAVO_COMMA kHalves);
template <typename T>
constexpr ValueTile<T> kValueTiles[kMostValueRows] = {add_values_tile<1>, add_values_tile<2>, add_values_tile<3>,
                                                      add_values_tile<4>, add_values_tile<5>, add_values_tile<6>};

template <typename T>
constexpr bool kHasScales = sizeof(T) == 1;

// The tokens of a tile that a row attends to.
struct Seen {
  int64_t begin, end;
};

// Scores of one row, capped as soft_cap * tanh(score / soft_cap) if there is a soft_cap, become exponentials of score - maximum,
// for int8 times V's scales; the row's sums shrink where the maximum grew.
template <typename T>
void softmax_row(float* weights, Seen seen, const Blocks<T>& blocks, float soft_cap, float* maximum, float* lanes, float* sums,
                 int64_t head_dim) {
  static constexpr float kIota[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const f32x16 iota = load(kIota), lowest = set1(-__builtin_inff());
  const int64_t begin = seen.begin / kLanes, count = (seen.end + kLanes - 1) / kLanes;
  f32x16 scores[kVectors];
  f32x16 top = set1(*maximum);
  for (int64_t c = begin; c < count; ++c) {
    f32x16 scaled = load(weights + c * kLanes) * load(blocks.score_scales + c * kLanes);
    if (soft_cap > 0.0f) scaled = set1(soft_cap) * tanh(scaled / set1(soft_cap));
    scores[c] = select_gt(set1(static_cast<float>(seen.end - c * kLanes)), iota, scaled, lowest);
    if (c * kLanes < seen.begin) {
      scores[c] = select_gt(set1(static_cast<float>(seen.begin - c * kLanes)), iota, lowest, scores[c]);
    }
    top = max(scores[c], top);
  }
  const float now = hmax(top);
  f32x16 sum = load(lanes);
  if (now != *maximum) {
    const f32x16 factor = exp(set1(*maximum) - set1(now));
    for (int64_t d = 0; d < head_dim; d += kLanes) store(sums + d, load(sums + d) * factor);
    sum = sum * factor;
    *maximum = now;
  }
  for (int64_t c = begin; c < count; ++c) {
    const f32x16 weight = exp(scores[c] - set1(now));
    sum = sum + weight;
    if constexpr (kHasScales<T>) {
      store(weights + c * kLanes, weight * load(blocks.weight_scales + c * kLanes));
    } else {
      store(weights + c * kLanes, weight);
    }
  }
  store(lanes, sum);
}

struct Problem {
  const AttentionArgs* args;
  const int32_t* block_table;
  int64_t row_begin, group, num_rows;
  int32_t kv_head;
  Scratch scratch;
};

Problem make_problem(const AttentionArgs* args, const int32_t* block_table, int64_t row_begin, int64_t row_end, int32_t kv_head,
                     float* scratch) {
  const int64_t group = args->num_heads / args->num_kv_heads, num_rows = (row_end - row_begin) * group;
  float* weights = scratch + num_rows * args->head_dim;
  return {args, block_table, row_begin, group, num_rows, kv_head, {scratch, weights, weights + num_rows * kTile}};
}

Partial partial_at(const Problem& p, float* floats) {
  float* lanes = floats + p.num_rows * p.args->head_dim;
  return {floats, lanes, lanes + p.num_rows * kLanes};
}

OCTAVO_INLINE int64_t position_of(const Problem& p, int64_t row) { return p.args->positions[p.row_begin + row / p.group]; }

// The first position that a row attends to.
OCTAVO_INLINE int64_t first_position(const Problem& p, int64_t row) {
  const int64_t first = position_of(p, row) + 1 - p.args->window;
  return first < 0 ? 0 : first;
}

// The first segment that any row sees: positions ascend.
OCTAVO_INLINE int64_t first_segment(const Problem& p) { return first_position(p, 0) / kAttentionSegment; }

// Of the tile that begins with row `first`: tiles are as equal as can be.
OCTAVO_INLINE int64_t tile_rows(const Problem& p, int64_t first) {
  const int64_t left = p.num_rows - first, tiles = (left + kMostRows - 1) / kMostRows;
  return (left + tiles - 1) / tiles;
}

// The queries with rows in lanes' place: one tile's rows side by side for each column.
void pack_queries(const Problem& p) {
  const AttentionArgs& a = *p.args;
  const int64_t stride = static_cast<int64_t>(a.num_heads) * a.head_dim;
  for (int64_t first = 0, rows; first < p.num_rows; first += rows) {
    rows = tile_rows(p, first);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = first + r;
      const float* query = a.query + (p.row_begin + row / p.group) * stride + (p.kv_head * p.group + row % p.group) * a.head_dim;
      const float* factors = a.kind == KvKind::kInt8 ? a.factors + p.kv_head * a.head_dim : nullptr;
      for (int64_t d = 0; d < a.head_dim; ++d) {
        p.scratch.query[first * a.head_dim + d * rows + r] = factors == nullptr ? query[d] : query[d] * factors[d];
      }
    }
  }
}

void clear(const Problem& p, const Partial& part) {
  for (int64_t i = 0; i < p.num_rows * p.args->head_dim; ++i) part.sums[i] = 0.0f;
  for (int64_t i = 0; i < p.num_rows * kLanes; ++i) part.lanes[i] = 0.0f;
  for (int64_t i = 0; i < p.num_rows; ++i) part.maximum[i] = -__builtin_inff();
}

// total follows with a later segment, for the rows that see it; it is copied where a row's window begins in it.
void merge(const Problem& p, const Partial& total, const Partial& part, int64_t segment) {
  const int64_t head_dim = p.args->head_dim;
  for (int64_t row = 0; row < p.num_rows; ++row) {
    const int64_t first = first_position(p, row) / kAttentionSegment;
    if (position_of(p, row) < segment * kAttentionSegment || segment < first) continue;
    if (segment == first) {
      memcpy(total.sums + row * head_dim, part.sums + row * head_dim, static_cast<size_t>(head_dim) * sizeof(float));
      memcpy(total.lanes + row * kLanes, part.lanes + row * kLanes, kLanes * sizeof(float));
      total.maximum[row] = part.maximum[row];
      continue;
    }
    const float maximum = part.maximum[row] > total.maximum[row] ? part.maximum[row] : total.maximum[row];
    const f32x16 old_factor = exp(set1(total.maximum[row]) - set1(maximum));
    const f32x16 new_factor = exp(set1(part.maximum[row]) - set1(maximum));
    float *sums = total.sums + row * head_dim, *lanes = total.lanes + row * kLanes;
    const float* added = part.sums + row * head_dim;
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      store(sums + d, fma(load(added + d), new_factor, load(sums + d) * old_factor));
    }
    store(lanes, fma(load(part.lanes + row * kLanes), new_factor, load(lanes) * old_factor));
    total.maximum[row] = maximum;
  }
}

void finish_rows(const Problem& p, const Partial& total) {
  const AttentionArgs& a = *p.args;
  const int64_t stride = static_cast<int64_t>(a.num_heads) * a.head_dim;
  for (int64_t row = 0; row < p.num_rows; ++row) {
    float* out = a.out + (p.row_begin + row / p.group) * stride + (p.kv_head * p.group + row % p.group) * a.head_dim;
    const f32x16 weight = set1(hsum(load(total.lanes + row * kLanes)));
    for (int64_t d = 0; d < a.head_dim; d += kLanes) store(out + d, load(total.sums + row * a.head_dim + d) / weight);
  }
}

// The part of p's kv head of the block of a sequence.
OCTAVO_INLINE int64_t part_of(const Problem& p, int64_t block) {
  return (p.block_table[block] * static_cast<int64_t>(p.args->num_kv_heads) + p.kv_head) * p.args->head_bytes;
}

// The tile of K and V from token `start`, of `left` tokens. Blocks lie scattered, so hardware cannot foresee the next: scores ask
// for the lines of V, values for those of the next tile's K, one by one, as many at once would stall everything behind them.
template <typename T>
void find_blocks(const Problem& p, int64_t start, int64_t left, Blocks<T>* blocks) {
  const AttentionArgs& a = *p.args;
  const int64_t block_size = a.block_size, elements = a.head_dim * block_size;
  for (int64_t i = 0; i * block_size < kTile && i * block_size < left; ++i) {
    const int64_t block = start / block_size + i, at = part_of(p, block);
    blocks->k[i] = blocks->next[i] = reinterpret_cast<const T*>(a.k_cache + at);
    blocks->v[i] = reinterpret_cast<const T*>(a.v_cache + at);
    if constexpr (kHasScales<T>) {
      memcpy(blocks->score_scales + i * block_size, blocks->k[i] + elements, static_cast<size_t>(block_size) * sizeof(float));
      memcpy(blocks->weight_scales + i * block_size, blocks->v[i] + elements, static_cast<size_t>(block_size) * sizeof(float));
    }
    if (kTile + i * block_size < left) {
      const int64_t next = part_of(p, block + kTile / block_size);
      blocks->next[i] = reinterpret_cast<const T*>(a.k_cache + next);
      if constexpr (kHasScales<T>) {
        __builtin_prefetch(blocks->next[i] + elements);
        __builtin_prefetch(reinterpret_cast<const T*>(a.v_cache + next) + elements);
      }
    }
  }
  for (int64_t c = 0; c < kTile; c += kLanes) {
    const f32x16 own = kHasScales<T> ? load(blocks->score_scales + c) : set1(1.0f);
    store(blocks->score_scales + c, own * set1(a.scale));
  }
}

OCTAVO_INLINE int64_t in_tile(int64_t token) { return token < 0 ? 0 : token < kTile ? token : kTile; }

// Rows first to first + rows against the tokens start to start + kTile.
template <typename T>
void attend(const Problem& p, const Partial& part, const Blocks<T>& blocks, int64_t start, int64_t first, int64_t rows) {
  const AttentionArgs& a = *p.args;
  const int64_t block_size = a.block_size, head_dim = a.head_dim;
  const int64_t past = position_of(p, first + rows - 1) + 1 - start;  // of the last row, which sees the most
  const int64_t unseen = first_position(p, first) - start;            // of the first row, whose window begins earliest
  if (past <= 0 || unseen >= kTile) return;
  const int64_t skipped = unseen > 0 ? unseen / kLanes : 0;           // vectors of tokens before every window
  const int64_t tokens = past < kTile ? past : kTile, count = (tokens + kLanes - 1) / kLanes;
  Tokens<T> lanes[kVectors];
  for (int64_t c = 0; c < count; ++c) {
    const int64_t token = c * kLanes, block = token / block_size, shift = token % block_size;
    const int64_t other = block_size < kLanes && token + 8 < tokens ? block + 1 : block;
    lanes[c] = {blocks.k[block] + shift, blocks.k[other] + shift, blocks.v[block] + shift, blocks.v[other] + shift};
  }
  float* weights = p.scratch.weights + first * kTile;
  float* sums = part.sums + first * head_dim;
  const ScoreTile<T>* tiles = block_size >= kLanes ? kScoreTiles<T, false> : kScoreTiles<T, true>;
  tiles[rows - 1](p.scratch.query + first * head_dim, lanes + skipped, count - skipped, block_size, head_dim,
                  weights + skipped * kLanes);

  Seen seen[kMostRows];
  for (int64_t r = 0; r < rows; ++r) {
    seen[r] = {in_tile(first_position(p, first + r) - start), in_tile(position_of(p, first + r) + 1 - start)};
    if (seen[r].begin >= seen[r].end) continue;
    softmax_row(weights + r * kTile, seen[r], blocks, a.soft_cap, part.maximum + first + r, part.lanes + (first + r) * kLanes,
                sums + r * head_dim, head_dim);
  }
  // Positions ascend, so rows r to last may all read the tokens from where the last row's window begins to the first row's
  // position; what comes before and after is each row's own.
  const auto add = [&](int64_t r, int64_t count_rows, int64_t begin, int64_t end) {
    if (begin >= end) return;
    kValueTiles<T>[count_rows - 1](weights + r * kTile, blocks, block_size, begin, end, head_dim, sums + r * head_dim);
  };
  for (int64_t r = 0; r < rows; r += kMostValueRows) {
    const int64_t together = rows - r < kMostValueRows ? rows - r : kMostValueRows;
    const Seen shared = {seen[r + together - 1].begin, seen[r].end};
    if (shared.begin >= shared.end) {
      for (int64_t i = r; i < r + together; ++i) add(i, 1, seen[i].begin, seen[i].end);
      continue;
    }
    for (int64_t i = r; i < r + together; ++i) add(i, 1, seen[i].begin, shared.begin);
    add(r, together, shared.begin, shared.end);
    for (int64_t i = r; i < r + together; ++i) add(i, 1, shared.end, seen[i].end);
  }
}

template <typename T>
void attend_tiles(const Problem& p, const Partial& part, int64_t begin, int64_t last) {
  for (int64_t start = begin; start < last; start += kTile) {
    Blocks<T> blocks = {};
    find_blocks(p, start, last - start, &blocks);
    for (int64_t first = 0; first < p.num_rows; first += tile_rows(p, first)) {
      attend(p, part, blocks, start, first, tile_rows(p, first));
    }
  }
}

// One segment into `part`.
void attend_segment(const Problem& p, const Partial& part, int64_t segment) {
  clear(p, part);
  const int64_t seen = position_of(p, p.num_rows - 1) + 1, begin = segment * kAttentionSegment;
  const int64_t last = seen < begin + kAttentionSegment ? seen : begin + kAttentionSegment;
  const int64_t unseen = first_position(p, 0) / kTile * kTile, start = unseen > begin ? unseen : begin;
  if (p.args->kind == KvKind::kInt8) {
    attend_tiles<int8_t>(p, part, start, last);
  } else {
    attend_tiles<uint16_t>(p, part, start, last);
  }
}

}  // namespace

void attention(const AttentionArgs* args, const int32_t* block_table, int64_t row_begin, int64_t row_end, int32_t kv_head,
               float* scratch) {
  const Problem p = make_problem(args, block_table, row_begin, row_end, kv_head, scratch);
  const Partial total = partial_at(p, p.scratch.rest);
  const Partial part = partial_at(p, total.maximum + p.num_rows);
  pack_queries(p);
  int64_t segment = first_segment(p);
  attend_segment(p, total, segment);
  for (++segment; segment * kAttentionSegment <= args->positions[row_end - 1]; ++segment) {
    attend_segment(p, part, segment);
    merge(p, total, part, segment);
  }
  finish_rows(p, total);
}

void attention_segment(const AttentionArgs* args, const int32_t* block_table, int64_t row_begin, int64_t row_end,
                       int32_t kv_head, int64_t segment, float* partial, float* scratch) {
  const Problem p = make_problem(args, block_table, row_begin, row_end, kv_head, scratch);
  if (segment * kAttentionSegment > args->positions[row_end - 1] || segment < first_segment(p)) return;
  pack_queries(p);
  attend_segment(p, partial_at(p, partial), segment);
}

void attention_merge(const AttentionArgs* args, int64_t row_begin, int64_t row_end, int32_t kv_head, float* partials,
                     int64_t stride) {
  const Problem p = make_problem(args, nullptr, row_begin, row_end, kv_head, nullptr);
  int64_t segment = first_segment(p);
  const Partial total = partial_at(p, partials + segment * stride);
  for (++segment; segment * kAttentionSegment <= args->positions[row_end - 1]; ++segment) {
    merge(p, total, partial_at(p, partials + segment * stride), segment);
  }
  finish_rows(p, total);
}

}  // namespace OCTAVO_NS
}  // namespace octavo
