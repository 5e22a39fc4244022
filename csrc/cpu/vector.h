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

template <class T>
inline T sum_lanes(Vector<T> v) {
  T s = 0;
  for (int64_t i = 0; i < kLanes<T>; ++i) s += v[i];
  return s;
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
// Unrolled in full, else the compiler keeps the accumulators in memory around the loop.
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
