/* How many float32 numbers the processor's registers hold: vectors that are wider end up in memory, and cost tenfold. */
#include <stdint.h>

#if defined __AVX512F__
enum { lanes = 16 };
#elif defined __AVX__
enum { lanes = 8 };
#else
enum { lanes = 4 };
#endif

typedef float floats __attribute__((vector_size(lanes * 4)));
typedef uint32_t words __attribute__((vector_size(lanes * 4)));
typedef float loose __attribute__((vector_size(lanes * 4), aligned(4), may_alias)); /* anywhere in memory */
