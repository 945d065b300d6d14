// One answer on the page while it grows: text, thoughts, calls, tokens with probabilities.

import { make } from "./wire.js";

export class Answer {
  constructor(label) {
    this.text = "";
    this.reasoning = "";
    this.calls = [];
    this.tokens = 0;
    this.reason = null;
    this.decoder = new TextDecoder();  // a token may be a part of a character
    this.thoughts = make("details", { className: "thoughts", hidden: true },
      make("summary", { textContent: "Thoughts" }));
    this.thoughtsText = make("div", { className: "text" });
    this.thoughts.append(this.thoughtsText);
    this.body = make("div", { className: "text" });
    this.callList = make("div", { className: "calls" });
    this.token = make("p", { className: "token", hidden: true });
    this.element = make("div", { className: "answer" }, this.thoughts, this.body, this.callList,
      this.token);
    if (label) this.element.prepend(make("p", { className: "help", textContent: label }));
    for (const kind of ["pointerover", "click"]) {
      this.body.addEventListener(kind, (event) => this.point(event.target));
    }
  }

  // Take what a chunk of the stream says about this answer.
  add(choice) {
    const delta = choice.delta;
    const thought = delta.reasoning ?? delta.reasoning_content ?? "";
    if (thought) {
      this.reasoning += thought;
      this.thoughts.hidden = false;
      this.thoughtsText.append(thought);
    }
    const reports = choice.logprobs?.content ?? [];
    if (reports.length) this.addTokens(reports);
    else if (delta.content) this.body.append(delta.content);
    this.text += delta.content ?? "";
    for (const call of delta.tool_calls ?? []) this.addCall(call);
    this.reason = choice.finish_reason ?? this.reason;
    if (choice.finish_reason) this.markEnd();
  }

  addCall(call) {
    const known = this.calls[call.index] ??= {
      id: "", type: "function", function: { name: "", arguments: "" },
    };
    known.id ||= call.id ?? "";
    known.function.name += call.function?.name ?? "";
    known.function.arguments += call.function?.arguments ?? "";
    this.callList.replaceChildren(...this.calls.map((one) => make("pre", {
      textContent: `${one.function.name}(${one.function.arguments})`,
    })));
  }

  addTokens(reports) {
    for (const report of reports) {
      const textContent = report.bytes
        ? this.decoder.decode(new Uint8Array(report.bytes), { stream: true }) : report.token;
      const token = make("span", { className: "tok", textContent });
      token.classList.add(["sure", "likely", "doubtful"][
        report.logprob > Math.log(0.8) ? 0 : report.logprob > Math.log(0.3) ? 1 : 2]);
      token.report = report;
      this.body.append(token);
    }
  }

  // A token that has ended the answer is not a part of its text, and looks like that.
  markEnd() {
    const last = this.body.lastElementChild;
    if (!last || this.text.endsWith(last.textContent)) return;
    last.classList.add("control");
    last.title = "ends the answer, and is no part of its text";
  }

  // Say how probable a token was, and what else could have come.
  point(token) {
    if (!token.report) return;
    this.body.querySelector(".tok.chosen")?.classList.remove("chosen");
    token.classList.add("chosen");
    const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(1)} %`;
    const rivals = token.report.top_logprobs
      .map((one) => `${JSON.stringify(one.token)} ${percent(one.logprob)}`);
    this.token.hidden = false;
    this.token.textContent = `${JSON.stringify(token.report.token)} `
      + `${percent(token.report.logprob)}; most probable: ${rivals.join(", ")}`;
  }

  // What the next request says about it.
  get message() {
    const calls = this.calls.filter(Boolean);
    return { role: "assistant", content: this.text || (calls.length ? null : ""),
      ...(calls.length ? { tool_calls: calls } : {}) };
  }
}
