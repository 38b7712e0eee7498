// The action feed, newest first: what was done to which model, and why; what else was weighed is a click away.

import { $, colour, h, printable, seconds, swatch, time } from "./words.js";
import { later } from "./later.js";

const MOST = 200;
const AT_ONCE = 20;

export class Actions {
  #house;
  #shown = 0;
  #behind = []; // of many that come at once, the older ones: they follow a few at a time

  constructor(house) {
    this.#house = house;
  }

  show() {
    const fresh = this.#house.news.filter((one) => one.number > this.#shown);
    if (fresh.length === 0) return;
    this.#shown = fresh.at(-1).number;
    const list = $("actions");
    const nodes = this.#items(fresh.splice(-AT_ONCE).reverse());
    list.prepend(...nodes);
    if (fresh.length) this.#behind.unshift({ entries: fresh.reverse(), after: nodes.at(-1) });
    trim(list);
    if (this.#behind.length) later(this.#more);
  }

  #more = () => {
    const [batch] = this.#behind;
    const nodes = this.#items(batch.entries.splice(0, AT_ONCE));
    batch.after.after(...nodes);
    batch.after = nodes.at(-1);
    trim($("actions"));
    if (batch.entries.length === 0 || !batch.after.isConnected) this.#behind.shift();
    if (this.#behind.length) later(this.#more);
  };

  #items(entries) {
    const places = new Map(this.#house.cast.models.map((part, place) => [part.name, place]));
    return entries.map((one) => item(one, places));
  }
}

function trim(list) {
  while (list.childElementCount > MOST) list.lastElementChild.remove();
}

function item(entry, places) {
  const place = places.get(entry.model);
  const subject = entry.replica?.endsWith("/0") ? entry.model : (entry.replica || entry.model || "");
  return h(
    "li",
    {},
    happening({
      at_s: entry.at_s,
      what: entry.move ? `${entry.what} (move)` : entry.what,
      kind: entry.what,
      subject,
      mark: place === undefined ? null : swatch(colour(place, "used")),
      gpus: entry.gpus ?? [],
      code: entry.code,
      why: entry.reason ?? "",
      took: entry.seconds,
      alternatives: entry.alternatives ?? [],
    }),
  );
}

/** One line of the log, here and in the drawer. */
export function happening({ at_s, what, kind, subject, mark, gpus, code, why, took, cost, alternatives }) {
  const tail = [gpus.length ? `GPU\u00a0${gpus.join(",")}` : "", code ? printable(code) : "", took ? seconds(took) : "", cost ?? ""];
  return h(
    "div",
    { className: "happening" },
    h("time", { dateTime: new Date(at_s * 1000).toISOString() }, time(at_s)),
    h(
      "div",
      {},
      h("p", {}, h("b", { className: "what", "data-is": kind }, what), " ", mark, h("span", { className: "name" }, printable(subject)), h("small", {}, tail.filter(Boolean).join(" · "))),
      why ? h("p", { className: "reason" }, printable(why)) : null,
      alternatives.length ? weighed(alternatives) : null,
    ),
  );
}

function weighed(alternatives) {
  return h(
    "details",
    {},
    h("summary", {}, `${alternatives.length} weighed`),
    h(
      "table",
      {},
      ...alternatives.map(({ what, score, unit, chosen }) =>
        h(
          "tr",
          { className: chosen ? "chosen" : "" },
          h("td", {}, printable(what), chosen ? h("small", {}, " chosen") : null),
          h("td", { className: "n" }, `${Number(score.toPrecision(4))} ${printable(unit ?? "")}`),
        ),
      ),
    ),
  );
}
