// Included before a kernel: makes a C++ compiler take CUDA's keywords, variables and functions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>

#include <vector_types.h>
#include <vector_functions.h>

#include "host_runtime.h"

#define CUPAGED_HOST 1

#undef __host__
#undef __device__
#undef __global__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __align__
#define __host__
#define __device__
#define __global__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// One copy for the block. A kernel's library has no other uninitialised variables, so its .bss
// section is its static shared memory.
#define __shared__ static __attribute__((used))

inline unsigned char* cupaged_host_dynamic_smem(size_t alignment) {
    return cupaged_host::dynamic_shared(alignment);
}

#include "warp.h"
#include "device_functions_host.h"
