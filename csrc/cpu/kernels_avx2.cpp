#if defined(__x86_64__)
#define DISAGG_ISA avx2
#include "cpu/vec_avx2.h"
#include "cpu/kernels_impl.h"
#endif
