// The blocks as cells of a canvas, and what happens to them.

import { MEDIA } from "./pool_model.js";

export const KINDS = {
  fork: { color: "#a78bfa", text: "fork" },
  copy_on_write: { color: "#f59e0b", text: "copy-on-write" },
  prefix_hit: { color: "#22c55e", text: "prefix hit" },
  eviction: { color: "#ef4444", text: "eviction" },
  swap_out: { color: "#0ea5e9", text: "swapped out" },
  swap_in: { color: "#06b6d4", text: "swapped in" },
  recompute: { color: "#ec4899", text: "preempted, to be computed again" },
};
const FLASH = 1100; // milliseconds
const MAX_FLASHES = 400;
const TITLE = 26; // height of the heading of the swap space
export const CACHED = 0.3; // opacity of a cached block
const MARGIN = 5; // around all cells, for what flashes

let dark = null; // until the theme changes
const colors = new Map(); // those of requests that were used

document.addEventListener("theme", () => {
  dark = null;
  colors.clear();
});

export function isDark() {
  const { theme } = document.documentElement.dataset;
  dark ??= theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  return dark;
}

/** Return the colour of a request: neighbours in the order of arrival are far apart on the circle of hues. */
export function requestColor(number, alpha = 1) {
  const key = 64 * number + Math.round(50 * alpha);
  if (!colors.has(key)) {
    const hue = (255 + number * 137.508) % 360;
    const lightness = (isDark() ? [0.72, 0.63, 0.81] : [0.6, 0.52, 0.69])[Math.floor(number / 3) % 3];
    const unknown = isDark() ? `rgb(148 163 184 / ${alpha})` : `rgb(100 116 139 / ${alpha})`;
    if (colors.size > 5000) colors.clear();
    colors.set(key, number < 0 ? unknown : `oklch(${lightness} 0.155 ${hue.toFixed(1)} / ${alpha})`);
  }
  return colors.get(key);
}

export class Grid {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.cells = document.createElement("canvas"); // without what moves
    this.stale = true; // the cells are not as the model is
    this.model = null;
    this.selected = null; // id of a request
    this.hovered = null; // {medium, block}
    this.flashes = []; // {kind, from, to, start}
    this.still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    new ResizeObserver(() => this.update()).observe(canvas.parentElement);
  }

  update(model = this.model) {
    this.model = model;
    this.stale = true;
    this.drawSoon();
  }

  drawSoon() {
    this.frame ??= requestAnimationFrame(() => this.draw());
  }

  /** Let what a report tells flash. */
  flash(report) {
    const start = performance.now();
    for (const { type, sequences, blocks, block, medium, held } of report.happened ?? []) {
      const add = (from, to = null) => this.flashes.push({ kind: type, from, to, start });
      const at = (place, number) => ({ medium: place, block: number });
      if (type === "eviction") add(at(medium, block));
      else if (type === "copy_on_write") blocks.forEach(([from, to]) => add(at("GPU", from), at("GPU", to)));
      else if (type === "prefix_hit") blocks.forEach(([found]) => add(at("GPU", found)));
      else if (type === "swap_out") blocks.forEach(([from, to]) => add(at("GPU", from), at("CPU", to)));
      else if (type === "swap_in") blocks.forEach(([from, to]) => add(at("CPU", from), at("GPU", to)));
      else if (type === "fork") this.model?.heldBy([sequences[1]]).forEach((place) => add(place));
      else if (type === "recompute") held.forEach((place) => add(place));
    }
    this.flashes.splice(0, this.flashes.length - MAX_FLASHES);
  }

  // -- places --------------------------------------------------------------------------------------------

  /** Return the height that cells may take so that nothing has to scroll. */
  room() {
    const box = this.canvas.parentElement;
    if (!matchMedia("(min-width: 60rem) and (min-height: 40rem)").matches) return innerHeight - 350;
    const [panel, detail] = [box.parentElement, box.nextElementSibling];
    return panel.clientHeight - (box.offsetTop - panel.offsetTop) - detail.offsetHeight - 2 * MARGIN - 4;
  }

  /** Choose the size of cells: as large as the place allows. */
  layout() {
    const style = getComputedStyle(this.canvas.parentElement);
    const box = this.canvas.parentElement.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
    const width = box - 2 * MARGIN;
    const sizes = MEDIA.map((medium) => this.model?.pools[medium].size ?? 0);
    const height = Math.max(240, this.room());
    const rows = (cell) => sizes.map((size) => Math.ceil(size / Math.max(1, Math.floor(width / cell))));
    const smallest = sizes[0] > 20_000 ? 4 : 7;
    let cell = Math.min(44, width / 8);
    while (cell > smallest && rows(cell)[0] * cell + rows(cell)[1] * cell + (sizes[1] ? TITLE : 0) > height) cell -= 1;
    const columns = Math.max(1, Math.floor(width / cell));
    const [gpuRows, cpuRows] = rows(cell);
    const cpuTop = MARGIN + gpuRows * cell + TITLE;
    this.places = { cell, columns, tops: { GPU: MARGIN, CPU: cpuTop }, width: box };
    const total = (sizes[1] ? cpuTop + cpuRows * cell : MARGIN + gpuRows * cell) + MARGIN;
    const scale = devicePixelRatio || 1;
    const [w, h] = [Math.round(box * scale), Math.round(Math.max(total, cell) * scale)];
    if (this.canvas.width !== w || this.canvas.height !== h) {
      for (const canvas of [this.canvas, this.cells]) Object.assign(canvas, { width: w, height: h });
      this.canvas.style.height = `${h / scale}px`;
    }
    this.scale = scale;
  }

  /** Return the corner of a block's cell. */
  corner({ medium, block }) {
    const { cell, columns, tops } = this.places;
    return [MARGIN + (block % columns) * cell, tops[medium] + Math.floor(block / columns) * cell];
  }

  /** Return the block at a point of the canvas, or null. */
  blockAt(x, y) {
    if (!this.places || !this.model) return null;
    const { cell, columns, tops } = this.places;
    const medium = this.model.pools.CPU.size && y >= tops.CPU ? "CPU" : "GPU";
    const column = Math.floor((x - MARGIN) / cell);
    const block = Math.floor((y - tops[medium]) / cell) * columns + column;
    const inside = column >= 0 && column < columns && block >= 0 && block < this.model.pools[medium].size;
    return inside ? { medium, block } : null;
  }

  // -- drawing -------------------------------------------------------------------------------------------

  /** Return what the cell of a block shows. */
  look(medium, block) {
    const pool = this.model.pools[medium];
    const owners = this.model.owners(medium).get(block) ?? [];
    const references = pool.references[block];
    const held = owners.length > 1 ? [...new Set(owners.map(({ request }) => request.color))] : [owners[0]?.request.color];
    if (held[0] === undefined) held[0] = pool.colors[block];
    const filled = owners.length ? Math.max(...owners.map((owner) => owner.filled)) : this.model.blockSize;
    const kind = references ? "used" : pool.hashes[block] !== null ? "cached" : "free";
    const chosen = this.selected && owners.find(({ request }) => request.id === this.selected);
    const pinned = owners.some(({ request }) => request.status === "pinned");
    return { kind, references, colors: kind === "used" ? held : [], filled, chosen, pinned, last: pool.colors[block] };
  }

  draw() {
    this.frame = null;
    if (!this.model || !this.canvas.offsetParent) return;
    if (this.stale) this.drawCells();
    const { context, canvas } = this;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.drawImage(this.cells, 0, 0);
    context.setTransform(this.scale, 0, 0, this.scale, 0, 0);
    if (this.hovered) this.drawRing(this.hovered, this.dark ? "#ffffff" : "#111827", 2);
    const now = performance.now();
    this.flashes = this.flashes.filter(({ start }) => now - start < FLASH);
    for (const flash of this.flashes) this.drawFlash(flash, (now - flash.start) / FLASH);
    if (this.flashes.length) this.drawSoon();
  }

  drawCells() {
    this.stale = false;
    this.dark = isDark();
    this.dims = this.model.requests.has(this.selected); // not one that has ended
    this.layout();
    const context = this.cells.getContext("2d");
    context.setTransform(this.scale, 0, 0, this.scale, 0, 0);
    context.clearRect(0, 0, this.cells.width, this.cells.height);
    // Cells of one colour are one path: to fill thousands of them takes long.
    const paths = new Map();
    const path = (style) => paths.get(style) ?? paths.set(style, new Path2D()).get(style);
    const used = [];
    const free = this.dark ? "#1b212c" : "#eceff4";
    for (const medium of MEDIA) {
      const pool = this.model.pools[medium];
      for (let block = 0; block < pool.size; block++) {
        const place = { medium, block };
        if (pool.references[block]) {
          const look = this.look(medium, block);
          const dim = this.dims && !look.chosen ? 0.28 : 1;
          const whole = look.colors.length === 1 && look.filled === this.model.blockSize;
          this.addCell(path(requestColor(look.colors[0], (whole ? 1 : 0.3) * dim)), place);
          if (!whole || look.references > 1 || look.chosen || look.pinned) used.push({ place, look, dim, whole });
        } else if (pool.hashes[block] === null) this.addCell(path(free), place);
        else this.addCell(path(requestColor(pool.colors[block], CACHED * (this.dims ? 0.28 : 1))), place);
      }
    }
    for (const [style, filled] of paths) {
      context.fillStyle = style;
      context.fill(filled);
    }
    for (const cell of used) this.drawUsed(context, cell);
    if (this.model.pools.CPU.size) this.drawTitle(context);
  }

  /** Return the square of a cell: its corner, side, and the radius of its corners. */
  square(place) {
    const { cell } = this.places;
    const gap = cell > 14 ? 2.5 : cell > 8 ? 1.5 : 1;
    const [x, y] = this.corner(place);
    return [x + gap / 2, y + gap / 2, cell - gap, cell > 12 ? Math.min(6, cell / 5) : 0];
  }

  addCell(path, place) {
    const [x, y, side, radius] = this.square(place);
    if (radius) path.roundRect(x, y, side, side, radius);
    else path.rect(x, y, side, side);
  }

  drawTitle(context) {
    context.fillStyle = this.dark ? "#93a0b5" : "#5a6478";
    context.font = "600 11.5px system-ui";
    context.textAlign = "left";
    context.textBaseline = "middle";
    const { tops } = this.places;
    context.fillText(`Swap space (CPU), ${this.model.pools.CPU.size} blocks`, MARGIN + 1, tops.CPU - TITLE / 2 + 2);
  }

  /** Draw what a used cell shows besides its colour. */
  drawUsed(context, { place, look, dim, whole }) {
    const { cell } = this.places;
    const [x, y, side, radius] = this.square(place);
    if (!whole) this.drawFilling(context, look, [x, y, side, radius], dim);
    if (look.pinned) {
      context.beginPath();
      context.roundRect(x, y, side, side, radius);
      context.strokeStyle = this.dark ? "#e6e9ef" : "#171b24";
      context.lineWidth = 1.5;
      context.stroke();
    }
    const label = look.chosen && cell >= 20 ? look.chosen.position : look.references > 1 ? look.references : null;
    if (label === null) return;
    const [middleX, middleY] = [x + side / 2, y + side / 2];
    if (cell < 15) {
      context.fillStyle = this.dark ? "#ffffff" : "#111827";
      context.fillRect(middleX - 1, middleY - 1, 2, 2);
      return;
    }
    context.font = `700 ${Math.round(Math.min(15, cell * 0.42))}px system-ui`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.globalAlpha = dim;
    if (look.colors.length > 1) {
      context.lineWidth = 3;
      context.lineJoin = "round";
      context.strokeStyle = this.dark ? "#ffffffb0" : "#00000090";
      context.strokeText(label, middleX, middleY + 0.5);
    }
    context.fillStyle = this.dark ? "#0b0f16" : "#ffffff";
    context.fillText(label, middleX, middleY + 0.5);
    context.globalAlpha = 1;
  }

  /** Fill a used cell from below as far as its slots hold tokens; requests that share it stand side by side. */
  drawFilling(context, { colors, filled }, [x, y, side, radius], dim) {
    const height = (side * filled) / this.model.blockSize;
    if (!height) return;
    context.save();
    if (radius) {
      context.beginPath();
      context.roundRect(x, y, side, side, radius);
      context.clip();
    }
    const shown = colors.slice(0, 4);
    shown.forEach((color, i) => {
      context.fillStyle = requestColor(color, dim);
      context.fillRect(x + (side * i) / shown.length, y + side - height, side / shown.length, height);
    });
    context.restore();
  }

  drawRing(place, color, width, grown = 0) {
    const { context, places } = this;
    const [x, y] = this.corner(place);
    context.beginPath();
    context.roundRect(x - grown, y - grown, places.cell + 2 * grown, places.cell + 2 * grown, Math.min(7, places.cell / 4) + grown);
    context.strokeStyle = color;
    context.lineWidth = width;
    context.stroke();
  }

  drawFlash({ kind, from, to }, age) {
    const { context, places } = this;
    const { color } = KINDS[kind];
    context.globalAlpha = 1 - age ** 2;
    const grown = this.still ? 0 : age * places.cell * 0.16;
    this.drawRing(to ?? from, color, 2.5, to ? 0 : grown);
    if (to) {
      const half = places.cell / 2;
      const [x1, y1] = this.corner(from).map((v) => v + half);
      const [x2, y2] = this.corner(to).map((v) => v + half);
      const lift = Math.min(60, Math.hypot(x2 - x1, y2 - y1) * 0.25);
      const [cx, cy] = [(x1 + x2) / 2, Math.max(4, (y1 + y2) / 2 - lift)];
      context.beginPath();
      context.moveTo(x1, y1);
      context.quadraticCurveTo(cx, cy, x2, y2);
      context.strokeStyle = color;
      context.lineWidth = 1.2;
      context.globalAlpha *= 0.5;
      context.stroke();
      const t = this.still ? 1 : Math.min(1, age * 1.6);
      const point = (a, b, c) => (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t ** 2 * c;
      context.globalAlpha = 1 - age ** 2;
      context.beginPath();
      context.arc(point(x1, cx, x2), point(y1, cy, y2), Math.max(2.5, places.cell / 9), 0, 7);
      context.fillStyle = color;
      context.fill();
    }
    context.globalAlpha = 1;
  }
}
