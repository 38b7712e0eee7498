// The drawer at the side: one thing at a time, a request, a model or a chat.

import { $ } from "./words.js";

let opener = null;
let onClose = null;

export function openDrawer(title, kind, nodes, closed = null) {
  onClose?.();
  onClose = closed;
  const drawer = $("drawer");
  if (drawer.hidden) opener = document.activeElement;
  $("drawer-title").textContent = title;
  $("drawer-body").replaceChildren(...nodes);
  drawer.dataset.kind = kind;
  drawer.hidden = false;
  document.body.classList.add("drawn");
  drawer.focus();
}

export function fillDrawer(...nodes) {
  $("drawer-body").replaceChildren(...nodes);
}

export function closeDrawer() {
  if ($("drawer").hidden) return;
  onClose?.();
  onClose = null;
  $("drawer").hidden = true;
  document.body.classList.remove("drawn");
  opener?.focus();
}

$("drawer-close").addEventListener("click", closeDrawer);
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("key").open) closeDrawer();
});
