// A map of each GPU's memory over the last five minutes: what lies still at the bottom, the pools that breathe above it.
//
// A second is a column. A new one pushes the picture to the left, so a frame costs one column for each GPU, however many
// minutes are shown.

import { $, colour, grey, h, onTheme, printable, say, size, swatch, time } from "./words.js";
import { WINDOW_S } from "./house.js";
import { forget, later, watchFor } from "./later.js";

const REST = ["others", "engines", "adapters"];
const REST_WORDS = { others: "others, margin", engines: "engines", adapters: "adapters" };
const LEGEND_UP_TO = 12; // GPUs; with more of them a look at one of them tells

export class Memory {
  #house;
  #maps = [];
  #cast = -1;

  constructor(house) {
    this.#house = house;
    const again = () => this.#maps.forEach((map) => map.redraw());
    new ResizeObserver(again).observe($("maps"));
    onTheme(() => (again(), this.#legend()));
    this.#legend();
  }

  show() {
    const { cast } = this.#house;
    if (cast.number !== this.#cast) this.#build(cast);
    if (this.#house.replaced) for (const map of this.#maps) map.drawn = undefined;
    for (const map of this.#maps) if (map.near) later(map.come);
    this.#house.replaced = false;
  }

  #build(cast) {
    this.#cast = cast.number;
    const n = cast.gpus.length;
    const density = n <= 2 ? "large" : n <= 4 ? "wide" : n <= LEGEND_UP_TO ? "" : "small";
    $("maps").className = density;
    forget(this.#maps.map((map) => map.node));
    this.#maps = cast.gpus.map((device, place) => new Map_(this.#house, device, place, density !== "small"));
    $("maps").replaceChildren(...this.#maps.map((map) => map.node));
    this.#house.replaced = true;
  }

  #legend() {
    const samples = [["used", "KV used"], ["kv", "KV leased"], ["weights", "weights"]].map(([kind, word]) => [colour(0, kind), word]);
    samples.push([grey("engines"), "engines"], [grey("others"), "others, margin"]);
    $("memory-legend").replaceChildren(...samples.map(([shade, word]) => h("span", {}, swatch(shade), word)));
  }
}

class Map_ {
  constructor(house, device, place, legend) {
    this.house = house;
    this.device = device;
    this.place = place;
    this.canvas = h("canvas", { tabIndex: 0, role: "img" });
    this.free = h("span", { className: "free" });
    this.pools = legend ? h("ul", { className: "pools" }) : null;
    this.node = h(
      "figure",
      {},
      h("figcaption", {}, h("b", {}, `GPU ${device.gpu_id}`), h("span", { className: "where" }, where(device)), this.free),
      this.canvas,
      this.pools,
    );
    this.cursor = null;
    watchFor(this, this.node);
    this.canvas.addEventListener("pointermove", (event) => this.#look(this.#momentAt(event.offsetX)));
    this.canvas.addEventListener("pointerleave", () => this.#look(null));
    this.canvas.addEventListener("focus", () => this.#name());
    this.canvas.addEventListener("focus", () => this.canvas.matches(":focus-visible") && this.#look(this.house.moments.at(-1)));
    this.canvas.addEventListener("blur", () => this.#look(null));
    this.canvas.addEventListener("keydown", (event) => this.#key(event));
  }

  redraw() {
    this.drawn = undefined;
    if (this.near) later(this.come);
  }

  /** The newest second, or all of them anew. */
  come = () => {
    const newest = this.house.moments.at(-1);
    if (newest === undefined) return;
    if (this.drawn === undefined) this.#draw();
    else if (newest.at > this.drawn) this.#push(newest);
    this.#tell(newest);
    if (this.cursor !== null) this.#look(this.cursor);
  };

  #draw() {
    const { canvas } = this;
    const scale = devicePixelRatio;
    const [width, height] = [Math.round(canvas.clientWidth * scale), Math.round(canvas.clientHeight * scale)];
    if (width === 0 || height === 0) return;
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    const paper = this.#paper;
    paper.clearRect(0, 0, width, height);
    this.drawn = this.house.moments.at(-1)?.at;
    for (const moment of this.house.moments) this.#column(moment);
  }

  get #paper() {
    return (this.context ??= this.canvas.getContext("2d", { alpha: true }));
  }

  /** Where a moment lies, in whole pixels of an endless strip: columns meet without a seam. */
  #x(at) {
    return Math.round((at * this.canvas.width) / WINDOW_S);
  }

  /** All that came since, which is more than one second where nobody looked. */
  #push(newest) {
    const { width, height } = this.canvas;
    const by = this.#x(newest.at) - this.#x(this.drawn);
    const fresh = this.house.moments.filter((moment) => moment.at > this.drawn);
    this.drawn = newest.at;
    const paper = this.#paper;
    paper.globalCompositeOperation = "copy";
    paper.drawImage(this.canvas, -by, 0);
    paper.globalCompositeOperation = "source-over";
    paper.clearRect(width - by, 0, by, height);
    for (const moment of fresh) this.#column(moment);
  }

  #column(moment) {
    const shelf = moment.shelves[this.place];
    if (shelf === undefined) return;
    const { width, height } = this.canvas;
    const right = width - (this.#x(this.drawn) - this.#x(moment.at));
    const left = width - (this.#x(this.drawn) - this.#x(moment.at - moment.span));
    if (right <= 0 || left >= right) return;
    const paper = this.#paper;
    const scale = height / this.device.mib;
    const seam = devicePixelRatio >= 2 ? 2 : 1;
    let below = 0;
    const band = (mib, shade, parted) => {
      if (mib <= 0) return;
      const [bottom, top] = [Math.round(below * scale), Math.round((below + mib) * scale)];
      below += mib;
      const gap = parted && top - bottom > 3 * seam ? seam : 0;
      paper.fillStyle = shade;
      paper.fillRect(left, height - top + gap, right - left, top - bottom - gap);
    };
    for (const kind of REST) band(shelf[kind], grey(kind), kind === "engines");
    for (const [model, weights] of shelf.pools) band(weights, colour(model, "weights"), true);
    for (const [model, , kv, used] of shelf.pools) {
      band(used, colour(model, "used"), kv <= used);
      band(kv - used, colour(model, "kv"), true);
    }
  }

  #tell(moment) {
    const shelf = moment.shelves[this.place];
    if (shelf === undefined) return;
    const held = total(shelf);
    say(this.free, `${size(Math.max(0, this.device.mib - held))} free of ${size(this.device.mib)}`);
    if (this.label === undefined || document.activeElement === this.canvas) this.#name();
    if (this.pools !== null) this.#list(shelf);
  }

  /** For those who cannot see it; made anew when it is come to. */
  #name() {
    const shelf = this.house.moments.at(-1)?.shelves[this.place];
    if (shelf === undefined) return;
    const pools = shelf.pools.map(([model, weights, kv]) => `${printable(this.house.name(model))} ${size(weights + kv)}`);
    this.label = `Memory of GPU ${this.device.gpu_id}: ${size(total(shelf))} held. ${pools.join(", ")}`;
    this.canvas.ariaLabel = this.label;
  }

  #list(shelf) {
    const key = shelf.pools.map((pool) => pool[0]).join();
    if (key !== this.listed) {
      this.listed = key;
      this.items = shelf.pools.map(([model]) => h("span", { className: "n" }));
      this.pools.replaceChildren(
        ...shelf.pools.map(([model], i) => h("li", {}, swatch(colour(model, "used")), h("span", { className: "name" }, printable(this.house.name(model))), this.items[i])),
      );
    }
    shelf.pools.forEach(([, weights, kv], i) => say(this.items[i], `${size(weights)} + ${size(kv)}`));
  }

  // A look at one moment.

  #momentAt(x) {
    const newest = this.house.moments.at(-1);
    if (newest === undefined) return null;
    const at = newest.at - WINDOW_S * (1 - x / this.canvas.clientWidth);
    return this.house.moments.find((moment) => moment.at >= at && moment.at - moment.span <= at) ?? null;
  }

  #key(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -15, PageDown: 15 }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    const { moments } = this.house;
    const here = this.cursor === null ? moments.length - 1 : moments.indexOf(this.cursor);
    this.#look(moments[Math.max(0, Math.min(moments.length - 1, here + step))]);
  }

  #look(moment) {
    this.cursor = moment ?? null;
    const reading = $("reading");
    const shelf = moment?.shelves[this.place];
    reading.hidden = shelf === undefined;
    if (shelf === undefined) return;
    const rows = [...shelf.pools].reverse().map(([model, weights, kv, used]) => [
      swatch(colour(model, "used")),
      printable(this.house.name(model)),
      size(weights),
      kv ? `${size(used)} of ${size(kv)}` : "",
    ]);
    rows.push(...[...REST].reverse().filter((kind) => shelf[kind]).map((kind) => [swatch(grey(kind)), REST_WORDS[kind], size(shelf[kind]), ""]));
    const line = ([mark, name, fixed, pool]) =>
      h("tr", {}, h("td", {}, mark, name), h("td", { className: "n" }, fixed), h("td", { className: "n" }, pool));
    reading.replaceChildren(
      h("p", {}, h("b", {}, `GPU ${this.device.gpu_id}`), ` ${time(moment.at)}`, h("span", { className: "n" }, `${size(total(shelf))} of ${size(this.device.mib)}`)),
      h("table", {}, ...rows.map(line)),
    );
    const box = this.canvas.getBoundingClientRect();
    const x = box.right - ((this.house.at - moment.at) / WINDOW_S) * box.width;
    const widest = reading.offsetWidth;
    reading.style.left = `${Math.max(8, Math.min(innerWidth - widest - 8, x - widest / 2))}px`;
    const below = box.bottom + 8 + reading.offsetHeight < innerHeight;
    reading.style.top = `${below ? box.bottom + 8 : Math.max(8, box.top - reading.offsetHeight - 8)}px`;
  }
}

const total = (shelf) => REST.reduce((sum, kind) => sum + shelf[kind], 0) + shelf.pools.reduce((sum, [, weights, kv]) => sum + weights + kv, 0);

const where = (device) => [device.name, device.node === "local" ? "" : device.node].filter(Boolean).map(printable).join(" · ");
