// Starts the page: what is shown, the key, the conversation and the live view.

import { Conversation } from "./chat.js";
import { LiveView } from "./live.js";
import { $, key } from "./wire.js";

function show(part) {
  document.body.dataset.shown = part;
  for (const name of ["talk", "engine"]) {
    $(`show-${name}`).setAttribute("aria-pressed", String(name === part));
  }
  live.drawn = -1;
}

const live = new LiveView();
const conversation = new Conversation((id) => {
  show("engine");
  live.find(id);
});

function askForKey() {
  $("key-form").hidden = false;
  $("key-change").hidden = true;
  $("key").focus();
}

let attempt = 0;

// Connect, and ask for a key if the server wants one.
async function connect() {
  attempt += 1;
  const mine = attempt;
  for (;;) {
    try {
      await conversation.models();
      $("talk-error").textContent = "";
      break;
    } catch (error) {
      conversation.fail(error);
      live.state("not connected", error.message);
      if ([401, 403].includes(error.status) || mine !== attempt) return;
    }
    await new Promise((done) => { setTimeout(done, 2000); });
  }
  $("key-change").hidden = !key.get();
  if ((await live.follow()) === 401) askForKey();
}

addEventListener("key-wanted", askForKey);
$("key-change").addEventListener("click", askForKey);
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set($("key").value.trim());
  $("key").value = "";
  $("key-form").hidden = true;
  $("key-change").hidden = false;
  $("talk-error").textContent = "";
  $("question").focus();
  connect();
});
$("show-talk").addEventListener("click", () => show("talk"));
$("show-engine").addEventListener("click", () => show("engine"));
$("key-change").hidden = true;
connect();
