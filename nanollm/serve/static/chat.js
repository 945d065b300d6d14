// The playground: a conversation, and the options of its next request.

import { Answer } from "./answer.js";
import { asCurl, asPython } from "./recipe.js";
import { $, ApiError, call, events, key, make, seconds } from "./wire.js";

const ENDINGS = {
  stop: "The answer is complete.", length: "The answer was cut: it has reached its limit of tokens.",
  tool_calls: "The model asks for a function to be called.", stopped: "You have stopped the answer.",
  failed: "",  // the error says it
};
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "n", "seed"];

function json(id, what) {
  const text = $(id).value.trim();
  if (!text) return undefined;
  try {
    return JSON.parse(text);
  } catch (error) {
    $("options").open = true;
    $(id).focus();
    throw new ApiError(0, `${what} is no JSON: ${error.message}`);
  }
}

// What the options say, as fields of a request; what is empty is left to the server.
function settings() {
  const found = {};
  for (const id of NUMBERS) if ($(id).value !== "") found[id] = Number($(id).value);
  const stop = $("stop_strings").value.split("\n").filter(Boolean);
  if (stop.length) found.stop = stop;
  const schema = json("schema", "The schema");
  if (schema !== undefined) {
    found.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
  }
  const tools = json("tools", "The list of tools");
  if (tools !== undefined) found.tools = tools;
  if ($("logprobs").checked) Object.assign(found, { logprobs: true, top_logprobs: 5 });
  return found;
}

export class Conversation {
  constructor(onStory) {
    this.turns = [];  // messages
    this.abort = null;  // of the answer that is being made
    this.onStory = onStory;
    $("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    $("question").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.send();
      }
    });
    addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.abort) this.abort.abort();
    });
    $("settings").addEventListener("submit", (event) => event.preventDefault());
    $("stop").addEventListener("click", () => this.abort?.abort());
    $("clear").addEventListener("click", () => this.clear());
    $("copy-curl").addEventListener("click", () => this.copy(asCurl, "The command"));
    $("copy-python").addEventListener("click", () => this.copy(asPython, "The program"));
  }

  // The models and adapters of the server. Raises ApiError.
  async models() {
    const { data } = await (await call("v1/models")).json();
    $("model").replaceChildren(...data.map((model) => make("option", { value: model.id,
      textContent: model.parent ? `${model.id} (adapter)` : model.id })));
    $("model-name").textContent = data[0].id;
  }

  body(question) {
    const system = $("system").value.trim();
    const messages = [...(system ? [{ role: "system", content: system }] : []), ...this.turns];
    if (question) messages.push({ role: "user", content: question });
    return { ...($("model").value ? { model: $("model").value } : {}), messages, ...settings(),
      stream: true, stream_options: { include_usage: true } };
  }

  async send() {
    const question = $("question").value.trim();
    if (!question || this.abort) return;
    let body;
    try {
      body = this.body(question);
    } catch (error) {
      this.fail(error);
      return;
    }
    $("talk-error").textContent = "";
    $("question").value = "";
    this.show("user", make("div", { className: "text", textContent: question }));
    this.abort = new AbortController();
    this.busy(true);
    await this.receive(body, question);
    this.abort = null;
    this.busy(false);
  }

  async receive(body, question) {
    const n = body.n ?? 1;
    const answers = Array.from({ length: n }, (_, i) => new Answer(n > 1 ? `Answer ${i + 1}` : ""));
    const group = make("div", { className: n > 1 ? "several" : "" },
      ...answers.map((answer) => answer.element));
    const foot = make("p", { className: "help foot" });
    const turn = this.show("assistant", group, foot);
    const run = { start: performance.now(), first: null, usage: null, id: null };
    let ending = "";
    try {
      await this.read(body, answers, run);
    } catch (error) {
      ending = error.name === "AbortError" ? "stopped" : "failed";
      if (ending === "failed") this.fail(error);
    }
    const [chosen] = answers;
    const said = chosen.text || chosen.calls.length || chosen.reasoning;
    if (said) {
      this.turns.push({ role: "user", content: question }, chosen.message);
    } else if (ending) { // nothing has come: the question may be asked again
      turn.remove();
      $("turns").lastElementChild?.remove();
      $("question").value ||= question;
    }
    this.foot(foot, run, ending || chosen.reason);
  }

  async read(body, answers, run) {
    const response = await call("v1/chat/completions", body, this.abort.signal);
    for await (const text of events(response)) {
      if (!text || text === "[DONE]") continue;
      const chunk = JSON.parse(text);
      if (chunk.error) throw new ApiError(200, chunk.error.message);
      run.id = chunk.id;
      run.usage = chunk.usage ?? run.usage;
      for (const choice of chunk.choices) {
        const { content, reasoning, tool_calls: calls } = choice.delta;
        if (content || reasoning || calls) run.first ??= performance.now();
        answers[choice.index].add(choice);
      }
      this.scroll();
    }
    if (answers.some((answer) => answer.reason === null)) {
      throw new ApiError(0, "The connection was lost before the answer had ended.");
    }
  }

  foot(foot, run, ending) {
    const now = performance.now();
    const words = [ending];
    if (run.first !== null) words.push(`first token here after ${seconds(run.first - run.start)}`);
    if (run.usage) {
      const { completion_tokens: made, prompt_tokens: asked } = run.usage;
      const cached = run.usage.prompt_tokens_details?.cached_tokens ?? 0;
      words.push(`${asked} prompt tokens, ${cached} of them cached`, `${made} tokens`);
      const rate = (1000 * (made - 1)) / (now - run.first);
      if (run.first !== null && made > 1) words.push(`${rate.toFixed(1)} tokens/s`);
    }
    const text = words.filter(Boolean).join(" · ");
    foot.textContent = text;
    $("talk-status").textContent = ENDINGS[ending] ?? `The answer has ended: ${ending}.`;
    if (run.id === null) return;
    const story = make("button", { type: "button", className: "small", textContent: "Its story" });
    story.addEventListener("click", () => this.onStory(run.id));
    foot.append(" ", story);
    this.scroll();
  }

  show(role, ...parts) {
    $("turns").querySelector(".empty")?.remove();
    const name = role === "user" ? "You" : "Model";
    const turn = make("article", { className: role },
      make("h3", { textContent: name }), ...parts);
    $("turns").append(turn);
    this.scroll(true);
    return turn;
  }

  // Stay at the end, unless the reader has gone up.
  scroll(always = false) {
    const turns = $("turns");
    const below = turns.scrollHeight - turns.scrollTop - turns.clientHeight;
    if (always || below < 80) turns.scrollTop = turns.scrollHeight;
  }

  busy(busy) {
    $("send").disabled = busy;
    $("stop").disabled = !busy;
    if (busy) $("talk-status").textContent = "The model is writing.";
    if (!busy && document.activeElement === document.body) $("question").focus();
  }

  fail(error) {
    $("talk-error").textContent = error.message;
    $("talk-status").textContent = "";
    if (error.status === 401) dispatchEvent(new Event("key-wanted"));
  }

  clear() {
    this.abort?.abort();
    this.turns = [];
    $("turns").replaceChildren();
    $("talk-error").textContent = $("talk-status").textContent = "";
    $("question").focus();
  }

  async copy(write, what) {
    try {
      const body = this.body($("question").value.trim());
      await copyText(write(body, Boolean(key.get())));
      $("talk-error").textContent = "";
      $("talk-status").textContent = `${what} is in the clipboard.`;
    } catch (error) {
      this.fail(error);
    }
  }
}

async function copyText(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const area = make("textarea", { value: text });  // pages without HTTPS have no clipboard
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}
