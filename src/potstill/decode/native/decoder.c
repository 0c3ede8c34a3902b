// One pass of a network of grouped-query attention and gated feed-forwards over the new tokens of several texts.
//
// Activations, keys and values are float32; weights are float32, bfloat16, int8 with a scale per row, or ternary. Every
// sum has one order, which depends on no other token of the pass: a token's result has the same bits in any batch or draft.
#include <sched.h>
#include <stdatomic.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "ternary.h"

enum { SILU, GELU, GELU_TANH };

typedef struct {
    Matrix q, k, v, o, gate, up, down;
    const float *mixer_norm, *mixer_post_norm, *ffn_norm, *ffn_post_norm, *q_norm, *k_norm;  // may be null
    const float *cos, *sin;                                                                  // [positions, head_dim / 2]
    float *keys, *values;                                                                    // [rows, kv_heads, capacity, head_dim]
    int64_t heads, kv_heads, head_dim, window, activation;
    float scale;
} Layer;

typedef struct {
    const Layer *layers;
    const float *norm;
    int64_t num_layers, hidden, capacity, threads;
    float norm_eps;
} Network;

// Text b has `counts[b]` new tokens, from `starts[b]` on, behind `lengths[b]` tokens in row `rows[b]` of the buffers.
// `tree[n * width + j]` says whether token n sees the j-th new token of its text; without a tree it sees all before it.
typedef struct {
    const int64_t *rows, *lengths, *starts, *counts, *positions;
    const uint8_t *tree;
    int64_t num_texts, num_tokens, width;
    float *x;  // [num_tokens, hidden]: embeddings before, last hidden states after
    float *q, *k, *v, *attended, *inner, *y;
    float *scratch;  // per thread: x and its norm, [2 * num_tokens * hidden], and scores [span + LANES]
    int64_t scratch_size, span;
} Pass;

// exp(x) to 2 units in the last place (Cephes' expf); 0 below -87
INLINE floats exponential(floats x) {
    floats low = fill(-87.0f), high = fill(88.0f);
    ints is_low = x < low, is_high = x > high;
    x = (floats)(((ints)low & is_low) | ((ints)x & ~is_low));
    x = (floats)(((ints)high & is_high) | ((ints)x & ~is_high));
    floats scaled = x * 1.44269504f + 0.5f;
    ints power = __builtin_convertvector(scaled, ints);
    power += __builtin_convertvector(power, floats) > scaled;  // floor: a comparison is -1 where it holds
    floats n = __builtin_convertvector(power, floats);
    x = x - n * 0.693359375f + n * 2.12194440e-4f;
    floats y = fill(1.9875691500e-4f);
    y = y * x + 1.3981999507e-3f;
    y = y * x + 8.3334519073e-3f;
    y = y * x + 4.1665795894e-2f;
    y = y * x + 1.6666665459e-1f;
    y = y * x + 5.0000001201e-1f;
    y = y * x * x + x + 1.0f;
    floats result = y * (floats)((power + 127) << 23);
    return (floats)((ints)result & ~is_low);
}

// Rotates the pairs (x_j, x_{j + K/2}) by the angles of a position.
static void rotate(float *x, const float *cos, const float *sin, int64_t head_dim) {
    int64_t half = head_dim / 2;
    for (int64_t j = 0; j < half; j++) {
        float first = x[j], second = x[j + half];
        x[j] = first * cos[j] - second * sin[j];
        x[j + half] = second * cos[j] + first * sin[j];
    }
}

static float dot(const float *a, const float *b, int64_t size) {
    floats sums = {};
    float tail = 0;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) sums = multiply_add(load(a + i), load(b + i), sums);
    for (; i < size; i++) tail = fmaf(a[i], b[i], tail);
    return sum(sums) + tail;
}

static void softmax(float *scores, int64_t size) {
    float largest = scores[0], total = 0;
    for (int64_t i = 1; i < size; i++) largest = scores[i] > largest ? scores[i] : largest;
    for (int64_t i = size; i % LANES; i++) scores[i] = largest;
    for (int64_t i = 0; i < size; i += LANES) store(scores + i, exponential(load(scores + i) - largest));
    for (int64_t i = 0; i < size; i++) total += scores[i];
    for (int64_t i = 0; i < size; i++) scores[i] /= total;
}

// The attention of one head of token n over the keys that it sees: those of its text, then its ancestors.
static void attend_head(
    const Layer *l, const Pass *p, int64_t text, int64_t n, const float *q, const float *keys, const float *values,
    float *out, float *scores, int32_t *seen
) {
    const int64_t head_dim = l->head_dim, length = p->lengths[text], first = p->starts[text];
    const int64_t position = p->positions[n], oldest = l->window ? position - l->window + 1 : 0;
    int64_t count = 0;
    for (int64_t s = oldest > 0 ? oldest : 0; s < length; s++) seen[count++] = s;
    for (int64_t j = 0; j <= n - first; j++) {
        int is_seen = p->tree ? p->tree[n * p->width + j] : 1;
        if (is_seen && p->positions[first + j] >= oldest) seen[count++] = length + j;
    }
    for (int64_t i = 0; i < count; i++) scores[i] = l->scale * dot(q, keys + seen[i] * head_dim, head_dim);
    softmax(scores, count);
    memset(out, 0, head_dim * sizeof *out);
    for (int64_t i = 0; i < count; i++) {
        const float *value = values + seen[i] * head_dim, weight = scores[i];
        for (int64_t j = 0; j < head_dim; j++) out[j] += weight * value[j];
    }
}

// One group of heads of one text: rotates the new queries and keys, stores keys and values, and attends.
static void attend(const Network *net, const Layer *l, const Pass *p, int64_t text, int64_t group, float *scratch) {
    const int64_t head_dim = l->head_dim, per_group = l->heads / l->kv_heads, count = p->counts[text];
    const int64_t offset = (p->rows[text] * l->kv_heads + group) * net->capacity * head_dim;
    float *keys = l->keys + offset, *values = l->values + offset, *scores = scratch;
    int32_t *seen = (int32_t *)(scratch + p->span + LANES);
    for (int64_t t = 0; t < count; t++) {
        const int64_t n = p->starts[text] + t, place = (p->lengths[text] + t) * head_dim;
        const float *cos = l->cos + p->positions[n] * (head_dim / 2), *sin = l->sin + p->positions[n] * (head_dim / 2);
        float *k = p->k + (n * l->kv_heads + group) * head_dim, *q = p->q + (n * l->heads + group * per_group) * head_dim;
        if (l->k_norm) normalize(k, l->k_norm, k, head_dim, net->norm_eps);
        rotate(k, cos, sin, head_dim);
        memcpy(keys + place, k, head_dim * sizeof *k);
        memcpy(values + place, p->v + (n * l->kv_heads + group) * head_dim, head_dim * sizeof *k);
        for (int64_t head = 0; head < per_group; head++, q += head_dim) {
            if (l->q_norm) normalize(q, l->q_norm, q, head_dim, net->norm_eps);
            rotate(q, cos, sin, head_dim);
            float *out = p->attended + (q - p->q);
            attend_head(l, p, text, n, q, keys, values, out, scores, seen);
        }
    }
}

INLINE floats activate(floats x, int64_t activation) {
    if (activation == SILU) return x / (1.0f + exponential(-x));
    if (activation == GELU_TANH) {
        floats inner = 0.7978845608f * (x + 0.044715f * x * x * x);
        return x * (1.0f - 1.0f / (1.0f + exponential(2.0f * inner)));
    }
    for (int i = 0; i < LANES; i++) x[i] *= 0.5f * (1.0f + erff(x[i] * 0.7071067812f));
    return x;
}

// This thread's neurons: inner = activation(gate x) * up x, in place of gate x
static void feed_forward(const Layer *l, const Pass *p, const float *x, int thread, int threads) {
    const int64_t width = l->gate.rows;
    float *gate = p->inner, *up = p->inner + p->num_tokens * width;
    multiply(&l->gate, x, gate, p->num_tokens, thread, threads);
    multiply(&l->up, x, up, p->num_tokens, thread, threads);
    int64_t begin, end;
    split_rows(&l->gate, thread, threads, &begin, &end);
    for (int64_t n = 0; n < p->num_tokens; n++)
        for (int64_t i = begin; i < end; i += LANES) {
            const int64_t place = n * width + i, size = (end - i < LANES ? end - i : LANES) * sizeof(float);
            floats g = {}, u = {};
            memcpy(&g, gate + place, size);
            memcpy(&u, up + place, size);
            floats y = activate(g, l->activation) * u;
            memcpy(gate + place, &y, size);
        }
}

// x += norm(y), of every token
static void add(const Network *net, const Pass *p, float *x, const float *post_norm, float *scratch) {
    const int64_t hidden = net->hidden;
    for (int64_t n = 0; n < p->num_tokens; n++) {
        const float *y = p->y + n * hidden;
        if (post_norm) normalize(y, post_norm, scratch, hidden, net->norm_eps);
        if (post_norm) y = scratch;
        for (int64_t i = 0; i < hidden; i++) x[n * hidden + i] += y[i];
    }
}

static void normalize_all(const Network *net, const Pass *p, const float *x, const float *weight, float *y) {
    for (int64_t n = 0; n < p->num_tokens; n++)
        normalize(x + n * net->hidden, weight, y + n * net->hidden, net->hidden, net->norm_eps);
}

typedef struct {
    atomic_int waiting, phase;
} Barrier;

// Returns once all threads have called it. A thread that waits long gives its core to others: on a busy machine the
// thread that it waits for may have none.
static void wait_for_all(Barrier *barrier, int threads) {
    int phase = atomic_load(&barrier->phase);
    if (atomic_fetch_add(&barrier->waiting, 1) == threads - 1) {
        atomic_store(&barrier->waiting, 0);
        atomic_store(&barrier->phase, phase + 1);
        return;
    }
    for (int spins = 0; atomic_load(&barrier->phase) == phase; spins++)
        if (spins > 2000) sched_yield();
}

// Every thread keeps the residual stream and its norm for itself, so that only the products need barriers.
static void run_thread(const Network *net, const Pass *p, Barrier *barrier, int thread, int threads) {
    const int64_t size = p->num_tokens * net->hidden;
    float *x = p->scratch + thread * p->scratch_size, *normal = x + size, *rest = normal + size;
    memcpy(x, p->x, size * sizeof *x);
    for (int64_t i = 0; i < net->num_layers; i++) {
        const Layer *l = net->layers + i;
        normalize_all(net, p, x, l->mixer_norm, normal);
        multiply(&l->q, normal, p->q, p->num_tokens, thread, threads);
        multiply(&l->k, normal, p->k, p->num_tokens, thread, threads);
        multiply(&l->v, normal, p->v, p->num_tokens, thread, threads);
        wait_for_all(barrier, threads);
        for (int64_t item = thread; item < p->num_texts * l->kv_heads; item += threads)
            attend(net, l, p, item / l->kv_heads, item % l->kv_heads, rest);
        wait_for_all(barrier, threads);
        multiply(&l->o, p->attended, p->y, p->num_tokens, thread, threads);
        wait_for_all(barrier, threads);
        add(net, p, x, l->mixer_post_norm, rest);
        normalize_all(net, p, x, l->ffn_norm, normal);
        feed_forward(l, p, normal, thread, threads);
        wait_for_all(barrier, threads);
        multiply(&l->down, p->inner, p->y, p->num_tokens, thread, threads);
        wait_for_all(barrier, threads);
        add(net, p, x, l->ffn_post_norm, rest);
    }
    if (thread == 0) normalize_all(net, p, x, net->norm, p->x);
}

void potstill_decode(const Network *net, const Pass *p) {
    Barrier barrier = {};
#pragma omp parallel num_threads(net->threads)
    {
#ifdef _OPENMP
        run_thread(net, p, &barrier, omp_get_thread_num(), omp_get_num_threads());
#else
        run_thread(net, p, &barrier, 0, 1);
#endif
    }
}

void potstill_multiply(const Matrix *m, const float *x, float *y, int64_t num_tokens, int64_t threads) {
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        multiply(m, x, y, num_tokens, omp_get_thread_num(), omp_get_num_threads());
#else
        multiply(m, x, y, num_tokens, 0, 1);
#endif
    }
}
