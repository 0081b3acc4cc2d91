// Attention of variable-length queries over their paged cache, on Hopper's tensor cores: prefill,
// chunked prefill, mixed batches.
//
//   query            [T, H, D], contiguous in D      out  the same
//   kv_cache         [num_blocks, 2, Hkv, B, D]      lse  float32 [T, H] or null
//   block_tables     int32 [S, max_blocks]
//   seq_lens         int32 [S]
//   query_start_loc  int32 [S + 1]
//   k_scale, v_scale  not used: the cache is of the query's type
//
// A block takes one KV head and kTileRows query rows of one sequence. A row is a (token, head)
// pair: the `tile_heads` query heads of kTileRows / tile_heads tokens, as in paged_prefill_mma.cu.
//
// Three warpgroups. The first gathers keys and values out of their pages with cp.async, a tile of
// kTileKeys after the other, into a ring of kStages. A stage holds the keys of tile p and the
// values of tile p - 1, which is what a consumer takes in one go. Its lanes each find the address
// of a row and pass it on by shuffles. The other two warpgroups have 64 rows each: they start the
// product of tile p's logits and that of tile p - 1's values together, and while the second runs
// they take the softmax of the first. They start in turns, so that one's softmax falls into the
// other's products.
//
// Everything that products read lies in swizzled panels of 64 columns, see ptx_sm90.cuh.
//
// Dynamic shared memory: kTileRows rows of the query, and kStages tiles of kTileKeys keys and of as
// many values, each row in panels of 128 bytes: 224 KiB at D = 128 (128 keys, 3 stages).
//
// Predicted for an H100 at D = 128, not measured yet: a tile takes 2048 clocks of products, 1024 of
// exponentials beside them, and 64 KB from the L2 cache, which gives each multiprocessor some 24
// bytes a clock. So the cache is the bound, at three quarters of the tensor cores' peak, as long as
// blocks that run together read the same sequence. Of the tile's 8192 issue slots the copies take
// 1100, the descriptors 400, and the softmax some 2800. More rows would need fewer bytes, but three
// consumers leave 160 registers to each. TMA is not used: it could take a page at a time, but not
// stop in one, and what lies behind the last token may be NaN, which no probability of 0 removes.
//
// Macros CUPAGED_DTYPE (fp16 or bf16), CUPAGED_HEAD_SIZE (D, a multiple of 8, at most 256),
// CUPAGED_TILE_KEYS (a multiple of 16, see Wgmma), CUPAGED_STAGES.
#include "common.cuh"
#include "attention_arguments.cuh"
#include "mma_attention.cuh"
#include "split_output.cuh"
#include "paged.cuh"
#include "prefill_tiles.cuh"
#include "ptx_sm90.cuh"

namespace cupaged {

constexpr int kWarpgroupWarps = kWarpgroupSize / kWarpSize;
constexpr int kConsumers = 2;  // warpgroups
constexpr int kThreads = (1 + kConsumers) * kWarpgroupSize;
constexpr int kGroupRows = 64;  // of a consumer
constexpr int kTileRows = kConsumers * kGroupRows;
constexpr int kTileKeys = CUPAGED_TILE_KEYS;
constexpr int kKeyTiles = kTileKeys / 16;
constexpr int kStages = CUPAGED_STAGES;
constexpr int kPanels = ceil_div(kHeadSize, 64);
constexpr int kRowBytes = 1024;               // of 8 rows of a panel
constexpr int kPanelBytes = 128 * kTileKeys;  // of keys or values
constexpr int kQueryPanelBytes = 128 * kTileRows;
// Of the output, as many as whole panels have: beyond kHeadSize they are never read, and neither is
// it said that a product may end inside a panel.
constexpr int kColumns = 64 * kPanels;
// Stages that the producer has under way when it waits for the one before them.
constexpr int kInFlight = kStages - 2;
static_assert(kInFlight == 0 || kInFlight == 1, "it hands over one stage at a time");
// Registers of a thread: 128 * (40 + 2 * 232) are what a block of 384 threads is launched with, 168
// each, the most that 65536 allow.
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;
// Larger heads have no time for it: their products are longer than the softmax.
constexpr bool kInTurns = kHeadSize <= 128;

enum NamedBarrier { kProducerBarrier = 1, kTurnBarrier = 2 };  // kTurnBarrier + consumer

// What a block works on.
struct Item {
    PrefillTile tile;
    int begin, end;  // the keys that some row of the tile sees
};

struct Shared {
    uint4 query[kPanels][kTileRows * 8];
    struct {
        uint4 keys[kPanels][kTileKeys * 8];
        uint4 values[kPanels][kTileKeys * 8];
    } stages[kStages];
    Item items[3];  // the next one, the one at hand, and one whose output is being written
    unsigned long long full[kStages], empty[kStages], query_empty;
};
static_assert(sizeof(Shared) <= CUPAGED_DYNAMIC_BYTES, "as launched");
static_assert(kThreads == CUPAGED_THREADS && kTileRows == CUPAGED_PREFILL_WGMMA_ROWS,
              "as launched");

// Which stage comes next, and which of its phases.
struct RingPosition {
    int stage = 0, phase = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == kStages) {
            stage = 0;
            phase ^= 1;
        }
    }
};

// One arrival of a warp, after all of its lanes.
__device__ __forceinline__ void arrive(unsigned long long* barrier) {
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) mbarrier_arrive(barrier);
}

__device__ __forceinline__ int num_key_tiles(const Item& item) {
    return item.end > item.begin ? (item.end - item.begin + kTileKeys - 1) / kTileKeys : 0;
}

// A row that this lane has found for its warp to copy.
struct Row {
    const scalar_t* data;  // of some row in any case
    bool valid;            // else zeros; rows after it are not valid either
};

// Begin copying kRows rows into panels. Each warp copies a quarter of them, lane i having found the
// i-th. What a copy takes besides itself counts: the consumers leave few issue slots.
template <int kRows, bool kAligned>
__device__ __forceinline__ void copy_rows(const Row& mine, uint4 (*panels)[kRows * 8]) {
    constexpr int kWarpRows = kRows / kWarpgroupWarps;
    constexpr int kRowLanes = next_power_of_two(kTileChunks);
    constexpr int kPassRows = kWarpSize / kRowLanes;
    static_assert(kRowLanes <= kWarpSize && kWarpRows % kPassRows == 0, "whole passes");
    static_assert(kWarpRows % 4 == 0, "the swizzle by a row is one by `first`, then one by `pass`");
    const int lane = threadIdx.x % kWarpSize;
    const int chunk = lane % kRowLanes;
    const int first = static_cast<int>(threadIdx.x) / kWarpSize * kWarpRows + lane / kRowLanes;
    const int chunk_in_row = swizzle_chunk(first, chunk % 8);
    uint4* row_target = panels[chunk / 8] + first * 8;
    int row = lane / kRowLanes;
    const int num_valid = __popc(__ballot_sync(kFullMask, mine.valid));
#pragma unroll(kAligned ? 4 : 1)
    for (int pass = 0; pass < kWarpRows; pass += kPassRows) {
        const scalar_t* const source =
            bit_cast<const scalar_t*>(
                __shfl_sync(kFullMask, bit_cast<unsigned long long>(mine.data), row)) +
            chunk * kVec;
        const bool read = row < num_valid && chunk < kChunks;
        uint4* const target = row_target + swizzle_chunk(pass, chunk_in_row);
        row += kPassRows;
        row_target += kPassRows * 8;
        if (chunk >= kTileChunks) continue;
        if (kAligned) {
            cp_async_16_zfill(target, source, read);
        } else {
            uint4 raw = make_uint4(0, 0, 0, 0);
            if (read) raw = load_vec(source, false);
            store_for_async_proxy(target, raw);
        }
    }
}

// The four words of each lane as a matrix of a quad: transposed.
__device__ __forceinline__ void transpose_quad(unsigned (&x)[4]) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
        const bool upper = (threadIdx.x & bit) != 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if ((i & bit) != 0) continue;
            const unsigned other = __shfl_xor_sync(kFullMask, upper ? x[i] : x[i + bit], bit);
            if (upper)
                x[i] = other;
            else
                x[i + bit] = other;
        }
    }
}

// Start the logits of 64 rows and a tile of keys.
__device__ __forceinline__ void start_logits(const uint4* query, const uint4* keys,
                                             float (&score)[2 * kKeyTiles][4]) {
    const unsigned long long a = wgmma_descriptor(query, kRowBytes, 0);
    const unsigned long long b = wgmma_descriptor(keys, kRowBytes, 0);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        const int panel = step / 4, in_row = step % 4 * 32;  // bytes
        Wgmma<scalar_t, kTileKeys>::shared(
            score, wgmma_advance(a, panel * kQueryPanelBytes + in_row),
            wgmma_advance(b, panel * kPanelBytes + in_row), step > 0);
    }
    wgmma_commit();
}

// Start adding a tile of values.
__device__ __forceinline__ void start_values(unsigned (&probabilities)[kKeyTiles][4],
                                             const uint4* values, float (&out)[kColumns / 8][4]) {
    const unsigned long long b = wgmma_descriptor(values, kRowBytes, kPanelBytes);
    keep_in_order(probabilities);
    keep_in_order(out);
    wgmma_fence();
#pragma unroll
    for (int tile = 0; tile < kKeyTiles; ++tile)
        Wgmma<scalar_t, kColumns>::registers(out, probabilities[tile],
                                             wgmma_advance(b, tile * 16 * 128), true);
    wgmma_commit();
}

__device__ __forceinline__ void pack_terms(const float (&score)[2 * kKeyTiles][4],
                                           unsigned (&probabilities)[kKeyTiles][4]) {
#pragma unroll
    for (int tile = 0; tile < kKeyTiles; ++tile)
#pragma unroll
        for (int j = 0; j < 4; ++j)
            probabilities[tile][j] = pack_pair(&score[2 * tile + j / 2][2 * (j % 2)]);
}

}  // namespace cupaged

extern "C" __global__ void __launch_bounds__(cupaged::kThreads, 1)
    paged_prefill_wgmma(const cupaged::PrefillArguments args) {
    using namespace cupaged;
    scalar_t* __restrict__ const out = args.out;
    float* __restrict__ const lse = args.lse;
    int* __restrict__ const workspace = args.workspace;
    float* __restrict__ const partials = args.partials;
    CUPAGED_DYNAMIC_SMEM(dynamic, 1024);
    Shared& shared = *reinterpret_cast<Shared*>(dynamic);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
            mbarrier_init(&shared.full[stage], kWarpgroupWarps);
            mbarrier_init(&shared.empty[stage], kConsumers * kWarpgroupWarps);
        }
        mbarrier_init(&shared.query_empty, kConsumers * kWarpgroupWarps);
    }
    __syncthreads();

    // From a shuffle the compiler knows that it is one number for the warp.
    const int warpgroup = __shfl_sync(kFullMask, static_cast<int>(threadIdx.x) / kWarpgroupSize, 0);
    const int lane = threadIdx.x % kWarpSize;
    RingPosition next;
    if (warpgroup == 0) {
        decrease_registers<kProducerRegisters>();
        const PagedCache<const scalar_t> cache = {args.kv_cache, args.block_stride,
                                                  args.num_kv_heads, args.block_shift, kHeadSize};
        constexpr int kWarpKeys = kTileKeys / kWarpgroupWarps;
        const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
        const PrefillSchedule schedule = prefill_schedule(workspace, args.num_seqs);
        const PrefillBatch batch{{args.seq_lens, args.query_start_loc, args.num_seqs,
                                  args.num_tokens, args.window, 0, args.max_splits, kMultiToken},
                                 kTileRows / args.tile_heads,
                                 args.num_heads,
                                 args.num_kv_heads,
                                 args.tile_heads,
                                 l2_tokens(kHeadSize * static_cast<int>(sizeof(scalar_t)))};
        RingPosition landing;
        int in_flight = 0;  // stages
        // What has landed is the consumers'.
        const auto hand_over = [&] {
            fence_proxy_async();
            arrive(&shared.full[landing.stage]);
            landing.advance();
            --in_flight;
        };
        for (int count = 0;; ++count) {
            Item& item = shared.items[count % 3];
            if (threadIdx.x == 0) {
                item.tile = take_tile(schedule, batch);
                item.begin = item.tile.begin(args.window);
                item.end = item.tile.end(args.causal);
            }
            named_barrier_sync(kProducerBarrier, kWarpgroupSize);
            if (in_flight > 0) {
                cp_async_wait<0>();
                hand_over();
            }
            mbarrier_wait(&shared.query_empty, count % 2 ^ 1);
            const bool last_item = item.tile.num_tokens <= 0;
            if (!last_item) {
                const int index = threadIdx.x;  // of a row
                const int num_rows = item.tile.num_heads * item.tile.num_tokens;
                const int row = min(warp * kWarpSize + lane, num_rows - 1);
                const Row mine = {
                    args.query +
                        (item.tile.first_token + row / item.tile.num_heads) *
                            args.query_token_stride +
                        (item.tile.first_head + row % item.tile.num_heads) * args.query_head_stride,
                    index < num_rows};
                if (args.query_aligned)
                    copy_rows<kTileRows, true>(mine, shared.query);
                else
                    copy_rows<kTileRows, false>(mine, shared.query);
            }
            const int num_tiles = last_item ? 0 : num_key_tiles(item);
            const int* const table = args.block_tables + item.tile.sequence * args.table_stride;
            int token = item.begin + warp * kWarpKeys + lane;
            bool valid = num_tiles > 0 && lane < kWarpKeys && token < item.end;
            int block = valid ? table[cache.table_index(token)] : 0;
            Row values = {args.kv_cache, false};
            for (int p = 0; p <= num_tiles; ++p) {
                mbarrier_wait(&shared.empty[next.stage], next.phase ^ 1);
                if (p > 0) copy_rows<kTileKeys, true>(values, shared.stages[next.stage].values);
                if (p < num_tiles) {
                    Row keys = {args.kv_cache, valid};
                    if (valid)
                        keys.data =
                            cache.key(block, item.tile.kv_head, cache.offset_in_block(token));
                    values = {valid ? keys.data + cache.value_offset() : args.kv_cache, valid};
                    token += kTileKeys;
                    valid = lane < kWarpKeys && token < item.end;
                    if (valid) block = table[cache.table_index(token)];
                    copy_rows<kTileKeys, true>(keys, shared.stages[next.stage].keys);
                }
                cp_async_commit();
                next.advance();
                ++in_flight;
                cp_async_wait<kInFlight>();
                if (in_flight > kInFlight) hand_over();
            }
            if (last_item) break;
        }
        if (in_flight > 0) {
            cp_async_wait<0>();
            hand_over();
        }
    } else {
        increase_registers<kConsumerRegisters>();
        const int consumer = warpgroup - 1;
        const int warp = static_cast<int>(threadIdx.x) / kWarpSize % kWarpgroupWarps;
        const int group_row = consumer * kGroupRows;
        const uint4* const rows = shared.query[0] + group_row * 8;
        Logits logits = logits_of(args, args.query_scale);
        if (kInTurns && consumer == 1) named_barrier_arrive(kTurnBarrier, 2 * kWarpgroupSize);
        const auto take_turn = [&] {
            if (kInTurns) named_barrier_sync(kTurnBarrier + consumer, 2 * kWarpgroupSize);
        };
        const auto end_turn = [&] {
            if (kInTurns) named_barrier_arrive(kTurnBarrier + 1 - consumer, 2 * kWarpgroupSize);
        };
        for (int count = 0;; ++count) {
            mbarrier_wait(&shared.full[next.stage], next.phase);
            const Item& item = shared.items[count % 3];
            if (item.tile.num_tokens <= 0) break;
            const int num_tiles = num_key_tiles(item);
            // Of this lane's rows. Little of the item is kept: registers are scarce.
            const auto row_of = [&](int r) { return group_row + 16 * warp + lane / 4 + 8 * r; };
            const auto last_row = [&] { return item.tile.num_heads * item.tile.num_tokens - 1; };
            const auto position_of = [&](int row) {
                return item.tile.first_position + min(row, last_row()) / item.tile.num_heads;
            };
            logits.first_position = position_of(group_row);
            logits.last_position = position_of(group_row + kGroupRows - 1);
            const RowPositions positions = {{position_of(row_of(0)), position_of(row_of(1))}};
            const auto slope_log2 = [&](int r) {
                const int row = min(row_of(r), last_row());
                return args.alibi_slopes[item.tile.first_head + row % item.tile.num_heads] * kLog2E;
            };
            const int kv_end = item.end;
            AccumulatorOf<kColumns / 8> acc;
            clear(acc);
            unsigned probabilities[kKeyTiles][4];
            int key = item.begin;
            for (int p = 0; p < num_tiles; ++p, key += kTileKeys) {
                float score[2 * kKeyTiles][4];
                float factor[2];
                const auto& stage = shared.stages[next.stage];
                if (p > 0) mbarrier_wait(&shared.full[next.stage], next.phase);
                take_turn();
                start_logits(rows, stage.keys[0], score);
                if (p > 0) {
                    start_values(probabilities, stage.values[0], acc.out);
                    end_turn();
                    wgmma_wait<1>(score);
                } else {
                    end_turn();
                    wgmma_wait<0>(score);
                }
                if (p == num_tiles - 1) arrive(&shared.query_empty);
                form_logits<kKeyTiles>(logits, positions, slope_log2, key, kv_end, score);
                take_softmax<kKeyTiles>(score, logits.scale_left(), acc.state, factor);
                wgmma_wait<0>(acc.out);
                if (p > 0) keep_in_order(probabilities);
                arrive(&shared.empty[next.stage]);
                next.advance();
                rescale(acc.out, factor);
                pack_terms(score, probabilities);
            }
            if (num_tiles > 0) {
                mbarrier_wait(&shared.full[next.stage], next.phase);
                start_values(probabilities, shared.stages[next.stage].values[0], acc.out);
                wgmma_wait<0>(acc.out);
            } else {
                arrive(&shared.query_empty);
            }
            arrive(&shared.empty[next.stage]);
            next.advance();

            sum_lanes(acc);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int row = row_of(r);
                const bool used = row <= last_row();
                SoftmaxState state = acc.state[r];
                float factor = 1.0f;
                const int token = item.tile.first_token + row / item.tile.num_heads;
                const int head = item.tile.first_head + row % item.tile.num_heads;
                if (item.tile.num_splits > 1) {
                    if (!used) continue;
                    float* const partial = partial_of(partials, token, args.num_heads, head,
                                                      args.max_splits, item.tile.split, kHeadSize);
                    factor = softmax_normaliser(state);
#pragma unroll
                    for (int n = 0; n < kHeadSize / 8; ++n)
                        *reinterpret_cast<float2*>(partial + 8 * n + 2 * (lane % 4)) =
                            make_float2(acc.out[n][2 * r] * factor, acc.out[n][2 * r + 1] * factor);
                    if (lane % 4 == 0) partial[kHeadSize] = softmax_lse_log2(state);
                    continue;
                }
                if (used) {
                    if (args.sinks != nullptr && !softmax_is_empty(state))
                        factor = softmax_add_sink(state, args.sinks[head] * kLog2E);
                    if (lse != nullptr && lane % 4 == 0)
                        lse[token * static_cast<int64>(args.num_heads) + head] =
                            softmax_lse_log2(state) * kLn2;
                }
                factor *= softmax_normaliser(state);
                scalar_t* const target =
                    out + token * args.out_token_stride + head * args.out_head_stride;
                // A quad holds 8 columns in words of its lanes: 32 of them become a chunk for each.
#pragma unroll
                for (int n = 0; n < 2 * kSteps; n += 4) {
                    unsigned words[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        float pair[2] = {0.0f, 0.0f};
                        if (n + i < 2 * kSteps) {
                            pair[0] = acc.out[n + i][2 * r] * factor;
                            pair[1] = acc.out[n + i][2 * r + 1] * factor;
                        }
                        words[i] = pack_pair(pair);
                    }
                    transpose_quad(words);
                    const int chunk = n + lane % 4;
                    if (used && chunk < kChunks)
                        store_vec(target + chunk * kVec,
                                  make_uint4(words[0], words[1], words[2], words[3]),
                                  args.out_aligned);
                }
            }
        }
        if (kInTurns && consumer == 0)
            named_barrier_sync(kTurnBarrier, 2 * kWarpgroupSize);  // the last turn is nobody's
    }
}
