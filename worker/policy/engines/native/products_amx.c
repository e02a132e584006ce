/* Products of float32 rows with bfloat16 weights in AMX tiles, as exact as those of
 * products_bfloat16.c. Each number of x is the sum of two bfloat16 numbers, the rounded value and
 * the remainder, with a product for each: tiles compute faster than memory delivers weights. Sums
 * are in float32.
 *
 * Weights are in panels of 32 outputs, rounded up: for every 32 inputs two tiles of 16 outputs,
 * each (16, 16, 2), with pairs of inputs adjacent. x is in blocks of 16 rows: for every 32 inputs
 * two tiles (16, 32), the rounded values and the remainders. */
#include "processor.h"
#ifdef PRODUCTS_AMX
#include <errno.h>
#include <immintrin.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    tile = 1024, /* bytes: 16 rows of 64 */
    rows_in_cache = 256,
    ahead = 1024, /* prefetch distance in weights, in bytes: halves the time */
    large_state = 18,
    request_permission = 0x1023 /* of arch_prctl, for the tiles' data (XTILEDATA) */
};

struct tile_shapes {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} __attribute__((aligned(64)));

static int64_t steps_of(int64_t M) { return (M + 31) / 32; }

static int64_t bytes_of_panel(int64_t M) { return steps_of(M) * 2 * tile; }

int64_t panel_bytes(int64_t N, int64_t M) { return (N + 31) / 32 * bytes_of_panel(M); }

int64_t block_bytes(int64_t R, int64_t M) { return (R + 15) / 16 * bytes_of_panel(M); }

/* Request tiles from Linux, once per process. Returns 0 or an errno. */
int64_t ask_for_tiles(void) {
    return syscall(SYS_arch_prctl, request_permission, large_state) ? errno : 0;
}

static uint16_t round_to_bfloat16(float x) {
    union {
        float value;
        uint32_t bits;
    } u = {x};
    return (uint16_t)((u.bits + 0x7fff + (u.bits >> 16 & 1)) >> 16);
}

/* Write weight (N, M) into panels, a buffer of panel_bytes. */
void pack(const float *restrict weight, uint16_t *restrict panels, int64_t N, int64_t M) {
    const int64_t steps = steps_of(M);
#pragma omp parallel for schedule(static) if (N * M > 1 << 17)
    for (int64_t n = 0; n < (N + 31) / 32 * 32; n++) {
        uint16_t *column = panels + n / 32 * steps * tile + n % 32 / 16 * tile / 2 + n % 16 * 2;
        for (int64_t m = 0; m < steps * 32; m++)
            column[m / 32 * tile + m % 32 / 2 * 32 + m % 2] =
                    n < N && m < M ? round_to_bfloat16(weight[n * M + m]) : 0;
    }
}

/* Write a row (M) to its place in a block. The remainder of a number that is not finite is NaN. */
static void split_row(const float *restrict x, char *restrict place, int64_t M) {
    for (int64_t m = 0; m < M; m += 32, place += 2 * tile) {
        const int64_t rest = M - m;
        const __mmask16 low = rest < 16 ? (1 << rest) - 1 : 0xffff;
        const __mmask16 high = rest < 16 ? 0 : rest < 32 ? (1 << (rest - 16)) - 1 : 0xffff;
        const __m512 a = _mm512_maskz_loadu_ps(low, x + m),
                     b = _mm512_maskz_loadu_ps(high, x + m + 16);
        const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(b, a);
        const __m512i first =
                _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(rounded)), 16);
        const __m512i second =
                _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(rounded, 1)), 16);
        const __m512 left_of_a = _mm512_sub_ps(a, (__m512)first),
                     left_of_b = _mm512_sub_ps(b, (__m512)second);
        _mm512_store_si512(place, rounded);
        _mm512_store_si512(place + tile, (__m512i)_mm512_cvtne2ps_pbh(left_of_b, left_of_a));
    }
}

/* Compute four tiles of sums: rounded values and remainders, with the first and the second 16
 * outputs. */
static void multiply_tiles(
        const char *restrict x, const char *restrict panel, float *restrict sums, int64_t steps) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < steps; i++, x += 2 * tile, panel += 2 * tile) {
#pragma GCC unroll 32
        for (int64_t line = 0; line < 2 * tile; line += 64)
            __builtin_prefetch(panel + ahead + line);
        _tile_loadd(4, x, 64);
        _tile_loadd(6, panel, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, x + tile, 64);
        _tile_dpbf16ps(1, 5, 6);
        _tile_loadd(7, panel + tile, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
}

/* out (rows, columns) = the sums + bias; N is the row length of out. */
static void finish(const float *restrict sums, const float *restrict bias, float *restrict out,
        int64_t rows, int64_t columns, int64_t N) {
    for (int64_t start = 0; start < columns; start += 16, sums += 512) {
        const int64_t width = columns - start < 16 ? columns - start : 16;
        const __mmask16 mask = (1 << width) - 1;
        const __m512 first = bias ? _mm512_maskz_loadu_ps(mask, bias + start) : _mm512_setzero_ps();
        for (int64_t r = 0; r < rows; r++) {
            const __m512 sum = _mm512_add_ps(
                    _mm512_load_ps(sums + r * 16), _mm512_load_ps(sums + 256 + r * 16));
            _mm512_mask_storeu_ps(out + r * N + start, mask, _mm512_add_ps(sum, first));
        }
    }
}

/* out (R, N) = x (R, M) @ weight.T + bias (N, or null). `blocks`: a work buffer of block_bytes. */
void multiply(const float *restrict x, const char *restrict panels, const float *restrict bias,
        char *restrict blocks, float *restrict out, int64_t R, int64_t N, int64_t M) {
    const int64_t bytes = bytes_of_panel(M), steps = steps_of(M);
    /* Tiles of fewer rows take less time. */
    const uint8_t rows = R < 16 ? R : 16;
    const struct tile_shapes shapes = {
        .palette = 1,
        .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
        .rows = {rows, rows, rows, rows, rows, rows, 16, 16},
    };
#pragma omp parallel if (R * N * M > 1 << 18)
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < (R + rows - 1) / rows * rows; r++) {
            char *place = blocks + r / 16 * bytes + r % 16 * 64;
            if (r < R)
                split_row(x + r * M, place, M);
            else
                for (int64_t i = 0; i < 2 * steps; i++) memset(place + i * tile, 0, 64);
        }
        _tile_loadconfig(&shapes);
        /* Rows in parts that stay in the cache while all weights are read. */
        for (int64_t part = 0; part < R; part += rows_in_cache) {
            const int64_t end = R - part < rows_in_cache ? R : part + rows_in_cache;
#pragma omp for schedule(static)
            for (int64_t n = 0; n < N; n += 32)
                for (int64_t r = part; r < end; r += 16) {
                    float sums[4 * 256] __attribute__((aligned(64)));
                    multiply_tiles(blocks + r / 16 * bytes, panels + n / 32 * bytes, sums, steps);
                    finish(sums, bias ? bias + n : 0, out + r * N + n, R - r < 16 ? R - r : 16,
                            N - n < 32 ? N - n : 32, N);
                }
        }
        _tile_release();
    }
}
#else
int64_t ask_for_tiles(void) { return 0; }
#endif
