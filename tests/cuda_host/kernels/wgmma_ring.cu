// out = 2 * (a * keys^T) * values, a [128, 64], keys [64 * tiles, 64], values [64 * tiles, 128],
// all in small integers. A warpgroup copies tiles of 64 keys and values into a ring of two stages,
// two others multiply. `fault` says what is wrong.
#include "common.cuh"
#include "ptx_sm90.cuh"

enum Fault {
    kNone,
    // Of those that multiply.
    kMissingProductWait,
    kProductWaitTooWeak,
    kMissingCommit,
    kMissingProductFence,
    kUseBeforeWait,
    kOtherAccumulatorsInWait,
    kWriteBeforeWait,
    kScaleBeforeWait,
    kWrongRowBytes,
    kWrongPanelBytes,
    kMissingFullWait,
    kPhaseNotFlipped,
    kEarlyRelease,
    kWarpSkipsProduct,
    // Of the one that copies.
    kMissingSwizzle,
    kMissingEmptyWait,
    kEmptyParityWrong,
    kMissingProxyFence,
    kProxyFenceBeforeCopies,
    kMissingProxyFenceAfterStore,
    kMissingCopyWait,
    kMissingWarpSync,
    // Of the block.
    kPanelsNotAligned,
    kBarrierNotInitialised,
    kBarrierInitialisedTwice,
    kCountTooLarge,
    kTooFewThreads,
    kDifferentThreads,
    kMissingNamedBarrier,
    kTooManyRegisters,
};

namespace cupaged {

constexpr int kStages = 2, kConsumers = 2, kTile = 64, kDepth = 64, kColumns = 128;
constexpr int kRowBytes = 1024, kPanelBytes = 128 * kTile;
constexpr int kWarpgroupWarps = kWarpgroupSize / kWarpSize;
constexpr int kThreads = (1 + kConsumers) * kWarpgroupSize;

struct Shared {
    uint4 a[64 * kConsumers * 8];
    struct {
        uint4 keys[kTile * 8];
        uint4 values[2][kTile * 8];
    } stages[kStages];
    unsigned long long full[kStages], empty[kStages];
    float factor;
};

__device__ void copy_tile(Shared& shared, int stage, const scalar_t* keys, const scalar_t* values,
                          int tile, int fault) {
    constexpr int kChunks = (kDepth + kColumns) / 8;
    for (int i = threadIdx.x; i < kTile * kChunks; i += kWarpgroupSize) {
        const int row = i / kChunks, token = tile * kTile + row;
        int chunk = i % kChunks;
        const bool key = chunk < kDepth / 8;
        if (!key) chunk -= kDepth / 8;
        const scalar_t* const source =
            key ? keys + token * kDepth + 8 * chunk : values + token * kColumns + 8 * chunk;
        uint4* const panel =
            key ? shared.stages[stage].keys : shared.stages[stage].values[chunk / 8];
        const int place = fault == kMissingSwizzle ? chunk % 8 : swizzle_chunk(row, chunk % 8);
        cp_async_16(panel + row * 8 + place, source);
    }
    cp_async_commit();
}

__device__ void produce(Shared& shared, const scalar_t* keys, const scalar_t* values, int tiles,
                        int fault) {
    if (threadIdx.x == 0) shared.factor = 2.0f;
    if (fault != kMissingNamedBarrier && fault != kTooFewThreads) named_barrier_arrive(1, kThreads);
    for (int tile = 0; tile < tiles; ++tile) {
        const int stage = tile % kStages;
        int parity = tile / kStages % 2 ^ 1;
        if (fault == kEmptyParityWrong) parity ^= 1;
        if (fault != kMissingEmptyWait) mbarrier_wait(&shared.empty[stage], parity);
        copy_tile(shared, stage, keys, values, tile, fault);
        if (fault == kProxyFenceBeforeCopies) fence_proxy_async();
        if (fault != kMissingCopyWait) cp_async_wait<0>();
        if (fault != kMissingProxyFence && fault != kProxyFenceBeforeCopies) fence_proxy_async();
        if (fault != kMissingWarpSync) __syncwarp();
        if (threadIdx.x % kWarpSize == 0) mbarrier_arrive(&shared.full[stage]);
    }
}

__device__ void consume(Shared& shared, float* out, int tiles, int fault) {
    const int consumer = static_cast<int>(threadIdx.x) / kWarpgroupSize - 1;
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize % 4;
    const int lane = threadIdx.x % kWarpSize;
    const auto release = [&](int stage) {
        __syncwarp();
        if (lane == 0) mbarrier_arrive(&shared.empty[stage]);
    };
    if (fault != kMissingNamedBarrier)
        named_barrier_sync(1, fault == kDifferentThreads ? 2 * kWarpgroupSize : kThreads);
    const float factor = shared.factor;
    float sum[kColumns / 8][4];
    const auto scale = [&] {
        for (int n = 0; n < kColumns / 8; ++n)
            for (int i = 0; i < 4; ++i) sum[n][i] *= factor;
    };
    for (int tile = 0; tile < tiles; ++tile) {
        const int stage = tile % kStages;
        const int parity = fault == kPhaseNotFlipped ? 0 : tile / kStages % 2;
        if (fault != kMissingFullWait) mbarrier_wait(&shared.full[stage], parity);
        const int row_bytes = fault == kWrongRowBytes ? 2 * kRowBytes : kRowBytes;
        float score[kTile / 8][4];
        if (fault != kMissingProductFence) wgmma_fence();
        for (int step = 0; step < kDepth / 16; ++step) {
            if (fault == kWarpSkipsProduct && warp == 3 && step == 2) continue;
            Wgmma<scalar_t, kTile>::shared(
                score, wgmma_descriptor(shared.a + consumer * 64 * 8 + 2 * step, kRowBytes, 0),
                wgmma_descriptor(shared.stages[stage].keys + 2 * step, row_bytes, 0), step > 0);
        }
        if (fault != kMissingCommit) wgmma_commit();
        unsigned packed[kTile / 16][4];
        const auto pack = [&] {
            for (int step = 0; step < kTile / 16; ++step)
                for (int r = 0; r < 4; ++r) {
                    const float* const pair = &score[2 * step + r / 2][2 * (r % 2)];
                    const scalar_t words[2] = {static_cast<scalar_t>(pair[0]),
                                               static_cast<scalar_t>(pair[1])};
                    memcpy(&packed[step][r], words, 4);
                }
        };
        if (fault == kUseBeforeWait) pack();
        if (fault == kProductWaitTooWeak)
            wgmma_wait<1>(score);
        else if (fault == kOtherAccumulatorsInWait)
            wgmma_wait<0>(sum);
        else if (fault != kMissingProductWait)
            wgmma_wait<0>(score);
        if (fault != kUseBeforeWait) pack();
        if (fault != kMissingProductFence) wgmma_fence();
        for (int step = 0; step < kTile / 16; ++step)
            Wgmma<scalar_t, kColumns>::registers(
                sum, packed[step],
                wgmma_descriptor(shared.stages[stage].values[0] + step * 16 * 8, row_bytes,
                                 fault == kWrongPanelBytes ? kPanelBytes / 2 : kPanelBytes),
                tile + step > 0);
        wgmma_commit();
        if (fault == kEarlyRelease) release(stage);
        if (fault == kWriteBeforeWait) sum[0][0] = 0.0f;
        if (fault == kScaleBeforeWait && tile == tiles - 1) scale();
        wgmma_wait<0>(sum);
        if (fault != kEarlyRelease) release(stage);
    }
    if (fault != kScaleBeforeWait) scale();
    for (int n = 0; n < kColumns / 8; ++n)
        for (int i = 0; i < 4; ++i) {
            const int row = 64 * consumer + 16 * warp + lane / 4 + 8 * (i / 2);
            out[row * kColumns + 8 * n + lane % 4 * 2 + i % 2] = sum[n][i];
        }
}

}  // namespace cupaged

extern "C" __global__ void wgmma_ring(const scalar_t* a, const scalar_t* keys,
                                      const scalar_t* values, float* out, int tiles, int fault) {
    using namespace cupaged;
    CUPAGED_DYNAMIC_SMEM(bytes, 1024);
    Shared& shared =
        *reinterpret_cast<Shared*>(bytes + (fault == kPanelsNotAligned ? kRowBytes / 2 : 0));
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
            const int warps = kConsumers * kWarpgroupWarps;
            if (fault != kBarrierNotInitialised || stage == 0)
                mbarrier_init(&shared.full[stage], kWarpgroupWarps + (fault == kCountTooLarge));
            mbarrier_init(&shared.empty[stage], warps);
            if (fault == kBarrierInitialisedTwice) mbarrier_init(&shared.empty[stage], warps);
        }
    }
    for (int i = threadIdx.x; i < 64 * kConsumers * 8; i += kThreads) {
        uint4 raw;
        memcpy(&raw, a + 8 * i, sizeof(raw));
        store_for_async_proxy(shared.a + i / 8 * 8 + swizzle_chunk(i / 8, i % 8), raw);
    }
    if (fault != kMissingProxyFenceAfterStore) fence_proxy_async();
    __syncthreads();
    if (threadIdx.x < kWarpgroupSize) {
        if (fault == kTooManyRegisters)
            decrease_registers<48>();
        else
            decrease_registers<40>();
        produce(shared, keys, values, tiles, fault);
    } else {
        increase_registers<232>();
        consume(shared, out, tiles, fault);
    }
}
