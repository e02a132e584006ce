/* A whole decoding step in one call. For weights in float32, NativeBatch in decoder.py does the
 * same layer by layer; with a small model, calls from Python take longer than the operations.
 * native_step.py has the same structures. */
#include <stddef.h>

#include "processor.h"

/* `down` (rank, inputs) and `up` (outputs, rank): the panels of low-rank adapters; rank 0: there
 * are none. */
struct product {
    const void *panels;
    const float *bias;
    int64_t num_outputs, num_inputs;
    const void *down, *up;
    int64_t rank;
};

struct norm {
    const float *weight;
    float eps;
}; /* weight is null if the layer has no such norm */

struct layer {
    struct norm attention_norm, head_norm, attention_post_norm, mlp_norm, mlp_post_norm;
    struct product qkv, attention_out, gate_up, down;
    const float *turn;                        /* (R, D): pairs of cosine and sine of the rotation */
    const float *prompt_keys, *prompt_values; /* (P, K, L / 16, D, 16), (P, K, L, D) */
    float *keys, *values;                     /* (R, K, room / 16, D, 16), (R, K, room, D) */
    int64_t window;
};

struct batch {
    const struct layer *layers;
    struct norm norm;
    struct product head;
    const int64_t *prompt_of, *lengths; /* (R) */
    /* work buffers; lowered and raised: of adapters; out: the logits */
    float *x, *normed, *added, *terms, *qkv, *attended, *gate_up, *gated, *scores, *lowered,
            *raised, *out;
    void *blocks;
    int64_t num_layers, R, H, K, D, L, room, step, is_gelu;
    float scale, score_cap;
};

void multiply(const float *x, const void *panels, const float *bias, void *blocks, float *out,
        int64_t R, int64_t N, int64_t M);
void add_norm(float *x, const float *added, const float *weight, float *out, int64_t R, int64_t n,
        float eps);
void turn_heads(float *qkv, const float *turn, const float *weight, float *keys, float *values,
        int64_t R, int64_t H, int64_t K, int64_t D, int64_t room, int64_t step, float eps,
        float scale);
void attend(const float *qkv, const float *prompt_keys, const float *prompt_values,
        const float *keys, const float *values, const int64_t *prompt_of, const int64_t *lengths,
        float *scores, float *out, int64_t R, int64_t H, int64_t K, int64_t D, int64_t L,
        int64_t room, int64_t step, int64_t window, float cap);
void gate(const float *gate_up, float *out, int64_t R, int64_t n, int64_t is_gelu);

static void apply(
        const struct product *product, const struct batch *b, const float *x, float *out) {
    const int64_t N = product->num_outputs, rank = product->rank;
    multiply(x, product->panels, product->bias, b->blocks, out, b->R, N, product->num_inputs);
    if (!rank) return;
    multiply(x, product->down, NULL, b->blocks, b->lowered, b->R, rank, product->num_inputs);
    multiply(b->lowered, product->up, NULL, b->blocks, b->raised, b->R, N, rank);
#pragma omp parallel for schedule(static) if (b->R * N > 1 << 16)
    for (int64_t i = 0; i < b->R * N; i++) out[i] += b->raised[i];
}

/* x += added; normed = norm of x. */
static void add(const struct batch *b, const float *added, const struct norm *norm) {
    add_norm(b->x, added, norm->weight, b->normed, b->R, b->head.num_inputs, norm->eps);
}

/* Return the term to add to x: the product, normalised in families with a norm there. */
static const float *normalise(const struct batch *b, const struct norm *norm) {
    if (!norm->weight) return b->added;
    add_norm(b->added, NULL, norm->weight, b->terms, b->R, b->head.num_inputs, norm->eps);
    return b->terms;
}

/* Compute the logits (R, V) in b->out of the tokens whose embeddings are in b->x. */
void run_step(const struct batch *b) {
    const float *added = NULL;
    for (const struct layer *l = b->layers; l < b->layers + b->num_layers; l++) {
        add(b, added, &l->attention_norm);
        apply(&l->qkv, b, b->normed, b->qkv);
        turn_heads(b->qkv, l->turn, l->head_norm.weight, l->keys, l->values, b->R, b->H, b->K, b->D,
                b->room, b->step, l->head_norm.eps, b->scale);
        attend(b->qkv, l->prompt_keys, l->prompt_values, l->keys, l->values, b->prompt_of,
                b->lengths, b->scores, b->attended, b->R, b->H, b->K, b->D, b->L, b->room, b->step,
                l->window, b->score_cap);
        apply(&l->attention_out, b, b->attended, b->added);
        add(b, normalise(b, &l->attention_post_norm), &l->mlp_norm);
        apply(&l->gate_up, b, b->normed, b->gate_up);
        gate(b->gate_up, b->gated, b->R, l->down.num_inputs, b->is_gelu);
        apply(&l->down, b, b->gated, b->added);
        added = normalise(b, &l->mlp_post_norm);
    }
    add(b, added, &b->norm);
    apply(&b->head, b, b->normed, b->out);
}
