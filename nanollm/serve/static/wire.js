// How the page talks to the server: a key, errors as the server says them, events.

export const root = new URL("..", import.meta.url);  // also behind a root path

export const key = {
  get: () => sessionStorage.getItem("nanollm-key") ?? "",
  set: (text) => sessionStorage.setItem("nanollm-key", text),
};

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;  // of HTTP; 0: there was no answer
  }
}

async function errorOf(response) {
  const text = await response.text();
  try {
    return new ApiError(response.status, JSON.parse(text).error.message);
  } catch {  // not from our server: a proxy, perhaps
    return new ApiError(response.status, `${response.status} ${response.statusText}`);
  }
}

// Send a request; raises ApiError unless the answer is a success.
export async function call(path, body, signal) {
  const headers = key.get() ? { authorization: `Bearer ${key.get()}` } : {};
  const options = { headers, signal };
  if (body !== undefined) {
    headers["content-type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  let response;
  try {
    response = await fetch(new URL(path, root), options);
  } catch (error) {
    throw error.name === "AbortError" ? error : new ApiError(0, "The server cannot be reached.");
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

// Yield the data of server-sent events; an empty text for a comment, which is a sign of life.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const lines = part.split("\n").filter((line) => line.startsWith("data: "));
        yield lines.map((line) => line.slice(6)).join("\n");
      }
    }
  } catch (error) {
    throw error.name === "AbortError" ? error : new ApiError(0, "The connection was lost.");
  } finally {
    reader.cancel().catch(() => {});
  }
}

export function $(id) {
  return document.getElementById(id);
}

// Make an element with properties and children.
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export function seconds(ms) {
  if (ms === null || ms === undefined || Number.isNaN(ms)) return "–";
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(ms < 10000 ? 2 : 1)} s`;
}
