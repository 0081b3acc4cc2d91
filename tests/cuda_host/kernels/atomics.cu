// All threads of all blocks on the same words.
extern "C" __global__ void atomics(int* words, float* sum) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    atomicAdd(words, i);
    atomicSub(words + 1, 2);
    atomicMin(words + 2, i);
    atomicMax(words + 3, i);
    atomicAnd(words + 4, ~(1 << i % 8));
    atomicOr(words + 5, 1 << i % 8);
    atomicXor(words + 6, i);
    atomicCAS(words + 7, i, i + 1);
    atomicInc(reinterpret_cast<unsigned*>(words + 8), 6);
    atomicAdd(sum, 0.5f);
}
