// Sampling one row of logits (graph/batch.py, SamplingRows): bias, penalties, temperature, top_k, top_p, min_p, Gumbel noise.
//
// The vocabulary is never sorted. A small top_k keeps a heap of the k best; a large one and top_p fill a histogram over the
// logits and sort only the bin in which the count or the mass is reached; tokens under (1 - top_p) / vocab of the mass cannot
// belong to the nucleus and are not looked at. The noise of a token costs one hash of
// integers; its two logarithms are taken only where the token could win: -log(-log u) <= -log(1 - u), so token i beats the
// best so far only if 1 - u < exp(z_i - best). Maxima and sums go over blocks of 64 logits in one fixed order.
#include "kernel_functions.h"

namespace octavo {
namespace OCTAVO_NS {
namespace {

constexpr int64_t kBlock = 64;
constexpr float kInfinity = __builtin_inff();
constexpr int32_t kSmallHeap = 256;

struct Scan {
  float top;      // the greatest value
  int32_t first;  // the lowest id that has it
  bool has_nan;
};

OCTAVO_INLINE int64_t block_length(int64_t begin, int64_t size) { return size - begin < kBlock ? size - begin : kBlock; }

// The greatest of `count` values, at most kBlock.
OCTAVO_INLINE float block_max(const float* x, int64_t count) {
  f32x16 top = set1(-kInfinity);
  if (count == kBlock) {
    for (int64_t i = 0; i < kBlock; i += kLanes) top = max(load(x + i), top);
    return hmax(top);
  }
  float result = -kInfinity;
  for (int64_t i = 0; i < count; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

Scan scan(const float* x, int64_t size) {
  Scan result = {-kInfinity, -1, false};
  f32x16 nans = set1(0.0f);
  int64_t best_block = -1, i = 0;
  for (; i < size; i += kBlock) {
    const int64_t count = block_length(i, size);
    const float top = block_max(x + i, count);
    if (top > result.top) {
      result.top = top;
      best_block = i;
    }
    for (int64_t j = 0; j < count; j += kLanes) {
      const f32x16 value = count - j >= kLanes ? load(x + i + j) : load_partial(x + i + j, count - j);
      nans = nans + select_gt(abs(value), set1(-1.0f), set1(0.0f), set1(1.0f));
    }
  }
  result.has_nan = hsum(nans) > 0.0f;
  if (best_block < 0 || result.has_nan) return result;
  int64_t at = best_block;
  while (x[at] != result.top) ++at;
  result.first = static_cast<int32_t>(at);
  return result;
}

// out[i] = exp(x[i] - top); returns the sum, block after block. out may be null.
double exponentials(const float* x, int64_t size, float top, float* out) {
  const f32x16 shift = set1(top);
  double total = 0.0;
  for (int64_t i = 0; i < size; i += kBlock) {
    const int64_t count = block_length(i, size);
    f32x16 sum = set1(0.0f);
    for (int64_t j = 0; j < count; j += kLanes) {
      const int64_t left = count - j;
      if (left >= kLanes) {
        const f32x16 e = exp(load(x + i + j) - shift);
        if (out != nullptr) store(out + i + j, e);
        sum = sum + e;
      } else {
        float lanes[16] = {};
        store_partial(lanes, exp(load_partial(x + i + j, left) - shift), left);
        for (int64_t lane = 0; lane < left && out != nullptr; ++lane) out[i + j + lane] = lanes[lane];
        sum = sum + load(lanes);
      }
    }
    total += static_cast<double>(hsum(sum));
  }
  return total;
}

// ---- heaps of ids by value; of equal values the lower id is the better ------------------------------------------------

OCTAVO_INLINE bool better(const float* z, int32_t a, int32_t b) { return z[a] > z[b] || (z[a] == z[b] && a < b); }

template <bool kBestOnTop>
void sift_down(const float* z, int32_t* heap, int64_t size, int64_t at) {
  const int32_t moving = heap[at];
  for (;;) {
    int64_t child = 2 * at + 1;
    if (child >= size) break;
    if (child + 1 < size && better(z, heap[child + 1], heap[child]) == kBestOnTop) ++child;
    if (better(z, heap[child], moving) != kBestOnTop) break;
    heap[at] = heap[child];
    at = child;
  }
  heap[at] = moving;
}

template <bool kBestOnTop>
void make_heap(const float* z, int32_t* heap, int64_t size) {
  for (int64_t i = size / 2 - 1; i >= 0; --i) sift_down<kBestOnTop>(z, heap, size, i);
}

// The k best ids of z, in no order.
void keep_best(const float* z, int64_t size, int64_t k, int32_t* ids) {
  for (int64_t i = 0; i < k; ++i) ids[i] = static_cast<int32_t>(i);
  make_heap<false>(z, ids, k);
  for (int64_t i = k; i < size;) {
    const int64_t count = block_length(i, size);
    if (block_max(z + i, count) > z[ids[0]]) {
      for (int64_t j = i; j < i + count; ++j) {
        if (z[j] <= z[ids[0]]) continue;
        ids[0] = static_cast<int32_t>(j);
        sift_down<false>(z, ids, k, 0);
      }
    }
    i += count;
  }
}

// The best of `size` ids until their weight (p, or 1 each if that is null) reaches `wanted`; they end up at the returned
// pointer, `*kept` of them.
int32_t* keep_heaviest(const float* z, const float* p, int32_t* ids, int64_t size, double wanted, int64_t* kept) {
  make_heap<true>(z, ids, size);
  double sum = 0.0;
  int64_t left = size;
  while (left > 0 && sum < wanted) {
    const int32_t best = ids[0];
    sum += p != nullptr ? static_cast<double>(p[best]) : 1.0;
    ids[0] = ids[--left];
    if (left > 0) sift_down<true>(z, ids, left, 0);
    ids[left] = best;
  }
  *kept = size - left;
  return ids + left;
}

// ---- selection by histogram ----------------------------------------------------------------------------------------------

constexpr int32_t kBins = 512;
constexpr float kWidest = 24.0f;  // what lies further below the top shares the last bin

struct Bins {
  float top, scale;
};

Bins make_bins(const float* z, int64_t size, float top) {
  f32x16 low = set1(top);
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) low = min(load(z + i), low);
  float lowest = -hmax(set1(0.0f) - low);
  for (; i < size; ++i) lowest = z[i] < lowest ? z[i] : lowest;
  const float range = top - lowest < kWidest ? top - lowest : kWidest;
  return {top, range > 0.0f ? static_cast<float>(kBins - 1) / range : 0.0f};
}

// Ascending as z descends.
OCTAVO_INLINE int32_t bin_of(const Bins& bins, float z) {
  constexpr float kLast = static_cast<float>(kBins - 1);
  const float bin = (bins.top - z) * bins.scale;
  return static_cast<int32_t>(bin < kLast ? bin : kLast);
}

// The ids whose p is at least `least` (all if p is null), ascending; returns how many.
int64_t list_candidates(const float* p, int64_t size, float least, int32_t* ids) {
  int64_t listed = 0;
  for (int64_t i = 0; i < size; i += kBlock) {
    const int64_t count = block_length(i, size);
    if (p != nullptr && block_max(p + i, count) < least) continue;
    for (int64_t j = i; j < i + count; ++j) {
      ids[listed] = static_cast<int32_t>(j);
      listed += p == nullptr || p[j] >= least;
    }
  }
  return listed;
}

// Like keep_heaviest over all tokens whose p is at least `least`: only the bin in which the weight is reached gets sorted. The
// ids lie at `ids`, in no order; `spare` has room for all.
int64_t keep_top(const float* z, const float* p, int64_t size, float top, float least, double wanted, int32_t* ids,
                 int32_t* spare) {
  const Bins bins = make_bins(z, size, top);
  const int64_t listed = list_candidates(p, size, least, spare);
  double weights[kBins];
  for (int32_t i = 0; i < kBins; ++i) weights[i] = 0.0;
  for (int64_t i = 0; i < listed; ++i) {
    const int32_t id = spare[i];
    weights[bin_of(bins, z[id])] += p != nullptr ? static_cast<double>(p[id]) : 1.0;
  }
  double before = 0.0;
  int32_t crossing = 0;
  for (; crossing < kBins - 1 && before + weights[crossing] < wanted; ++crossing) before += weights[crossing];

  int64_t kept = 0, members = 0;  // members of the crossing bin gather at the front of `spare`
  for (int64_t i = 0; i < listed; ++i) {
    const int32_t id = spare[i], bin = bin_of(bins, z[id]);
    if (bin < crossing) ids[kept++] = id;
    if (bin == crossing) spare[members++] = id;
  }
  int64_t taken = 0;
  const int32_t* best = keep_heaviest(z, p, spare, members, wanted - before, &taken);
  for (int64_t i = 0; i < taken; ++i) ids[kept++] = best[i];
  return kept;
}

// ---- the noise ---------------------------------------------------------------------------------------------------------

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;

OCTAVO_INLINE uint64_t mix(uint64_t z) {
  z ^= z >> 30;
  z *= 0xBF58476D1CE4E5B9u;
  z ^= z >> 27;
  z *= 0x94D049BB133111EBu;
  z ^= z >> 31;
  return z;
}

OCTAVO_INLINE uint32_t hash24(uint64_t key, int64_t token) {
  return static_cast<uint32_t>(mix(key + kGolden * (static_cast<uint64_t>(token) + 1)) >> 40);
}

struct Race {
  uint64_t key;
  float top;        // the greatest z
  float best;
  int32_t winner;
  float chance;     // exp(top - best), a little more: p * chance bounds 1 - u of a token that can win
};

void enter(Race* race, int32_t id, float z) {
  const double u = (hash24(race->key, id) + 0.5) / 16777216.0;
  const float value = z + static_cast<float>(-__builtin_log(-__builtin_log(u)));
  if (value > race->best || (value == race->best && id < race->winner)) {
    race->best = value;
    race->winner = id;
    race->chance = static_cast<float>(__builtin_exp(static_cast<double>(race->top) - static_cast<double>(value)) * 1.001);
  }
}

// At most 1 - u of the token, in units of 2**-24.
OCTAVO_INLINE float least_complement(uint32_t hash) { return static_cast<float>(16777215u - hash); }

void race_all(Race* race, const float* z, const float* p, int64_t size, float least_p) {
  for (int64_t i = 0; i < size; i += kBlock) {
    const int64_t count = block_length(i, size);
    const float top = block_max(p + i, count);
    if (top < least_p || top * race->chance < 0x1p-25f) continue;
    float complement[kBlock];
    for (int64_t j = 0; j < count; ++j) complement[j] = least_complement(hash24(race->key, i + j));
    for (int64_t j = 0; j < count; ++j) {
      const float probability = p[i + j];
      if (probability < least_p || complement[j] > probability * race->chance * 0x1p24f) continue;
      enter(race, static_cast<int32_t>(i + j), z[i + j]);
    }
  }
}

void race_listed(Race* race, const float* z, const float* p, const int32_t* ids, int64_t size, float least_p) {
  for (int64_t i = 0; i < size; ++i) {
    const int32_t id = ids[i];
    if (p[id] < least_p || least_complement(hash24(race->key, id)) > p[id] * race->chance * 0x1p24f) continue;
    enter(race, id, z[id]);
  }
}

// ---- the steps of one row ------------------------------------------------------------------------------------------------

// The logits with bias and penalties, in `work` if there are any.
const float* adjusted_logits(const SampleArgs& a, float* work) {
  if (a.num_seen == 0 && a.num_bias == 0) return a.logits;
  memcpy(work, a.logits, static_cast<size_t>(a.vocab) * sizeof(float));
  for (int32_t i = 0; i < a.num_bias; ++i) work[a.bias_ids[i]] += a.bias_values[i];
  for (int32_t i = 0; i < a.num_seen; ++i) {
    float* logit = work + a.seen_ids[i];
    *logit = *logit > 0.0f ? *logit / a.repetition : *logit * a.repetition;
    if (a.seen_counts[i] > 0) {
      *logit -= a.presence;
      *logit -= a.frequency * static_cast<float>(a.seen_counts[i]);
    }
  }
  return work;
}

int32_t draw(const SampleArgs& a, const float* logits, float top, int32_t first) {
  float* z = a.work;
  float* p = a.work + a.vocab;
  auto* ids = reinterpret_cast<int32_t*>(a.work + 2 * a.vocab);
  for (int64_t i = 0; i < a.vocab; ++i) z[i] = logits[i] / a.temperature;
  const float highest = top / a.temperature;
  if (highest == kInfinity) return first;

  const uint64_t seed_key = mix(a.seed + kGolden) ^ static_cast<uint64_t>(static_cast<int64_t>(a.index));
  const uint64_t key = mix(mix(seed_key) ^ (static_cast<uint64_t>(static_cast<int64_t>(a.position)) + kGolden));
  Race race = {key, highest, -kInfinity, first, kInfinity};
  enter(&race, first, z[first]);

  int64_t listed = -1;  // -1: every token is a candidate
  double total = 0.0;
  auto* spare = ids + a.vocab;
  if (a.top_k > 0 && a.top_k < a.vocab) {
    if (a.top_k <= kSmallHeap) {
      listed = a.top_k;
      keep_best(z, a.vocab, listed, ids);
    } else {
      listed = keep_top(z, nullptr, a.vocab, highest, 0.0f, static_cast<double>(a.top_k), ids, spare);
    }
    auto* packed = reinterpret_cast<float*>(spare);  // the listed values side by side, then their exponentials at their ids
    for (int64_t i = 0; i < listed; ++i) packed[i] = z[ids[i]];
    total = exponentials(packed, listed, highest, packed);
    for (int64_t i = 0; i < listed; ++i) p[ids[i]] = packed[i];
    if (a.top_p < 1.0f) ids = keep_heaviest(z, p, ids, listed, static_cast<double>(a.top_p) * total, &listed);
  } else {
    total = exponentials(z, a.vocab, highest, p);
    if (a.top_p < 1.0f) {
      const auto least = static_cast<float>(0.99 * (1.0 - static_cast<double>(a.top_p)) * total / static_cast<double>(a.vocab));
      listed = keep_top(z, p, a.vocab, highest, least, static_cast<double>(a.top_p) * total, ids, spare);
    }
  }
  if (listed >= 0) {
    race_listed(&race, z, p, ids, listed, a.min_p);
  } else {
    race_all(&race, z, p, a.vocab, a.min_p);
  }
  return race.winner;
}

void report_logprobs(const SampleArgs& a, int32_t token) {
  const Scan raw = scan(a.logits, a.vocab);
  const double sum = exponentials(a.logits, a.vocab, raw.top, nullptr);
  const double base = static_cast<double>(raw.top) + __builtin_log(sum);
  *a.logprob = static_cast<float>(static_cast<double>(a.logits[token]) - base);
  if (a.num_logprobs == 0) return;
  keep_best(a.logits, a.vocab, a.num_logprobs, a.top_ids);
  for (int64_t left = a.num_logprobs - 1; left > 0; --left) {  // the worst is on top: heapsort leaves the best first
    const int32_t worst = a.top_ids[0];
    a.top_ids[0] = a.top_ids[left];
    a.top_ids[left] = worst;
    sift_down<false>(a.logits, a.top_ids, left, 0);
  }
  for (int32_t i = 0; i < a.num_logprobs; ++i) {
    a.top_logprobs[i] = static_cast<float>(static_cast<double>(a.logits[a.top_ids[i]]) - base);
  }
}

}  // namespace

void sample(const SampleArgs* args) {
  const SampleArgs& a = *args;
  const float* logits = adjusted_logits(a, a.work);
  const Scan found = scan(logits, a.vocab);
  *a.token = -1;
  if (found.has_nan || found.first < 0) return;
  if (found.top == kInfinity) {  // greatest, but is any finite?
    bool any_finite = false;
    for (int64_t i = 0; i < a.vocab && !any_finite; ++i) any_finite = logits[i] - logits[i] == 0.0f;
    if (!any_finite) return;
  }
  *a.token = a.temperature == 0.0f ? found.first : draw(a, logits, found.top, found.first);
  if (a.num_logprobs >= 0) report_logprobs(a, *a.token);
}

}  // namespace OCTAVO_NS
}  // namespace octavo
