// What -fsanitize code in the kernels calls: each report becomes the error of the launch, with its
// line. The compiler's own runtime library prints and goes on, and is not always installed.
#include "host_runtime.h"

#include <cstdint>
#include <cstring>

namespace {

struct Location {
    const char* file;
    uint32_t line;
    uint32_t column;
};

[[noreturn]] void report(const void* data, const char* what) {
    // Every report starts with its location.
    const Location& at = *static_cast<const Location*>(data);
    const char* const slash = std::strrchr(at.file, '/');
    cupaged_host::fail("%s at %s:%u:%u", what, slash != nullptr ? slash + 1 : at.file, at.line,
                       at.column);
}

}  // namespace

// The compiler fixes these names and parameters, of which the first is enough.
#define CUPAGED_HOST_REPORT(kind, what, ...)                                       \
    extern "C" void __ubsan_handle_##kind##_abort(const void* data, __VA_ARGS__) { \
        report(data, what);                                                        \
    }

CUPAGED_HOST_REPORT(out_of_bounds, "array index out of bounds", void*)
CUPAGED_HOST_REPORT(shift_out_of_bounds, "undefined shift", void*, void*)
CUPAGED_HOST_REPORT(add_overflow, "integer overflow", void*, void*)
CUPAGED_HOST_REPORT(sub_overflow, "integer overflow", void*, void*)
CUPAGED_HOST_REPORT(mul_overflow, "integer overflow", void*, void*)
CUPAGED_HOST_REPORT(negate_overflow, "integer overflow", void*)
CUPAGED_HOST_REPORT(divrem_overflow, "integer division overflow", void*, void*)
CUPAGED_HOST_REPORT(type_mismatch_v1, "misaligned address", void*)
