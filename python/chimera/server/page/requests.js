// Requests that have ended: the newest in a list, each with its whole story in the drawer. Read from the server's records.

import { $, count, h, printable, seconds, share, time } from "./words.js";
import { read } from "./server.js";
import { fillDrawer, openDrawer } from "./drawer.js";
import { happening } from "./actions.js";

const EVERY_MS = 3000;
const ANSWERED = ["stop", "length"];

export class Requests {
  #timer = null;

  /** Asked for only while somebody looks. */
  show(visible) {
    clearTimeout(this.#timer);
    this.#timer = null;
    if (visible) this.#load();
  }

  async #load() {
    let content;
    try {
      content = list(await read("/requests?most=60"));
    } catch (fault) {
      content = [h("p", { className: "empty" }, fault.message)];
    }
    const within = $("requests").contains(document.activeElement); // a reader with a keyboard keeps the place
    if (!within) $("requests").replaceChildren(...content);
    this.#timer = setTimeout(() => (document.hidden ? this.show(true) : this.#load()), EVERY_MS);
  }
}

function list(lines) {
  if (lines.length === 0) return [h("p", { className: "empty" }, "No request has ended yet.")];
  const row = (line) =>
    h(
      "li",
      {},
      h(
        "button",
        { type: "button", className: "request", onclick: () => openRequest(line.request) },
        h("time", {}, time(line.arrived_s)),
        h("span", { className: "name" }, printable(line.model)),
        h("span", { className: "outcome", "data-is": ANSWERED.includes(line.outcome) ? (line.kept ? "kept" : "late") : "refused" }, word(line)),
        h("span", { className: "n" }, `${count(line.prompt_tokens)} → ${count(line.output_tokens)}`),
        h("span", { className: "n" }, seconds(line.ended_s - line.arrived_s)),
      ),
    );
  return [h("ol", {}, ...lines.map(row))];
}

const word = (line) => (ANSWERED.includes(line.outcome) ? (line.kept ? "in time" : "late") : printable(line.outcome.replaceAll("_", " ")));

export async function openRequest(name) {
  openDrawer(`Request ${printable(name).slice(-12)}`, "request", [h("p", { className: "empty" }, "…")]);
  try {
    fillDrawer(...story(await read(`/explain?request=${encodeURIComponent(name)}`)));
  } catch (fault) {
    fillDrawer(h("p", { className: "empty" }, fault.message));
  }
}

export async function openModel(name) {
  openDrawer(printable(name), "model", [h("p", { className: "empty" }, "…")]);
  try {
    fillDrawer(...account(await read(`/explain?since=30m&model=${encodeURIComponent(name)}`)));
  } catch (fault) {
    fillDrawer(h("p", { className: "empty" }, fault.message));
  }
}

function facts(pairs) {
  return h("dl", { className: "facts" }, ...pairs.flatMap(([term, told]) => [h("dt", {}, term), h("dd", {}, told)]));
}

function story(account) {
  const begin = account.arrived_s;
  const first = account.first_token_s === null ? null : account.first_token_s - begin;
  const decoding = first !== null && account.output_tokens > 1 ? (account.ended_s - account.first_token_s) / (account.output_tokens - 1) : null;
  const promise = (kept, slo_s) => (slo_s === null ? "" : ` of ${seconds(slo_s)} promised${kept ? "" : ", broken"}`);
  return [
    facts([
      ["Model", printable(account.model)],
      ["Name", h("code", {}, printable(account.client || account.request))],
      ["Arrived", time(begin)],
      ["Outcome", printable(account.outcome.replaceAll("_", " ") + (account.detail ? `: ${account.detail}` : ""))],
      ["First token", seconds(first) + promise(account.kept_ttft, account.ttft_slo_s)],
      ["Per token", seconds(decoding) + promise(account.kept_tpot, account.tpot_slo_s)],
      ["Tokens", `${count(account.prompt_tokens)} in, ${count(account.cached_tokens)} cached, ${count(account.output_tokens)} out`],
      ...(account.key && account.key !== "anyone" ? [["Key", printable(account.key)]] : []),
    ]),
    h("h3", {}, "Timeline"),
    timeline(spans(account), begin, account.ended_s),
    ...account.tries.map((one) => h("p", { className: "reason" }, `On ${printable(one.replica)}: ${printable(one.why)}`)),
    h("h3", {}, "Meanwhile"),
    ...happenings(account.happenings, begin),
  ];
}

/** Where its time went: `[name, kind, from, to]`, without gaps. */
function spans(account) {
  const found = [];
  let since = account.arrived_s;
  const until = (at, name, kind) => {
    if (at > since) found.push([name, kind, since, at]);
    since = at;
  };
  for (const one of account.tries) {
    until(one.routed_s, "waits for a replica", "wait");
    if (one.admitted_s !== null) until(one.admitted_s, `waits for its turn on ${printable(one.replica)}`, "turn");
    const first = account.first_token_s;
    if (first !== null && first > since && first <= one.ended_s) until(first, "prompt", "prompt");
    until(one.ended_s, first !== null && since >= first ? "tokens" : "no token came", first !== null && since >= first ? "tokens" : "wait");
  }
  until(account.ended_s, account.tries.length ? "on its way out" : "waits for a replica", "wait");
  return found;
}

function timeline(spans, begin, end) {
  const whole = Math.max(end - begin, 1e-6);
  return h(
    "ol",
    { className: "timeline" },
    ...spans.map(([name, kind, from, to]) => {
      const bar = h("i", { "data-is": kind, ariaHidden: "true" });
      bar.style.left = `${(100 * (from - begin)) / whole}%`;
      bar.style.width = `${(100 * (to - from)) / whole}%`;
      return h("li", {}, h("span", {}, name), h("span", { className: "n" }, seconds(to - from)), h("span", { className: "track" }, bar));
    }),
  );
}

function account(told) {
  const of = told.statistics[0];
  const figures =
    of === undefined
      ? [h("p", { className: "empty" }, "No request in the last 30 minutes.")]
      : [
          facts([
            ["Requests", `${count(of.sent)} sent, ${count(of.answered)} answered`],
            ["Kept", share(of.joint_attainment * of.sent, of.sent)],
            ["First token", `${seconds(of.mean_ttft_s)} on average`],
            ["Whole answer", `${seconds(of.mean_e2e_s)} on average`],
            ["Tokens", `${count(of.prompt_tokens)} in, ${count(of.cached_tokens)} cached, ${count(of.output_tokens)} out`],
            ...(of.requeued ? [["Tried again", count(of.requeued)]] : []),
            ...Object.entries(of.refused).map(([why, n]) => [printable(why.replaceAll("_", " ")), count(n)]),
          ]),
        ];
  return [...figures, h("h3", {}, "What was done with it, in the last 30 minutes"), ...happenings([...told.happenings].reverse(), null)];
}

function happenings(happened, begin) {
  const lines = happened.filter((one) => one.what !== "grant" && one.what !== "recall").slice(0, 100);
  if (lines.length === 0) return [h("p", { className: "empty" }, "Nothing.")];
  return lines.map((one) =>
    happening({
      at_s: one.at_s,
      what: one.move ? `${one.what} (move)` : one.what,
      kind: one.what,
      subject: begin !== null && one.request ? "this request" : (one.replica ?? ""),
      mark: null,
      gpus: one.gpus ?? [],
      code: one.code,
      why: one.why ?? "",
      cost: one.cost ? printable(one.cost) : "",
      alternatives: one.alternatives ?? [],
    }),
  );
}
