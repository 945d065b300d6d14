// The story of one request in sentences: why was this slow?

import { quantile } from "./engine.js";
import { seconds } from "./wire.js";

const REASONS = {
  stop: "a stop token or a stop string", length: "its limit of tokens",
  abort: "whoever asked no longer wanted it", error: "an error", unknown: "nobody was watching",
};

function tokens(number) {
  return `${number} token${number === 1 ? "" : "s"}`;
}

// Who else computed in a step, if that was much.
function company(request, step, requests) {
  const others = step.works.filter((work) => work[0] !== request.number);
  const all = step.works.reduce((sum, work) => sum + work[3], 0);
  const most = others.reduce((best, work) => (work[3] > (best?.[3] ?? 0) ? work : best), null);
  if (step.num_steps > 1) return `in ${step.num_steps} steps that were told together`;
  if (most && most[3] > 8) {
    const label = requests.get(most[0])?.label ?? `#${most[0]}`;
    return `in a step that computed ${tokens(all)}, ${most[3]} of them for request ${label}`;
  }
  if (!others.length) return `in a step of ${tokens(all)}, for this request alone`;
  return `in a step of ${tokens(all)} for ${step.works.length} requests`;
}

function gapsOf(request) {
  const gaps = [];
  let last = request.first;
  for (const span of request.spans) {
    if (!span.made || span.end <= request.first) continue;
    gaps.push((span.end - last) / span.made);
    last = span.end;
  }
  return gaps;
}

function prefill(request) {
  const chunks = request.spans.filter((span) => !span.decodes);
  const work = chunks.reduce((sum, span) => sum + span.num, 0);
  const time = chunks.reduce((sum, span) => sum + span.end - span.start, 0);
  const steps = chunks.reduce((sum, span) => sum + span.steps, 0);
  if (!chunks.length) return [];
  return [`Computed ${tokens(work)} in ${steps} step${steps === 1 ? "" : "s"} that took `
    + `${seconds(time)}.`];
}

// Name what took most of the time until now.
function verdict(request, now) {
  const waited = request.waits.reduce((sum, w) => sum + (w.end ?? now) - w.start, 0);
  const end = request.ended ?? now;
  const first = request.first ?? end;
  const parts = {
    "waiting for a place": waited,
    "computing the prompt": Math.max(0, first - (request.admitted ?? first)),
    "making tokens": Math.max(0, end - first),
  };
  const [name, time] = Object.entries(parts).reduce((a, b) => (b[1] > a[1] ? b : a));
  const all = end - request.queued;
  return all > 0 ? `Most of its ${seconds(all)}: ${name} (${seconds(time)}).` : "";
}

export function storyOf(request, { now, requests }) {
  const lines = [];
  const wait = request.waits[0];
  const open = wait && wait.end === null;
  if (wait) lines.push(`${open ? "Waits" : "Waited"} ${seconds((wait.end ?? now) - wait.start)} `
    + "in the queue.");
  if (request.admitted !== null && request.prompt) {
    lines.push(`Found ${request.cached} of ${tokens(request.prompt)} of the prompt in the `
      + "prefix cache.");
  }
  lines.push(...prefill(request));
  if (request.first !== null && request.first !== undefined) {
    lines.push(`First token ${seconds(request.first - request.queued)} after it came (TTFT).`);
  }
  const gaps = gapsOf(request);
  if (gaps.length) {
    lines.push(`${tokens(request.made)}; between two of them ${seconds(quantile(gaps, 0.5))} in `
      + `the median, ${seconds(Math.max(...gaps))} at most.`);
  }
  if (request.worst) {
    lines.push(`The longest pause was ${company(request, request.worst.step, requests)}.`);
  }
  if (request.num_drafts) {
    lines.push(`${request.num_accepted} of ${request.num_drafts} drafts were right.`);
  }
  if (request.preemptions) {
    lines.push(`Had to give up its memory ${request.preemptions} time`
      + `${request.preemptions === 1 ? "" : "s"}, and to compute its tokens again.`);
  }
  if (request.status === "finished") lines.push(`Ended by ${REASONS[request.reason]}.`);
  lines.push(verdict(request, now));
  return lines.filter(Boolean);
}
