// A kernel with launch bounds.
namespace limits {
constexpr int kThreads = 64;
}
extern "C" __global__ void __launch_bounds__(limits::kThreads, 2) bounded(int* output) {
    output[threadIdx.x] = threadIdx.x;
}
