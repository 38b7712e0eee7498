// What is known of the house: the newest sight, and the last five minutes of every GPU's memory. Draws nothing.

export const WINDOW_S = 300;
const PLAIN = { aliases: [], pin: false, embedding: false, ttft_slo_s: null, tpot_slo_s: null, weight_mib: 0, kv_bytes: 0 };
export const STATES = { serving: "serving", loading: "loading", draining: "draining", stopped: "down" };

export class House {
  constructor() {
    this.cast = { number: 0, models: [], gpus: [] };
    this.at = 0;
    this.policy = "";
    this.local = "";
    this.fault = "";
    this.replicas = [];
    this.pulses = [];
    this.news = [];
    this.moments = [];
    /** Of each: when, for how long it stands, and each GPU's shelf: pools `[model, weights, kv, used]`, and what is nobody's. */
    this.replaced = true;
  }


  /** What one model does, all its replicas together. */
  *models() {
    const replicas = Map.groupBy(this.replicas, (replica) => replica.model);
    const pulses = new Map(this.pulses.map((pulse) => [pulse.model, pulse]));
    for (const [index, part] of this.cast.models.entries()) {
      yield { index, part, replicas: replicas.get(index) ?? [], pulse: pulses.get(index) ?? pulseOf([index]) };
    }
  }

  name(model) {
    return this.cast.models[model]?.name ?? "another model";
  }

  lookBack(past) {
    this.#recast(past.cast);
    const began = past.moments[0] ?? Infinity;
    const before = this.moments.filter((moment) => moment.at < began);
    const shelves = past.gpus.map((stretches) => unrolled(stretches, past.moments.length));
    const after = past.moments.map((at, i) => ({
      at,
      span: i ? at - past.moments[i - 1] : 1,
      shelves: shelves.map((shelf) => shelf[i]),
    }));
    this.moments = [...before, ...after];
    this.at = after.at(-1)?.at ?? this.at;
    this.#remember(past.news);
    this.replaced = true;
  }

  /** Whether it can be read: who has just come knows no cast yet. */
  see(sight) {
    if (sight.changed && this.cast.number) this.#recast(sight.changed);
    if (sight.cast !== this.cast.number) return false;
    this.#remember(sight.news);
    if (sight.at_s <= this.at) return true;
    const span = Math.min(3, sight.at_s - this.at);
    const shelves = sight.shelves.map(([pools, engines, adapters, others]) => ({ pools, engines, adapters, others }));
    this.at = sight.at_s;
    this.moments.push({ at: this.at, span, shelves });
    const oldest = this.at - WINDOW_S;
    const gone = this.moments.findIndex((moment) => moment.at >= oldest);
    if (gone > 0) this.moments.splice(0, gone);
    this.policy = sight.policy;
    this.local = sight.local;
    this.fault = sight.fault;
    this.replicas = sight.replicas.map(replicaOf);
    this.pulses = sight.pulses.map(pulseOf);
    return true;
  }

  /** Models have new places: the past is told in them as well. */
  #recast(cast) {
    const places = new Map(cast.models.map((part, place) => [part.name, place]));
    const moved = this.cast.models.map((part) => places.get(part.name) ?? -1);
    if (moved.some((place, index) => place !== index)) {
      for (const { shelves } of this.moments)
        for (const { pools } of shelves) {
          for (const pool of pools) pool[0] = moved[pool[0]] ?? -1;
          pools.sort((a, b) => a[0] - b[0]);
        }
    }
    this.replaced = true;
    this.cast = { ...cast, models: cast.models.map((part) => ({ ...PLAIN, ...part })) };
  }

  #remember(news) {
    const newest = this.news.at(-1)?.number ?? 0;
    this.news.push(...news.map(([number, entry]) => ({ number, ...entry })).filter((one) => one.number > newest));
    this.news.splice(0, this.news.length - 400);
  }
}

function replicaOf([model, index, state, gpus, running, queued, kv, used, age, failures, quarantine, why]) {
  return { model, index, state, gpus, running, queued, kv, used, age, failures, quarantine, why };
}

function pulseOf([model, waiting = 0, requests = 0, tokens = 0, sent = 0, kept = 0]) {
  return { model, waiting, requests, tokens, sent, kept };
}

/** Runs of `(value, times)` to a shelf for each moment. */
function unrolled(stretches, moments) {
  const shelves = Array.from({ length: moments }, () => ({ pools: [], engines: 0, adapters: 0, others: 0 }));
  const place = { weights: 1, kv: 2, used: 3 };
  for (const [model, kind, runs] of [...stretches].sort(([a], [b]) => a - b)) {
    let i = 0;
    for (let r = 0; r < runs.length; r += 2) {
      for (const end = i + runs[r + 1]; i < end; i++) {
        if (!(kind in place)) shelves[i][kind] = runs[r];
        else if (kind === "weights") shelves[i].pools.push([model, runs[r], 0, 0]);
        else shelves[i].pools.find((pool) => pool[0] === model)[place[kind]] = runs[r];
      }
    }
  }
  for (const shelf of shelves) shelf.pools = shelf.pools.filter(([, weights, kv]) => weights + kv > 0);
  return shelves;
}
