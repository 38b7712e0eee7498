// A chat with one of the models, streamed; each answer says how long it took and leads to its request's story.

import { $, h, printable, rate, seconds } from "./words.js";
import { ask, events } from "./server.js";
import { openDrawer } from "./drawer.js";
import { openRequest } from "./requests.js";

const LONGEST = 512;

export class Chat {
  #house;
  #turns = [];
  #log = h("div", { className: "turns", role: "log", ariaLabel: "The chat", tabIndex: 0 });
  #model = h("select", { ariaLabel: "Model" });
  #words = h("textarea", { rows: 2, placeholder: "Say something", ariaLabel: "Message" });
  #send = h("button", { type: "submit" }, "Send");
  #open = null; // an answer that is on its way can be stopped

  constructor(house) {
    this.#house = house;
    $("chat-open").addEventListener("click", () => this.show());
    this.#words.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.#form.requestSubmit();
      }
    });
  }

  #form = h(
    "form",
    {
      className: "chat",
      onsubmit: (event) => {
        event.preventDefault();
        if (this.#open) this.#open.abort();
        else this.#say();
      },
    },
    h("p", { className: "tools" }, this.#model, h("button", { type: "button", className: "quiet", onclick: () => this.#forget() }, "Begin anew")),
    this.#log,
    h("p", { className: "say" }, this.#words, this.#send),
  );

  show() {
    this.#offer();
    $("chat-open").ariaExpanded = "true";
    openDrawer("Chat", "chat", [this.#form], () => ($("chat-open").ariaExpanded = "false"));
    this.#words.focus();
  }

  #offer() {
    const chosen = this.#model.value;
    const up = new Set(this.#house.replicas.filter((one) => one.state === "serving").map((one) => one.model));
    const models = [...this.#house.models()].filter(({ part }) => !part.embedding);
    models.sort((a, b) => up.has(b.index) - up.has(a.index));
    this.#model.replaceChildren(
      ...models.map(({ part, index }) => h("option", { value: part.name }, printable(part.name) + (up.has(index) ? "" : " (down)"))),
    );
    if (models.some(({ part }) => part.name === chosen)) this.#model.value = chosen;
  }

  #forget() {
    this.#open?.abort();
    this.#turns = [];
    this.#log.replaceChildren();
  }

  async #say() {
    const words = this.#words.value.trim();
    if (words === "" || this.#model.value === "") return;
    this.#words.value = "";
    this.#turns.push({ role: "user", content: words });
    const told = h("p", { className: "told" });
    const note = h("small", {}, "…");
    this.#log.append(h("p", { className: "asked" }, words), told, note);
    this.#log.scrollTop = this.#log.scrollHeight;
    this.#open = new AbortController();
    this.#send.textContent = "Stop";
    const turns = this.#turns;
    try {
      const answer = await this.#answer(told, note);
      if (turns === this.#turns) turns.push({ role: "assistant", content: answer });
    } catch (fault) {
      note.textContent = fault.name === "AbortError" ? "stopped" : fault.message;
      if (turns === this.#turns) turns.pop();
    }
    this.#open = null;
    this.#send.textContent = "Send";
  }

  async #answer(told, note) {
    const began = performance.now();
    const response = await ask("/v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ model: this.#model.value, messages: this.#turns, max_tokens: LONGEST, stream: true }),
      signal: this.#open.signal,
    });
    let first = null;
    let pieces = 0;
    for await (const data of events(response)) {
      if (data === "[DONE]") break;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      const piece = event.choices?.[0]?.delta?.content ?? "";
      if (piece === "") continue;
      first ??= performance.now();
      pieces += 1;
      const below = this.#log.scrollHeight - this.#log.scrollTop - this.#log.clientHeight < 40;
      told.append(piece);
      if (below) this.#log.scrollTop = this.#log.scrollHeight;
    }
    const took = (performance.now() - (first ?? began)) / 1000;
    const request = response.headers.get("x-request-id");
    note.replaceChildren(
      `${seconds(((first ?? began) - began) / 1000)} to the first token, ${rate(pieces / Math.max(took, 0.001))} pieces/s `,
      h("button", { type: "button", className: "link", onclick: () => openRequest(request) }, "its story"),
    );
    return told.textContent;
  }
}
