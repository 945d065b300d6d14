// The request that the page would send, as a command and as a program.

import { root } from "./wire.js";

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

export function asCurl(body, withKey) {
  const lines = [`curl ${quoted(new URL("v1/chat/completions", root).href)}`,
    "-H 'content-type: application/json'"];
  if (withKey) lines.push('-H "authorization: Bearer $OPENAI_API_KEY"');
  lines.push(`-d ${quoted(JSON.stringify({ ...body, stream: false, stream_options: undefined }))}`);
  return lines.join(" \\\n  ");
}

// JSON as Python has it.
export function python(value, indent = 4) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const entries = Array.isArray(value) ? value.map((one) => python(one, indent + 4))
    : Object.entries(value).map(([k, v]) => `${JSON.stringify(k)}: ${python(v, indent + 4)}`);
  const whole = open + entries.join(", ") + close;
  const pad = " ".repeat(indent);
  if (whole.length + indent < 90) return whole;
  return `${open}\n${entries.map((one) => `${pad}    ${one},\n`).join("")}${pad}${close}`;
}

const OURS = ["top_k", "min_p"];  // what the client does not know by name

export function asPython(body, withKey) {
  const known = { ...body };
  delete known.stream;
  delete known.stream_options;
  const extra = Object.fromEntries(OURS.filter((name) => name in known)
    .map((name) => [name, known[name]]));
  for (const name of OURS) delete known[name];
  const lines = Object.entries(known).map(([name, value]) => `    ${name}=${python(value)},`);
  if (Object.keys(extra).length) lines.push(`    extra_body=${python(extra)},`);
  const key = withKey ? "" : ', api_key="none"';
  return ["from openai import OpenAI", "",
    `client = OpenAI(base_url=${JSON.stringify(new URL("v1", root).href)}${key})`,
    "answer = client.chat.completions.create(", ...lines, ")",
    "print(answer.choices[0].message.content)"].join("\n");
}
