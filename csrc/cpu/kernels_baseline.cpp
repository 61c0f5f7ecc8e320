#define DISAGG_ISA baseline
#include "cpu/vec_baseline.h"
#include "cpu/kernels_impl.h"
