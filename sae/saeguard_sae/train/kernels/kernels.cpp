// The sparse part of a training step on the CPU; torch_kernels.py computes the same in torch and says what each does.
//
// Plain C functions over contiguous arrays: no headers of torch, so that it compiles in seconds wherever there is a C++
// compiler. Every array element is written by one thread in a fixed order: results do not depend on the scheduling.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <omp.h>

#include "largest.h"

namespace {

typedef float Lanes __attribute__((vector_size(64), aligned(4)));
constexpr int64_t LANES = 16;
constexpr int64_t BLOCK = 64;

inline const Lanes& lanes(const float* p) { return *reinterpret_cast<const Lanes*>(p); }
inline Lanes& lanes(float* p) { return *reinterpret_cast<Lanes*>(p); }

inline float total(const Lanes& v) {
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += v[i];
  return sum;
}

float dot(const float* a, const float* b, int64_t d) {
  Lanes s0{}, s1{}, s2{}, s3{};
  int64_t j = 0;
  for (; j + 4 * LANES <= d; j += 4 * LANES) {
    s0 += lanes(a + j) * lanes(b + j);
    s1 += lanes(a + j + LANES) * lanes(b + j + LANES);
    s2 += lanes(a + j + 2 * LANES) * lanes(b + j + 2 * LANES);
    s3 += lanes(a + j + 3 * LANES) * lanes(b + j + 3 * LANES);
  }
  for (; j + LANES <= d; j += LANES) s0 += lanes(a + j) * lanes(b + j);
  float sum = total((s0 + s1) + (s2 + s3));
  for (; j < d; j++) sum += a[j] * b[j];
  return sum;
}

inline void add_scaled(float scale, const float* a, float* y, int64_t d) {
  int64_t j = 0;
  for (; j + LANES <= d; j += LANES) lanes(y + j) += scale * lanes(a + j);
  for (; j < d; j++) y[j] += scale * a[j];
}

// Rows of a matrix larger than any cache are asked for one ahead of their use.
inline void fetch(const float* row, int64_t d) {
  for (int64_t j = 0; j < d; j += LANES) __builtin_prefetch(row + j);
}

inline uint16_t half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Positive floats are ordered as the integers of their bits, and negative ones lie below all of them.
inline int16_t bits_of(float value, int16_t) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<int16_t>(bits >> 16);
}
inline int32_t bits_of(float value, int32_t) {
  int32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float value_of(int16_t bits) {
  uint32_t wide = static_cast<uint32_t>(static_cast<uint16_t>(bits)) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
inline float value_of(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

template <class T>
int64_t take_above(const T* pre, int64_t F, T cut, int32_t* out) {
  int64_t count = 0;
  for (int64_t start = 0; start < F; start += BLOCK) {
    const int64_t end = std::min(F, start + BLOCK);
    int32_t any = 0;
#pragma omp simd reduction(| : any)
    for (int64_t j = start; j < end; j++) any |= pre[j] > cut;
    if (!any) continue;
    for (int64_t j = start; j < end; j++) {
      out[count] = static_cast<int32_t>(j);
      count += pre[j] > cut;
    }
  }
  return count;
}

// A matrix of pre-activations, row by row: as it lies there, or made of the products of small integers.
template <class T>
struct Plain {
  typedef T Value;
  const T* pre;
  const T* row(int64_t r, int64_t F, std::vector<float>&) const { return pre + r * F; }
};

struct Small {
  typedef int32_t Value;
  const int32_t* sums;
  const float *of_row, *of_feature, *bias;
  const int32_t* row(int64_t r, int64_t F, std::vector<float>& scratch) const {
    scratch.resize(F);
    const int32_t* from = sums + r * F;
    const float scale = of_row[r];
    float* to = scratch.data();
#pragma omp simd
    for (int64_t j = 0; j < F; j++) to[j] = static_cast<float>(from[j]) * (scale * of_feature[j]) + bias[j];
    return reinterpret_cast<const int32_t*>(to);
  }
};

template <class Rows>
void above(const Rows& rows, int64_t n, int64_t F, float cut, int64_t room, int32_t* feature, int64_t* counts) {
  typedef typename Rows::Value T;
  const T bits = bits_of(cut, T());
#pragma omp parallel
  {
    std::vector<float> scratch;
    std::vector<int32_t> found(F + BLOCK);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < n; r++) {
      counts[r] = take_above(rows.row(r, F, scratch), F, bits, found.data());
      std::copy_n(found.begin(), std::min(room, counts[r]), feature + r * room);
    }
  }
}

template <class Rows>
void largest(const Rows& rows, int64_t n, int64_t F, int64_t k, int32_t* feature, int64_t* counts) {
  typedef typename Rows::Value T;
#pragma omp parallel
  {
    std::vector<float> scratch;
    std::vector<int32_t> found(F + BLOCK);
    float guess = 0;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < n; r++) {
      const T* p = rows.row(r, F, scratch);
      int64_t count = take_above(p, F, bits_of(guess, T()), found.data());
      for (int tries = 0; count < k && guess > 0; tries++) {
        guess = tries < 6 ? guess * 0.75f : 0;
        count = take_above(p, F, bits_of(guess, T()), found.data());
      }
      if (count > k) {
        auto first = [p](int32_t a, int32_t b) { return p[a] > p[b] || (p[a] == p[b] && a < b); };
        std::nth_element(found.begin(), found.begin() + k - 1, found.begin() + count, first);
        const float kth = std::max(0.0f, value_of(p[found[k - 1]]));
        guess = guess > 0 ? 0.95f * guess + 0.05f * 0.85f * kth : 0.7f * kth;
        std::sort(found.begin(), found.begin() + k);
        count = k;
      }
      std::copy_n(found.begin(), count, feature + r * k);
      counts[r] = count;
    }
  }
}

// A row as integers of -127 to 127 -> what one of them stands for.
float shrink(const float* row, int64_t d, int8_t* small) {
  float most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t j = 0; j < d; j++) most = std::max(most, std::fabs(row[j]));
  const float scale = most > 0 ? most / 127 : 1;
  const float inverse = 1 / scale;
#pragma omp simd
  for (int64_t j = 0; j < d; j++) small[j] = static_cast<int8_t>(std::nearbyint(row[j] * inverse));
  return scale;
}

inline float adam(float g, float& m, float& v, float rate, float beta1, float beta2, float root, float eps) {
  m = beta1 * m + (1 - beta1) * g;
  v = beta2 * v + (1 - beta2) * g * g;
  return rate * m / (std::sqrt(v) * root + eps);
}

constexpr int64_t COLUMNS = 4 * LANES, TOKENS = 4096;

// The pairs of some tokens that fire, in the order of their features; within one, in that of the tokens.
struct ByFeature {
  std::vector<int64_t> begins;
  std::vector<int32_t> row;
  std::vector<float> value, slope;

  ByFeature(const int64_t* starts, int64_t tokens, const int32_t* feature, const float* values, const float* slopes, int64_t F)
      : begins(F + 1) {
    for (int64_t q = starts[0]; q < starts[tokens]; q++) begins[feature[q] + 1] += values[q] > 0;
    for (int64_t f = 0; f < F; f++) begins[f + 1] += begins[f];
    row.resize(begins[F]), value.resize(begins[F]), slope.resize(begins[F]);
    std::vector<int64_t> next(begins.begin(), begins.end() - 1);
    for (int64_t r = 0; r < tokens; r++)
      for (int64_t q = starts[r]; q < starts[r + 1]; q++) {
        if (!(values[q] > 0)) continue;
        const int64_t at = next[feature[q]]++;
        row[at] = static_cast<int32_t>(r);
        value[at] = values[q];
        slope[at] = slopes[q];
      }
  }
};

// What some columns of the features from ``begin`` to ``end`` get: rows of ``from``, times a number for each pair.
struct Sum {
  const float *from, *times;
  float* to;
  int64_t width, column, begin, end;
  Sum part(int64_t number, int64_t parts) const {
    Sum one = *this;
    one.begin = begin + (end - begin) * number / parts;
    one.end = begin + (end - begin) * (number + 1) / parts;
    return one;
  }
};

void add_columns(const Sum& sum, const ByFeature& pairs, int64_t tokens, const std::vector<uint8_t>& fresh, float* room) {
  const int64_t width = std::min(COLUMNS, sum.width - sum.column);
  for (int64_t r = 0; r < tokens; r++) {
    std::memcpy(room + r * COLUMNS, sum.from + r * sum.width + sum.column, width * sizeof(float));
    std::fill(room + r * COLUMNS + width, room + (r + 1) * COLUMNS, 0.0f);
  }
  for (int64_t f = sum.begin; f < sum.end; f++) {
    const int64_t begin = pairs.begins[f], end = pairs.begins[f + 1];
    if (begin == end) continue;
    Lanes s0{}, s1{}, s2{}, s3{};
    for (int64_t at = begin; at < end; at++) {
      const float* from = room + pairs.row[at] * COLUMNS;
      const float times = sum.times[at];
      s0 += times * lanes(from);
      s1 += times * lanes(from + LANES);
      s2 += times * lanes(from + 2 * LANES);
      s3 += times * lanes(from + 3 * LANES);
    }
    float all[COLUMNS], *to = sum.to + f * sum.width + sum.column;
    lanes(all) = s0, lanes(all + LANES) = s1, lanes(all + 2 * LANES) = s2, lanes(all + 3 * LANES) = s3;
    for (int64_t j = 0; j < width; j++) to[j] = fresh[f] ? all[j] : to[j] + all[j];
  }
}

}  // namespace

extern "C" {

// Of each row at most ``room`` are written; counts are what there is.
// kind: 0 float32, 1 bfloat16, 2 sums of products of small integers, with a scale for each row and each feature.
void saeguard_above(const void* pre, int kind, const float* of_row, const float* of_feature, const float* bias,
                    int64_t n, int64_t F, float cut, int64_t room, int32_t* feature, int64_t* counts) {
  if (kind == 0) above(Plain<int32_t>{static_cast<const int32_t*>(pre)}, n, F, cut, room, feature, counts);
  if (kind == 1) above(Plain<int16_t>{static_cast<const int16_t*>(pre)}, n, F, cut, room, feature, counts);
  if (kind == 2) above(Small{static_cast<const int32_t*>(pre), of_row, of_feature, bias}, n, F, cut, room, feature, counts);
}

void saeguard_largest(const void* pre, int kind, const float* of_row, const float* of_feature, const float* bias,
                      int64_t n, int64_t F, int64_t k, int32_t* feature, int64_t* counts) {
  if (kind == 0) largest(Plain<int32_t>{static_cast<const int32_t*>(pre)}, n, F, k, feature, counts);
  if (kind == 1) largest(Plain<int16_t>{static_cast<const int16_t*>(pre)}, n, F, k, feature, counts);
  if (kind == 2) largest(Small{static_cast<const int32_t*>(pre), of_row, of_feature, bias}, n, F, k, feature, counts);
}

void saeguard_shrink(const float* x, int64_t n, int64_t d, int8_t* small, float* scale) {
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < n; r++) scale[r] = shrink(x + r * d, d, small + r * d);
}

// Whether a pair's value is among the k largest of its row, of equal ones the first.
void saeguard_strongest(int64_t B, const int64_t* starts, const float* values, int64_t k, bool* kept) {
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < B; r++) {
    Largest largest(values + starts[r], starts[r + 1] - starts[r], k);
    for (int64_t q = starts[r]; q < starts[r + 1]; q++) kept[q] = largest.has(values[q]);
  }
}

void saeguard_read(const float* x, const float* W, const float* b, int64_t B, int64_t d, const int64_t* starts,
                   const int32_t* feature, float* values) {
#pragma omp parallel for schedule(dynamic, 16)
  for (int64_t r = 0; r < B; r++) {
    for (int64_t q = starts[r]; q < starts[r + 1]; q++) {
      if (q + 1 < starts[r + 1]) fetch(W + feature[q + 1] * d, d);
      values[q] = std::max(0.0f, dot(x + r * d, W + feature[q] * d, d) + b[feature[q]]);
    }
  }
}

// errors [L, B, d] become each level's pull: the weighted sum of its error and those of the levels above it.
void saeguard_decode(const float* target, const float* W, int64_t B, int64_t d, const int64_t* starts,
                     const int32_t* feature, const float* values, const int32_t* ends, const float* weights, int64_t L,
                     float* pulls, float* last, float* squares, float* slopes) {
#pragma omp parallel
  {
    std::vector<float> e(d);
#pragma omp for schedule(dynamic, 16)
    for (int64_t r = 0; r < B; r++) {
      for (int64_t j = 0; j < d; j++) e[j] = -target[r * d + j];
      int64_t q = starts[r];
      for (int64_t l = 0; l < L; l++) {
        for (; q < starts[r + 1] && feature[q] < ends[l]; q++) {
          if (q + 1 < starts[r + 1]) fetch(W + feature[q + 1] * d, d);
          if (values[q] > 0) add_scaled(values[q], W + feature[q] * d, e.data(), d);
        }
        squares[r * L + l] = dot(e.data(), e.data(), d);
        std::memcpy(pulls + (l * B + r) * d, e.data(), d * sizeof(float));
      }
      std::memcpy(last + r * d, e.data(), d * sizeof(float));
      for (int64_t l = L - 1; l >= 0; l--) {
        float* pull = pulls + (l * B + r) * d;
        for (int64_t j = 0; j < d; j++) pull[j] *= weights[l];
        if (l + 1 < L) add_scaled(1.0f, pull + B * d, pull, d);
      }
      q = starts[r];
      for (int64_t l = 0; l < L; l++)
        for (; q < starts[r + 1] && feature[q] < ends[l]; q++)
          slopes[q] = values[q] > 0 ? dot(pulls + (l * B + r) * d, W + feature[q] * d, d) : 0.0f;
    }
  }
}

// Adds the pairs' gradients to their features' rows. Columns by columns, so that those of all tokens stay in the second
// cache while they are read in the features' order: whole rows would come from the third for every pair.
void saeguard_gradients(const float* x, const float* pulls, int64_t B, int64_t d_in, int64_t d_out, int64_t F,
                        const int64_t* starts, const int32_t* feature, const float* values, const float* slopes,
                        const int32_t* ends, int64_t L, float* g_enc, float* g_bias, float* g_dec, uint8_t* active) {
  for (int64_t first = 0; first < B; first += TOKENS) {
    const int64_t tokens = std::min(B - first, TOKENS);
    const ByFeature pairs(starts + first, tokens, feature, values, slopes, F);
    std::vector<uint8_t> fresh(F);
#pragma omp parallel for schedule(static)
    for (int64_t f = 0; f < F; f++) {
      const int64_t begin = pairs.begins[f], end = pairs.begins[f + 1];
      if (begin == end) continue;
      fresh[f] = !active[f];
      float sum = fresh[f] ? 0 : g_bias[f];
      for (int64_t at = begin; at < end; at++) sum += pairs.slope[at];
      g_bias[f] = sum;
      active[f] = 1;
    }
    std::vector<Sum> sums;
    for (int64_t column = 0; column < d_in; column += COLUMNS)
      sums.push_back({x + first * d_in, pairs.slope.data(), g_enc, d_in, column, 0, F});
    for (int64_t l = 0; l < L; l++)
      for (int64_t column = 0; column < d_out; column += COLUMNS) {
        const float* from = pulls + (l * B + first) * d_out;
        sums.push_back({from, pairs.value.data(), g_dec, d_out, column, l ? ends[l - 1] : 0, ends[l]});
      }
    const int64_t parts = (omp_get_max_threads() + sums.size() - 1) / sums.size(), count = sums.size() * parts;
#pragma omp parallel
    {
      std::vector<float> room(TOKENS * COLUMNS);
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < count; i++) add_columns(sums[i / parts].part(i % parts, parts), pairs, tokens, fresh, room.data());
    }
  }
}

// Squared length of each active feature's gradient, without the decoder's part along its own row.
void saeguard_lengths(const float* W_dec, int64_t d_in, int64_t d_out, int64_t F, const uint8_t* active, const float* g_enc,
                      const float* g_bias, const float* g_dec, float* squares) {
#pragma omp parallel for schedule(dynamic, 64)
  for (int64_t f = 0; f < F; f++) {
    squares[f] = 0;
    if (!active[f]) continue;
    const float *enc = g_enc + f * d_in, *dec = g_dec + f * d_out;
    const float along = dot(dec, W_dec + f * d_out, d_out);
    squares[f] = dot(enc, enc, d_in) + g_bias[f] * g_bias[f] + std::max(0.0f, dot(dec, dec, d_out) - along * along);
  }
}

void saeguard_adam(int64_t d_in, int64_t d_out, int64_t F, uint8_t* active, int32_t* clock, float scale, float rate, float beta1,
                   float beta2, float eps, float* W_enc, uint16_t* half_enc, int8_t* small_enc,
                   float* small_scale, float* b_enc, float* W_dec,
                   const float* g_enc, const float* g_bias, const float* g_dec, float* m_enc, float* v_enc,
                   float* m_bias, float* v_bias, float* m_dec, float* v_dec) {
#pragma omp parallel for schedule(dynamic, 64)
  for (int64_t f = 0; f < F; f++) {
    if (!active[f]) continue;
    active[f] = 0;
    clock[f]++;
    const float step = static_cast<float>(rate / (1 - std::pow(static_cast<double>(beta1), clock[f])));
    const float root = static_cast<float>(1 / std::sqrt(1 - std::pow(static_cast<double>(beta2), clock[f])));
    int64_t o = f * d_in;
#pragma omp simd
    for (int64_t j = 0; j < d_in; j++)
      W_enc[o + j] -= adam(g_enc[o + j] * scale, m_enc[o + j], v_enc[o + j], step, beta1, beta2, root, eps);
    if (half_enc != nullptr) {
#pragma omp simd
      for (int64_t j = 0; j < d_in; j++) half_enc[o + j] = half(W_enc[o + j]);
    }
    if (small_enc != nullptr) small_scale[f] = shrink(W_enc + o, d_in, small_enc + o);
    b_enc[f] -= adam(g_bias[f] * scale, m_bias[f], v_bias[f], step, beta1, beta2, root, eps);
    o = f * d_out;
    const float along = dot(g_dec + o, W_dec + o, d_out);
#pragma omp simd
    for (int64_t j = 0; j < d_out; j++) {
      const float g = (g_dec[o + j] - along * W_dec[o + j]) * scale;
      W_dec[o + j] -= adam(g, m_dec[o + j], v_dec[o + j], step, beta1, beta2, root, eps);
    }
    const float shrink = 1 / std::sqrt(dot(W_dec + o, W_dec + o, d_out));
#pragma omp simd
    for (int64_t j = 0; j < d_out; j++) W_dec[o + j] *= shrink;
  }
}

}  // extern "C"
