/* Products of float32 rows with bfloat16 weights in float32 arithmetic. The time is that of reading
 * the weights, which are half as large as in float32. Weights are in panels of 16 outputs with
 * pairs of inputs adjacent: (N / 16, M / 2, 16, 2), both rounded up. x is in blocks of 16 rows: (R
 * / 16, M rounded up to even, 16).
 *
 * Not compiled with -ffast-math, which would first add the two products of a pair: three operations
 * instead of two. */
#include "processor.h"
#ifdef PRODUCTS_BFLOAT16

/* A tile of the result, `tile` rows of a panel, is kept in registers during the loop over its
 * inputs. It has as many sums as leave registers for the weights, and enough of them that no
  * addition waits for the previous one. */
#if defined __AVX512F__
enum { tile = 16 }; /* of 32 registers */
#elif defined __AVX__ || defined __aarch64__
enum { tile = 6 }; /* two registers a row, of 16; four, of 32 */
#else
enum { tile = 2 };
#endif

enum {
    vectors = 16 / lanes, /* of a panel's outputs */
    depth = 256, /* inputs at a time, so that their weights stay in the first-level cache for all
                    rows */
    ahead = 1024 /* prefetch distance in weights, in bytes: halves the time */
};

static uint16_t round_to_bfloat16(float x) {
    union {
        float value;
        uint32_t bits;
    } u = {x};
    return (uint16_t)((u.bits + 0x7fff + (u.bits >> 16 & 1)) >> 16);
}

int64_t panel_bytes(int64_t N, int64_t M) { return (N + 15) / 16 * 16 * (M + M % 2) * 2; }

int64_t block_bytes(int64_t R, int64_t M) { return (R + 15) / 16 * 16 * (M + M % 2) * 4; }

/* Write weight (N, M) into panels, a buffer of panel_bytes. */
void pack(const float *restrict weight, uint16_t *restrict panels, int64_t N, int64_t M) {
    const int64_t even = M + M % 2;
#pragma omp parallel for schedule(static) if (N * M > 1 << 17)
    for (int64_t p = 0; p < (N + 15) / 16; p++)
        for (int64_t j = 0; j < 16; j++) {
            const int64_t n = p * 16 + j;
            uint16_t *panel = panels + p * even * 16 + j * 2;
            for (int64_t m = 0; m < even; m++)
                panel[m / 2 * 32 + m % 2] =
                        n < N && m < M ? round_to_bfloat16(weight[n * M + m]) : 0;
        }
}

/* sums (rows, 16) += x (M, the first `rows` of 16) @ panel (M / 2, 16, 2). */
static inline __attribute__((always_inline)) void multiply_tile(const int rows,
        const float *restrict x, const uint16_t *restrict panel, float *restrict sums, int64_t M) {
    floats totals[tile][vectors];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            totals[r][v] = *(const floats *)(sums + r * 16 + v * lanes);
    for (int64_t m = 0; m < M; m += 2, x += 32, panel += 32) {
        __builtin_prefetch((const char *)panel + ahead);
        floats weights[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            weights[v] = (floats)(*(const words *)(panel + v * lanes * 2) << 16);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) totals[r][v] += weights[v] * x[r];
        const uint16_t *again = panel;
        __asm__(""
                : "+r"(again)); /* read again: keeping both halves would push sums out of the
                                   registers */
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            weights[v] = (floats)(*(const words *)(again + v * lanes * 2) & 0xffff0000);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) totals[r][v] += weights[v] * x[16 + r];
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) *(floats *)(sums + r * 16 + v * lanes) = totals[r][v];
}

/* The same for up to 16 rows, in tiles of four sizes; a few rows too many may be computed. */
static void multiply_rows(
        int64_t rows, const float *x, const uint16_t *panel, float *sums, int64_t M) {
    for (; rows > 0; rows -= tile, x += tile, sums += tile * 16)
        if (rows > tile * 3 / 4)
            multiply_tile(tile, x, panel, sums, M);
        else if (rows > tile / 2)
            multiply_tile(tile * 3 / 4, x, panel, sums, M);
        else if (rows > tile / 4)
            multiply_tile(tile / 2, x, panel, sums, M);
        else
            multiply_tile(tile / 4, x, panel, sums, M);
}

/* out (R, N) = x (R, M) @ weight.T + bias (N, or null). `blocks`: a work buffer of block_bytes. */
void multiply(const float *restrict x, const uint16_t *restrict panels, const float *restrict bias,
        float *restrict blocks, float *restrict out, int64_t R, int64_t N, int64_t M) {
    const int64_t even = M + M % 2;
    for (int64_t first = 0; first < R; first += 16)
        for (int64_t start = 0; start < even;
                start += 16) /* one cache line of each row at a time */
            for (int64_t r = 0; r < 16; r++)
                for (int64_t m = start; m < (start + 16 < even ? start + 16 : even); m++)
                    blocks[first * even + m * 16 + r] =
                            first + r < R && m < M ? x[(first + r) * M + m] : 0;
#pragma omp parallel for schedule(static) if (R * N * M > 1 << 18)
    for (int64_t p = 0; p < (N + 15) / 16; p++) {
        const int64_t n = p * 16, columns = N - n < 16 ? N - n : 16;
        for (int64_t r = 0; r < R; r += 16) {
            const int64_t rows = R - r < 16 ? R - r : 16;
            float sums[16 * 16] __attribute__((aligned(64))) = {0};
            for (int64_t m = 0; m < even; m += depth)
                multiply_rows(rows, blocks + r * even + m * 16, panels + p * even * 16 + m * 16,
                        sums, even - m < depth ? even - m : depth);
            for (int64_t i = 0; i < rows; i++)
                for (int64_t j = 0; j < columns; j++)
                    out[(r + i) * N + n + j] = sums[i * 16 + j] + (bias ? bias[n + j] : 0);
        }
    }
}
#endif
