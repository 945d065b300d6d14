// Pictures of an engine on two canvases: requests in time, and blocks of memory.

const PALETTE = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B8A800"];
const ROW = 18;
const LABEL = 44;
const AXIS = 18;
const MOST_ROWS = 64;
const LEAST_BLOCKS = 512;
const TICKS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000];  // ms

export function colorOf(request) {
  return PALETTE[request.number % PALETTE.length];
}

function style(canvas) {
  const found = getComputedStyle(canvas);
  return (name) => found.getPropertyValue(`--${name}`).trim();
}

// Make the canvas as sharp as the screen; returns its context and its width in CSS pixels.
function prepare(canvas, height) {
  const width = canvas.parentElement.clientWidth;
  const scale = window.devicePixelRatio || 1;
  const [w, h] = [Math.round(width * scale), Math.round(height * scale)];
  if (canvas.width !== w || canvas.height !== h) {
    Object.assign(canvas, { width: w, height: h });
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  context.font = "11px system-ui, sans-serif";
  context.textBaseline = "middle";
  return [context, width];
}

// Draw from `until - span` to `until`, in ms; returns the requests that are seen.
export function drawGantt(canvas, engine, until, span, selected, leastRows = 8) {
  const color = style(canvas);
  const since = until - span;
  engine.freeRows(since, MOST_ROWS);
  const seen = [...engine.requests.values()].filter((request) => request.row !== null
    && request.row < MOST_ROWS && request.queued < until
    && (request.ended === null || request.ended >= since));
  const rows = Math.max(leastRows, ...seen.map((request) => request.row + 1));
  const [context, width] = prepare(canvas, rows * ROW + AXIS);
  const place = (ms) => LABEL + ((ms - since) / span) * (width - LABEL);
  axis(context, color, since, until, place, rows);
  for (const request of seen) drawRow(context, color, request, place, width, until, selected);
  return seen;
}

function axis(context, color, since, until, place, rows) {
  const span = until - since;
  const tick = TICKS.find((ms) => span / ms <= 6) ?? span / 6;
  context.textAlign = "center";
  for (let ms = Math.ceil(since / tick) * tick; ms <= until; ms += tick) {
    context.fillStyle = color("line");
    context.fillRect(place(ms), 0, 1, rows * ROW);
    context.fillStyle = color("quiet");
    const text = tick < 100 ? `${ms} ms` : `${(ms / 1000).toFixed(tick < 1000 ? 1 : 0)} s`;
    if (until - ms > span / 24) context.fillText(text, place(ms), rows * ROW + 9);
  }
}

function drawRow(context, color, request, place, width, until, selected) {
  const top = request.row * ROW;
  const middle = top + ROW / 2;
  const box = (start, end, height, fill) => {
    const left = Math.max(LABEL, place(start));
    const right = Math.min(width, place(end));
    if (right <= left) return;
    context.fillStyle = fill;
    context.fillRect(left, middle - height / 2, Math.max(right - left, 0.75), height);
  };
  if (selected === request.number) {
    context.fillStyle = color("chosen");
    context.fillRect(0, top, width, ROW);
  }
  const begin = request.admitted ?? until;
  box(begin, request.ended ?? until, 1, color("waits"));
  for (const wait of request.waits) box(wait.start, wait.end ?? until, 3, color("waits"));
  for (const one of request.spans) drawSpan(box, color, one);
  context.fillStyle = color("preempted");
  for (const mark of request.marks) {
    if (place(mark) > LABEL) context.fillRect(place(mark) - 1, top + 1, 3, ROW - 2);
  }
  context.fillStyle = colorOf(request);
  context.fillRect(0, top + 3, 6, ROW - 6);
  context.fillStyle = color("text");
  context.textAlign = "left";
  context.fillText(request.label, 9, middle);
}

function drawSpan(box, color, one) {
  if (one.decodes) {
    const dark = one.start + ((one.end - one.start) * one.made) / Math.max(one.num, 1);
    box(one.start, dark, 13, color("makes"));
    if (dark < one.end) box(dark, one.end, 8, color("rejected"));
  } else {
    box(one.start, one.end, 13, color("computes"));
    if (one.made) box(one.end - (one.end - one.start) * 0.2, one.end, 13, color("makes"));
  }
}

// Which request stands at a height of the canvas, in CSS pixels.
export function requestAt(seen, y) {
  return seen.find((request) => request.row === Math.floor(y / ROW)) ?? null;
}

// How many blocks to draw: twice as many whenever one behind them is used. In a cache that is
// large and nearly empty, nobody would see the squares.
function numDrawn(engine, holders) {
  let drawn = LEAST_BLOCKS;
  for (const block of [...engine.left, ...holders.keys()]) {
    while (block >= drawn) drawn *= 2;
  }
  return Math.min(engine.numBlocks ?? 0, drawn);
}

// Draw a square for each block; returns how many are held, shared, there and drawn.
export function drawBlocks(canvas, engine, selected) {
  const color = style(canvas);
  const holders = new Map();
  for (const request of engine.requests.values()) {
    request.blocks.forEach((block, i) => {
      const level = (request.filled - i * engine.blockSize) / engine.blockSize;
      const held = holders.get(block);
      holders.set(block, { request, level: Math.max(level, held?.level ?? 0),
        times: (held?.times ?? 0) + 1, chosen: request.number === selected || held?.chosen });
    });
  }
  const number = numDrawn(engine, holders);
  const room = canvas.parentElement.clientWidth;
  let size = 14;
  const columnsOf = (pixels) => Math.max(1, Math.floor(room / pixels));
  while (size > 3 && Math.ceil(number / columnsOf(size)) * size > 240) size -= 1;
  const columns = columnsOf(size);
  const height = Math.max(size, Math.ceil(number / columns) * size);
  const [context] = prepare(canvas, height);
  const gap = size > 5 ? 2 : 1;
  const square = (block, fill, level = 1) => {
    const x = (block % columns) * size;
    const y = Math.floor(block / columns) * size;
    const full = Math.ceil((size - gap) * level);
    context.fillStyle = fill;
    context.fillRect(x, y + size - gap - full, size - gap, full);
  };
  for (let block = 0; block < number; block += 1) {
    if (!holders.has(block)) square(block, color(engine.left.has(block) ? "left" : "free"));
  }
  let shared = 0;
  for (const [block, { request, level, times, chosen }] of holders) {
    if (times > 1) shared += 1;
    context.globalAlpha = 0.3;
    square(block, times > 1 ? color("shared") : colorOf(request));
    context.globalAlpha = 1;
    square(block, times > 1 ? color("shared") : colorOf(request),
      Math.min(1, Math.max(0, level)));
    if (chosen) {
      context.strokeStyle = color("text");
      context.strokeRect((block % columns) * size - 0.5,
        Math.floor(block / columns) * size - 0.5, size - gap + 1, size - gap + 1);
    }
  }
  return { held: holders.size, shared, all: engine.numBlocks ?? 0, drawn: number };
}
