// Every shuffle, vote and counting barrier, with the arguments that a line of `output` names.
extern "C" __global__ void collectives(const int* input, int* output) {
    const int n = blockDim.x;
    const int i = threadIdx.x;
    const int lane = i % 32;
    const unsigned all = 0xffffffffu;
    const int x = input[i];
    int* row = output + i;
    auto put = [&](int value) {
        *row = value;
        row += n;
    };
    put(__shfl_sync(all, x, 5));
    put(__shfl_sync(all, x, lane + 3, 8));
    put(__shfl_up_sync(all, x, 3));
    put(__shfl_up_sync(all, x, 3, 16));
    put(__shfl_down_sync(all, x, 3));
    put(__shfl_down_sync(all, x, 3, 8));
    put(__shfl_xor_sync(all, x, 9));
    put(__shfl_xor_sync(all, x, 9, 8));
    put(static_cast<int>(__ballot_sync(all, x % 3 == 0)));
    put(__any_sync(all, x == 40));
    put(__all_sync(all, x != 40));
    const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
    put(__shfl_sync(half, x, lane < 16 ? 2 : 18));
    put(static_cast<int>(__ballot_sync(half, x % 2 == 0)));
    put(__syncthreads_count(x % 5 == 0));
    put(__syncthreads_or(x == 40));
    put(__syncthreads_and(x != 40));
    const double wide = __shfl_xor_sync(all, static_cast<double>(x) * 0.5, 1);
    put(static_cast<int>(2.0 * wide));
}
