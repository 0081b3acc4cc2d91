// Tensor core instructions for the emulation: ldmatrix and mma.sync.m16n8k16, with the layouts of
// the PTX manual. Lane = 4 * g + t below; elements are 16 bits wide, two to a register.
//
//   8x8 matrix   register: row g, columns 2t and 2t + 1
//   A (16x16)    four 8x8 matrices: rows 0-7 left, rows 8-15 left, rows 0-7 right, rows 8-15 right
//   B (16x8)     register r: rows 8r + 2t and 8r + 2t + 1 of column g
//   C (16x8)     float i: row g + 8 * (i / 2), column 2t + i % 2
#pragma once

#include <cstdint>
#include <cstring>

#include "host_runtime.h"

namespace cupaged_host {

struct LoadMatrix {
    const void* row;  // of 8 elements
    int count;
    bool transpose;
    unsigned* registers;
};

// Lanes 8m to 8m + 7 hold the addresses of the rows of matrix m.
inline void resolve_load_matrix(void* const* operands, unsigned) {
    const auto operand = [&](int lane) { return static_cast<const LoadMatrix*>(operands[lane]); };
    const LoadMatrix& first = *operand(0);
    for (int m = 0; m < first.count; ++m) {
        uint16_t matrix[8][8];
        for (int row = 0; row < 8; ++row) memcpy(matrix[row], operand(8 * m + row)->row, 16);
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, t = lane % 4;
            const uint16_t low = first.transpose ? matrix[2 * t][g] : matrix[g][2 * t];
            const uint16_t high = first.transpose ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
            operand(lane)->registers[m] = low | static_cast<unsigned>(high) << 16;
        }
    }
}

template <int count, bool transpose>
void load_matrix(unsigned (&registers)[count], const void* row, Site site) {
    // Addresses of lanes beyond the last matrix are not used.
    if (current_lane() < 8 * count) require_shared(row, 16, 16, "ldmatrix");
    LoadMatrix operands{row, count, transpose, registers};
    warp_collective(resolve_load_matrix, &operands, 0xffffffffu, "ldmatrix", site);
}

struct MultiplyAdd {
    float* c;
    const unsigned* a;
    const unsigned* b;
};

template <typename T>
float element(const unsigned* registers, int index) {
    T value;
    memcpy(&value, reinterpret_cast<const char*>(registers) + 2 * index, 2);
    return static_cast<float>(value);
}

template <typename T>
void resolve_multiply_add(void* const* operands, unsigned) {
    static_assert(sizeof(T) == 2, "__half or __nv_bfloat16");
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const auto& operand = *static_cast<const MultiplyAdd*>(operands[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int r = 0; r < 4; ++r)
            for (int e = 0; e < 2; ++e)
                a[g + 8 * (r % 2)][8 * (r / 2) + 2 * t + e] = element<T>(operand.a, 2 * r + e);
        for (int r = 0; r < 2; ++r)
            for (int e = 0; e < 2; ++e) b[8 * r + 2 * t + e][g] = element<T>(operand.b, 2 * r + e);
    }
    for (int lane = 0; lane < 32; ++lane) {
        const auto& operand = *static_cast<const MultiplyAdd*>(operands[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i) {
            float sum = 0.0f;
            for (int k = 0; k < 16; ++k) sum += a[g + 8 * (i / 2)][k] * b[k][2 * t + i % 2];
            operand.c[i] += sum;
        }
    }
}

}  // namespace cupaged_host

namespace cupaged {

// Load 1, 2 or 4 matrices of 8x8 16-bit elements from shared memory; lane 8m + r gives the address
// of row r of matrix m.
inline void ldmatrix_x1(unsigned (&registers)[1], const void* row, CUPAGED_HOST_SITE) {
    cupaged_host::load_matrix<1, false>(registers, row, {file, line});
}
inline void ldmatrix_x2(unsigned (&registers)[2], const void* row, CUPAGED_HOST_SITE) {
    cupaged_host::load_matrix<2, false>(registers, row, {file, line});
}
inline void ldmatrix_x4(unsigned (&registers)[4], const void* row, CUPAGED_HOST_SITE) {
    cupaged_host::load_matrix<4, false>(registers, row, {file, line});
}
// The same, each matrix transposed.
inline void ldmatrix_x1_trans(unsigned (&registers)[1], const void* row, CUPAGED_HOST_SITE) {
    cupaged_host::load_matrix<1, true>(registers, row, {file, line});
}
inline void ldmatrix_x2_trans(unsigned (&registers)[2], const void* row, CUPAGED_HOST_SITE) {
    cupaged_host::load_matrix<2, true>(registers, row, {file, line});
}
inline void ldmatrix_x4_trans(unsigned (&registers)[4], const void* row, CUPAGED_HOST_SITE) {
    cupaged_host::load_matrix<4, true>(registers, row, {file, line});
}

// c += a * b. T is the type of a and b, __half or __nv_bfloat16.
template <typename T>
void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                  CUPAGED_HOST_SITE) {
    cupaged_host::MultiplyAdd operands{c, a, b};
    cupaged_host::warp_collective(cupaged_host::resolve_multiply_add<T>, &operands, 0xffffffffu,
                                  "mma_m16n8k16", {file, line});
}

}  // namespace cupaged
