// A stand-in for libcuda.so.1: what CuPy's wrapper of the driver calls to load a kernel and to
// launch it.
//
// It has no GPU. A launch goes, with everything it was given, to the function that was set.
#include <cuda.h>

#include <algorithm>
#include <cstring>
#include <elf.h>
#include <fstream>
#include <iterator>
#include <string>

namespace {

using Launch = int (*)(const void* function, const unsigned* shape, const void* stream,
                       void** params, void** extra);
Launch launch = nullptr;

struct Module {
    std::string image;
};

struct Function {
    int dynamic_shared_memory = 0;
};

}  // namespace

extern "C" {

// Shape: the grid's three sizes, the block's three, and the bytes of dynamic shared memory.
__attribute__((visibility("default"))) void cupaged_set_launch(Launch function) {
    launch = function;
}

__attribute__((visibility("default"))) int cupaged_dynamic_shared_memory(const Function* function) {
    return function->dynamic_shared_memory;
}

CUresult cuGetErrorName(CUresult error, const char** text) {
    *text = error == CUDA_ERROR_NOT_FOUND ? "CUDA_ERROR_NOT_FOUND" : "CUDA_ERROR";
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult, const char** text) {
    *text = "refused by the stand-in for the driver";
    return CUDA_SUCCESS;
}

CUresult cuModuleLoad(CUmodule* module, const char* path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
    const std::string image{std::istreambuf_iterator<char>(file), {}};
    const auto* const header = reinterpret_cast<const Elf64_Ehdr*>(image.data());
    if (image.size() < sizeof(*header) || std::memcmp(header->e_ident, ELFMAG, SELFMAG) != 0)
        return CUDA_ERROR_INVALID_IMAGE;
    // It ends with one of its two tables.
    const size_t sections = header->e_shoff + size_t{header->e_shnum} * header->e_shentsize;
    const size_t segments = header->e_phoff + size_t{header->e_phnum} * header->e_phentsize;
    if (image.size() < std::max(sections, segments)) return CUDA_ERROR_INVALID_IMAGE;
    *module = reinterpret_cast<CUmodule>(new Module{image});
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    const std::string& image = reinterpret_cast<Module*>(module)->image;
    const std::string section = std::string(".text.") + name + '\0';
    if (image.find(section) == std::string::npos) return CUDA_ERROR_NOT_FOUND;
    *function = reinterpret_cast<CUfunction>(new Function);
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
        return CUDA_ERROR_INVALID_VALUE;
    reinterpret_cast<Function*>(function)->dynamic_shared_memory = value;
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                        unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                        CUstream stream, void** params, void** extra) {
    const unsigned shape[] = {grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes};
    return static_cast<CUresult>(launch(function, shape, stream, params, extra));
}

}  // extern "C"
