// A recording (`nanollm-generate --trace`), so that the same view can show it at any time.

import { Engine } from "./engine.js";

function describe(number, id, queued) {
  return {
    request: number, id, label: id.length <= 5 ? id : `#${number}`, first: true, index: 0, status: "waiting", num_made: 0, reason: null,
    num_prompt_tokens: 0, num_cached_tokens: 0, num_computed_tokens: 0, num_preemptions: 0,
    queued_ms: queued, admitted_ms: null, first_token_ms: null, last_token_ms: null,
    ended_ms: null,
  };
}

function read(text) {
  try {
    const trace = JSON.parse(text);
    if (Array.isArray(trace.traceEvents)) return trace;
  } catch {
    // no JSON: told below
  }
  throw new Error("This file is no recording of an engine.");
}

export class Recording {
  // Read a timeline file. Throws Error if it is none.
  constructor(text) {
    const { traceEvents: found, otherData: more = {} } = read(text);
    this.numBlocks = more.num_blocks ?? null;
    this.blockSize = more.block_size ?? null;
    this.steps = new Map();  // by number
    this.requests = new Map();  // by row
    this.entries = [];  // [ms, frame], in the order of time
    const names = new Map(found.filter((one) => one.name === "thread_name")
      .map((one) => [one.tid, one.args.name]));
    for (const one of found) {
      if (names.get(one.tid) === "engine" && one.ph === "X") this.addStep(one);
      else if (one.ph === "i") this.addEvent(one, names.get(one.tid));
    }
    for (const one of found) {
      if (one.ph === "X" && one.args.num_new) this.addWork(one);
    }
    for (const [, { events: [event] }] of this.entries) {
      if (!event) continue;
      const { num_prompt_tokens: prompt, num_cached_tokens: cached, first }
        = this.requests.get(event.request);  // known only now
      Object.assign(event, { num_prompt_tokens: prompt, num_cached_tokens: first ? 0 : cached });
    }
    this.entries.sort(([left], [right]) => left - right);
    this.end = this.entries.at(-1)?.[0] ?? 0;
  }

  addStep({ name, ts, dur, args }) {
    const step = {
      start_ms: ts / 1000, end_ms: (ts + dur) / 1000, num_steps: 1, num_waiting: args.waiting,
      num_running: args.running, kv_usage: args.kv_usage, works: [],
    };
    const frame = { type: "frame", events: [], steps: [step], tables: [] };
    this.steps.set(Number(name.split(" ")[1]), frame);
    this.entries.push([step.end_ms, frame]);
  }

  addEvent({ name, tid, ts, args }, id) {
    const time = ts / 1000;
    const number = tid - 1;  // the first row is the engine's
    const fields = this.requests.get(number) ?? describe(number, id, time);
    this.requests.set(number, fields);
    if (name === "admitted") fields.admitted_ms ??= time;
    if (name === "preempted") fields.num_preemptions += 1;
    if (name === "finished") {
      Object.assign(fields, { ended_ms: time, status: "finished", reason: args.finish_reason });
    }
    const tables = name === "preempted" ? [[number, 0, []]] : [];
    const events = [{ ...fields, event: name, time_ms: time }];
    this.entries.push([time, { type: "frame", events, steps: [], tables }]);
  }

  addWork({ tid, args }) {
    const { step, start, num_new: num, num_drafts: drafts, num_made: made, blocks } = args;
    const number = tid - 1;
    const fields = this.requests.get(number);
    const frame = this.steps.get(step);
    if (!fields || !frame) return;
    if (fields.first) Object.assign(fields, { first: false, num_cached_tokens: start });
    fields.num_made += made;
    if (made && !fields.num_prompt_tokens) fields.num_prompt_tokens = start + num;
    const accepted = drafts ? Math.max(0, made - 1) : 0;
    const filled = start + num - drafts + accepted;
    frame.steps[0].works.push([number, filled, fields.num_made, num, made, drafts,
      accepted]);
    const ended = fields.ended_ms !== null && fields.ended_ms <= frame.steps[0].end_ms;
    if (blocks && !ended) frame.tables.push([number, 0, blocks]);
  }

  // The engine as it was at a time, in ms.
  at(time) {
    const engine = new Engine(Infinity);
    Object.assign(engine, { numBlocks: this.numBlocks, blockSize: this.blockSize });
    for (const [moment, frame] of this.entries) {
      if (moment > time) break;
      engine.take(frame);
    }
    return engine;
  }
}
