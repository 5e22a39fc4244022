// Vectors, exponentials and the small matrix product of the CPU kernels, written once with compiler vectors.
// Included by the *_kernel.h files inside a namespace per instruction set, after FGA_VECTOR_BYTES is set; no guard,
// because each inclusion makes its own copy.

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(FGA_VECTOR_BYTES)));
  typedef int32_t integers __attribute__((vector_size(FGA_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(FGA_VECTOR_BYTES)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int64_t kLanes = FGA_VECTOR_BYTES / sizeof(T);
template <class T>
constexpr int64_t kPanel = (FGA_VECTOR_BYTES == 64 ? 4 : 2) * kLanes<T>;  // columns of one register tile
constexpr int64_t kRows = 4;                                              // rows of one register tile

template <class T>
inline Vector<T> load(const T* p) {
  Vector<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
inline void store(T* p, Vector<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

template <class T>
inline Vector<T> broadcast(T x) {
  return x - Vector<T>{};  // not 0 + x, which turns -0 into 0 and so costs an addition
}

template <class T>
inline Vector<T> larger(Vector<T> a, Vector<T> b) {
  return a > b ? a : b;
}

#if FGA_VECTOR_BYTES >= 32
inline float sum_of(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline double sum_of(__m256d v) {
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}
#endif

// By halves, because in order each addition would wait for the one before.
#if FGA_VECTOR_BYTES == 64  // halves under a mask of all: other intrinsics make GCC 12 warn of its own header
inline float sum_lanes(Vector<float> v) {
  const __m512 all = (__m512)v;
  return sum_of(_mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xff, all, 0), _mm512_maskz_extractf32x8_ps(0xff, all, 1)));
}
inline double sum_lanes(Vector<double> v) {
  const __m512d all = (__m512d)v;
  return sum_of(_mm256_add_pd(_mm512_maskz_extractf64x4_pd(0xff, all, 0), _mm512_maskz_extractf64x4_pd(0xff, all, 1)));
}
#elif FGA_VECTOR_BYTES == 32
inline float sum_lanes(Vector<float> v) {
  return sum_of((__m256)v);
}
inline double sum_lanes(Vector<double> v) {
  return sum_of((__m256d)v);
}
#else
inline float sum_lanes(Vector<float> v) {
  return (v[0] + v[2]) + (v[1] + v[3]);
}
inline double sum_lanes(Vector<double> v) {
  return v[0] + v[1];
}
#endif

// Of kLanes numbers, bit i says whether p[i] is above zero.
template <class T>
inline uint32_t above_zero(const T* p) {
#if FGA_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4)
    return _mm512_cmp_ps_mask((__m512)load(p), _mm512_setzero_ps(), _CMP_GT_OQ);
  else
    return _mm512_cmp_pd_mask((__m512d)load(p), _mm512_setzero_pd(), _CMP_GT_OQ);
#elif FGA_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4)
    return _mm256_movemask_ps((__m256)(load(p) > Vector<T>{}));
  else
    return _mm256_movemask_pd((__m256d)(load(p) > Vector<T>{}));
#else
  uint32_t bits = 0;
  for (int64_t i = 0; i < kLanes<T>; ++i) bits |= static_cast<uint32_t>(p[i] > 0) << i;
  return bits;
#endif
}

// exp by range reduction to |r| <= ln2/2 and the Taylor series to degree 7 (truncation below 6e-9, so below float32's
// rounding). Arguments under -87 give 0: such a probability is under 1e-37.
inline Vector<float> exponential(Vector<float> x) {
  const auto tiny = x < broadcast(-87.0f);
  x = tiny ? broadcast(-87.0f) : x;
  const Vector<float> over = broadcast(88.0f);
  x = x > over ? over : x;
  const Vector<float> magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const Vector<float> n = (x * 1.44269504089f + magic) - magic;
  const Vector<float> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vector<float> p = broadcast(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const auto bits = (__builtin_convertvector(n, VectorOf<float>::integers) + 127) << 23;
  Vector<float> power;
  __builtin_memcpy(&power, &bits, sizeof(power));
  return tiny ? Vector<float>{} : p * power;
}

inline Vector<double> exponential(Vector<double> x) {
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// C [4, W] (+)= A B for one register tile: element (i, k) of A lies at a[i * a_row + k * a_col], B and C are row-major.
// Unrolled in full; else the compiler would keep the accumulators in memory around the loop.
template <class T, int kVectors>
inline void multiply_tile(const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t ldb, T* c, int64_t ldc,
                          int64_t depth, bool accumulate) {
  Vector<T> acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int64_t i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) acc[i][v] = accumulate ? load(c + i * ldc + v * kLanes<T>) : Vector<T>{};
  for (int64_t k = 0; k < depth; ++k, b += ldb) {
    Vector<T> row[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) row[v] = load(b + v * kLanes<T>);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kRows; ++i) {
      const Vector<T> x = broadcast(a[i * a_row + k * a_col]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) acc[i][v] += x * row[v];
    }
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(c + i * ldc + v * kLanes<T>, acc[i][v]);
}

// C [rows, columns] (+)= A [rows, depth] B [depth, columns]; rows a multiple of 4, columns of the vector length. The
// operands are scratch that the caller pads with zeros, so there are no edge cases here.
template <class T>
inline void multiply(const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t ldb, T* c, int64_t ldc, int64_t rows,
                     int64_t columns, int64_t depth, bool accumulate) {
  for (int64_t j = 0; j < columns; j += kPanel<T>) {
    const int64_t vectors = std::min(kPanel<T>, columns - j) / kLanes<T>;
    for (int64_t i = 0; i < rows; i += kRows) {
      const T* ai = a + i * a_row;
      T* cij = c + i * ldc + j;
      switch (vectors) {
        case 1: multiply_tile<T, 1>(ai, a_row, a_col, b + j, ldb, cij, ldc, depth, accumulate); break;
        case 2: multiply_tile<T, 2>(ai, a_row, a_col, b + j, ldb, cij, ldc, depth, accumulate); break;
        case 3: multiply_tile<T, 3>(ai, a_row, a_col, b + j, ldb, cij, ldc, depth, accumulate); break;
        default: multiply_tile<T, 4>(ai, a_row, a_col, b + j, ldb, cij, ldc, depth, accumulate); break;
      }
    }
  }
}
