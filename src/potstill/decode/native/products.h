// Products of a matrix with the vectors of a few tokens, and the vectors of floats that they use.
//
// Every sum has one order, which depends on no other token: all columns in steps of LANES into one vector, then that
// vector, then the columns that remain.
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

enum { FLOAT32, BFLOAT16, INT8, TERNARY };
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
typedef float floats __attribute__((vector_size(LANES * 4)));
typedef int32_t ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t words __attribute__((vector_size(LANES * 4)));
typedef uint16_t halves __attribute__((vector_size(LANES * 2)));
typedef int8_t bytes __attribute__((vector_size(LANES)));
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    const void *weight;  // [rows, columns], with `stride` entries from row to row; ternary ones have an order of their own
    const float *scale;  // [rows], of int8 and ternary weights
    const float *bias;   // [rows], or null
    const float *gain;   // [columns], of a norm of the inputs, or null
    int64_t rows, columns, stride, dtype;
    float eps;  // of that norm
} Matrix;

INLINE floats load(const float *x) { floats y; memcpy(&y, x, sizeof y); return y; }
INLINE void store(float *x, floats y) { memcpy(x, &y, sizeof y); }
INLINE floats fill(float x) { return x - (floats){}; }

// x y + z, rounded once where the processor can. Left to itself, a compiler fuses some of these products and not others;
// the columns that remain take fmaf for the same reason.
INLINE floats multiply_add(floats x, floats y, floats z) {
#if defined(__AVX512F__)
    return (floats)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z);
#elif defined(__AVX2__) && defined(__FMA__)
    return (floats)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z);
#else
    return x * y + z;
#endif
}

INLINE float sum(floats x) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps(x);
#else
    return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
#endif
}

INLINE floats load_weights(const void *weight, int64_t index, int dtype) {
    if (dtype == FLOAT32) return load((const float *)weight + index);
    if (dtype == BFLOAT16) {
        halves half;
        memcpy(&half, (const uint16_t *)weight + index, sizeof half);
#if defined(__AVX512F__)
        return (floats)((words)_mm512_cvtepu16_epi32((__m256i)half) << 16);
#elif defined(__AVX2__)
        return (floats)((words)_mm256_cvtepu16_epi32((__m128i)half) << 16);
#else
        return (floats)(__builtin_convertvector(half, words) << 16);
#endif
    }
    bytes byte;
    memcpy(&byte, (const int8_t *)weight + index, sizeof byte);
#if defined(__AVX512F__)
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)byte));
#elif defined(__AVX2__)
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)&byte)));
#else
    return __builtin_convertvector(__builtin_convertvector(byte, ints), floats);
#endif
}

INLINE float load_weight(const void *weight, int64_t index, int dtype) {
    if (dtype == FLOAT32) return ((const float *)weight)[index];
    if (dtype == INT8) return ((const int8_t *)weight)[index];
    uint32_t word = (uint32_t)((const uint16_t *)weight)[index] << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

INLINE void write_product(const Matrix *m, int64_t row, float *y, floats sums, const float *x, int dtype) {
    const int64_t columns = m->columns;
    float value = sum(sums), tail = 0;
    for (int64_t k = columns / LANES * LANES; k < columns; k++)
        tail = fmaf(load_weight(m->weight, row * m->stride + k, dtype), x[k], tail);
    value += tail;
    if (dtype == INT8) value *= m->scale[row];
    *y = m->bias ? value + m->bias[row] : value;
}

// y = x W^T + b for `rows` rows of the matrix and `tokens` tokens, both constants: each sum is then a register.
INLINE void multiply_block(
    const Matrix *m, int64_t row, const float *x, float *y, const int rows, const int tokens, int dtype
) {
    const int64_t columns = m->columns, stride = m->stride, start = row * stride;
    const int64_t size = dtype == FLOAT32 ? 4 : dtype == BFLOAT16 ? 2 : 1;
    floats sums[16], inputs[4];
#pragma GCC unroll 16
    for (int i = 0; i < rows * tokens; i++) sums[i] = (floats){};
    for (int64_t k = 0; k + LANES <= columns; k += LANES) {
        if (k * size % 64 == 0)  // the same columns 16 rows below, into the second cache: the first would be full
            for (int r = 16; r < 16 + rows; r++)
                __builtin_prefetch((const char *)m->weight + (start + r * stride + k) * size, 0, 1);
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++) {
            inputs[t] = load(x + t * columns + k);
#ifdef __AVX512F__
            __asm__("" : "+v"(inputs[t]));  // a register: read from memory by each row, it takes longer than its product
#endif
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const floats weights = load_weights(m->weight, start + r * stride + k, dtype);
#pragma GCC unroll 4
            for (int t = 0; t < tokens; t++) sums[r * tokens + t] = multiply_add(weights, inputs[t], sums[r * tokens + t]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows * tokens; i++) {
        const int r = i / tokens, t = i % tokens;
        write_product(m, row + r, y + t * m->rows + row + r, sums[i], x + t * columns, dtype);
    }
}

// 8 rows of the matrix, in blocks of as many sums as a processor has registers for: AVX-512 has 32 of them, others 16
INLINE void multiply_8_rows(const Matrix *m, int64_t row, const float *x, float *y, const int tokens, int dtype) {
    const int most = LANES == 16 ? 16 : 8, rows = tokens == 1 || 8 * tokens <= most ? 8 : 4 * tokens <= most ? 4 : 2;
#pragma GCC unroll 4
    for (int r = 0; r < 8; r += rows) multiply_block(m, row + r, x, y, rows, tokens, dtype);
}

INLINE void multiply_rows(
    const Matrix *m, int64_t begin, int64_t end, const float *x, float *y, int64_t num_tokens, int dtype
) {
    int64_t row = begin;
    for (; row + 8 <= end; row += 8) {
        int64_t t = 0;
        for (; t + 4 <= num_tokens; t += 4) multiply_8_rows(m, row, x + t * m->columns, y + t * m->rows, 4, dtype);
        const float *last_x = x + t * m->columns;
        float *last_y = y + t * m->rows;
        if (num_tokens - t == 3) multiply_8_rows(m, row, last_x, last_y, 3, dtype);
        if (num_tokens - t == 2) multiply_8_rows(m, row, last_x, last_y, 2, dtype);
        if (num_tokens - t == 1) multiply_8_rows(m, row, last_x, last_y, 1, dtype);
    }
    for (; row < end; row++)
        for (int64_t t = 0; t < num_tokens; t++)
            multiply_block(m, row, x + t * m->columns, y + t * m->rows, 1, 1, dtype);
}

// This thread's rows, from *begin to *end: whole groups of 8, so that a row has the same sum in any number of threads.
static void split_rows(const Matrix *m, int thread, int threads, int64_t *begin, int64_t *end) {
    const int64_t blocks = (m->rows + 7) / 8;
    *begin = blocks * thread / threads * 8;
    *end = blocks * (thread + 1) / threads * 8;
    *end = *end < m->rows ? *end : m->rows;
}

// y = weight x / sqrt(mean(x^2) + eps)
static void normalize(const float *x, const float *weight, float *y, int64_t size, float eps) {
    floats squares = {};
    float tail = 0;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) squares = multiply_add(load(x + i), load(x + i), squares);
    for (; i < size; i++) tail = fmaf(x[i], x[i], tail);
    float factor = 1.0f / sqrtf((sum(squares) + tail) / size + eps);
    for (i = 0; i < size; i++) y[i] = weight[i] * (x[i] * factor);
}
