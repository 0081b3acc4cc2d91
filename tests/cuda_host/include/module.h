// Included after a kernel, exports what the launcher needs. CUPAGED_HOST_ENTRY is the kernel,
// CUPAGED_HOST_MAX_THREADS its launch bound, CUPAGED_HOST_FIELDS(F) applies F to the name of each
// field of the struct that is its only parameter, and is not there for a kernel with others.
#pragma once

#include <cstddef>
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
struct Parameters {
    static constexpr Argument arguments[] = {{0, static_cast<int>(sizeof(P)), param_kind<P>()}...};
    static constexpr int struct_size = 0;
};

#ifdef CUPAGED_HOST_FIELDS
// Whether so many values initialise a struct.
struct Anything {
    template <typename T>
    operator T() const;
};
template <typename S, size_t... I>
constexpr auto takes(std::index_sequence<I...>) -> decltype(S{(I, Anything())...}, true) {
    return true;
}
template <typename S>
constexpr bool takes(...) {
    return false;
}

template <typename S>
struct Fields {
#define CUPAGED_HOST_FIELD(name) \
    {offsetof(S, name), sizeof(S::name), param_kind<decltype(S::name)>()},
    static constexpr Argument arguments[] = {CUPAGED_HOST_FIELDS(CUPAGED_HOST_FIELD)};
    static constexpr int struct_size = sizeof(S);
    static constexpr size_t count = sizeof(arguments) / sizeof(Argument);
    static_assert(takes<S>(std::make_index_sequence<count>()) &&
                      !takes<S>(std::make_index_sequence<count + 1>()),
                  "the struct has fields that are not named");
};
#endif

template <typename... P>
struct Entry {
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
#ifdef CUPAGED_HOST_FIELDS
    using A = Fields<P...>;
#else
    using A = Parameters<P...>;
#endif
    return {Entry<P...>::template call<function>,
            sizeof(A::arguments) / sizeof(Argument),
            A::arguments,
            A::struct_size,
            CUPAGED_HOST_MAX_THREADS,
            __bss_start,
            _end};
}

constexpr Kernel kernel = describe<::CUPAGED_HOST_ENTRY>(::CUPAGED_HOST_ENTRY);

}  // namespace cupaged_host

extern "C" __attribute__((visibility("default"))) const cupaged_host::Kernel*
cupaged_host_kernel() {
    return &cupaged_host::kernel;
}
