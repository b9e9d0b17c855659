// A conversation with the server that this page comes from. All of it lives here: the server remembers nothing.
"use strict";

const $ = (id) => document.getElementById(id);
const LABELS = {
  steps: "Steps of a picture",
  guidance: "Guidance",
  max_images: "Pictures at most",
  max_tokens: "Tokens at most",
  temperature: "Temperature",
};
const MOST_BYTES = 20e6; // of a picture that is added

let messages = []; // as the API has them: what is sent
let added = []; // data URLs of the pictures that go with the next question
let running = null; // the AbortController of the answer that is being written
let key = "";

// ------------------------------------------------------------------------------------------------- small things

function make(tag, name, text) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text; // never HTML: whatever a model writes is text
  return node;
}

function image(url, alt) {
  const node = make("img");
  node.onload = follow; // it has its height only now
  node.src = url;
  node.alt = alt;
  return node;
}

// The end of the conversation stays in view as it grows; but whoever has scrolled up is not torn away from what is being read.
let at_end = true;

function follow() {
  if (at_end) $("talk").scrollTop = $("talk").scrollHeight;
}

function settings() {
  const values = {};
  for (const input of $("settings").querySelectorAll("input")) {
    if (input.value !== "") values[input.name] = Number(input.value);
  }
  return values;
}

function busy(yes) {
  $("send").hidden = yes;
  $("stop").hidden = !yes;
  $("anew").disabled = yes || !messages.length;
  $("save").disabled = yes || !messages.length;
  for (const button of document.querySelectorAll("figcaption button")) button.disabled = yes;
}

// ------------------------------------------------------------------------------------------------- the question

function show_user(message) {
  const turn = make("div", "user");
  for (const part of message.content) {
    if (part.type === "text") turn.append(make("p", "", part.text));
    else turn.append(image(part.image_url.url, "your picture"));
  }
  $("talk").append(turn);
}

function show_added() {
  const nodes = added.map((url, i) => {
    const node = image(url, "picture " + (i + 1) + ", click to remove");
    node.title = "click to remove";
    node.onclick = () => { added.splice(i, 1); show_added(); };
    return node;
  });
  $("pictures").replaceChildren(...nodes);
}

function add(files) {
  for (const file of files) {
    if (!file.type.startsWith("image/")) continue;
    if (file.size > MOST_BYTES) { alert(file.name + " has more than " + MOST_BYTES / 1e6 + " MB."); continue; }
    const reader = new FileReader();
    reader.onload = () => { added.push(reader.result); show_added(); };
    reader.readAsDataURL(file);
  }
}

function ask(text) {
  const content = added.map((url) => ({ type: "image_url", image_url: { url } }));
  if (text) content.push({ type: "text", text });
  if (!content.length || running) return;
  added = [];
  show_added();
  $("hints").hidden = true;
  messages.push({ role: "user", content });
  show_user(messages.at(-1));
  const turn = make("div", "assistant");
  $("talk").append(turn);
  write(turn, { role: "assistant", content: [] }, {});
}

// ------------------------------------------------------------------------------------------------- the answer

// Ask for the rest of an answer, and show it as it comes. answer: what there is of it already; more: fields of the request.
async function write(turn, answer, more) {
  running = new AbortController();
  busy(true);
  messages.push(answer);
  const sent = answer.content.length ? messages : messages.slice(0, -1);
  const body = { model: "default", messages: sent, stream: true, previews: 3, ...settings(), ...more };
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = "Bearer " + key;
  const state = { paragraph: null, figure: null, waiting: make("div", "waiting") };
  turn.append(state.waiting);
  at_end = true;
  follow();
  try {
    const reply = await fetch("v1/chat/completions", {
      method: "POST", headers, body: JSON.stringify(body), signal: running.signal,
    });
    if (reply.status === 401) {
      key = prompt("This server wants a key:") || "";
      throw new Error("the server wants its key: ask again");
    }
    if (!reply.ok) throw new Error((await reply.json()).error.message);
    for await (const data of events(reply.body)) take(turn, answer, state, data);
  } catch (problem) {
    const stopped = problem.name === "AbortError";
    turn.append(make("p", stopped ? "note" : "problem", stopped ? "Stopped." : problem.message));
  }
  state.waiting.remove();
  if (state.figure?.classList.contains("growing")) state.figure.remove();
  // An answer of nothing is none: the question can be asked again.
  if (!answer.content.length) messages.splice(-2);
  running = null;
  busy(false);
  follow();
}

// The data of server-sent events, as objects.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function take(turn, answer, state, data) {
  if (data.error) throw new Error(data.error.message);
  const delta = data.choices[0].delta;
  if (typeof delta.content === "string" && delta.content) {
    const last = answer.content.at(-1);
    if (last?.type === "text") last.text += delta.content;
    else answer.content.push({ type: "text", text: delta.content });
    if (!state.paragraph) {
      state.paragraph = make("p");
      state.waiting.before(state.paragraph);
    }
    state.paragraph.textContent = answer.content.at(-1).text.trim();
  } else if (Array.isArray(delta.content)) {
    for (const part of delta.content) {
      answer.content.push(part);
      picture(turn, answer, state, part.image_url.url);
    }
    state.paragraph = null;
    state.figure = null;
  } else if (data.preview) {
    growing(state, data.preview);
  }
  const finish = data.choices[0].finish_reason;
  if (finish === "length") turn.append(make("p", "note", "It ends here: a limit is reached."));
  follow();
}

function growing(state, preview) {
  if (!state.figure) {
    state.figure = make("figure", "growing");
    state.figure.append(image(preview.url, "a picture in the making"), make("figcaption"));
    state.waiting.before(state.figure);
  }
  state.figure.firstChild.src = preview.url;
  state.figure.lastChild.textContent = "step " + preview.step + " of " + preview.steps;
}

function picture(turn, answer, state, url) {
  const figure = state.figure || make("figure");
  const number = answer.content.length - 1; // its place in the answer
  const again = make("button", "", "draw again");
  again.type = "button";
  again.onclick = () => redraw(turn, answer, number, figure);
  const caption = make("figcaption");
  caption.append(again);
  figure.className = "";
  figure.replaceChildren(image(url, "picture"), caption);
  if (!figure.isConnected) state.waiting.before(figure);
}

// That picture once more, under another seed; what came behind it is written anew.
function redraw(turn, answer, number, figure) {
  if (running) return;
  const place = messages.indexOf(answer);
  messages = messages.slice(0, place);
  while (turn.nextSibling) turn.nextSibling.remove();
  while (figure.nextSibling) figure.nextSibling.remove();
  figure.remove();
  const begun = { role: "assistant", content: answer.content.slice(0, number) };
  // Its older pictures are to be drawn again as parts of what is there now.
  for (const [i, old] of [...turn.querySelectorAll("figure")].entries()) {
    const at = begun.content.map((p, k) => (p.type === "image_url" ? k : -1)).filter((k) => k >= 0)[i];
    old.querySelector("button").onclick = () => redraw(turn, begun, at, old);
  }
  const seed = Math.floor(Math.random() * 1e9);
  const input = document.querySelector('#settings input[name="seed"]');
  input.value = seed;
  write(turn, begun, { draw: true, seed });
}

// ------------------------------------------------------------------------------------------------- keeping it

const LOOK =
  "body{max-width:44rem;margin:2rem auto;padding:0 1rem;font:1.06rem/1.6 system-ui}p{white-space:pre-wrap}" +
  "img{display:block;width:22rem;max-width:100%;margin:.5rem 0}.user{font-weight:600}.user img{width:auto;height:6rem}";

// The conversation as one file that needs no network.
function save() {
  const body = make("body"); // as nodes, so that what was typed stays text
  for (const message of messages) {
    const turn = make("div", message.role);
    for (const part of message.content) {
      turn.append(part.type === "text" ? make("p", "", part.text.trim()) : image(part.image_url.url, "picture"));
    }
    body.append(turn);
  }
  const head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>DuoGen</title><style>' + LOOK + "</style>";
  const link = make("a");
  link.href = URL.createObjectURL(new Blob(["<!doctype html><head>" + head + "</head>" + body.outerHTML], { type: "text/html" }));
  link.download = "duogen.html";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

// ------------------------------------------------------------------------------------------------- what is clicked

$("ask").onsubmit = (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (running || (!text && !added.length)) return;
  $("text").value = "";
  $("text").style.height = "";
  ask(text);
};
$("text").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
};
$("text").oninput = () => {
  $("text").style.height = "auto";
  $("text").style.height = $("text").scrollHeight + 2 + "px";
};
$("talk").onscroll = () => {
  const talk = $("talk");
  at_end = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 80;
};
$("text").onpaste = (event) => add(event.clipboardData.files);
$("file").onchange = () => { add($("file").files); $("file").value = ""; };
$("stop").onclick = () => running?.abort();
$("save").onclick = save;
$("anew").onclick = () => {
  messages = [];
  for (const turn of document.querySelectorAll("main > .user, main > .assistant")) turn.remove();
  $("hints").hidden = false;
  busy(false);
};
for (const hint of $("hints").querySelectorAll("button")) hint.onclick = () => ask(hint.textContent);
document.ondragover = (event) => event.preventDefault();
document.ondrop = (event) => { event.preventDefault(); add(event.dataTransfer.files); };

fetch("about").then((reply) => reply.json()).then((about) => {
  $("model").textContent = about.model;
  $("world").textContent = about.world;
  $("world").hidden = !about.world;
  const all = { seed: "Seed", ...LABELS };
  for (const [name, label] of Object.entries(all)) {
    const field = make("label", "", label);
    const input = make("input");
    input.type = "number";
    input.name = name;
    input.step = "any";
    input.placeholder = name === "seed" ? "0" : about.settings[name];
    field.append(input);
    $("settings").append(field);
  }
});
