// The server, as the page asks it: with the key where there is one, and asking for one where it is missing.

import { $ } from "./words.js";

const KEY = "chimera-key";
let asking = null;

export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

function headers() {
  const key = sessionStorage.getItem(KEY);
  return key === null ? {} : { authorization: `Bearer ${key}` };
}

async function refusal(response) {
  const told = await response.json().catch(() => ({}));
  return new Refusal(response.status, told.error?.message ?? `the server answers ${response.status}`);
}

/** The answer, whatever is in it. Without a key, or with one that is not enough, its reader is asked for one, once. */
export async function ask(path, options = {}) {
  for (let tries = 0; ; tries++) {
    const response = await fetch(path, { ...options, headers: { ...options.headers, ...headers() } });
    if (response.ok) return response;
    const fault = await refusal(response);
    if ((fault.status === 401 || fault.status === 403) && tries === 0 && (await askForKey(fault.message))) continue;
    throw fault;
  }
}

export const read = async (path) => (await ask(path)).json();

export async function order(method, path, body) {
  const options = { method, headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
  return (await ask(path, options)).json();
}

/** Whether a key was given. Whoever asks while the question is open waits for the same answer. */
export function askForKey(why) {
  asking ??= new Promise((resolve) => {
    const dialog = $("key");
    $("key-why").textContent = `${why}. The key is kept in this tab only.`;
    $("key-input").value = "";
    dialog.returnValue = "";
    dialog.addEventListener(
      "close",
      () => {
        const key = $("key-input").value.trim();
        asking = null;
        if (dialog.returnValue === "cancel" || key === "") return resolve(false);
        sessionStorage.setItem(KEY, key);
        dispatchEvent(new Event("key"));
        resolve(true);
      },
      { once: true },
    );
    dialog.showModal();
  });
  return asking;
}

$("key-cancel").addEventListener("click", () => $("key").close("cancel"));
$("key").addEventListener("cancel", () => ($("key-input").value = ""));

/** Each event's data of a stream, as it comes. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    for (let end = text.indexOf("\n\n"); end >= 0; end = text.indexOf("\n\n")) {
      const line = text.slice(0, end);
      text = text.slice(end + 2);
      if (line.startsWith("data: ")) yield line.slice(6);
    }
  }
}

const FIRST_MS = 250;
const LONGEST_MS = 5000;
const SILENCE_MS = 6000;

/** Looks on for ever: comes back when the server does. */
export async function watch(path, onEvent, onState) {
  let pause = FIRST_MS;
  for (;;) {
    const leaving = new AbortController();
    const rekeyed = () => leaving.abort();
    addEventListener("key", rekeyed);
    let silence = setTimeout(() => leaving.abort(), SILENCE_MS);
    try {
      for await (const data of events(await ask(path, { signal: leaving.signal }))) {
        clearTimeout(silence);
        silence = setTimeout(() => leaving.abort(), SILENCE_MS);
        pause = FIRST_MS;
        onEvent(JSON.parse(data));
      }
      onState("the stream has ended");
    } catch (fault) {
      onState(fault instanceof Refusal ? fault.message : "the server is away");
    } finally {
      clearTimeout(silence);
      removeEventListener("key", rekeyed);
      leaving.abort();
    }
    await new Promise((resolve) => setTimeout(resolve, pause * (0.75 + Math.random() / 2)));
    pause = Math.min(LONGEST_MS, pause * 2);
  }
}
