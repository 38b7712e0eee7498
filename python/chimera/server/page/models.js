// The table of models: what each one does, and for operators what can be done with it.
//
// A row is its model's name until it is about to be seen; only rows that are get what is new. With 500 models that is the
// difference between a frame of 30 elements and one of 15,000.

import { $, colour, count, h, many, onTheme, printable, rate, say, share, size, swatch } from "./words.js";
import { STATES } from "./house.js";
import { forget, later, watchFor } from "./later.js";

const AT_ONCE = 40; // with more models than this, those at rest are folded away
const ROWS_AT_ONCE = 60;

export class Models {
  #house;
  #rows = [];
  #cast = -1;
  #folded = true;
  #verbs;

  constructor(house, verbs) {
    this.#house = house;
    this.#verbs = verbs;
    $("models-filter").addEventListener("input", () => this.show());
    $("rest").addEventListener("click", () => ((this.#folded = !this.#folded), this.show()));
    onTheme(() => ((this.#cast = -1), this.show()));
  }

  show() {
    const { cast } = this.#house;
    if (cast.number !== this.#cast) this.#build(cast);
    const wanted = $("models-filter").value.trim().toLowerCase();
    const folds = cast.models.length > AT_ONCE && wanted === "";
    let resting = 0;
    for (const model of this.#house.models()) {
      const rests = model.replicas.length === 0 && model.pulse.waiting === 0 && !model.part.pin;
      resting += rests;
      const row = this.#rows[model.index];
      const hidden = (folds && this.#folded && rests) || !model.part.name.toLowerCase().includes(wanted);
      if (row.node.hidden !== hidden) row.node.hidden = hidden;
      row.learn(model);
    }
    $("rest").hidden = !folds || resting === 0;
    say($("rest"), this.#folded ? `Show ${many(resting, "model")} at rest` : "Fold models at rest");
  }

  #build(cast) {
    this.#cast = cast.number;
    forget(this.#rows.map((row) => row.node));
    this.#rows = cast.models.map((part, index) => new Row(part, index, this.#verbs));
    $("rows").replaceChildren();
    this.#more();
  }

  /** Some rows in each frame: the first ones are seen at once. */
  #more = () => {
    const there = $("rows").childElementCount;
    $("rows").append(...this.#rows.slice(there, there + ROWS_AT_ONCE).map((row) => row.node));
    if (there + ROWS_AT_ONCE < this.#rows.length) later(this.#more);
  };
}

class Row {
  constructor(part, index, verbs) {
    this.part = part;
    this.index = index;
    this.verbs = verbs;
    this.name = printable(part.name);
    this.promises = part.ttft_slo_s !== null || part.tpot_slo_s !== null;
    this.node = h("tr", { className: "later" }, h("th", { scope: "row" }, this.name));
    watchFor(this, this.node);
  }

  /** What it does now; shown if somebody may see it. */
  learn(model) {
    this.model = model;
    if (this.near) this.come();
  }

  come = () => {
    if (this.up === undefined) this.#fill();
    this.#tell(this.model);
  };

  #fill() {
    const { part, index, verbs, name } = this;
    const cell = (label, ...inside) => h("td", { "data-label": label, className: label === "KV pool" || label === "GPU" ? "" : "n" }, ...inside);
    this.state = h("span", { className: "state" });
    this.why = h("small", { className: "why" });
    this.gpus = cell("GPU");
    this.running = cell("Running");
    this.queue = cell("Queue");
    this.kept = cell("Attained");
    this.tokens = cell("Tokens/s");
    this.pool = h("span", { className: "meter", ariaHidden: "true" }, h("i"));
    this.used = h("span", { className: "used n" });
    this.leased = h("span", { className: "n" });
    this.pool.style.color = colour(index, "used");
    this.up = h("button", { type: "button", className: "quiet", onclick: () => verbs.turn(this.up, part.name, this.isUp) });
    const pin = h("button", {
      type: "button",
      className: "quiet",
      ariaPressed: String(part.pin),
      ariaLabel: `Keep ${name} from leaving`,
      onclick: () => verbs.pin(pin, part.name, !part.pin),
    }, part.pin ? "Pinned" : "Pin");
    this.node.className = "";
    this.node.replaceChildren(
      h(
        "th",
        { scope: "row" },
        h("div", {}, swatch(colour(index, "used")), h("button", { type: "button", className: "link", onclick: () => verbs.explain(part.name) }, name)),
      ),
      h("td", { "data-label": "State" }, this.state, this.why),
      this.gpus,
      this.running,
      this.queue,
      this.kept,
      this.tokens,
      cell("KV pool", this.pool, this.used, this.leased),
      h("td", { className: "verbs" }, this.up, pin),
    );
  }

  #tell({ replicas, pulse, part }) {
    const best = replicas.find((replica) => replica.state === "serving") ?? replicas[0];
    const word = best === undefined ? "down" : best.quarantine !== null ? "quarantined" : STATES[best.state];
    this.isUp = word === "serving" || word === "loading";
    const copies = replicas.length > 1 ? ` ×${replicas.length}` : "";
    if (say(this.state, word + copies)) this.state.dataset.is = word;
    say(this.why, printable(replicas.map((replica) => replica.why).find(Boolean) ?? ""));
    say(this.gpus, replicas.map((replica) => replica.gpus.join(",")).join(" "));
    const sum = (field) => replicas.reduce((total, replica) => total + replica[field], 0);
    say(this.running, blank(sum("running")));
    say(this.queue, blank(sum("queued") + pulse.waiting));
    if (say(this.kept, this.promises ? share(pulse.kept, pulse.sent) : "–"))
      this.kept.classList.toggle("poor", this.promises && pulse.sent > 0 && pulse.kept / pulse.sent < 0.9);
    say(this.tokens, pulse.tokens ? rate(pulse.tokens) : "");
    const [kv, used] = [sum("kv"), sum("used")];
    if (say(this.used, kv ? size((used * part.kv_bytes) / 2 ** 20) : "")) {
      this.pool.style.setProperty("--part", kv ? (used / kv).toFixed(3) : 0);
      this.pool.hidden = kv === 0;
    }
    say(this.leased, kv ? ` of ${size((kv * part.kv_bytes) / 2 ** 20)}` : "");
    if (say(this.up, this.isUp ? "Unload" : "Load")) this.up.ariaLabel = `${this.isUp ? "Unload" : "Load"} ${this.name}`;
  }
}

const blank = (n) => (n ? count(n) : "");
