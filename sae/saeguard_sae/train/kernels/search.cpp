// The dense product in small integers, and the search for what is large in it, in one pass: no pre-activation is ever
// written to memory. For processors with 512-bit vectors that multiply bytes (VNNI); those that multiply whole tiles of
// bytes (AMX) are left to torch's product, and so is everything else.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && !defined(__AMX_INT8__)

#include <immintrin.h>
#include <omp.h>

#include "largest.h"

namespace {

constexpr int64_t ROWS = 6;       // of a tile: with 4 vectors of features each, 24 of the 32 registers hold its sums
constexpr int64_t VECTORS = 4;
constexpr int64_t LANES = 16;
constexpr int64_t FEATURES = VECTORS * LANES;
constexpr int64_t PACKED = 1 << 19;  // bytes of weights that are laid out at once, to stay in the second cache
constexpr int64_t SAMPLE = 96;       // rows by which it is guessed what the k-th largest of the others will be
constexpr float BELOW = 0.9f;        // of the guess: what lies above is looked at
constexpr int64_t CROWD = 3;         // times k: as many are kept before the smaller ones are dropped

// What is above a row's cut so far, ascending by feature.
struct Found {
  std::vector<int32_t> feature;
  std::vector<float> value;
  int64_t count = 0;
  float cut = 0;

  void make_room() {
    if (static_cast<int64_t>(feature.size()) >= count + FEATURES + LANES) return;
    feature.resize(2 * (count + FEATURES + LANES));
    value.resize(feature.size());
  }
};

// Drops all but the k largest, of equal ones the first; from here on only what is larger than the smallest counts.
void drop(Found& found, int64_t k) {
  if (found.count < k) return;
  Largest largest(found.value.data(), found.count, k);
  int64_t kept = 0;
  for (int64_t i = 0; i < found.count; i++) {
    const bool is_in = largest.has(found.value[i]);
    found.feature[kept] = found.feature[i];
    found.value[kept] = found.value[i];
    kept += is_in;
  }
  found.count = kept;
  found.cut = largest.least;
}

struct Problem {
  const int8_t *x, *W;
  const float *of_row, *of_feature, *bias;
  int64_t d, F, k;  // k is 0 where all above the cut are wanted
  int64_t words() const { return (d + 3) / 4; }
};

inline int32_t word(const int8_t* row, int64_t at, int64_t d) {
  uint32_t bytes = 0;
  for (int64_t j = 0; j < 4 && at + j < d; j++) bytes |= static_cast<uint32_t>(static_cast<uint8_t>(row[at + j])) << (8 * j);
  return static_cast<int32_t>(bytes);
}

// Rows in tiles [words][ROWS], the last one filled up with zeros; and what the weights' shift by 128 adds to each.
void pack_rows(const Problem& p, const std::vector<int32_t>& rows, std::vector<int32_t>& to, std::vector<int32_t>& shift) {
  const int64_t tiles = (rows.size() + ROWS - 1) / ROWS;
  to.assign(tiles * p.words() * ROWS, 0);
  shift.assign(tiles * ROWS, 0);
  for (int64_t r = 0; r < static_cast<int64_t>(rows.size()); r++) {
    const int8_t* row = p.x + rows[r] * p.d;
    int32_t* tile = to.data() + r / ROWS * p.words() * ROWS + r % ROWS;
    for (int64_t w = 0; w < p.words(); w++) tile[w * ROWS] = word(row, 4 * w, p.d);
    int32_t sum = 0;
    for (int64_t j = 0; j < p.d; j++) sum += row[j];
    shift[r] = 128 * sum;
  }
}

// The weights of FEATURES features as [words][FEATURES], each byte shifted to 0 to 255.
void pack_features(const Problem& p, int64_t first, int32_t* to) {
  const __m512i sign = _mm512_set1_epi32(static_cast<int32_t>(0x80808080));
  if (first + FEATURES <= p.F && p.d % 4 == 0) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i step = _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int32_t>(p.d)));
    for (int64_t v = 0; v < VECTORS; v++)
      for (int64_t w = 0; w < p.words(); w++) {
        const __m512i bytes = _mm512_i32gather_epi32(step, p.W + (first + v * LANES) * p.d + 4 * w, 1);
        _mm512_storeu_si512(to + w * FEATURES + v * LANES, _mm512_xor_si512(bytes, sign));
      }
    return;
  }
  for (int64_t j = 0; j < FEATURES; j++)
    for (int64_t w = 0; w < p.words(); w++) {
      const int32_t bytes = first + j < p.F ? word(p.W + (first + j) * p.d, 4 * w, p.d) : 0;
      to[w * FEATURES + j] = bytes ^ static_cast<int32_t>(0x80808080);
    }
}

// Scales and biases of FEATURES features; those behind the last one are never above anything.
struct Edge {
  float scale[FEATURES], bias[FEATURES];
  Edge(const Problem& p, int64_t first) {
    for (int64_t j = 0; j < FEATURES; j++) {
      const bool is_one = first + j < p.F;
      scale[j] = is_one ? p.of_feature[first + j] : 0;
      bias[j] = is_one ? p.bias[first + j] : -std::numeric_limits<float>::infinity();
    }
  }
};

// A function of its own: inlined, its sums would not all find a register.
[[gnu::noinline]] void multiply(const int32_t* x, const int32_t* W, int64_t words, __m512i (&sums)[ROWS][VECTORS]) {
  __m512i kept[ROWS][VECTORS] = {};
  for (int64_t w = 0; w < words; w++, x += ROWS, W += FEATURES) {
    __m512i weights[VECTORS];
#pragma GCC unroll 4
    for (int64_t v = 0; v < VECTORS; v++) weights[v] = _mm512_loadu_si512(W + v * LANES);
#pragma GCC unroll 6
    for (int64_t r = 0; r < ROWS; r++) {
      const __m512i bytes = _mm512_set1_epi32(x[r]);
#pragma GCC unroll 4
      for (int64_t v = 0; v < VECTORS; v++) kept[r][v] = _mm512_dpbusd_epi32(kept[r][v], weights[v], bytes);
    }
  }
#pragma GCC unroll 6
  for (int64_t r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int64_t v = 0; v < VECTORS; v++) sums[r][v] = kept[r][v];
}

inline void note(const __m512i (&sums)[VECTORS], int32_t shift, float of_row, const Edge& edge, int64_t first, Found& found) {
  const __m512 cut = _mm512_set1_ps(found.cut), scale = _mm512_set1_ps(of_row);
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), off = _mm512_set1_epi32(shift);
  __m512 values[VECTORS];
  __mmask16 above[VECTORS];
  unsigned any = 0;
#pragma GCC unroll 4
  for (int64_t v = 0; v < VECTORS; v++) {
    const __m512 both = _mm512_mul_ps(scale, _mm512_loadu_ps(edge.scale + v * LANES));
    const __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[v], off));
    values[v] = _mm512_fmadd_ps(sum, both, _mm512_loadu_ps(edge.bias + v * LANES));
    above[v] = _mm512_cmp_ps_mask(values[v], cut, _CMP_GT_OQ);
    any |= above[v];
  }
  if (!any) return;
  found.make_room();
#pragma GCC unroll 4
  for (int64_t v = 0; v < VECTORS; v++) {
    const __m512i feature = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int32_t>(first + v * LANES)));
    _mm512_storeu_si512(found.feature.data() + found.count, _mm512_maskz_compress_epi32(above[v], feature));
    _mm512_storeu_ps(found.value.data() + found.count, _mm512_maskz_compress_ps(above[v], values[v]));
    found.count += __builtin_popcount(above[v]);
  }
}

// Looks at all features of these rows, each above its own cut.
void look(const Problem& p, const std::vector<int32_t>& rows, std::vector<Found>& found) {
  if (rows.empty()) return;
  std::vector<int32_t> x, shift;
  pack_rows(p, rows, x, shift);
  const int64_t size = p.words() * FEATURES, lots = std::max<int64_t>(1, PACKED / (4 * size)), count = rows.size();
  std::vector<int32_t> W(lots * size);
  for (int64_t begin = 0; begin < p.F; begin += lots * FEATURES) {
    const int64_t end = std::min(p.F, begin + lots * FEATURES);
    std::vector<Edge> edges;
    for (int64_t first = begin; first < end; first += FEATURES) {
      pack_features(p, first, W.data() + (first - begin) / FEATURES * size);
      edges.emplace_back(p, first);
    }
    for (int64_t tile = 0; tile < count; tile += ROWS)
      for (int64_t first = begin; first < end; first += FEATURES) {
        const int64_t lot = (first - begin) / FEATURES;
        __m512i sums[ROWS][VECTORS];
        multiply(x.data() + tile * p.words(), W.data() + lot * size, p.words(), sums);
#pragma GCC unroll 6
        for (int64_t r = 0; r < ROWS; r++) {
          if (tile + r >= count) break;
          Found& one = found[rows[tile + r]];
          note(sums[r], shift[tile + r], p.of_row[rows[tile + r]], edges[lot], first, one);
          if (p.k && one.count > CROWD * p.k) drop(one, p.k);
        }
      }
  }
  if (p.k)
    for (int32_t row : rows) drop(found[row], p.k);
}

float length(const Problem& p, int64_t row) {
  int64_t sum = 0;
  for (int64_t j = 0; j < p.d; j++) sum += static_cast<int64_t>(p.x[row * p.d + j]) * p.x[row * p.d + j];
  return p.of_row[row] * std::sqrt(static_cast<float>(sum));
}

// The k largest of rows begin to end: a few rows tell how large those of the others will be, for their length; the rows
// of which that was too much are looked at again.
void look_for_largest(const Problem& p, int64_t begin, int64_t end, std::vector<Found>& found) {
  const int64_t some = std::min(end, begin + SAMPLE);
  std::vector<int32_t> rows;
  for (int64_t row = begin; row < some; row++) rows.push_back(row);
  look(p, rows, found);
  std::vector<float> shares;
  for (int64_t row = begin; row < some; row++)
    shares.push_back(found[row].count < p.k ? 0 : found[row].cut / std::max(length(p, row), 1e-30f));
  if (some == end) return;
  std::nth_element(shares.begin(), shares.begin() + shares.size() / 16, shares.end());
  const float share = BELOW * shares[shares.size() / 16];
  rows.clear();
  for (int64_t row = some; row < end; row++) {
    found[row].cut = share * length(p, row);
    rows.push_back(row);
  }
  look(p, rows, found);
  std::vector<int32_t> again;
  for (int32_t row : rows)
    if (found[row].count < p.k && share > 0) again.push_back(row);
  for (int32_t row : again) found[row].count = 0, found[row].cut = 0;
  look(p, again, found);
}

}  // namespace

extern "C" {

int saeguard_can_search() { return 1; }

// x [n, d] and W [F, d] in small integers with a scale for each row -> a handle for ``saeguard_take``, and how many
// features of each row there are: the k largest of those above 0, of equal ones the first; or all above ``cut`` if k is 0.
void* saeguard_search(const int8_t* x, const float* of_row, const int8_t* W, const float* of_feature, const float* bias,
                      int64_t n, int64_t d, int64_t F, int64_t k, float cut, int64_t* counts) {
  const Problem p{x, W, of_row, of_feature, bias, d, F, k};
  auto found = std::make_unique<std::vector<Found>>(n);
#pragma omp parallel
  {
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t begin = n * me / threads, end = n * (me + 1) / threads;
    if (k) {
      look_for_largest(p, begin, end, *found);
    } else {
      std::vector<int32_t> rows;
      for (int64_t row = begin; row < end; row++) {
        (*found)[row].cut = cut;
        rows.push_back(row);
      }
      look(p, rows, *found);
    }
  }
  for (int64_t row = 0; row < n; row++) counts[row] = (*found)[row].count;
  return found.release();
}

// What was found, each row's from ``starts`` on; the handle is used up.
void saeguard_take(void* handle, const int64_t* starts, int32_t* feature, float* value) {
  std::unique_ptr<std::vector<Found>> found(static_cast<std::vector<Found>*>(handle));
  for (size_t row = 0; row < found->size(); row++) {
    const Found& one = (*found)[row];
    std::copy_n(one.feature.begin(), one.count, feature + starts[row]);
    std::copy_n(one.value.begin(), one.count, value + starts[row]);
  }
}

}  // extern "C"

#else

extern "C" int saeguard_can_search() { return 0; }

#endif
