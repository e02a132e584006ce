/* Properties of this processor: the width of its vectors, and the file of products_*.c that is
 * compiled for it. */
#include <stdint.h>

/* float32 numbers in a register. Wider vectors would be kept in memory and be ten times as slow. */
#if defined __AVX512F__
enum { lanes = 16 };
#elif defined __AVX__
enum { lanes = 8 };
#else
enum { lanes = 4 };
#endif

typedef float floats __attribute__((vector_size(lanes * 4)));
typedef uint32_t words __attribute__((vector_size(lanes * 4)));
typedef float loose
        __attribute__((vector_size(lanes * 4), aligned(4), may_alias)); /* without alignment */

#if defined __AMX_TILE__ && defined __AMX_BF16__ && defined __AVX512BF16__
#define HAS_AMX
#endif

/* The format with most numbers in an operation, or the one that WANTED_* names (__init__.py). */
#if defined WANTED_AMX
#if !defined HAS_AMX
#error "this processor has no tiles of bfloat16 numbers (AMX)"
#endif
#define PRODUCTS_AMX
#elif defined WANTED_FLOAT16
#if !defined __AVX512FP16__
#error "this processor has no float16 arithmetic (AVX-512 FP16)"
#endif
#define PRODUCTS_FLOAT16
#elif defined WANTED_INT16
#if !defined __AVX2__
#error "this processor has no AVX2"
#endif
#define PRODUCTS_INT16
#elif defined WANTED_BFLOAT16
#define PRODUCTS_BFLOAT16
#elif defined HAS_AMX
#define PRODUCTS_AMX
#elif defined __AVX512FP16__
#define PRODUCTS_FLOAT16
#elif defined __AVX2__ && (!defined __AVX512F__ || defined __AVX512VNNI__ && defined __AVX512VL__)
#define PRODUCTS_INT16
#else
#define PRODUCTS_BFLOAT16
#endif
