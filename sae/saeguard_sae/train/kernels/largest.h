// The k largest of a few numbers, without a branch that depends on them.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

inline int32_t bits_of(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// How many of n numbers have bits that are at least these, as integers.
inline int64_t count_from(const float* values, int64_t n, int32_t bits) {
  int64_t count = 0, i = 0;
#ifdef __AVX512F__
  const __m512i least = _mm512_set1_epi32(bits);
  for (; i < n; i += 16) {
    const __mmask16 there = n - i < 16 ? (1 << (n - i)) - 1 : 0xffff;
    const __m512i some = _mm512_maskz_loadu_epi32(there, values + i);
    count += __builtin_popcount(_mm512_mask_cmpge_epi32_mask(there, some, least));
  }
#else
  for (; i < n; i++) count += bits_of(values[i]) >= bits;
#endif
  return count;
}

// The k-th largest of n numbers, or 0 if it is negative. Numbers that are not are ordered as the integers of their bits:
// the answer is made bit by bit, from the highest, by counting.
inline float kth_largest(const float* values, int64_t n, int64_t k) {
  int32_t found = 0;
  for (int bit = 30; bit >= 0; bit--) {
    const int32_t next = found | (1 << bit);
    found = count_from(values, n, next) >= k ? next : found;
  }
  float value;
  std::memcpy(&value, &found, 4);
  return value;
}

// Of numbers asked for one after the other, whether each is among the k largest; of equal ones the first are.
struct Largest {
  float least;
  int64_t equal;
  Largest(const float* values, int64_t n, int64_t k) : least(kth_largest(values, n, k)), equal(k) {
    equal -= count_from(values, n, bits_of(least) + 1);
  }
  bool has(float value) {
    const bool is_equal = value == least, is_in = value > least || (is_equal & (equal > 0));
    equal -= is_equal;
    return is_in;
  }
};

}  // namespace
