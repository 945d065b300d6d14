// A recording (`nanollm-generate --trace`) as messages, so that the same view can show it.

function describe(number, id, queued) {
  return {
    request: number, id, index: 0, status: "waiting", num_made: 0, reason: null,
    num_prompt_tokens: 0, num_cached_tokens: 0, num_computed_tokens: 0, num_preemptions: 0,
    queued_ms: queued, admitted_ms: null, first_token_ms: null, last_token_ms: null,
    ended_ms: null,
  };
}

// Turn the timeline file into the entries of one long frame. Throws Error if it is none.
export function readTrace(text) {
  let found;
  try {
    found = JSON.parse(text).traceEvents;
  } catch {
    found = null;
  }
  if (!Array.isArray(found)) throw new Error("This file is no recording of an engine.");
  const names = new Map(found.filter((one) => one.name === "thread_name")
    .map((one) => [one.tid, one.args.name]));
  const steps = new Map();
  const requests = new Map();
  const events = [];
  for (const one of found) {
    if (names.get(one.tid) === "engine" && one.ph === "X") {
      steps.set(one.args.step ?? Number(one.name.split(" ")[1]), {
        start_ms: one.ts / 1000, end_ms: (one.ts + one.dur) / 1000, num_steps: 1,
        num_waiting: one.args.waiting, num_running: one.args.running,
        kv_usage: one.args.kv_usage, works: [],
      });
    } else if (one.ph === "i") {
      const time = one.ts / 1000;
      const fields = requests.get(one.tid) ?? describe(one.tid, names.get(one.tid), time);
      requests.set(one.tid, fields);
      if (one.name === "admitted") fields.admitted_ms ??= time;
      if (one.name === "preempted") fields.num_preemptions += 1;
      if (one.name === "finished") {
        Object.assign(fields, { ended_ms: time, status: "finished",
          reason: one.args.finish_reason });
      }
      events.push({ ...fields, event: one.name, time_ms: time });
    }
  }
  for (const one of found.filter((span) => span.ph === "X" && span.args.num_new)) {
    const { step, start, num_new: num, num_drafts: drafts, num_made: made } = one.args;
    const fields = requests.get(one.tid);
    const accepted = drafts ? Math.max(0, made - 1) : 0;
    fields.num_made += made;
    if (made && !fields.num_prompt_tokens) fields.num_prompt_tokens = start + num;
    const filled = start + num - drafts + accepted;
    steps.get(step)?.works.push([one.tid, filled, fields.num_made, num, made, drafts, accepted]);
  }
  for (const event of events) { // known only now
    event.num_prompt_tokens = requests.get(event.request).num_prompt_tokens;
  }
  return { type: "frame", events, steps: [...steps.values()], tables: [] };
}
