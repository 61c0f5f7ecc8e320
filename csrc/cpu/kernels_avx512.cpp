#if defined(__x86_64__)
#define DISAGG_ISA avx512
#include "cpu/vec_avx512.h"
#include "cpu/kernels_impl.h"
#endif
