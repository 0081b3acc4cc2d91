// The use of the pool over the last minutes.

import { isDark } from "./pool_grid.js";

/** Draw used and cached blocks over time, preemptions as ticks, and the time that is shown. */
export function drawChart(canvas, samples, at) {
  const scale = devicePixelRatio || 1;
  const { clientWidth: width, clientHeight: height } = canvas;
  if (!width || !samples.length) return;
  Object.assign(canvas, { width: Math.round(width * scale), height: Math.round(height * scale) });
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  const start = samples[0].time;
  const seconds = Math.max(samples.at(-1).time - start, 1e-3);
  const x = (time) => ((time - start) / seconds) * width;
  const area = (value, color) => {
    context.beginPath();
    context.moveTo(0, height);
    let before = null;
    for (const sample of samples) {
      const y = height - 3 - (value(sample) / Math.max(1, sample.total)) * (height - 6);
      if (before !== null) context.lineTo(x(sample.time), before); // it changes in steps
      context.lineTo(x(sample.time), y);
      before = y;
    }
    context.lineTo(width, before);
    context.lineTo(width, height);
    context.fillStyle = color;
    context.fill();
  };
  const dark = isDark();
  area(({ used, cached }) => used + cached, dark ? "#6f93ff38" : "#2f5bea2b");
  area(({ used }) => used, dark ? "#6f93ffb8" : "#2f5beaa8");
  context.fillStyle = dark ? "#f2b56b" : "#c26a00";
  for (const sample of samples) if (sample.preempted) context.fillRect(x(sample.time) - 0.75, 0, 1.5, 7);
  context.fillStyle = dark ? "#ffffff14" : "#00000010";
  context.fillRect(x(at), 0, width - x(at), height);
}
