// Vectors of the instruction set that this file is compiled for: AVX512 (with VNNI or without) or AVX2.
#pragma once
#include <immintrin.h>
#include <cstdint>
#include <cstring>

#if defined(__AVX512BW__)
#define VLMQ_REGISTERS 32
using VI = __m512i;
using VF = __m512;
constexpr int LANES = 16;
static inline VI load(const void* p) { return _mm512_loadu_si512(p); }
static inline void store(void* p, VI v) { _mm512_storeu_si512(p, v); }
static inline VI zero() { return _mm512_setzero_si512(); }
static inline VI set1(int v) { return _mm512_set1_epi32(v); }
static inline VI both(VI a, VI b) { return _mm512_and_si512(a, b); }
static inline VI either(VI a, VI b) { return _mm512_or_si512(a, b); }
template <int S> static inline VI right16(VI a) { return _mm512_srli_epi16(a, S); }
template <int S> static inline VI left16(VI a) { return _mm512_slli_epi16(a, S); }
template <int S> static inline VI right32(VI a) { return _mm512_srai_epi32(a, S); }
static inline VI add(VI a, VI b) { return _mm512_add_epi32(a, b); }
static inline VI sub16(VI a, VI b) { return _mm512_sub_epi16(a, b); }
static inline VI mul(VI a, VI b) { return _mm512_mullo_epi32(a, b); }
static inline VI widen(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
static inline VI widen(const uint16_t* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
static inline VI upper_half(VI a) { return _mm512_slli_epi32(a, 16); }
static inline VF as_float(VI a) { return _mm512_castsi512_ps(a); }
static inline VI as_bits(VF a) { return _mm512_castps_si512(a); }
static inline VF to_float(VI a) { return _mm512_cvtepi32_ps(a); }
static inline VI to_int(VF a) { return _mm512_cvtps_epi32(a); }
static inline VF loadf(const float* p) { return _mm512_loadu_ps(p); }
static inline void storef(float* p, VF v) { _mm512_storeu_ps(p, v); }
static inline VF zerof() { return _mm512_setzero_ps(); }
static inline VF set1f(float v) { return _mm512_set1_ps(v); }
static inline VF mulf(VF a, VF b) { return _mm512_mul_ps(a, b); }
static inline VF fma(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }
static inline VF half_to_float(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
static inline void float_to_half(uint16_t* p, VF v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
static inline VI max_unsigned(VI a, VI b) { return _mm512_max_epu32(a, b); }
static inline uint32_t highest(VI a) { return _mm512_reduce_max_epu32(a); }
static inline int total(VI a) { return _mm512_reduce_add_epi32(a); }
static inline void store_as_16(void* p, VI a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(a)); }
static inline __m256i as_bytes(const VI* q) {  // 32 numbers of 8 bits
  return _mm256_set_m128i(_mm512_cvtepi32_epi8(q[1]), _mm512_cvtepi32_epi8(q[0]));
}
// acc[i] + a[2i] b[2i] + a[2i+1] b[2i+1], a and b int16
static inline VI dot(VI acc, VI a, VI b) {
#if defined(__AVX512VNNI__)
  return _mm512_dpwssd_epi32(acc, a, b);
#else
  return _mm512_add_epi32(acc, _mm512_madd_epi16(a, b));
#endif
}
// factor * (a[4i] b[4i] + ... + a[4i+3] b[4i+3]), a unsigned bytes below 128 and b signed ones
static inline VI quad(VI a, VI b, short factor) {
  return _mm512_madd_epi16(_mm512_maddubs_epi16(a, b), _mm512_set1_epi16(factor));
}

#elif defined(__AVX2__)
#define VLMQ_REGISTERS 16
using VI = __m256i;
using VF = __m256;
constexpr int LANES = 8;
static inline VI load(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
static inline void store(void* p, VI v) { _mm256_storeu_si256((__m256i*)p, v); }
static inline VI zero() { return _mm256_setzero_si256(); }
static inline VI set1(int v) { return _mm256_set1_epi32(v); }
static inline VI both(VI a, VI b) { return _mm256_and_si256(a, b); }
static inline VI either(VI a, VI b) { return _mm256_or_si256(a, b); }
template <int S> static inline VI right16(VI a) { return _mm256_srli_epi16(a, S); }
template <int S> static inline VI left16(VI a) { return _mm256_slli_epi16(a, S); }
template <int S> static inline VI right32(VI a) { return _mm256_srai_epi32(a, S); }
static inline VI add(VI a, VI b) { return _mm256_add_epi32(a, b); }
static inline VI sub16(VI a, VI b) { return _mm256_sub_epi16(a, b); }
static inline VI mul(VI a, VI b) { return _mm256_mullo_epi32(a, b); }
static inline VI widen(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
static inline VI widen(const uint16_t* p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
static inline VI upper_half(VI a) { return _mm256_slli_epi32(a, 16); }
static inline VF as_float(VI a) { return _mm256_castsi256_ps(a); }
static inline VI as_bits(VF a) { return _mm256_castps_si256(a); }
static inline VF to_float(VI a) { return _mm256_cvtepi32_ps(a); }
static inline VI to_int(VF a) { return _mm256_cvtps_epi32(a); }
static inline VF loadf(const float* p) { return _mm256_loadu_ps(p); }
static inline void storef(float* p, VF v) { _mm256_storeu_ps(p, v); }
static inline VF zerof() { return _mm256_setzero_ps(); }
static inline VF set1f(float v) { return _mm256_set1_ps(v); }
static inline VF mulf(VF a, VF b) { return _mm256_mul_ps(a, b); }
static inline VF fma(VF a, VF b, VF c) { return _mm256_fmadd_ps(a, b, c); }
static inline VF half_to_float(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
static inline void float_to_half(uint16_t* p, VF v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
static inline VI max_unsigned(VI a, VI b) { return _mm256_max_epu32(a, b); }
static inline uint32_t highest(VI a) {
  __m128i m = _mm_max_epu32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4E));
  return (uint32_t)_mm_cvtsi128_si32(_mm_max_epu32(m, _mm_shuffle_epi32(m, 0xB1)));
}
static inline int total(VI a) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
}
static inline void store_as_16(void* p, VI a) {
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1)));
}
static inline __m256i as_bytes(const VI* q) {  // 32 numbers of 8 bits
  VI fours = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
  return _mm256_permutevar8x32_epi32(fours, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
static inline VI dot(VI acc, VI a, VI b) { return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b)); }
static inline VI quad(VI a, VI b, short factor) {
  return _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(factor));
}
#else
#error "needs AVX2 or AVX512BW"
#endif

// acc[i] + a[4i] b[4i] + ... + a[4i+3] b[4i+3], a unsigned bytes of BITS bits and b signed bytes
template <int BITS> static inline VI dot8(VI acc, VI a, VI b) {
#if defined(__AVX512VNNI__)
  return _mm512_dpbusd_epi32(acc, a, b);
#else
  if (BITS < 8) return add(acc, quad(a, b, 1));
  // The 16 bits between would overflow with the highest bit of a, which is multiplied apart.
  return add(add(acc, quad(both(a, set1(0x7F7F7F7F)), b, 1)), quad(both(right16<7>(a), set1(0x01010101)), b, 128));
#endif
}

// Byte i of the result is byte order[i] of 32 bytes.
static inline __m256i permute(__m256i bytes, const int8_t* order) {
  __m256i at = _mm256_loadu_si256((const __m256i*)order);
  // Bytes move within halves of 16 only, and where the highest bit of their index is set they become 0.
  const __m256i lower = _mm256_permute2x128_si256(bytes, bytes, 0x00), upper = _mm256_permute2x128_si256(bytes, bytes, 0x11);
  const __m256i in_upper = _mm256_cmpgt_epi8(at, _mm256_set1_epi8(15));
  return _mm256_blendv_epi8(_mm256_shuffle_epi8(lower, at), _mm256_shuffle_epi8(upper, at), in_upper);
}

// load(), and once only: gcc reads memory again for every use where an instruction can.
static inline VI load_once(const void* p) {
  VI v = load(p);
#if defined(__GNUC__)
  asm("" : "+v"(v));
#endif
  return v;
}

// Loaded here, and not again by each instruction that needs it, as compilers would have it.
static inline void in_register(VI& v) {
#if VLMQ_REGISTERS == 32
  asm("" : "+v"(v));
#else
  asm("" : "+x"(v));
#endif
}
static inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

// Element types of x, y and the scales.
struct F32 { using T = float; };
struct BF16 { using T = uint16_t; };
struct F16 { using T = uint16_t; };

static inline VF load_as_float(F32, const float* p) { return loadf(p); }
static inline VF load_as_float(BF16, const uint16_t* p) { return as_float(upper_half(widen(p))); }
static inline VF load_as_float(F16, const uint16_t* p) { return half_to_float(p); }

static inline void store_float(F32, float* p, VF v) { storef(p, v); }
static inline void store_float(F16, uint16_t* p, VF v) { float_to_half(p, v); }
static inline void store_float(BF16, uint16_t* p, VF v) {
  // To nearest, ties to even, on the bits. With finite scales a NaN here is that of quantize() or the CPU's own, as of
  // inf - inf. Both end in zeros, so the sum does not carry into what makes them one.
  VI b = as_bits(v);
  VI odd = both(right32<16>(b), set1(1));
  store_as_16(p, right32<16>(add(add(b, set1(0x7FFF)), odd)));
}
