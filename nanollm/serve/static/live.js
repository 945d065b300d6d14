// The live view: follows the engine, draws it, and tells the story of a request.

import { Engine } from "./engine.js";
import { colorOf, drawBlocks, drawGantt, requestAt } from "./draw.js";
import { storyOf } from "./story.js";
import { Recording } from "./trace.js";
import { $, ApiError, call, events, make, seconds } from "./wire.js";

const LAG_MS = 250;  // the picture is so far behind, so that it moves evenly
const SILENCE_MS = 25000;  // the server says something every ten seconds
const MOST_LISTED = 40;

const percent = (share) => (share === null ? "–"
  : `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`);
const calm = matchMedia("(prefers-reduced-motion: reduce)");

export class LiveView {
  constructor() {
    this.live = new Engine();
    this.engine = this.live;  // or what it was at a time of the recording
    this.recording = null;
    this.selected = null;
    this.seen = [];
    this.paused = null;  // the time at which it stands still
    this.drawn = this.listed = -1;
    this.wanted = null;  // the id of a request whose story is to be told
    $("gantt").addEventListener("click", (event) => {
      const found = requestAt(this.seen, event.offsetY);
      if (found) this.select(found.number);
    });
    $("pause").addEventListener("click", () => this.pause(this.paused === null));
    $("recording").addEventListener("change", (event) => this.open(event.target.files[0]));
    $("go-live").addEventListener("click", () => this.show());
    $("until").addEventListener("input", () => this.rewind());
    $("window").addEventListener("change", () => { this.drawn = -1; });
    addEventListener("resize", () => { this.drawn = -1; });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      this.drawn = -1;
    });
    setInterval(() => this.list(), 500);
    this.animate();
  }

  // Follow the server for ever; a lost connection is made again.
  async follow() {
    let pause = 500;
    for (;;) {
      const abort = new AbortController();
      let last = performance.now();
      const watch = setInterval(() => {
        if (performance.now() - last > SILENCE_MS) abort.abort();
      }, 1000);
      let why = "The server has ended the connection.";
      try {
        const response = await call("v1/engine/events", undefined, abort.signal);
        for await (const text of events(response)) {
          last = performance.now();
          pause = 500;
          if (text) this.take(JSON.parse(text));
        }
      } catch (error) {
        why = error.name === "AbortError" ? "The server is silent." : error.message;
        if (error instanceof ApiError && [401, 403, 404].includes(error.status)) {
          this.state("not connected", why);
          return error.status;  // trying again would not help
        }
      } finally {
        clearInterval(watch);
      }
      this.state(`connecting again in ${seconds(pause)}`, why);
      await new Promise((done) => { setTimeout(done, pause); });
      pause = Math.min(8000, 2 * pause);
    }
  }

  state(text, error = "") {
    $("live-status").textContent = text;
    $("live-error").textContent = error;
  }

  take(message) {
    this.live.take(message);
    const offset = performance.now() - this.live.now;
    if (message.type === "snapshot") {
      this.offset = offset;
      this.state("connected");
    }
    this.offset = Math.min(this.offset, offset);
    if (this.wanted !== null) this.find(this.wanted);
  }

  until() {
    if (this.recording) return (this.recording.end * $("until").value) / 1000;
    if (this.paused !== null) return this.paused;
    return performance.now() - (this.offset ?? 0) - LAG_MS;
  }

  animate() {
    const busy = this.engine.running || this.engine.waiting
      || this.until() - this.engine.now < 1000 * $("window").value;
    const moves = !this.recording && this.paused === null && busy && !calm.matches;
    if (moves || this.drawn !== this.engine.version) this.draw();
    if (calm.matches) setTimeout(() => this.animate(), 1000);
    else requestAnimationFrame(() => this.animate());
  }

  draw() {
    if (!$("gantt").parentElement.clientWidth) return;  // not shown
    this.drawn = this.engine.version;
    const span = 1000 * $("window").value;
    this.seen = drawGantt($("gantt"), this.engine, this.until(), span, this.selected);
    const { held, shared, all, drawn } = drawBlocks($("blocks"), this.engine, this.selected);
    $("blocks-text").textContent = all
      ? `${held} of ${all} blocks are held, ${shared} of them by several requests; `
        + `${this.engine.blockSize} tokens fit into one.`
        + (drawn < all ? ` The first ${drawn} are drawn; the others are free.` : "")
      : "A recording does not tell which blocks were held.";
  }

  // Write numbers, table and story: what can be read, and does not change with every frame.
  list() {
    if (this.listed === this.engine.version && this.paused === null) return;
    this.listed = this.engine.version;
    const found = this.engine.numbers(this.until() + LAG_MS);
    const shown = {
      Running: [found.running, `${found.waiting} waiting`],
      "Tokens made/s": [found.tokens.toFixed(found.tokens < 10 ? 1 : 0),
        `${found.computed.toFixed(0)} computed/s`],
      TTFT: [seconds(found.ttft), `95 %: ${seconds(found.ttft95)}`],
      ITL: [seconds(found.itl), `95 %: ${seconds(found.itl95)}`],
      "KV cache held": [percent(found.usage), `${percent(found.hits)} prefix hits`],
      "Drafts right": [percent(found.accepted), "of the guesses"],
    };
    $("numbers").replaceChildren(...Object.entries(shown).map(([name, [value, more]]) => make(
      "div", {}, make("dt", { textContent: name }),
      make("dd", {}, String(value), make("small", { textContent: more })))));
    $("gantt").setAttribute("aria-label", `Requests in time: ${found.running} running, `
      + `${found.waiting} waiting, ${found.tokens.toFixed(0)} tokens per second. `
      + "The table below has each of them.");
    this.table();
    this.tell();
  }

  table() {
    const active = document.activeElement?.dataset?.request;
    const all = [...this.engine.requests.values()].sort((a, b) => b.number - a.number);
    const rows = all.slice(0, MOST_LISTED).map((request) => {
      const button = make("button", { type: "button", textContent: request.label,
        title: request.id ?? "a request of somebody else" });
      button.dataset.request = request.number;
      button.setAttribute("aria-pressed", String(request.number === this.selected));
      button.style.borderColor = colorOf(request);
      button.addEventListener("click", () => {
        this.select(request.number);
        $("story").scrollIntoView({ block: "nearest" });
      });
      const ttft = request.first === null ? "–" : seconds(request.first - request.queued);
      const state = request.status === "finished" ? request.reason : request.status;
      const cells = [state, request.prompt, request.cached, request.made, ttft];
      return make("tr", {}, make("th", { scope: "row" }, button),
        ...cells.map((text) => make("td", { textContent: text })));
    });
    $("requests").replaceChildren(...rows);
    if (active) $("requests").querySelector(`[data-request="${active}"]`)?.focus();
  }

  select(number) {
    this.selected = number;
    this.drawn = -1;
    this.tell();
    this.table();
  }

  // Tell the story of the request with an id, as soon as it is known.
  find(id) {
    const found = [...this.live.requests.values()]
      .find((request) => request.id === id || request.id?.startsWith(`${id}.`));
    this.wanted = found ? null : id;
    if (!found) return;
    if (this.recording) this.show();
    this.select(found.number);
    $("story").focus();
  }

  tell() {
    const request = this.engine.requests.get(this.selected);
    $("story").hidden = !request;
    if (!request) return;
    $("story-title").textContent = `The story of request ${request.label}`;
    const lines = storyOf(request, this.engine);
    $("story-lines").replaceChildren(...lines.map((line) => make("li", { textContent: line })));
  }

  pause(stop) {
    this.paused = stop ? this.until() : null;
    $("pause").setAttribute("aria-pressed", String(stop));
    $("pause").textContent = stop ? "Go on" : "Pause";
    this.drawn = -1;
  }

  async open(file) {
    if (!file) return;
    try {
      this.show(new Recording(await file.text()), file.name);
    } catch (error) {
      $("live-error").textContent = error.message;
    }
    $("recording").value = "";
  }

  // Show a recording, or without one the engine as it is now.
  show(recording = null, name = "") {
    this.recording = recording;
    this.selected = null;
    $("scrub").hidden = $("go-live").hidden = !recording;
    $("pause").hidden = Boolean(recording);
    $("until").value = 1000;
    this.state(recording ? `the recording ${name}` : "connected");
    this.rewind();
  }

  // Go to the time that the slider says.
  rewind() {
    this.engine = this.recording ? this.recording.at(this.until()) : this.live;
    this.drawn = this.listed = -1;
    this.list();
  }
}
