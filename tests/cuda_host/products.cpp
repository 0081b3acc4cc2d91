// Products of a warpgroup (wgmma).
//
// Each warp has 16 rows of a product and ends it by itself, at the latest time that its waits
// allow. It reads shared memory when the product starts or when it ends, drawn for each block: the
// one shows data that is not there yet, the other data that is overwritten too early. From the
// start on the accumulators are poison, until a wait that is given them; nobody may write there
// meanwhile.
#include "warpgroup.h"

#include <algorithm>
#include <cstring>
#include <memory>

namespace cupaged_host {
namespace {

constexpr int kRows = 16;   // of a product, for one warp
constexpr int kDepth = 16;  // elements that a product sums over
constexpr int kMaxColumns = 256;
constexpr int kPanelColumns = 64;
constexpr unsigned kRowBytes = 128;  // of a panel
constexpr unsigned kAddressBits = 18;

using Vec = float __attribute__((vector_size(32)));
constexpr int kVec = 8;

// A matrix in shared memory, as its descriptor says.
struct Matrix {
    unsigned start;  // shared_offset()
    unsigned row_bytes;
    unsigned panel_bytes;
};

// The accumulators of one or more products, of all lanes.
struct Accumulators {
    float* d[kLanes];  // where they belong
    int columns;
    int under_way = 0;  // products
    alignas(32) float values[kRows][kMaxColumns];
};

struct StartedProduct {
    std::shared_ptr<Accumulators> d;
    bool a_in_registers;
    bool bfloat16;
    bool transposed;
    bool accumulate;
    Matrix a_matrix, b_matrix;
    Site site;
    alignas(32) float a[kRows][kDepth];
};

struct WarpProducts {
    bool fenced = false;
    std::vector<StartedProduct> open;
    std::deque<std::vector<StartedProduct>> groups;  // oldest first
    // Of products under way, or ended and not given to a wait.
    std::vector<std::shared_ptr<Accumulators>> accumulators;
};

std::vector<WarpProducts> warp_products;

float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

// Denormal numbers of 16 bits count, those of 32 are zeros here.
float from_float16(uint16_t code) {
    const uint32_t sign = static_cast<uint32_t>(code & 0x8000) << 16;
    const uint32_t exponent = code & 0x7c00;
    const uint32_t bits = static_cast<uint32_t>(code & 0x7fff) << 13;
    if (exponent == 0) {
        const float magnitude = from_bits(bits + (113u << 23)) - from_bits(113u << 23);
        return sign != 0 ? -magnitude : magnitude;
    }
    return from_bits(sign | (bits + (exponent == 0x7c00 ? 224u << 23 : 112u << 23)));
}

float from_code(uint16_t code, bool bfloat16) {
    return bfloat16 ? from_bits(static_cast<uint32_t>(code) << 16) : from_float16(code);
}

unsigned swizzle(unsigned offset) {
    return offset ^ (offset / kRowBytes % 8) * 16;  // by the address, not the row
}

// The chunks of 8 elements of a matrix with rows of 16: f(row, first element, offset).
template <typename Function>
void for_rows(const Matrix& matrix, int begin, int end, Function function) {
    for (int row = begin; row < end; ++row) {
        const unsigned offset = matrix.start + row / 8 * matrix.row_bytes + row % 8 * kRowBytes;
        for (int k = 0; k < kDepth; k += 8) function(row, k, swizzle(offset + 2 * k));
    }
}

// The chunks of a transposed matrix with 16 rows in panels: f(row, first column, offset).
template <typename Function>
void for_panels(const Matrix& matrix, int columns, Function function) {
    for (int k = 0; k < kDepth; ++k) {
        const unsigned offset = matrix.start + k / 8 * matrix.row_bytes + k % 8 * kRowBytes;
        for (int n = 0; n < columns; n += 8)
            function(
                k, n,
                swizzle(offset + n / kPanelColumns * matrix.panel_bytes + 2 * (n % kPanelColumns)));
    }
}

// The chunks of a that this warp reads, f(row of the warp, first element, offset), and those of b,
// g(row of its storage, first element, offset).
template <typename F, typename G>
void for_operands(const StartedProduct& product, F f, G g) {
    const int first_row = current_warp() % kWarpgroupWarps * kRows;
    if (!product.a_in_registers)
        for_rows(product.a_matrix, first_row, first_row + kRows,
                 [&](int row, int k, unsigned offset) { f(row - first_row, k, offset); });
    if (product.transposed)
        for_panels(product.b_matrix, product.d->columns, g);
    else
        for_rows(product.b_matrix, 0, product.d->columns, g);
}

void start_reads(StartedProduct& product) {
    const auto start = [&](int, int, unsigned offset) {
        if (shared_pointer(offset) == nullptr)
            fail("the product at %s:%d reads %s, which has an end before",
                 base_name(product.site.file), product.site.line, shared_place(offset).c_str());
        read_starts(offset, product.site);
    };
    for_operands(product, start, start);
}

void end_reads(const StartedProduct& product) {
    const auto end = [](int, int, unsigned offset) { read_ends(offset); };
    for_operands(product, end, end);
}

// Read shared memory, multiply.
void compute(StartedProduct& product) {
    alignas(32) float b[kDepth][kMaxColumns];
    const auto element = [&](const unsigned char* chunk, int i) {
        uint16_t code;
        std::memcpy(&code, chunk + 2 * i, 2);
        return from_code(code, product.bfloat16);
    };
    const int columns = product.d->columns;
    for_operands(
        product,
        [&](int row, int k, unsigned offset) {
            const unsigned char* const chunk = shared_pointer(offset);
            for (int i = 0; i < 8; ++i) product.a[row][k + i] = element(chunk, i);
        },
        [&](int row, int first, unsigned offset) {
            const unsigned char* const chunk = shared_pointer(offset);
            if (product.transposed)
                for (int i = 0; i < 8; ++i) b[row][first + i] = element(chunk, i);
            else
                for (int i = 0; i < 8; ++i) b[first + i][row] = element(chunk, i);
        });
    constexpr int kBlock = 4;  // rows at a time
    for (int row = 0; row < kRows; row += kBlock) {
        for (int n = 0; n < columns; n += kVec) {
            Vec sums[kBlock] = {};
            for (int k = 0; k < kDepth; ++k) {
                Vec factor;
                std::memcpy(&factor, &b[k][n], sizeof(factor));
                for (int i = 0; i < kBlock; ++i) sums[i] += product.a[row + i][k] * factor;
            }
            for (int i = 0; i < kBlock; ++i) {
                float* const target = &product.d->values[row + i][n];
                if (product.accumulate) {
                    Vec old;
                    std::memcpy(&old, target, sizeof(old));
                    sums[i] += old;
                }
                std::memcpy(target, &sums[i], sizeof(Vec));
            }
        }
    }
}

// Floats 4j to 4j + 3 of a lane are those of columns 8j to 8j + 7, see mma_host.h.
float& value_of(Accumulators& d, int lane, int index) {
    const int i = index % 4;
    return d.values[lane / 4 + 8 * (i / 2)][index / 4 * 8 + lane % 4 * 2 + i % 2];
}

int floats_of(const Accumulators& d) {
    return d.columns / 2;
}

Matrix decode(uint64_t descriptor, const Step& step) {
    const auto bytes = [&](int bit) {
        return static_cast<unsigned>(descriptor >> bit & 0x3fff) * 16;
    };
    constexpr uint64_t kUsed = 0x3fffull | 0x3fffull << 16 | 0x3fffull << 32 | 1ull << 62;
    if ((descriptor & ~kUsed) != 0 || descriptor >> 62 != 1)
        fail(
            "%s at %s:%d with the descriptor 0x%016llx, which is not one of a swizzle of 128 "
            "bytes without a base offset",
            step.name, base_name(step.site.file), step.site.line,
            static_cast<unsigned long long>(descriptor));
    const Matrix matrix{bytes(0), bytes(32), bytes(16)};
    if (matrix.row_bytes % kPatternBytes != 0)
        fail("%s at %s:%d with row_bytes %u, no multiple of 1024", step.name,
             base_name(step.site.file), step.site.line, matrix.row_bytes);
    return matrix;
}

// The bytes of a row that a product takes must lie in the first of the 8 rows of a pattern.
void check_start(const Matrix& matrix, int columns, const Step& step) {
    const unsigned in_pattern = matrix.start % kPatternBytes;
    if (in_pattern >= kRowBytes)
        fail("%s at %s:%d on a panel at %s, which does not start at a multiple of 1024", step.name,
             base_name(step.site.file), step.site.line, shared_place(matrix.start).c_str());
    if (in_pattern + 2 * columns > kRowBytes)
        fail("%s at %s:%d from byte %u of a panel's rows on, beyond their end", step.name,
             base_name(step.site.file), step.site.line, in_pattern);
}

// Between the start of a product and the wait that is given its accumulators nobody writes there.
void check_untouched(const Accumulators& d, const Step& step) {
    unsigned char poison[sizeof(float) * kMaxColumns / 2];
    std::memset(poison, kPoison, sizeof(poison));
    for (const float* const mine : d.d)
        if (std::memcmp(mine, poison, sizeof(float) * floats_of(d)) != 0)
            fail("%s at %s:%d: its accumulators were written before a wait for them", step.name,
                 base_name(step.site.file), step.site.line);
}

struct ProductCall {
    Step step;
    Product product;
};

// The accumulators that the product adds to, poisoned. Products on them may be under way.
std::shared_ptr<Accumulators> take_accumulators(WarpProducts& warp, void* const* operands,
                                                const Step& step) {
    const auto product = [&](int lane) -> const Product& {
        return static_cast<const ProductCall*>(operands[lane])->product;
    };
    const int columns = product(0).columns;
    std::shared_ptr<Accumulators> d;
    auto& all = warp.accumulators;
    for (size_t i = 0; i < all.size();) {
        Accumulators& other = *all[i];
        const float* const begin = product(0).d;
        if (other.d[0] == begin && other.columns == columns) {
            d = all[i++];
            check_untouched(other, step);
        } else if (begin < other.d[0] + floats_of(other) && other.d[0] < begin + columns / 2) {
            if (other.under_way > 0)
                fail("%s at %s:%d on a part of the accumulators of a product under way", step.name,
                     base_name(step.site.file), step.site.line);
            all.erase(all.begin() + static_cast<std::ptrdiff_t>(i));
        } else {
            ++i;
        }
    }
    if (d == nullptr) {
        d = std::make_shared<Accumulators>();
        d->columns = columns;
        for (int lane = 0; lane < kLanes; ++lane) {
            d->d[lane] = product(lane).d;
            for (int i = 0; i < floats_of(*d); ++i) value_of(*d, lane, i) = d->d[lane][i];
        }
        all.push_back(d);
    }
    for (int lane = 0; lane < kLanes; ++lane)
        std::memset(d->d[lane], kPoison, sizeof(float) * floats_of(*d));
    return d;
}

void resolve_product(void* const* operands, unsigned mask) {
    const ProductCall& call = common_call<ProductCall>(operands, mask);
    const Step& step = call.step;
    take_step(step);
    WarpProducts& warp = warp_products[current_warp()];
    if (!warp.fenced)
        fail("%s at %s:%d without a wgmma_fence since the last wait", step.name,
             base_name(step.site.file), step.site.line);
    const Product& product = call.product;
    StartedProduct started;
    started.a_in_registers = product.a != nullptr;
    started.bfloat16 = product.bfloat16;
    started.transposed = product.transposed;
    started.accumulate = product.accumulate;
    started.site = step.site;
    if (started.a_in_registers) {
        for (int lane = 0; lane < kLanes; ++lane) {
            const unsigned* const a = static_cast<const ProductCall*>(operands[lane])->product.a;
            for (int r = 0; r < 4; ++r)
                for (int e = 0; e < 2; ++e)
                    started.a[lane / 4 + 8 * (r % 2)][8 * (r / 2) + lane % 4 * 2 + e] =
                        from_code(static_cast<uint16_t>(a[r] >> (16 * e)), product.bfloat16);
        }
    } else {
        started.a_matrix = decode(product.a_matrix, step);
        check_start(started.a_matrix, kDepth, step);
    }
    started.b_matrix = decode(product.b_matrix, step);
    check_start(started.b_matrix,
                product.transposed ? std::min(product.columns, kPanelColumns) : kDepth, step);
    if (product.transposed && product.columns > kPanelColumns &&
        started.b_matrix.panel_bytes % kPatternBytes != 0)
        fail("%s at %s:%d with panel_bytes %u, no multiple of 1024", step.name,
             base_name(step.site.file), step.site.line, started.b_matrix.panel_bytes);
    started.d = take_accumulators(warp, operands, step);
    ++started.d->under_way;
    start_reads(started);
    if (machine.early_reads) compute(started);
    warp.open.push_back(std::move(started));
}

void resolve_fence(void* const* operands, unsigned mask) {
    take_step(common_call<StepCall>(operands, mask).step);
    warp_products[current_warp()].fenced = true;
}

void resolve_commit(void* const* operands, unsigned mask) {
    take_step(common_call<StepCall>(operands, mask).step);
    WarpProducts& warp = warp_products[current_warp()];
    warp.groups.push_back(std::move(warp.open));
    warp.open.clear();
}

void resolve_wait(void* const* operands, unsigned mask) {
    const Step& step = common_call<StepCall>(operands, mask).step;
    take_step(step);
    WarpProducts& warp = warp_products[current_warp()];
    warp.fenced = false;
    while (warp.groups.size() > step.operands[0]) {
        for (StartedProduct& product : warp.groups.front()) {
            if (!machine.early_reads) compute(product);
            end_reads(product);
            --product.d->under_way;
        }
        warp.groups.pop_front();
    }
    const auto deliver = [&](const std::shared_ptr<Accumulators>& d) {
        const auto call = [&](int lane) { return static_cast<const StepCall*>(operands[lane]); };
        if (d->under_way > 0 || d->d[0] < call(0)->begin || d->d[0] + floats_of(*d) > call(0)->end)
            return false;
        check_untouched(*d, step);
        for (int lane = 0; lane < kLanes; ++lane)
            for (int i = 0; i < floats_of(*d); ++i) d->d[lane][i] = value_of(*d, lane, i);
        return true;
    };
    auto& all = warp.accumulators;
    all.erase(std::remove_if(all.begin(), all.end(), deliver), all.end());
}

}  // namespace

void reset_products() {
    warp_products.clear();
    warp_products.resize(machine.warps.size());
}

uint64_t wgmma_descriptor(const void* start, int row_bytes, int panel_bytes, Site site) {
    const unsigned offset = shared_offset(start);
    if (offset % 16 != 0)
        fail("wgmma_descriptor at %s:%d of %p, which is no multiple of 16", base_name(site.file),
             site.line, start);
    for (const int bytes : {row_bytes, panel_bytes})
        if (bytes < 0 || bytes >= 1 << kAddressBits || bytes % 16 != 0)
            fail(
                "wgmma_descriptor at %s:%d with a distance of %d bytes, it must be a multiple of "
                "16 below 2^18",
                base_name(site.file), site.line, bytes);
    return offset >> 4 | static_cast<uint64_t>(panel_bytes >> 4) << 16 |
           static_cast<uint64_t>(row_bytes >> 4) << 32 | 1ull << 62;
}

void wgmma_fence(Site site) {
    collective(resolve_fence, {{"wgmma_fence", {}, site}});
}

void wgmma_commit(Site site) {
    collective(resolve_commit, {{"wgmma_commit", {}, site}});
}

void wgmma_wait(int newest_in_flight, float* begin, float* end, Site site) {
    collective(resolve_wait,
               {{"wgmma_wait", {static_cast<uint64_t>(newest_in_flight)}, site}, begin, end});
}

void wgmma(const Product& product, Site site) {
    ProductCall call{
        {"wgmma", {product.a_matrix, product.b_matrix, product.accumulate ? 1u : 0u}, site},
        product};
    warp_collective(resolve_product, &call, machine.warps[current_warp()].live, "wgmma", site);
}

}  // namespace cupaged_host
