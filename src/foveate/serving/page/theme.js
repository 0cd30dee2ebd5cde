// Runs before the first paint, so that a chosen scheme does not flash the other one.
"use strict";

(() => {
  let kept = null;
  try {
    kept = localStorage.getItem("foveate-theme");
  } catch {
    // Storage may be forbidden; the system's scheme then holds.
  }
  if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
})();
