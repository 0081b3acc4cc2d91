// Thread 0 gives its value to warp 1 through a barrier in shared memory, warp 1 gives it to warp 0
// through a named barrier. FAULT 1: the first barrier is not in shared memory, 2: not at a multiple
// of 8, 3: of no thread; 4: waited for with parity 2, 5: the waiters are overtaken. 6: the other
// one has number 0, 7: 48 threads, 8: warp 1 arrives twice in place of warp 0.
#include "common.cuh"
#include "ptx_sm90.cuh"

extern "C" __global__ void block_barriers(const int* input, int* output) {
    using namespace cupaged;
    __shared__ unsigned long long barriers[2];
    __shared__ int values[2];
    unsigned long long* barrier = barriers;
#if FAULT == 1
    unsigned long long local;
    barrier = &local;
#elif FAULT == 2
    barrier = reinterpret_cast<unsigned long long*>(reinterpret_cast<char*>(barriers) + 4);
#endif
    if (threadIdx.x == 0) mbarrier_init(barrier, FAULT != 3);
    __syncthreads();
    const int id = FAULT != 6, threads = FAULT == 7 ? 48 : 64;
    if (threadIdx.x < 32) {
        if (threadIdx.x == 0) {
            values[0] = input[0];
            mbarrier_arrive(barrier);
#if FAULT == 5
            mbarrier_arrive(barrier);
#endif
        }
#if FAULT != 8
        named_barrier_sync(id, threads);
#endif
    } else {
        mbarrier_wait(barrier, FAULT == 4 ? 2 : 0);
        if (threadIdx.x == 63) values[1] = values[0];
        named_barrier_arrive(id, threads);
#if FAULT == 8
        named_barrier_arrive(id, threads);
#endif
    }
    if (threadIdx.x < 32) output[threadIdx.x] = values[1];
}
