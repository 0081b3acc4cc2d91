// Included after a kernel, exports what the launcher needs. CUPAGED_HOST_ENTRY is the kernel,
// CUPAGED_HOST_MAX_THREADS its launch bound.
#pragma once

#include <type_traits>
#include <utility>

#include "host_runtime.h"

// The linker defines these around the section .bss.
extern "C" {
extern char __bss_start[] __attribute__((visibility("hidden")));
extern char _end[] __attribute__((visibility("hidden")));
}

namespace cupaged_host {

template <typename T>
constexpr char param_kind() {
    if (std::is_pointer_v<T>) return std::is_const_v<std::remove_pointer_t<T>> ? 'c' : 'p';
    return std::is_floating_point_v<T> ? 'f' : 'i';
}

template <typename... P>
struct Entry {
    static constexpr int sizes[] = {static_cast<int>(sizeof(P))...};
    static constexpr char kinds[] = {param_kind<P>()..., '\0'};

    template <void (*function)(P...)>
    static void call(void** args) {
        apply<function>(args, std::index_sequence_for<P...>());
    }
    template <void (*function)(P...), size_t... I>
    static void apply(void** args, std::index_sequence<I...>) {
        function(*static_cast<P*>(args[I])...);
    }
};

template <auto function, typename... P>
constexpr Kernel describe(void (*)(P...)) {
    using E = Entry<P...>;
    return {E::template call<function>, sizeof...(P), E::sizes, E::kinds,
            CUPAGED_HOST_MAX_THREADS,   __bss_start,  _end};
}

constexpr Kernel kernel = describe<::CUPAGED_HOST_ENTRY>(::CUPAGED_HOST_ENTRY);

}  // namespace cupaged_host

extern "C" __attribute__((visibility("default"))) const cupaged_host::Kernel*
cupaged_host_kernel() {
    return &cupaged_host::kernel;
}
