// A recording on a page of the book: requests in time, blocks, a slider; a still picture is above.
//
// <div class="nanollm-replay"><script type="application/json">...a timeline file...</script></div>

import { drawBlocks, drawGantt, requestAt } from "./draw.js";
import { storyOf } from "./story.js";
import { Recording } from "./trace.js";
import { make, seconds } from "./wire.js";

const PLAY_MS = 8000;  // from beginning to end

class Replay {
  constructor(element, number) {
    this.recording = new Recording(element.querySelector("script").textContent);
    this.whole = this.recording.at(Infinity);
    this.selected = null;
    this.playing = 0;
    const id = `replay-${number}`;
    this.slider = make("input", { type: "range", id, min: 0, max: 1000, value: 1000 });
    this.button = make("button", { type: "button", textContent: "Play" });
    this.time = make("output", { htmlFor: id });
    this.gantt = make("canvas", { role: "img", ariaLabel: "Requests in time" });
    this.blocks = make("canvas", { role: "img", ariaLabel: "Blocks of memory" });
    this.story = make("ol", { ariaLive: "polite" });
    const label = make("label", { htmlFor: id, textContent: "Time" });
    element.append(make("p", { className: "controls" }, this.button, label, this.slider, this.time),
      make("div", {}, this.gantt), make("div", {}, this.blocks), this.story);
    this.slider.addEventListener("input", () => this.draw());
    this.button.addEventListener("click", () => this.play());
    this.gantt.addEventListener("click", (event) => {
      this.selected = requestAt(this.seen, event.offsetY)?.number ?? null;
      this.draw();
    });
    addEventListener("resize", () => this.draw());
    const dark = new MutationObserver(() => this.draw());
    dark.observe(document.body, { attributes: true, attributeFilter: ["class"] });
    this.draw();
  }

  get now() {
    return (this.recording.end * this.slider.value) / 1000;
  }

  draw() {
    const { end } = this.recording;
    this.seen = drawGantt(this.gantt, this.whole, end, end, this.selected, 1);
    const context = this.gantt.getContext("2d");
    const left = 44;  // of the axis
    const x = left + ((this.gantt.clientWidth - left) * this.slider.value) / 1000;
    context.fillStyle = getComputedStyle(this.gantt).getPropertyValue("--preempted");
    context.fillRect(x - 1, 0, 2, this.gantt.clientHeight - 18);
    const then = this.recording.at(this.now);
    this.blocks.hidden = then.numBlocks === null;
    if (then.numBlocks !== null) drawBlocks(this.blocks, then, this.selected);
    this.time.textContent = seconds(this.now);
    const request = then.requests.get(this.selected);
    this.story.replaceChildren(...(request ? storyOf(request, then) : [])
      .map((line) => make("li", { textContent: line })));
  }

  play() {
    cancelAnimationFrame(this.playing);
    if (this.button.textContent === "Stop") {
      this.button.textContent = "Play";
      return;
    }
    const begin = performance.now() - (this.slider.value % 1000) * (PLAY_MS / 1000);
    this.button.textContent = "Stop";
    const go = () => {
      const share = Math.min(1, (performance.now() - begin) / PLAY_MS);
      this.slider.value = Math.round(1000 * share);
      this.draw();
      if (share < 1) this.playing = requestAnimationFrame(go);
      else this.button.textContent = "Play";
    };
    go();
  }
}

const link = make("link", { rel: "stylesheet", href: new URL("replay.css", import.meta.url).href });
document.head.append(link);
link.addEventListener("load", () => {
  document.querySelectorAll(".nanollm-replay").forEach((element, i) => {
    if (!element.dataset.mounted) new Replay(element, i);
    element.dataset.mounted = "yes";
  });
});
