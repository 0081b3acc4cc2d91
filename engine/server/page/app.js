// Tabs, theme and key: what both views share.

import { findModel, hasKey, setKey } from "./api.js";
import { showError } from "./chat.js";
import { openPool } from "./pool.js";

const $ = (id) => document.getElementById(id);
const tabs = [$("tab-chat"), $("tab-pool")];

function select(tab, focus = true) {
  for (const other of tabs) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", chosen);
    other.tabIndex = chosen ? 0 : -1;
    $(other.getAttribute("aria-controls")).hidden = !chosen;
  }
  if (focus) tab.focus();
  history.replaceState(null, "", tab === $("tab-pool") ? "#pool" : location.pathname + location.search);
  if (tab === $("tab-pool")) openPool();
}

for (const tab of tabs) {
  tab.addEventListener("click", () => select(tab));
  tab.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") select(tabs[1 - tabs.indexOf(tab)]);
  });
}

const stored = localStorage.getItem("theme");
if (stored) document.documentElement.dataset.theme = stored;
$("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  root.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("theme", root.dataset.theme);
  document.dispatchEvent(new Event("theme"));
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => document.dispatchEvent(new Event("theme")));

function askForKey(reason) {
  if (reason) $("key-reason").textContent = reason;
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

$("key").addEventListener("click", () => askForKey());
document.addEventListener("key-needed", (event) => askForKey(event.detail));
$("cancel-key").addEventListener("click", () => $("key-dialog").close("cancel"));
$("key-dialog").querySelector("form").addEventListener("submit", () => {
  setKey($("key-input").value.trim());
  begin();
});
$("key-dialog").addEventListener("close", () => ($("key-input").value = ""));

function begin() {
  $("key").textContent = hasKey() ? "Key ✓" : "Key";
  findModel().catch((error) => error.status !== 401 && showError(error.message)); // the dialog says that
  if (location.hash === "#pool") openPool();
}

if (location.hash === "#pool") select(tabs[1], false);
begin();
