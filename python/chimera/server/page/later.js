// Work that need not be done in this frame, and what of the page is worth working on: what can be seen, or nearly.

const BUDGET_MS = 8;
const waiting = new Set();
let due = 0;

/** A few milliseconds of it in each frame. What waits already does not wait twice. */
export function later(work) {
  waiting.add(work);
  due ||= requestAnimationFrame(some);
}

function some() {
  const until = performance.now() + BUDGET_MS;
  for (const work of waiting) {
    waiting.delete(work);
    work();
    if (performance.now() > until) break;
  }
  due = waiting.size ? requestAnimationFrame(some) : 0;
}

const watched = new WeakMap();
const eye = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      const thing = watched.get(target);
      if (thing.near === isIntersecting) continue;
      thing.near = isIntersecting;
      if (isIntersecting) later(thing.come);
    }
  },
  { rootMargin: "300px" },
);

/** Keeps `thing.near`, and calls `thing.come` when its node is about to be seen. */
export function watchFor(thing, node) {
  thing.near = false;
  watched.set(node, thing);
  eye.observe(node);
}

export const forget = (nodes) => nodes.forEach((node) => eye.unobserve(node));
