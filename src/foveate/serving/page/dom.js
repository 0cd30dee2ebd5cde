// Small helpers. Text only ever goes in through textContent and attributes: nothing here parses HTML.

export const $ = (id) => document.getElementById(id);

/** make("p", { class: "hint", "aria-hidden": "true", on: { click } }, "text", element) */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  fill(element, properties);
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export function makeSvg(tag, properties = {}) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  fill(element, properties);
  return element;
}

function fill(element, properties) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else if (name === "vars") for (const [key, own] of Object.entries(value)) element.style.setProperty(key, own);
    else element.setAttribute(name, value === true ? "" : value);
  }
}

/** A probability; 100 % is said of certainty alone. */
export function percent(value) {
  return `${value >= 1 ? 100 : Math.min(99, Math.round(value * 100))}\u202f%`;
}

export function duration(milliseconds) {
  return milliseconds < 10_000 ? `${Math.round(milliseconds)}\u202fms` : `${(milliseconds / 1000).toFixed(1)}\u202fs`;
}

export function plural(count, one, many = `${one}s`) {
  return `${count} ${count === 1 ? one : many}`;
}

/** What of a picture lies in a box, drawn into a new canvas whose longer side has so many pixels. */
export function crop(image, [x0, y0, x1, y1], side) {
  const scale = side / Math.max(x1 - x0, y1 - y0);
  const canvas = make("canvas", {
    width: Math.max(1, Math.round((x1 - x0) * scale)),
    height: Math.max(1, Math.round((y1 - y0) * scale)),
    "aria-hidden": "true",
  });
  canvas.getContext("2d").drawImage(image, x0, y0, x1 - x0, y1 - y0, 0, 0, canvas.width, canvas.height);
  return canvas;
}

/** Copies a text; returns whether that worked. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Pages that do not come over https or from this machine have no clipboard; the old way may still work.
    const area = make("textarea", { class: "unseen", readonly: true, "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}
