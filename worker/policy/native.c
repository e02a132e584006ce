/* The small operations of a decoding step, each in one pass: in torch they cost more calls than arithmetic.
 * float32, row-major. R rows, H query heads, K key heads, Q = H / K, D numbers of a head, L room for prompt tokens.
 * native.py compiles this, with -ffast-math, and calls it; decoder.py does the same in torch and says what it means. */
#include <math.h>
#include <stdint.h>

typedef float floats __attribute__((vector_size(64)));
typedef float loose __attribute__((vector_size(64), aligned(4), may_alias)); /* anywhere in memory */

static float inverse_rms(const float *x, int64_t n, float eps) {
    float sum = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
    return 1 / sqrtf(sum / (float)n + eps);
}

/* out = norm(x) * weight, after x += added where `added` is given. Each (R, n). */
void add_norm(float *restrict x, const float *restrict added, const float *restrict weight, float *restrict out,
              int64_t R, int64_t n, float eps) {
    for (int64_t r = 0; r < R; r++, x += n, out += n) {
        if (added)
            for (int64_t i = 0; i < n; i++) x[i] += added[r * n + i];
        const float scale = inverse_rms(x, n, eps);
        for (int64_t i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
    }
}

/* Queries and keys in qkv (R, H + 2K, D): norms of heads where `weight` (H + K, D) is given, then rotation by `turn`
 * (R, D): pairs of cosine and sine. Queries are scaled. Keys go to keys (R, K, D, room), values to values
 * (R, K, room, D), both at token `step`. */
void turn_heads(float *restrict qkv, const float *restrict turn, const float *restrict weight, float *restrict keys,
                float *restrict values, int64_t R, int64_t H, int64_t K, int64_t D, int64_t room, int64_t step, float eps,
                float scale) {
    for (int64_t r = 0; r < R; r++, turn += D) {
        for (int64_t h = 0; h < H + K; h++, qkv += D) {
            if (weight) {
                const float inverse = inverse_rms(qkv, D, eps);
                for (int64_t d = 0; d < D; d++) qkv[d] *= inverse * weight[h * D + d];
            }
            const float by = h < H ? scale : 1;
            for (int64_t d = 0; d < D; d += 2) {
                const float a = qkv[d] * by, b = qkv[d + 1] * by;
                qkv[d] = a * turn[d] - b * turn[d + 1];
                qkv[d + 1] = a * turn[d + 1] + b * turn[d];
            }
            if (h >= H) {
                float *key = keys + (r * K + h - H) * D * room + step;
                for (int64_t d = 0; d < D; d++) key[d * room] = qkv[d];
            }
        }
        for (int64_t k = 0; k < K; k++, qkv += D) {
            float *value = values + ((r * K + k) * room + step) * D;
            for (int64_t d = 0; d < D; d++) value[d] = qkv[d];
        }
    }
}

/* scores[t] of one query for tokens from..to of keys (D, room), softly capped; returns the largest. Works in steps of
 * 64 tokens, of which `room` is a multiple: what lies around the tokens is computed, too, and not looked at. */
static float score(const float *restrict query, const float *restrict keys, float *restrict scores, int64_t from,
                   int64_t to, int64_t D, int64_t room, float cap) {
    for (int64_t start = from / 64 * 64; start < to; start += 64) {
        floats sums[4] = {0};
        for (int64_t d = 0; d < D; d++) {
            const loose *key = (const loose *)(keys + d * room + start);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) sums[i] += query[d] * key[i];
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) *(loose *)(scores + start + i * 16) = sums[i];
    }
    float largest = -3e38f;
    if (cap > 0)
        for (int64_t t = from; t < to; t++) scores[t] = cap * tanhf(scores[t] / cap);
    for (int64_t t = from; t < to; t++) largest = scores[t] > largest ? scores[t] : largest;
    return largest;
}

/* out (D) += exp(scores - largest) @ values (room, D); returns the sum of the weights. */
static float gather(float *restrict scores, const float *restrict values, float *restrict out, int64_t from, int64_t to,
                    int64_t D, float largest) {
    float total = 0;
    for (int64_t t = from; t < to; t++) {
        scores[t] = expf(scores[t] - largest);
        total += scores[t];
    }
    int64_t d = 0;
    for (; d + 16 <= D; d += 16) { /* four sums under way hide the latency of an addition */
        floats sums[4] = {0};
        int64_t t = from;
        for (; t + 4 <= to; t += 4)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) sums[i] += scores[t + i] * *(const loose *)(values + (t + i) * D + d);
        for (; t < to; t++) sums[0] += scores[t] * *(const loose *)(values + t * D + d);
        *(loose *)(out + d) += sums[0] + sums[1] + sums[2] + sums[3];
    }
    for (; d < D; d++)
        for (int64_t t = from; t < to; t++) out[d] += scores[t] * values[t * D + d];
    return total;
}

/* Attention of one new token for each row, to its prompt's keys (P, K, D, L) and its own (R, K, D, room), the first
 * step + 1 of them. `window`: how many keys it sees, itself included; 0: all. `scores`: (R x K, L + room), room to work
 * in. out (R, H, D). */
void attend(const float *restrict qkv, const float *restrict prompt_keys, const float *restrict prompt_values,
            const float *restrict keys, const float *restrict values, const int64_t *restrict prompt_of,
            const int64_t *restrict lengths, float *restrict scores, float *restrict out, int64_t R, int64_t H, int64_t K,
            int64_t D, int64_t L, int64_t room, int64_t step, int64_t window, float cap) {
    const int64_t Q = H / K;
    /* Rows of one prompt follow each other under one key head: its keys stay in the cache. */
#pragma omp parallel for schedule(static) if (R * H * D * (L + step) > 1 << 18)
    for (int64_t i = 0; i < K * R; i++) {
        const int64_t k = i / R, r = i % R, p = prompt_of[r], length = lengths[r];
        const int64_t hidden = window && length + step + 1 > window ? length + step + 1 - window : 0;
        const int64_t from = hidden < length ? hidden : length, own_from = hidden - from;
        float *shared_scores = scores + i * (L + room), *own_scores = shared_scores + L;
        for (int64_t q = 0; q < Q; q++) {
            const float *query = qkv + (r * (H + 2 * K) + k * Q + q) * D;
            float *row = out + (r * H + k * Q + q) * D;
            float a = score(query, prompt_keys + (p * K + k) * D * L, shared_scores, from, length, D, L, cap);
            float b = score(query, keys + (r * K + k) * D * room, own_scores, own_from, step + 1, D, room, cap);
            const float largest = a > b ? a : b;
            for (int64_t d = 0; d < D; d++) row[d] = 0;
            float total = gather(shared_scores, prompt_values + (p * K + k) * L * D, row, from, length, D, largest);
            total += gather(own_scores, values + (r * K + k) * room * D, row, own_from, step + 1, D, largest);
            for (int64_t d = 0; d < D; d++) row[d] /= total;
        }
    }
}

/* out (R, n) = activation(gate) * up of gate_up (R, 2n). is_gelu: GELU by tanh, else SiLU. */
void gate(const float *restrict gate_up, float *restrict out, int64_t R, int64_t n, int64_t is_gelu) {
    for (int64_t r = 0; r < R; r++, gate_up += 2 * n, out += n) {
        const float *up = gate_up + n;
        if (is_gelu)
            for (int64_t i = 0; i < n; i++) {
                const float x = gate_up[i], inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
                out[i] = x / (1 + expf(-2 * inner)) * up[i];
            }
        else
            for (int64_t i = 0; i < n; i++) out[i] = gate_up[i] / (1 + expf(-gate_up[i])) * up[i];
    }
}
