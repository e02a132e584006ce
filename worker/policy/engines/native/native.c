/* The small operations of a decoding step, each in one pass. In torch their calls take longer than
 * their arithmetic.
 *
 * All arrays are float32 and row-major. R rows, H query heads, K key heads, Q = H / K, D size of a
 * head, L capacity for prompt tokens. __init__.py compiles this file with -ffast-math; decoder.py
 * has the same operations in torch. */
#include <math.h>

#include "processor.h"

enum {
    /* queries to compute at once, so that keys and values are read less often */
    most = lanes == 4 ? 2 : 4,
    /* tokens whose keys are adjacent */
    block = 16,
    vectors = block / lanes,
    /* blocks of keys to compute at once: their sums must fit into registers */
    blocks = lanes == 16 ? 2 : 1,
    /* vectors of values to compute at once, for the same reason */
    wide = lanes == 16 ? 4 : 2,
    /* prefetch distance in keys and values, in numbers */
    ahead = 256
};

static float inverse_rms(const float *x, int64_t n, float eps) {
    float sum = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
    return 1 / sqrtf(sum / (float)n + eps);
}

/* x += added unless `added` is null; then out = norm(x) * weight. All are (R, n). */
void add_norm(float *restrict x, const float *restrict added, const float *restrict weight,
        float *restrict out, int64_t R, int64_t n, float eps) {
#pragma omp parallel for schedule(static) if (R * n > 1 << 13)
    for (int64_t r = 0; r < R; r++) {
        float *of_row = x + r * n;
        if (added)
            for (int64_t i = 0; i < n; i++) of_row[i] += added[r * n + i];
        const float scale = inverse_rms(of_row, n, eps);
        for (int64_t i = 0; i < n; i++) out[r * n + i] = of_row[i] * scale * weight[i];
    }
}

/* Prepare the heads in qkv (R, H + 2K, D): normalise queries and keys unless `weight` (H + K, D) is
 * null, scale queries, and rotate both by `turn` (R, D), pairs of cosine and sine. Store keys in
 * keys (R, K, room / 16, D, 16) and values in values (R, K, room, D), at token `step`. */
void turn_heads(float *restrict qkv, const float *restrict turn, const float *restrict weight,
        float *restrict keys, float *restrict values, int64_t R, int64_t H, int64_t K, int64_t D,
        int64_t room, int64_t step, float eps, float scale) {
#pragma omp parallel for schedule(static) if (R * (H + K) * D > 1 << 13)
    for (int64_t r = 0; r < R; r++) {
        const float *angles = turn + r * D;
        for (int64_t h = 0; h < H + K; h++) {
            float *head = qkv + (r * (H + 2 * K) + h) * D;
            if (weight) {
                const float inverse = inverse_rms(head, D, eps);
                for (int64_t d = 0; d < D; d++) head[d] *= inverse * weight[h * D + d];
            }
            const float by = h < H ? scale : 1;
            for (int64_t d = 0; d < D; d += 2) {
                const float a = head[d] * by, b = head[d + 1] * by;
                head[d] = a * angles[d] - b * angles[d + 1];
                head[d + 1] = a * angles[d + 1] + b * angles[d];
            }
            if (h >= H) {
                float *key =
                        keys + (r * K + h - H) * D * room + step / block * block * D + step % block;
                for (int64_t d = 0; d < D; d++) key[d * block] = head[d];
            }
        }
        for (int64_t k = 0; k < K; k++) {
            const float *head = qkv + (r * (H + 2 * K) + H + K + k) * D;
            float *value = values + ((r * K + k) * room + step) * D;
            for (int64_t d = 0; d < D; d++) value[d] = head[d];
        }
    }
}

/* Compute scores (queries, width) of `count` blocks of keys (count, D, 16) for query (queries, D).
 * With `apart` 2, even and odd numbers have separate sums, so that with few sums no addition waits
  * for the previous one. */
static inline __attribute__((always_inline)) void score_blocks(const int queries, const int count,
        const int apart, const float *restrict query, const float *restrict keys,
        float *restrict scores, int64_t D, int64_t width) {
    floats sums[most][blocks][vectors][2] = {0};
    for (int64_t d = 0; d < D; d += apart)
#pragma GCC unroll 2
        for (int a = 0; a < apart; a++)
#pragma GCC unroll 2
            for (int b = 0; b < count; b++) {
                const float *key = keys + (b * D + d + a) * block;
                __builtin_prefetch(key + ahead);
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++)
#pragma GCC unroll 4
                    for (int q = 0; q < queries; q++)
                        sums[q][b][v][a] +=
                                query[q * D + d + a] * *(const loose *)(key + v * lanes);
            }
#pragma GCC unroll 4
    for (int q = 0; q < queries; q++)
#pragma GCC unroll 2
        for (int b = 0; b < count; b++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++)
                *(loose *)(scores + q * width + b * block + v * lanes) =
                        sums[q][b][v][0] + sums[q][b][v][1];
}

/* Compute the scores of tokens from..to. The other tokens of their blocks are computed too, and
 * ignored. */
static inline __attribute__((always_inline)) void score(const int queries,
        const float *restrict query, const float *restrict keys, float *restrict scores,
        int64_t from, int64_t to, int64_t D, int64_t width) {
    const int apart = queries * blocks * vectors > 4 ? 1 : 2;
    int64_t start = from / block * block;
    for (; start + (blocks - 1) * block < to; start += blocks * block)
        score_blocks(queries, blocks, apart, query, keys + start * D, scores + start, D, width);
    if (start < to)
        score_blocks(queries, 1, apart, query, keys + start * D, scores + start, D, width);
}

/* Cap scores from..to softly if `cap` is positive, and return the largest. */
static float find_largest(float *restrict scores, int64_t from, int64_t to, float cap) {
    float largest = -3e38f;
    if (cap > 0)
        for (int64_t t = from; t < to; t++) scores[t] = cap * tanhf(scores[t] / cap);
    for (int64_t t = from; t < to; t++) largest = scores[t] > largest ? scores[t] : largest;
    return largest;
}

/* Exponentiate scores from..to in place and return their sum. Whole blocks are computed, so that
 * vectors leave no remainder: scores around the range become negligible, but not so small that expf
 * is slow. */
static float exponentiate(float *restrict scores, int64_t from, int64_t to, float largest) {
    const int64_t start = from / block * block, end = (to + block - 1) / block * block;
    float total = 0;
    for (int64_t t = start; t < from; t++) scores[t] = largest - 80;
    for (int64_t t = to; t < end; t++) scores[t] = largest - 80;
    for (int64_t t = start; t < end; t++) {
        scores[t] = expf(scores[t] - largest);
        total += scores[t];
    }
    return total;
}

/* out (queries, D) += shares (queries, width) of from..to @ values (room, D), for `count` vectors
 * of the D numbers. */
static inline __attribute__((always_inline)) void gather_vectors(const int queries, const int count,
        const float *restrict shares, const float *restrict values, float *restrict out,
        int64_t from, int64_t to, int64_t D, int64_t width) {
    floats sums[most][wide] = {0};
    for (int64_t t = from; t < to; t++) {
        const loose *value = (const loose *)(values + t * D);
#pragma GCC unroll 4
        for (int i = 0; i < count; i++) __builtin_prefetch((const float *)(value + i) + ahead);
#pragma GCC unroll 4
        for (int q = 0; q < queries; q++)
#pragma GCC unroll 4
            for (int i = 0; i < count; i++) sums[q][i] += shares[q * width + t] * value[i];
    }
#pragma GCC unroll 4
    for (int q = 0; q < queries; q++)
#pragma GCC unroll 4
        for (int i = 0; i < count; i++) *(loose *)(out + q * D + i * lanes) += sums[q][i];
}

/* out (queries, D) += shares (queries, width) of from..to @ values (room, D). */
static inline __attribute__((always_inline)) void gather(const int queries,
        const float *restrict shares, const float *restrict values, float *restrict out,
        int64_t from, int64_t to, int64_t D, int64_t width) {
    int64_t d = 0;
    for (; d + wide * lanes <= D; d += wide * lanes)
        gather_vectors(queries, wide, shares, values + d, out + d, from, to, D, width);
    for (; d + 2 * lanes <= D; d += 2 * lanes)
        gather_vectors(queries, 2, shares, values + d, out + d, from, to, D, width);
    for (; d + lanes <= D; d += lanes)
        gather_vectors(queries, 1, shares, values + d, out + d, from, to, D, width);
    for (; d < D; d++)
        for (int q = 0; q < queries; q++)
            for (int64_t t = from; t < to; t++)
                out[q * D + d] += shares[q * width + t] * values[t * D + d];
}

/* Tokens from..to of keys (blocks, D, 16) and values (tokens, D), and the buffer of a query's
 * scores. */
struct part {
    const float *keys, *values;
    float *scores;
    int64_t from, to;
};

/* Compute the attention out (queries, D) of up to four queries of a row to its prompt and its own
 * tokens. */
static inline __attribute__((always_inline)) void attend_to(const int queries,
        const float *restrict query, const struct part *parts, float *restrict out, int64_t D,
        int64_t width, float cap) {
    float totals[most] = {0};
    for (const struct part *p = parts; p < parts + 2; p++)
        score(queries, query, p->keys, p->scores, p->from, p->to, D, width);
    for (int q = 0; q < queries; q++) {
        float largest = -3e38f;
        for (const struct part *p = parts; p < parts + 2; p++) {
            const float of_part = find_largest(p->scores + q * width, p->from, p->to, cap);
            largest = of_part > largest ? of_part : largest;
        }
        for (const struct part *p = parts; p < parts + 2; p++)
            totals[q] += exponentiate(p->scores + q * width, p->from, p->to, largest);
        for (int64_t d = 0; d < D; d++) out[q * D + d] = 0;
    }
    for (const struct part *p = parts; p < parts + 2; p++)
        gather(queries, p->scores, p->values, out, p->from, p->to, D, width);
    for (int q = 0; q < queries; q++)
        for (int64_t d = 0; d < D; d++) out[q * D + d] /= totals[q];
}

/* Compute the attention out (R, H, D) of one new token per row, to its prompt's keys (P, K, L / 16,
 * D, 16) and to the first step + 1 of its own keys (R, K, room / 16, D, 16). `window` is the number
 * of keys that it sees, including its own; 0: all. `scores` (R x K, 4, L + room): a work buffer. */
void attend(const float *restrict qkv, const float *restrict prompt_keys,
        const float *restrict prompt_values, const float *restrict keys,
        const float *restrict values, const int64_t *restrict prompt_of,
        const int64_t *restrict lengths, float *restrict scores, float *restrict out, int64_t R,
        int64_t H, int64_t K, int64_t D, int64_t L, int64_t room, int64_t step, int64_t window,
        float cap) {
    const int64_t Q = H / K, width = L + room;
    /* For a key head, the rows of a prompt are adjacent, so its keys stay in the processor's cache.
     */
#pragma omp parallel for schedule(static) if (R * H * D * (L + step) > 1 << 18)
    for (int64_t i = 0; i < K * R; i++) {
        const int64_t k = i / R, r = i % R, p = prompt_of[r], length = lengths[r];
        const int64_t hidden =
                window && length + step + 1 > window ? length + step + 1 - window : 0;
        const int64_t from = hidden < length ? hidden : length, shared = (p * K + k) * D * L,
                      own = (r * K + k) * D * room;
        float *shared_scores = scores + i * most * width;
        const struct part parts[2] = {
            {prompt_keys + shared, prompt_values + shared, shared_scores, from, length},
            {keys + own, values + own, shared_scores + L, hidden - from, step + 1},
        };
        const float *query = qkv + (r * (H + 2 * K) + k * Q) * D;
        float *row = out + (r * H + k * Q) * D;
        int64_t q = 0;
        for (; q + most <= Q; q += most)
            attend_to(most, query + q * D, parts, row + q * D, D, width, cap);
        if (Q - q == 3) attend_to(3, query + q * D, parts, row + q * D, D, width, cap);
        if (Q - q == 2) attend_to(2, query + q * D, parts, row + q * D, D, width, cap);
        if (Q - q == 1) attend_to(1, query + q * D, parts, row + q * D, D, width, cap);
    }
}

/* out (R, n) = activation(gate) * up, with gate and up in gate_up (R, 2n). is_gelu: GELU by tanh,
 * otherwise SiLU. */
void gate(
        const float *restrict gate_up, float *restrict out, int64_t R, int64_t n, int64_t is_gelu) {
#pragma omp parallel for schedule(static) if (R * n > 1 << 12)
    for (int64_t r = 0; r < R; r++) {
        const float *gates = gate_up + r * 2 * n, *up = gates + n;
        float *gated = out + r * n;
        if (is_gelu)
            for (int64_t i = 0; i < n; i++) {
                const float x = gates[i], inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
                gated[i] = x / (1 + expf(-2 * inner)) * up[i];
            }
        else
            for (int64_t i = 0; i < n; i++) gated[i] = gates[i] / (1 + expf(-gates[i])) * up[i];
    }
}

enum {
    drawn = 512
}; /* tokens whose weights are summed together, so that a draw reads only one such block */

/* weights (count) = exp(logits * scale - top), or 0 if that is less than `least`. Returns their
 * sum, and adds the sum of all, without this limit, to `all`. */
static float weigh(const float *restrict logits, float *restrict weights, int64_t count,
        float scale, float top, float least, double *all) {
    float kept = 0, sum = 0;
    for (int64_t i = 0; i < count; i++) {
        const float weight = expf(logits[i] * scale - top);
        weights[i] = weight >= least ? weight : 0;
        sum += weight;
        kept += weights[i];
    }
    *all += sum;
    return kept;
}

/* Return the index at which the sum of weights exceeds `wanted`, never one with weight 0 if there
 * is another. `before` is set to the sum of the weights before it. */
static int64_t find_place(const float *weights, int64_t count, double wanted, double *before) {
    int64_t last = 0;
    double sum = 0;
    for (int64_t i = 0; i < count; i++) {
        if (weights[i] > 0) {
            last = i;
            *before = sum;
        }
        sum += weights[i];
        if (sum > wanted) break;
    }
    return last;
}

/* Draw a token for each row of logits (R, V) with uniform (R) in [0, 1), and compute its
 * log-probability. Logits are multiplied by `scale`. Tokens less than `least` times as likely as
 * the most likely one are not drawn. `sums` (R, V / 512 + 1) is a work buffer. */
void draw(const float *restrict logits, const float *restrict uniform, int64_t *restrict tokens,
        float *restrict logprobs, float *restrict sums, int64_t R, int64_t V, float scale,
        float least) {
    const int64_t num_blocks = (V + drawn - 1) / drawn;
#pragma omp parallel for schedule(static) if (R * V > 1 << 13)
    for (int64_t r = 0; r < R; r++) {
        const float *of_row = logits + r * V;
        float *sum_of = sums + r * (V / drawn + 1), weights[drawn], largest = of_row[0];
        for (int64_t i = 0; i < V; i++) largest = of_row[i] > largest ? of_row[i] : largest;
        const float top = largest * scale;
        double all = 0, total = 0, before = 0;
        for (int64_t b = 0; b < num_blocks; b++) {
            const int64_t start = b * drawn, count = V - start < drawn ? V - start : drawn;
            sum_of[b] = weigh(of_row + start, weights, count, scale, top, least, &all);
            total += sum_of[b];
        }
        const int64_t b = find_place(sum_of, num_blocks, uniform[r] * total, &before);
        const int64_t start = b * drawn, count = V - start < drawn ? V - start : drawn;
        double unused = 0;
        weigh(of_row + start, weights, count, scale, top, least, &unused);
        tokens[r] = start + find_place(weights, count, uniform[r] * total - before, &unused);
        logprobs[r] = of_row[tokens[r]] * scale - top - (float)log(all);
    }
}
