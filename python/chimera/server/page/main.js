// The dashboard: one stream of sights, a view for each part of the page, and the operator's verbs.

import { $, count, h, many, printable, rate, say, share } from "./words.js";
import { House } from "./house.js";
import { Memory } from "./memory.js";
import { Models } from "./models.js";
import { Actions } from "./actions.js";
import { Requests, openModel } from "./requests.js";
import { Chat } from "./chat.js";
import { askForKey, order, read, watch } from "./server.js";

const house = new House();
const requests = new Requests();
const verbs = {
  turn: (button, model, isUp) => carry(button, () => order("POST", isUp ? "/models/unload" : "/models/load", { model })),
  pin: (button, model, pin) => carry(button, () => order("POST", "/models/pin", { model, pin })),
  explain: openModel,
};
const views = [new Memory(house), new Models(house, verbs), new Actions(house)];
new Chat(house);

// What comes.

let due = 0;

function see(event) {
  live("live", "live");
  if (event.of === "welcome") welcome(event);
  else if (event.of === "away") live("away", event.why);
  else if (!house.see(event)) lookBack();
  else due ||= requestAnimationFrame(show); // a tab that nobody sees draws nothing
}

function show() {
  due = 0;
  for (const view of views) view.show();
  totals();
  rules();
  notice(house.fault ? `Records are not kept: ${house.fault}. Serving goes on.` : "", "fault");
}

function live(state, words) {
  $("live").dataset.is = state;
  say($("live"), words);
}

let looking = false;

async function lookBack() {
  if (looking) return;
  looking = true;
  try {
    house.lookBack(await read("/sight/past"));
  } catch (fault) {
    live("away", fault.message);
  }
  looking = false;
}

function welcome({ admin, key, version }) {
  lookBack();
  document.body.classList.toggle("guest", !admin);
  $("key-open").hidden = admin && key === "anyone";
  $("key-open").textContent = key === "anyone" ? "Key" : `Key: ${printable(key)}`;
  $("live").title = `chimera ${version}`;
  for (const id of ["policy", "local"]) $(id).disabled = !admin;
  offer();
}

function totals() {
  const sum = (list, field) => list.reduce((total, one) => total + one[field], 0);
  const serving = new Set(house.replicas.filter((one) => one.state === "serving").map((one) => one.model)).size;
  const promised = house.pulses.filter(({ model }) => {
    const part = house.cast.models[model];
    return part && (part.ttft_slo_s !== null || part.tpot_slo_s !== null);
  });
  const figures = [
    ["models up", `${serving} of ${house.cast.models.length}`],
    ["GPUs", count(house.cast.gpus.length)],
    ["requests/s", rate(sum(house.pulses, "requests"))],
    ["tokens/s", rate(sum(house.pulses, "tokens"))],
    ["attained", share(sum(promised, "kept"), sum(promised, "sent"))],
  ];
  const list = $("totals");
  if (list.childElementCount === 0) list.append(...figures.map(([word]) => h("div", {}, h("dd"), h("dt", {}, word))));
  figures.forEach(([, told], i) => say(list.children[i].firstElementChild, told));
}

// What an operator chooses.

async function offer() {
  const told = await read("/policy").catch(() => null); // the next welcome tries again
  if (told === null) return;
  for (const [id, names, chosen] of [["policy", told.policies, told.policy], ["local", told.locals, told.local]]) {
    $(id).replaceChildren(...names.map((name) => h("option", { value: name }, name)));
    $(id).value = chosen;
  }
}

function rules() {
  for (const id of ["policy", "local"]) {
    const select = $(id);
    if (document.activeElement !== select && select.value !== house[id] && !select.dataset.busy) select.value = house[id];
  }
}

for (const id of ["policy", "local"]) {
  $(id).addEventListener("change", async ({ target }) => {
    target.dataset.busy = "1";
    await carry(target, () => order("PUT", "/policy", { [id]: target.value }));
    delete target.dataset.busy;
    target.blur();
    rules();
  });
}

/** An order, and what came of it where that is not plain to see. */
async function carry(control, work) {
  control.disabled = true;
  try {
    await work();
    notice("", "order");
  } catch (fault) {
    notice(fault.message, "order");
  }
  control.disabled = false;
}

const notices = { fault: "", order: "" };

function notice(words, kind) {
  notices[kind] = words && printable(words);
  const told = Object.values(notices).filter(Boolean).join(" ");
  $("notice").hidden = told === "";
  say($("notice"), told);
}

$("notice").addEventListener("click", () => notice("", "order"));
$("key-open").addEventListener("click", () => askForKey("Another key shows what its owner may do"));

// Actions or requests.

const tabs = [["actions-tab", "actions"], ["requests-tab", "requests"]];

function choose(chosen) {
  for (const [tab, panel] of tabs) {
    const is = panel === chosen;
    $(tab).ariaSelected = String(is);
    $(tab).tabIndex = is ? 0 : -1;
    $(panel).hidden = !is;
  }
  requests.show(chosen === "requests");
}

for (const [tab, panel] of tabs) {
  $(tab).addEventListener("click", () => choose(panel));
  $(tab).addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const [other, its] = tabs.find(([id]) => id !== tab);
    choose(its);
    $(other).focus();
  });
}

watch("/sight", see, (why) => live("away", why));
