/* Products of float32 rows with 16-bit weights on CPUs with float16 arithmetic, which has twice as
 * many numbers in an operation. They are as exact as those of products_bfloat16.c: weights keep 11
 * bits instead of 8, and sums are in float16 for 32 inputs only, then in float32.
 *
 * Weights are in panels of 32 outputs: (N / 32, M, 32), rounded up, followed by the scale of each
 * output. x is in blocks of 16 rows: (R / 16, M, 16), rounded up, followed by the scale of each
 * row. The scales are powers of two, so that no sum of 32 leaves float16's range. */
#include "processor.h"
#ifdef PRODUCTS_FLOAT16
#include <immintrin.h>
#include <string.h>

typedef _Float16 half;
typedef half halves __attribute__((vector_size(64)));

enum {
    summed = 32,  /* inputs whose products are added in float16 */
    exponent = 5, /* numbers are below 2^5, so that 32 products are below 2^15 */
    ahead = 2048  /* prefetch distance in weights, in bytes: halves the time */
};

static int64_t blocks_of(int64_t R) { return (R + 15) / 16; }

static int64_t panels_of(int64_t N) { return (N + 31) / 32; }

int64_t panel_bytes(int64_t N, int64_t M) { return panels_of(N) * 32 * (M * 2 + 4); }

int64_t block_bytes(int64_t R, int64_t M) { return blocks_of(R) * 16 * (M * 2 + 4); }

/* Return the power of two that brings the largest of n numbers below 2^exponent; 1 if one is not
 * finite. The largest is found on the numbers' bits, which compilers vectorise. */
static float find_scale(const float *restrict x, int64_t n) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    const uint32_t power =
            largest >> 23; /* the largest is below 2^(power - 126); 255: not finite */
    const uint32_t wanted = exponent + 126 + 127 - power;
    const uint32_t bits = power == 255 ? 127 << 23 : (wanted < 253 ? wanted : 253) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return scale;
}

/* Write weight (N, M) into panels, a buffer of panel_bytes. */
void pack(const float *restrict weight, half *restrict panels, int64_t N, int64_t M) {
    float *scales = (float *)(panels + panels_of(N) * 32 * M);
#pragma omp parallel for schedule(static) if (N * M > 1 << 17)
    for (int64_t p = 0; p < panels_of(N); p++)
        for (int64_t j = 0; j < 32; j++) {
            const int64_t n = p * 32 + j;
            const float scale = n < N ? find_scale(weight + n * M, M) : 1;
            half *panel = panels + p * M * 32 + j;
            for (int64_t m = 0; m < M; m++)
                panel[m * 32] = n < N ? (half)(weight[n * M + m] * scale) : 0;
            scales[n] = 1 / scale;
        }
}

/* Write numbers start..start + 32 of the first `rows` of 16 rows of x to their place in a block.
 * They are converted before they are transposed, because one loop would not be vectorised. */
static void turn(const float *restrict x, const float *restrict of_row, half *restrict block,
        int64_t rows, int64_t start, int64_t M) {
    const int64_t width = M - start < 32 ? M - start : 32;
    half tile[16][32] = {0};
    for (int64_t r = 0; r < rows; r++) {
        const float by = 1 / of_row[r];
        for (int64_t m = 0; m < width; m++) tile[r][m] = (half)(x[r * M + start + m] * by);
    }
    for (int64_t m = 0; m < width; m++)
        for (int64_t r = 0; r < 16; r++) block[(start + m) * 16 + r] = tile[r][m];
}

static inline __attribute__((always_inline)) void multiply_panel(const int rows,
        const half *restrict x, const half *restrict panel, floats (*sums)[2], int64_t M) {
    for (int64_t m = 0; m < M;) {
        halves part[16];
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) part[r] = (halves){0};
        for (const int64_t end = m + summed < M ? m + summed : M; m < end;
                m++, x += 16, panel += 32) {
            __builtin_prefetch((const char *)panel + ahead);
            const halves weights = *(const halves *)panel;
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) part[r] += weights * x[r];
        }
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            const __m512i bits = (__m512i)part[r];
            sums[r][0] += (floats)_mm512_cvtxph_ps((__m256h)_mm512_castsi512_si256(bits));
            sums[r][1] += (floats)_mm512_cvtxph_ps((__m256h)_mm512_extracti64x4_epi64(bits, 1));
        }
    }
}

static void multiply_rows(
        int64_t rows, const half *x, const half *panel, floats (*sums)[2], int64_t M) {
    if (rows > 12)
        multiply_panel(16, x, panel, sums, M);
    else if (rows > 8)
        multiply_panel(12, x, panel, sums, M);
    else if (rows > 4)
        multiply_panel(8, x, panel, sums, M);
    else
        multiply_panel(4, x, panel, sums, M);
}

/* out (rows, columns) = block @ panel, scaled, + bias; N is the row length of out. */
static void finish(int64_t rows, int64_t columns, const half *block, const half *panel,
        const float *of_row, const float *of_output, const float *bias, float *out, int64_t N,
        int64_t M) {
    floats sums[16][2] = {0};
    multiply_rows(rows, block, panel, sums, M);
    for (int64_t r = 0; r < rows; r++) {
        const float *sum = (const float *)sums[r];
        for (int64_t n = 0; n < columns; n++)
            out[r * N + n] = sum[n] * of_row[r] * of_output[n] + (bias ? bias[n] : 0);
    }
}

/* out (R, N) = x (R, M) @ weight.T + bias (N, or null). `blocks`: a work buffer of block_bytes. */
void multiply(const float *restrict x, const half *restrict panels, const float *restrict bias,
        half *restrict blocks, float *restrict out, int64_t R, int64_t N, int64_t M) {
    const float *of_output = (const float *)(panels + panels_of(N) * 32 * M);
    float *of_row = (float *)(blocks + blocks_of(R) * 16 * M);
    for (int64_t r = 0; r < R; r++) of_row[r] = 1 / find_scale(x + r * M, M);
#pragma omp parallel for schedule(static) collapse(2) if (R * M > 1 << 15)
    for (int64_t first = 0; first < R; first += 16)
        for (int64_t start = 0; start < M; start += 32)
            turn(x + first * M, of_row + first, blocks + first * M, R - first < 16 ? R - first : 16,
                    start, M);
#pragma omp parallel for schedule(static) if (R * N * M > 1 << 18)
    for (int64_t n = 0; n < N; n += 32)
        for (int64_t first = 0; first < R; first += 16)
            finish(R - first < 16 ? R - first : 16, N - n < 32 ? N - n : 32, blocks + first * M,
                    panels + n * M, of_row + first, of_output + n, bias ? bias + n : 0,
                    out + first * N + n, N, M);
}
#endif
