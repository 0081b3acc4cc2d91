// The state of the block pool as `/kv_cache/events` reports it: a snapshot, then changes.

export const MEDIA = ["GPU", "CPU"];

class Pool {
  constructor(size) {
    this.size = size;
    this.references = new Int32Array(size);
    this.hashes = new Array(size).fill(null);
    this.colors = new Int32Array(size).fill(-1); // of the request that held it last
  }

  clone() {
    const copy = Object.create(Pool.prototype);
    return Object.assign(copy, {
      size: this.size,
      references: this.references.slice(),
      hashes: this.hashes.slice(),
      colors: this.colors.slice(),
    });
  }
}

/** Requests and their sequences are replaced when they change, never altered: copies share them. */
export class PoolModel {
  constructor() {
    this.number = null;
    this.time = 0;
    this.blockSize = 0;
    this.pools = { GPU: new Pool(0), CPU: new Pool(0) };
    this.requests = new Map(); // id -> {id, color, status, sequences: Map(number -> sequence)}
    this.requestOf = new Map(); // sequence -> the request that it belongs to, or belonged to
    this.totals = { preemptions: 0, queries: 0, hits: 0 };
    this.nextColor = 0;
  }

  clone() {
    return Object.assign(new PoolModel(), this, {
      pools: { GPU: this.pools.GPU.clone(), CPU: this.pools.CPU.clone() },
      requests: new Map(this.requests),
      requestOf: new Map(this.requestOf),
    });
  }

  /** Apply a report. Returns false where one before it is missing. */
  apply(report) {
    if (report.type === "snapshot") {
      this.blockSize = report.block_size;
      const { nextColor, requests: known } = this;
      const colors = { GPU: this.pools.GPU.colors, CPU: this.pools.CPU.colors };
      this.pools = { GPU: new Pool(report.num_gpu_blocks), CPU: new Pool(report.num_cpu_blocks) };
      for (const medium of MEDIA) {
        const pool = this.pools[medium];
        if (colors[medium].length === pool.size) pool.colors.set(colors[medium]);
      }
      this.requests = new Map();
      this.known = known;
      this.nextColor = nextColor;
    } else if (report.number !== this.number + 1) return false;
    for (const event of report.happened ?? []) if (event.type === "recompute") event.held = this.heldBy(event.sequences);
    this.number = report.number;
    this.time = report.time;
    this.totals = {
      preemptions: report.num_preemptions,
      queries: report.prefix_cache_queries,
      hits: report.prefix_cache_hits,
    };
    this.setBlocks(this.pools.GPU, report.gpu);
    this.setBlocks(this.pools.CPU, report.cpu);
    for (const request of report.requests) this.setRequest(request);
    for (const id of report.ended ?? []) this.requests.delete(id);
    for (const [sequence] of this.requestOf) {
      if (this.requestOf.size < 4000) break;
      this.requestOf.delete(sequence);
    }
    this.known = null;
    this.index = null;
    return true;
  }

  /** Return the places of the blocks that sequences hold. */
  heldBy(numbers) {
    return numbers.flatMap((number) => {
      const held = this.requests.get(this.requestOf.get(number)?.id)?.sequences.get(number);
      return (held?.table ?? []).flatMap((block) => (block === null ? [] : [{ medium: held.medium, block }]));
    });
  }

  setBlocks(pool, blocks) {
    for (const [block, references, hash] of blocks) {
      pool.references[block] = references;
      pool.hashes[block] = hash;
    }
  }

  setRequest({ id, status, sequences }) {
    const before = this.requests.get(id);
    const color = (before ?? this.known?.get(id))?.color ?? this.nextColor++;
    const request = { id, color, status, sequences: new Map() };
    for (const { sequence, tokens, computed, medium, start, blocks } of sequences) {
      const table = [...(before?.sequences.get(sequence)?.table.slice(0, start) ?? []), ...blocks];
      request.sequences.set(sequence, { sequence, tokens, computed, medium, table });
      this.requestOf.set(sequence, { id, color });
      const { colors } = this.pools[medium];
      for (const block of blocks) if (block !== null) colors[block] = color;
    }
    this.requests.set(id, request);
  }

  /** Return for each block that is in a table who holds it: {request, sequence, position, filled}. */
  owners(medium) {
    this.index ??= this.makeIndex();
    return this.index[medium];
  }

  makeIndex() {
    const index = { GPU: new Map(), CPU: new Map() };
    for (const request of this.requests.values())
      for (const sequence of request.sequences.values()) {
        const { table, computed, medium } = sequence;
        table.forEach((block, position) => {
          if (block === null) return;
          const filled = Math.max(0, Math.min(this.blockSize, computed - position * this.blockSize));
          const owner = { request, sequence: sequence.sequence, position, filled };
          const others = index[medium].get(block);
          if (others) others.push(owner);
          else index[medium].set(block, [owner]);
        });
      }
    return index;
  }

  /** Return the counts that the numbers and the chart show. */
  counts() {
    const counts = { used: 0, cached: 0, shared: 0, saved: 0, filled: 0, swapped: 0 };
    const { GPU, CPU } = this.pools;
    const owners = this.owners("GPU");
    for (let block = 0; block < GPU.size; block++) {
      const references = GPU.references[block];
      if (references) counts.used++;
      else if (GPU.hashes[block] !== null) counts.cached++;
      if (references > 1) counts.shared++;
      if (references > 1) counts.saved += references - 1;
    }
    for (const held of owners.values()) counts.filled += Math.max(...held.map((owner) => owner.filled));
    for (const references of CPU.references) if (references) counts.swapped++;
    const states = { running: 0, waiting: 0, swapped: 0, preempted: 0, pinned: 0 };
    for (const { status } of this.requests.values()) states[status]++;
    return { ...counts, size: GPU.size, slots: counts.used * this.blockSize, states, ...this.totals };
  }

  /** Return everything as plain data, for tests and for the console. */
  state() {
    const blocks = (pool) =>
      Object.fromEntries(
        [...pool.references.entries()]
          .filter(([block, references]) => references || pool.hashes[block] !== null)
          .map(([block, references]) => [block, [references, pool.hashes[block]]]),
      );
    const requests = [...this.requests.values()].map(({ id, status, sequences }) => [
      id,
      [status, [...sequences.values()].map((s) => [s.sequence, s.tokens, s.computed, s.medium, s.table])],
    ]);
    const pools = { GPU: blocks(this.pools.GPU), CPU: blocks(this.pools.CPU) };
    return { number: this.number, time: this.time, pools, requests: Object.fromEntries(requests) };
  }
}

/** Keeps the reports of the last minutes, with the whole state from time to time: a bounded amount. */
export class History {
  constructor({ seconds = 300, maxSize = 48e6, perKeyframe = 100 } = {}) {
    Object.assign(this, { seconds, maxSize, perKeyframe });
    this.segments = []; // {keyframe, reports, samples, size}
    this.size = 0;
  }

  /** Add a report that the model has just applied; `size` is that of its text. */
  add(model, report, size) {
    const { used, cached, size: total } = model.counts();
    const preempted = (report.happened ?? []).some(({ type }) => type === "swap_out" || type === "recompute");
    const sample = { time: report.time, used, cached, total, preempted };
    let segment = this.segments.at(-1);
    if (!segment || report.type === "snapshot" || segment.reports.length >= this.perKeyframe) {
      const cost = 24 * (model.pools.GPU.size + model.pools.CPU.size);
      segment = { keyframe: model.clone(), reports: [], samples: [sample], size: cost };
      this.segments.push(segment);
      this.size += cost;
    } else {
      segment.reports.push(report);
      segment.samples.push(sample);
      segment.size += 2 * size;
      this.size += 2 * size;
    }
    while (
      this.segments.length > 1 &&
      (this.size > this.maxSize || report.time - this.segments[1].keyframe.time > this.seconds)
    )
      this.size -= this.segments.shift().size;
  }

  get samples() {
    return this.segments.flatMap((segment) => segment.samples);
  }

  get start() {
    return this.segments[0]?.keyframe.time ?? 0;
  }

  get end() {
    return this.segments.at(-1)?.samples.at(-1).time ?? 0;
  }

  /** Return the state at a time, and what the last report before it told. */
  at(time) {
    const after = this.segments.findIndex(({ keyframe }) => keyframe.time > time);
    const segment = this.segments.at(after < 0 ? -1 : Math.max(0, after - 1));
    const model = segment.keyframe.clone();
    let last = null;
    for (const report of segment.reports) {
      if (report.time > time) break;
      model.apply(report);
      last = report;
    }
    return { model, last };
  }

  /** Return the time of the report before or after a time, as far as there is one. */
  beside(time, step) {
    const times = this.samples.map((sample) => sample.time);
    const next = times.find((other) => other > time) ?? time;
    return step > 0 ? next : (times.findLast((other) => other < time) ?? time);
  }
}
