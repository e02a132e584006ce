/* Products of float32 rows with 16-bit integer weights, for processors with AVX2 or AVX-512's VNNI,
 * whose operations multiply and add twice as many integers as float32 numbers. They are more exact
 * than those of products_bfloat16.c: the largest of 64 adjacent numbers of a row has at least 12
 * bits, and sums are exact for 64 inputs, then in float32.
 *
 * Rows of weights and of x are in panels of 16: for every 64 inputs the scale of each row (16),
 * then the numbers with pairs of inputs adjacent (32, 16, 2), fewer in the last group. */
#include "processor.h"
#ifdef PRODUCTS_INT16
#include <immintrin.h>
#include <string.h>

typedef int32_t whole __attribute__((vector_size(32)));
typedef float eight __attribute__((vector_size(32)));

enum {
    group = 64, /* inputs with one scale */
    most_of_weight = 8191,
    most_of_x = 4095,  /* 64 products are below 2^31 */
    heading = 16 * 4,  /* bytes of a group's scales */
    line = 16 * 2 * 2, /* bytes of two inputs of a panel */
    whole_group = heading + group / 2 * line,
    tile = 6,    /* rows whose sums, two registers each, fit into the processor's 16 */
    ahead = 1024 /* prefetch distance in weights, in bytes: halves the time */
};

static int64_t groups_of(int64_t M) { return (M + group - 1) / group; }

static int64_t lines_of(int64_t M) { return (M + 1) / 2; }

static int64_t bytes_of_panel(int64_t M) { return groups_of(M) * heading + lines_of(M) * line; }

int64_t panel_bytes(int64_t N, int64_t M) { return (N + 15) / 16 * bytes_of_panel(M); }

int64_t block_bytes(int64_t R, int64_t M) { return panel_bytes(R, M); }

/* Return the factor that makes the largest of 64 numbers `most`; 0 if all are negligible, NaN if
 * one is not finite. */
static float find_scale(const float *restrict x, float most) {
    __m256 largest = _mm256_setzero_ps(), sum = largest;
    for (int64_t m = 0; m < group; m += 8) {
        const __m256 numbers = _mm256_loadu_ps(x + m);
        largest = _mm256_max_ps(largest, _mm256_andnot_ps(_mm256_set1_ps(-0.f), numbers));
        sum = _mm256_add_ps(
                sum, _mm256_mul_ps(numbers, _mm256_setzero_ps())); /* NaN unless all are finite */
    }
    float of_all = 0, nothing = 0;
    for (int64_t i = 0; i < 8; i++) {
        of_all = largest[i] > of_all ? largest[i] : of_all;
        nothing += sum[i];
    }
    return nothing != 0 ? nothing : of_all < 1e-30f ? 0 : most / of_all;
}

/* Write numbers start..start + 64 of up to 16 rows of x (rows, M) to their place in a panel. */
static void pack_group(const float *restrict x, char *restrict panel, int64_t rows, int64_t start,
        int64_t M, float most) {
    const int64_t width = M - start < group ? M - start : group;
    int32_t pairs[16][group / 2] __attribute__((aligned(32))) = {0};
    float *scales = memset(panel, 0, heading);
    for (int64_t r = 0; r < rows; r++) {
        float numbers[group] = {0};
        memcpy(numbers, x + r * M + start, (size_t)width * sizeof *x);
        const float scale = find_scale(numbers, most);
        if (!(scale > 0)) { /* the numbers stay 0 */
            scales[r] = scale;
            continue;
        }
        scales[r] = 1 / scale;
        for (int64_t m = 0; m < group; m += 16) {
            const __m256 by = _mm256_set1_ps(scale);
            const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(numbers + m), by));
            const __m256i b =
                    _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(numbers + m + 8), by));
            _mm256_store_si256((__m256i *)&pairs[r][m / 2],
                    _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8));
        }
    }
    int32_t *turned = (int32_t *)(panel + heading);
    for (int64_t i = 0; i < lines_of(width); i++)
        for (int64_t r = 0; r < 16; r++) turned[i * 16 + r] = pairs[r][i];
}

static void pack_panels(
        const float *restrict x, char *restrict panels, int64_t R, int64_t M, float most) {
#pragma omp parallel for schedule(static) collapse(2) if (R * M > 1 << 15)
    for (int64_t r = 0; r < R; r += 16)
        for (int64_t g = 0; g < groups_of(M); g++)
            pack_group(x + r * M, panels + r / 16 * bytes_of_panel(M) + g * whole_group,
                    R - r < 16 ? R - r : 16, g * group, M, most);
}

/* Write weight (N, M) into panels, a buffer of panel_bytes. */
void pack(const float *restrict weight, char *restrict panels, int64_t N, int64_t M) {
    pack_panels(weight, panels, N, M, most_of_weight);
}

/* Return sums + a[2i] * b[2i] + a[2i + 1] * b[2i + 1], for eight pairs. */
static inline __attribute__((always_inline)) whole add_products(whole sums, __m256i a, __m256i b) {
#if defined __AVX512VNNI__ && defined __AVX512VL__
    return (whole)_mm256_dpwssd_epi32((__m256i)sums, a, b);
#elif defined __AVXVNNI__
    return (whole)_mm256_dpwssd_avx_epi32((__m256i)sums, a, b);
#else
    return sums + (whole)_mm256_madd_epi16(a, b);
#endif
}

/* sums (rows, 16) += a group of x @ a group of weights. `first` is the index of the first row in
 * the panel of x. */
static inline __attribute__((always_inline)) void multiply_tile(const int rows,
        const char *restrict x, const char *restrict weights, float *restrict sums, int64_t first,
        int64_t lines) {
    whole totals[tile][2];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) totals[r][0] = totals[r][1] = (whole){0};
    const int32_t *pairs = (const int32_t *)(x + heading) + first;
    const __m256i *columns = (const __m256i *)(weights + heading);
    for (int64_t i = 0; i < lines; i++, pairs += 16, columns += 2) {
        __builtin_prefetch((const char *)columns + ahead);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const __m256i pair = _mm256_set1_epi32(pairs[r]);
            totals[r][0] = add_products(totals[r][0], pair, columns[0]);
            totals[r][1] = add_products(totals[r][1], pair, columns[1]);
        }
    }
    const float *of_row = (const float *)x + first;
    const eight *of_column = (const eight *)weights;
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) {
            eight *sum = (eight *)sums + (first + r) * 2 + v;
            *sum += __builtin_convertvector(totals[r][v], eight) * (of_row[r] * of_column[v]);
        }
}

static void multiply_group(
        int64_t rows, const char *x, const char *weights, float *sums, int64_t lines) {
    for (int64_t first = 0; first < rows; first += tile)
        if (rows - first > 4)
            multiply_tile(6, x, weights, sums, first, lines);
        else if (rows - first > 2)
            multiply_tile(4, x, weights, sums, first, lines);
        else
            multiply_tile(2, x, weights, sums, first, lines);
}

/* out (R, N) = x (R, M) @ weight.T + bias (N, or null). `blocks`: a work buffer of block_bytes. */
void multiply(const float *restrict x, const char *restrict panels, const float *restrict bias,
        char *restrict blocks, float *restrict out, int64_t R, int64_t N, int64_t M) {
    const int64_t bytes = bytes_of_panel(M);
    pack_panels(x, blocks, R, M, most_of_x);
#pragma omp parallel for schedule(static) if (R * N * M > 1 << 18)
    for (int64_t n = 0; n < N; n += 16)
        for (int64_t first = 0; first < R; first += 16) {
            const int64_t rows = R - first < 16 ? R - first : 16, columns = N - n < 16 ? N - n : 16;
            const char *of_rows = blocks + first / 16 * bytes,
                       *of_columns = panels + n / 16 * bytes;
            float sums[16 * 16] __attribute__((aligned(64))) = {0};
            for (int64_t m = 0; m < M;
                    m += group, of_rows += whole_group, of_columns += whole_group)
                multiply_group(
                        rows, of_rows, of_columns, sums, lines_of(M - m < group ? M - m : group));
            for (int64_t r = 0; r < rows; r++)
                for (int64_t i = 0; i < columns; i++)
                    out[(first + r) * N + n + i] = sums[r * 16 + i] + (bias ? bias[n + i] : 0);
        }
}
#endif
