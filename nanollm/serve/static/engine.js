// What the page knows of an engine, put together from snapshots and frames. No drawing here.

const KEPT_MS = 120000;  // how long what has ended is remembered
const MOST_GAPS = 8192;

export function quantile(values, share) {
  if (!values.length) return null;
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}

export class Engine {
  constructor(kept = KEPT_MS) {
    this.kept = kept;
    this.reset();
  }

  reset() {
    this.requests = new Map();  // by number
    this.steps = [];  // the last ones
    this.gaps = [];  // [ms, gap in ms] between tokens
    this.left = new Set();  // blocks that are free and were used
    this.now = 0;  // of the engine, in ms
    this.started = this.numBlocks = this.blockSize = this.model = null;
    this.waiting = this.running = this.usage = 0;
    this.version = 0;  // counts what was taken, for those who draw
  }

  take(message) {
    if (message.type === "snapshot") this.begin(message);
    else this.go(message);
    this.version += 1;
  }

  begin(message) {
    if (message.started !== this.started) this.reset();
    this.started = message.started;
    this.model = message.model;
    this.numBlocks = message.num_blocks;
    this.blockSize = message.block_size;
    this.now = Math.max(this.now, message.now_ms);
    const open = new Set(message.requests.map((fields) => fields.request));
    for (const request of this.requests.values()) {
      if (request.status !== "finished" && !open.has(request.number)) {
        this.end(request, this.now, "unknown");  // while nobody watched
      }
    }
    for (const fields of message.requests) {
      const request = this.note(fields);
      this.hold(request, 0, fields.blocks);
      if (request.status === "waiting" && !request.waits.some((wait) => wait.end === null)) {
        request.waits.push({ start: request.queued, end: null });
      }
    }
    this.waiting = message.requests.filter((fields) => fields.status === "waiting").length;
    this.running = message.requests.length - this.waiting;
  }

  go(frame) {
    for (const event of frame.events) this.transition(event);
    for (const step of frame.steps) this.step(step);
    for (const [number, same, blocks] of frame.tables) {
      const request = this.requests.get(number);
      if (request) this.hold(request, same, blocks);
    }
    this.forget();
  }

  // Take the fields of a request, which may be new.
  note(fields) {
    let request = this.requests.get(fields.request);
    if (!request) {
      request = {
        number: fields.request, id: fields.id, index: fields.index,
        label: fields.label ?? `#${fields.request}`, spans: [], waits: [],
        marks: [], blocks: [], filled: 0, row: this.freeRow(), lastToken: fields.last_token_ms,
        worst: null, num_drafts: 0, num_accepted: 0,
      };
      this.requests.set(request.number, request);
    }
    request.status = fields.status;
    request.prompt = fields.num_prompt_tokens;
    request.cached = fields.num_cached_tokens;
    request.filled = fields.num_computed_tokens;
    request.made = Math.max(fields.num_made, request.made ?? 0);
    request.preemptions = fields.num_preemptions;
    request.queued = fields.queued_ms;
    request.admitted = fields.admitted_ms;
    request.first ??= fields.first_token_ms;
    request.ended = fields.ended_ms;
    request.reason = fields.reason;
    return request;
  }

  transition(event) {
    const request = this.note(event);
    this.now = Math.max(this.now, event.time_ms);
    if (event.event === "queued") {
      request.waits.push({ start: event.time_ms, end: null });
    } else if (event.event === "admitted") {
      this.endWait(request, event.time_ms);
      request.status = "running";
    } else if (event.event === "preempted") {
      request.marks.push(event.time_ms);
      request.waits.push({ start: event.time_ms, end: null });
      request.status = "waiting";
    } else {
      this.end(request, event.time_ms, event.reason);
    }
  }

  endWait(request, time) {
    const wait = request.waits.find((one) => one.end === null);
    if (wait) wait.end = time;
  }

  end(request, time, reason) {
    this.endWait(request, time);
    Object.assign(request, { status: "finished", ended: time, reason });
    this.hold(request, 0, []);
  }

  step(step) {
    this.steps.push(step);
    this.now = Math.max(this.now, step.end_ms);
    this.waiting = step.num_waiting;
    this.running = step.num_running;
    this.usage = step.kv_usage;
    for (const [number, ...counts] of step.works) {
      const request = this.requests.get(number);
      if (request) this.work(request, step, ...counts);
    }
  }

  work(request, step, filled, output, num, made, drafts, accepted) {
    request.filled = filled;
    request.made = Math.max(request.made, output);
    request.num_drafts += drafts;
    request.num_accepted += accepted;
    request.spans.push({
      start: step.start_ms, end: step.end_ms, num, made, drafts, accepted,
      steps: step.num_steps, decodes: made > 0 && num - drafts === made - accepted,
    });
    if (!made) return;
    if (output === made) {
      request.first = step.end_ms;
    } else if (request.lastToken !== null) {
      const gap = (step.end_ms - request.lastToken) / made;
      this.gaps.push([step.end_ms, gap]);
      if (!request.worst || gap > request.worst.gap) request.worst = { gap, step };
    }
    request.lastToken = step.end_ms;
  }

  // From place `same` on, the block table of a request is `blocks`.
  hold(request, same, blocks) {
    for (const block of request.blocks.splice(same)) this.left.add(block);
    for (const block of blocks) request.blocks.push(block);
  }

  freeRow() {
    const used = new Set([...this.requests.values()].map((request) => request.row));
    let row = 0;
    while (used.has(row)) row += 1;
    return row;
  }

  forget() {
    const oldest = this.now - this.kept;
    while (this.steps.length && this.steps[0].end_ms < oldest) this.steps.shift();
    while (this.gaps.length > MOST_GAPS || (this.gaps.length && this.gaps[0][0] < oldest)) {
      this.gaps.shift();
    }
    for (const request of this.requests.values()) {
      if (request.status === "finished" && request.ended < oldest) {
        this.requests.delete(request.number);
      }
      if (request.spans.length > 4096) request.spans.splice(0, 1024);
    }
  }

  // Give rows that nobody sees any more to those who come; `since` is the left edge.
  freeRows(since, most) {
    for (const request of this.requests.values()) {
      const gone = request.status === "finished" && request.ended < since;
      if (gone || (request.row >= most && request.status === "finished")) request.row = null;
    }
  }

  // The numbers over the last seconds, as they are shown.
  numbers(until = this.now, span = 10000) {
    const since = until - span;
    const steps = this.steps.filter((step) => step.end_ms > since && step.end_ms <= until);
    const sums = { made: 0, computed: 0, drafts: 0, accepted: 0 };
    for (const step of steps) {
      for (const [, , , num, made, drafts, accepted] of step.works) {
        sums.made += made;
        sums.computed += num;
        sums.drafts += drafts;
        sums.accepted += accepted;
      }
    }
    const busy = steps.length ? until - Math.max(since, steps[0].start_ms) : 0;
    const all = [...this.requests.values()];
    const minute = (time) => time !== null && time !== undefined
      && time > until - 60000 && time <= until;
    const ttfts = all.filter((r) => minute(r.first)).map((r) => r.first - r.queued);
    const admitted = all.filter((r) => minute(r.admitted));
    const prompt = admitted.reduce((sum, r) => sum + r.prompt, 0);
    const cached = admitted.reduce((sum, r) => sum + r.cached, 0);
    const gaps = this.gaps.filter(([time]) => time > since && time <= until);
    return {
      running: this.running, waiting: this.waiting, usage: this.usage,
      tokens: busy ? (1000 * sums.made) / busy : 0,
      computed: busy ? (1000 * sums.computed) / busy : 0,
      ttft: quantile(ttfts, 0.5), ttft95: quantile(ttfts, 0.95),
      itl: quantile(gaps.map(([, gap]) => gap), 0.5),
      itl95: quantile(gaps.map(([, gap]) => gap), 0.95),
      hits: prompt ? cached / prompt : null,
      accepted: sums.drafts ? sums.accepted / sums.drafts : null,
    };
  }
}
