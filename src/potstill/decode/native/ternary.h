// Products with ternary weights and inputs of 8 bits, and `multiply`, the product with a matrix of any kind.
//
// Sums are integers, so their order does not matter. The weights plus 1 lie in blocks of 4 rows and 64 columns, with
// zeros behind the last row and column: bits 2i and 2i + 1 of byte 16r + j of a block are row r, column 16i + j. An `and`
// leaves one weight of each byte, times 1, 4, 16 or 64, and the factor goes from the sum.
#include "products.h"

enum { BLOCK = 64, GROUP = 8, TOKENS = 4, LARGEST_CODE = 127 };

// `Rows` are the weights of ROWS rows of a block, `Sums` partial sums of products, four for each row. `add_up` gives the
// sum of each row over the four places of a weight in its byte.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
enum { ROWS = 4 };
typedef __m512i Rows, Sums;
INLINE Rows load_rows(const uint8_t *weight) { return _mm512_loadu_si512(weight); }
INLINE Sums add_products(Sums sums, Rows rows, const int8_t *q, int place) {
    const __m512i inputs = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(q + 16 * place)));
    return _mm512_dpbusd_epi32(sums, _mm512_and_si512(rows, _mm512_set1_epi8(3 << 2 * place)), inputs);
}
INLINE void add_up(const Sums *sums, int32_t *totals) {
    Sums all = _mm512_add_epi32(sums[0], _mm512_srai_epi32(sums[1], 2));
    all = _mm512_add_epi32(all, _mm512_srai_epi32(sums[2], 4));
    all = _mm512_add_epi32(all, _mm512_srai_epi32(sums[3], 6));
    all = _mm512_add_epi32(all, _mm512_shuffle_epi32(all, _MM_PERM_BADC));
    all = _mm512_add_epi32(all, _mm512_shuffle_epi32(all, _MM_PERM_CDAB));
    _mm_storeu_si128((__m128i *)totals, _mm512_castsi512_si128(_mm512_maskz_compress_epi32(0x1111, all)));
}
#elif defined(__AVX2__)
enum { ROWS = 2 };
typedef __m256i Rows, Sums;
INLINE Rows load_rows(const uint8_t *weight) { return _mm256_loadu_si256((const __m256i *)weight); }
INLINE Sums add_products(Sums sums, Rows rows, const int8_t *q, int place) {
    const __m256i inputs = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(q + 16 * place)));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_and_si256(rows, _mm256_set1_epi8(3 << 2 * place)), inputs);
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));  // pairs are at most 2 * 128 * 127
}
INLINE void add_up(const Sums *sums, int32_t *totals) {
    Sums all = _mm256_add_epi32(sums[0], _mm256_srai_epi32(sums[1], 2));
    all = _mm256_add_epi32(all, _mm256_srai_epi32(sums[2], 4));
    all = _mm256_add_epi32(all, _mm256_srai_epi32(sums[3], 6));
    all = _mm256_add_epi32(all, _mm256_shuffle_epi32(all, 0x4E));
    all = _mm256_add_epi32(all, _mm256_shuffle_epi32(all, 0xB1));
    totals[0] = _mm256_extract_epi32(all, 0);
    totals[1] = _mm256_extract_epi32(all, 4);
}
#else
enum { ROWS = 1 };
typedef uint8_t Rows __attribute__((vector_size(16)));
typedef int32_t Sums __attribute__((vector_size(16)));
INLINE Rows load_rows(const uint8_t *weight) { Rows rows; memcpy(&rows, weight, sizeof rows); return rows; }
INLINE Sums add_products(Sums sums, Rows rows, const int8_t *q, int place) {
    for (int j = 0; j < 16; j++) sums[j % 4] += (rows[j] & 3 << 2 * place) * q[16 * place + j];
    return sums;
}
INLINE void add_up(const Sums *sums, int32_t *totals) {
    const Sums all = sums[0] + (sums[1] >> 2) + (sums[2] >> 4) + (sums[3] >> 6);
    *totals = all[0] + all[1] + all[2] + all[3];
}
#endif

// Tokens as integers: x = scale q. The sum of q is what the 1 that is added to each weight adds to a product.
typedef struct {
    const int8_t *q;  // [TOKENS, columns], in whole blocks
    float scale[TOKENS];
    int32_t sum[TOKENS];
} Rounded;

// q = round(127 x / max |x|), ties to even; returns max |x| / 127
static float round_token(const float *x, int8_t *q, int64_t columns, int32_t *sum) {
    int32_t largest_bits = 0, total = 0;  // positive floats are ordered as their bits are
    for (int64_t k = 0; k < columns; k++) {
        int32_t bits;
        memcpy(&bits, x + k, sizeof bits);
        bits &= INT32_MAX;
        largest_bits = bits > largest_bits ? bits : largest_bits;
    }
    float largest;
    memcpy(&largest, &largest_bits, sizeof largest);
    largest = largest > 1e-5f ? largest : 1e-5f;
    const float factor = LARGEST_CODE / largest;
    for (int64_t k = 0; k < columns; k++) {
        const int32_t code = (int32_t)rintf(x[k] * factor);
        q[k] = (int8_t)code;
        total += code;
    }
    *sum = total;
    return largest / LARGEST_CODE;
}

// ROWS rows of `tokens` tokens, a constant; `columns` are whole blocks, and `weight` is the first row in its first block.
INLINE void multiply_ternary_rows(
    const Matrix *m, int64_t row, const uint8_t *weight, const Rounded *x, float *y, int64_t columns, const int tokens
) {
    const int8_t *q = x->q;
    Sums sums[4 * TOKENS];
    memset(sums, 0, 4 * tokens * sizeof *sums);
    for (int64_t k = 0; k < columns; k += BLOCK, weight += BLOCK, q += BLOCK) {
        const Rows rows = load_rows(weight);
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++)
#pragma GCC unroll 4
            for (int place = 0; place < 4; place++)
                sums[4 * t + place] = add_products(sums[4 * t + place], rows, q + t * columns, place);
    }
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++) {
        int32_t totals[ROWS];
        add_up(sums + 4 * t, totals);
        for (int r = 0; r < ROWS && row + r < m->rows; r++) {
            const float value = (totals[r] - x->sum[t]) * (x->scale[t] * m->scale[row + r]);
            y[t * m->rows + row + r] = m->bias ? value + m->bias[row + r] : value;
        }
    }
}

INLINE void multiply_ternary(
    const Matrix *m, int64_t begin, int64_t end, const float *x, float *y, const int tokens
) {
    const int64_t columns = (m->columns + BLOCK - 1) / BLOCK * BLOCK;
    int8_t q[tokens * columns];
    Rounded rounded = {.q = q};
    for (int t = 0; t < tokens; t++) {
        memset(q + t * columns + m->columns, 0, columns - m->columns);
        rounded.scale[t] = round_token(x + t * m->columns, q + t * columns, m->columns, rounded.sum + t);
    }
    for (int64_t row = begin; row < end; row += ROWS) {
        const uint8_t *weight = (const uint8_t *)m->weight + row / 4 * columns + row % 4 * 16;
        multiply_ternary_rows(m, row, weight, &rounded, y, columns, tokens);
    }
}

static void multiply_plain(
    const Matrix *m, int64_t begin, int64_t end, const float *x, float *y, int64_t num_tokens
) {
    if (m->dtype == FLOAT32) multiply_rows(m, begin, end, x, y, num_tokens, FLOAT32);
    if (m->dtype == BFLOAT16) multiply_rows(m, begin, end, x, y, num_tokens, BFLOAT16);
    if (m->dtype == INT8) multiply_rows(m, begin, end, x, y, num_tokens, INT8);
}

// This thread's rows of y = x W^T + b, `[num_tokens, rows]`.
static void multiply(const Matrix *m, const float *x, float *y, int64_t num_tokens, int thread, int threads) {
    int64_t begin, end;
    split_rows(m, thread, threads, &begin, &end);
    if (!m->gain && m->dtype != TERNARY) {
        multiply_plain(m, begin, end, x, y, num_tokens);
        return;
    }
    float normal[m->gain ? TOKENS * m->columns : 1];
    for (int64_t t = 0; t < num_tokens; t += TOKENS, x += TOKENS * m->columns, y += TOKENS * m->rows) {
        const int tokens = num_tokens - t < TOKENS ? num_tokens - t : TOKENS;
        const float *inputs = m->gain ? normal : x;
        for (int i = 0; m->gain && i < tokens; i++)
            normalize(x + i * m->columns, m->gain, normal + i * m->columns, m->columns, m->eps);
        if (m->dtype != TERNARY) multiply_plain(m, begin, end, inputs, y, tokens);
        else if (tokens == 4) multiply_ternary(m, begin, end, inputs, y, 4);
        else if (tokens == 3) multiply_ternary(m, begin, end, inputs, y, 3);
        else if (tokens == 2) multiply_ternary(m, begin, end, inputs, y, 2);
        else multiply_ternary(m, begin, end, inputs, y, 1);
    }
}
