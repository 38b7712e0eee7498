// Elements, names and numbers as the page shows them. All text goes in as text: nothing here, or anywhere, makes markup of it.

export function h(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node && name !== "list") node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export const $ = (id) => document.getElementById(id);

const said = new WeakMap();

/** Changes the page only where it differs, and does not ask the page what it says. */
export function say(node, text) {
  if (said.get(node) === text) return false;
  said.set(node, text);
  node.textContent = text;
  return true;
}

/** A name on one line: what cannot be seen, or turns the writing round, is spelled out. */
export const printable = (text) =>
  text.replace(/[\p{C}\u2028\u2029]/gu, (c) => `\\u{${c.codePointAt(0).toString(16)}}`);

export function size(mib) {
  if (mib >= 1024 * 100) return `${Math.round(mib / 1024)} GiB`;
  if (mib >= 1024) return `${(mib / 1024).toFixed(1)} GiB`;
  return `${Math.round(mib)} MiB`;
}

export function seconds(s) {
  if (s === null || s === undefined) return "–";
  if (s < 0.9995) return `${Math.round(s * 1000)} ms`;
  if (s < 60) return `${s.toFixed(s < 10 ? 2 : 1)} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${Math.round(s % 60)} s`;
  return s < 86400 ? `${(s / 3600).toFixed(1)} h` : `${(s / 86400).toFixed(1)} d`;
}

const grouped = new Intl.NumberFormat("en");
export const count = (n) => (n < 1000 ? String(n) : grouped.format(n));
export const rate = (n) => (n === 0 ? "0" : n < 9.95 ? n.toFixed(1) : count(Math.round(n)));
export const many = (n, noun) => `${count(n)} ${noun}${n === 1 ? "" : "s"}`;

export function share(part, whole) {
  if (!whole) return "–";
  const percent = (100 * part) / whole;
  return percent === 100 || percent === 0 ? `${percent} %` : `${Math.min(99.9, percent).toFixed(1)} %`;
}

const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
export const time = (at_s) => clock.format(new Date(at_s * 1000));

// Colours of models: neighbours in the list are far apart on the wheel, all of one lightness.

const dark = matchMedia("(prefers-color-scheme: dark)");
const listeners = new Set();
dark.addEventListener("change", () => listeners.forEach((listener) => listener()));
export const onTheme = (listener) => listeners.add(listener);

const hue = (model) => (195 + model * 137.508) % 360;
const made = new Map();

/** `used` is full, `kv` a wash of it, `weights` greyed. */
export function colour(model, kind) {
  const key = `${model} ${kind} ${dark.matches}`;
  let known = made.get(key);
  if (known === undefined) {
    const [light, chroma] = dark.matches
      ? { used: [0.72, 0.105], kv: [0.45, 0.065], weights: [0.36, 0.022] }[kind]
      : { used: [0.6, 0.105], kv: [0.83, 0.055], weights: [0.78, 0.018] }[kind];
    known = model < 0 ? grey(kind) : `oklch(${light} ${chroma} ${hue(model).toFixed(1)})`;
    made.set(key, known);
  }
  return known;
}

/** Of memory that is no model's. */
export const grey = (kind) =>
  dark.matches
    ? { others: "#35332f", engines: "#45423d", adapters: "#6d5f3a" }[kind] ?? "#55524c"
    : { others: "#cfcbc2", engines: "#b9b4a9", adapters: "#d8c48f" }[kind] ?? "#a09b91";

export const swatch = (colour) => {
  const node = h("i", { className: "swatch", ariaHidden: "true" });
  node.style.background = colour;
  return node;
};
